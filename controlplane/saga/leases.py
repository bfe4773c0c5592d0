r"""The leases of one runner: renewed in time, or given up in time.

    claimed --every third--> renewed ... --lost to another runner--> dropped
                                     \--not renewed by lease end minus a margin--> dropped

A holder that cannot reach the database stops by itself before anybody else can
claim what it held: the other side of the fence that hosts keep.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from controlplane.saga.store import Lease, SagaStore, Transactions

log = structlog.stdlib.get_logger(__name__)


@dataclass(eq=False)
class Held:
    """A claimed saga.

    Attributes:
        lease: The claim.
        renewed: Monotonic time before the claim, or before its last renewal, was
            asked for.
        task: Conducts the saga.
        effect: The action or undo at work.
        cancellable: True while a cancel interrupts the effect.
        cancelled: True once a cancel has interrupted the effect.
        leaving: True once the lease is about to be given back.
    """

    lease: Lease
    renewed: float
    task: asyncio.Task[None] | None = None
    effect: asyncio.Task[Any] | None = None
    cancellable: bool = False
    cancelled: bool = False
    leaving: bool = False

    def drop(self) -> None:
        """Stop conducting it at the next await."""
        if self.task is not None:
            self.task.cancel()


class Leases:
    """What a runner holds.

    Args:
        transactions: Runs functions in transactions.
        store: The kernel's store.
        lease_seconds: How long a claim holds without being renewed.
        look_seconds: How often lost leases and cancels are looked for.
    """

    def __init__(
        self,
        transactions: Transactions,
        store: SagaStore,
        *,
        lease_seconds: float,
        look_seconds: float,
    ) -> None:
        self._transactions = transactions
        self._store = store
        self._lease_seconds = lease_seconds
        self._look_seconds = min(look_seconds, lease_seconds / 3)
        self._fence_seconds = lease_seconds - min(5.0, lease_seconds / 6)
        self._held: dict[str, Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def add(self, held: Held) -> None:
        """Look after a lease.

        When the saga is held already, its lease ran out under this very runner,
        as after a long pause of the process: what it still does counts no more.
        """
        before = self._held.get(held.lease.saga_id)
        if before is not None:
            before.drop()
        self._held[held.lease.saga_id] = held

    def remove(self, held: Held) -> None:
        """Look after it no more; a later lease of the same saga stays."""
        if self._held.get(held.lease.saga_id) is held:
            del self._held[held.lease.saga_id]

    def tasks(self) -> list[asyncio.Task[None]]:
        """What conducts the held sagas."""
        return [held.task for held in self._held.values() if held.task is not None]

    async def keep(self) -> None:
        """Renew leases; drop what was lost; interrupt what is to be cancelled. For ever."""
        while True:
            await asyncio.sleep(self._look_seconds)
            held = list(self._held.values())
            if not held:
                continue
            try:
                # A database that hangs must not keep the fence below from falling.
                async with asyncio.timeout(self._until_fence(held)):
                    await self._renew(held)
            except TimeoutError:
                log.warning("leases cannot be renewed: the database does not answer")
            except DBAPIError as error:
                log.warning("leases cannot be renewed", error=str(error.orig))
            except Exception:
                log.exception("leases cannot be renewed")
            self._fence(held)

    def _until_fence(self, held: list[Held]) -> float:
        return min(each.renewed for each in held) + self._fence_seconds - time.monotonic()

    def _fence(self, held: list[Held]) -> None:
        latest = time.monotonic() - self._fence_seconds
        for each in held:
            if each.renewed <= latest:
                log.error(
                    "lease could not be renewed in time: saga dropped", saga=each.lease.saga_id
                )
                each.drop()

    async def _renew(self, held: list[Held]) -> None:
        """Renew what is a third through its lease; only look at the rest."""
        before = time.monotonic()
        due = before - self._lease_seconds / 3
        old = [each.lease for each in held if each.renewed <= due]
        fresh = [each.lease for each in held if each.renewed > due]

        def renew(tx: Connection) -> Mapping[str, bool]:
            renewed = self._store.renew(tx, old, self._lease_seconds) if old else {}
            return {**renewed, **(self._store.holding(tx, fresh) if fresh else {})}

        cancels = await self._transactions.run(renew)
        for each in held:
            saga_id = each.lease.saga_id
            if each.renewed <= due and saga_id in cancels:
                each.renewed = before
            if self._held.get(saga_id) is not each or each.leaving:
                continue
            if saga_id not in cancels:
                each.drop()
            elif cancels[saga_id] and each.cancellable and each.effect is not None:
                each.cancelled = True
                each.effect.cancel()
