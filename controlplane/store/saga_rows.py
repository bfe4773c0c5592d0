"""Rows of the saga kernel's tables: read as what the kernel works with, and added to."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from controlplane.saga.log import Event, EventKind, SagaState, SagaView
from controlplane.store.saga_tables import saga_events, sagas


def now(tx: Connection) -> sa.ColumnElement[float]:
    """The present in seconds since the epoch.

    The server's clock on PostgreSQL, where several replicas have to agree; the
    host's on SQLite, which has no other.
    """
    if tx.dialect.name == "postgresql":
        return sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Float(53))
    return sa.literal(time.time(), sa.Float(53))


def get(tx: Connection, saga_id: str) -> SagaView:
    """A saga with its log.

    Raises:
        KeyError: There is no such saga.
    """
    row = tx.execute(sa.select(*sagas.c).where(sagas.c.id == saga_id)).one_or_none()
    if row is None:
        raise KeyError(saga_id)
    events = tx.execute(
        sa.select(*saga_events.c)
        .where(saga_events.c.saga_id == saga_id)
        .order_by(saga_events.c.seq)
    )
    return SagaView(
        id=row.id,
        seq=row.seq,
        subject=row.subject,
        kind=row.kind,
        version=row.version,
        params=row.params,
        state=SagaState(row.state),
        generation=row.generation,
        owner=row.owner,
        attempt=row.attempt,
        cancel_requested=row.cancel_requested,
        error=row.error,
        create_time=_time(row.create_time),
        update_time=_time(row.update_time),
        events=tuple(
            Event(
                seq=e.seq,
                kind=EventKind(e.kind),
                step=e.step,
                generation=e.generation,
                attempt=e.attempt,
                output=e.output,
                error=e.error,
                time=_time(e.time),
            )
            for e in events
        ),
    )


def insert_event(
    tx: Connection,
    saga_id: str,
    generation: int,
    kind: EventKind,
    step: str,
    attempt: int,
    output: Any,
    error: Mapping[str, Any] | None,
) -> Event:
    """Add a line to a saga's log; the caller has its row locked."""
    last = tx.execute(
        sa.select(sa.func.coalesce(sa.func.max(saga_events.c.seq), 0)).where(
            saga_events.c.saga_id == saga_id
        )
    ).scalar_one()
    row = tx.execute(
        sa.insert(saga_events)
        .values(
            saga_id=saga_id,
            seq=last + 1,
            step=step,
            kind=kind.value,
            generation=generation,
            attempt=attempt,
            output=output,
            error=None if error is None else dict(error),
            time=now(tx),
        )
        .returning(saga_events.c.time)
    ).one()
    return Event(
        seq=last + 1,
        kind=kind,
        step=step,
        generation=generation,
        attempt=attempt,
        output=output,
        error=error,
        time=_time(row.time),
    )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
