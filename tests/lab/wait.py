"""Waiting for a condition, with a bound."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(
    condition: Callable[[], T | None],
    what: str,
    *,
    timeout_seconds: float = 90.0,
    interval_seconds: float = 0.05,
    explain: Callable[[], str] = lambda: "",
) -> T:
    """Ask until the answer is true, and return it.

    Raises:
        TimeoutError: It did not become true in time; with `explain()`.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_seconds} s. {explain()}".rstrip())
        time.sleep(interval_seconds)
