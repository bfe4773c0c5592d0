"""The domain's tables. The saga kernel's are in `saga_tables`.

Every table that several writers contend for has a `generation`, which each
UPDATE raises; etags derive from it. Room is never counted in a column: it is
the sum of `claims`, whose rows come and go with the state they belong to.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.types import JSON

from controlplane.domain.model import FlavorSize
from controlplane.domain.states import (
    FINAL_STATES,
    HostState,
    MigrationKind,
    MigrationState,
    PowerState,
    TaskState,
    VmState,
)
from controlplane.store.metadata import metadata
from controlplane.store.types import EnumText, ProtoJson, ProtoListJson, StructJson, UtcTime
from controlplane.v1 import migration_pb2
from hostd.v1 import domain_pb2, host_pb2, job_pb2

_HOST = sa.String(63)
_UUID = sa.String(36)
_NAME = sa.String(255)
_PRINCIPAL = sa.String(300)


def _text(name: str, type_: sa.types.TypeEngine[str] | None = None) -> sa.Column[str]:
    return sa.Column(name, type_ or sa.Text(), nullable=False, server_default="")


def _versioned() -> tuple[sa.Column[int], sa.Column[object], sa.Column[object]]:
    return (
        sa.Column("generation", sa.BigInteger, nullable=False, server_default="1"),
        sa.Column("create_time", UtcTime, nullable=False),
        sa.Column("update_time", UtcTime, nullable=False),
    )


hosts = sa.Table(
    "hosts",
    metadata,
    sa.Column("name", _HOST, primary_key=True),
    sa.Column("uid", _UUID, nullable=False, unique=True),
    sa.Column("state", EnumText(HostState), nullable=False),
    _text("state_reason"),
    _text("address"),
    sa.Column("adopt_domains", sa.Boolean, nullable=False),
    _text("certificate_sha256", sa.String(64)),
    *_versioned(),
)

host_reports = sa.Table(
    "host_reports",
    metadata,
    sa.Column("host", _HOST, sa.ForeignKey("hosts.name", ondelete="CASCADE"), primary_key=True),
    sa.Column("facts", ProtoJson(host_pb2.HostFacts)),
    sa.Column("last_seen", UtcTime),
    _text("last_error"),
    sa.Column("generation", sa.BigInteger, nullable=False, server_default="1"),
)
"""Apart from `hosts`: it changes with every poll and must not make an operator's etag stale."""

sightings = sa.Table(
    "sightings",
    metadata,
    sa.Column("host", _HOST, sa.ForeignKey("hosts.name", ondelete="CASCADE"), primary_key=True),
    sa.Column("uuid", _UUID, primary_key=True),
    sa.Column("name", _NAME, nullable=False),
    sa.Column("domain", ProtoJson(domain_pb2.Domain), nullable=False),
    sa.Column("last_seen", UtcTime, nullable=False),
    sa.Column("current", sa.Boolean, nullable=False),
    sa.Index("sightings_by_uuid", "uuid"),
    sa.Index("sightings_by_name", "name"),
)

sighting_macs = sa.Table(
    "sighting_macs",
    metadata,
    sa.Column("host", _HOST, primary_key=True),
    sa.Column("uuid", _UUID, primary_key=True),
    sa.Column("mac", sa.String(17), primary_key=True),
    sa.ForeignKeyConstraint(
        ["host", "uuid"], ["sightings.host", "sightings.uuid"], ondelete="CASCADE"
    ),
    sa.Index("sighting_macs_by_mac", "mac"),
)

instances = sa.Table(
    "instances",
    metadata,
    sa.Column("uid", _UUID, primary_key=True),
    sa.Column("name", _NAME, nullable=False),
    sa.Column("host", _HOST, sa.ForeignKey("hosts.name"), nullable=False),
    sa.Column("vm_state", EnumText(VmState), nullable=False),
    sa.Column("task_state", EnumText(TaskState)),
    sa.Column("power_state", EnumText(PowerState)),
    sa.Column("project", sa.String(63), nullable=False),
    sa.Column("vcpus", sa.Integer, nullable=False),
    sa.Column("memory_mib", sa.BigInteger, nullable=False),
    sa.Column("disk_size_bytes", sa.BigInteger, nullable=False),
    _text("flavor", sa.String(63)),
    _text("migration_id", _UUID),
    _text("lock_reason"),
    _text("locked_by", _PRINCIPAL),
    _text("conflict"),
    sa.Column("description", ProtoJson(domain_pb2.Domain), nullable=False),
    sa.Column("released", sa.Boolean, nullable=False, server_default=sa.false()),
    *_versioned(),
    sa.Index("instances_by_name", "name", "uid"),
    sa.Index("instances_by_host", "host"),
)

flavors = sa.Table(
    "flavors",
    metadata,
    sa.Column("name", sa.String(63), primary_key=True),
    sa.Column("vcpus", sa.Integer, nullable=False),
    sa.Column("memory_mib", sa.BigInteger, nullable=False),
    sa.Column("root_disk_bytes", sa.BigInteger, nullable=False),
    *_versioned(),
)

claims = sa.Table(
    "claims",
    metadata,
    sa.Column("consumer", sa.String(64), primary_key=True),
    sa.Column("host", _HOST, sa.ForeignKey("hosts.name"), nullable=False),
    sa.Column("vcpus", sa.Integer, nullable=False),
    sa.Column("memory_mib", sa.BigInteger, nullable=False),
    sa.Column("disk_bytes", sa.BigInteger, nullable=False),
    sa.Column("generation", sa.BigInteger, nullable=False, server_default="1"),
    sa.Index("claims_by_host", "host"),
)

migrations = sa.Table(
    "migrations",
    metadata,
    sa.Column("id", _UUID, primary_key=True),
    sa.Column("instance_uid", _UUID, sa.ForeignKey("instances.uid"), nullable=False),
    sa.Column("instance_name", _NAME, nullable=False),
    sa.Column("kind", EnumText(MigrationKind), nullable=False),
    sa.Column("state", EnumText(MigrationState), nullable=False),
    _text("step", sa.String(63)),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
    _text("saga_id", _UUID),
    sa.Column("source_host", _HOST, nullable=False),
    _text("target_host", _HOST),
    sa.Column("flavor", StructJson(FlavorSize)),
    sa.Column("options", ProtoJson(migration_pb2.MigrationOptions), nullable=False),
    sa.Column("placement", ProtoJson(migration_pb2.Placement), nullable=False),
    sa.Column("description", ProtoJson(domain_pb2.Domain)),
    sa.Column("progress", ProtoJson(job_pb2.CopyProgress)),
    sa.Column("receipts", ProtoListJson(job_pb2.VolumeReceipt), nullable=False),
    sa.Column("error", JSON(none_as_null=True)),
    sa.Column("previous_power_state", EnumText(PowerState)),
    sa.Column("confirm_deadline", UtcTime),
    sa.Column("stop_time", UtcTime),
    sa.Column("running_time", UtcTime),
    sa.Column("throughput_bytes_per_second", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("cancel_requested", sa.Boolean, nullable=False, server_default=sa.false()),
    _text("created_by", _PRINCIPAL),
    sa.Column("event_count", sa.Integer, nullable=False, server_default="0"),
    *_versioned(),
    sa.Index("migrations_by_instance", "instance_uid"),
    sa.Index("migrations_by_time", "create_time", "id"),
    sa.Index("migrations_by_deadline", "state", "confirm_deadline"),
)

_final = ", ".join(f"'{state.value}'" for state in sorted(FINAL_STATES))
LIVE_MIGRATION = sa.Index(
    "migrations_one_live",
    migrations.c.instance_uid,
    unique=True,
    sqlite_where=sa.text(f"state NOT IN ({_final})"),
    postgresql_where=sa.text(f"state NOT IN ({_final})"),
)
"""One move of a machine at a time, also while it waits for confirm and no saga is live."""

migration_events = sa.Table(
    "migration_events",
    metadata,
    sa.Column(
        "migration_id",
        _UUID,
        sa.ForeignKey("migrations.id", ondelete="CASCADE"),
        primary_key=True,
    ),
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("time", UtcTime, nullable=False),
    _text("saga", sa.String(63)),
    _text("step", sa.String(63)),
    sa.Column("kind", sa.String(32), nullable=False),
    _text("message"),
    sa.Column("error", JSON(none_as_null=True)),
)

request_ids = sa.Table(
    "request_ids",
    metadata,
    sa.Column("principal", _PRINCIPAL, primary_key=True),
    sa.Column("method", sa.String(120), primary_key=True),
    sa.Column("request_id", _UUID, primary_key=True),
    sa.Column("body_sha256", sa.String(64), nullable=False),
    sa.Column("response", sa.LargeBinary, nullable=False),
    sa.Column("expire_time", UtcTime, nullable=False),
    sa.Index("request_ids_by_expiry", "expire_time"),
)

join_tokens = sa.Table(
    "join_tokens",
    metadata,
    sa.Column("secret_sha256", sa.String(64), primary_key=True),
    sa.Column("host", _HOST, sa.ForeignKey("hosts.name", ondelete="CASCADE"), nullable=False),
    sa.Column("expire_time", UtcTime, nullable=False),
    sa.Column("used_time", UtcTime),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column(
        "seq",
        sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
        primary_key=True,
        autoincrement=True,
    ),
    sa.Column("time", UtcTime, nullable=False),
    _text("principal", _PRINCIPAL),
    _text("peer"),
    sa.Column("method", sa.String(120), nullable=False),
    _text("resource"),
    sa.Column("outcome", sa.String(32), nullable=False),
    _text("reason", sa.String(63)),
    _text("request_id", _UUID),
)
