"""Hosts, their reports and what is promised on them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, TypedDict, Unpack

import sqlalchemy as sa
from sqlalchemy import Connection, Row
from sqlalchemy.exc import IntegrityError

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.domain.model import Host, HostUsage, Size
from controlplane.domain.names import host_name
from controlplane.domain.states import FINAL_STATES, RESTING_STATES, HostState
from controlplane.store.rows import created_now, fields, not_found, update_versioned
from controlplane.store.tables import claims, host_reports, hosts, instances, migrations
from hostd.v1 import host_pb2

_SELECT: sa.Select[Any] = sa.select(
    *hosts.c, host_reports.c.facts, host_reports.c.last_seen, host_reports.c.last_error
).select_from(hosts.outerjoin(host_reports, host_reports.c.host == hosts.c.name))


class HostChanges(TypedDict, total=False):
    """Columns that `update` can set."""

    state: HostState
    state_reason: str
    address: str
    adopt_domains: bool
    certificate_sha256: str


def create(tx: Connection, name: str, *, adopt_domains: bool) -> Host:
    """Announce a host; it is JOINING until it has its certificate.

    Raises:
        DroverError: ALREADY_EXISTS.
    """
    values = {
        "name": name,
        "uid": str(uuid.uuid4()),
        "state": HostState.JOINING,
        "adopt_domains": adopt_domains,
        **created_now(),
    }
    try:
        with tx.begin_nested():
            tx.execute(sa.insert(hosts).values(values))
    except IntegrityError:
        raise DroverError(
            Reason.ALREADY_EXISTS, f"{host_name(name)} exists already.", subject=host_name(name)
        ) from None
    return get(tx, name)


def find(tx: Connection, name: str) -> Host | None:
    """The host of that name, or None."""
    row = tx.execute(_SELECT.where(hosts.c.name == name)).one_or_none()
    return None if row is None else _host(row)


def get(tx: Connection, name: str) -> Host:
    """The host of that name.

    Raises:
        DroverError: HOST_NOT_FOUND.
    """
    host = find(tx, name)
    if host is None:
        raise not_found(Reason.HOST_NOT_FOUND, host_name(name))
    return host


def list_page(tx: Connection, *, after: str, limit: int) -> list[Host]:
    """Up to `limit` hosts in name order whose names come after `after`."""
    query = _SELECT.where(hosts.c.name > after).order_by(hosts.c.name).limit(limit)
    return [_host(row) for row in tx.execute(query)]


def list_all(tx: Connection) -> list[Host]:
    """Every host, in name order."""
    return [_host(row) for row in tx.execute(_SELECT.order_by(hosts.c.name))]


def adopting(tx: Connection) -> frozenset[str]:
    """Names of the joined hosts whose domains become instances by themselves."""
    query = sa.select(hosts.c.name).where(
        hosts.c.adopt_domains == sa.true(),
        hosts.c.state.in_([HostState.ENABLED, HostState.DISABLED]),
    )
    return frozenset(tx.execute(query).scalars())


def update(
    tx: Connection,
    name: str,
    *,
    expected_generation: int | None = None,
    **changes: Unpack[HostChanges],
) -> Host:
    """Change what operators decide about a host.

    Raises:
        DroverError: HOST_NOT_FOUND, or ETAG_MISMATCH.
    """
    update_versioned(
        tx,
        hosts,
        hosts.c.name == name,
        changes,
        expected_generation=expected_generation,
        subject=host_name(name),
        missing=Reason.HOST_NOT_FOUND,
    )
    return get(tx, name)


def lock(tx: Connection, name: str) -> HostState | None:
    """Keep other transactions from locking the same host until this one ends.

    PostgreSQL takes a row lock, under which a later sum over claims sees all
    that were made before; on SQLite a writing transaction is alone anyway.

    Returns:
        The host's state, or None when there is no such host.
    """
    # NO KEY UPDATE: writers of rows that refer to the host need not wait.
    query = sa.select(hosts.c.state).where(hosts.c.name == name)
    query = query.with_for_update(key_share=True)
    return tx.execute(query).scalar_one_or_none()


def record_report(tx: Connection, name: str, facts: host_pb2.HostFacts, now: datetime) -> None:
    """Keep the facts of a report that came in at `now`."""
    _report(tx, name, {"facts": facts, "last_seen": now, "last_error": ""})


def record_failure(tx: Connection, name: str, message: str) -> None:
    """Keep why a host could not be asked; its last facts stay."""
    _report(tx, name, {"last_error": message})


def usage(tx: Connection, name: str) -> HostUsage:
    """What is promised on one host."""
    return usages(tx, [name]).get(name, HostUsage())


def usages(tx: Connection, names: Sequence[str] | None = None) -> dict[str, HostUsage]:
    """What is promised on the named hosts, or on all of them; idle hosts left out."""
    claimed = {
        row.host: Size(
            vcpus=int(row.vcpus), memory_mib=int(row.memory_mib), disk_bytes=int(row.disk_bytes)
        )
        for row in tx.execute(_claimed(names))
    }
    count = sa.select(instances.c.host, sa.func.count().label("n")).where(
        instances.c.released == sa.false()
    )
    machines = _counts(tx, _only(count, instances.c.host, names).group_by(instances.c.host))
    moves: dict[str, int] = {}
    for end in (migrations.c.source_host, migrations.c.target_host):
        count = sa.select(end.label("host"), sa.func.count().label("n")).where(
            migrations.c.state.not_in(RESTING_STATES), end != ""
        )
        for host, n in _counts(tx, _only(count, end, names).group_by(end)).items():
            moves[host] = moves.get(host, 0) + n
    return {
        host: HostUsage(
            claimed=claimed.get(host, Size()),
            instances=machines.get(host, 0),
            moves=moves.get(host, 0),
        )
        for host in claimed.keys() | machines.keys() | moves.keys()
    }


def live_moves(tx: Connection, name: str) -> int:
    """Number of moves, waiting ones included, that have the host as an end."""
    query = sa.select(sa.func.count()).where(
        migrations.c.state.not_in(FINAL_STATES),
        sa.or_(migrations.c.source_host == name, migrations.c.target_host == name),
    )
    return int(tx.execute(query).scalar_one())


def _claimed(names: Iterable[str] | None) -> sa.Select[Any]:
    query = sa.select(
        claims.c.host,
        sa.func.sum(claims.c.vcpus).label("vcpus"),
        sa.func.sum(claims.c.memory_mib).label("memory_mib"),
        sa.func.sum(claims.c.disk_bytes).label("disk_bytes"),
    )
    return _only(query, claims.c.host, names).group_by(claims.c.host)


def _only(
    query: sa.Select[Any], column: sa.Column[Any], names: Iterable[str] | None
) -> sa.Select[Any]:
    return query if names is None else query.where(column.in_(list(names)))


def _counts(tx: Connection, query: sa.Select[Any]) -> dict[str, int]:
    return {row.host: int(row.n) for row in tx.execute(query)}


def _report(tx: Connection, name: str, values: dict[str, Any]) -> None:
    changed = tx.execute(
        sa.update(host_reports)
        .where(host_reports.c.host == name)
        .values(**values, generation=host_reports.c.generation + 1)
    )
    if changed.rowcount == 0:
        tx.execute(sa.insert(host_reports).values(host=name, **values))


def _host(row: Row[Any]) -> Host:
    values = fields(row)
    values["last_error"] = values["last_error"] or ""
    return Host(**values)
