"""What the steps of a saga work with besides the database.

Kept apart from the steps so that tests can hand in hosts of their own and so
that a step reads as what it does, not as how a call is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

import grpc.aio

from controlplane.domain.model import Ratios

if TYPE_CHECKING:
    from hostd.v1.host_service_pb2_grpc import HostServiceAsyncStub

Q = TypeVar("Q")
A = TypeVar("A")


class Hosts(Protocol):
    """Calls to hostds. `controlplane.fleet.clients` has the real one."""

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
            host: Name of the host.
            method: Picks the method, as `lambda h: h.EnsureParked`.
            request: What to send.
            timeout_seconds: Deadline of the call.

        Raises:
            Transient: The outcome is unknown or the host cannot answer now; the
                kernel asks again until it is known.
            DroverError: A definite refusal, or HOST_GONE once an operator has
                declared the host gone.
        """
        ...


@dataclass(frozen=True)
class MoveResources:
    """Handed to every step as `ctx.resources`.

    Attributes:
        fleet: Name of the fleet, for the identities of data ports.
        hosts: Calls to hostds.
        poll_seconds: How often a long operation on a host is looked at.
        ratios: How much more than it has a host may promise.
        copy_connections: Connections of a copy; 0 for diskmover's default.
    """

    fleet: str
    hosts: Hosts
    poll_seconds: float = 1.0
    ratios: Ratios = field(default_factory=Ratios)
    copy_connections: int = 0
