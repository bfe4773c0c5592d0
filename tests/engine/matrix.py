"""The loops that matter most, over any saga: each step failed, repeated, cancelled, cut short.

Each function is one cell of the matrix for one step; tests parametrize over the
steps of a definition and both databases. After each of them the saga has ended,
nothing is stuck, and the world is whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import sqlalchemy as sa
from sqlalchemy import Connection

from controlplane.saga.definition import LostLease, Saga, StepKind
from controlplane.saga.log import EventKind, SagaState, SagaView, fold
from controlplane.store import sql_saga
from controlplane.store.engine import Database
from controlplane.store.saga_tables import saga_events, sagas
from tests.engine.harness import (
    World,
    conduct,
    failed_steps,
    failing,
    failing_late,
    repeated,
    running,
    undo_failing,
    wait_for_end,
    with_step,
)


def before_pivot(saga: Saga) -> list[str]:
    """Steps whose failure can be undone."""
    names = [step.name for step in saga.steps]
    return names if saga.pivot is None else names[: saga.index(saga.pivot)]


async def succeeds(database: Database, world: World) -> None:
    """Nothing goes wrong."""
    view = await conduct(database, world)
    assert view.state is SagaState.DONE, view
    await database.run(world.check_done)


async def succeeds_with_every_action_repeated(database: Database, world: World) -> None:
    """Every remote action runs twice; the result is the same."""
    saga = dataclasses.replace(world.saga, steps=tuple(map(repeated, world.saga.steps)))
    view = await conduct(database, world, saga=saga)
    assert view.state is SagaState.DONE, view
    await database.run(world.check_done)


async def unwinds(database: Database, world: World, step: str, *, late: bool) -> None:
    """One action fails, before or after its effect; all is undone, and only that one failed."""
    saga = with_step(world.saga, step, failing_late if late else failing)
    view = await conduct(database, world, saga=saga)
    assert view.state is SagaState.UNDONE, view
    assert failed_steps(view) == [step]
    assert_no_failed_undo(view)
    await database.run(world.check_undone)


async def unwinds_with_every_undo_repeated(database: Database, world: World, step: str) -> None:
    """One action fails, and every undo runs twice."""
    doubled = dataclasses.replace(world.saga, steps=tuple(map(repeated, world.saga.steps)))
    view = await conduct(database, world, saga=with_step(doubled, step, failing))
    assert view.state is SagaState.UNDONE, view
    assert_no_failed_undo(view)
    await database.run(world.check_undone)


async def cancels(database: Database, world: World, step: str) -> None:
    """A cancel is asked for while a step is at work; all is undone."""
    asked: list[str] = []

    async def ask(point: str, saga_id: str, at: str, kind: str) -> None:
        if point == "after-append" and at == step and kind == "STARTED" and not asked:
            asked.append(saga_id)
            await database.run(lambda tx: sql_saga.request_cancel(tx, world.saga, saga_id))

    saga_id = await database.run(world.begin)
    async with running(database, world, crash_points=ask):
        view = await wait_for_end(database, saga_id)
    assert asked
    if view.state is SagaState.DONE:
        # The last step was through before anybody looked: too late is allowed,
        # half way is not.
        assert world.saga.steps[-1].name == step
        await database.run(world.check_done)
        return
    assert view.state is SagaState.UNDONE, view
    assert_no_failed_undo(view)
    await database.run(world.check_undone)


async def resumes_from_a_shortened_log(database: Database, world: World, lost: int) -> None:
    """The last events of a finished log are lost; the saga converges again.

    This is what a process that died before recording looks like: effects that
    nobody wrote down. DB steps cannot be lost without their effect, so the cut is
    moved back to the last remote event.
    """
    saga_id = await database.run(world.begin)
    async with running(database, world):
        await wait_for_end(database, saga_id)

    def shorten(tx: Connection) -> None:
        view = sql_saga.get(tx, saga_id)
        keep = len(view.events) - lost
        db = {s.name for s in world.saga.steps if s.kind is StepKind.DB}
        while any(e.step in db and e.kind is EventKind.SUCCEEDED for e in view.events[keep:]):
            keep += 1
        _truncate(tx, saga_id, keep)

    await database.run(shorten)
    async with running(database, world):
        view = await wait_for_end(database, saga_id)
    assert view.state is SagaState.DONE, view
    await database.run(world.check_done)


async def resumes_from_any_shortened_way_back(
    database: Database, make_world: Callable[[], World], step: str
) -> None:
    """A step fails late and all is undone; then the log loses its last k events, for all k.

    The step is one before any DB step that has an undo: what such a step did
    cannot be lost without its event.
    """
    lost = 1
    while True:
        world = make_world()
        saga = with_step(world.saga, step, failing_late)
        view = await conduct(database, world, saga=saga)
        assert view.state is SagaState.UNDONE, view
        if lost == len(view.events):
            return
        keep = len(view.events) - lost
        await database.run(partial(_truncate, saga_id=view.id, keep=keep))
        async with running(database, world, saga=saga):
            view = await wait_for_end(database, view.id)
        assert view.state is SagaState.UNDONE, (lost, view)
        assert_no_failed_undo(view)
        await database.run(world.check_undone)
        lost += 1


async def stuck_until_retried(database: Database, world: World, step: str, at: str) -> None:
    """One action fails, then one undo does; the saga waits for an operator, and goes on."""
    failing_saga = with_step(world.saga, step, failing)
    view = await conduct(database, world, saga=with_step(failing_saga, at, undo_failing))
    assert view.state is SagaState.STUCK, view
    assert view.error is not None
    assert view.owner == ""
    assert [e.step for e in view.events if e.kind is EventKind.UNDO_FAILED] == [at]
    await database.run(lambda tx: sql_saga.retry_stuck(tx, world.saga, view.id))
    async with running(database, world, saga=failing_saga):
        view = await wait_for_end(database, view.id)
    assert view.state is SagaState.UNDONE, view
    await database.run(world.check_undone)


async def converges_when_struck_everywhere(database: Database, world: World, fail: str) -> None:
    """The runner dies at every point there is, once each: around every event and every effect.

    Here it is dropped without a word, with its lease let to expire; that a killed
    process is no different is what test_crash is for.
    """
    saga = with_step(world.saga, fail, failing_late) if fail else world.saga
    struck: set[tuple[str, str, str]] = set()

    async def strike(point: str, saga_id: str, step: str, kind: str) -> None:
        if (point, step, kind) in struck:
            return
        struck.add((point, step, kind))
        await database.run(partial(_expire, saga_id=saga_id))
        raise LostLease("struck by the test")

    saga_id = await database.run(world.begin)
    async with running(database, world, saga=saga, crash_points=strike):
        view = await wait_for_end(database, saga_id, timeout_seconds=60)
    assert view.state is (SagaState.UNDONE if fail else SagaState.DONE), view
    assert_no_failed_undo(view)
    assert len(struck) > 4 * len([e for e in view.events if e.kind is EventKind.STARTED])
    await database.run(world.check_undone if fail else world.check_done)


def _expire(tx: Connection, saga_id: str) -> None:
    tx.execute(sa.update(sagas).where(sagas.c.id == saga_id).values(lease_until=0.0))


def _truncate(tx: Connection, saga_id: str, keep: int) -> None:
    tx.execute(
        sa.delete(saga_events).where(saga_events.c.saga_id == saga_id, saga_events.c.seq > keep)
    )
    tx.execute(
        sa.update(sagas)
        .where(sagas.c.id == saga_id)
        .values(
            state=fold(sql_saga.get(tx, saga_id).events).state.value,
            owner="",
            lease_until=0.0,
            wake_at=0.0,
            generation=sagas.c.generation + 1,
        )
    )


def assert_no_failed_undo(view: SagaView) -> None:
    """No undo has failed."""
    assert [e for e in view.events if e.kind is EventKind.UNDO_FAILED] == []
