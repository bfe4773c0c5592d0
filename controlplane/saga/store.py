"""What the kernel asks of a database. `controlplane.store.sql_saga` answers it in SQL.

All functions are synchronous and run inside a transaction of the caller; one
that is fenced raises LostLease when another runner has claimed the saga since.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection

from controlplane.saga.log import Event, EventKind, SagaState, SagaView

T = TypeVar("T")


class Transactions(Protocol):
    """Runs functions in transactions, off the event loop."""

    async def run(self, function: Callable[[Connection], T]) -> T:
        """Run a function in one transaction and return what it returns."""
        ...


@dataclass(frozen=True)
class Lease:
    """A claimed saga.

    Attributes:
        saga_id: The saga.
        generation: The generation that the claim gave it.
    """

    saga_id: str
    generation: int


@dataclass(frozen=True)
class Appended:
    """What came of an append.

    Attributes:
        event: The event as written.
        cancel_requested: True when somebody had asked for a cancel by then.
    """

    event: Event
    cancel_requested: bool


class SagaStore(Protocol):
    """The log and the leases of sagas."""

    def claim(
        self,
        tx: Connection,
        owner: str,
        known: Collection[tuple[str, int]],
        lease_seconds: float,
        limit: int,
    ) -> list[Lease]:
        """Claim sagas that are due and that nobody holds.

        Args:
            tx: Open transaction.
            owner: Name of the runner.
            known: (kind, version) pairs that the runner can conduct.
            lease_seconds: How long the claim holds.
            limit: Most sagas to claim.
        """
        ...

    def read(self, tx: Connection, saga_id: str) -> SagaView:
        """A saga with its log.

        Raises:
            KeyError: There is no such saga.
        """
        ...

    def check_lease(self, tx: Connection, lease: Lease) -> None:
        """Hold the saga's row for this transaction, if the lease still holds.

        Raises:
            LostLease: It does not.
        """
        ...

    def append(
        self,
        tx: Connection,
        lease: Lease,
        kind: EventKind,
        *,
        step: str = "",
        state: SagaState | None = None,
        output: Any = None,
        error: Mapping[str, Any] | None = None,
    ) -> Appended:
        """Append an event and set the saga's state with it.

        Raises:
            LostLease: The lease no longer holds; nothing was written.
        """
        ...

    def release(
        self, tx: Connection, lease: Lease, wake_seconds: float, *, attempt: int | None = None
    ) -> None:
        """Give up a lease; the saga is due again in `wake_seconds`.

        Raises:
            LostLease: The lease no longer holds.
        """
        ...

    def renew(
        self, tx: Connection, leases: Collection[Lease], lease_seconds: float
    ) -> Mapping[str, bool]:
        """Renew leases.

        Returns:
            Ids of the sagas whose lease still holds, and whether a cancel was asked.
        """
        ...

    def holding(self, tx: Connection, leases: Collection[Lease]) -> Mapping[str, bool]:
        """What `renew` returns, without renewing anything."""
        ...

    def count_unclaimable(self, tx: Connection, known: Collection[tuple[str, int]]) -> int:
        """Number of live sagas of a kind or version that is not among the known ones."""
        ...
