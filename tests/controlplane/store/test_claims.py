from __future__ import annotations

import asyncio
import threading

from sqlalchemy import Connection

from controlplane.domain.model import Size
from controlplane.domain.states import HostState
from controlplane.store import claims, hosts
from controlplane.store.engine import Database

ROOM = Size(vcpus=4, memory_mib=4096, disk_bytes=100)
ONE = Size(vcpus=1, memory_mib=1024, disk_bytes=10)


def add_host(tx: Connection, name: str = "b") -> None:
    hosts.create(tx, name, adopt_domains=True)
    hosts.update(tx, name, state=HostState.ENABLED)


async def test_a_claim_is_made_moved_and_dropped(database: Database) -> None:
    def work(tx: Connection) -> None:
        add_host(tx)
        add_host(tx, "c")
        consumer = claims.migration_consumer("m")
        assert claims.try_claim(tx, consumer, "b", ONE, ROOM)
        assert claims.claimed(tx, "b") == ONE
        assert claims.claimed(tx, "b", but_not=consumer) == Size()
        claims.put(tx, consumer, "c", ONE)
        assert claims.claimed(tx, "b") == Size()
        found = claims.find(tx, consumer)
        assert found is not None
        assert (found.host, found.size) == ("c", ONE)
        assert claims.drop(tx, consumer)
        assert not claims.drop(tx, consumer)
        assert claims.find(tx, consumer) is None

    await database.run(work)


async def test_each_kind_of_room_can_run_out(database: Database) -> None:
    def work(tx: Connection) -> None:
        add_host(tx)
        claims.put(tx, "instances/x", "b", ONE)
        for size in (Size(vcpus=4), Size(memory_mib=3073), Size(disk_bytes=91)):
            assert not claims.try_claim(tx, "migrations/m", "b", size, ROOM)
        rest = Size(vcpus=3, memory_mib=3072, disk_bytes=90)
        assert claims.try_claim(tx, "migrations/m", "b", rest, ROOM)
        assert claims.try_claim(tx, "migrations/m", "b", rest, ROOM), "its own claim is no obstacle"

    await database.run(work)


async def test_no_room_on_hosts_that_are_not_enabled_or_unknown(database: Database) -> None:
    def work(tx: Connection) -> None:
        add_host(tx)
        hosts.update(tx, "b", state=HostState.DISABLED)
        assert not claims.try_claim(tx, "migrations/m", "b", ONE, ROOM)
        assert not claims.try_claim(tx, "migrations/m", "zz", ONE, ROOM)
        assert claims.find(tx, "migrations/m") is None

    await database.run(work)


async def test_transactions_at_once_never_promise_more_than_there_is(database: Database) -> None:
    await database.run(add_host)
    together = threading.Barrier(8)
    several = database.engine.dialect.name == "postgresql"

    def claim(tx: Connection, n: int) -> bool:
        if several:
            # All transactions are open, and have read, before the first one claims.
            claims.claimed(tx, "b")
            together.wait(timeout=30)
        return claims.try_claim(tx, f"migrations/{n}", "b", ONE, ROOM)

    won = await asyncio.gather(
        *(database.run(lambda tx, n=n: claim(tx, n)) for n in range(8))  # type: ignore[misc]
    )
    assert sum(won) == 4
    assert await database.run(lambda tx: claims.claimed(tx, "b")) == Size(
        vcpus=4, memory_mib=4096, disk_bytes=40
    )
