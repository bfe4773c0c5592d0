"""Calls to hostds: one channel per host, a deadline on each call, errors sorted.

What can come of a call:

    answer                       the host did it, or says how far it is
    DroverError                  hostd's own code refused: a definite answer
    DroverError HOST_GONE        an operator said that the host never comes back
    Transient                    anything else: the outcome is unknown, ask again

Only what hostd itself says counts as an answer. A broken connection, a deadline
or an error of a layer in between never does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import grpc
import grpc.aio
from grpc_status import rpc_status

from controlplane.common.errors import DroverError, Transient
from controlplane.common.identity import host_identity
from controlplane.common.reasons import Detail, Reason
from controlplane.common.rpc import CHANNEL_OPTIONS, TlsPaths
from controlplane.domain.model import Host
from controlplane.domain.names import host_name
from controlplane.domain.states import HostState
from hostd.v1.host_service_pb2_grpc import HostServiceStub

if TYPE_CHECKING:
    from hostd.v1.host_service_pb2_grpc import HostServiceAsyncStub

Q = TypeVar("Q")
A = TypeVar("A")
Lookup = Callable[[str], Awaitable[Host]]
ChannelFactory = Callable[[Host], grpc.aio.Channel]


def tls_channels(fleet: str, tls: TlsPaths) -> ChannelFactory:
    """Channels under mutual TLS to hosts that prove to be who they should be."""

    def connect(host: Host) -> grpc.aio.Channel:
        options = (
            *CHANNEL_OPTIONS,
            ("grpc.ssl_target_name_override", host_identity(fleet, host.name).dns_name),
        )
        return grpc.aio.secure_channel(host.address, tls.channel_credentials(), options)

    return connect


@dataclass(frozen=True)
class _Connection:
    address: str
    certificate_sha256: str
    channel: grpc.aio.Channel
    stub: HostServiceAsyncStub


class HostClients:
    """Calls to the hosts of the fleet.

    Args:
        lookup: Reads a host; raises HOST_NOT_FOUND. Asked for each call, so that
            a new address or an operator's word takes effect at once.
        connect: Opens a channel to a host.
    """

    def __init__(self, lookup: Lookup, connect: ChannelFactory) -> None:
        self._lookup = lookup
        self._connect = connect
        self._connections: dict[str, _Connection] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def call(
        self,
        host: str,
        method: Callable[[HostServiceAsyncStub], grpc.aio.UnaryUnaryMultiCallable[Q, A]],
        request: Q,
        *,
        timeout_seconds: float = 30.0,
    ) -> A:
        """Call one host and wait for its answer.

        Args:
            host: Bare name of the host.
            method: Picks the method, as `lambda h: h.EnsureParked`.
            request: What to send.
            timeout_seconds: Deadline of the call.

        Raises:
            Transient: The outcome is unknown or the host cannot answer now.
            DroverError: A definite refusal, HOST_GONE, or HOST_NOT_FOUND.
        """
        found = await self._lookup(host)
        if found.state is HostState.GONE:
            raise DroverError(
                Reason.HOST_GONE,
                f"{host_name(host)} was declared gone: {found.state_reason}.",
                subject=host_name(host),
                metadata={"host": host},
            )
        if not found.address:
            raise Transient(_unreachable(host, "it has not joined yet"))
        try:
            return await method(self._stub(found))(request, timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            failure = sort_error(host, error)
        raise failure

    async def close(self) -> None:
        """Close every channel; calls under way end as Transient."""
        connections = list(self._connections.values())
        self._connections.clear()
        await asyncio.gather(
            *(connection.channel.close() for connection in connections), *self._closing
        )

    def _stub(self, host: Host) -> HostServiceAsyncStub:
        known = self._connections.get(host.name)
        if known is not None:
            if (known.address, known.certificate_sha256) == (host.address, host.certificate_sha256):
                return known.stub
            task = asyncio.get_running_loop().create_task(known.channel.close(grace=30.0))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        channel = self._connect(host)
        stub = HostServiceStub(channel)  # for type checkers this is the async stub
        self._connections[host.name] = _Connection(
            host.address, host.certificate_sha256, channel, stub
        )
        return stub


def sort_error(host: str, error: grpc.aio.AioRpcError) -> DroverError | Transient:
    """Tell a definite refusal from an unknown outcome."""
    said = _said_by_hostd(error)
    if said is None:
        return Transient(
            _unreachable(host, f"{error.code().name}: {error.details() or 'no details'}")
        )
    if said.reason.info.detail is Detail.RETRY:
        return Transient(said)
    return said


def _said_by_hostd(error: grpc.aio.AioRpcError) -> DroverError | None:
    try:
        status = rpc_status.from_call(cast(grpc.Call, error))
    except ValueError:
        # Status details that contradict the status: not what Drover writes.
        return None
    return None if status is None else DroverError.from_status(status)


def _unreachable(host: str, why: str) -> DroverError:
    return DroverError(
        Reason.HOST_UNREACHABLE,
        f"{host_name(host)} did not answer ({why}).",
        subject=host_name(host),
        metadata={"host": host},
    )
