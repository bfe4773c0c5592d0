"""kill -9 at every point: before and after every event and every effect.

For each point a forked process conducts a fresh saga, whose remote is a folder
of files, and exits there without a word. Another process then conducts it to
its end. Afterwards every effect is there, or none.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from sqlalchemy import Connection

from controlplane.saga.log import SagaState, SagaView
from controlplane.store import sql_saga
from controlplane.store.engine import Database
from controlplane.store.upgrade import upgrade
from tests.engine.crashing import KILLED, conduct_until, make_world
from tests.support.forking import fork

T = TypeVar("T")
MOST_POINTS = 80


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fail", [False, True], ids=["forward", "unwinding"])
def test_killed_at_every_point(database_url: str, tmp_path: Path, fail: bool) -> None:
    database = Database(database_url)
    upgrade(database)
    database.close()
    for point in range(1, MOST_POINTS):
        folder = tmp_path / str(point)
        folder.mkdir()
        world = make_world(folder, fail)
        saga_id = in_database(database_url, world.begin)
        killed = in_a_process(database_url, folder, fail, die_at=point)
        if killed:
            assert not in_a_process(database_url, folder, fail, die_at=0)
        view: SagaView = in_database(database_url, partial(sql_saga.get, saga_id=saga_id))
        assert view.state is (SagaState.UNDONE if fail else SagaState.DONE), point
        in_database(database_url, world.check_undone if fail else world.check_done)
        if not killed:
            assert point > 25, "the crash points were reached"
            return
    raise AssertionError("the saga has more crash points than expected")


def in_database(url: str, function: Callable[[Connection], T]) -> T:
    """Run a function in one transaction of a database opened for it."""
    database = Database(url)
    try:
        with database.transaction() as tx:
            return function(tx)
    finally:
        database.close()


def in_a_process(url: str, folder: Path, fail: bool, die_at: int) -> bool:
    """Conduct the saga in a forked process; True when it died at the point."""
    child = fork()
    if child == 0:
        code = 1
        try:
            code = asyncio.run(conduct_until(url, folder, fail, die_at))
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED), f"exit {code}"
    return code == KILLED
