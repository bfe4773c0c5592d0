"""Following a move: its present state first, then every change, until it rests.

The row in the database is the truth, also when another replica changes it; it
is looked at every half second. A notice inside this process, as from its runner
after each event, only shortens the wait. Changes that follow each other faster
than the row is read come as one; the history has them all.

Nothing is registered while a message is on its way to the client, so one that
goes away in mid-stream leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress

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

    @contextmanager
    def listening(self, migration_id: str) -> Iterator[asyncio.Event]:
        """An event that is set when the move changes within the block."""
        event = asyncio.Event()
        self._waiting.setdefault(migration_id, set()).add(event)
        try:
            yield event
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
    while True:
        shown = await database.run(lambda tx: migrations.get(tx, migration_id))
        yield shown
        if shown.state in ends:
            return
        await _change(database, notifier, shown)


async def _change(database: Runner, notifier: Notifier, shown: Migration) -> None:
    """Return once the move is no longer as it was shown."""
    while True:
        # Listen first: what changes after the look must not be slept through.
        with notifier.listening(shown.id) as woken:
            generation = await database.run(lambda tx: migrations.generation_of(tx, shown.id))
            if generation != shown.generation:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await woken.wait()
