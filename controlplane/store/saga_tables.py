"""The saga kernel's tables: one row per saga, and its log."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.types import JSON

from controlplane.saga.log import LIVE_STATES
from controlplane.store.metadata import metadata

_LIVE = ", ".join(f"'{state.value}'" for state in LIVE_STATES)
_BIG = sa.BigInteger().with_variant(sa.Integer, "sqlite")

sagas = sa.Table(
    "sagas",
    metadata,
    # One counter over all sagas: hosts compare it to tell a later saga of a
    # machine from an earlier one, so it must never be handed out twice.
    sa.Column("seq", _BIG, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(36), nullable=False, unique=True),
    sa.Column("subject", sa.String(255), nullable=False),
    sa.Column("kind", sa.String(63), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("params", JSON, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("generation", sa.BigInteger, nullable=False),
    sa.Column("owner", sa.String(127), nullable=False),
    # Seconds since the epoch, by the database server's clock where it has one.
    sa.Column("lease_until", sa.Float(53), nullable=False),
    sa.Column("wake_at", sa.Float(53), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    sa.Column("error", JSON(none_as_null=True)),
    sa.Column("create_time", sa.Float(53), nullable=False),
    sa.Column("update_time", sa.Float(53), nullable=False),
    sa.Index("sagas_due", "state", "wake_at"),
    sa.Index(
        "sagas_one_live_per_subject",
        "subject",
        unique=True,
        sqlite_where=sa.text(f"state IN ({_LIVE})"),
        postgresql_where=sa.text(f"state IN ({_LIVE})"),
    ),
    sqlite_autoincrement=True,
)

saga_events = sa.Table(
    "saga_events",
    metadata,
    sa.Column("saga_id", sa.String(36), sa.ForeignKey("sagas.id"), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("step", sa.String(63), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("generation", sa.BigInteger, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("output", JSON(none_as_null=True)),
    sa.Column("error", JSON(none_as_null=True)),
    sa.Column("time", sa.Float(53), nullable=False),
    # A step succeeds once and is undone once, whoever believes otherwise.
    sa.Index(
        "saga_events_final_once",
        "saga_id",
        "step",
        "kind",
        unique=True,
        sqlite_where=sa.text("kind IN ('SUCCEEDED', 'UNDO_FINISHED', 'DONE', 'UNDONE')"),
        postgresql_where=sa.text("kind IN ('SUCCEEDED', 'UNDO_FINISHED', 'DONE', 'UNDONE')"),
    ),
)
