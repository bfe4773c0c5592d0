"""A simulated host that machines can leave and come to, on a real mutual-TLS port."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from controlplane.common.errors import DroverError
from controlplane.common.identity import host_identity
from controlplane.common.reasons import Reason
from controlplane.common.rpc import ErrorInterceptor, TlsPaths
from controlplane.security.pki import KeyPair, private_key_pem
from controlplane.v1 import host_service_pb2
from controlplane.v1.host_service_pb2_grpc import EnrollmentServiceStub, HostServiceStub
from hostd.v1 import domain_pb2, host_service_pb2_grpc, job_pb2
from hostd.v1 import host_service_pb2 as hostd
from tests.controlplane.simulated_host import SimulatedHost

GIB = 1 << 30


@dataclass
class Network:
    """What is on its way between hosts: machines by UUID."""

    sent: dict[str, domain_pb2.Domain] = field(default_factory=dict)


class MovingHost(SimulatedHost):
    """Keeps machines, parked machines and copy jobs in memory.

    Attributes:
        parked: Machines moved aside, by UUID.
        hold_copies: While set, copies make no further progress.
    """

    def __init__(self, name: str, network: Network) -> None:
        super().__init__(name, Path("unused"))
        self.network = network
        self.parked: dict[str, domain_pb2.Domain] = {}
        self.ran: dict[str, bool] = {}
        self.jobs: dict[str, job_pb2.Job] = {}
        self.hold_copies = asyncio.Event()
        self.refusals: dict[str, DroverError] = {}

    async def _answer(self, method: str) -> None:
        await super()._answer(method)
        if method in self.refusals:
            raise self.refusals[method]

    def _domain(self, uuid: str) -> domain_pb2.Domain:
        if uuid not in self.domains:
            raise DroverError(Reason.DOMAIN_NOT_FOUND, f"No domain {uuid} on {self.name}.")
        return self.domains[uuid]

    async def PrepareTarget(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._answer("PrepareTarget")
        return hostd.PrepareTargetResponse(
            data_address="127.0.0.1:1", data_identity=host_identity("lab", self.name).uri
        )

    async def EnsureStopped(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._answer("EnsureStopped")
        uuid = request.fence.domain_uuid
        domain = self._domain(uuid)
        running = domain.power_state == domain_pb2.POWER_STATE_RUNNING
        self.ran[uuid] = self.ran.get(uuid, False) or running
        domain.power_state = domain_pb2.POWER_STATE_SHUTOFF
        before = domain_pb2.POWER_STATE_RUNNING if self.ran[uuid] else domain.power_state
        return hostd.EnsureStoppedResponse(stopped=True, previous_power_state=before)

    async def RestorePower(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._answer("RestorePower")
        uuid = request.fence.domain_uuid
        if self.ran.get(uuid):
            self._domain(uuid).power_state = domain_pb2.POWER_STATE_RUNNING
        return hostd.RestorePowerResponse(restored=True)

    async def EnsureParked(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._answer("EnsureParked")
        uuid = request.fence.domain_uuid
        if uuid not in self.parked:
            self.parked[uuid] = self._domain(uuid)
            del self.domains[uuid]
        return hostd.EnsureParkedResponse(volumes=self.parked[uuid].volumes)

    async def EnsureUnparked(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._answer("EnsureUnparked")
        uuid = request.fence.domain_uuid
        if uuid in self.parked:
            self.domains[uuid] = self.parked.pop(uuid)
        return hostd.EnsureUnparkedResponse()

    async def DiscardParked(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._answer("DiscardParked")
        self.parked.pop(request.fence.domain_uuid, None)
        return hostd.DiscardParkedResponse()

    async def OpenReceive(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._answer("OpenReceive")
        return hostd.OpenReceiveResponse(data_address="127.0.0.1:1")

    async def StartCopy(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._answer("StartCopy")
        uuid = request.fence.domain_uuid
        job = job_pb2.Job(job_id=request.job_id, state=job_pb2.Job.STATE_RUNNING)
        job.create_time.GetCurrentTime()
        job.progress.limit_bytes_per_second = request.limit_bytes_per_second
        job.progress.total_bytes = sum(v.size_bytes for v in self.parked[uuid].volumes)
        self.jobs[request.job_id] = job
        self.network.sent[uuid] = domain_pb2.Domain()
        self.network.sent[uuid].CopyFrom(self.parked[uuid])
        return job

    async def GetJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._answer("GetJob")
        if request.job_id not in self.jobs:
            raise DroverError(Reason.JOB_NOT_FOUND, f"No job {request.job_id}.")
        job = self.jobs[request.job_id]
        if job.state == job_pb2.Job.STATE_RUNNING and not self.hold_copies.is_set():
            self._advance(job)
        return job

    def _advance(self, job: job_pb2.Job) -> None:
        job.progress.done_bytes += job.progress.total_bytes // 2
        job.progress.rate_bytes_per_second = GIB
        job.update_time.GetCurrentTime()
        if job.progress.done_bytes >= job.progress.total_bytes:
            job.state = job_pb2.Job.STATE_SUCCEEDED
            total = job.progress.total_bytes
            job.receipts.add(volume_id="vda", size_bytes=total, data_bytes=total, digest="ab" * 32)

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        yield await self.GetJob(request, context)

    async def SetCopyLimit(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._answer("SetCopyLimit")
        job = self.jobs[request.job_id]
        job.progress.limit_bytes_per_second = request.limit_bytes_per_second
        return job

    async def CancelJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._answer("CancelJob")
        if request.job_id in self.jobs:
            self.jobs[request.job_id].state = job_pb2.Job.STATE_CANCELLED
        return hostd.CancelJobResponse()

    async def EnsureBuilt(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._answer("EnsureBuilt")
        uuid = request.fence.domain_uuid
        if uuid not in self.domains:
            self.domains[uuid] = self.network.sent[uuid]
            self.domains[uuid].power_state = domain_pb2.POWER_STATE_SHUTOFF
            if request.HasField("size"):
                self.domains[uuid].vcpus = request.size.vcpus
                self.domains[uuid].memory_mib = request.size.memory_mib
        return hostd.EnsureBuiltResponse()

    async def EnsureUndefined(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._answer("EnsureUndefined")
        self.domains.pop(request.fence.domain_uuid, None)
        return hostd.EnsureUndefinedResponse()

    async def EnsureStarted(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._answer("EnsureStarted")
        uuid = request.fence.domain_uuid
        self._domain(uuid).power_state = domain_pb2.POWER_STATE_RUNNING
        return hostd.EnsureStartedResponse(running=True)

    async def EnsureAbsent(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._answer("EnsureAbsent")
        self.domains.pop(request.fence.domain_uuid, None)
        return hostd.EnsureAbsentResponse()

    async def ForgetMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._answer("ForgetMigration")
        self.ran.pop(request.fence.domain_uuid, None)
        return hostd.ForgetMigrationResponse()


@asynccontextmanager
async def joined(
    host: MovingHost, api: grpc.aio.Channel, enrol: grpc.aio.Channel, directory: Path
) -> AsyncIterator[MovingHost]:
    """Add a host, have it join, and serve it with the certificate that it was given."""
    from controlplane.security.tokens import JoinToken

    added = await HostServiceStub(api).AddHost(
        host_service_pb2.AddHostRequest(host_id=host.name), timeout=60
    )
    token = JoinToken.decode(added.join_token)
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    address = f"127.0.0.1:{_free_port()}"
    answer = await EnrollmentServiceStub(enrol).JoinHost(
        host_service_pb2.JoinHostRequest(
            secret=token.secret,
            host_id=host.name,
            csr_pem=csr.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM),
            address=address,
        ),
        timeout=60,
    )
    tls = TlsPaths(
        directory / f"{host.name}.pem", directory / f"{host.name}.key", directory / "ca.pem"
    )
    KeyPair(answer.certificate_pem, private_key_pem(key)).write(tls.cert, tls.key)
    tls.ca.write_bytes(answer.ca_pem)
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    host_service_pb2_grpc.add_HostServiceServicer_to_server(host, server)
    server.add_secure_port(address, tls.server_credentials())
    await server.start()
    try:
        yield host
    finally:
        await server.stop(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
