"""The fence: a hostd obeys the newest owner of a machine, and nobody older.

A token is the pair (saga_seq, generation): sagas of a machine are ordered by
their sequence number, claims of one saga by its generation. The highest pair
seen for a machine is on disk before the call that brought it has any effect, so
that a replica which was paused past its lease changes nothing any more, not even
after a restart of this host.
"""

from __future__ import annotations

import uuid

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.state import StateFile, now
from hostd.v1 import fence_pb2

_LARGEST = 2**63 - 1


class FenceStore:
    """Highest token by machine.

    Args:
        state: Where tokens are kept.
    """

    def __init__(self, state: StateFile) -> None:
        self._state = state

    def admit(self, fence: fence_pb2.Fence) -> None:
        """Let a call through, or refuse it; durable when it returns.

        Raises:
            DroverError: INVALID_FIELD when the fence is incomplete,
                STALE_GENERATION when a newer owner has been seen.
        """
        check_fence(fence)
        token = (fence.saga_seq, fence.generation)
        with self._state.transaction() as tx:
            row = tx.execute(
                "SELECT saga_seq, generation FROM fence WHERE domain_uuid=?", (fence.domain_uuid,)
            ).fetchone()
            highest = (0, 0) if row is None else (row["saga_seq"], row["generation"])
            if token < highest:
                raise _stale(fence, highest)
            if token == highest:
                return
            tx.execute(
                "INSERT INTO fence VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (domain_uuid) DO UPDATE"
                " SET saga_seq=excluded.saga_seq, generation=excluded.generation,"
                " migration_id=excluded.migration_id, saga_id=excluded.saga_id,"
                " update_time=excluded.update_time",
                (fence.domain_uuid, *token, fence.migration_id, fence.saga_id, now()),
            )

    def highest(self, domain_uuid: str) -> tuple[int, int]:
        """The highest token seen for a machine; (0, 0) when none was."""
        with self._state.transaction() as tx:
            row = tx.execute(
                "SELECT saga_seq, generation FROM fence WHERE domain_uuid=?", (domain_uuid,)
            ).fetchone()
        return (0, 0) if row is None else (row["saga_seq"], row["generation"])


def check_fence(fence: fence_pb2.Fence) -> None:
    """Refuse a fence that names nothing.

    Raises:
        DroverError: INVALID_FIELD.
    """
    for field in ("domain_uuid", "migration_id", "saga_id"):
        check_uuid(f"fence.{field}", getattr(fence, field))
    for field in ("saga_seq", "generation"):
        value = getattr(fence, field)
        if not 1 <= value <= _LARGEST:
            raise DroverError(
                Reason.INVALID_FIELD, f"fence.{field} is {value}.", subject=f"fence.{field}"
            )
    if not fence.step:
        raise DroverError(Reason.INVALID_FIELD, "fence.step is empty.", subject="fence.step")


def check_uuid(field: str, text: str) -> None:
    """Refuse anything but a UUID in canonical lower-case form.

    These values become parts of paths, so nothing else may pass.

    Raises:
        DroverError: INVALID_FIELD.
    """
    try:
        canonical = str(uuid.UUID(text))
    except ValueError:
        canonical = ""
    if text != canonical or not text:
        raise DroverError(
            Reason.INVALID_FIELD,
            f"{field} is {text[:64]!r}, not a UUID in lower-case form.",
            subject=field,
        )


def _stale(fence: fence_pb2.Fence, highest: tuple[int, int]) -> DroverError:
    return DroverError(
        Reason.STALE_GENERATION,
        f"{fence.step} of saga {fence.saga_seq} generation {fence.generation} came too late for"
        f" domain {fence.domain_uuid}: saga {highest[0]} generation {highest[1]} owns it.",
        subject=f"domains/{fence.domain_uuid}",
        metadata={
            "saga_seq": str(fence.saga_seq),
            "generation": str(fence.generation),
            "owner_saga_seq": str(highest[0]),
            "owner_generation": str(highest[1]),
        },
    )
