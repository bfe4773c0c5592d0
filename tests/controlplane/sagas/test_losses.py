"""Hosts declared gone, copies lost, machines removed by hand, in the middle of a saga.

Whatever happens, the last complete copy is not deleted, and the guest runs where
it can run or the saga is stuck and says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from controlplane.common.errors import DroverError, Transient
from controlplane.common.reasons import Reason
from controlplane.domain.states import MigrationState, VmState
from controlplane.saga.log import EventKind, SagaState, SagaView
from controlplane.store import instances, sql_saga
from controlplane.store.engine import Database
from tests.controlplane.sagas.model import ModelHost
from tests.controlplane.sagas.worlds import ConfirmWorld, MoveWorld, RevertWorld
from tests.engine.harness import (
    conduct,
    failing,
    failing_late,
    running,
    wait_for_end,
    wait_until,
    with_step,
)

WORLDS = {"move": MoveWorld, "confirm": ConfirmWorld, "revert": RevertWorld}
DONE, UNDONE, STUCK = SagaState.DONE, SagaState.UNDONE, SagaState.STUCK


async def conduct_and_strike(
    database: Database,
    world: MoveWorld,
    step: str,
    strike: Callable[[], None],
    *,
    undoing: bool = False,
) -> SagaView:
    """Conduct a saga; just before a step, or its undo, first has its effect, something happens."""
    struck: list[str] = []

    async def at(point: str, saga_id: str, at_step: str, kind: str) -> None:
        right_way = undoing == (kind == "UNDO_FINISHED")
        if (point, at_step) == ("before-effect", step) and right_way and not struck:
            struck.append(step)
            strike()

    saga_id = await database.run(world.begin)
    async with running(database, world, crash_points=at):
        view = await wait_for_end(database, saga_id)
    assert struck
    return view


# What becomes of a saga when a host is declared gone as the step begins, and
# where the guest runs then.
GONE = [
    ("move", "b", "prepare_target", DONE, ["c"]),  # the next candidate takes its place
    ("move", "b", "stop", UNDONE, ["a"]),
    ("move", "b", "park", UNDONE, ["a"]),
    ("move", "b", "copy", UNDONE, ["a"]),
    ("move", "b", "build", UNDONE, ["a"]),
    ("move", "b", "start", UNDONE, ["a"]),
    ("move", "a", "prepare_target", UNDONE, []),
    ("move", "a", "stop", STUCK, []),
    ("move", "a", "park", STUCK, []),
    ("move", "a", "copy", STUCK, []),
    ("move", "a", "build", DONE, ["b"]),
    ("move", "a", "start", DONE, ["b"]),
    ("confirm", "a", "verify_target", DONE, ["b"]),
    ("confirm", "a", "discard_source", DONE, ["b"]),
    ("confirm", "a", "forget", DONE, ["b"]),
    ("confirm", "b", "verify_target", UNDONE, []),
    ("confirm", "b", "forget", DONE, []),
    ("revert", "b", "stop_target", DONE, ["a"]),
    ("revert", "b", "undefine_target", DONE, ["a"]),
    ("revert", "b", "unpark_source", DONE, ["a"]),
    ("revert", "b", "start_source", DONE, ["a"]),
    ("revert", "b", "remove_target", DONE, ["a"]),
    ("revert", "b", "forget", DONE, ["a"]),
    ("revert", "a", "stop_target", UNDONE, ["b"]),
    ("revert", "a", "undefine_target", UNDONE, ["b"]),
    ("revert", "a", "unpark_source", UNDONE, ["b"]),
    ("revert", "a", "start_source", STUCK, []),
    ("revert", "a", "remove_target", STUCK, []),
    ("revert", "a", "forget", DONE, []),
]


@pytest.mark.parametrize(("kind", "host", "step", "ends", "runs_on"), GONE)
async def test_a_host_declared_gone(
    database: Database, kind: str, host: str, step: str, ends: SagaState, runs_on: list[str]
) -> None:
    world = WORLDS[kind]()
    view = await conduct_and_strike(database, world, step, world.fleet.hosts[host].lose)
    assert view.state is ends, view
    assert world.fleet.runs_on == runs_on
    row = await database.run(world.row)
    assert (row.state is MigrationState.STUCK) == (ends is STUCK)
    if ends is not DONE:
        assert row.error is not None
        assert row.error["reason"] == "HOST_GONE"
    if ends is STUCK:
        await database.run(
            lambda tx: sql_saga.abandon(tx, world.saga, view.id, "ABANDONED", "Looked at.")
        )
        await database.run(lambda tx: world.check_claims(tx, instance_on=owner(world), move_on=""))


def owner(world: MoveWorld) -> str:
    """Host that the machine is the machine of, by the steps that were done."""
    return "b" if world.saga.kind == "revert" and not world.fleet.hosts["a"].gone else "a"


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
async def test_a_revert_whose_parked_copy_was_lost_leaves_the_machine_on_the_target(
    database: Database, running: bool
) -> None:
    """As when the source's disk is not mounted: putting back nothing must not pass for success."""
    world = RevertWorld(running=running)
    view = await conduct_and_strike(
        database, world, "unpark_source", world.fleet.hosts["a"].lose_machine
    )
    assert view.state is UNDONE
    assert world.fleet.owner == ["b"]
    assert world.fleet.runs_on == (["b"] if running else [])
    row = await database.run(world.row)
    assert row.state is MigrationState.AWAITING_CONFIRM
    assert row.error is not None
    assert row.error["reason"] == "DOMAIN_NOT_FOUND"


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
async def test_a_failed_move_whose_parked_copy_was_lost_keeps_the_copy_on_the_target(
    database: Database, running: bool
) -> None:
    world = MoveWorld(running=running)
    world.saga = with_step(world.saga, "switch_owner", failing)
    view = await conduct_and_strike(database, world, "build", world.fleet.hosts["a"].lose_machine)
    assert view.state is STUCK
    assert world.fleet.hosts["b"].received
    row = await database.run(world.row)
    assert row.error is not None
    assert row.error["reason"] == "DOMAIN_NOT_FOUND"


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
@pytest.mark.parametrize("step", ["prepare_target", "stop"])
async def test_a_machine_undefined_by_hand_before_it_is_parked_ends_its_move(
    database: Database, step: str, running: bool
) -> None:
    world = MoveWorld(running=running)
    view = await conduct_and_strike(database, world, step, world.fleet.hosts["a"].undefine)
    assert view.state is UNDONE
    row = await database.run(world.row)
    assert row.state is MigrationState.FAILED
    assert row.error is not None
    assert row.error["reason"] == "DOMAIN_NOT_FOUND"
    assert "PrepareTarget" in {name for _, name in world.fleet.calls} or step == "prepare_target"
    await database.run(lambda tx: world.check_claims(tx, instance_on="a", move_on=""))
    assert world.fleet.hosts["b"].traces == set()


async def test_a_machine_undefined_by_hand_on_its_target_is_not_confirmed(
    database: Database,
) -> None:
    world = ConfirmWorld()
    view = await conduct_and_strike(
        database, world, "verify_target", world.fleet.hosts["b"].undefine
    )
    assert view.state is UNDONE
    assert world.fleet.hosts["a"].parked
    row = await database.run(world.row)
    assert row.state is MigrationState.AWAITING_CONFIRM
    assert row.error is not None
    assert row.error["reason"] == "DOMAIN_NOT_FOUND"


async def test_a_machine_without_its_disks_on_the_target_is_not_confirmed(
    database: Database,
) -> None:
    world = ConfirmWorld()
    view = await conduct_and_strike(
        database, world, "verify_target", world.fleet.hosts["b"].lose_disks
    )
    assert view.state is UNDONE
    assert world.fleet.hosts["a"].parked
    row = await database.run(world.row)
    assert row.error is not None
    assert row.error["reason"] == "DISK_MISSING"


async def test_a_machine_undefined_by_hand_after_its_stop_ends_its_move(
    database: Database,
) -> None:
    world = MoveWorld()
    world.saga = with_step(world.saga, "stop", failing_late)
    view = await conduct_and_strike(
        database, world, "stop", world.fleet.hosts["a"].undefine, undoing=True
    )
    assert view.state is UNDONE
    assert world.fleet.hosts["a"].traces == set()


@pytest.mark.parametrize("step", ["stop_target", "undefine_target"])
async def test_a_machine_undefined_by_hand_on_its_target_can_be_reverted(
    database: Database, step: str
) -> None:
    world = RevertWorld()
    view = await conduct_and_strike(database, world, step, world.fleet.hosts["b"].undefine)
    assert view.state is DONE
    await database.run(world.check_done)


async def test_a_failed_move_keeps_its_reason_through_a_troubled_way_back(
    database: Database,
) -> None:
    """What was in the way of the undo is over; what made the move fail is not."""
    world = MoveWorld()
    saga = with_step(world.saga, "build", failing_late)
    calls = 0
    original = world.fleet._EnsureUnparked

    def flaky(host: ModelHost, request: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise Transient(DroverError(Reason.HOST_UNREACHABLE, "Silence."))
        if calls == 2:
            raise DroverError(Reason.DISK_IO_ERROR, "Bad sector.")
        return original(host, request)

    world.fleet._EnsureUnparked = flaky  # type: ignore[method-assign]
    view = await conduct(database, world, saga=saga)
    assert view.state is STUCK
    row = await database.run(world.row)
    assert row.error is not None
    assert row.error["reason"] == "DISK_IO_ERROR"
    await database.run(lambda tx: sql_saga.retry_stuck(tx, saga, view.id))
    async with running(database, world, saga=saga):
        view = await wait_for_end(database, view.id)
    assert view.state is UNDONE
    await database.run(world.check_undone)
    row = await database.run(world.row)
    assert row.error is not None
    assert row.error["reason"] == "TARGET_LACKS_SPACE"


async def test_a_copy_that_is_cut_off_again_and_again_says_so_and_slows_down(
    database: Database,
) -> None:
    world = MoveWorld()
    world.fleet.copy_cuts = 4
    seen: list[tuple[str, int]] = []

    async def look(point: str, saga_id: str, step: str, kind: str) -> None:
        if (point, step) == ("before-effect", "copy"):
            row = await database.run(world.row)
            if row.error is not None:
                seen.append((row.error["reason"], row.attempt))

    saga_id = await database.run(world.begin)
    async with running(database, world, crash_points=look):
        view = await wait_for_end(database, saga_id)
    assert view.state is DONE
    assert [reason for reason, _ in seen[:1]] == ["COPY_INTERRUPTED"]
    assert max(attempt for _, attempt in seen) >= 4
    row = await database.run(world.row)
    assert row.error is None


async def test_a_machine_put_back_by_hand_on_its_source_is_not_started_on_the_target(
    database: Database,
) -> None:
    world = MoveWorld()
    uid = world.domain.uuid

    async def put_back(point: str, saga_id: str, step: str, kind: str) -> None:
        if (point, step, kind) == ("after-append", "switch_owner", "SUCCEEDED"):
            await database.run(lambda tx: instances.update(tx, uid, conflict="hosts/a, hosts/b"))

    saga_id = await database.run(world.begin)
    async with running(database, world, crash_points=put_back):
        await wait_until(database, saga_id, lambda view: view.attempt > 3)
        row = await database.run(world.row)
        assert (row.state, row.step) == (MigrationState.FINISHING, "start")
        assert row.error is not None
        assert row.error["reason"] == "INSTANCE_CONFLICT"
        assert world.fleet.runs_on == []
        await database.run(lambda tx: instances.update(tx, uid, conflict=""))
        view = await wait_for_end(database, saga_id)
    assert view.state is DONE
    await database.run(world.check_done)


async def test_an_abandoned_machine_needs_a_look(database: Database) -> None:
    world = MoveWorld()
    view = await conduct_and_strike(database, world, "copy", world.fleet.hosts["a"].lose)
    await database.run(lambda tx: sql_saga.abandon(tx, world.saga, view.id, "ABANDONED", "Gone."))
    instance = await database.run(lambda tx: instances.get(tx, world.domain.uuid))
    assert instance.vm_state is VmState.ERROR
    last = (await database.run(lambda tx: sql_saga.get(tx, view.id))).events[-1]
    assert last.kind is EventKind.ABANDONED
