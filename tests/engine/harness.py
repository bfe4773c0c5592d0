"""What the engine's tests run on: a small saga, a remote that keeps the fence, a driver.

The loops of `matrix` take any saga definition and a factory for its world, so
that they run over this toy and over the real sagas alike.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from sqlalchemy import Connection

from controlplane.common.errors import DroverError, Transient
from controlplane.common.reasons import Reason
from controlplane.saga.context import Listener
from controlplane.saga.definition import Saga, Step, StepContext, StepKind, Wait
from controlplane.saga.log import Event, EventKind, SagaState, SagaView
from controlplane.saga.runner import Runner, RunnerConfig
from controlplane.saga.testing import CrashPoints, no_crash
from controlplane.store import sql_saga
from controlplane.store.engine import Database

QUICK = RunnerConfig(
    lease_seconds=5.0,
    poll_seconds=0.02,
    backoff_seconds=0.01,
    backoff_cap_seconds=0.05,
)
ENDED = (SagaState.DONE, SagaState.UNDONE, SagaState.STUCK, SagaState.ABANDONED)


class World(Protocol):
    """Everything outside the saga's log that its steps change."""

    @property
    def saga(self) -> Saga:
        """The definition."""
        ...

    @property
    def resources(self) -> Any:
        """What the runner hands to the steps."""
        ...

    def begin(self, tx: Connection) -> str:
        """Create the saga, with whatever it is about; returns its id."""
        ...

    def check_done(self, tx: Connection) -> None:
        """Assert that the world is as it must be once the saga is DONE."""
        ...

    def check_undone(self, tx: Connection) -> None:
        """Assert that the world is as it was before the saga began."""
        ...


WorldFactory = Callable[[Database], World]


def injected() -> DroverError:
    """The failure that tests inject."""
    return DroverError(Reason.TARGET_LACKS_SPACE, "Injected by a test.")


def with_step(saga: Saga, name: str, change: Callable[[Step], Step]) -> Saga:
    """The saga with one step changed."""
    steps = tuple(change(step) if step.name == name else step for step in saga.steps)
    return dataclasses.replace(saga, steps=steps)


def failing(step: Step) -> Step:
    """A step whose action fails before it does anything."""
    if step.kind is StepKind.DB:

        def fail_db(tx: Connection, ctx: StepContext) -> Any:
            raise injected()

        return dataclasses.replace(step, action=fail_db)

    async def fail(ctx: StepContext) -> Any:
        raise injected()

    return dataclasses.replace(step, action=fail)


def failing_late(step: Step) -> Step:
    """A step whose action has its effect and then fails: half happened, as far as anybody knows."""
    if step.kind is StepKind.DB:
        return failing(step)
    action: Any = step.action

    async def act_and_fail(ctx: StepContext) -> Any:
        result = await action(ctx)
        if isinstance(result, Wait):
            return result
        raise injected()

    return dataclasses.replace(step, action=act_and_fail)


def undo_failing(step: Step) -> Step:
    """A step whose undo fails for good."""

    async def fail(ctx: StepContext) -> None:
        raise injected()

    def fail_db(tx: Connection, ctx: StepContext) -> None:
        raise injected()

    return dataclasses.replace(step, undo=fail if step.kind is StepKind.REMOTE else fail_db)


def repeated(step: Step) -> Step:
    """A step whose remote action and undo run twice each time."""
    if step.kind is StepKind.DB:
        return step

    def twice(function: Any) -> Any:
        async def run(ctx: StepContext) -> Any:
            first = await function(ctx)
            if isinstance(first, Wait):
                return first
            return await function(ctx)

        return run

    undo = None if step.undo is None else twice(step.undo)
    return dataclasses.replace(step, action=twice(step.action), undo=undo)


@asynccontextmanager
async def running(
    database: Database,
    world: World,
    *,
    saga: Saga | None = None,
    config: RunnerConfig = QUICK,
    crash_points: CrashPoints = no_crash,
    tell: Listener = lambda _: None,
) -> AsyncIterator[Runner]:
    """A runner for a world, stopped at the end of the block."""
    runner = Runner(
        database,
        sql_saga.SqlSagaStore(),
        [saga or world.saga],
        world.resources,
        config,
        crash_points,
        tell,
    )
    await runner.start()
    try:
        yield runner
    finally:
        await runner.stop()


async def wait_until(
    database: Database,
    saga_id: str,
    condition: Callable[[SagaView], bool],
    timeout_seconds: float = 60.0,
) -> SagaView:
    """Read a saga until a condition holds."""
    async with asyncio.timeout(timeout_seconds):
        while True:
            view = await database.run(lambda tx: sql_saga.get(tx, saga_id))
            if condition(view):
                return view
            await asyncio.sleep(0.01)


async def wait_for_end(database: Database, saga_id: str, timeout_seconds: float = 60.0) -> SagaView:
    """Read a saga until it has ended or is stuck."""
    return await wait_until(database, saga_id, lambda view: view.state in ENDED, timeout_seconds)


async def conduct(
    database: Database, world: World, *, saga: Saga | None = None, config: RunnerConfig = QUICK
) -> SagaView:
    """Begin a saga and run it to its end."""
    saga_id = await database.run(world.begin)
    async with running(database, world, saga=saga, config=config):
        return await wait_for_end(database, saga_id)


def kinds(view: SagaView, step: str = "") -> list[str]:
    """The kinds of a saga's events, of one step if given."""
    return [e.kind.value for e in view.events if not step or e.step == step]


def failed_steps(view: SagaView) -> list[str]:
    """Names of the steps that failed."""
    return [e.step for e in view.events if e.kind is EventKind.FAILED]


class FencedRemote:
    """Another machine: keeps the highest token for each subject and refuses lower ones."""

    def __init__(self) -> None:
        self.present: dict[str, set[str]] = {}
        self.highest: dict[str, tuple[int, int]] = {}
        self.refused = 0
        self.effects: list[tuple[str, str]] = []

    def _admit(self, ctx: StepContext) -> None:
        token = (ctx.token.seq, ctx.token.generation)
        if token < self.highest.get(ctx.subject, (0, 0)):
            self.refused += 1
            raise Transient(
                DroverError(Reason.STALE_GENERATION, f"{token} < {self.highest[ctx.subject]}")
            )
        self.highest[ctx.subject] = token

    def ensure(self, ctx: StepContext, name: str) -> None:
        """Make something present."""
        self._admit(ctx)
        self.present.setdefault(ctx.subject, set()).add(name)
        self.effects.append(("ensure", name))

    def ensure_absent(self, ctx: StepContext, name: str) -> None:
        """Make something absent, whether or not it was there."""
        self._admit(ctx)
        self.present.setdefault(ctx.subject, set()).discard(name)
        self.effects.append(("absent", name))


def ignore(tx: Connection, saga: SagaView, event: Event) -> None:
    """An observer that has nothing to write."""


def step_names(saga: Saga, *, kind: StepKind | None = None) -> Sequence[str]:
    """Names of a saga's steps, of one kind if given."""
    return [step.name for step in saga.steps if kind is None or step.kind is kind]
