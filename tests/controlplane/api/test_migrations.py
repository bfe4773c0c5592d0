from __future__ import annotations

import asyncio
import uuid
from datetime import timedelta
from typing import Any

import grpc.aio
import pytest
from sqlalchemy import Connection

from controlplane.api import moves
from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.domain.model import Migration
from controlplane.domain.states import MigrationState, PowerState, TaskState, VmState
from controlplane.fleet.autoconfirm import AutoConfirmer
from controlplane.saga.definition import decode
from controlplane.saga.log import EventKind, SagaState, SagaView
from controlplane.sagas.common import MigrationParams
from controlplane.store import audit, claims, hosts, instances, migrations, sql_saga
from controlplane.store.saga_tables import sagas
from controlplane.store.sql_saga import SqlSagaStore
from controlplane.store.types import utc_now
from controlplane.v1 import host_service_pb2, instance_pb2, instance_service_pb2, migration_pb2
from controlplane.v1 import migration_service_pb2 as pb
from hostd.v1 import job_pb2
from tests.controlplane.api.conftest import ADMIN, SAGAS, Api, by, error_of, refusal, until
from tests.controlplane.machines import make_domain

MEMBER = "drover://lab/member/mo/default"
STRANGER = "drover://lab/member/stan/other"
UID = make_domain().uuid
State = migration_pb2.Migration


@pytest.fixture
async def moving(api: Api) -> Api:
    """Hosts a and b; web1 is on its way from a to b."""
    for name in ("a", "b"):
        await api.add_host(name)
    api.simulated["a"].put(make_domain())
    await api.report()
    await api.migrations.CreateMigration(
        pb.CreateMigrationRequest(instance="instances/web1", host="hosts/b")
    )
    return api


async def the_move(api: Api) -> Migration:
    return await api.run(lambda tx: migrations.list_page(tx, limit=1)[0])


async def name_of(api: Api) -> str:
    return f"migrations/{(await the_move(api)).id}"


async def change(api: Api, **changes: Any) -> Migration:
    move = await the_move(api)
    return await api.run(lambda tx: migrations.update(tx, move.id, **changes))


async def finish_move(api: Api) -> None:
    """Bring the rows to where the move saga leaves them: on b, awaiting confirm."""
    move = await the_move(api)

    def work(tx: Connection) -> None:
        end_saga(tx, move)
        migrations.update(tx, move.id, state=MigrationState.AWAITING_CONFIRM)
        instances.update(tx, UID, host="b", vm_state=VmState.RESIZED, task_state=None)

    await api.run(work)


def end_saga(tx: Connection, move: Migration) -> None:
    tx.execute(sagas.update().where(sagas.c.id == move.saga_id).values(state=SagaState.DONE.value))


async def get_stuck(api: Api) -> None:
    """Have the undo of the first remote step fail for good, as the kernel writes it down."""
    move = await the_move(api)
    store = SqlSagaStore()
    failure = DroverError(Reason.HOST_GONE, "Host b is gone.").to_json()

    def work(tx: Connection) -> None:
        (lease,) = store.claim(tx, "test", [("move", SAGAS.move.version)], 30.0, 1)
        first = SAGAS.move.steps[1].name
        store.append(tx, lease, EventKind.STARTED, step=SAGAS.move.steps[0].name)
        store.append(tx, lease, EventKind.SUCCEEDED, step=SAGAS.move.steps[0].name)
        store.append(tx, lease, EventKind.STARTED, step=first)
        store.append(tx, lease, EventKind.FAILED, step=first, error=failure)
        store.append(tx, lease, EventKind.UNWINDING, state=SagaState.UNWINDING)
        store.append(tx, lease, EventKind.UNDO_STARTED, step=first)
        store.append(tx, lease, EventKind.UNDO_FAILED, step=first, error=failure)
        store.append(tx, lease, EventKind.STUCK, state=SagaState.STUCK, error=failure)
        migrations.update(tx, move.id, state=MigrationState.STUCK, error=failure)

    await api.run(work)


async def saga_of(api: Api) -> SagaView:
    move = await the_move(api)
    return await api.run(lambda tx: sql_saga.get(tx, move.saga_id))


# --- confirm and revert ----------------------------------------------------------


async def test_the_saga_of_a_move_has_parameters_that_its_definition_reads(moving: Api) -> None:
    view = await saga_of(moving)
    move = await the_move(moving)
    assert decode(view.params, MigrationParams) == MigrationParams(migration_id=move.id)
    assert (view.kind, view.subject) == ("move", f"instances/{UID}")


@pytest.mark.parametrize(
    ("action", "state", "task"),
    [
        ("Confirm", State.STATE_CONFIRMING, TaskState.RESIZE_CONFIRMING),
        ("Revert", State.STATE_REVERTING, TaskState.RESIZE_REVERTING),
    ],
)
async def test_a_finished_move_is_confirmed_or_reverted(
    moving: Api, action: str, state: int, task: TaskState
) -> None:
    await finish_move(moving)
    await change(moving, confirm_deadline=utc_now() + timedelta(hours=1))
    method = getattr(moving.migrations, f"{action}Migration")
    request = getattr(pb, f"{action}MigrationRequest")(
        name=await name_of(moving), request_id=str(uuid.uuid4())
    )
    answer = await method(request, metadata=by(MEMBER))
    assert answer.state == state
    assert await method(request, metadata=by(MEMBER)) == answer
    view = await saga_of(moving)
    assert (view.kind, view.subject) == (action.lower(), f"instances/{UID}")
    instance = await moving.run(lambda tx: instances.get(tx, UID))
    assert instance.task_state is task
    # A revert that fails must not be followed by an automatic confirm.
    assert answer.HasField("confirm_deadline") == (action == "Confirm")
    twice = await refusal(method(type(request)(name=request.name)))
    assert twice.reason is Reason.MIGRATION_STATE


@pytest.mark.parametrize("action", ["Confirm", "Revert"])
async def test_neither_confirm_nor_revert_happens_against_the_rules(
    moving: Api, action: str
) -> None:
    method = getattr(moving.migrations, f"{action}Migration")
    request = getattr(pb, f"{action}MigrationRequest")
    name = await name_of(moving)
    early = await refusal(method(request(name=name)))
    assert (early.reason, early.metadata["state"]) == (Reason.MIGRATION_STATE, "PENDING")
    await finish_move(moving)
    stale = await refusal(method(request(name=name, etag="g1")))
    assert stale.reason is Reason.ETAG_MISMATCH
    stranger = await refusal(method(request(name=name), metadata=by(STRANGER)))
    assert stranger.reason is Reason.PERMISSION_DENIED
    await moving.instances.LockInstance(
        instance_service_pb2.LockInstanceRequest(name="instances/web1", reason="audit")
    )
    locked = await refusal(method(request(name=name), metadata=by(MEMBER)))
    assert locked.reason is Reason.INSTANCE_LOCKED
    moving.clock.advance(seconds=60)
    dead = await refusal(method(request(name=name)))
    assert dead.reason is Reason.HOST_DEAD
    assert (await the_move(moving)).state is MigrationState.AWAITING_CONFIRM


async def test_a_revert_needs_the_source_and_a_confirm_does_not(moving: Api) -> None:
    await finish_move(moving)
    moving.clock.advance(seconds=60)
    await moving.hosts.DeclareHostGone(
        host_service_pb2.DeclareHostGoneRequest(name="hosts/a", reason="fire")
    )
    await moving.report("b")
    name = await name_of(moving)
    gone = await refusal(moving.migrations.RevertMigration(pb.RevertMigrationRequest(name=name)))
    assert gone.reason is Reason.HOST_GONE
    answer = await moving.migrations.ConfirmMigration(pb.ConfirmMigrationRequest(name=name))
    assert answer.state == State.STATE_CONFIRMING


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", Reason.INVALID_NAME),
        ("migrations/1", Reason.INVALID_NAME),
        (f"migrations/{uuid.uuid4()}", Reason.MIGRATION_NOT_FOUND),
    ],
)
async def test_malformed_and_unknown_moves_are_refused_everywhere(
    api: Api, name: str, reason: Reason
) -> None:
    stub = api.migrations
    calls: list[grpc.aio.UnaryUnaryCall[Any, Any]] = [
        stub.GetMigration(pb.GetMigrationRequest(name=name)),
        stub.ConfirmMigration(pb.ConfirmMigrationRequest(name=name)),
        stub.RevertMigration(pb.RevertMigrationRequest(name=name)),
        stub.CancelMigration(pb.CancelMigrationRequest(name=name)),
        stub.RetryMigration(pb.RetryMigrationRequest(name=name)),
        stub.AbandonMigration(pb.AbandonMigrationRequest(name=name, comment="x")),
        stub.ListMigrationEvents(pb.ListMigrationEventsRequest(parent=name)),
    ]
    for call in calls:
        assert (await refusal(call)).reason is reason
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.WatchMigration(pb.WatchMigrationRequest(name=name)):
            pass
    assert error_of(caught.value).reason is reason


# --- cancel, retry, abandon --------------------------------------------------------


async def test_a_cancel_turns_the_saga_round_and_may_be_repeated(moving: Api) -> None:
    request = pb.CancelMigrationRequest(name=await name_of(moving))
    first = await moving.migrations.CancelMigration(request)
    assert first.cancel_requested
    assert (await saga_of(moving)).cancel_requested
    assert await moving.migrations.CancelMigration(request) == first


async def test_a_finished_move_is_not_cancelled(moving: Api) -> None:
    await finish_move(moving)
    request = pb.CancelMigrationRequest(name=await name_of(moving))
    late = await refusal(moving.migrations.CancelMigration(request))
    assert late.reason is Reason.CANCEL_TOO_LATE
    await change(moving, state=MigrationState.FINISHING)
    raced = await refusal(moving.migrations.CancelMigration(request))
    assert raced.reason is Reason.CANCEL_TOO_LATE
    await change(moving, state=MigrationState.FAILED)
    over = await refusal(moving.migrations.CancelMigration(request))
    assert over.reason is Reason.MIGRATION_STATE


async def test_a_stuck_move_is_tried_again(moving: Api) -> None:
    name = await name_of(moving)
    request = pb.RetryMigrationRequest(name=name)
    error = await refusal(moving.migrations.RetryMigration(request))
    assert error.reason is Reason.MIGRATION_STATE
    await get_stuck(moving)
    answer = await moving.migrations.RetryMigration(request)
    assert answer.state == State.STATE_UNWINDING
    assert not answer.HasField("error")
    assert (await saga_of(moving)).state is SagaState.UNWINDING


async def test_an_abandoned_move_frees_what_it_held_and_says_why(moving: Api) -> None:
    name = await name_of(moving)
    request = pb.AbandonMigrationRequest(name=name, comment="restored by hand")
    early = await refusal(moving.migrations.AbandonMigration(request))
    assert early.reason is Reason.MIGRATION_STATE
    await get_stuck(moving)
    silent = await refusal(
        moving.migrations.AbandonMigration(pb.AbandonMigrationRequest(name=name))
    )
    assert silent.reason is Reason.INVALID_FIELD
    answer = await moving.migrations.AbandonMigration(request)
    assert answer.state == State.STATE_ABANDONED
    error = DroverError.from_status(answer.error)
    assert error is not None
    assert error.reason is Reason.HOST_GONE
    assert error.message == f"Host b is gone. Abandoned by {ADMIN}: restored by hand"
    assert await moving.run(lambda tx: claims.find(tx, name)) is None
    instance = await moving.instances.GetInstance(
        instance_service_pb2.GetInstanceRequest(name="instances/web1")
    )
    assert (instance.migration, instance.task_state) == ("", 0)
    assert instance.vm_state == instance_pb2.Instance.VM_STATE_ERROR
    assert (await saga_of(moving)).state is SagaState.ABANDONED


# --- auto-confirm ------------------------------------------------------------------


async def test_a_move_is_confirmed_once_when_its_window_is_over(moving: Api) -> None:
    await finish_move(moving)
    begun: list[str] = []

    def begin(tx: Connection, move: Migration) -> None:
        begun.append(move.id)
        moves.confirm(tx, moving.services, move, by="the confirm policy")

    confirmer = AutoConfirmer(moving.database, begin, clock=moving.clock)
    assert await confirmer.confirm_due() == 0
    await change(moving, confirm_deadline=moving.clock() + timedelta(minutes=5))
    assert await confirmer.confirm_due() == 0
    moving.clock.advance(minutes=6)
    assert await confirmer.confirm_due() == 0, "a dead host has to answer first"
    assert (await the_move(moving)).state is MigrationState.AWAITING_CONFIRM
    assert len(begun) == 1
    assert await confirmer.confirm_due() == 0
    assert len(begun) == 1, "the next attempt comes after a pause"
    moving.clock.advance(minutes=2)
    await moving.report()
    await moving.run(lambda tx: instances.update(tx, UID, lock_reason="x", locked_by=ADMIN))
    assert await confirmer.confirm_due() == 0
    await moving.run(lambda tx: instances.update(tx, UID, lock_reason="", locked_by=""))
    others = [AutoConfirmer(moving.database, begin, clock=moving.clock) for _ in range(3)]
    assert sum(await asyncio.gather(*(other.confirm_due() for other in others))) == 1
    assert (await the_move(moving)).state is MigrationState.CONFIRMING
    assert (await saga_of(moving)).kind == "confirm"


# --- lists -------------------------------------------------------------------------


async def test_moves_are_listed_newest_first_and_filtered(moving: Api) -> None:
    names = [await name_of(moving)]
    for _ in range(4):
        await moving.run(lambda tx: instances.update(tx, UID, task_state=None, migration_id=""))
        await change(moving, state=MigrationState.FAILED)
        move = await the_move(moving)
        await moving.run(lambda tx, move=move: end_saga(tx, move))  # type: ignore[misc]
        await moving.run(lambda tx: claims.drop(tx, names[-1]))
        created = await moving.migrations.CreateMigration(
            pb.CreateMigrationRequest(instance="instances/web1")
        )
        names.append(created.name)
    expected = names[::-1]
    found: list[str] = []
    request = pb.ListMigrationsRequest(page_size=2, instance="instances/web1", host="hosts/b")
    while True:
        page = await moving.migrations.ListMigrations(request)
        found += [move.name for move in page.migrations]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert found == expected
    failed = await moving.migrations.ListMigrations(
        pb.ListMigrationsRequest(states=[State.STATE_FAILED])
    )
    assert [move.name for move in failed.migrations] == expected[1:]
    nowhere = await moving.migrations.ListMigrations(pb.ListMigrationsRequest(host="hosts/zz"))
    assert not nowhere.migrations
    first = await moving.migrations.ListMigrations(pb.ListMigrationsRequest(page_size=1))
    other = pb.ListMigrationsRequest(page_token=first.next_page_token, states=[State.STATE_FAILED])
    mixed = await refusal(moving.migrations.ListMigrations(other))
    assert mixed.reason is Reason.INVALID_PAGE_TOKEN
    unknown = await refusal(
        moving.migrations.ListMigrations(pb.ListMigrationsRequest(states=[99]))  # type: ignore[list-item]
    )
    assert unknown.reason is Reason.INVALID_FIELD


async def test_the_history_comes_in_pages(moving: Api) -> None:
    move = await the_move(moving)

    def write(tx: Connection) -> None:
        for n in range(4):
            migrations.add_event(tx, move.id, "move", "copy", "STARTED", f"line {n}")
        failure = DroverError(Reason.DISK_IO_ERROR, "vda is broken.").to_json()
        migrations.add_event(tx, move.id, "move", "copy", "FAILED", "broken", failure)

    await moving.run(write)
    request = pb.ListMigrationEventsRequest(parent=f"migrations/{move.id}", page_size=4)
    first = await moving.migrations.ListMigrationEvents(request)
    request.page_token = first.next_page_token
    rest = await moving.migrations.ListMigrationEvents(request)
    events = [*first.events, *rest.events]
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5, 6]
    assert rest.next_page_token == ""
    error = DroverError.from_status(events[-1].error)
    assert error is not None
    assert error.reason is Reason.DISK_IO_ERROR


async def test_the_audit_log_is_read_newest_first(api: Api) -> None:
    def write(tx: Connection) -> None:
        for n in range(3):
            audit.add(
                tx,
                time=utc_now(),
                principal=ADMIN,
                peer="ipv4:10.0.0.9:5",
                method=f"/m/{n}",
                resource="hosts/a",
                outcome="FAILED_PRECONDITION",
                reason="HOST_GONE",
                request_id="r",
            )

    await api.run(write)
    first = await api.migrations.ListAuditEntries(pb.ListAuditEntriesRequest(page_size=2))
    assert [entry.method for entry in first.entries] == ["/m/2", "/m/1"]
    assert (first.entries[0].principal, first.entries[0].reason) == (ADMIN, "HOST_GONE")
    rest = await api.migrations.ListAuditEntries(
        pb.ListAuditEntriesRequest(page_size=2, page_token=first.next_page_token)
    )
    assert [entry.method for entry in rest.entries] == ["/m/0"]


# --- watch -------------------------------------------------------------------------


async def test_a_watcher_sees_the_present_then_every_change_until_rest(moving: Api) -> None:
    name = await name_of(moving)
    stream = moving.migrations.WatchMigration(pb.WatchMigrationRequest(name=name))
    seen = [await stream.read()]
    await change(moving, state=MigrationState.COPYING)
    seen.append(await stream.read())
    progress = job_pb2.CopyProgress(done_bytes=5, total_bytes=10, rate_bytes_per_second=2)
    move = await the_move(moving)
    await moving.run(lambda tx: migrations.set_progress(tx, move.id, progress))
    seen.append(await stream.read())
    began = utc_now()
    await change(
        moving,
        state=MigrationState.AWAITING_CONFIRM,
        previous_power_state=PowerState.RUNNING,
        stop_time=began,
        running_time=began + timedelta(seconds=3),
    )
    seen.append(await stream.read())
    assert [move.state for move in seen if isinstance(move, State)] == [
        State.STATE_PENDING,
        State.STATE_COPYING,
        State.STATE_COPYING,
        State.STATE_AWAITING_CONFIRM,
    ]
    assert isinstance(seen[2], State)
    assert seen[2].progress == progress
    assert isinstance(seen[3], State)
    assert seen[3].downtime.seconds == 3
    assert await stream.read() is grpc.aio.EOF


async def test_a_watcher_can_stay_until_the_move_has_ended(moving: Api) -> None:
    await finish_move(moving)
    request = pb.WatchMigrationRequest(name=await name_of(moving), until_final=True)
    stream = moving.migrations.WatchMigration(request)
    first = await stream.read()
    assert isinstance(first, State)
    assert first.state == State.STATE_AWAITING_CONFIRM
    await change(moving, state=MigrationState.CONFIRMED)
    last = await stream.read()
    assert isinstance(last, State)
    assert last.state == State.STATE_CONFIRMED
    assert await stream.read() is grpc.aio.EOF


async def test_a_watcher_that_goes_away_leaves_nothing_behind(moving: Api) -> None:
    notifier = moving.services.notifier
    name = await name_of(moving)
    streams = [
        moving.migrations.WatchMigration(pb.WatchMigrationRequest(name=name)) for _ in range(3)
    ]
    for stream in streams:
        await stream.read()
    await until(lambda: notifier.waiting == 3)
    for stream in streams:
        stream.cancel()
    await until(lambda: notifier.waiting == 0)
    await change(moving, state=MigrationState.COPYING)
    assert (await moving.migrations.GetMigration(pb.GetMigrationRequest(name=name))).name == name


async def test_a_change_through_this_process_wakes_a_watcher_at_once(
    moving: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controlplane.api.watch.POLL_SECONDS", 3600.0)
    name = await name_of(moving)
    stream = moving.migrations.WatchMigration(pb.WatchMigrationRequest(name=name))
    await stream.read()
    await until(lambda: moving.services.notifier.waiting == 1)
    await moving.migrations.CancelMigration(pb.CancelMigrationRequest(name=name))
    async with asyncio.timeout(10):
        changed = await stream.read()
    assert isinstance(changed, State)
    assert changed.cancel_requested
    stream.cancel()


async def test_a_host_with_a_move_shows_it(moving: Api) -> None:
    for host in ("a", "b"):
        shown = await moving.hosts.GetHost(host_service_pb2.GetHostRequest(name=f"hosts/{host}"))
        assert shown.usage.moves == 1
        assert await moving.run(lambda tx, host=host: hosts.live_moves(tx, host)) == 1  # type: ignore[misc]
