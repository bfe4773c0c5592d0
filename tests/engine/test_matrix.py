"""The matrix over the toy saga; tests/controlplane/sagas runs it over the real ones."""

from __future__ import annotations

import pytest

from controlplane.store.engine import Database
from tests.engine import matrix
from tests.engine.toy import STEPS, ToyWorld

ALL = [step.name for step in STEPS]


async def test_succeeds(database: Database) -> None:
    await matrix.succeeds(database, ToyWorld())


async def test_succeeds_with_every_action_repeated(database: Database) -> None:
    await matrix.succeeds_with_every_action_repeated(database, ToyWorld())


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("step", ALL)
async def test_unwinds(database: Database, step: str, late: bool) -> None:
    await matrix.unwinds(database, ToyWorld(), step, late=late)


@pytest.mark.parametrize("step", ALL)
async def test_unwinds_with_every_undo_repeated(database: Database, step: str) -> None:
    await matrix.unwinds_with_every_undo_repeated(database, ToyWorld(), step)


@pytest.mark.parametrize("step", ALL)
async def test_cancels(database: Database, step: str) -> None:
    await matrix.cancels(database, ToyWorld(), step)


@pytest.mark.parametrize("step", ALL[:-1])
async def test_a_failed_undo_is_stuck_until_retried(database: Database, step: str) -> None:
    await matrix.stuck_until_retried(database, ToyWorld(), ALL[-1], step)


@pytest.mark.parametrize("fail", ["", ALL[-1]], ids=["forward", "unwinding"])
async def test_converges_when_struck_everywhere(database: Database, fail: str) -> None:
    await matrix.converges_when_struck_everywhere(database, ToyWorld(polls=1), fail)


async def test_resumes_from_any_shortened_way_back(database: Database) -> None:
    await matrix.resumes_from_any_shortened_way_back(database, ToyWorld, "poll")


@pytest.mark.parametrize("lost", range(1, 2 * len(ALL) + 1))
async def test_resumes_from_a_shortened_log(database: Database, lost: int) -> None:
    await matrix.resumes_from_a_shortened_log(database, ToyWorld(), lost)
