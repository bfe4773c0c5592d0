"""What both daemons' gRPC servers and clients need: TLS and error mapping.

Interceptors run in the order in which they are given: identify the caller,
authorise, check the deadline, map errors. `ErrorInterceptor` is the innermost,
so that every refusal of the others is an ordinary `DroverError` as well.
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio
import structlog
from cryptography import x509
from grpc_status import rpc_status

from controlplane.common.errors import DroverError
from controlplane.common.identity import Identity
from controlplane.common.reasons import Reason

log = structlog.stdlib.get_logger(__name__)

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 60_000),
    ("grpc.so_reuseport", 0),
)
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 500),
)


@dataclass(frozen=True)
class TlsPaths:
    """Where a process's certificate lies.

    Attributes:
        cert: Certificate chain, PEM.
        key: Its private key, PEM.
        ca: Certificate authority of the fleet, PEM.
    """

    cert: Path
    key: Path
    ca: Path

    def server_credentials(self) -> grpc.ServerCredentials:
        """Mutual TLS; files are read again for each handshake, so that they can be renewed."""

        def read() -> Any:
            return grpc.ssl_server_certificate_configuration(
                [(self.key.read_bytes(), self.cert.read_bytes())], self.ca.read_bytes()
            )

        return grpc.dynamic_ssl_server_credentials(
            read(), lambda: read(), require_client_authentication=True
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Client side of mutual TLS."""
        return grpc.ssl_channel_credentials(
            self.ca.read_bytes(), self.key.read_bytes(), self.cert.read_bytes()
        )


def peer_uris(context: grpc.aio.ServicerContext[Any, Any]) -> list[str]:
    """The URI names in the caller's certificate, in certificate order."""
    auth = context.auth_context()
    pem = next(iter(auth.get("x509_pem_cert") or ()), None)
    if pem is None:
        return []
    certificate = x509.load_pem_x509_certificate(bytes(pem))
    try:
        san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return san.value.get_values_for_type(x509.UniformResourceIdentifier)


def peer_identity(context: grpc.aio.ServicerContext[Any, Any], fleet: str) -> Identity:
    """The caller's identity.

    Raises:
        DroverError: UNAUTHENTICATED when the certificate carries no identity of
            this fleet.
    """
    uris = peer_uris(context)
    if len(uris) != 1:
        raise DroverError(
            Reason.UNAUTHENTICATED,
            f"The certificate carries {len(uris)} URI names instead of one.",
        )
    try:
        identity = Identity.parse(uris[0])
    except ValueError as error:
        raise DroverError(Reason.UNAUTHENTICATED, f"{error}.") from error
    if identity.fleet != fleet:
        raise DroverError(
            Reason.UNAUTHENTICATED,
            f"The certificate is of fleet {identity.fleet!r}; this is fleet {fleet!r}.",
            metadata={"fleet": identity.fleet},
        )
    return identity


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: DroverError) -> NoReturn:
    """End a call with the status of an error."""
    await context.abort_with_status(rpc_status.to_status(error.to_status()))
    raise AssertionError("abort_with_status returned")


def internal_error(method: str) -> DroverError:
    """Log the exception being handled and hide it behind an incident id."""
    incident = uuid.uuid4().hex[:12]
    log.exception("unexpected error", method=method, incident=incident)
    return DroverError(
        Reason.INTERNAL, f"Incident {incident} in {method}.", metadata={"incident": incident}
    )


_Q = TypeVar("_Q")
_A = TypeVar("_A")
Check = Callable[[str, grpc.aio.ServicerContext[Any, Any], Any], Awaitable[None]]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Runs the checks, then the method, and turns what they raise into a status.

    Args:
        before: Called in order with (full method name, context, request) before
            the method; a DroverError refuses the call.
        after: Called with (full method name, context, request, error or None)
            once the outcome is known; for the audit log. Must not raise.
        known: What an exception that is no DroverError is told as; None for a bug.
    """

    def __init__(
        self,
        before: tuple[Check, ...] = (),
        after: Callable[[str, Any, Any, DroverError | None], Awaitable[None]] | None = None,
        known: Callable[[Exception], DroverError | None] = lambda error: None,
    ) -> None:
        self._before = before
        self._after = after
        self._known = known

    async def intercept_service(  # type: ignore[override]  # mypy cannot unify the method's own generics
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Wrap the handler of one call; only unary requests exist in Drover."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        method = handler_call_details.method
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(method, handler.unary_stream),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, handler.unary_unary),
            handler.request_deserializer,
            handler.response_serializer,
        )

    # The failure is raised outside the `except` blocks so that grpc.aio's AbortError
    # does not carry the original exception as its context into the log.
    def _unary(self, method: str, call: Any) -> Any:
        async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            failure: DroverError | None = None
            try:
                for check in self._before:
                    await check(method, context, request)
                return await call(request, context)
            except (grpc.aio.AbortError, grpc.RpcError):
                raise
            except DroverError as error:
                failure = error
            except Exception as error:
                failure = self._known(error) or internal_error(method)
            finally:
                if self._after is not None:
                    await self._after(method, context, request, failure)
            return await abort_with(context, failure)

        return handle

    def _streaming(self, method: str, call: Any) -> Any:
        async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            failure: DroverError | None = None
            try:
                for check in self._before:
                    await check(method, context, request)
                responses = call(request, context)
                if inspect.isawaitable(responses):  # it writes to the context itself: health
                    await responses
                    return
                async for response in responses:
                    yield response
                return
            except (grpc.aio.AbortError, grpc.RpcError):
                raise
            except DroverError as error:
                failure = error
            except Exception as error:
                failure = self._known(error) or internal_error(method)
            await abort_with(context, failure)

        return handle
