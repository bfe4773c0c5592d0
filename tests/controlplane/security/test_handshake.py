"""Who gets in: real TLS handshakes on the real ports, with a recorded service behind."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from sqlalchemy import Connection

from controlplane.common import principal
from controlplane.common.errors import DroverError
from controlplane.common.identity import Identity, Role
from controlplane.common.reasons import Reason
from controlplane.common.rpc import TlsPaths
from controlplane.security.audit import AuditLog
from controlplane.security.authn import Authenticator, parse_identities
from controlplane.security.pki import KeyPair, api_server_identity, private_key_pem
from controlplane.server import ports
from controlplane.v1 import flavor_pb2, flavor_service_pb2, host_service_pb2
from controlplane.v1.flavor_service_pb2_grpc import (
    FlavorServiceServicer,
    FlavorServiceStub,
    add_FlavorServiceServicer_to_server,
)
from controlplane.v1.host_service_pb2_grpc import (
    EnrollmentServiceServicer,
    EnrollmentServiceStub,
    add_EnrollmentServiceServicer_to_server,
)
from tests.controlplane.fleet_pki import FLEET, FleetPki, channel

SERVICE = "controlplane.v1.FlavorService"
SPIFFE = "spiffe://example.org/ops/eve"


@dataclass
class Recorded(FlavorServiceServicer, EnrollmentServiceServicer):
    """Notes who got through to a method and with what."""

    calls: list[tuple[str, Identity | None]] = field(default_factory=list)

    async def ListFlavors(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.calls.append(("ListFlavors", principal.current()))
        return flavor_service_pb2.ListFlavorsResponse()

    async def CreateFlavor(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.calls.append(("CreateFlavor", principal.current()))
        return request.flavor

    async def GetFlavor(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise AssertionError("no test asks for it")

    async def DeleteFlavor(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise AssertionError("no test asks for it")

    async def JoinHost(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.calls.append(("JoinHost", principal.current_or_none()))
        return host_service_pb2.JoinHostResponse(fleet=FLEET)


@dataclass
class Server:
    """Both ports, up."""

    api: int
    enrol: int
    recorded: Recorded
    pki: FleetPki
    audited: list[str]


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    pki = FleetPki(tmp_path / "pki")
    recorded, audited = Recorded(), []

    async def write(add: Callable[[Connection], None]) -> None:
        audited.append("entry")

    audit = AuditLog(write)
    health = ports.Health([SERVICE])
    await health.serving()
    authenticator = Authenticator(FLEET, parse_identities(FLEET, {SPIFFE: "operator/eve"}))
    api = ports.make_api_server(
        authenticator,
        audit,
        health,
        [lambda s: add_FlavorServiceServicer_to_server(recorded, s)],
        [SERVICE],
    )
    enrol = ports.make_enrolment_server(
        audit, [lambda s: add_EnrollmentServiceServicer_to_server(recorded, s)]
    )
    tls = pki.server()
    api_port = ports.bind_api(api, "127.0.0.1:0", tls)
    enrol_port = ports.bind_enrolment(enrol, "127.0.0.1:0", tls)
    await api.start()
    await enrol.start()
    try:
        yield Server(api_port, enrol_port, recorded, pki, audited)
    finally:
        await api.stop(0)
        await enrol.stop(0)


async def list_flavors(opened: grpc.aio.Channel) -> Any:
    async with opened:
        return await FlavorServiceStub(opened).ListFlavors(
            flavor_service_pb2.ListFlavorsRequest(), timeout=60
        )


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def reason_of(error: grpc.aio.AioRpcError) -> Reason:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # AioRpcError has what it reads
    assert status is not None
    drover = DroverError.from_status(status)
    assert drover is not None
    return drover.reason


async def test_person_of_the_fleet_gets_in(server: Server) -> None:
    await list_flavors(channel(server.api, server.pki.person(Role.VIEWER)))

    assert server.recorded.calls == [("ListFlavors", Identity(FLEET, Role.VIEWER, "eve"))]


async def test_server_is_verified_by_the_name_of_its_identity(server: Server) -> None:
    tls = server.pki.person(Role.VIEWER)
    name = api_server_identity(FLEET).dns_name

    await list_flavors(channel(server.api, tls, server_name=name))

    error = await refusal(list_flavors(channel(server.api, tls, server_name="b.host.lab")))
    assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_certificate_of_another_authority_is_refused(server: Server, tmp_path: Path) -> None:
    """The same names and fleet, signed by somebody else."""
    other = FleetPki(tmp_path / "other")
    theirs = other.person(Role.ADMIN)

    error = await refusal(
        list_flavors(channel(server.api, TlsPaths(theirs.cert, theirs.key, server.pki.ca)))
    )

    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert server.recorded.calls == []


async def test_expired_certificate_is_refused(server: Server) -> None:
    error = await refusal(list_flavors(channel(server.api, server.pki.expired(Role.ADMIN))))

    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert server.recorded.calls == []


async def test_no_certificate_is_refused_on_the_api_port(server: Server) -> None:
    credentials = grpc.ssl_channel_credentials(server.pki.ca.read_bytes())

    error = await refusal(
        list_flavors(grpc.aio.secure_channel(f"127.0.0.1:{server.api}", credentials))
    )

    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert server.recorded.calls == []


async def test_certificate_of_another_fleet_of_the_same_authority_is_refused(
    server: Server,
) -> None:
    tls = server.pki.issue(Identity("other", Role.ADMIN, "eve"), stem="foreign")

    error = await refusal(list_flavors(channel(server.api, tls)))

    assert await reason_of(error) is Reason.UNAUTHENTICATED
    assert server.recorded.calls == []


@pytest.mark.parametrize("uris", [[], ["drover://lab/admin/eve", "drover://lab/viewer/eve"]])
async def test_certificate_with_no_or_two_identities_is_refused(
    server: Server, uris: list[str]
) -> None:
    tls = issue_odd(server.pki, uris)

    error = await refusal(list_flavors(channel(server.api, tls)))

    assert await reason_of(error) is Reason.UNAUTHENTICATED
    assert server.recorded.calls == []


async def test_mapped_foreign_identity_gets_its_role(server: Server) -> None:
    await list_flavors(channel(server.api, issue_odd(server.pki, [SPIFFE])))

    assert server.recorded.calls == [("ListFlavors", Identity(FLEET, Role.OPERATOR, "eve"))]


async def test_unmapped_foreign_identity_is_refused(server: Server) -> None:
    error = await refusal(
        list_flavors(channel(server.api, issue_odd(server.pki, ["spiffe://example.org/nobody"])))
    )

    assert await reason_of(error) is Reason.UNAUTHENTICATED


@pytest.mark.parametrize("role", ["host/a", "controlplane/api"])
def test_map_gives_no_machine_roles(role: str) -> None:
    with pytest.raises(ValueError, match="cannot be given by a map"):
        parse_identities(FLEET, {SPIFFE: role})


async def test_host_may_call_nothing(server: Server) -> None:
    error = await refusal(list_flavors(channel(server.api, server.pki.host("a"))))
    assert await reason_of(error) is Reason.PERMISSION_DENIED

    async with channel(server.api, server.pki.host("a")) as opened:
        checked = health_stub(opened).Check(health_pb2.HealthCheckRequest())
        assert (await refusal(checked)).code() is grpc.StatusCode.PERMISSION_DENIED
        stream = reflection_stub(opened).ServerReflectionInfo()

        async def ask() -> object:
            # Already the question fails when the refusal was faster.
            await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            return await stream.read()

        assert (await refusal(ask())).code() is grpc.StatusCode.PERMISSION_DENIED
    assert server.recorded.calls == []


async def test_viewer_changes_nothing_and_the_attempt_is_audited(server: Server) -> None:
    request = flavor_service_pb2.CreateFlavorRequest(flavor=flavor_pb2.Flavor(name="flavors/x"))
    async with channel(server.api, server.pki.person(Role.VIEWER)) as opened:
        error = await refusal(FlavorServiceStub(opened).CreateFlavor(request, timeout=60))

    assert await reason_of(error) is Reason.PERMISSION_DENIED
    assert server.recorded.calls == []
    assert len(server.audited) == 1


async def test_reads_are_not_audited(server: Server) -> None:
    await list_flavors(channel(server.api, server.pki.person(Role.VIEWER)))

    assert server.audited == []


async def test_mutation_about_to_end_is_refused(server: Server) -> None:
    request = flavor_service_pb2.CreateFlavorRequest(flavor=flavor_pb2.Flavor(name="flavors/x"))
    async with channel(server.api, server.pki.person(Role.ADMIN)) as opened:
        await opened.channel_ready()
        stub = FlavorServiceStub(opened)
        error = await refusal(stub.CreateFlavor(request, timeout=0.9))
        assert await reason_of(error) is Reason.DEADLINE_REQUIRED
        assert server.recorded.calls == []
        await stub.CreateFlavor(request)  # stock clients set no deadline

    assert [name for name, _ in server.recorded.calls] == ["CreateFlavor"]


async def test_message_too_big_reaches_no_method(server: Server) -> None:
    flavor = flavor_pb2.Flavor(name="flavors/" + "x" * (5 << 20))
    async with channel(server.api, server.pki.person(Role.ADMIN)) as opened:
        error = await refusal(
            FlavorServiceStub(opened).CreateFlavor(
                flavor_service_pb2.CreateFlavorRequest(flavor=flavor), timeout=10
            )
        )

    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert server.recorded.calls == []


async def test_health_and_reflection_answer_people(server: Server) -> None:
    async with channel(server.api, server.pki.person(Role.VIEWER)) as opened:
        health = health_stub(opened)
        answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        stream = reflection_stub(opened).ServerReflectionInfo()
        await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        listed = (await stream.read()).list_services_response.service
        await stream.done_writing()

    assert SERVICE in {service.name for service in listed}


@pytest.mark.parametrize("port", ["api", "enrol"])
async def test_plaintext_is_refused(server: Server, port: str) -> None:
    address = f"127.0.0.1:{getattr(server, port)}"
    async with grpc.aio.insecure_channel(address) as opened:
        error = await refusal(
            EnrollmentServiceStub(opened).JoinHost(host_service_pb2.JoinHostRequest(), timeout=60)
        )

    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert server.recorded.calls == []


async def test_enrolment_needs_no_certificate_and_serves_only_joining(server: Server) -> None:
    credentials = grpc.ssl_channel_credentials(server.pki.ca.read_bytes())
    async with grpc.aio.secure_channel(f"127.0.0.1:{server.enrol}", credentials) as opened:
        joined = await EnrollmentServiceStub(opened).JoinHost(
            host_service_pb2.JoinHostRequest(), timeout=60
        )
        listing = FlavorServiceStub(opened).ListFlavors(
            flavor_service_pb2.ListFlavorsRequest(), timeout=60
        )
        error = await refusal(listing)

    assert joined.fleet == FLEET
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert server.recorded.calls == [("JoinHost", None)]
    assert len(server.audited) == 1


async def test_renewed_certificate_is_taken_without_a_restart(server: Server) -> None:
    before = served_certificate(server.api)
    server.pki.server()

    assert served_certificate(server.api) != before


async def test_plain_socket_gets_no_http(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.api), timeout=60) as plain:
        plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"HTTP" not in plain.recv(1024)


async def test_error_info_travels_once(server: Server) -> None:
    error = await refusal(list_flavors(channel(server.api, server.pki.host("a"))))
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # AioRpcError has what it reads
    assert status is not None

    infos = [d for d in status.details if d.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
    assert len(infos) == 1


# The stubs of these two are not typed for grpc.aio.
def health_stub(opened: grpc.aio.Channel) -> Any:
    return health_pb2_grpc.HealthStub(opened)


def reflection_stub(opened: Any) -> Any:
    return reflection_pb2_grpc.ServerReflectionStub(opened)


def served_certificate(port: int) -> str:
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=60)


def issue_odd(pki: FleetPki, uris: list[str]) -> TlsPaths:
    """A certificate with URI names that `issue` never writes."""
    key = ec.generate_private_key(ec.SECP256R1())
    template = x509.load_pem_x509_certificate(
        pki.authority.issue(Identity(FLEET, Role.VIEWER, "odd")).certificate_pem
    )
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
    builder = (
        x509.CertificateBuilder()
        .subject_name(template.subject)
        .issuer_name(pki.authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(template.not_valid_before_utc)
        .not_valid_after(template.not_valid_after_utc)
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("odd.example"), *names]), critical=False
        )
    )
    signed = builder.sign(pki.authority._key, hashes.SHA256())
    paths = TlsPaths(pki.directory / "odd.pem", pki.directory / "odd.key", pki.ca)
    pem = signed.public_bytes(serialization.Encoding.PEM)
    KeyPair(pem, private_key_pem(key)).write(paths.cert, paths.key, replace=True)
    return paths
