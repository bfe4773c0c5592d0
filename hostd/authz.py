"""Who may call hostd: the control plane of its own fleet, and nobody else.

People and other hosts have certificates of the same authority; the role in the
certificate keeps them out here. `check` covers every method with one request;
reflection takes a stream of requests and is covered by `StreamGuard`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from controlplane.common import principal, rpc
from controlplane.common.errors import DroverError
from controlplane.common.identity import Role
from controlplane.common.reasons import Reason


class CallerCheck:
    """Refuses callers other than the fleet's control plane.

    Args:
        fleet: Name of the host's fleet.
    """

    def __init__(self, fleet: str) -> None:
        self._fleet = fleet

    async def __call__(
        self, method: str, context: grpc.aio.ServicerContext[Any, Any], request: Any
    ) -> None:
        """Identify and authorise the caller; the arguments are those of `rpc.Check`.

        Raises:
            DroverError: UNAUTHENTICATED or PERMISSION_DENIED.
        """
        identity = rpc.peer_identity(context, self._fleet)
        if identity.role is not Role.CONTROLPLANE:
            raise DroverError(
                Reason.PERMISSION_DENIED,
                f"{identity.uri} may not call {method.rpartition('/')[2]} on a host;"
                f" only the role {Role.CONTROLPLANE.value} may.",
                metadata={"identity": identity.uri, "role": Role.CONTROLPLANE.value},
            )
        principal.identify(identity)


class StreamGuard(grpc.aio.ServerInterceptor):
    """Runs a check before methods that take a stream of requests.

    Args:
        check: It is given no request.
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
