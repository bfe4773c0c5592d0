"""The API on a unix socket, over a real database, with simulated hosts.

The caller says in metadata who it is; that a certificate says so is tried in
the tests of controlplane.security.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
import pytest
from cryptography import x509
from grpc_status import rpc_status
from sqlalchemy import Connection

from controlplane.api.enrollment import EnrollmentServicer
from controlplane.api.flavors import FlavorServicer
from controlplane.api.hosts import HostServicer
from controlplane.api.instances import InstanceServicer
from controlplane.api.migrations import MigrationServicer
from controlplane.api.services import Sagas, Services
from controlplane.common import principal
from controlplane.common.errors import DroverError
from controlplane.common.identity import Identity
from controlplane.common.reasons import Reason
from controlplane.common.rpc import ErrorInterceptor
from controlplane.domain.model import Host
from controlplane.domain.states import HostState
from controlplane.fleet.clients import HostClients
from controlplane.fleet.inventory import InventoryPoller, InventorySettings
from controlplane.sagas import confirm, move, revert
from controlplane.security.pki import CertificateAuthority
from controlplane.security.tokens import JoinToken
from controlplane.store import hosts
from controlplane.store.engine import Database
from controlplane.store.types import utc_now
from controlplane.v1 import flavor_service_pb2_grpc as flavor_grpc
from controlplane.v1 import host_service_pb2_grpc as host_grpc
from controlplane.v1 import instance_service_pb2_grpc as instance_grpc
from controlplane.v1 import migration_service_pb2 as pb
from controlplane.v1 import migration_service_pb2_grpc as migration_grpc
from tests.controlplane.machines import make_domain
from tests.controlplane.simulated_host import SimulatedHost, served

FLEET = "lab"
ADMIN = "drover://lab/admin/ada"
SAGAS = Sagas(move=move.SAGA, confirm=confirm.SAGA, revert=revert.SAGA)
T = TypeVar("T")


class Enroller:
    """Signs with an authority of the test's own."""

    fleet = FLEET

    def __init__(self) -> None:
        self.authority = CertificateAuthority.create(FLEET)

    @property
    def ca_pem(self) -> bytes:
        return self.authority.certificate_pem

    def join_token(self, host: str, secret: str) -> str:
        return JoinToken(
            v=1,
            server="127.0.0.1:7441",
            server_name="cp",
            fleet=FLEET,
            host=host,
            secret=secret,
            ca_pem=self.ca_pem.decode(),
        ).encode()

    def sign_host_csr(self, csr_pem: bytes, host: str) -> bytes:
        return self.authority.sign_host_csr(csr_pem, fleet=FLEET, host=host)

    def issued_to(self, certificate_pem: bytes) -> list[str]:
        """URI names in a certificate."""
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        return names.value.get_values_for_type(x509.UniformResourceIdentifier)


@dataclass
class Clock:
    """The present, which a test can move."""

    offset: timedelta = field(default_factory=timedelta)

    def __call__(self) -> datetime:
        return utc_now() + self.offset

    def advance(self, **span: float) -> None:
        self.offset += timedelta(**span)


@dataclass
class Api:
    """A running API and what is behind it."""

    services: Services
    database: Database
    clock: Clock
    enroller: Enroller
    poller: InventoryPoller
    channel: grpc.aio.Channel
    stack: AsyncExitStack
    directory: Path
    simulated: dict[str, SimulatedHost] = field(default_factory=dict)

    @property
    def hosts(self) -> host_grpc.HostServiceAsyncStub:
        return host_grpc.HostServiceStub(self.channel)

    @property
    def enrollment(self) -> host_grpc.EnrollmentServiceAsyncStub:
        return host_grpc.EnrollmentServiceStub(self.channel)

    @property
    def instances(self) -> instance_grpc.InstanceServiceAsyncStub:
        return instance_grpc.InstanceServiceStub(self.channel)

    @property
    def flavors(self) -> flavor_grpc.FlavorServiceAsyncStub:
        return flavor_grpc.FlavorServiceStub(self.channel)

    @property
    def migrations(self) -> migration_grpc.MigrationServiceAsyncStub:
        return migration_grpc.MigrationServiceStub(self.channel)

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Look at, or change, the database directly."""
        return await self.database.run(work)

    async def add_host(self, name: str) -> SimulatedHost:
        """An enabled host that answers and has reported once."""
        host = SimulatedHost(name, self.directory / f"{name}.sock")  # type: ignore[abstract]
        await self.stack.enter_async_context(served(host))
        self.simulated[name] = host

        def join(tx: Connection) -> None:
            hosts.create(tx, name, adopt_domains=True)
            hosts.update(tx, name, state=HostState.ENABLED, address=host.address)

        await self.run(join)
        await self.report(name)
        return host

    async def report(self, *names: str) -> None:
        """Have hosts asked for their reports now; all of them if none is named."""
        for name in names or self.simulated:
            assert await self.poller.poll(name)


async def refusal(call: grpc.aio.UnaryUnaryCall[Any, Any]) -> DroverError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_of(caught.value)


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for a condition, with a bound."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # any condition, not only an event
            await asyncio.sleep(0.01)


def error_of(raised: grpc.aio.AioRpcError) -> DroverError:
    """What Drover said with a failed call."""
    status = rpc_status.from_call(raised)  # type: ignore[arg-type]
    assert status is not None, f"{raised.code()}: {raised.details()}"
    error = DroverError.from_status(status)
    assert error is not None
    assert error.reason is not Reason.INTERNAL, error.message
    return error


def by(uri: str) -> tuple[tuple[str, str], ...]:
    """Metadata that says who calls."""
    return (("caller", uri),)


async def _identify(method: str, context: Any, request: Any) -> None:
    given = dict(context.invocation_metadata() or ()).get("caller", ADMIN)
    principal.identify(Identity.parse(str(given)))


@pytest.fixture
async def api(database: Database, tmp_path: Path) -> AsyncIterator[Api]:
    async def lookup(name: str) -> Host:
        return await database.run(lambda tx: hosts.get(tx, name))

    clock = Clock()
    clients = HostClients(lookup, lambda host: grpc.aio.insecure_channel(host.address))
    enroller = Enroller()
    services = Services(
        database=database, clients=clients, sagas=SAGAS, enroller=enroller, clock=clock
    )
    server = grpc.aio.server(interceptors=[ErrorInterceptor(before=(_identify,))])
    host_grpc.add_HostServiceServicer_to_server(HostServicer(services), server)
    host_grpc.add_EnrollmentServiceServicer_to_server(
        EnrollmentServicer(services, enroller), server
    )
    instance_grpc.add_InstanceServiceServicer_to_server(InstanceServicer(services), server)
    flavor_grpc.add_FlavorServiceServicer_to_server(FlavorServicer(services), server)
    migration_grpc.add_MigrationServiceServicer_to_server(MigrationServicer(services), server)
    address = f"unix:{tmp_path}/api.sock"
    server.add_insecure_port(address)
    await server.start()
    async with AsyncExitStack() as stack, grpc.aio.insecure_channel(address) as channel:
        yield Api(
            services=services,
            database=database,
            clock=clock,
            enroller=enroller,
            poller=InventoryPoller(database, clients, InventorySettings(), clock),
            channel=channel,
            stack=stack,
            directory=tmp_path,
        )
        await server.stop(0)
        await clients.close()


@pytest.fixture
async def moving(api: Api) -> Api:
    """Hosts a and b; web1 is on its way from a to b."""
    for name in ("a", "b"):
        await api.add_host(name)
    api.simulated["a"].put(make_domain())
    await api.report()
    await api.migrations.CreateMigration(
        pb.CreateMigrationRequest(instance="instances/web1", host="hosts/b")
    )
    return api


@pytest.fixture
async def fleet(api: Api) -> Api:
    """Hosts a, b and c; web1 runs on a."""
    for name in ("a", "b", "c"):
        await api.add_host(name)
    api.simulated["a"].put(make_domain())
    await api.report()
    return api
