"""Steering a move: confirm, revert, cancel, retry, abandon, and the clock that confirms."""

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
from controlplane.domain.states import MigrationState, TaskState
from controlplane.fleet.autoconfirm import AutoConfirmer
from controlplane.saga.definition import decode
from controlplane.saga.log import SagaState
from controlplane.sagas.common import MigrationParams
from controlplane.store import claims, instances
from controlplane.store.types import utc_now
from controlplane.v1 import host_service_pb2, instance_pb2, instance_service_pb2
from controlplane.v1 import migration_service_pb2 as pb
from tests.controlplane.api.conftest import ADMIN, Api, by, error_of, refusal
from tests.controlplane.api.moving import (
    MEMBER,
    STRANGER,
    UID,
    State,
    change,
    finish_move,
    get_stuck,
    name_of,
    saga_of,
    the_move,
)
from tests.controlplane.machines import make_domain

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


async def test_a_parked_copy_is_kept_while_its_source_has_the_machine_again(moving: Api) -> None:
    """Somebody has defined it there by hand: which copy is the machine is for people to say."""
    await finish_move(moving)
    moving.simulated["a"].put(make_domain())
    await moving.report()
    confirm = pb.ConfirmMigrationRequest(name=await name_of(moving))
    refused = await refusal(moving.migrations.ConfirmMigration(confirm))
    assert refused.reason is Reason.INSTANCE_CONFLICT
    assert refused.metadata["hosts"] == "hosts/a, hosts/b"
    assert (await the_move(moving)).state is MigrationState.AWAITING_CONFIRM
    shown = await moving.instances.GetInstance(
        instance_service_pb2.GetInstanceRequest(name="instances/web1")
    )
    assert shown.conflict == "hosts/a, hosts/b"
    moving.simulated["a"].domains.clear()
    await moving.report()
    answer = await moving.migrations.ConfirmMigration(confirm)
    assert answer.state == State.STATE_CONFIRMING


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
        ("migrations/3f1c9e52-7d0b-4a86-9c7e-5b2a64d8e013", Reason.MIGRATION_NOT_FOUND),
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
        stub.LimitMigration(pb.LimitMigrationRequest(name=name)),
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


async def test_a_limit_is_changed_until_all_is_copied(moving: Api) -> None:
    name = await name_of(moving)
    request = pb.LimitMigrationRequest(name=name, bandwidth_limit_bytes_per_second=5_000_000)
    limited = await moving.migrations.LimitMigration(request)
    assert limited.options.bandwidth_limit_bytes_per_second == 5_000_000
    assert limited.options.shutdown_mode == (await the_move(moving)).options.shutdown_mode
    await change(moving, state=MigrationState.COPYING)
    lifted = await moving.migrations.LimitMigration(pb.LimitMigrationRequest(name=name))
    assert lifted.options.bandwidth_limit_bytes_per_second == 0
    for state in (MigrationState.FINISHING, MigrationState.AWAITING_CONFIRM):
        await change(moving, state=state)
        late = await refusal(moving.migrations.LimitMigration(request))
        assert late.reason is Reason.MIGRATION_STATE
    assert (await the_move(moving)).options.bandwidth_limit_bytes_per_second == 0


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
