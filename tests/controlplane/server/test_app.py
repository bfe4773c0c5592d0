"""The control plane as a whole, in this process, on real ports and a real database."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from sqlalchemy.exc import OperationalError

from controlplane.common.errors import DroverError
from controlplane.common.identity import Role
from controlplane.common.reasons import Reason
from controlplane.common.rpc import TlsPaths
from controlplane.security.pki import certificate_identity
from controlplane.security.tokens import JoinToken
from controlplane.server.app import App
from controlplane.server.config import ControlPlaneConfig
from controlplane.server.main import read_config
from controlplane.server.ports import PortError
from controlplane.server.registry import API_SERVICES
from controlplane.store.engine import Database, DatabaseInUse
from controlplane.v1 import flavor_pb2, flavor_service_pb2, host_pb2, host_service_pb2
from controlplane.v1 import migration_service_pb2 as moves
from controlplane.v1.flavor_service_pb2_grpc import FlavorServiceStub
from controlplane.v1.host_service_pb2_grpc import EnrollmentServiceStub, HostServiceStub
from controlplane.v1.migration_service_pb2_grpc import MigrationServiceStub
from hostd.join import JoinError, JoinOptions
from hostd.join import join as hostd_join
from tests.controlplane.fleet_pki import FleetPki, channel


def config_of(directory: Path) -> ControlPlaneConfig:
    return read_config(directory / "controlplane.toml")


def admin(directory: Path) -> TlsPaths:
    pki = directory / "pki"
    return TlsPaths(pki / "admin.pem", pki / "admin.key", pki / "ca.pem")


def api_channel(app: App, directory: Path) -> grpc.aio.Channel:
    return channel(app.api_port, admin(directory))


def enrol_channel(app: App, directory: Path) -> grpc.aio.Channel:
    credentials = grpc.ssl_channel_credentials((directory / "pki" / "ca.pem").read_bytes())
    return grpc.aio.secure_channel(f"127.0.0.1:{app.enrol_port}", credentials)


@pytest.fixture
async def app(directory: Path) -> AsyncIterator[App]:
    async with App(config_of(directory), grace_seconds=0.2) as started:
        yield started


async def health_of(opened: Any) -> Any:
    stub: Any = health_pb2_grpc.HealthStub(opened)
    return (await stub.Check(health_pb2.HealthCheckRequest(), timeout=60)).status


async def wait_for_serving(opened: Any) -> None:
    async with asyncio.timeout(60):
        while await health_of(opened) != health_pb2.HealthCheckResponse.SERVING:  # noqa: ASYNC110 bounded
            await asyncio.sleep(0.05)


async def reason_of(call: Any) -> Reason:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]  # has what it reads
    assert status is not None, caught.value
    error = DroverError.from_status(status)
    assert error is not None
    return error.reason


def make_csr() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


async def join(opened: grpc.aio.Channel, secret: str, host: str) -> Any:
    return await EnrollmentServiceStub(opened).JoinHost(
        host_service_pb2.JoinHostRequest(
            secret=secret, host_id=host, csr_pem=make_csr(), address="127.0.0.1:7442"
        ),
        timeout=60,
    )


async def add_host(opened: grpc.aio.Channel, host: str) -> JoinToken:
    answer = await HostServiceStub(opened).AddHost(
        host_service_pb2.AddHostRequest(host_id=host), timeout=60
    )
    return JoinToken.decode(answer.join_token)


async def test_serves_health_and_reflection_of_every_service(app: App, directory: Path) -> None:
    async with api_channel(app, directory) as opened:
        await wait_for_serving(opened)
        untyped: Any = opened
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(untyped)
        stream = stub.ServerReflectionInfo()
        await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        listed = {s.name for s in (await stream.read()).list_services_response.service}
        await stream.done_writing()

    assert set(API_SERVICES) <= listed


async def test_a_host_joins_once(app: App, directory: Path) -> None:
    async with api_channel(app, directory) as api, enrol_channel(app, directory) as enrol:
        token = await add_host(api, "c")
        assert token.server == app.config.listen.advertise_enrol
        assert token.ca_pem.encode() == (directory / "pki" / "ca.pem").read_bytes()

        answer = await join(enrol, token.secret, "c")
        certificate = x509.load_pem_x509_certificate(answer.certificate_pem)
        assert certificate_identity(certificate).uri == "drover://lab/host/c"

        replayed = await reason_of(join(enrol, token.secret, "c"))
        assert replayed is Reason.JOIN_TOKEN_INVALID
        host = await HostServiceStub(api).GetHost(
            host_service_pb2.GetHostRequest(name="hosts/c"), timeout=60
        )
    assert host.state == host_pb2.Host.STATE_ENABLED
    assert host.address == "127.0.0.1:7442"


async def test_the_join_command_of_a_host_works_against_it(
    app: App, directory: Path, tmp_path: Path
) -> None:
    """hostd's own code, over the wire: what it writes is a certificate of the fleet."""
    async with api_channel(app, directory) as api:
        token = await add_host(api, "c")
    reachable = msgspec.structs.replace(token, server=f"127.0.0.1:{app.enrol_port}")
    options = JoinOptions(config=tmp_path / "host" / "hostd.toml", address="127.0.0.1:7442")

    written = await asyncio.to_thread(hostd_join, reachable.encode(), options)

    assert options.config in written
    pem = next(path for path in written if path.name == "host.pem").read_bytes()
    assert certificate_identity(x509.load_pem_x509_certificate(pem)).uri == "drover://lab/host/c"
    with pytest.raises(JoinError):
        await asyncio.to_thread(
            hostd_join, reachable.encode(), dataclasses.replace(options, force=True)
        )


async def test_token_of_another_host_or_nobody_joins_nothing(app: App, directory: Path) -> None:
    async with api_channel(app, directory) as api, enrol_channel(app, directory) as enrol:
        token = await add_host(api, "c")
        await add_host(api, "d")

        assert await reason_of(join(enrol, token.secret, "d")) is Reason.JOIN_TOKEN_INVALID
        assert await reason_of(join(enrol, "guess", "c")) is Reason.JOIN_TOKEN_INVALID
        hosts = await HostServiceStub(api).ListHosts(
            host_service_pb2.ListHostsRequest(), timeout=60
        )
        assert {h.state for h in hosts.hosts} == {host_pb2.Host.STATE_JOINING}

        await join(enrol, token.secret, "c")  # the wrong tries have not used it up


async def test_malformed_request_does_not_use_the_token_up(app: App, directory: Path) -> None:
    async with api_channel(app, directory) as api, enrol_channel(app, directory) as enrol:
        token = await add_host(api, "c")
        request = host_service_pb2.JoinHostRequest(
            secret=token.secret, host_id="c", csr_pem=b"rubbish", address="127.0.0.1:7442"
        )

        refused = await reason_of(EnrollmentServiceStub(enrol).JoinHost(request, timeout=60))
        assert refused is Reason.INVALID_FIELD
        await join(enrol, token.secret, "c")


async def test_mutations_and_refusals_are_in_the_audit_log(app: App, directory: Path) -> None:
    async with api_channel(app, directory) as api, enrol_channel(app, directory) as enrol:
        await add_host(api, "c")
        await reason_of(join(enrol, "guess", "c"))
        answer = await MigrationServiceStub(api).ListAuditEntries(
            moves.ListAuditEntriesRequest(), timeout=60
        )

    newest, oldest = answer.entries
    assert (oldest.principal, oldest.resource, oldest.outcome) == (
        "drover://lab/admin/admin",
        "hosts/c",
        "OK",
    )
    assert newest.principal == ""
    assert (newest.outcome, newest.reason) == ("PERMISSION_DENIED", "JOIN_TOKEN_INVALID")
    assert newest.peer.startswith("127.0.0.1:")
    assert "guess" not in str(answer)


async def test_message_too_big_changes_nothing(app: App, directory: Path) -> None:
    flavor = flavor_pb2.Flavor(name="flavors/" + "x" * (5 << 20), vcpus=1, memory_mib=64)
    async with api_channel(app, directory) as api:
        stub = FlavorServiceStub(api)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.CreateFlavor(flavor_service_pb2.CreateFlavorRequest(flavor=flavor))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not (await stub.ListFlavors(flavor_service_pb2.ListFlavorsRequest())).flavors
        log = await MigrationServiceStub(api).ListAuditEntries(moves.ListAuditEntriesRequest())
    assert not log.entries


async def test_state_survives_a_restart(directory: Path) -> None:
    async with (
        App(config_of(directory), grace_seconds=0) as app,
        api_channel(app, directory) as api,
    ):
        await add_host(api, "c")
    async with (
        App(config_of(directory), grace_seconds=0) as app,
        api_channel(app, directory) as api,
    ):
        listed = await HostServiceStub(api).ListHosts(host_service_pb2.ListHostsRequest())
    assert [h.name for h in listed.hosts] == ["hosts/c"]


async def test_two_on_one_sqlite_file_are_refused(app: App, directory: Path) -> None:
    with pytest.raises(DatabaseInUse, match="in use by another control plane"):
        await App(config_of(directory)).start()


async def test_taken_port_is_named_and_everything_let_go(directory: Path) -> None:
    config = config_of(directory)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        listen = msgspec.structs.replace(config.listen, api=address)
        with pytest.raises(PortError, match=address):
            await App(msgspec.structs.replace(config, listen=listen)).start()

    async with App(config, grace_seconds=0):  # the database is free again
        pass


async def test_stop_ends_open_streams_and_says_so_first(directory: Path) -> None:
    app = App(config_of(directory), grace_seconds=1.0)
    await app.start()
    async with api_channel(app, directory) as opened:
        await wait_for_serving(opened)
        stub: Any = health_pb2_grpc.HealthStub(opened)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING

        stopping = asyncio.create_task(app.stop())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await asyncio.wait_for(stopping, 20)


async def test_people_may_have_certificates_of_an_authority_of_their_own(
    directory: Path, tmp_path: Path
) -> None:
    """The other authority is appended to ca.pem, and its names are mapped to roles."""
    corporate = FleetPki(tmp_path / "corporate", fleet="corp")
    eve = corporate.person(Role.VIEWER)
    bundle = directory / "pki" / "ca.pem"
    fleet_ca = bundle.read_bytes()
    bundle.write_bytes(fleet_ca + corporate.ca.read_bytes())
    settings = directory / "controlplane.toml"
    mapped = '\n[security.identities]\n"drover://corp/viewer/eve" = "admin/eve"\n'
    settings.write_text(settings.read_text() + mapped)
    async with App(config_of(directory), grace_seconds=0) as app:
        tls = TlsPaths(eve.cert, eve.key, directory / "pki" / "ca.pem")
        async with channel(app.api_port, tls) as api, enrol_channel(app, directory) as enrol:
            token = await add_host(api, "c")
            assert token.ca_pem.encode() == fleet_ca  # hosts trust the fleet's authority alone
            await join(enrol, token.secret, "c")
            log = await MigrationServiceStub(api).ListAuditEntries(moves.ListAuditEntriesRequest())
    assert log.entries[-1].principal == "drover://lab/admin/eve"


async def test_without_the_ca_key_nobody_joins(directory: Path) -> None:
    config = config_of(directory)
    tls = msgspec.structs.replace(config.tls, ca_key=None)
    async with (
        App(msgspec.structs.replace(config, tls=tls), grace_seconds=0) as app,
        api_channel(app, directory) as api,
    ):
        assert app.enrol_port == 0
        stub = HostServiceStub(api)
        request = host_service_pb2.AddHostRequest(host_id="c")
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.AddHost(request, timeout=60)


async def test_database_out_of_reach_is_no_bug_and_names_no_statement(
    app: App, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Database, function: Any) -> Any:
        raise OperationalError("SELECT secret", {}, sqlite3.OperationalError("disk I/O error"))

    async with api_channel(app, directory) as api:
        stub = HostServiceStub(api)
        await stub.ListHosts(host_service_pb2.ListHostsRequest(), timeout=60)
        monkeypatch.setattr(Database, "_run", fail)
        for call in (
            stub.ListHosts(host_service_pb2.ListHostsRequest(), timeout=60),
            stub.AddHost(host_service_pb2.AddHostRequest(host_id="c"), timeout=60),
        ):
            assert await reason_of(call) is Reason.DATABASE_UNAVAILABLE
        monkeypatch.undo()


async def test_broken_inventory_loop_is_not_healthy(app: App, directory: Path) -> None:
    async with api_channel(app, directory) as opened:
        await wait_for_serving(opened)
        next(t for t in app._loops if t.get_name() == "inventory").cancel()
        async with asyncio.timeout(60):
            while await health_of(opened) == health_pb2.HealthCheckResponse.SERVING:  # noqa: ASYNC110 bounded
                await asyncio.sleep(0.05)
