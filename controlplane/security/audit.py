"""The audit log: one entry for each request that could change something.

Goes into `rpc.ErrorInterceptor(after=...)`, and so sees refusals by the checks as
well: who tried something without the role is in the log too. Requests with
validate_only change nothing and are left out.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

import grpc.aio
import structlog
from sqlalchemy import Connection

from controlplane.common import principal
from controlplane.common.errors import DroverError
from controlplane.security import roles
from controlplane.store import audit

log = structlog.stdlib.get_logger(__name__)

Write = Callable[[Callable[[Connection], None]], Awaitable[None]]

_RESOURCE_FIELDS = (
    ("name", ""),
    ("parent", ""),
    ("instance", ""),
    ("host_id", "hosts/"),
    ("uid", "instances/"),
)


class AuditLog:
    """Writes the entries.

    Args:
        write: Runs a function in a transaction of the store.
    """

    def __init__(self, write: Write) -> None:
        self._write = write

    async def record(
        self,
        method: str,
        context: grpc.aio.ServicerContext[Any, Any],
        request: Any,
        error: DroverError | None,
    ) -> None:
        """Add the entry of an answered call; never raises.

        Args:
            method: Full method name.
            context: The call.
            request: What was asked.
            error: Why it was refused; None when it was not.
        """
        if not roles.rule_of(method).mutates or getattr(request, "validate_only", False):
            return
        caller = principal.current_or_none()
        outcome = _outcome(error)

        def add(tx: Connection) -> None:
            audit.add(
                tx,
                time=datetime.now(UTC),
                principal=caller.uri if caller else "",
                peer=peer_address(context.peer()),
                method=method,
                resource=resource_of(request),
                outcome=outcome,
                reason=error.reason.name if error else "",
                request_id=getattr(request, "request_id", ""),
            )

        try:
            await self._write(add)
        except Exception:
            # The answer is out or on its way: the entry is lost to the store, not to the log.
            log.exception(
                "audit entry not stored",
                method=method,
                principal=caller.uri if caller else "",
                resource=resource_of(request),
                outcome=outcome,
            )


def _outcome(error: DroverError | None) -> str:
    if error is not None:
        return error.code.name
    # The interceptor calls from a `finally`: an exception on its way through is no answer.
    passing = sys.exception()
    if isinstance(passing, asyncio.CancelledError):
        return grpc.StatusCode.CANCELLED.name
    return grpc.StatusCode.OK.name if passing is None else grpc.StatusCode.UNKNOWN.name


def resource_of(request: Any) -> str:
    """The resource that a request is about; empty when it names none."""
    for field, prefix in _RESOURCE_FIELDS:
        value = getattr(request, field, "")
        if isinstance(value, str) and value:
            return f"{prefix}{value}"[:300]
    flavor = getattr(request, "flavor", None)
    name = getattr(flavor, "name", "")
    return name[:300] if isinstance(name, str) else ""


def peer_address(peer: str) -> str:
    """Turn gRPC's "ipv6:%5B::1%5D:55" into "[::1]:55"."""
    return unquote(peer).removeprefix("ipv4:").removeprefix("ipv6:")
