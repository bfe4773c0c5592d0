# ruff: noqa: N802  # methods are named as in the .proto
"""HostService: each call, in one place, as what it hands to whom.

Reads go to libvirt. Calls that change something go through `StepRunner.run`: fenced,
one at a time for each machine, and to the end even when the caller goes away.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc.aio

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.config import HostdConfig
from hostd.copies import Copies, CopyOrder
from hostd.facts import take_inventory
from hostd.fence import check_uuid
from hostd.hypervisor import Hypervisor
from hostd.jobs import JobBoard, JobOwner, JobStore
from hostd.preparing import Preparation
from hostd.reach import check_reach
from hostd.records import Records
from hostd.source import SourceSteps
from hostd.steps import StepRunner, Workers
from hostd.stopping import Stops
from hostd.target import TargetSteps
from hostd.transfer import KEY_BYTES
from hostd.v1 import (
    domain_pb2,
    fence_pb2,
    host_pb2,
    host_service_pb2,
    host_service_pb2_grpc,
    job_pb2,
    preflight_pb2,
)

Context = grpc.aio.ServicerContext[Any, Any]
_LONGEST_JOB_ID = 200
_MOST_CONNECTIONS = 64


@dataclass(frozen=True, kw_only=True)
class HostServicer(host_service_pb2_grpc.HostServiceServicer):
    """The servicer; see hostd/v1/host_service.proto for what each call means."""

    config: HostdConfig
    hypervisor: Hypervisor
    runner: StepRunner
    workers: Workers
    records: Records
    jobs: JobStore
    board: JobBoard
    copies: Copies
    stops: Stops
    source: SourceSteps
    preparation: Preparation
    target: TargetSteps

    # --- looking

    async def GetInventory(
        self, request: host_service_pb2.GetInventoryRequest, context: Context
    ) -> host_pb2.Inventory:
        """Everything on this host."""
        return await self.workers.read(
            lambda: take_inventory(self.hypervisor, self.records, self.target.files)
        )

    async def GetDomain(
        self, request: host_service_pb2.GetDomainRequest, context: Context
    ) -> domain_pb2.Domain:
        """One domain, afresh."""
        check_uuid("domain_uuid", request.domain_uuid)
        return await self.workers.read(lambda: self.hypervisor.describe(request.domain_uuid))

    async def CheckSource(
        self, request: host_service_pb2.CheckSourceRequest, context: Context
    ) -> preflight_pb2.PreflightReport:
        """Could it leave?"""
        check_uuid("domain_uuid", request.domain_uuid)
        return await self.workers.read(lambda: self.hypervisor.check_source(request.domain_uuid))

    async def CheckTarget(
        self, request: host_service_pb2.CheckTargetRequest, context: Context
    ) -> preflight_pb2.PreflightReport:
        """Could it live here?"""
        return await self.workers.read(lambda: self.preparation.check(request.machine))

    async def CheckReach(
        self, request: host_service_pb2.CheckReachRequest, context: Context
    ) -> preflight_pb2.PreflightReport:
        """Could it send there?"""
        return await self.workers.read(lambda: check_reach(self.config.host, request.data_address))

    # --- the source's half

    async def EnsureStopped(
        self, request: host_service_pb2.EnsureStoppedRequest, context: Context
    ) -> host_service_pb2.EnsureStoppedResponse:
        """Bring it down."""
        return await self.runner.run(request.fence, lambda: self._ensure_stopped(request))

    async def _ensure_stopped(
        self, request: host_service_pb2.EnsureStoppedRequest
    ) -> host_service_pb2.EnsureStoppedResponse:
        parked = await self.workers.step(lambda: self.source.stopped_if_parked(request.fence))
        return parked or await self.stops.ensure_stopped(request)

    async def RestorePower(
        self, request: host_service_pb2.RestorePowerRequest, context: Context
    ) -> host_service_pb2.RestorePowerResponse:
        """Bring it up again if it ran."""
        fence = request.fence
        restored = await self.runner.run(
            fence,
            lambda: self.stops.restore(fence, may_run_here=lambda: self._refuse_strangers(fence)),
        )
        return host_service_pb2.RestorePowerResponse(restored=restored)

    def _refuse_strangers(self, fence: fence_pb2.Fence) -> None:
        self.source.refuse_if_parked(fence.domain_uuid)
        self.target.refuse_unless_owned(fence.migration_id)

    async def EnsureParked(
        self, request: host_service_pb2.EnsureParkedRequest, context: Context
    ) -> host_service_pb2.EnsureParkedResponse:
        """Put it aside."""
        return await self.runner.run_blocking(
            request.fence, lambda: self.source.ensure_parked(request.fence)
        )

    async def EnsureUnparked(
        self, request: host_service_pb2.EnsureUnparkedRequest, context: Context
    ) -> host_service_pb2.EnsureUnparkedResponse:
        """Put it back."""

        async def work() -> None:
            await self.copies.cancel_all(JobOwner.of(request.fence))
            await self.workers.step(lambda: self.source.ensure_unparked(request.fence))

        await self.runner.run(request.fence, work)
        return host_service_pb2.EnsureUnparkedResponse()

    async def DiscardParked(
        self, request: host_service_pb2.DiscardParkedRequest, context: Context
    ) -> host_service_pb2.DiscardParkedResponse:
        """Delete what was put aside."""

        async def work() -> int:
            await self.copies.cancel_all(JobOwner.of(request.fence))
            return await self.workers.step(lambda: self.source.discard(request.fence))

        freed_bytes = await self.runner.run(request.fence, work)
        return host_service_pb2.DiscardParkedResponse(freed_bytes=freed_bytes)

    # --- the copy

    async def OpenReceive(
        self, request: host_service_pb2.OpenReceiveRequest, context: Context
    ) -> host_service_pb2.OpenReceiveResponse:
        """Let the source send."""
        _check_key(request.session_key)
        await self.runner.run_blocking(request.fence, lambda: self.target.open_receive(request))
        return host_service_pb2.OpenReceiveResponse(data_address=self.config.listen.data_address)

    async def StartCopy(
        self, request: host_service_pb2.StartCopyRequest, context: Context
    ) -> job_pb2.Job:
        """Send, or go on sending."""
        _check_key(request.session_key)
        _check_job_id(request.job_id)
        if request.connections > _MOST_CONNECTIONS:
            raise DroverError(
                Reason.INVALID_FIELD,
                f"connections is {request.connections}; at most {_MOST_CONNECTIONS} are opened.",
                subject="connections",
            )
        return await self.runner.run(request.fence, lambda: self._start_copy(request))

    async def _start_copy(self, request: host_service_pb2.StartCopyRequest) -> job_pb2.Job:
        fence = request.fence
        volumes = await self.workers.step(
            lambda: self.source.outgoing(fence, list(request.volume_ids))
        )
        order = CopyOrder(
            job_id=request.job_id,
            owner=JobOwner.of(fence),
            key=request.session_key,
            to=request.data_address,
            receiver=request.receiver_identity,
            volumes=volumes,
            total_bytes=sum(volume.size_bytes or 0 for volume in volumes),
            connections=request.connections or self.config.limits.copy_connections,
            limit_bytes_per_second=request.limit_bytes_per_second,
        )
        return await self.copies.start(order)

    async def GetJob(
        self, request: host_service_pb2.GetJobRequest, context: Context
    ) -> job_pb2.Job:
        """A job now."""
        return await self.board.get(request.job_id)

    async def WatchJob(
        self, request: host_service_pb2.WatchJobRequest, context: Context
    ) -> AsyncIterator[job_pb2.Job]:
        """A job now and as it changes."""
        async for job in self.board.watch(request.job_id):
            yield job

    async def SetCopyLimit(
        self, request: host_service_pb2.SetCopyLimitRequest, context: Context
    ) -> job_pb2.Job:
        """Another limit."""
        return await self.runner.run(
            request.fence,
            lambda: self.copies.set_limit(
                JobOwner.of(request.fence), request.job_id, request.limit_bytes_per_second
            ),
        )

    async def CancelJob(
        self, request: host_service_pb2.CancelJobRequest, context: Context
    ) -> host_service_pb2.CancelJobResponse:
        """End a job."""
        owner = JobOwner.of(request.fence)
        await self.runner.run(request.fence, lambda: self.copies.cancel(owner, request.job_id))
        return host_service_pb2.CancelJobResponse()

    # --- the target's half

    async def PrepareTarget(
        self, request: host_service_pb2.PrepareTargetRequest, context: Context
    ) -> host_service_pb2.PrepareTargetResponse:
        """Check and reserve."""
        return await self.runner.run_blocking(
            request.fence, lambda: self.preparation.prepare(request)
        )

    async def EnsureBuilt(
        self, request: host_service_pb2.EnsureBuiltRequest, context: Context
    ) -> host_service_pb2.EnsureBuiltResponse:
        """Define it."""
        domain = await self.runner.run_blocking(
            request.fence, lambda: self.target.ensure_built(request)
        )
        return host_service_pb2.EnsureBuiltResponse(domain=domain)

    async def EnsureUndefined(
        self, request: host_service_pb2.EnsureUndefinedRequest, context: Context
    ) -> host_service_pb2.EnsureUndefinedResponse:
        """Take the definition away."""
        await self.runner.run_blocking(
            request.fence, lambda: self.target.ensure_undefined(request.fence)
        )
        return host_service_pb2.EnsureUndefinedResponse()

    async def EnsureStarted(
        self, request: host_service_pb2.EnsureStartedRequest, context: Context
    ) -> host_service_pb2.EnsureStartedResponse:
        """Start it here."""
        return await self.runner.run_blocking(
            request.fence, lambda: self.target.ensure_started(request.fence)
        )

    async def EnsureAbsent(
        self, request: host_service_pb2.EnsureAbsentRequest, context: Context
    ) -> host_service_pb2.EnsureAbsentResponse:
        """Remove all that the move put here."""
        await self.runner.run_blocking(
            request.fence, lambda: self.target.ensure_absent(request.fence)
        )
        return host_service_pb2.EnsureAbsentResponse()

    async def ForgetMigration(
        self, request: host_service_pb2.ForgetMigrationRequest, context: Context
    ) -> host_service_pb2.ForgetMigrationResponse:
        """Drop the records of a move that has ended."""
        migration_id = request.fence.migration_id

        async def work() -> None:
            await self.workers.step(lambda: self.source.forget(migration_id))
            await self.workers.step(lambda: self.target.forget(migration_id))
            await self.copies.cancel_all(JobOwner.of(request.fence))
            await self.workers.step(lambda: self.jobs.drop(migration_id))
            await self.stops.forget(migration_id)

        await self.runner.run(request.fence, work)
        return host_service_pb2.ForgetMigrationResponse()


def _check_key(key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise DroverError(
            Reason.INVALID_FIELD,
            f"session_key has {len(key)} bytes instead of {KEY_BYTES}.",
            subject="session_key",
        )


def _check_job_id(job_id: str) -> None:
    if not 0 < len(job_id) <= _LONGEST_JOB_ID:
        raise DroverError(
            Reason.INVALID_FIELD,
            f"job_id has {len(job_id)} characters; 1 to {_LONGEST_JOB_ID} are taken.",
            subject="job_id",
        )
