"""Confirming moves whose window has passed.

Every replica looks; that a move is confirmed once is the work of the transaction
that starts the confirm saga, not of this loop. A lock on the instance keeps its
source copy until it is unlocked. A confirm that is refused, as while a host does
not answer, is tried again after a pause, never in a tight loop; one that began
and failed takes the deadline away, because somebody has to look.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta

import structlog
from sqlalchemy import Connection

from controlplane.common.errors import DroverError
from controlplane.domain.model import Migration
from controlplane.domain.states import MigrationState
from controlplane.fleet.inventory import Runner
from controlplane.store import instances, migrations
from controlplane.store.types import utc_now

log = structlog.stdlib.get_logger(__name__)

RETRY_AFTER = timedelta(seconds=60)
Begin = Callable[[Connection, Migration], object]


class AutoConfirmer:
    """Starts the confirm of moves whose deadline has passed.

    Args:
        database: Where moves are.
        begin: Checks and starts the confirm saga in the given transaction;
            raises DroverError when the move cannot be confirmed now.
        interval_seconds: Pause between two looks.
        clock: The present; a parameter for tests.
    """

    def __init__(
        self,
        database: Runner,
        begin: Begin,
        interval_seconds: float = 1.0,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._database = database
        self._begin = begin
        self._interval_seconds = interval_seconds
        self._clock = clock

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                await self.confirm_due()
            except Exception:
                # An edge: trouble with the database now must not end the looking.
                log.exception("moves due for confirm could not be handled")
            await asyncio.sleep(self._interval_seconds)

    async def confirm_due(self) -> int:
        """Start the confirm of every move that is due; returns how many were started."""
        due = await self._database.run(lambda tx: migrations.due_for_confirm(tx, self._clock()))
        started = 0
        for migration in due:
            started += await self._confirm(migration.id)
        return started

    async def _confirm(self, migration_id: str) -> bool:
        def start(tx: Connection) -> bool:
            migration = self._still_due(tx, migration_id)
            if migration is None or instances.get(tx, migration.instance_uid).lock_reason:
                return False
            self._begin(tx, self._postpone(tx, migration))
            return True

        def postpone(tx: Connection) -> None:
            migration = self._still_due(tx, migration_id)
            if migration is not None:
                self._postpone(tx, migration)

        try:
            return await self._database.run(start)
        except DroverError as refusal:
            log.warning("not confirmed", migration=migration_id, reason=refusal.reason.name)
        await self._database.run(postpone)
        return False

    def _still_due(self, tx: Connection, migration_id: str) -> Migration | None:
        migration = migrations.get(tx, migration_id)
        deadline = migration.confirm_deadline
        if migration.state is not MigrationState.AWAITING_CONFIRM or deadline is None:
            return None
        return migration if deadline <= self._clock() else None

    def _postpone(self, tx: Connection, migration: Migration) -> Migration:
        # The deadline moves on with each attempt: it paces the next one should
        # this one be refused.
        return migrations.update(
            tx,
            migration.id,
            expected_generation=migration.generation,
            confirm_deadline=self._clock() + RETRY_AFTER,
        )
