"""A model of hosts for the saga matrix: in memory, fenced, with the invariants checked.

It stands in for hostds where every failure has to be tried at every step; that a
real hostd keeps the same promises is what tests/e2e and tests/hostd are for.
After every call the model checks that at most one host can start the machine
(I2) and that a complete copy of its disk exists (I1).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from controlplane.common.errors import DroverError, Transient
from controlplane.common.reasons import Reason
from hostd.v1 import domain_pb2, job_pb2, preflight_pb2
from hostd.v1 import host_service_pb2 as hostd


@dataclass
class ModelHost:
    """What one host has of the machine."""

    name: str
    defined: bool = False
    running: bool = False
    disk: bool = False
    parked: bool = False
    prepared: bool = False
    received: bool = False
    ever_built: bool = False
    ran_before_stop: bool | None = None
    highest: tuple[int, int] = (0, 0)
    jobs: dict[str, int] = field(default_factory=dict)
    sessions: set[bytes] = field(default_factory=set)
    gone: bool = False
    refusal: DroverError | None = None

    def undefine(self) -> None:
        """Somebody has destroyed and undefined the machine by hand; its disks stay."""
        self.defined = self.running = False

    def lose_machine(self) -> None:
        """The file system with the machine, parked or not, is gone or not mounted."""
        self.defined = self.running = self.parked = self.disk = False

    def lose_disks(self) -> None:
        """Its disks were deleted by hand; the definition is still there."""
        self.running = self.disk = self.received = False

    def lose(self) -> None:
        """The host is off for good, and an operator has said so."""
        self.gone, self.running, self.defined = True, False, False

    @property
    def traces(self) -> set[str]:
        """What a move has left here, beside the machine itself."""
        left = set()
        for flag in ("parked", "prepared", "received"):
            if getattr(self, flag):
                left.add(flag)
        if self.ran_before_stop is not None:
            left.add("stop record")
        return left


class Pause:
    """Holds the first call of a step up on its way to the host.

    Attributes:
        step: The step.
        begun: Set once the call is on its way.
        go_on: Set by the test to let it arrive.
        arrived: Set once it has.
    """

    def __init__(self, step: str) -> None:
        self.step = step
        self.begun, self.go_on, self.arrived = asyncio.Event(), asyncio.Event(), asyncio.Event()


class ModelFleet:
    """Implements `controlplane.sagas.resources.Hosts` over `ModelHost`s."""

    def __init__(self, domain: domain_pb2.Domain, *names: str) -> None:
        self.domain = domain
        self.hosts = {name: ModelHost(name) for name in names}
        self.calls: list[tuple[str, str]] = []
        # Method name -> what its report warns of.
        self.warnings: dict[str, str] = {}
        self.copy_polls = 2
        self.copy_cuts = 0
        self.start_fails = False
        self.out_of_reach: set[str] = set()
        self.pause: Pause | None = None
        self.refused = 0
        self._polled = 0
        self._had_copies: list[ModelHost] = []

    def settle_on(self, name: str, *, running: bool) -> None:
        """Put the machine on a host."""
        host = self.hosts[name]
        host.defined, host.disk, host.running = True, True, running

    @property
    def owner(self) -> list[str]:
        """Hosts that define the machine."""
        return [h.name for h in self.hosts.values() if h.defined]

    @property
    def runs_on(self) -> list[str]:
        """Hosts on which it runs."""
        return [h.name for h in self.hosts.values() if h.running]

    async def call(
        self, host: str, method: Callable[[Any], Any], request: Any, *, timeout_seconds: float = 30
    ) -> Any:
        """Answer a call."""
        name: str = method(_Names())
        self.calls.append((host, name))
        target = self.hosts[host]
        if target.gone:
            raise DroverError(Reason.HOST_GONE, f"hosts/{host} was declared gone.")
        if hasattr(request, "fence"):
            await self._pause_if_asked(request.fence.step)
            self._admit(target, request.fence)
        answer = getattr(self, f"_{name}")(target, request)
        self._check_invariants(name)
        return answer

    async def _pause_if_asked(self, step: str) -> None:
        pause = self.pause
        if pause is None or pause.step != step or pause.begun.is_set():
            return
        pause.begun.set()
        await pause.go_on.wait()
        pause.arrived.set()

    def _admit(self, host: ModelHost, fence: Any) -> None:
        assert fence.migration_id
        assert fence.step
        token = (fence.saga_seq, fence.generation)
        if token < host.highest:
            self.refused += 1
            raise Transient(DroverError(Reason.STALE_GENERATION, f"{token} < {host.highest}"))
        host.highest = token

    def _check_invariants(self, after: str) -> None:
        assert len(self.owner) <= 1, f"{after}: {self.owner} can start the machine"
        copies = [h for h in self.hosts.values() if h.disk or h.received]
        assert copies, f"{after}: no complete copy of the disk is left"
        if not all(h.gone for h in self._had_copies):
            assert not all(h.gone for h in copies), f"{after}: the last copy at hand is gone"
        self._had_copies = copies
        assert set(self.runs_on) <= set(self.owner)

    # --- the calls -----------------------------------------------------------

    def _GetDomain(self, host: ModelHost, request: Any) -> domain_pb2.Domain:  # noqa: N802
        if not host.defined:
            raise DroverError(Reason.DOMAIN_NOT_FOUND, f"not on {host.name}")
        if host.disk or host.received:
            return self.domain
        without_disks = domain_pb2.Domain()
        without_disks.CopyFrom(self.domain)
        for volume in without_disks.volumes:
            volume.size_bytes = 0
        return without_disks

    def _CheckSource(self, host: ModelHost, request: Any) -> Any:  # noqa: N802
        return self._report("CheckSource")

    def _report(self, method: str) -> preflight_pb2.PreflightReport:
        report = preflight_pb2.PreflightReport()
        if method in self.warnings:
            warn = preflight_pb2.PreflightCheck.OUTCOME_WARN
            report.checks.add(check="test", outcome=warn, message=self.warnings[method])
        return report

    def _CheckReach(self, host: ModelHost, request: Any) -> Any:  # noqa: N802
        report = preflight_pb2.PreflightReport()
        if request.data_address in self.out_of_reach:
            report.checks.add(
                check="data-port",
                outcome=preflight_pb2.PreflightCheck.OUTCOME_FAIL,
                reason=Reason.TARGET_UNREACHABLE.name,
                message=f"{request.data_address} cannot be reached.",
            )
        return report

    def _PrepareTarget(self, host: ModelHost, request: Any) -> Any:  # noqa: N802
        if host.refusal is not None:
            raise host.refusal
        host.prepared = True
        return hostd.PrepareTargetResponse(
            data_address=f"{host.name}:1",
            data_identity=f"drover://lab/host/{host.name}",
            report=self._report("PrepareTarget"),
        )

    def _EnsureStopped(self, host: ModelHost, request: Any) -> Any:  # noqa: N802
        if not host.defined and not host.parked:
            raise DroverError(Reason.DOMAIN_NOT_FOUND, f"not on {host.name}")
        if host.ran_before_stop is None:
            host.ran_before_stop = host.running
        host.running = False
        before = (
            domain_pb2.POWER_STATE_RUNNING
            if host.ran_before_stop
            else domain_pb2.POWER_STATE_SHUTOFF
        )
        return hostd.EnsureStoppedResponse(stopped=True, previous_power_state=before)

    def _RestorePower(self, host: ModelHost, request: Any) -> Any:  # noqa: N802
        if host.ran_before_stop:
            if not host.defined:
                raise DroverError(Reason.DOMAIN_NOT_FOUND, f"not on {host.name}")
            host.running = True
        return hostd.RestorePowerResponse(restored=True)

    def _EnsureParked(self, host: ModelHost, request: Any) -> Any:  # noqa: N802
        if host.running:
            raise DroverError(Reason.INSTANCE_STARTED_MEANWHILE, "it runs")
        if not host.defined and not host.parked:
            raise DroverError(Reason.DOMAIN_NOT_FOUND, f"not on {host.name}")
        host.defined, host.parked = False, True
        return hostd.EnsureParkedResponse(
            volumes=[
                *self.domain.volumes,
                domain_pb2.Volume(volume_id="baggage", kind=domain_pb2.VOLUME_KIND_BAGGAGE),
            ],
            report=self._report("EnsureParked"),
        )

    def _EnsureUnparked(self, host: ModelHost, request: Any) -> Any:  # noqa: N802
        if host.parked:
            host.parked, host.defined = False, True
        return hostd.EnsureUnparkedResponse()

    def _DiscardParked(self, host: ModelHost, request: Any) -> Any:  # noqa: N802
        if host.parked:
            host.parked = host.disk = False
        return hostd.DiscardParkedResponse()

    def _OpenReceive(self, host: ModelHost, request: Any) -> Any:  # noqa: N802
        assert host.prepared
        assert len(request.session_key) == 32
        assert request.session_key not in host.sessions, "a key is never used twice"
        host.sessions.add(request.session_key)
        return hostd.OpenReceiveResponse(data_address="x:1")

    def _GetJob(self, host: ModelHost, request: Any) -> Any:  # noqa: N802
        if request.job_id not in host.jobs:
            raise DroverError(Reason.JOB_NOT_FOUND, "never started")
        self._polled += 1
        running = host.jobs[request.job_id] == job_pb2.Job.STATE_RUNNING
        if running and self.copy_cuts:
            self.copy_cuts -= 1
            host.jobs[request.job_id] = job_pb2.Job.STATE_FAILED
        elif running and self._polled >= self.copy_polls:
            host.jobs[request.job_id] = job_pb2.Job.STATE_SUCCEEDED
            for other in self.hosts.values():
                other.received = other.received or other.prepared
        return self._job(host, request.job_id)

    def _StartCopy(self, host: ModelHost, request: Any) -> Any:  # noqa: N802
        assert host.parked
        host.jobs[request.job_id] = job_pb2.Job.STATE_RUNNING
        return self._job(host, request.job_id)

    def _job(self, host: ModelHost, job_id: str) -> job_pb2.Job:
        state = host.jobs[job_id]
        job = job_pb2.Job(job_id=job_id, state=state)  # type: ignore[arg-type]
        job.progress.done_bytes = self._polled
        if state == job_pb2.Job.STATE_FAILED:
            cut = DroverError(Reason.COPY_INTERRUPTED, "The link was lost.")
            job.error.CopyFrom(cut.to_status())
        if state == job_pb2.Job.STATE_SUCCEEDED:
            for volume in ("vda", "baggage"):
                job.receipts.add(volume_id=volume, size_bytes=10, digest="ab")
        return job

    def _CancelJob(self, host: ModelHost, request: Any) -> Any:  # noqa: N802
        if host.jobs.get(request.job_id) == job_pb2.Job.STATE_RUNNING:
            host.jobs[request.job_id] = job_pb2.Job.STATE_CANCELLED
        return hostd.CancelJobResponse()

    def _EnsureBuilt(self, host: ModelHost, request: Any) -> Any:  # noqa: N802
        assert host.received
        assert {d.volume_id for d in request.digests} == {"vda", "baggage"}
        host.defined = host.ever_built = True
        return hostd.EnsureBuiltResponse(domain=self.domain)

    def _EnsureUndefined(self, host: ModelHost, request: Any) -> Any:  # noqa: N802
        assert not host.running
        if host.received:
            host.defined = False
        return hostd.EnsureUndefinedResponse()

    def _EnsureStarted(self, host: ModelHost, request: Any) -> Any:  # noqa: N802
        if self.start_fails:
            raise DroverError(Reason.START_FAILED, "it does not start")
        if not host.running:
            assert host.defined
            host.running = True
            return hostd.EnsureStartedResponse(running=False)
        return hostd.EnsureStartedResponse(running=True)

    def _EnsureAbsent(self, host: ModelHost, request: Any) -> Any:  # noqa: N802
        assert not host.running
        if host.prepared:
            host.defined = host.received = host.prepared = False
        return hostd.EnsureAbsentResponse()

    def _ForgetMigration(self, host: ModelHost, request: Any) -> Any:  # noqa: N802
        assert not host.parked
        host.ran_before_stop = None
        if host.received:
            # The machine is this host's own now.
            host.prepared = host.received = False
            host.disk = True
        return hostd.ForgetMigrationResponse()


class _Names:
    """Stands for a stub: asked for a method, answers with its name."""

    def __getattr__(self, name: str) -> str:
        return name
