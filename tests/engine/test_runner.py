"""The runner itself: stopped, cut off from its database, overtaken by itself, cancelled late."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from sqlalchemy import Connection

from controlplane.saga.definition import PastPivot, Saga, StepContext
from controlplane.saga.log import EventKind, SagaState
from controlplane.saga.runner import Runner
from controlplane.store import sql_saga
from controlplane.store.engine import Database
from tests.engine.harness import (
    QUICK,
    failing,
    injected,
    kinds,
    running,
    wait_for_end,
    wait_until,
    with_step,
)
from tests.engine.toy import STEPS, ToyWorld

T = TypeVar("T")


class Hanging:
    """An action or undo that hangs the first time, and notes that it was interrupted."""

    def __init__(self) -> None:
        self.calls = 0
        self.begun = asyncio.Event()
        self.interrupted = asyncio.Event()

    async def __call__(self, ctx: StepContext) -> None:
        self.calls += 1
        if self.calls > 1:
            ctx.resources.ensure(ctx, "prepare")
            return
        self.begun.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.interrupted.set()
            raise


class FragileDatabase:
    """A database that can be made to hang, or to raise what nobody expects."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.works = asyncio.Event()
        self.works.set()
        self.surprises = 0

    async def run(self, function: Callable[[Connection], T]) -> T:
        if self.surprises:
            self.surprises -= 1
            raise RuntimeError("nobody expects this")
        await self.works.wait()
        return await self._database.run(function)


async def test_a_runner_stops_while_it_unwinds_a_cancelled_saga(database: Database) -> None:
    world, action, undo = ToyWorld(), Hanging(), Hanging()
    saga = with_step(
        world.saga, "prepare", lambda s: dataclasses.replace(s, action=action, undo=undo)
    )
    saga_id = await database.run(world.begin)
    async with running(database, world, saga=saga):
        await asyncio.wait_for(action.begun.wait(), 10)
        await database.run(lambda tx: sql_saga.request_cancel(tx, saga, saga_id))
        await asyncio.wait_for(undo.begun.wait(), 10)
    view = await database.run(lambda tx: sql_saga.get(tx, saga_id))
    assert undo.calls == 1
    assert undo.interrupted.is_set()
    assert (view.state, view.owner) == (SagaState.UNWINDING, "")


async def test_a_runner_whose_database_hangs_lets_go_before_its_lease_ends(
    database: Database,
) -> None:
    world, action = ToyWorld(), Hanging()
    saga = with_step(world.saga, "prepare", lambda s: dataclasses.replace(s, action=action))
    fragile = FragileDatabase(database)
    config = dataclasses.replace(QUICK, lease_seconds=1.0)
    saga_id = await database.run(world.begin)
    runner = Runner(fragile, sql_saga.SqlSagaStore(), [saga], world.resources, config)
    await runner.start()
    try:
        await asyncio.wait_for(action.begun.wait(), 10)
        fragile.works.clear()
        await asyncio.wait_for(action.interrupted.wait(), 10)
        fragile.works.set()
        view = await wait_for_end(database, saga_id)
    finally:
        await runner.stop()
    assert view.state is SagaState.DONE
    assert action.calls == 2


async def test_a_surprise_ends_neither_claims_nor_renewals(database: Database) -> None:
    world, action = ToyWorld(), Hanging()
    saga = with_step(world.saga, "prepare", lambda s: dataclasses.replace(s, action=action))
    fragile = FragileDatabase(database)
    saga_id = await database.run(world.begin)
    runner = Runner(fragile, sql_saga.SqlSagaStore(), [saga], world.resources, QUICK)
    await runner.start()
    try:
        await asyncio.wait_for(action.begun.wait(), 10)
        fragile.surprises = 10
        async with asyncio.timeout(60):
            while fragile.surprises:  # noqa: ASYNC110 bounded
                await asyncio.sleep(0.01)
        await database.run(lambda tx: sql_saga.request_cancel(tx, saga, saga_id))
        await asyncio.wait_for(action.interrupted.wait(), 10)
        view = await wait_for_end(database, saga_id)
    finally:
        await runner.stop()
    assert view.state is SagaState.UNDONE


async def test_a_runner_that_overtakes_itself_goes_on_once(database: Database) -> None:
    """The process was paused past its lease; on waking it claims the saga that it still holds."""
    world, first = ToyWorld(), Hanging()
    saga = with_step(world.saga, "prepare", lambda s: dataclasses.replace(s, action=first))
    config = dataclasses.replace(QUICK, lease_seconds=0.5)
    saga_id = await database.run(world.begin)
    async with running(database, world, saga=saga, config=config) as runner:
        await asyncio.wait_for(first.begun.wait(), 10)
        for loop in runner._loops:
            if loop.get_name() == "saga-leases":
                loop.cancel()
        view = await wait_for_end(database, saga_id)
        await asyncio.wait_for(first.interrupted.wait(), 10)
    assert view.state is SagaState.DONE
    assert first.calls == 2
    assert len(runner._leases) == 0


@pytest.mark.parametrize("pivot", [None, "poll", "switch", "start"])
async def test_a_cancel_that_is_accepted_is_honoured(database: Database, pivot: str | None) -> None:
    """Asked for just before each event: either it is refused, or the saga turns."""
    for boundary in range(1, 2 * len(STEPS) + 2):
        world = ToyWorld(pivot=pivot, polls=1)
        cancel = CancelBefore(database, world.saga, boundary)
        saga_id = await database.run(world.begin)
        async with running(database, world, crash_points=cancel):
            view = await wait_for_end(database, saga_id)
        assert cancel.accepted is not None, boundary
        assert view.state is (SagaState.UNDONE if cancel.accepted else SagaState.DONE), boundary
        await database.run(world.check_undone if cancel.accepted else world.check_done)


class CancelBefore:
    """Asks for a cancel just before the n-th event is written."""

    def __init__(self, database: Database, saga: Saga, boundary: int) -> None:
        self._database = database
        self._saga = saga
        self._left = boundary
        self.accepted: bool | None = None

    async def __call__(self, point: str, saga_id: str, step: str, kind: str) -> None:
        self._left -= point == "before-append"
        if self._left > 0 or self.accepted is not None:
            return
        try:
            await self._database.run(lambda tx: sql_saga.request_cancel(tx, self._saga, saga_id))
            self.accepted = True
        except PastPivot:
            self.accepted = False


async def test_a_stuck_saga_says_what_it_is_stuck_on(database: Database) -> None:
    """Not what turned it: that is told by the failed step."""
    world = ToyWorld()

    def undo_breaks(step: Any) -> Any:
        async def fail(ctx: StepContext) -> None:
            error = injected()
            error.message = "The undo is in the way."
            raise error

        return dataclasses.replace(step, undo=fail)

    saga = with_step(with_step(world.saga, "start", failing), "prepare", undo_breaks)
    saga_id = await database.run(world.begin)
    async with running(database, world, saga=saga):
        view = await wait_until(database, saga_id, lambda v: v.state is SagaState.STUCK)
    stuck = next(e for e in view.events if e.kind is EventKind.STUCK)
    assert stuck.error is not None
    assert stuck.error["message"] == "The undo is in the way."
    assert view.error == stuck.error
    await database.run(lambda tx: sql_saga.retry_stuck(tx, world.saga, saga_id))
    async with running(database, world):
        view = await wait_for_end(database, saga_id)
    assert kinds(view)[-1] == "UNDONE"
    assert view.error is not None
    assert view.error["message"] == "Injected by a test."
