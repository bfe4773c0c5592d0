"""Answers kept for repeated calls with the same request id."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from controlplane.store.tables import request_ids


@dataclass(frozen=True)
class Answered:
    """A call that was answered before.

    Attributes:
        body_sha256: Hash of its request.
        response: Its serialised answer.
    """

    body_sha256: str
    response: bytes


def find(
    tx: Connection, principal: str, method: str, request_id: str, now: datetime
) -> Answered | None:
    """The answer kept for a call, or None when there is none or it has expired."""
    query = sa.select(request_ids.c.body_sha256, request_ids.c.response).where(
        request_ids.c.principal == principal,
        request_ids.c.method == method,
        request_ids.c.request_id == request_id,
        request_ids.c.expire_time > now,
    )
    row = tx.execute(query).one_or_none()
    return None if row is None else Answered(row.body_sha256, bytes(row.response))


def keep(
    tx: Connection,
    principal: str,
    method: str,
    request_id: str,
    *,
    answered: Answered,
    now: datetime,
    expire_time: datetime,
) -> bool:
    """Keep an answer, in the transaction whose effect it tells of.

    Returns:
        False when another transaction has kept one for the same call: then this
        transaction has to be rolled back and the other's answer given.
    """
    # Whoever adds an answer sweeps away its own expired ones, this call's among them.
    tx.execute(
        sa.delete(request_ids).where(
            request_ids.c.principal == principal,
            request_ids.c.method == method,
            request_ids.c.expire_time <= now,
        )
    )
    try:
        with tx.begin_nested():
            tx.execute(
                sa.insert(request_ids).values(
                    principal=principal,
                    method=method,
                    request_id=request_id,
                    body_sha256=answered.body_sha256,
                    response=answered.response,
                    expire_time=expire_time,
                )
            )
    except IntegrityError:
        return False
    return True
