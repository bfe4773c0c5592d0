"""A whole move between two real hypervisors, driven by raw RPCs; and every way back."""

from __future__ import annotations

import pytest

from controlplane.common.errors import DroverError
from hostd.v1 import domain_pb2, preflight_pb2
from hostd.v1 import host_service_pb2 as pb
from tests.hostd.fleet import Guest, HostdHost, Mode, Move, TwoHosts
from tests.lab.wait import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

STEPS = ["prepare", "stop", "park", "copy", "build", "start"]


def assert_clean(host: HostdHost, name: str) -> None:
    """Nothing of a machine is left on a host."""
    assert name not in host.domains()
    assert [file for file in host.images() if name in file] == []
    inventory = host.inventory()
    assert [parked.domain_name for parked in inventory.parked if parked.domain_name == name] == []


def assert_runs(host: HostdHost, name: str) -> None:
    """The guest boots on a host and its own check of its data passes."""
    host.host.wait_for_console(name, "READY")
    said = host.host.console(name)
    assert "CHECK ok" in said
    assert "CHECK bad" not in said
    assert host.host.state(name) == "running"


@pytest.mark.parametrize("repeat", [False, True], ids=["once", "each call twice"])
def test_a_running_guest_moves_and_the_source_copy_goes(
    fleet: TwoHosts, guest: Guest, repeat: bool
) -> None:
    name, uuid = guest.name, guest.uuid
    a, b = fleet["a"], fleet["b"]
    move = Move(a, b, uuid, repeat=repeat)
    move.forward()
    assert_runs(b, name)
    assert name not in a.domains()
    parked = a.inventory().parked
    assert [p.migration_id for p in parked] == [move.id]
    move.confirm()
    assert_clean(a, name)
    assert [f for f in b.images() if name in f] == [f"{name}.qcow2"]
    assert_runs(b, name)


def test_a_stopped_guest_stays_stopped(fleet: TwoHosts, guest: Guest) -> None:
    name, uuid = guest.name, guest.uuid
    a, b = fleet["a"], fleet["b"]
    a.host.virsh("destroy", name)
    move = Move(a, b, uuid)
    move.prepare()
    assert move.stop().previous_power_state == domain_pb2.POWER_STATE_SHUTOFF
    move.park()
    move.copy()
    domain = move.build().domain
    assert domain.power_state == domain_pb2.POWER_STATE_SHUTOFF
    assert b.host.state(name) == "shut off"
    move.confirm()
    b.host.virsh("start", name)
    assert_runs(b, name)


@pytest.mark.parametrize("last", STEPS)
def test_undone_after_any_step_the_guest_is_back_and_nothing_is_left(
    fleet: TwoHosts, guest: Guest, last: str
) -> None:
    name, uuid = guest.name, guest.uuid
    a, b = fleet["a"], fleet["b"]
    definition = a.host.virsh("dumpxml", "--inactive", "--security-info", name)
    move = Move(a, b, uuid, repeat=True)
    for step in STEPS[: STEPS.index(last) + 1]:
        getattr(move, step)()
    if last != "prepare":
        a.host.forget_console(name)
    move.undo()
    assert_runs(a, name)
    assert_clean(b, name)
    assert [f for f in a.images() if name in f] == [f"{name}.qcow2"]
    assert a.host.virsh("dumpxml", "--inactive", "--security-info", name) == definition


def test_reverted_after_it_ran_on_the_target_the_guest_is_as_it_was(
    fleet: TwoHosts, guest: Guest
) -> None:
    name, uuid = guest.name, guest.uuid
    a, b = fleet["a"], fleet["b"]
    move = Move(a, b, uuid)
    move.forward()
    assert_runs(b, name)
    a.host.forget_console(name)
    move.saga_seq += 1
    move.until_stopped(b, Mode.MODE_GRACEFUL_THEN_FORCE)
    move.call(b, pb.EnsureUndefinedRequest())
    move.call(a, pb.EnsureUnparkedRequest())
    move.call(a, pb.RestorePowerRequest())
    move.call(b, pb.EnsureAbsentRequest())
    move.forget()
    assert_runs(a, name)
    assert_clean(b, name)


def test_a_revert_that_is_undone_leaves_the_guest_on_the_target(
    fleet: TwoHosts, guest: Guest
) -> None:
    name, uuid = guest.name, guest.uuid
    a, b = fleet["a"], fleet["b"]
    move = Move(a, b, uuid)
    move.forward()
    assert_runs(b, name)
    move.saga_seq += 1
    move.until_stopped(b, Mode.MODE_GRACEFUL_THEN_FORCE)
    move.call(b, pb.EnsureUndefinedRequest())
    move.call(a, pb.EnsureUnparkedRequest())
    b.host.forget_console(name)
    move.call(a, pb.EnsureParkedRequest())
    move.call(b, pb.EnsureBuiltRequest(digests=move.digests))
    move.call(b, pb.RestorePowerRequest())
    assert_runs(b, name)
    move.confirm()
    assert_clean(a, name)


def test_killed_between_any_two_calls_both_hostds_go_on(fleet: TwoHosts, guest: Guest) -> None:
    name, uuid = guest.name, guest.uuid
    a, b = fleet["a"], fleet["b"]

    killed: set[str] = set()

    def kill(step: str) -> None:
        # Once after each: a target that dies after every opening never receives.
        if step not in killed:
            killed.add(step)
            for host in (a, b):
                host.hostd.restart()

    move = Move(a, b, uuid, between=kill)
    move.forward()
    assert_runs(b, name)
    move.confirm()
    assert_clean(a, name)


@pytest.mark.parametrize("victim", ["a", "b"])
def test_killed_in_the_middle_of_a_copy_it_goes_on_from_what_is_durable(
    fleet: TwoHosts, guest: Guest, victim: str
) -> None:
    name, uuid = guest.name, guest.uuid
    a, b = fleet["a"], fleet["b"]
    move = Move(a, b, uuid, limit_bytes_per_second=4 << 20)
    move.prepare()
    move.stop()
    move.park()
    move.start_copy()
    wait_for(lambda: move.job().progress.wire_bytes > 4 << 20, "copy in its middle")
    fleet[victim].hostd.restart()
    move.limit_bytes_per_second = 0
    move.copy()
    move.build()
    move.start()
    assert_runs(b, name)
    move.confirm()
    assert_clean(a, name)


def test_a_copy_can_be_cancelled_and_the_guest_is_back(fleet: TwoHosts, guest: Guest) -> None:
    name, uuid = guest.name, guest.uuid
    a, b = fleet["a"], fleet["b"]
    move = Move(a, b, uuid, limit_bytes_per_second=1 << 20)
    move.prepare()
    move.stop()
    move.park()
    job = move.start_copy()
    watched = iter(a.client.watch(job.job_id))
    assert next(watched).state == job.STATE_RUNNING
    a.host.forget_console(name)
    move.undo()
    assert list(watched)[-1].state == job.STATE_CANCELLED
    assert_runs(a, name)
    assert_clean(b, name)


def test_libvirtd_killed_in_the_middle_of_a_move(fleet: TwoHosts, guest: Guest) -> None:
    name, uuid = guest.name, guest.uuid
    a, b = fleet["a"], fleet["b"]
    move = Move(a, b, uuid)
    move.prepare()
    move.stop()
    a.host.libvirtd.kill()
    with pytest.raises(DroverError) as away:
        move.park()
    assert away.value.reason.name == "LIBVIRT_UNAVAILABLE"
    assert not a.inventory().facts.libvirt_connected
    a.host.libvirtd.start()
    move.park()
    move.copy()
    b.host.libvirtd.restart()
    move.build()
    move.start()
    assert_runs(b, name)
    move.confirm()


def test_a_resize_grows_the_machine(fleet: TwoHosts, guest: Guest) -> None:
    name, uuid = guest.name, guest.uuid
    a, b = fleet["a"], fleet["b"]
    size = preflight_pb2.TargetSize(vcpus=2, memory_mib=256, root_disk_bytes=1 << 30)
    move = Move(a, b, uuid, size=size, repeat=True)
    move.forward()
    assert_runs(b, name)
    domain = b.client(pb.GetDomainRequest(domain_uuid=uuid))
    assert (domain.vcpus, domain.memory_mib) == (2, 256)
    assert domain.volumes[0].virtual_size_bytes == 1 << 30
    move.confirm()


def test_an_older_owner_is_refused_in_the_middle(fleet: TwoHosts, guest: Guest) -> None:
    name, uuid = guest.name, guest.uuid
    a, b = fleet["a"], fleet["b"]
    move = Move(a, b, uuid, generation=5)
    move.prepare()
    move.stop()
    move.generation = 4
    with pytest.raises(DroverError) as refused:
        move.park()
    assert refused.value.reason.name == "STALE_GENERATION"
    a.hostd.restart()
    with pytest.raises(DroverError):
        move.park()
    move.generation = 6
    move.undo()
    assert a.host.state(name) == "running"
