"""Asking every host for its report, again and again.

One task per host, so that a slow or dead host delays nobody: each waits for its
own answer, writes it down, and sleeps. A host is alive as long as its last
answer is younger than the liveness window; nobody has to be told that it died.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeVar

import structlog
from sqlalchemy import Connection

from controlplane.common.errors import DroverError, Transient
from controlplane.domain.states import HostState
from controlplane.fleet.clients import HostClients
from controlplane.fleet.reports import apply_report
from controlplane.store import hosts
from controlplane.store.types import utc_now
from hostd.v1 import host_pb2, host_service_pb2

log = structlog.stdlib.get_logger(__name__)
T = TypeVar("T")


class Runner(Protocol):
    """Runs a function in a database transaction; `store.engine.Database` does."""

    async def run(self, work: Callable[[Connection], T], /) -> T:
        """Run and commit, or roll back when it raises."""
        ...


@dataclass(frozen=True)
class InventorySettings:
    """How often, and how long until a host counts as dead.

    Attributes:
        interval_seconds: Pause between two questions to the same host.
        dead_after_seconds: Liveness window, and how long a machine may be absent
            from its host's reports before it is MISSING.
        timeout_seconds: Deadline of one question.
    """

    interval_seconds: float = 5.0
    dead_after_seconds: float = 20.0
    timeout_seconds: float = 10.0


class InventoryPoller:
    """Keeps the store up to date with what hosts report.

    Args:
        database: Where reports go.
        clients: Calls to hosts.
        settings: How often.
        clock: The present; a parameter for tests.
    """

    def __init__(
        self,
        database: Runner,
        clients: HostClients,
        settings: InventorySettings,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._database = database
        self._clients = clients
        self._settings = settings
        self._clock = clock
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Look for new hosts now, as after one has joined."""
        self._wake.set()

    async def run(self) -> None:
        """Poll until cancelled."""
        try:
            while True:
                await self._follow_hosts()
                self._wake.clear()
                try:
                    async with asyncio.timeout(self._settings.interval_seconds):
                        await self._wake.wait()
                except TimeoutError:
                    continue
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def poll(self, name: str) -> bool:
        """Ask one host once and write down what came of it.

        Returns:
            True when it answered.
        """
        asked = self._clock()
        try:
            inventory = await self._clients.call(
                name,
                lambda h: h.GetInventory,
                host_service_pb2.GetInventoryRequest(),
                timeout_seconds=self._settings.timeout_seconds,
            )
        except Transient as unknown:
            await self._record_failure(name, unknown.error)
            return False
        except DroverError as refusal:
            await self._record_failure(name, refusal)
            return False
        await self._database.run(lambda tx: self._apply(tx, name, inventory, asked))
        return True

    def _apply(
        self, tx: Connection, name: str, inventory: host_pb2.Inventory, asked: datetime
    ) -> None:
        apply_report(
            tx,
            name,
            inventory,
            asked=asked,
            now=self._clock(),
            missing_after_seconds=self._settings.dead_after_seconds,
        )

    async def _record_failure(self, name: str, error: DroverError) -> None:
        def record(tx: Connection) -> bool:
            found = hosts.find(tx, name)
            if found is None or found.last_error == error.message:
                return False
            hosts.record_failure(tx, name, error.message)
            return True

        if await self._database.run(record):
            log.warning("no report", host=name, reason=error.reason.name, error=error.message)

    async def _follow_hosts(self) -> None:
        try:
            found = await self._database.run(hosts.list_all)
        except Exception:
            log.exception("hosts could not be listed")
            return
        wanted = {
            host.name
            for host in found
            if host.address and host.state in (HostState.ENABLED, HostState.DISABLED)
        }
        for name in self._tasks.keys() - wanted:
            self._tasks.pop(name).cancel()
        for name in wanted:
            task = self._tasks.get(name)
            if task is None or task.done():
                self._tasks[name] = asyncio.create_task(self._poll_for_ever(name))

    async def _poll_for_ever(self, name: str) -> None:
        while True:
            try:
                await self.poll(name)
            except Exception:
                # An edge: a report that cannot be stored must not end the polling.
                log.exception("report could not be stored", host=name)
            await asyncio.sleep(self._settings.interval_seconds)
