"""Which host reported which domain, as of its last report.

Adoption reads them to find duplicates, the scheduler to find clashes of name,
UUID and MAC address.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from controlplane.domain.model import Sighting
from controlplane.store.tables import sighting_macs, sightings
from controlplane.store.types import utc_now
from hostd.v1 import domain_pb2

_SELECT: sa.Select[Any] = sa.select(
    sightings.c.host,
    sightings.c.uuid,
    sightings.c.domain,
    sightings.c.last_seen,
    sightings.c.current,
)
_CHUNK = 500


@dataclass(frozen=True)
class Clash:
    """Something on a host that an incoming machine would collide with.

    Attributes:
        host: The host.
        uuid: UUID of the domain there.
        name: Its libvirt name.
        mac: The MAC address that both have; empty for a clash of name or UUID.
    """

    host: str
    uuid: str
    name: str
    mac: str = ""


def replace(
    tx: Connection,
    host: str,
    domains: Sequence[domain_pb2.Domain],
    now: datetime,
    forget_before: datetime,
    *,
    asked: datetime,
) -> set[str]:
    """Take over a host's report.

    Args:
        tx: Open transaction.
        host: Who reported.
        domains: All domains of the report; one that has left since the host was
            asked counts as absent.
        now: When it came in.
        forget_before: Domains that were last reported before this are dropped.
        asked: When the host was asked for it.

    Returns:
        UUIDs that the host reports now, reported before, or both.
    """
    known = _known(tx, host)
    left = _left_since(tx, host, asked)
    reported = {domain.uuid: domain for domain in domains if domain.uuid not in left}
    unchanged = [uuid for uuid, domain in reported.items() if known.get(uuid) == domain]
    for chunk in _chunks(unchanged):
        at = sa.and_(sightings.c.host == host, sightings.c.uuid.in_(chunk))
        tx.execute(sa.update(sightings).where(at).values(last_seen=now, current=True))
    for uuid in reported.keys() - set(unchanged):
        domain = reported[uuid]
        values = {"name": domain.name, "domain": domain, "last_seen": now, "current": True}
        if uuid in known:
            at = sa.and_(sightings.c.host == host, sightings.c.uuid == uuid)
            tx.execute(sa.update(sightings).where(at).values(values))
        else:
            tx.execute(sa.insert(sightings).values(host=host, uuid=uuid, **values))
    _replace_macs(tx, host, reported)
    gone = [uuid for uuid in known if uuid not in reported]
    for chunk in _chunks(gone):
        at = sa.and_(sightings.c.host == host, sightings.c.uuid.in_(chunk))
        tx.execute(sa.update(sightings).where(at).values(current=False))
        tx.execute(sa.delete(sightings).where(at, sightings.c.last_seen < forget_before))
    return known.keys() | reported.keys()


def leave(tx: Connection, host: str, uuid: str) -> None:
    """Note that a host no longer has a domain, whatever it has reported until now.

    For those who were told so by the host itself, outside its reports: it has
    parked or undefined the domain. Otherwise its last report would be taken for
    a duplicate until the next one.
    """
    at = sa.and_(sightings.c.host == host, sightings.c.uuid == uuid)
    tx.execute(sa.update(sightings).where(at).values(last_seen=utc_now(), current=False))


def forget_host(tx: Connection, host: str) -> set[str]:
    """Drop everything a host ever reported; returns the UUIDs."""
    uuids = set(tx.execute(sa.select(sightings.c.uuid).where(sightings.c.host == host)).scalars())
    tx.execute(sa.delete(sighting_macs).where(sighting_macs.c.host == host))
    tx.execute(sa.delete(sightings).where(sightings.c.host == host))
    return uuids


def of_uuids(tx: Connection, uuids: Iterable[str]) -> dict[str, dict[str, Sighting]]:
    """Sightings of some domains: uuid -> host -> sighting."""
    found: dict[str, dict[str, Sighting]] = {}
    for chunk in _chunks(sorted(uuids)):
        for row in tx.execute(_SELECT.where(sightings.c.uuid.in_(chunk))):
            found.setdefault(row.uuid, {})[row.host] = _sighting(row)
    return found


def find(tx: Connection, host: str, uuid: str) -> Sighting | None:
    """One domain on one host, or None."""
    query = _SELECT.where(sightings.c.host == host, sightings.c.uuid == uuid)
    row = tx.execute(query).one_or_none()
    return None if row is None else _sighting(row)


def clashes(tx: Connection, machine: domain_pb2.Domain) -> list[Clash]:
    """What bears the name, the UUID or a MAC address of a machine, on any host."""
    same = sa.select(sightings.c.host, sightings.c.uuid, sightings.c.name).where(
        sightings.c.current == sa.true(),
        sa.or_(sightings.c.uuid == machine.uuid, sightings.c.name == machine.name),
    )
    found = [Clash(row.host, row.uuid, row.name) for row in tx.execute(same)]
    macs = [interface.mac_address for interface in machine.interfaces]
    if macs:
        shared = (
            sa.select(sightings.c.host, sightings.c.uuid, sightings.c.name, sighting_macs.c.mac)
            .join(
                sighting_macs,
                sa.and_(
                    sighting_macs.c.host == sightings.c.host,
                    sighting_macs.c.uuid == sightings.c.uuid,
                ),
            )
            .where(
                sightings.c.current == sa.true(),
                sighting_macs.c.mac.in_(macs),
                sightings.c.uuid != machine.uuid,
            )
        )
        found += [Clash(row.host, row.uuid, row.name, row.mac) for row in tx.execute(shared)]
    return found


def _known(tx: Connection, host: str) -> dict[str, domain_pb2.Domain]:
    query = sa.select(sightings.c.uuid, sightings.c.domain).where(sightings.c.host == host)
    return {row.uuid: row.domain for row in tx.execute(query)}


def _left_since(tx: Connection, host: str, asked: datetime) -> set[str]:
    query = sa.select(sightings.c.uuid).where(
        sightings.c.host == host,
        sightings.c.current == sa.false(),
        sightings.c.last_seen > asked,
    )
    return set(tx.execute(query).scalars())


def _replace_macs(tx: Connection, host: str, reported: dict[str, domain_pb2.Domain]) -> None:
    wanted = {
        (uuid, interface.mac_address)
        for uuid, domain in reported.items()
        for interface in domain.interfaces
        if interface.mac_address
    }
    query = sa.select(sighting_macs.c.uuid, sighting_macs.c.mac).where(sighting_macs.c.host == host)
    present = {(row.uuid, row.mac) for row in tx.execute(query)}
    for uuid, mac in present - wanted:
        tx.execute(
            sa.delete(sighting_macs).where(
                sighting_macs.c.host == host,
                sighting_macs.c.uuid == uuid,
                sighting_macs.c.mac == mac,
            )
        )
    added = [{"host": host, "uuid": uuid, "mac": mac} for uuid, mac in sorted(wanted - present)]
    if added:
        tx.execute(sa.insert(sighting_macs), added)


def _chunks(items: Sequence[str]) -> Iterable[Sequence[str]]:
    for start in range(0, len(items), _CHUNK):
        yield items[start : start + _CHUNK]


def _sighting(row: Row[Any]) -> Sighting:
    return Sighting(**row._mapping)
