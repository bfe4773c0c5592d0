from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.domain.model import FlavorSize, Instance, Migration
from controlplane.domain.states import FINAL_STATES, MigrationState, PowerState, TaskState, VmState
from controlplane.store import (
    audit,
    hosts,
    instances,
    migrations,
    requests,
    sightings,
    tables,
    tokens,
)
from controlplane.store.engine import Database
from controlplane.store.types import utc_now
from controlplane.v1 import migration_pb2
from hostd.v1 import job_pb2
from tests.controlplane.machines import make_domain, make_facts

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
UID = make_domain().uuid
OPTIONS = migration_pb2.MigrationOptions(bandwidth_limit_bytes_per_second=2**53)


def add_instance(tx: Connection) -> Instance:
    for name in ("a", "b"):
        hosts.create(tx, name, adopt_domains=True)
    return instances.create(
        tx, host="a", domain=make_domain(), vm_state=VmState.ACTIVE, project="default"
    )


def add_move(tx: Connection, instance: Instance) -> Migration:
    return migrations.create(
        tx,
        instance=instance,
        target_host="b",
        flavor=FlavorSize(name="big", vcpus=4, memory_mib=4096),
        options=OPTIONS,
        placement=migration_pb2.Placement(chosen_host="hosts/b"),
        created_by="drover://lab/admin/ada",
        description=make_domain(),
    )


async def test_what_is_written_is_read_back(database: Database) -> None:
    def work(tx: Connection) -> None:
        instance = add_instance(tx)
        assert instances.get(tx, UID) == instance
        assert instance.description == make_domain()
        assert instance.power_state is PowerState.RUNNING
        move = add_move(tx, instance)
        receipt = job_pb2.VolumeReceipt(volume_id="vda", size_bytes=2**62, digest="ab")
        changed = migrations.update(
            tx,
            move.id,
            state=MigrationState.COPYING,
            receipts=(receipt,),
            error={"reason": "X", "message": "ä"},
            confirm_deadline=NOW,
            previous_power_state=PowerState.SHUTOFF,
            throughput_bytes_per_second=2**62,
        )
        assert migrations.get(tx, move.id) == changed
        assert changed.receipts == (receipt,)
        assert changed.confirm_deadline == NOW
        assert changed.flavor == FlavorSize(name="big", vcpus=4, memory_mib=4096)
        assert changed.options == OPTIONS
        assert changed.generation == move.generation + 1
        cleared = migrations.update(tx, move.id, error=None, confirm_deadline=None)
        assert cleared.error is None
        assert cleared.confirm_deadline is None

    await database.run(work)


async def test_an_update_of_a_generation_that_is_over_changes_nothing(database: Database) -> None:
    def work(tx: Connection) -> None:
        instance = add_instance(tx)
        instances.update(tx, UID, expected_generation=1, task_state=TaskState.RESIZE_PREP)
        with pytest.raises(DroverError) as stale:
            instances.update(tx, UID, expected_generation=1, host="b")
        assert stale.value.reason is Reason.ETAG_MISMATCH
        assert instances.get(tx, UID).host == instance.host
        with pytest.raises(DroverError) as missing:
            instances.update(tx, "nobody", host="b")
        assert missing.value.reason is Reason.INSTANCE_NOT_FOUND

    await database.run(work)


@pytest.mark.parametrize("state", list(MigrationState))
async def test_a_machine_has_one_move_that_has_not_ended(
    database: Database, state: MigrationState
) -> None:
    def work(tx: Connection) -> None:
        instance = add_instance(tx)
        move = add_move(tx, instance)
        migrations.update(tx, move.id, state=state)
        if state in FINAL_STATES:
            add_move(tx, instance)
            assert len(migrations.list_page(tx, limit=5)) == 2
            return
        with pytest.raises(DroverError) as busy:
            add_move(tx, instance)
        assert busy.value.reason is Reason.INSTANCE_BUSY
        assert migrations.live_of(tx, [UID])[UID].id == move.id

    await database.run(work)


async def test_history_has_no_gaps_when_two_write_at_once(database: Database) -> None:
    move = await database.run(lambda tx: add_move(tx, add_instance(tx)))

    async def write(n: int) -> int:
        return await database.run(
            lambda tx: migrations.add_event(tx, move.id, "move", "copy", "STARTED", str(n))
        )

    assert sorted(await asyncio.gather(*(write(n) for n in range(12)))) == list(range(1, 13))
    events = await database.run(lambda tx: migrations.events(tx, move.id, after=9))
    assert [event.seq for event in events] == [10, 11, 12]
    unchanged = await database.run(lambda tx: migrations.generation_of(tx, move.id))
    assert unchanged == move.generation


async def test_the_same_progress_is_not_written_twice(database: Database) -> None:
    def work(tx: Connection) -> None:
        move = add_move(tx, add_instance(tx))
        progress = job_pb2.CopyProgress(done_bytes=1, eta_seconds=0.5)
        migrations.set_progress(tx, move.id, progress)
        first = migrations.get(tx, move.id)
        migrations.set_progress(tx, move.id, progress)
        assert migrations.get(tx, move.id) == first
        assert first.progress == progress

    await database.run(work)


async def test_moves_due_for_confirm_are_those_whose_deadline_passed(database: Database) -> None:
    def work(tx: Connection) -> None:
        move = add_move(tx, add_instance(tx))
        migrations.update(tx, move.id, confirm_deadline=NOW)
        assert not migrations.due_for_confirm(tx, NOW)
        migrations.update(tx, move.id, state=MigrationState.AWAITING_CONFIRM)
        assert [due.id for due in migrations.due_for_confirm(tx, NOW)] == [move.id]
        assert not migrations.due_for_confirm(tx, NOW - timedelta(microseconds=1))

    await database.run(work)


async def test_a_report_does_not_raise_a_hosts_generation(database: Database) -> None:
    def work(tx: Connection) -> None:
        before = hosts.create(tx, "a", adopt_domains=False)
        hosts.record_report(tx, "a", make_facts("a"), NOW)
        hosts.record_failure(tx, "a", "gone quiet")
        after = hosts.get(tx, "a")
        assert after.generation == before.generation
        assert (after.facts, after.last_seen, after.last_error) == (
            make_facts("a"),
            NOW,
            "gone quiet",
        )
        assert not after.is_alive(NOW + timedelta(seconds=21), 20.0)
        assert after.is_alive(NOW + timedelta(seconds=20), 20.0)

    await database.run(work)


async def test_clashes_are_found_on_every_host_by_name_uuid_and_mac(database: Database) -> None:
    def work(tx: Connection) -> None:
        machine = make_domain()
        for name in "abcde":
            hosts.create(tx, name, adopt_domains=True)

        def report(host: str, *domains: object) -> None:
            sightings.replace(tx, host, domains, NOW, NOW, asked=NOW)  # type: ignore[arg-type]

        report("a", machine)
        report("b", make_domain(uuid="u-b", interfaces=[]))
        report("c", make_domain("other", interfaces=machine.interfaces))
        report("d", make_domain("unrelated"))
        report("e", make_domain("other", interfaces=machine.interfaces))
        report("e")
        found = {(c.host, c.name, c.mac) for c in sightings.clashes(tx, machine)}
        mac = machine.interfaces[0].mac_address
        assert found == {("a", "web1", ""), ("b", "web1", ""), ("c", "other", mac)}

    await database.run(work)


async def test_one_token_is_used_once_however_many_try(database: Database) -> None:
    def put(tx: Connection) -> None:
        hosts.create(tx, "a", adopt_domains=True)
        tokens.put(tx, "digest", "a", NOW)

    await database.run(put)
    before = NOW - timedelta(seconds=1)
    assert not await database.run(lambda tx: tokens.use(tx, "digest", "b", before))
    assert not await database.run(lambda tx: tokens.use(tx, "digest", "a", NOW))
    tries = await asyncio.gather(
        *(database.run(lambda tx: tokens.use(tx, "digest", "a", before)) for _ in range(8))
    )
    assert sum(tries) == 1


async def test_an_answer_is_kept_once_and_goes_with_its_time(database: Database) -> None:
    answered = requests.Answered("hash", b"\x00\xff")
    later = NOW + timedelta(hours=1)

    def work(tx: Connection) -> None:
        key = ("p", "m", "id")
        assert requests.keep(tx, *key, answered=answered, now=NOW, expire_time=later)
        assert not requests.keep(tx, *key, answered=answered, now=NOW, expire_time=later)
        assert requests.find(tx, *key, NOW) == answered
        assert requests.find(tx, *key, later) is None
        assert requests.keep(tx, "p", "m", "2", answered=answered, now=later, expire_time=later)
        assert [r.request_id for r in tx.execute(tables.request_ids.select())] == ["2"]

    await database.run(work)


async def test_the_audit_log_counts_up(database: Database) -> None:
    def work(tx: Connection) -> None:
        for n in range(3):
            audit.add(
                tx,
                time=utc_now(),
                principal="p" * 400,
                peer="x",
                method=str(n),
                resource="",
                outcome="OK",
            )
        page = audit.list_page(tx, before=None, limit=2)
        assert [entry.method for entry in page] == ["2", "1"]
        assert [e.method for e in audit.list_page(tx, before=page[-1].seq, limit=2)] == ["0"]

    await database.run(work)


async def test_rows_do_not_point_to_hosts_that_do_not_exist(database: Database) -> None:
    with pytest.raises(IntegrityError):
        await database.run(
            lambda tx: instances.create(
                tx, host="zz", domain=make_domain(), vm_state=VmState.ACTIVE, project="p"
            )
        )
