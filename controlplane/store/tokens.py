"""Join tokens: one-time secrets of which only the hash is kept."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy import Connection

from controlplane.store.tables import join_tokens


def put(tx: Connection, secret_sha256: str, host: str, expire_time: datetime) -> None:
    """Keep a token for a host; the host's earlier tokens stop working."""
    tx.execute(sa.delete(join_tokens).where(join_tokens.c.host == host))
    tx.execute(
        sa.insert(join_tokens).values(
            secret_sha256=secret_sha256, host=host, expire_time=expire_time
        )
    )


def use(tx: Connection, secret_sha256: str, host: str, now: datetime) -> bool:
    """Use a token up.

    One conditional UPDATE: of two calls with the same token one wins.

    Returns:
        False when it is unknown, another host's, used before or expired.
    """
    used = tx.execute(
        sa.update(join_tokens)
        .where(
            join_tokens.c.secret_sha256 == secret_sha256,
            join_tokens.c.host == host,
            join_tokens.c.used_time.is_(None),
            join_tokens.c.expire_time > now,
        )
        .values(used_time=now)
    )
    return used.rowcount == 1


def drop(tx: Connection, host: str) -> None:
    """Make every token of a host stop working."""
    tx.execute(sa.delete(join_tokens).where(join_tokens.c.host == host))
