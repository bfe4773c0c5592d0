"""Moves and their history."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, TypedDict, Unpack

import sqlalchemy as sa
from sqlalchemy import Connection, Row
from sqlalchemy.exc import IntegrityError

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.domain.model import (
    FlavorSize,
    Instance,
    MigrationEvent,
)
from controlplane.domain.model import Migration as Migration
from controlplane.domain.names import instance_name, migration_name
from controlplane.domain.states import (
    FINAL_STATES,
    MigrationKind,
    MigrationState,
    PowerState,
)
from controlplane.store.rows import created_now, fields, not_found, update_versioned
from controlplane.store.tables import migration_events, migrations
from controlplane.store.types import utc_now
from controlplane.v1 import migration_pb2
from hostd.v1 import domain_pb2, job_pb2


class MigrationChanges(TypedDict, total=False):
    """Columns that `update` can set."""

    state: MigrationState
    step: str
    attempt: int
    saga_id: str
    target_host: str
    placement: migration_pb2.Placement
    options: migration_pb2.MigrationOptions
    description: domain_pb2.Domain | None
    progress: job_pb2.CopyProgress | None
    receipts: Sequence[job_pb2.VolumeReceipt]
    error: Mapping[str, Any] | None
    previous_power_state: PowerState | None
    confirm_deadline: datetime | None
    stop_time: datetime | None
    running_time: datetime | None
    throughput_bytes_per_second: int
    cancel_requested: bool


def create(
    tx: Connection,
    *,
    instance: Instance,
    target_host: str,
    flavor: FlavorSize | None,
    options: migration_pb2.MigrationOptions,
    placement: migration_pb2.Placement,
    created_by: str,
    description: domain_pb2.Domain | None = None,
) -> Migration:
    """Admit a move in state PENDING; its saga and claim are made by the caller.

    Raises:
        DroverError: INSTANCE_BUSY when the machine has another move that has not
            ended.
    """
    values = {
        "id": str(uuid.uuid4()),
        "instance_uid": instance.uid,
        "instance_name": instance.name,
        "kind": MigrationKind.MIGRATION if flavor is None else MigrationKind.RESIZE,
        "state": MigrationState.PENDING,
        "source_host": instance.host,
        "target_host": target_host,
        "flavor": flavor,
        "options": options,
        "placement": placement,
        "description": description,
        "receipts": (),
        "created_by": created_by,
        **created_now(),
    }
    try:
        with tx.begin_nested():
            row = tx.execute(sa.insert(migrations).values(values).returning(*migrations.c)).one()
    except IntegrityError:
        raise DroverError(
            Reason.INSTANCE_BUSY,
            f"{instance_name(instance.uid)} ({instance.name}) has a move that has not ended.",
            subject=instance_name(instance.uid),
        ) from None
    return _migration(row)


def find(tx: Connection, migration_id: str) -> Migration | None:
    """The move with that id, or None."""
    query = sa.select(*migrations.c).where(migrations.c.id == migration_id)
    row = tx.execute(query).one_or_none()
    return None if row is None else _migration(row)


def get(tx: Connection, migration_id: str) -> Migration:
    """The move with that id.

    Raises:
        DroverError: MIGRATION_NOT_FOUND.
    """
    migration = find(tx, migration_id)
    if migration is None:
        raise not_found(Reason.MIGRATION_NOT_FOUND, migration_name(migration_id))
    return migration


def generation_of(tx: Connection, migration_id: str) -> int | None:
    """The generation of a move, or None when there is no such move; cheap to poll."""
    query = sa.select(migrations.c.generation).where(migrations.c.id == migration_id)
    return tx.execute(query).scalar_one_or_none()


def list_page(
    tx: Connection,
    *,
    instance_uid: str = "",
    host: str = "",
    states: Collection[MigrationState] = (),
    before: tuple[datetime, str] | None = None,
    limit: int,
) -> list[Migration]:
    """Up to `limit` moves, newest first, that come after (create_time, id) in that order."""
    query = sa.select(*migrations.c)
    if instance_uid:
        query = query.where(migrations.c.instance_uid == instance_uid)
    if host:
        query = query.where(
            sa.or_(migrations.c.source_host == host, migrations.c.target_host == host)
        )
    if states:
        query = query.where(migrations.c.state.in_(list(states)))
    if before is not None:
        time, migration_id = before
        query = query.where(
            sa.or_(
                migrations.c.create_time < time,
                sa.and_(migrations.c.create_time == time, migrations.c.id < migration_id),
            )
        )
    query = query.order_by(migrations.c.create_time.desc(), migrations.c.id.desc()).limit(limit)
    return [_migration(row) for row in tx.execute(query)]


def live_of(tx: Connection, instance_uids: Collection[str]) -> dict[str, Migration]:
    """The move that has not ended of each instance that has one."""
    query = sa.select(*migrations.c).where(
        migrations.c.state.not_in(FINAL_STATES),
        migrations.c.instance_uid.in_(list(instance_uids)),
    )
    return {row.instance_uid: _migration(row) for row in tx.execute(query)}


def live_sagas_on(tx: Connection, host: str) -> list[str]:
    """Ids of the sagas of the moves that have not ended and have the host as an end."""
    query = sa.select(migrations.c.saga_id).where(
        migrations.c.state.not_in(FINAL_STATES),
        sa.or_(migrations.c.source_host == host, migrations.c.target_host == host),
    )
    return list(tx.execute(query).scalars())


def count_by_state(tx: Connection) -> dict[MigrationState, int]:
    """Number of moves in each state that some are in."""
    query = sa.select(migrations.c.state, sa.func.count().label("n")).group_by(migrations.c.state)
    return {MigrationState(row.state): int(row.n) for row in tx.execute(query)}


def due_for_confirm(tx: Connection, now: datetime, limit: int = 100) -> list[Migration]:
    """Moves in AWAITING_CONFIRM whose deadline has passed, the oldest deadline first."""
    query = (
        sa.select(*migrations.c)
        .where(
            migrations.c.state == MigrationState.AWAITING_CONFIRM,
            migrations.c.confirm_deadline <= now,
        )
        .order_by(migrations.c.confirm_deadline)
        .limit(limit)
    )
    return [_migration(row) for row in tx.execute(query)]


def update(
    tx: Connection,
    migration_id: str,
    *,
    expected_generation: int | None = None,
    **changes: Unpack[MigrationChanges],
) -> Migration:
    """Change a move.

    Raises:
        DroverError: MIGRATION_NOT_FOUND, or ETAG_MISMATCH.
    """
    row = update_versioned(
        tx,
        migrations,
        migrations.c.id == migration_id,
        changes,
        expected_generation=expected_generation,
        subject=migration_name(migration_id),
        missing=Reason.MIGRATION_NOT_FOUND,
    )
    return _migration(row)


def set_progress(tx: Connection, migration_id: str, progress: job_pb2.CopyProgress) -> None:
    """Take over the progress of a copy; nothing is written when it is the same as before."""
    query = sa.select(migrations.c.progress).where(migrations.c.id == migration_id)
    if tx.execute(query).scalar_one_or_none() != progress:
        update(tx, migration_id, progress=progress)


def add_event(
    tx: Connection,
    migration_id: str,
    saga: str,
    step: str,
    kind: str,
    message: str,
    error: Mapping[str, Any] | None = None,
) -> int:
    """Add a line to the history of a move.

    Args:
        tx: Open transaction.
        migration_id: The move.
        saga: "move", "confirm" or "revert".
        step: The step it is about; empty for the saga as a whole.
        kind: "STARTED", "SUCCEEDED", "FAILED", "UNDO_STARTED", "UNDO_FINISHED",
            "UNDO_FAILED" or "STATE".
        message: One sentence for people.
        error: `DroverError.to_json` of a failure.

    Returns:
        Its position, from 1.

    Raises:
        DroverError: MIGRATION_NOT_FOUND.
    """
    # The counter in the move's row serialises writers, and leaves no gaps.
    counted = tx.execute(
        sa.update(migrations)
        .where(migrations.c.id == migration_id)
        .values(event_count=migrations.c.event_count + 1)
        .returning(migrations.c.event_count)
    ).scalar_one_or_none()
    if counted is None:
        raise not_found(Reason.MIGRATION_NOT_FOUND, migration_name(migration_id))
    seq = int(counted)
    tx.execute(
        sa.insert(migration_events).values(
            migration_id=migration_id,
            seq=seq,
            time=utc_now(),
            saga=saga,
            step=step,
            kind=kind,
            message=message,
            error=error,
        )
    )
    return seq


def events(
    tx: Connection, migration_id: str, *, after: int = 0, limit: int = 1000
) -> list[MigrationEvent]:
    """Up to `limit` lines of history, oldest first, after a position."""
    query = (
        sa.select(*migration_events.c)
        .where(migration_events.c.migration_id == migration_id, migration_events.c.seq > after)
        .order_by(migration_events.c.seq)
        .limit(limit)
    )
    return [MigrationEvent(**row._mapping) for row in tx.execute(query)]


def _migration(row: Row[Any]) -> Migration:
    return Migration(**fields(row, "event_count"))
