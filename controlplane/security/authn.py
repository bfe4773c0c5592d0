"""Identify the caller, ask the role table, remember the caller for the call.

`Authenticator.check` goes into `rpc.ErrorInterceptor(before=...)`, which covers
every method with a single request. Reflection is a stream of requests, which
that interceptor leaves alone; `StreamGuard` puts the same check before those.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
import grpc.aio

from controlplane.common import principal, rpc
from controlplane.common.errors import DroverError
from controlplane.common.identity import Identity, Role
from controlplane.common.reasons import Reason
from controlplane.security import roles

SHORTEST_DEADLINE_SECONDS = 1.0
_PEOPLE = roles.at_least(Role.VIEWER)


def parse_identities(fleet: str, entries: Mapping[str, str]) -> dict[str, Identity]:
    """Read the map of foreign URI names.

    Args:
        fleet: Name of the fleet.
        entries: URI in a certificate of another authority -> "role/name" or
            "member/name/project".

    Raises:
        ValueError: An entry is malformed or names a role that is not a person's:
            hosts and control planes are told apart by their own URIs only.
    """
    identities: dict[str, Identity] = {}
    for uri, text in entries.items():
        identity = Identity.parse(f"drover://{fleet}/{text}")
        if identity.role not in _PEOPLE:
            raise ValueError(f"{uri!r}: the role {identity.role.value} cannot be given by a map")
        identities[uri] = identity
    return identities


class Authenticator:
    """Checks that run before every method of the API port.

    Args:
        fleet: Name of the fleet.
        identities: Foreign URI names and whom they stand for.
    """

    def __init__(self, fleet: str, identities: Mapping[str, Identity] | None = None) -> None:
        self._fleet = fleet
        self._identities = dict(identities or {})

    def identify(self, context: grpc.aio.ServicerContext[Any, Any]) -> Identity:
        """The caller's identity.

        Raises:
            DroverError: UNAUTHENTICATED.
        """
        uris = rpc.peer_uris(context)
        if len(uris) == 1 and uris[0] in self._identities:
            return self._identities[uris[0]]
        return rpc.peer_identity(context, self._fleet)

    async def check(
        self, method: str, context: grpc.aio.ServicerContext[Any, Any], request: Any
    ) -> None:
        """Identify, authorise and look at the deadline.

        Raises:
            DroverError: UNAUTHENTICATED, PERMISSION_DENIED or DEADLINE_REQUIRED.
        """
        identity = self.identify(context)
        principal.identify(identity)
        roles.check_method(method, identity)
        _check_deadline(method, context)


async def check_token_method(
    method: str, context: grpc.aio.ServicerContext[Any, Any], request: Any
) -> None:
    """The check of the enrolment port: only methods where a token decides.

    Raises:
        DroverError: PERMISSION_DENIED.
    """
    if not roles.rule_of(method).token_decides:
        raise DroverError(
            Reason.PERMISSION_DENIED,
            f"{method} is not served on the enrolment port.",
            metadata={"method": method},
        )


def _check_deadline(method: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    # A call without a deadline is let through: stock command-line clients set none,
    # and no mutation waits for a move. One that is about to end is refused, because
    # its caller would not learn what became of it.
    remaining = context.time_remaining()
    if (
        roles.rule_of(method).mutates
        and remaining is not None
        and remaining < SHORTEST_DEADLINE_SECONDS
    ):
        raise DroverError(
            Reason.DEADLINE_REQUIRED,
            f"Only {remaining:.2f} s were left for {method.rpartition('/')[2]}.",
            subject="deadline",
            metadata={"remaining_seconds": f"{remaining:.2f}"},
        )


class StreamGuard(grpc.aio.ServerInterceptor):
    """Runs a check before methods that take a stream of requests.

    Args:
        check: As `ErrorInterceptor` takes them; it is given no request.
    """

    def __init__(self, check: rpc.Check) -> None:
        self._check = check

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of a call whose requests are a stream."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler.request_streaming:
            return handler
        if not handler.response_streaming:
            raise AssertionError(f"{handler_call_details.method}: no such method exists in Drover")
        return grpc.stream_stream_rpc_method_handler(
            self._guarded(handler_call_details.method, handler.stream_stream),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _guarded(self, method: str, call: Any) -> Any:
        async def handle(
            requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[Any]:
            failure: DroverError | None = None
            try:
                await self._check(method, context, None)
            except DroverError as error:
                failure = error
            if failure is not None:
                await rpc.abort_with(context, failure)
            async for response in call(requests, context):
                yield response

        return handle
