"""Fault injection: named points at which a test may stop, pause or kill the process.

A component of the product that is absent by default: a runner that is given
nothing awaits `no_crash`, which does nothing.
"""

from __future__ import annotations

from typing import Protocol


class CrashPoints(Protocol):
    """Called at each point with (point, saga id, step, event kind).

    Points: "before-append", "after-append", "before-effect", "after-effect".
    """

    async def __call__(self, point: str, saga_id: str, step: str, kind: str, /) -> None:
        """Return to go on; raise or exit to not."""
        ...


async def no_crash(point: str, saga_id: str, step: str, kind: str) -> None:
    """Go on."""
