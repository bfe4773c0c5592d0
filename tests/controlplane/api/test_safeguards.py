"""What keeps one caller from undoing what another relies on."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import sqlalchemy as sa

import controlplane.api.migrations as servicer
from controlplane.api.plan import Plan
from controlplane.common.reasons import Reason
from controlplane.domain.states import MigrationState
from controlplane.store import instances, migrations
from controlplane.store.saga_tables import sagas
from controlplane.v1 import host_service_pb2, instance_service_pb2
from controlplane.v1 import migration_service_pb2 as pb
from tests.controlplane.api.conftest import ADMIN, Api, by, refusal
from tests.controlplane.machines import make_domain

OPERATOR = "drover://lab/operator/olga"
UID = make_domain().uuid


async def test_a_gone_host_is_not_added_anew_while_a_move_counts_on_it(fleet: Api) -> None:
    """The saga would take the new, empty host for the one that has the parked copy."""
    await fleet.migrations.CreateMigration(pb.CreateMigrationRequest(instance="instances/web1"))
    fleet.clock.advance(seconds=60)
    await fleet.hosts.DeclareHostGone(
        host_service_pb2.DeclareHostGoneRequest(name="hosts/a", reason="fire")
    )
    add = host_service_pb2.AddHostRequest(host_id="a")
    busy = await refusal(fleet.hosts.AddHost(add))
    assert busy.reason is Reason.HOST_BUSY
    assert busy.metadata["moves"] == "1"

    def end(tx: Any) -> None:
        move = migrations.list_page(tx, limit=1)[0]
        migrations.update(tx, move.id, state=MigrationState.ABANDONED)

    await fleet.run(end)
    assert (await fleet.hosts.AddHost(add)).join_token


async def test_what_waits_for_a_host_is_due_once_it_is_declared_gone(fleet: Api) -> None:
    await fleet.migrations.CreateMigration(pb.CreateMigrationRequest(instance="instances/web1"))
    await fleet.run(lambda tx: tx.execute(sagas.update().values(wake_at=2.0**33)))
    fleet.clock.advance(seconds=60)
    await fleet.hosts.DeclareHostGone(
        host_service_pb2.DeclareHostGoneRequest(name="hosts/b", reason="fire")
    )
    assert await fleet.run(lambda tx: tx.execute(sa.select(sagas.c.wake_at)).scalar_one()) == 0


async def test_a_lock_is_not_shaken_off_by_a_release(fleet: Api) -> None:
    await fleet.run(lambda tx: instances.update(tx, UID, lock_reason="audit", locked_by=ADMIN))
    release = instance_service_pb2.ReleaseInstanceRequest(name="instances/web1")
    locked = await refusal(fleet.instances.ReleaseInstance(release, metadata=by(OPERATOR)))
    assert locked.reason is Reason.INSTANCE_LOCKED
    await fleet.instances.ReleaseInstance(release)


async def test_a_twin_that_comes_after_the_first_has_begun_gets_its_answer(
    fleet: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked for an answer just before there was one; the machine is busy by then."""
    request = pb.CreateMigrationRequest(instance="instances/web1", request_id=str(uuid.uuid4()))
    original = servicer.plan_move  # type: ignore[attr-defined]  # imported there
    first: list[Any] = []

    async def plan_late(services: Any, wish: Any) -> Plan:
        if not first:
            first.append(None)
            first[0] = await fleet.migrations.CreateMigration(request)
        return await original(services, wish)

    monkeypatch.setattr(servicer, "plan_move", plan_late)
    assert await fleet.migrations.CreateMigration(request) == first[0]


async def test_a_list_of_moves_leaves_the_verdicts_out(fleet: Api) -> None:
    """One for every host and move: a page would not fit into a message."""
    made = await fleet.migrations.CreateMigration(
        pb.CreateMigrationRequest(instance="instances/web1")
    )
    assert made.placement.verdicts
    listed = await fleet.migrations.ListMigrations(pb.ListMigrationsRequest())
    assert not listed.migrations[0].placement.verdicts
    assert listed.migrations[0].placement.chosen_host == "hosts/b"
