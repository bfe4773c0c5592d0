"""How mutating calls run: fenced, one at a time for each machine, and to the end.

    RPC -> lock of the machine -> fence checked and stored -> work -> answer

The fence is looked at once the lock is held, so a call that waited while a newer
owner acted is refused. Work goes on when the caller goes away: a thread in the
middle of a libvirt call cannot be recalled, and letting the next call in beside it
would have two of them change one machine.
"""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.fence import FenceStore, check_fence
from hostd.v1 import fence_pb2

log = structlog.stdlib.get_logger(__name__)

T = TypeVar("T")
_STEP_THREADS = 8
_READ_THREADS = 4


class Workers:
    """The thread pools for blocking work.

    Steps and reads have pools of their own: an inventory is answered while every
    step thread waits for a slow disk.
    """

    def __init__(self) -> None:
        self._steps = ThreadPoolExecutor(_STEP_THREADS, thread_name_prefix="step")
        self._reads = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="read")

    async def step(self, work: Callable[[], T]) -> T:
        """Run blocking work that changes something."""
        return await _in_pool(self._steps, work)

    async def read(self, work: Callable[[], T]) -> T:
        """Run blocking work that only looks."""
        return await _in_pool(self._reads, work)

    def close(self) -> None:
        """Let threads end; work that has not begun is dropped."""
        self._steps.shutdown(wait=False, cancel_futures=True)
        self._reads.shutdown(wait=False, cancel_futures=True)


async def _in_pool(pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(pool, lambda: context.run(work))


class StepRunner:
    """Runs mutating calls.

    Args:
        fences: Decides who may act.
        workers: Where blocking work runs.
    """

    def __init__(self, fences: FenceStore, workers: Workers) -> None:
        self._fences = fences
        self._workers = workers
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._running: set[asyncio.Task[object]] = set()
        self._closing = False

    async def run(self, fence: fence_pb2.Fence, work: Callable[[], Awaitable[T]]) -> T:
        """Run one call's work on the event loop.

        Raises:
            DroverError: INVALID_FIELD, STALE_GENERATION, SHUTTING_DOWN, or what the
                work raises.
        """
        check_fence(fence)
        lock = self._locks.setdefault(fence.domain_uuid, asyncio.Lock())
        await lock.acquire()
        # No await between here and the task, which releases the lock.
        task = asyncio.create_task(self._locked(lock, fence, work))
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    async def run_blocking(self, fence: fence_pb2.Fence, work: Callable[[], T]) -> T:
        """Run one call's work in a step thread; raises as `run` does."""
        return await self.run(fence, lambda: self._workers.step(work))

    async def _locked(
        self, lock: asyncio.Lock, fence: fence_pb2.Fence, work: Callable[[], Awaitable[T]]
    ) -> T:
        try:
            with structlog.contextvars.bound_contextvars(
                migration=fence.migration_id,
                domain=fence.domain_uuid,
                saga_seq=fence.saga_seq,
                generation=fence.generation,
                step=fence.step,
            ):
                if self._closing:
                    raise DroverError(Reason.SHUTTING_DOWN, "This hostd is stopping.")
                await self._workers.step(lambda: self._fences.admit(fence))
                return await work()
        finally:
            lock.release()

    def _ended(self, task: asyncio.Task[object]) -> None:
        self._running.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # Told to the caller as well, unless it has gone away.
            log.debug("step ended badly", error=str(task.exception()))

    async def drain(self) -> None:
        """Refuse further work and wait until what runs has ended."""
        self._closing = True
        while self._running:
            await asyncio.wait(set(self._running))
