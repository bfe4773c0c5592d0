"""Run by Alembic. The connection comes from `controlplane.store.upgrade`."""

from __future__ import annotations

from typing import Any, Literal

import sqlalchemy as sa
from alembic import context

import controlplane.store.saga_tables
import controlplane.store.tables  # noqa: F401  # both modules fill the metadata
from controlplane.store.metadata import metadata


def _render_plainly(kind: str, item: Any, _autogen: Any) -> str | Literal[False]:
    """Write columns with the database's types: a version must not change with our code."""
    if kind == "type" and isinstance(item, sa.types.TypeDecorator):
        return f"sa.{item.impl!r}"
    return False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    compare_type=True,
    render_item=_render_plainly,
)
with context.begin_transaction():
    context.run_migrations()
