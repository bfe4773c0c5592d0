"""Many sagas, several runners, crashes and pauses at random: none lost, none doubled."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from contextlib import AsyncExitStack

from controlplane.saga.definition import LostLease
from controlplane.saga.log import EventKind, SagaState
from controlplane.store import sql_saga
from controlplane.store.engine import Database
from tests.engine.harness import QUICK, FencedRemote, running, wait_for_end
from tests.engine.toy import ToyWorld

SAGAS = 30
RUNNERS = 4


async def test_crowd(database: Database) -> None:
    shared = FencedRemote()
    worlds = [ToyWorld(polls=1) for _ in range(SAGAS)]
    for world in worlds:
        world.resources = shared
    generator = random.Random(7)
    trouble = {"crashes": 0, "pauses": 0}

    async def strike(point: str, saga_id: str, step: str, kind: str) -> None:
        dice = generator.random()
        if dice < 0.05:
            trouble["crashes"] += 1
            # Dropped without a word, as by a crash: the lease has to expire.
            raise LostLease("struck by the test")
        if dice < 0.08:
            trouble["pauses"] += 1
            await asyncio.sleep(1.5 * config.lease_seconds)

    config = dataclasses.replace(QUICK, lease_seconds=0.3)
    saga_ids = [await database.run(world.begin) for world in worlds]
    async with AsyncExitStack() as runners:
        for _ in range(RUNNERS):
            await runners.enter_async_context(
                running(database, worlds[0], config=config, crash_points=strike)
            )
        views = [await wait_for_end(database, saga_id) for saga_id in saga_ids]
    assert trouble["crashes"] > 5
    assert trouble["pauses"] > 5
    for world, view in zip(worlds, views, strict=True):
        assert view.state is SagaState.DONE
        succeeded = [e.step for e in view.events if e.kind is EventKind.SUCCEEDED]
        assert succeeded == [step.name for step in world.saga.steps], "each once, in order"
        assert [e.seq for e in view.events] == list(range(1, len(view.events) + 1))
        await database.run(world.check_done)
    left = await database.run(lambda tx: sql_saga.live_of(tx, worlds[0].subject))
    assert left is None
