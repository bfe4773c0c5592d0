"""Looking at moves: lists, history, audit log, watching."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import grpc.aio
import pytest
from sqlalchemy import Connection

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.domain.states import MigrationState, PowerState
from controlplane.store import audit, claims, hosts, instances, migrations
from controlplane.store.types import utc_now
from controlplane.v1 import host_service_pb2, migration_pb2
from controlplane.v1 import migration_service_pb2 as pb
from hostd.v1 import job_pb2
from tests.controlplane.api.conftest import ADMIN, Api, refusal, until
from tests.controlplane.api.moving import (
    UID,
    State,
    change,
    end_saga,
    finish_move,
    name_of,
    the_move,
)

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


async def test_a_watcher_gets_verdicts_when_they_are_new_only(moving: Api) -> None:
    """One for each host of the fleet, with each change, would be too much."""
    stream = moving.migrations.WatchMigration(pb.WatchMigrationRequest(name=await name_of(moving)))
    seen = [await stream.read()]
    await change(moving, state=MigrationState.PREPARING)
    seen.append(await stream.read())
    elsewhere = migration_pb2.Placement(chosen_host="hosts/c")
    elsewhere.verdicts.add(host="hosts/c", fits=True)
    await change(moving, placement=elsewhere)
    seen.append(await stream.read())
    await change(moving, state=MigrationState.STOPPING)
    seen.append(await stream.read())
    stream.cancel()
    moves = [move for move in seen if isinstance(move, State)]
    assert [len(move.placement.verdicts) for move in moves] == [2, 0, 1, 0]
    assert [move.placement.chosen_host for move in moves] == ["hosts/b"] * 2 + ["hosts/c"] * 2


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
    async with asyncio.timeout(60):
        changed = await stream.read()
    assert isinstance(changed, State)
    assert changed.cancel_requested
    stream.cancel()


async def test_a_host_with_a_move_shows_it(moving: Api) -> None:
    for host in ("a", "b"):
        shown = await moving.hosts.GetHost(host_service_pb2.GetHostRequest(name=f"hosts/{host}"))
        assert shown.usage.moves == 1
        assert await moving.run(lambda tx, host=host: hosts.live_moves(tx, host)) == 1  # type: ignore[misc]
