"""The kernel's store in SQL, for SQLite and PostgreSQL alike.

Every write is one conditional UPDATE of the saga's row, with the generation of
the lease in its WHERE clause, before anything else is written in the same
transaction. A runner whose lease was taken over therefore changes nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from controlplane.saga.definition import (
    LostLease,
    NotStuck,
    PastPivot,
    Saga,
    SubjectBusy,
    encode,
)
from controlplane.saga.log import (
    CLAIMABLE_STATES,
    LIVE_STATES,
    EventKind,
    SagaState,
    SagaView,
    fold,
)
from controlplane.saga.plan import past_pivot
from controlplane.saga.store import Appended, Lease
from controlplane.store.saga_rows import get as get
from controlplane.store.saga_rows import insert_event, now
from controlplane.store.saga_tables import sagas

_CLAIMABLE = [state.value for state in CLAIMABLE_STATES]
_LIVE = [state.value for state in LIVE_STATES]


class SqlSagaStore:
    """See `controlplane.saga.store.SagaStore`."""

    def claim(
        self,
        tx: Connection,
        owner: str,
        known: Collection[tuple[str, int]],
        lease_seconds: float,
        limit: int,
    ) -> list[Lease]:
        """Claim sagas that are due and that nobody holds."""
        present = now(tx)
        due = sa.and_(
            sagas.c.state.in_(_CLAIMABLE),
            sagas.c.lease_until < present,
            sagas.c.wake_at <= present,
            sa.tuple_(sagas.c.kind, sagas.c.version).in_(sorted(known)),
        )
        candidates = tx.execute(
            sa.select(sagas.c.id, sagas.c.generation)
            .where(due)
            .order_by(sagas.c.wake_at)
            .limit(limit)
        ).all()
        claimed = []
        for candidate in candidates:
            # Every predicate again: between the two statements another replica
            # may have claimed, or even finished, the saga.
            generation = tx.execute(
                sa.update(sagas)
                .where(sagas.c.id == candidate.id, sagas.c.generation == candidate.generation, due)
                .values(
                    generation=sagas.c.generation + 1,
                    owner=owner,
                    lease_until=present + lease_seconds,
                )
                .returning(sagas.c.generation)
            ).scalar_one_or_none()
            if generation is not None:
                claimed.append(Lease(candidate.id, int(generation)))
        return claimed

    def read(self, tx: Connection, saga_id: str) -> SagaView:
        """A saga with its log."""
        return get(tx, saga_id)

    def check_lease(self, tx: Connection, lease: Lease) -> None:
        """Hold the saga's row for this transaction, if the lease still holds."""
        self._write(tx, lease, {})

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
        """Append an event and set the saga's state with it."""
        changes: dict[str, Any] = {}
        if kind in (EventKind.STARTED, EventKind.UNDO_STARTED):
            changes["attempt"] = 1
        if error is not None:
            changes["error"] = dict(error)
        if state is not None:
            changes["state"] = state.value
            if state not in CLAIMABLE_STATES:
                # Finishing bumps the generation as well: nothing that still
                # carries the old one can count any more, here or on a host.
                changes |= {
                    "owner": "",
                    "lease_until": 0.0,
                    "generation": sagas.c.generation + 1,
                }
        row = self._write(tx, lease, changes)
        event = insert_event(
            tx, lease.saga_id, lease.generation, kind, step, row.attempt, output, error
        )
        return Appended(event, row.cancel_requested)

    def release(
        self, tx: Connection, lease: Lease, wake_seconds: float, *, attempt: int | None = None
    ) -> None:
        """Give up a lease; the saga is due again in `wake_seconds`."""
        changes: dict[str, Any] = {
            "owner": "",
            "lease_until": 0.0,
            # Whoever asked for a cancel meanwhile does not wait for the hour.
            "wake_at": sa.case(
                (
                    sa.and_(sagas.c.cancel_requested, sagas.c.state == SagaState.RUNNING.value),
                    0.0,
                ),
                else_=now(tx) + wake_seconds,
            )
            if wake_seconds > 0
            else 0.0,
        }
        if attempt is not None:
            changes["attempt"] = attempt
        self._write(tx, lease, changes)

    def renew(
        self, tx: Connection, leases: Collection[Lease], lease_seconds: float
    ) -> dict[str, bool]:
        """Renew leases; which still hold, and for which a cancel was asked."""
        rows = tx.execute(
            sa.update(sagas)
            .where(_held(leases))
            .values(lease_until=now(tx) + lease_seconds)
            .returning(sagas.c.id, sagas.c.cancel_requested)
        )
        return {row.id: row.cancel_requested for row in rows}

    def holding(self, tx: Connection, leases: Collection[Lease]) -> dict[str, bool]:
        """What `renew` returns, without renewing anything."""
        rows = tx.execute(sa.select(sagas.c.id, sagas.c.cancel_requested).where(_held(leases)))
        return {row.id: row.cancel_requested for row in rows}

    def count_unclaimable(self, tx: Connection, known: Collection[tuple[str, int]]) -> int:
        """Number of live sagas of a kind or version that is not among the known ones."""
        return tx.execute(
            sa.select(sa.func.count())
            .select_from(sagas)
            .where(
                sagas.c.state.in_(_CLAIMABLE),
                sa.tuple_(sagas.c.kind, sagas.c.version).not_in(sorted(known)),
            )
        ).scalar_one()

    def _write(self, tx: Connection, lease: Lease, changes: Mapping[str, Any]) -> sa.Row[Any]:
        row = tx.execute(
            sa.update(sagas)
            .where(
                sagas.c.id == lease.saga_id,
                sagas.c.generation == lease.generation,
                sagas.c.state.in_(_CLAIMABLE),
            )
            .values(**changes, update_time=now(tx))
            .returning(sagas.c.attempt, sagas.c.cancel_requested)
        ).one_or_none()
        if row is None:
            raise LostLease(f"saga {lease.saga_id}, generation {lease.generation}")
        return row


# --- for whoever asks for sagas ------------------------------------------------


def create(
    tx: Connection, saga: Saga, subject: str, params: Any, saga_id: str | None = None
) -> str:
    """Create a saga in the caller's transaction; a runner picks it up once that commits.

    Raises:
        SubjectBusy: The subject has a live saga.
    """
    new_id = saga_id or str(uuid.uuid4())
    present = now(tx)
    try:
        with tx.begin_nested():
            tx.execute(
                sa.insert(sagas).values(
                    id=new_id,
                    subject=subject,
                    kind=saga.kind,
                    version=saga.version,
                    params=encode(params),
                    state=SagaState.RUNNING.value,
                    generation=0,
                    owner="",
                    lease_until=0.0,
                    wake_at=0.0,
                    attempt=0,
                    cancel_requested=False,
                    create_time=present,
                    update_time=present,
                )
            )
    except IntegrityError as error:
        raise SubjectBusy(subject) from error
    return new_id


def request_cancel(tx: Connection, saga: Saga, saga_id: str) -> None:
    """Have a saga turn round at the next boundary; nothing changes if it already does.

    Raises:
        KeyError: There is no such saga.
        PastPivot: It has passed its point of no return, or has ended.
    """
    row = _lock(tx, saga_id)
    if row.state == SagaState.UNWINDING.value:
        return
    view = get(tx, saga_id)
    if row.state != SagaState.RUNNING.value or past_pivot(saga, fold(view.events)):
        raise PastPivot(f"saga {saga_id} is {row.state}")
    tx.execute(
        sa.update(sagas)
        .where(sagas.c.id == saga_id)
        .values(cancel_requested=True, wake_at=0.0, update_time=now(tx))
    )


def wake(tx: Connection, saga_id: str) -> None:
    """Make a waiting saga due now."""
    tx.execute(
        sa.update(sagas)
        .where(sagas.c.id == saga_id, sagas.c.state.in_(_CLAIMABLE))
        .values(wake_at=0.0)
    )


def retry_stuck(tx: Connection, saga: Saga, saga_id: str) -> SagaState:
    """Have a stuck saga try its last step again.

    Returns:
        The state it has now.

    Raises:
        NotStuck: It is not stuck.
    """
    row = _lock(tx, saga_id)
    if row.state != SagaState.STUCK.value:
        raise NotStuck(f"saga {saga_id} is {row.state}")
    event = insert_event(
        tx, saga_id, row.generation, EventKind.RETRIED, "", row.attempt, None, None
    )
    view = get(tx, saga_id)
    state = fold(view.events).state
    tx.execute(
        sa.update(sagas)
        .where(sagas.c.id == saga_id)
        .values(state=state.value, wake_at=0.0, error=None, update_time=now(tx))
    )
    saga.observe(tx, get(tx, saga_id), event)
    return state


def abandon(tx: Connection, saga: Saga, saga_id: str, reason: str, comment: str) -> None:
    """Give up on a stuck saga.

    Raises:
        NotStuck: It is not stuck.
    """
    row = _lock(tx, saga_id)
    if row.state != SagaState.STUCK.value:
        raise NotStuck(f"saga {saga_id} is {row.state}")
    why = {"reason": reason, "message": comment}
    tx.execute(
        sa.update(sagas)
        .where(sagas.c.id == saga_id)
        .values(
            state=SagaState.ABANDONED.value,
            generation=sagas.c.generation + 1,
            update_time=now(tx),
        )
    )
    event = insert_event(
        tx, saga_id, row.generation, EventKind.ABANDONED, "", row.attempt, None, why
    )
    saga.observe(tx, get(tx, saga_id), event)


def live_of(tx: Connection, subject: str) -> str | None:
    """Id of the live saga of a subject, or None."""
    return tx.execute(
        sa.select(sagas.c.id).where(sagas.c.subject == subject, sagas.c.state.in_(_LIVE))
    ).scalar_one_or_none()


def count_stuck(tx: Connection) -> dict[str, int]:
    """Number of stuck sagas of each kind that has some."""
    query = (
        sa.select(sagas.c.kind, sa.func.count().label("n"))
        .where(sagas.c.state == SagaState.STUCK.value)
        .group_by(sagas.c.kind)
    )
    return {row.kind: int(row.n) for row in tx.execute(query)}


def _held(leases: Collection[Lease]) -> sa.ColumnElement[bool]:
    # A release keeps the generation; without the owner a renewal that overtakes
    # it would hold the saga for nobody.
    pairs = sorted((lease.saga_id, lease.generation) for lease in leases)
    return sa.and_(sa.tuple_(sagas.c.id, sagas.c.generation).in_(pairs), sagas.c.owner != "")


def _lock(tx: Connection, saga_id: str) -> sa.Row[Any]:
    row = tx.execute(
        sa.select(*sagas.c).where(sagas.c.id == saga_id).with_for_update()
    ).one_or_none()
    if row is None:
        raise KeyError(saga_id)
    return row
