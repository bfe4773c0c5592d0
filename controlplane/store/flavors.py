"""Flavors: the sizes that a resize can ask for."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row
from sqlalchemy.exc import IntegrityError

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.domain.model import Flavor, FlavorSize
from controlplane.domain.names import flavor_name
from controlplane.store.rows import created_now, fields, not_found
from controlplane.store.tables import flavors


def create(tx: Connection, size: FlavorSize) -> Flavor:
    """Add a flavor.

    Raises:
        DroverError: ALREADY_EXISTS.
    """
    name = flavor_name(size.name)
    values = {
        "name": size.name,
        "vcpus": size.vcpus,
        "memory_mib": size.memory_mib,
        "root_disk_bytes": size.root_disk_bytes,
        **created_now(),
    }
    try:
        with tx.begin_nested():
            row = tx.execute(sa.insert(flavors).values(values).returning(*flavors.c)).one()
    except IntegrityError:
        raise DroverError(Reason.ALREADY_EXISTS, f"{name} exists already.", subject=name) from None
    return _flavor(row)


def get(tx: Connection, name: str) -> Flavor:
    """The flavor of that bare name.

    Raises:
        DroverError: FLAVOR_NOT_FOUND.
    """
    row = tx.execute(sa.select(*flavors.c).where(flavors.c.name == name)).one_or_none()
    if row is None:
        raise not_found(Reason.FLAVOR_NOT_FOUND, flavor_name(name))
    return _flavor(row)


def list_page(tx: Connection, *, after: str, limit: int) -> list[Flavor]:
    """Up to `limit` flavors in name order whose names come after `after`."""
    query = sa.select(*flavors.c).where(flavors.c.name > after).order_by(flavors.c.name)
    return [_flavor(row) for row in tx.execute(query.limit(limit))]


def delete(tx: Connection, name: str, *, expected_generation: int | None = None) -> None:
    """Remove a flavor; moves that ask for it keep their own copy.

    Raises:
        DroverError: FLAVOR_NOT_FOUND, or ETAG_MISMATCH.
    """
    found = get(tx, name)
    condition = flavors.c.name == name
    if expected_generation is not None:
        condition = sa.and_(condition, flavors.c.generation == expected_generation)
    if tx.execute(sa.delete(flavors).where(condition)).rowcount == 0:
        raise DroverError(
            Reason.ETAG_MISMATCH,
            f"{flavor_name(name)} changed while it was being looked at.",
            subject=flavor_name(name),
            metadata={"expected": str(expected_generation), "found": str(found.generation)},
        )


def _flavor(row: Row[Any]) -> Flavor:
    return Flavor(**fields(row))
