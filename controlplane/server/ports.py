"""The two ports: the API on mutual TLS, enrolment on TLS with a server certificate.

Neither answers plaintext; the one port that does is `controlplane.server.metrics`.
What stands before every method, outermost first:

    StreamGuard        the check below, for reflection (a stream of requests)
    ErrorInterceptor   identify the caller, role table, deadline -> the method
                       -> errors become statuses -> audit entry
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from controlplane.common.rpc import SERVER_OPTIONS, Check, ErrorInterceptor, TlsPaths
from controlplane.security.audit import AuditLog
from controlplane.security.authn import Authenticator, StreamGuard, check_token_method
from controlplane.store.engine import out_of_reach

Register = Callable[[grpc.aio.Server], None]
HEALTH_SERVICE = "grpc.health.v1.Health"


class Health:
    """Answers health checks for the process and each of its services.

    NOT_SERVING until `serving` is called, and for good after `shut_down`.

    Args:
        services: Full service names.
    """

    def __init__(self, services: Sequence[str]) -> None:
        self._names = ("", *services)
        self.servicer = health_aio.HealthServicer()

    async def not_serving(self) -> None:
        """Answer NOT_SERVING for now."""
        await self._set(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def serving(self) -> None:
        """Answer SERVING."""
        await self._set(health_pb2.HealthCheckResponse.SERVING)

    async def shut_down(self) -> None:
        """Answer NOT_SERVING from now on."""
        await self.servicer.enter_graceful_shutdown()

    async def _set(self, status: Any) -> None:
        for name in self._names:
            await self.servicer.set(name, status)


def make_api_server(
    authenticator: Authenticator,
    audit: AuditLog,
    health: Health,
    register: Sequence[Register],
    services: Sequence[str],
) -> grpc.aio.Server:
    """The API server, without a port yet.

    Args:
        authenticator: Says who calls and whether they may.
        audit: Notes what was asked.
        health: Answers health checks.
        register: Adds the services.
        services: Their full names, for reflection.
    """
    server = grpc.aio.server(
        interceptors=[
            StreamGuard(authenticator.check),
            ErrorInterceptor(before=(authenticator.check,), after=audit.record, known=out_of_reach),
        ],
        options=SERVER_OPTIONS,
    )
    for add in register:
        add(server)
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    reflection.enable_server_reflection(
        (*services, HEALTH_SERVICE, reflection.SERVICE_NAME), server
    )
    return server


def make_enrolment_server(audit: AuditLog, register: Sequence[Register]) -> grpc.aio.Server:
    """The enrolment server, without a port yet; neither health nor reflection there."""
    check: Check = check_token_method
    server = grpc.aio.server(
        interceptors=[
            StreamGuard(check),
            ErrorInterceptor(before=(check,), after=audit.record, known=out_of_reach),
        ],
        options=SERVER_OPTIONS,
    )
    for add in register:
        add(server)
    return server


def bind_api(server: grpc.aio.Server, address: str, tls: TlsPaths) -> int:
    """Open the API port; the caller's certificate is required and checked.

    Returns:
        The port number.

    Raises:
        PortError: The address cannot be bound or a certificate file is unusable.
    """
    return _bind(server, address, tls.server_credentials)


def bind_enrolment(server: grpc.aio.Server, address: str, tls: TlsPaths) -> int:
    """Open the enrolment port; only the server shows a certificate.

    Returns:
        The port number.

    Raises:
        PortError: The address cannot be bound or a certificate file is unusable.
    """

    def read() -> Any:
        return grpc.ssl_server_certificate_configuration(
            [(tls.key.read_bytes(), tls.cert.read_bytes())]
        )

    def credentials() -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            read(), lambda: read(), require_client_authentication=False
        )

    return _bind(server, address, credentials)


class PortError(Exception):
    """A port cannot be opened; the message says which and why."""


def _bind(
    server: grpc.aio.Server, address: str, credentials: Callable[[], grpc.ServerCredentials]
) -> int:
    try:
        port = server.add_secure_port(address, credentials())
    except (RuntimeError, OSError) as error:
        raise PortError(f"{address} cannot be opened: {error}") from error
    if port == 0:
        raise PortError(f"{address} cannot be opened: see the log of gRPC")
    return port
