"""Claims: room held on a host by an instance or by a move.

A consumer holds one claim. "instances/{uid}" holds it on the host that owns the
machine, "migrations/{id}" on the other host of the move: the target until
ownership changes, the source after it.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

from controlplane.domain.model import Claim, Size
from controlplane.domain.states import HostState
from controlplane.store import hosts
from controlplane.store.tables import claims


def instance_consumer(uid: str) -> str:
    """The consumer that stands for an instance."""
    return f"instances/{uid}"


def migration_consumer(migration_id: str) -> str:
    """The consumer that stands for a move."""
    return f"migrations/{migration_id}"


def find(tx: Connection, consumer: str) -> Claim | None:
    """The claim of a consumer, or None."""
    row = tx.execute(sa.select(*claims.c).where(claims.c.consumer == consumer)).one_or_none()
    if row is None:
        return None
    size = Size(vcpus=row.vcpus, memory_mib=row.memory_mib, disk_bytes=row.disk_bytes)
    return Claim(consumer=consumer, host=row.host, size=size)


def put(tx: Connection, consumer: str, host: str, size: Size) -> None:
    """Make the consumer hold exactly this, whether or not there is room."""
    values = {
        "host": host,
        "vcpus": size.vcpus,
        "memory_mib": size.memory_mib,
        "disk_bytes": size.disk_bytes,
    }
    changed = tx.execute(
        sa.update(claims)
        .where(claims.c.consumer == consumer)
        .values(**values, generation=claims.c.generation + 1)
    )
    if changed.rowcount == 0:
        tx.execute(sa.insert(claims).values(consumer=consumer, **values))


def drop(tx: Connection, consumer: str) -> bool:
    """Give up the consumer's claim; False when it held none."""
    changed = tx.execute(sa.delete(claims).where(claims.c.consumer == consumer))
    return changed.rowcount == 1


def claimed(tx: Connection, host: str, *, but_not: str = "") -> Size:
    """What is claimed on a host, one consumer left out."""
    row = tx.execute(
        sa.select(
            sa.func.coalesce(sa.func.sum(claims.c.vcpus), 0).label("vcpus"),
            sa.func.coalesce(sa.func.sum(claims.c.memory_mib), 0).label("memory_mib"),
            sa.func.coalesce(sa.func.sum(claims.c.disk_bytes), 0).label("disk_bytes"),
        ).where(claims.c.host == host, claims.c.consumer != but_not)
    ).one()
    return Size(
        vcpus=int(row.vcpus), memory_mib=int(row.memory_mib), disk_bytes=int(row.disk_bytes)
    )


def try_claim(tx: Connection, consumer: str, host: str, size: Size, limits: Size) -> bool:
    """Claim room on an enabled host if it has that much.

    The host's row is locked first, so that of two transactions that want the
    last room one waits for the other and then sees its claim. Whatever the
    consumer held before is replaced when the claim succeeds.

    Args:
        tx: Open transaction that writes.
        consumer: `instance_consumer(uid)` or `migration_consumer(id)`.
        host: Bare name of the host.
        size: What to claim.
        limits: What may be claimed there in total, from `capacity.limits_of`.

    Returns:
        False, with nothing changed, when the host is not enabled or has no room.
    """
    if hosts.lock(tx, host) is not HostState.ENABLED:
        return False
    if not _within(claimed(tx, host, but_not=consumer), size, limits):
        return False
    put(tx, consumer, host, size)
    return True


def _within(used: Size, wanted: Size, limits: Size) -> bool:
    return (
        used.vcpus + wanted.vcpus <= limits.vcpus
        and used.memory_mib + wanted.memory_mib <= limits.memory_mib
        and used.disk_bytes + wanted.disk_bytes <= limits.disk_bytes
    )
