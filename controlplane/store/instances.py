"""Instances: one row per libvirt UUID that Drover looks after or has released."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypedDict, Unpack

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.domain.model import Instance
from controlplane.domain.names import canonical_uuid, instance_name
from controlplane.domain.states import PowerState, TaskState, VmState
from controlplane.store.rows import created_now, fields, not_found, update_versioned
from controlplane.store.tables import instances
from hostd.v1 import domain_pb2

_CHUNK = 500


class InstanceChanges(TypedDict, total=False):
    """Columns that `update` can set."""

    name: str
    host: str
    vm_state: VmState
    task_state: TaskState | None
    power_state: PowerState | None
    project: str
    vcpus: int
    memory_mib: int
    disk_size_bytes: int
    flavor: str
    migration_id: str
    lock_reason: str
    locked_by: str
    conflict: str
    description: domain_pb2.Domain
    released: bool


def create(
    tx: Connection,
    *,
    host: str,
    domain: domain_pb2.Domain,
    vm_state: VmState,
    project: str,
    conflict: str = "",
) -> Instance:
    """Take a domain under care; its claim is made with `claims.put`."""
    row = tx.execute(
        sa.insert(instances)
        .values(
            uid=domain.uuid,
            host=host,
            vm_state=vm_state,
            project=project,
            conflict=conflict,
            released=False,
            **described(domain),
            **created_now(),
        )
        .returning(*instances.c)
    ).one()
    return _instance(row)


def described(domain: domain_pb2.Domain) -> InstanceChanges:
    """The columns that a description decides."""
    return {
        "name": domain.name,
        "power_state": PowerState.from_number(domain.power_state),
        "vcpus": domain.vcpus,
        "memory_mib": domain.memory_mib,
        "disk_size_bytes": domain.disk_size_bytes,
        "description": domain,
    }


def find(tx: Connection, uid: str) -> Instance | None:
    """The instance with that uid, released or not, or None."""
    row = tx.execute(sa.select(*instances.c).where(instances.c.uid == uid)).one_or_none()
    return None if row is None else _instance(row)


def get(tx: Connection, uid: str) -> Instance:
    """The instance with that uid, released or not.

    Raises:
        DroverError: INSTANCE_NOT_FOUND.
    """
    instance = find(tx, uid)
    if instance is None:
        raise not_found(Reason.INSTANCE_NOT_FOUND, instance_name(uid))
    return instance


def resolve(tx: Connection, key: str) -> Instance:
    """The instance that a uid, or a display name borne by one only, stands for.

    Raises:
        DroverError: INSTANCE_NOT_FOUND, AMBIGUOUS_NAME, or DOMAIN_RELEASED when
            only a released one fits.
    """
    column = instances.c.uid if canonical_uuid(key) else instances.c.name
    rows = tx.execute(sa.select(*instances.c).where(column == key).order_by(instances.c.uid))
    found = [_instance(row) for row in rows]
    live = [instance for instance in found if not instance.released]
    if len(live) == 1:
        return live[0]
    name = instance_name(key)
    if live:
        bearers = ", ".join(f"{instance.uid} on hosts/{instance.host}" for instance in live)
        raise DroverError(
            Reason.AMBIGUOUS_NAME,
            f"{len(live)} instances are called {key!r}: {bearers}.",
            subject=name,
            metadata={"name": key, "uids": ",".join(instance.uid for instance in live)},
        )
    if found:
        raise DroverError(
            Reason.DOMAIN_RELEASED,
            f"{instance_name(found[0].uid)} ({found[0].name}) was released from Drover's care.",
            subject=instance_name(found[0].uid),
        )
    raise not_found(Reason.INSTANCE_NOT_FOUND, name)


def of_uids(tx: Connection, uids: Iterable[str]) -> dict[str, Instance]:
    """The instances among some uids, released ones included."""
    wanted = sorted(uids)
    found: dict[str, Instance] = {}
    for start in range(0, len(wanted), _CHUNK):
        chunk = wanted[start : start + _CHUNK]
        for row in tx.execute(sa.select(*instances.c).where(instances.c.uid.in_(chunk))):
            found[row.uid] = _instance(row)
    return found


def uids_on(tx: Connection, host: str) -> set[str]:
    """The uids of the instances that a host owns, released ones included."""
    return set(tx.execute(sa.select(instances.c.uid).where(instances.c.host == host)).scalars())


def list_page(
    tx: Connection, *, host: str = "", after: tuple[str, str] = ("", ""), limit: int
) -> list[Instance]:
    """Up to `limit` instances in order of (display name, uid), released ones left out."""
    name, uid = after
    query = sa.select(*instances.c).where(
        instances.c.released == sa.false(),
        sa.or_(instances.c.name > name, sa.and_(instances.c.name == name, instances.c.uid > uid)),
    )
    if host:
        query = query.where(instances.c.host == host)
    query = query.order_by(instances.c.name, instances.c.uid).limit(limit)
    return [_instance(row) for row in tx.execute(query)]


def update(
    tx: Connection,
    uid: str,
    *,
    expected_generation: int | None = None,
    **changes: Unpack[InstanceChanges],
) -> Instance:
    """Change an instance.

    Raises:
        DroverError: INSTANCE_NOT_FOUND, or ETAG_MISMATCH.
    """
    row = update_versioned(
        tx,
        instances,
        instances.c.uid == uid,
        changes,
        expected_generation=expected_generation,
        subject=instance_name(uid),
        missing=Reason.INSTANCE_NOT_FOUND,
    )
    return _instance(row)


def _instance(row: Row[Any]) -> Instance:
    return Instance(**fields(row))
