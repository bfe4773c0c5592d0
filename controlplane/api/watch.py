"""Following a move: its present state first, then every change, until it rests.

The row in the database is the truth, also when another replica changes it; it
is looked at every half second. A notice inside this process only shortens the
wait. Nothing is registered while a message is on its way to the client, so one
that goes away in mid-stream leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from controlplane.domain.model import Migration
from controlplane.domain.states import FINAL_STATES, RESTING_STATES
from controlplane.fleet.inventory import Runner
from controlplane.store import migrations

POLL_SECONDS = 0.5


class Notifier:
    """Wakes those who wait for a change of a move in this process."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = {}

    @property
    def waiting(self) -> int:
        """How many wait now."""
        return sum(len(events) for events in self._waiting.values())

    def changed(self, migration_id: str) -> None:
        """Say that a move has changed; called on the event loop."""
        for event in self._waiting.get(migration_id, ()):
            event.set()

    async def wait(self, migration_id: str, timeout_seconds: float) -> None:
        """Return when the move has changed or the time is over."""
        event = asyncio.Event()
        self._waiting.setdefault(migration_id, set()).add(event)
        try:
            async with asyncio.timeout(timeout_seconds):
                await event.wait()
        except TimeoutError:
            pass
        finally:
            events = self._waiting[migration_id]
            events.discard(event)
            if not events:
                del self._waiting[migration_id]


async def follow(
    database: Runner, notifier: Notifier, migration_id: str, *, until_final: bool
) -> AsyncIterator[Migration]:
    """A move as it is, then as it becomes.

    Args:
        database: Where the move is.
        notifier: Shortens the wait.
        migration_id: The move.
        until_final: True to go on until the move has ended for good.

    Raises:
        DroverError: MIGRATION_NOT_FOUND.
    """
    ends = FINAL_STATES if until_final else RESTING_STATES
    shown = await database.run(lambda tx: migrations.get(tx, migration_id))
    while True:
        yield shown
        if shown.state in ends:
            return
        generation = shown.generation
        while generation == shown.generation:
            await notifier.wait(migration_id, POLL_SECONDS)
            found = await database.run(lambda tx: migrations.generation_of(tx, migration_id))
            if found is None:
                return
            generation = found
        shown = await database.run(lambda tx: migrations.get(tx, migration_id))
