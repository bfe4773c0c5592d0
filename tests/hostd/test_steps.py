"""One call at a time for each machine, to its end, and none once hostd stops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.fence import FenceStore
from hostd.state import StateFile
from hostd.steps import StepRunner, Workers
from tests.hostd.test_fence import fence


@pytest.fixture
async def runner(tmp_path: Path) -> AsyncIterator[StepRunner]:
    state, workers = StateFile(tmp_path), Workers()
    yield StepRunner(FenceStore(state), workers)
    workers.close()
    state.close()


async def test_a_caller_that_goes_away_does_not_stop_the_work(runner: StepRunner) -> None:
    begun, may_end, done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert may_end.wait(30)
        done.set()

    caller = asyncio.create_task(runner.run_blocking(fence(1, 1), work))
    assert await asyncio.to_thread(begun.wait, 30)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    # The next call waits for it rather than change the machine beside it.
    following = asyncio.create_task(runner.run_blocking(fence(1, 1), done.is_set))
    may_end.set()
    assert await following


async def test_a_hostd_that_stops_ends_what_runs_and_begins_nothing(runner: StepRunner) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def work() -> str:
        begun.set()
        assert may_end.wait(30)
        return "ended"

    running = asyncio.create_task(runner.run_blocking(fence(1, 1), work))
    assert await asyncio.to_thread(begun.wait, 30)
    waiting = asyncio.create_task(runner.run_blocking(fence(1, 2), begun.clear))
    draining = asyncio.create_task(runner.drain())
    await asyncio.sleep(0)
    may_end.set()
    assert await running == "ended"
    with pytest.raises(DroverError) as refused:
        await waiting
    assert refused.value.reason is Reason.SHUTTING_DOWN
    assert begun.is_set()
    await draining
