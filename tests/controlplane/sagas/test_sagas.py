"""The matrix over the real sagas, on both databases, over a model of hosts."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
from sqlalchemy import Connection
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from controlplane.common.errors import DroverError, Transient
from controlplane.common.reasons import Reason
from controlplane.domain.model import Size
from controlplane.domain.states import MigrationState
from controlplane.saga.definition import Saga, Step, StepContext, StepKind
from controlplane.saga.log import SagaState
from controlplane.sagas import ALL, MOVE, REVERT
from controlplane.store import claims, instances, migrations, sightings, sql_saga
from controlplane.store.engine import Database
from tests.controlplane.machines import NOW
from tests.controlplane.sagas.model import ModelHost, Pause
from tests.controlplane.sagas.worlds import ConfirmWorld, MoveWorld, RevertWorld
from tests.engine import matrix
from tests.engine.harness import QUICK, conduct, failing, running, wait_for_end, with_step

WORLDS = {"move": MoveWorld, "confirm": ConfirmWorld, "revert": RevertWorld}
EVERY = [(saga.kind, step.name) for saga in ALL for step in saga.steps]
UNDOABLE = [(saga.kind, step) for saga in ALL for step in matrix.before_pivot(saga)]


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
@pytest.mark.parametrize("kind", WORLDS)
async def test_succeeds(database: Database, kind: str, running: bool) -> None:
    await matrix.succeeds(database, WORLDS[kind](running=running))


@pytest.mark.parametrize("kind", WORLDS)
async def test_succeeds_with_every_action_repeated(database: Database, kind: str) -> None:
    await matrix.succeeds_with_every_action_repeated(database, WORLDS[kind]())


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("kind", "step"), UNDOABLE)
async def test_unwinds(database: Database, kind: str, step: str, late: bool) -> None:
    await matrix.unwinds(database, WORLDS[kind](), step, late=late)


@pytest.mark.parametrize(("kind", "step"), UNDOABLE)
async def test_unwinds_with_every_undo_repeated(database: Database, kind: str, step: str) -> None:
    await matrix.unwinds_with_every_undo_repeated(database, WORLDS[kind](), step)


@pytest.mark.parametrize("step", [step.name for step in MOVE.steps])
async def test_a_move_is_cancelled_at_every_step(database: Database, step: str) -> None:
    world = MoveWorld()
    await matrix.cancels(database, world, step)
    row = await database.run(world.row)
    if row.state is not MigrationState.AWAITING_CONFIRM:
        assert row.state is MigrationState.CANCELLED
        assert row.error is not None
        assert row.error["reason"] == Reason.CANCELLED.name


@pytest.mark.parametrize(
    ("kind", "lost"),
    [(saga.kind, lost) for saga in ALL for lost in range(1, 2 * len(saga.steps) + 2)],
)
async def test_resumes_from_a_shortened_log(database: Database, kind: str, lost: int) -> None:
    await matrix.resumes_from_a_shortened_log(database, WORLDS[kind](), lost)


@pytest.mark.parametrize(
    ("kind", "fail", "step"),
    [("move", "start", step.name) for step in MOVE.steps[:-1] if step.undo is not None]
    + [("revert", "switch_back", step.name) for step in REVERT.steps[:3]],
)
async def test_a_failed_undo_is_stuck_until_retried(
    database: Database, kind: str, fail: str, step: str
) -> None:
    await matrix.stuck_until_retried(database, WORLDS[kind](), fail, step)


@pytest.mark.parametrize(
    ("kind", "fail"),
    [
        ("move", ""),
        ("move", "start"),
        ("confirm", ""),
        ("confirm", "verify_target"),
        ("revert", ""),
        ("revert", "unpark_source"),
    ],
)
async def test_converges_when_struck_everywhere(database: Database, kind: str, fail: str) -> None:
    await matrix.converges_when_struck_everywhere(database, WORLDS[kind](), fail)


@pytest.mark.parametrize(
    ("kind", "step"), [("move", "build"), ("confirm", "verify_target"), ("revert", "unpark_source")]
)
async def test_resumes_from_any_shortened_way_back(
    database: Database, kind: str, step: str
) -> None:
    await matrix.resumes_from_any_shortened_way_back(database, WORLDS[kind], step)


FENCED = [
    (saga.kind, step.name)
    for saga in ALL
    for step in saga.steps
    if step.kind is StepKind.REMOTE and step.name != "verify_target"  # that one only looks
]


@pytest.mark.parametrize(("kind", "step"), FENCED)
async def test_a_call_from_a_runner_paused_past_its_lease_is_refused(
    database: Database, kind: str, step: str
) -> None:
    """The call is on its way when its runner is paused; another one finishes; then it arrives."""
    world = WORLDS[kind]()
    world.fleet.pause = pause = Pause(step)
    config = dataclasses.replace(QUICK, lease_seconds=0.4)
    saga_id = await database.run(world.begin)
    async with running(database, world, config=config) as slow:
        await asyncio.wait_for(pause.begun.wait(), 10)
        for loop in slow._loops:
            loop.cancel()
        async with running(database, world):
            view = await wait_for_end(database, saga_id)
        assert view.state is SagaState.DONE
        pause.go_on.set()
        await asyncio.wait_for(pause.arrived.wait(), 10)
    assert world.fleet.refused == 1
    assert await database.run(lambda tx: sql_saga.get(tx, saga_id)) == view
    await database.run(world.check_done)


async def test_a_stopped_machine_stays_stopped_when_a_move_fails(database: Database) -> None:
    await matrix.unwinds(database, MoveWorld(running=False), "build", late=True)


async def test_a_guest_that_does_not_start_on_the_target_runs_on_the_source(
    database: Database,
) -> None:
    world = MoveWorld()
    world.fleet.start_fails = True
    view = await conduct(database, world)
    assert view.state is SagaState.UNDONE
    await database.run(world.check_undone)
    row = await database.run(world.row)
    assert row.state is MigrationState.FAILED
    assert row.error is not None
    assert row.error["reason"] == "START_FAILED"


@pytest.mark.parametrize(
    ("kind", "fails_at", "stays_on"),
    [
        ("move", "", "b"),
        ("move", "start", "a"),
        ("revert", "", "a"),
        ("revert", "switch_back", "b"),
    ],
    ids=["moved", "failed", "reverted", "not-reverted"],
)
async def test_a_host_that_gave_the_machine_up_is_not_taken_for_a_duplicate(
    database: Database, kind: str, fails_at: str, stays_on: str
) -> None:
    """Its last report is older than that; the next one may be seconds away."""
    world = WORLDS[kind]()
    begin = world.begin

    def begin_seen_on_both(tx: Connection) -> str:
        saga_id = begin(tx)
        for name in ("a", "b"):
            sightings.replace(tx, name, [world.domain], NOW, NOW, asked=NOW)
        return saga_id

    world.begin = begin_seen_on_both  # type: ignore[method-assign]
    saga = with_step(world.saga, fails_at, failing) if fails_at else world.saga
    view = await conduct(database, world, saga=saga)
    assert view.state is (SagaState.UNDONE if fails_at else SagaState.DONE)
    seen = await database.run(lambda tx: sightings.of_uuids(tx, [world.domain.uuid]))
    current = {host for host, sighting in seen[world.domain.uuid].items() if sighting.current}
    # The host that the machine is on reports it again by and by.
    assert current <= {stays_on}


async def test_a_guest_that_somebody_started_on_the_target_too_early_is_taken_back(
    database: Database,
) -> None:
    """An operator's `virsh start` between build and the change of owner leaves no stuck move."""
    world = MoveWorld()

    def started_by_hand(step: Step) -> Step:
        def start_and_fail(tx: Connection, ctx: StepContext) -> Any:
            world.fleet.hosts["b"].running = True
            raise DroverError(Reason.INSTANCE_STATE, "It has changed.")

        return dataclasses.replace(step, action=start_and_fail)

    saga = with_step(world.saga, "switch_owner", started_by_hand)
    view = await conduct(database, world, saga=saga)
    assert view.state is SagaState.UNDONE
    await database.run(world.check_undone)


async def test_a_target_that_refuses_hands_over_to_the_next(database: Database) -> None:
    world = MoveWorld()
    world.fleet.hosts["b"].refusal = DroverError(Reason.TARGET_LACKS_SPACE, "Full.")
    view = await conduct(database, world)
    assert view.state is SagaState.DONE
    await database.run(lambda tx: world.check_rests_on_target(tx, "c"))
    row = await database.run(world.row)
    assert row.placement.chosen_host == "hosts/c"
    refused = next(v for v in row.placement.verdicts if v.host == "hosts/b")
    assert (refused.fits, refused.reason) == (False, "TARGET_LACKS_SPACE")


async def test_a_target_out_of_reach_of_the_source_hands_over_before_the_guest_is_stopped(
    database: Database,
) -> None:
    world = MoveWorld()
    world.fleet.out_of_reach = {"b:1"}
    view = await conduct(database, world)
    assert view.state is SagaState.DONE
    await database.run(lambda tx: world.check_rests_on_target(tx, "c"))
    assert world.fleet.hosts["b"].traces == set()
    calls = [name for host, name in world.fleet.calls if host in ("a", "b")]
    assert calls.index("EnsureAbsent") < calls.index("EnsureStopped")


async def test_when_every_target_refuses_the_guest_was_never_stopped(
    database: Database,
) -> None:
    world = MoveWorld()
    for name in ("b", "c"):
        world.fleet.hosts[name].refusal = DroverError(Reason.TARGET_LACKS_SPACE, "Full.")
    view = await conduct(database, world)
    assert view.state is SagaState.UNDONE
    await database.run(world.check_undone)
    assert ("a", "EnsureStopped") not in world.fleet.calls


async def test_a_target_that_is_gone_does_not_hold_the_guest_up(database: Database) -> None:
    """It dies after the copy; the operator says so; the guest comes back on the source."""
    world = MoveWorld()
    world.fleet.start_fails = True
    original = world.fleet._EnsureStarted

    def die(host: ModelHost, request: Any) -> Any:
        world.fleet.hosts["b"].gone = True
        world.fleet.hosts["b"].defined = False
        return original(host, request)

    world.fleet._EnsureStarted = die  # type: ignore[method-assign]
    view = await conduct(database, world)
    assert view.state is SagaState.UNDONE
    assert world.fleet.runs_on == ["a"]


async def test_the_order_that_keeps_the_only_copy(database: Database) -> None:
    """I1 and I2 as an order of calls: nothing is deleted before the other side has it."""
    revert = RevertWorld()
    await conduct(database, revert)
    order = [name for _, name in revert.fleet.calls]
    assert order.index("EnsureUndefined") < order.index("EnsureUnparked")
    assert order.index("RestorePower") < order.index("EnsureAbsent")
    confirm = ConfirmWorld()
    await conduct(database, confirm)
    order = [name for _, name in confirm.fleet.calls]
    assert order.index("GetDomain") < order.index("DiscardParked")


async def test_history_tells_the_whole_story(database: Database) -> None:
    world = MoveWorld()
    await conduct(database, world)
    events = await database.run(lambda tx: migrations.events(tx, world.migration_id))
    told = [(e.step, e.kind) for e in events if e.step]
    assert told == [(step.name, kind) for step in MOVE.steps for kind in ("STARTED", "SUCCEEDED")]
    row = await database.run(world.row)
    assert row.stop_time is not None
    assert row.running_time is not None
    assert row.running_time >= row.stop_time
    assert [r.volume_id for r in row.receipts] == ["vda", "baggage"]


async def test_warnings_of_both_hosts_stay_with_the_move(database: Database) -> None:
    """Those of the hosts that it leaves and goes to, as they were found last."""
    world = MoveWorld()
    world.fleet.hosts["b"].refusal = DroverError(Reason.TARGET_LACKS_SPACE, "Full.")
    world.fleet.warnings = {"CheckSource": "Old.", "PrepareTarget": "Tight.", "EnsureParked": "X."}
    begin = world.begin

    def begin_warned(tx: Connection) -> str:
        saga_id = begin(tx)
        placement = migrations.get(tx, world.migration_id).placement
        placement.warnings.extend(["hosts/a: Older.", "hosts/b: Tight."])
        migrations.update(tx, world.migration_id, placement=placement)
        return saga_id

    world.begin = begin_warned  # type: ignore[method-assign]
    await conduct(database, world)
    row = await database.run(world.row)
    assert row.target_host == "c"
    assert list(row.placement.warnings) == ["hosts/a: Old.", "hosts/c: Tight.", "hosts/a: X."]


async def test_log_lines_say_what_they_are_about(database: Database) -> None:
    world = MoveWorld()
    original = world.fleet._EnsureParked

    def silent(host: ModelHost, request: Any) -> Any:
        world.fleet._EnsureParked = original  # type: ignore[method-assign]
        raise Transient(
            DroverError(Reason.HOST_UNREACHABLE, "No answer.", metadata={"host": host.name})
        )

    world.fleet._EnsureParked = silent  # type: ignore[method-assign]
    saga = with_step(world.saga, "copy", failing)
    with capture_logs(processors=[merge_contextvars]) as lines:
        view = await conduct(database, world, saga=saga)
    about = {"saga": view.id, "saga_kind": "move", "migration": world.migration_id}
    told = [
        (line["event"], line.get("step", ""), line["log_level"])
        for line in lines
        if about.items() <= line.items() and line["instance"] == world.domain.uuid
    ]
    assert ("started", "admit", "info") in told
    assert ("failed", "copy", "warning") in told
    assert ("undo finished", "park", "info") in told
    assert told[-1][:2] == ("undone", "")
    retried = next(line for line in lines if line["event"] == "step will be tried again")
    assert (retried["host"], retried["step"], retried["migration"]) == (
        "a",
        "park",
        world.migration_id,
    )
    assert len(lines) == len(view.events) + 1


@pytest.mark.parametrize("saga", ALL, ids=lambda saga: saga.kind)
def test_every_step_is_described(saga: Saga) -> None:
    for step in saga.steps:
        assert step.doc.endswith(".")
        if step.undo is None:
            assert "No undo" in step.doc
        else:
            assert step.doc.startswith("Undone")


async def test_a_move_keeps_room_on_both_hosts_until_it_ends(database: Database) -> None:
    world = MoveWorld()
    await conduct(database, world)

    def held(tx: Connection) -> tuple[str, str]:
        own = claims.find(tx, claims.instance_consumer(world.domain.uuid))
        other = claims.find(tx, claims.migration_consumer(world.migration_id))
        assert own is not None
        assert other is not None
        return own.host, other.host

    assert await database.run(held) == ("b", "a")
    instance = await database.run(lambda tx: instances.get(tx, world.domain.uuid))
    assert instance.migration_id == world.migration_id


async def test_an_alternate_that_has_filled_up_meanwhile_is_passed_over(
    database: Database,
) -> None:
    class Crowded(MoveWorld):
        def begin(self, tx: Connection) -> str:
            saga_id = super().begin(tx)
            claims.put(tx, "instances/other", "c", Size(vcpus=32, memory_mib=16384))
            return saga_id

    world = Crowded()
    world.fleet.hosts["b"].refusal = DroverError(Reason.TARGET_LACKS_SPACE, "Full.")
    view = await conduct(database, world)
    assert view.state is SagaState.UNDONE
    await database.run(world.check_undone)
    row = await database.run(world.row)
    assert row.error is not None
    assert row.error["reason"] == Reason.TARGET_LACKS_SPACE.name
    refused = {v.host: v.reason for v in row.placement.verdicts if not v.fits}
    assert refused["hosts/c"] == Reason.CLAIM_LOST.name
    assert not any(host == "c" for host, _ in world.fleet.calls)
