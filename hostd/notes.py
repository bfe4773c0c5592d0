"""diskmover's notes, in the log: copies that go on, but not as they do best."""

from __future__ import annotations

import asyncio

import structlog

from diskmover import take_notes

log = structlog.stdlib.get_logger(__name__)

_LOOK_SECONDS = 2.0


class Notes:
    """Logs notes until it is closed."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for notes."""
        self._task = asyncio.create_task(self._log())

    async def close(self) -> None:
        """Log what is left, and end."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        tell()

    async def _log(self) -> None:
        while True:
            tell()
            await asyncio.sleep(_LOOK_SECONDS)


def tell() -> None:
    """Log the notes that nobody has logged yet."""
    for note in take_notes():
        log.warning("diskmover falls back", what=note)
