"""The audit log: every request that could change something, and what came of it."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy import Connection

from controlplane.domain.model import AuditEntry
from controlplane.store.tables import audit


def add(
    tx: Connection,
    *,
    time: datetime,
    principal: str,
    peer: str,
    method: str,
    resource: str,
    outcome: str,
    reason: str = "",
    request_id: str = "",
) -> None:
    """Add an entry.

    Args:
        tx: Open transaction.
        time: When the call was answered.
        principal: Identity in the caller's certificate; empty when there was none.
        peer: Address that the call came from.
        method: Full method name.
        resource: Resource that the call was about.
        outcome: gRPC status code name.
        reason: Reason symbol of a refusal.
        request_id: The caller's request id; cut to the length of a UUID.
    """
    tx.execute(
        sa.insert(audit).values(
            time=time,
            principal=principal[:300],
            peer=peer,
            method=method[:120],
            resource=resource,
            outcome=outcome,
            reason=reason,
            request_id=request_id[:36],
        )
    )


def list_page(tx: Connection, *, before: int | None, limit: int) -> list[AuditEntry]:
    """Up to `limit` entries, newest first, older than a position."""
    query = sa.select(*audit.c).order_by(audit.c.seq.desc()).limit(limit)
    if before is not None:
        query = query.where(audit.c.seq < before)
    return [AuditEntry(**row._mapping) for row in tx.execute(query)]
