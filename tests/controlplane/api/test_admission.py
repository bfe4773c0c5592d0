"""Calls at once, repeated, and overtaken: one effect each, or none."""

from __future__ import annotations

import asyncio
import uuid

import grpc
import grpc.aio

from controlplane.common.reasons import Reason
from controlplane.store import claims, instances, migrations
from controlplane.store.tables import request_ids
from controlplane.v1 import (
    migration_pb2,
)
from tests.controlplane.api.asking import (
    OPERATOR,
    UID,
    Options,
    ask,
    rows,
)
from tests.controlplane.api.conftest import Api, refusal, until
from tests.controlplane.machines import make_domain


async def test_a_machine_moves_once_at_a_time(fleet: Api) -> None:
    outcomes = await asyncio.gather(
        *(fleet.migrations.CreateMigration(ask()) for _ in range(4)), return_exceptions=True
    )
    admitted = [o for o in outcomes if isinstance(o, migration_pb2.Migration)]
    lost = [o for o in outcomes if isinstance(o, grpc.aio.AioRpcError)]
    assert (len(admitted), len(lost)) == (1, 3)
    assert {error.code() for error in lost} == {grpc.StatusCode.FAILED_PRECONDITION}
    assert await rows(fleet) == (1, 1, 1)
    busy = await refusal(fleet.migrations.CreateMigration(ask()))
    assert busy.reason is Reason.INSTANCE_BUSY
    assert admitted[0].name in busy.message


async def test_the_last_room_is_given_once(fleet: Api) -> None:
    names = [f"vm{n}" for n in range(4)]
    for name in names:
        fleet.simulated["a"].put(make_domain(name, interfaces=[]))
    fleet.simulated["b"].facts.memory_mib = 2048
    fleet.simulated["c"].facts.memory_mib = 100
    await fleet.report()
    outcomes = await asyncio.gather(
        *(fleet.migrations.CreateMigration(ask(instance=f"instances/{name}")) for name in names),
        return_exceptions=True,
    )
    admitted = [o for o in outcomes if isinstance(o, migration_pb2.Migration)]
    assert len(admitted) == 2
    assert {move.target_host for move in admitted} == {"hosts/b"}
    used = await fleet.run(lambda tx: claims.claimed(tx, "b"))
    assert used.memory_mib == 2048


async def test_a_repeated_call_starts_one_move_and_has_the_first_answer(fleet: Api) -> None:
    request = ask(request_id=str(uuid.uuid4()))
    answers = await asyncio.gather(*(fleet.migrations.CreateMigration(request) for _ in range(3)))
    again = await fleet.migrations.CreateMigration(request)
    assert {answer.name for answer in (*answers, again)} == {again.name}
    assert again == answers[0]
    assert await rows(fleet) == (1, 1, 1)
    other = ask(request_id=request.request_id, host="hosts/c")
    reused = await refusal(fleet.migrations.CreateMigration(other))
    assert reused.reason is Reason.REQUEST_ID_REUSED


async def test_a_refused_call_is_not_remembered(fleet: Api) -> None:
    request = ask(request_id=str(uuid.uuid4()), host="hosts/b")
    fleet.simulated["b"].fail_check(Reason.TARGET_LACKS_SPACE, "full")
    await refusal(fleet.migrations.CreateMigration(request))
    assert not await fleet.run(lambda tx: tx.execute(request_ids.select()).all())
    fleet.simulated["b"].checks.clear()
    move = await fleet.migrations.CreateMigration(request)
    assert move.target_host == "hosts/b"


async def test_options_reach_the_move(fleet: Api) -> None:
    options = Options(
        shutdown_mode=Options.SHUTDOWN_MODE_FORCE,
        confirm_policy=Options.CONFIRM_POLICY_AFTER,
        bandwidth_limit_bytes_per_second=1000,
    )
    options.confirm_after.FromSeconds(90)
    move = await fleet.migrations.CreateMigration(ask(options=options))
    options.shutdown_timeout.FromSeconds(60)
    assert move.options == options
    stored = await fleet.run(lambda tx: migrations.live_of(tx, [UID]))
    assert stored[UID].options == options


async def test_what_changed_since_the_plan_is_looked_at_again(fleet: Api) -> None:
    host = fleet.simulated["b"]
    host.delay_seconds = 0.5
    call = fleet.migrations.CreateMigration(ask())
    await until(lambda: "CheckTarget" in host.asked)
    await fleet.run(lambda tx: instances.update(tx, UID, lock_reason="backup", locked_by=OPERATOR))
    assert (await refusal(call)).reason is Reason.INSTANCE_LOCKED
    assert await rows(fleet) == (0, 0, 0)
