"""Stuck sagas, lost leases, waits, unknown outcomes."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from controlplane.common.errors import DroverError, Transient
from controlplane.common.reasons import Reason
from controlplane.saga.definition import (
    LostLease,
    NotStuck,
    PastPivot,
    Saga,
    StepContext,
    StepKind,
    SubjectBusy,
    Wait,
)
from controlplane.saga.log import EventKind, SagaState
from controlplane.saga.store import Lease
from controlplane.store import sql_saga
from controlplane.store.engine import Database
from tests.engine.harness import (
    QUICK,
    failing,
    kinds,
    running,
    wait_for_end,
    wait_until,
    with_step,
)
from tests.engine.toy import STEPS, ToyParams, ToyWorld

REMOTE = [step.name for step in STEPS if step.kind is StepKind.REMOTE]


async def test_a_failure_past_the_pivot_is_stuck_and_goes_forward(database: Database) -> None:
    world = ToyWorld(pivot="switch")
    saga_id = await database.run(world.begin)
    async with running(database, world, saga=with_step(world.saga, "start", failing)):
        view = await wait_for_end(database, saga_id)
    assert view.state is SagaState.STUCK
    assert "UNDO_STARTED" not in kinds(view)
    await database.run(lambda tx: sql_saga.retry_stuck(tx, world.saga, saga_id))
    async with running(database, world):
        view = await wait_for_end(database, saga_id)
    assert view.state is SagaState.DONE
    await database.run(world.check_done)


async def test_an_abandoned_saga_frees_its_subject(database: Database) -> None:
    world = ToyWorld(pivot="switch")
    saga_id = await database.run(world.begin)
    with pytest.raises(NotStuck):
        await database.run(lambda tx: sql_saga.abandon(tx, world.saga, saga_id, "R", "why"))
    async with running(database, world, saga=with_step(world.saga, "start", failing)):
        await wait_for_end(database, saga_id)
        await database.run(lambda tx: sql_saga.abandon(tx, world.saga, saga_id, "R", "fixed"))
        view = await wait_for_end(database, saga_id)
    assert view.state is SagaState.ABANDONED
    assert view.events[-1].error == {"reason": "R", "message": "fixed"}
    await database.run(world.begin)


async def test_a_subject_has_one_live_saga(database: Database) -> None:
    world = ToyWorld()
    await database.run(world.begin)
    with pytest.raises(SubjectBusy):
        await database.run(world.begin)


async def test_no_cancel_past_the_pivot(database: Database) -> None:
    world = ToyWorld(pivot="prepare", polls=5)
    saga_id = await database.run(world.begin)
    async with running(database, world):
        await wait_until(database, saga_id, lambda view: "SUCCEEDED" in kinds(view, "prepare"))
        with pytest.raises(PastPivot):
            await database.run(lambda tx: sql_saga.request_cancel(tx, world.saga, saga_id))
        view = await wait_for_end(database, saga_id)
    assert view.state is SagaState.DONE


async def test_a_cancel_interrupts_an_action_that_hangs(database: Database) -> None:
    world = ToyWorld()
    interrupted = asyncio.Event()

    async def hang(ctx: StepContext) -> None:
        ctx.resources.ensure(ctx, "prepare")
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            interrupted.set()
            raise

    saga = with_step(world.saga, "prepare", lambda s: dataclasses.replace(s, action=hang))
    saga_id = await database.run(world.begin)
    async with running(database, world, saga=saga):
        await wait_until(database, saga_id, lambda view: "STARTED" in kinds(view, "prepare"))
        await database.run(lambda tx: sql_saga.request_cancel(tx, saga, saga_id))
        view = await wait_for_end(database, saga_id)
    assert interrupted.is_set()
    assert view.state is SagaState.UNDONE
    await database.run(world.check_undone)


async def test_waiting_releases_the_saga(database: Database) -> None:
    world = ToyWorld()

    async def wait_long(ctx: StepContext) -> Wait:
        return Wait(3600)

    saga = with_step(world.saga, "poll", lambda s: dataclasses.replace(s, action=wait_long))
    saga_id = await database.run(world.begin)
    async with running(database, world, saga=saga) as runner:
        view = await wait_until(
            database, saga_id, lambda v: v.owner == "" and "STARTED" in kinds(v, "poll")
        )
        assert view.state is SagaState.RUNNING
        claimed = runner.stats.claimed
    async with running(database, world, saga=saga) as runner:
        assert runner.stats.claimed == 0, "it is not due"
        await database.run(lambda tx: sql_saga.wake(tx, saga_id))
        await wait_until(database, saga_id, lambda v: v.generation == claimed + 1)
        # A waiting saga is cancelled at once, not when its time has come.
        await database.run(lambda tx: sql_saga.request_cancel(tx, saga, saga_id))
        view = await wait_for_end(database, saga_id)
    assert view.state is SagaState.UNDONE


async def test_an_unknown_outcome_is_retried_until_known(database: Database) -> None:
    world = ToyWorld()
    noted: list[tuple[str, int, str]] = []
    tries = 0

    async def flaky(ctx: StepContext) -> None:
        nonlocal tries
        tries += 1
        if tries <= 3:
            raise Transient(DroverError(Reason.HOST_UNREACHABLE, "No answer."))
        assert ctx.attempt == 4
        ctx.resources.ensure(ctx, "prepare")

    changed = with_step(world.saga, "prepare", lambda s: dataclasses.replace(s, action=flaky))
    saga = dataclasses.replace(
        changed,
        retrying=lambda tx, view, step, attempt, error: noted.append(
            (step.name, attempt, error["reason"])
        ),
    )
    saga_id = await database.run(world.begin)
    async with running(database, world, saga=saga):
        view = await wait_for_end(database, saga_id)
    assert view.state is SagaState.DONE
    assert noted == [("prepare", n, "HOST_UNREACHABLE") for n in (1, 2, 3)]
    assert kinds(view, "prepare") == ["STARTED", "SUCCEEDED"]


async def test_an_unexpected_exception_is_a_failure_with_an_incident(database: Database) -> None:
    world = ToyWorld()

    async def bug(ctx: StepContext) -> None:
        raise ZeroDivisionError("secret detail")

    saga = with_step(world.saga, "prepare", lambda s: dataclasses.replace(s, action=bug))
    saga_id = await database.run(world.begin)
    async with running(database, world, saga=saga):
        view = await wait_for_end(database, saga_id)
    failed = next(e for e in view.events if e.kind is EventKind.FAILED)
    assert failed.error is not None
    assert failed.error["reason"] == "INTERNAL"
    assert "secret" not in str(failed.error)
    assert failed.error["metadata"]["incident"]


@pytest.mark.parametrize("step", REMOTE)
async def test_a_runner_paused_past_its_lease_does_no_harm(database: Database, step: str) -> None:
    """One runner sleeps before its effect; another finishes; the late call is refused."""
    world = ToyWorld(polls=1)
    config = dataclasses.replace(QUICK, lease_seconds=0.4)
    paused, go_on, late = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def late_action(ctx: StepContext) -> Any:
        if not paused.is_set():
            paused.set()
            await asyncio.shield(go_on.wait())
            try:
                return await original(ctx)
            finally:
                late.set()
        return await original(ctx)

    original: Any = world.saga.step(step).action
    saga = with_step(world.saga, step, lambda s: dataclasses.replace(s, action=late_action))
    saga_id = await database.run(world.begin)

    slow = DeafRunner(database, world, saga, config)
    async with slow:
        await asyncio.wait_for(paused.wait(), 10)
        slow.pause()
        async with running(database, world, saga=saga):
            view = await wait_for_end(database, saga_id)
        assert view.state is SagaState.DONE
        effects = list(world.resources.effects)
        go_on.set()
        await asyncio.wait_for(late.wait(), 10)
        await wait_until(database, saga_id, lambda v: v.state is SagaState.DONE)
    assert world.resources.refused >= 1, "the stale token reached the remote and was refused"
    assert world.resources.effects == effects
    after = await database.run(lambda tx: sql_saga.get(tx, saga_id))
    assert after.events == view.events
    await database.run(world.check_done)


class DeafRunner:
    """A runner whose loops are paused with its step, as SIGSTOP would do."""

    def __init__(self, database: Database, world: ToyWorld, saga: Saga, config: Any) -> None:
        self._context = running(database, world, saga=saga, config=config)

    async def __aenter__(self) -> None:
        self._runner = await self._context.__aenter__()

    def pause(self) -> None:
        """Neither claim nor renew any more."""
        for loop in self._runner._loops:
            loop.cancel()

    async def __aexit__(self, *error: Any) -> None:
        await self._context.__aexit__(None, None, None)


async def test_writes_under_a_lost_lease_are_refused(database: Database) -> None:
    world = ToyWorld()
    saga_id = await database.run(world.begin)
    store = sql_saga.SqlSagaStore()
    known = [("toy", 1)]
    first = (await database.run(lambda tx: store.claim(tx, "one", known, 0.0, 10)))[0]
    await asyncio.sleep(0.01)
    second = (await database.run(lambda tx: store.claim(tx, "two", known, 60.0, 10)))[0]
    assert second.generation == first.generation + 1
    assert await database.run(lambda tx: store.claim(tx, "three", known, 60.0, 10)) == []

    def append(lease: Lease) -> Any:
        return lambda tx: store.append(tx, lease, EventKind.STARTED, step="record")

    for refused in (
        append(first),
        lambda tx: store.release(tx, first, 0.0),
        lambda tx: store.check_lease(tx, first),
    ):
        with pytest.raises(LostLease):
            await database.run(refused)
    for look in (lambda tx: store.renew(tx, [first, second], 60.0), holding(store, first, second)):
        assert await database.run(look) == {saga_id: False}
    assert await database.run(lambda tx: store.renew(tx, [first], 60.0)) == {}
    await database.run(append(second))
    view = await database.run(lambda tx: sql_saga.get(tx, saga_id))
    assert kinds(view) == ["STARTED"]


def holding(store: sql_saga.SqlSagaStore, *leases: Lease) -> Any:
    """Ask which leases hold."""
    return lambda tx: store.holding(tx, leases)


async def test_other_versions_are_left_alone(database: Database) -> None:
    world = ToyWorld()
    newer = dataclasses.replace(world.saga, version=2)
    saga_id = await database.run(lambda tx: sql_saga.create(tx, newer, world.subject, ToyParams()))
    async with running(database, world) as runner:
        async with asyncio.timeout(60):
            while runner.stats.unclaimable != 1:  # noqa: ASYNC110 bounded
                await asyncio.sleep(QUICK.poll_seconds)
        assert runner.stats.claimed == 0
    view = await database.run(lambda tx: sql_saga.get(tx, saga_id))
    assert view.state is SagaState.RUNNING


async def test_a_released_saga_is_not_renewed(database: Database) -> None:
    """A renewal that overtakes a release must not hold the saga for nobody."""
    world = ToyWorld()
    await database.run(world.begin)
    store = sql_saga.SqlSagaStore()
    lease = (await database.run(lambda tx: store.claim(tx, "one", [("toy", 1)], 60.0, 10)))[0]
    await database.run(lambda tx: store.release(tx, lease, 0.0))
    assert await database.run(lambda tx: store.renew(tx, [lease], 60.0)) == {}
    assert await database.run(holding(store, lease)) == {}
    assert len(await database.run(lambda tx: store.claim(tx, "two", [("toy", 1)], 1.0, 10))) == 1
