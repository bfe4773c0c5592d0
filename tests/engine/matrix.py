"""The loops that matter most, over any saga: each step failed, repeated, cancelled, cut short.

Each function is one cell of the matrix for one step; tests parametrize over the
steps of a definition and both databases. After each of them the saga has ended,
nothing is stuck, and the world is whole.
"""

from __future__ import annotations

import dataclasses

from sqlalchemy import Connection

from controlplane.saga.definition import Saga, Step, StepKind
from controlplane.saga.log import EventKind, SagaState, SagaView
from controlplane.store import sql_saga
from controlplane.store.engine import Database
from tests.engine.harness import (
    World,
    conduct,
    failed_steps,
    failing,
    failing_late,
    repeated,
    running,
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


def _truncate(tx: Connection, saga_id: str, keep: int) -> None:
    import sqlalchemy as sa

    from controlplane.store.saga_tables import saga_events, sagas

    tx.execute(
        sa.delete(saga_events).where(saga_events.c.saga_id == saga_id, saga_events.c.seq > keep)
    )
    tx.execute(
        sa.update(sagas)
        .where(sagas.c.id == saga_id)
        .values(
            state="RUNNING",
            owner="",
            lease_until=0.0,
            wake_at=0.0,
            generation=sagas.c.generation + 1,
        )
    )


def assert_no_failed_undo(view: SagaView) -> None:
    """No undo has failed."""
    assert [e for e in view.events if e.kind is EventKind.UNDO_FAILED] == []


def remote(saga: Saga) -> list[Step]:
    """The remote steps."""
    return [step for step in saga.steps if step.kind is StepKind.REMOTE]
