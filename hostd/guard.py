"""Guards: guests that go off late because of a move that was given up.

A guest that was asked to shut down may do so long after the move was given up, and
its owner would find it off for no reason they know. For `GUARD_SECONDS` after
RestorePower a guest that goes off by itself is therefore started again, once. One
that somebody powers off stays off. Guards outlive a restart of hostd.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import structlog

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.power import SHUTOFF, Power
from hostd.records import Records, StopRecord, StopState
from hostd.state import now
from hostd.steps import Workers

log = structlog.stdlib.get_logger(__name__)

GUARD_SECONDS = 120.0
_POLL_SECONDS = 0.5


class Guards:
    """The guards of this host, one a machine. Lives on the event loop.

    Args:
        records: Where they are kept.
        power: The hypervisor.
        workers: Where blocking work runs.
    """

    def __init__(self, records: Records, power: Power, workers: Workers) -> None:
        self._records = records
        self._power = power
        self._workers = workers
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ending: set[str] = set()

    async def set(self, record: StopRecord) -> None:
        """Guard the machine of a stop from now on; durable when it returns."""
        guarded = replace(
            record, state=StopState.GUARDED, error=None, deadline=now() + GUARD_SECONDS
        )
        await self.end(record.domain_uuid)
        await self._workers.step(lambda: self._records.put_stop(guarded))
        self.resume(guarded)

    def resume(self, record: StopRecord) -> None:
        """Go on with a guard that is on disk."""
        uuid = record.domain_uuid
        task = asyncio.create_task(self._watch(record))
        self._tasks[uuid] = task
        task.add_done_callback(lambda ended: self._ended(uuid, ended))

    async def end(self, domain_uuid: str) -> bool:
        """End a machine's guard between two of its looks; True when there was one."""
        task = self._tasks.get(domain_uuid)
        if task is None:
            return False
        self._ending.add(domain_uuid)
        await asyncio.wait({task})
        self._ending.discard(domain_uuid)
        return True

    async def close(self) -> None:
        """Let go; the next hostd goes on."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _ended(self, domain_uuid: str, ended: asyncio.Task[None]) -> None:
        if self._tasks.get(domain_uuid) is ended:
            del self._tasks[domain_uuid]

    async def _watch(self, record: StopRecord) -> None:
        uuid = record.domain_uuid
        with structlog.contextvars.bound_contextvars(
            migration=record.migration_id, domain=uuid, step="guard"
        ):
            while now() < record.deadline and uuid not in self._ending:
                await asyncio.sleep(_POLL_SECONDS)
                try:
                    if await self._workers.step(lambda: self._start_again(uuid)):
                        break
                except DroverError as error:
                    if error.reason is Reason.DOMAIN_NOT_FOUND:
                        break
                    log.warning("the guard could not look after the guest", error=str(error))
            await self._workers.step(lambda: self._records.drop_stop(record.migration_id))

    def _start_again(self, domain_uuid: str) -> bool:
        if self._power.state(domain_uuid) != SHUTOFF:
            return False
        if self._power.went_off_by_itself(domain_uuid):
            log.warning("the guest followed a shutdown request of a move that was given up")
            self._power.start(domain_uuid)
        return True
