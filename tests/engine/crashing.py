"""The process that test_crash kills: conducts one saga and dies at the n-th crash point."""

from __future__ import annotations

import os
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection

from controlplane.saga.definition import StepContext
from controlplane.saga.log import SagaState
from controlplane.store import sql_saga
from controlplane.store.engine import Database
from controlplane.store.saga_tables import sagas
from tests.engine.harness import QUICK, FencedRemote, failing, running, wait_for_end, with_step
from tests.engine.toy import ToyWorld

KILLED = 42


class FileRemote(FencedRemote):
    """A remote whose state outlives the process: one file an effect."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder / "remote"
        self._folder.mkdir(exist_ok=True)

    def ensure(self, ctx: StepContext, name: str) -> None:
        """Make a file."""
        (self._folder / name).touch()

    def ensure_absent(self, ctx: StepContext, name: str) -> None:
        """Remove it."""
        (self._folder / name).unlink(missing_ok=True)

    @property
    def names(self) -> set[str]:
        """What is present."""
        return {path.name for path in self._folder.iterdir()}


def make_world(folder: Path, fail: bool) -> ToyWorld:
    """The same world in every process."""
    world = ToyWorld(polls=1)
    remote = FileRemote(folder)
    world.resources = remote
    world.subject = f"toys/{folder.name}"
    remote.present = LazyNames(remote)
    if fail:
        world.saga = with_step(world.saga, "start", failing)
    return world


class LazyNames(dict[str, set[str]]):
    """Looks at the files when asked."""

    def __init__(self, remote: FileRemote) -> None:
        super().__init__()
        self._remote = remote

    def get(self, key: str, default: object = None) -> set[str]:
        """What is present now."""
        return self._remote.names


async def conduct_until(url: str, folder: Path, fail: bool, die_at: int) -> int:
    """Conduct until the end, or die at the n-th point; 0 for never.

    Returns:
        0 once the saga has ended.
    """
    database = Database(url)
    world = make_world(folder, fail)
    passed = 0

    async def die(point: str, saga_id: str, step: str, kind: str) -> None:
        nonlocal passed
        passed += 1
        if passed == die_at:
            os._exit(KILLED)

    saga_id = await database.run(lambda tx: sql_saga.live_of(tx, world.subject))
    if saga_id is None:
        # It died after the last event.
        return 0
    await database.run(_expire)
    async with running(database, world, config=QUICK, crash_points=die):
        view = await wait_for_end(database, saga_id)
    return 0 if view.state in (SagaState.DONE, SagaState.UNDONE) else 1


def _expire(tx: Connection) -> None:
    # The lease of the killed process would hold the next one up for seconds.
    tx.execute(sa.update(sagas).values(lease_until=0.0))
