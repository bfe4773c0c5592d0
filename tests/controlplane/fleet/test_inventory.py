from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

import grpc.aio
import pytest
from sqlalchemy import Connection

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.domain.model import Host
from controlplane.domain.states import HostState, VmState
from controlplane.fleet.clients import HostClients
from controlplane.fleet.inventory import InventoryPoller, InventorySettings
from controlplane.fleet.reports import apply_report
from controlplane.store import hosts, instances, sightings
from controlplane.store.engine import Database
from controlplane.store.types import utc_now
from hostd.v1 import host_pb2
from tests.controlplane.machines import make_domain, make_facts
from tests.controlplane.simulated_host import SimulatedHost, served

UID = make_domain().uuid
T = TypeVar("T")


@dataclass
class Fleet:
    database: Database
    clients: HostClients
    stack: AsyncExitStack
    directory: Path
    simulated: dict[str, SimulatedHost] = field(default_factory=dict)

    async def run(self, work: Callable[[Connection], T]) -> T:
        return await self.database.run(work)

    async def add(self, name: str) -> SimulatedHost:
        host = SimulatedHost(name, self.directory / f"{name}.sock")  # type: ignore[abstract]
        await self.stack.enter_async_context(served(host))
        self.simulated[name] = host

        def join(tx: Connection) -> None:
            hosts.create(tx, name, adopt_domains=True)
            hosts.update(tx, name, state=HostState.ENABLED, address=host.address)

        await self.run(join)
        return host

    async def host(self, name: str) -> Host:
        return await self.run(lambda tx: hosts.get(tx, name))

    def poller(self, **settings: float) -> InventoryPoller:
        return InventoryPoller(self.database, self.clients, InventorySettings(**settings))


@pytest.fixture
async def fleet(database: Database, tmp_path: Path) -> AsyncIterator[Fleet]:
    async def lookup(name: str) -> Host:
        return await database.run(lambda tx: hosts.get(tx, name))

    clients = HostClients(lookup, lambda host: grpc.aio.insecure_channel(host.address))
    async with AsyncExitStack() as stack:
        yield Fleet(database, clients, stack, tmp_path)
        await clients.close()


async def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_report_is_kept_and_its_domains_adopted(fleet: Fleet) -> None:
    a = await fleet.add("a")
    a.put(make_domain())
    assert await fleet.poller().poll("a")
    host = await fleet.host("a")
    assert host.facts == a.facts
    assert host.is_alive(utc_now(), 20.0)
    instance = await fleet.run(lambda tx: instances.get(tx, UID))
    assert (instance.host, instance.vm_state) == ("a", VmState.ACTIVE)


async def test_a_failure_is_kept_beside_the_last_facts_and_goes_with_an_answer(
    fleet: Fleet,
) -> None:
    a = await fleet.add("a")
    poller = fleet.poller(timeout_seconds=5.0)
    await poller.poll("a")
    a.refusal = DroverError(Reason.LIBVIRT_UNAVAILABLE, "libvirtd is down.")
    assert not await poller.poll("a")
    failed = await fleet.host("a")
    assert failed.last_error == "libvirtd is down."
    assert failed.facts == a.facts
    a.refusal = None
    await poller.poll("a")
    assert (await fleet.host("a")).last_error == ""


async def test_a_slow_host_delays_nobody(fleet: Fleet) -> None:
    slow, quick = await fleet.add("slow"), await fleet.add("quick")
    slow.delay_seconds = 3600.0
    poller = fleet.poller(interval_seconds=0.05, timeout_seconds=3600.0)
    running = asyncio.create_task(poller.run())
    try:
        await until(lambda: len(quick.asked) >= 5)
        assert len(slow.asked) == 1
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_hosts_that_come_and_go_are_followed(fleet: Fleet) -> None:
    a = await fleet.add("a")
    poller = fleet.poller(interval_seconds=0.05)
    running = asyncio.create_task(poller.run())
    try:
        await until(lambda: a.asked)
        b = await fleet.add("b")
        poller.wake()
        await until(lambda: b.asked)
        await fleet.run(lambda tx: hosts.update(tx, "a", state=HostState.GONE))
        poller.wake()
        await until(lambda: "a" not in poller._tasks)
        asked = len(a.asked)
        await until(lambda: len(b.asked) >= 5)
        assert len(a.asked) <= asked + 1
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_report_that_cannot_be_stored_does_not_end_the_polling(fleet: Fleet) -> None:
    a = await fleet.add("a")
    broken = make_domain(vcpus=2**32 - 1)  # more than the column holds
    broken.volumes[0].size_bytes = 2**63
    a.put(broken)
    bad = make_domain("bad", disk_size_bytes=2**64 - 1)
    a.put(bad)
    poller = fleet.poller(interval_seconds=0.05)
    running = asyncio.create_task(poller.run())
    try:
        await until(lambda: len(a.asked) >= 3)
        a.domains.clear()
        a.put(make_domain("good"))
        uid = make_domain("good").uuid

        async def adopted() -> bool:
            return await fleet.run(lambda tx: instances.find(tx, uid)) is not None

        async with asyncio.timeout(60):
            while not await adopted():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_list_without_libvirt_proves_nothing(fleet: Fleet) -> None:
    a = await fleet.add("a")
    a.put(make_domain())
    await fleet.poller().poll("a")
    later = utc_now() + timedelta(hours=1)
    facts = make_facts("a", libvirt_connected=False)
    await fleet.run(
        lambda tx: apply_report(
            tx,
            "a",
            host_pb2.Inventory(facts=facts),
            asked=later,
            now=later,
            missing_after_seconds=20.0,
        )
    )
    instance = await fleet.run(lambda tx: instances.get(tx, UID))
    assert instance.vm_state is VmState.ACTIVE
    assert (await fleet.host("a")).facts == facts


async def test_a_machine_absent_for_longer_than_the_window_is_missing(fleet: Fleet) -> None:
    a = await fleet.add("a")
    a.put(make_domain())
    await fleet.poller().poll("a")
    empty = host_pb2.Inventory(facts=a.facts)

    async def report(seconds: float) -> VmState:
        now = utc_now() + timedelta(seconds=seconds)
        await fleet.run(
            lambda tx: apply_report(tx, "a", empty, asked=now, now=now, missing_after_seconds=20.0)
        )
        return (await fleet.run(lambda tx: instances.get(tx, UID))).vm_state

    assert await report(10) is VmState.ACTIVE
    assert await report(30) is VmState.MISSING
    assert not await fleet.run(lambda tx: sightings.of_uuids(tx, [UID]))
    await fleet.poller().poll("a")
    assert (await fleet.run(lambda tx: instances.get(tx, UID))).vm_state is VmState.ACTIVE


async def test_a_report_of_before_a_machine_left_does_not_bring_it_back(fleet: Fleet) -> None:
    a = await fleet.add("a")
    a.put(make_domain())
    await fleet.poller().poll("a")
    asked = utc_now()
    await fleet.run(lambda tx: sightings.leave(tx, "a", UID))

    async def report(asked: datetime) -> bool:
        inventory = host_pb2.Inventory(facts=a.facts, domains=a.domains.values())
        now = utc_now()
        await fleet.run(
            lambda tx: apply_report(
                tx, "a", inventory, asked=asked, now=now, missing_after_seconds=20.0
            )
        )
        seen = await fleet.run(lambda tx: sightings.find(tx, "a", UID))
        assert seen is not None
        return seen.current

    assert not await report(asked)
    assert await report(utc_now())


async def test_a_report_that_says_nothing_new_changes_no_instance(fleet: Fleet) -> None:
    a = await fleet.add("a")
    a.put(make_domain())
    await fleet.poller().poll("a")
    before = await fleet.run(lambda tx: instances.get(tx, UID))
    a.domains[UID].volumes[0].allocated_bytes += 4096
    await fleet.poller().poll("a")
    assert await fleet.run(lambda tx: instances.get(tx, UID)) == before
    seen = await fleet.run(lambda tx: sightings.find(tx, "a", UID))
    assert seen is not None
    assert seen.domain == a.domains[UID]
