"""What the query modules share: versioned updates and keyset pages."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.store.types import utc_now


def update_versioned(
    tx: Connection,
    table: sa.Table,
    key: sa.ColumnElement[bool],
    values: Mapping[str, Any],
    *,
    expected_generation: int | None,
    subject: str,
    missing: Reason,
) -> Row[Any]:
    """Change one row, raise its generation and return it as it is now.

    Args:
        tx: Open transaction.
        table: A table with `generation` and `update_time`.
        key: Picks the row.
        values: Columns to set.
        expected_generation: Refuse when the row has another one; None to not check.
        subject: Resource name for errors.
        missing: Reason when there is no such row.

    Raises:
        DroverError: `missing`, or ETAG_MISMATCH when the row changed since.
    """
    condition = key
    if expected_generation is not None:
        condition = sa.and_(key, table.c.generation == expected_generation)
    changed = tx.execute(
        sa.update(table)
        .where(condition)
        .values(**values, generation=table.c.generation + 1, update_time=utc_now())
        .returning(*table.c)
    ).one_or_none()
    if changed is not None:
        return changed
    found = tx.execute(sa.select(table.c.generation).where(key)).scalar_one_or_none()
    if found is None:
        raise not_found(missing, subject)
    raise DroverError(
        Reason.ETAG_MISMATCH,
        f"{subject} changed while it was being looked at.",
        subject=subject,
        metadata={"expected": str(expected_generation), "found": str(found)},
    )


def not_found(reason: Reason, subject: str) -> DroverError:
    """The error for a resource that does not exist."""
    return DroverError(reason, f"There is no {subject}.", subject=subject)


def created_now(now: datetime | None = None) -> dict[str, Any]:
    """The columns of a new versioned row."""
    moment = now or utc_now()
    return {"generation": 1, "create_time": moment, "update_time": moment}


def fields(row: Row[Any], *without: str) -> dict[str, Any]:
    """A row as keyword arguments of its dataclass."""
    return {name: value for name, value in row._mapping.items() if name not in without}
