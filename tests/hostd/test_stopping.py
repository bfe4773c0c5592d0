"""Stopping real guests, and that a stop that is given up is no outage."""

from __future__ import annotations

import os
import signal

import pytest

from controlplane.common.errors import DroverError
from hostd.v1 import domain_pb2
from hostd.v1 import host_service_pb2 as pb
from tests.hostd.fleet import Guest, Mode, Move, TwoHosts
from tests.lab.wait import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

RUNNING = domain_pb2.POWER_STATE_RUNNING
SHUTOFF = domain_pb2.POWER_STATE_SHUTOFF


def request(move: Move, mode: Mode.Mode.ValueType, seconds: int) -> pb.EnsureStoppedRequest:
    asked = pb.EnsureStoppedRequest(fence=move.fence("EnsureStopped"), mode=mode)
    asked.timeout.seconds = seconds
    asked.retry_interval.seconds = 1
    return asked


def test_a_guest_is_shut_down_and_brought_back(fleet: TwoHosts, guest: Guest) -> None:
    a = fleet["a"]
    move = Move(a, fleet["b"], guest.uuid)
    answer = move.stop(Mode.MODE_GRACEFUL)
    assert (answer.previous_power_state, answer.forced) == (RUNNING, False)
    assert "POWEROFF" in a.host.console(guest.name)
    again = a.client(request(move, Mode.MODE_GRACEFUL, 30))
    assert again == answer
    a.host.forget_console(guest.name)
    move.call(a, pb.RestorePowerRequest())
    a.host.wait_for_console(guest.name, "READY")
    # A second restore does not fight with whoever turns it off afterwards.
    a.host.virsh("destroy", guest.name)
    move.call(a, pb.RestorePowerRequest())
    assert a.host.state(guest.name) == "shut off"


def test_a_guest_that_ignores_acpi_runs_on(fleet: TwoHosts, deaf_guest: Guest) -> None:
    a = fleet["a"]
    move = Move(a, fleet["b"], deaf_guest.uuid)
    with pytest.raises(DroverError) as late:
        move.stop(Mode.MODE_GRACEFUL, seconds=3)
    assert late.value.reason.name == "SHUTDOWN_TIMEOUT"
    assert a.host.state(deaf_guest.name) == "running"
    with pytest.raises(DroverError) as again:
        a.client(request(move, Mode.MODE_GRACEFUL, 3))
    assert again.value.reason.name == "SHUTDOWN_TIMEOUT"
    move.call(a, pb.RestorePowerRequest())
    assert a.host.state(deaf_guest.name) == "running"


def test_force_comes_after_the_timeout_and_outlives_a_restart(
    fleet: TwoHosts, deaf_guest: Guest
) -> None:
    a = fleet["a"]
    move = Move(a, fleet["b"], deaf_guest.uuid)
    asked = request(move, Mode.MODE_GRACEFUL_THEN_FORCE, 6)
    assert not a.client(asked).stopped
    a.hostd.restart()
    # Nobody asks again: the restarted hostd goes on by itself.
    wait_for(lambda: a.host.state(deaf_guest.name) == "shut off", "forced off")
    answer = a.client(asked)
    assert (answer.stopped, answer.previous_power_state, answer.forced) == (True, RUNNING, True)


def test_a_qemu_that_hangs_is_forced_off_in_time(fleet: TwoHosts, guest: Guest) -> None:
    a = fleet["a"]
    move = Move(a, fleet["b"], guest.uuid)
    pid = int(a.host.path(f"/run/libvirt/qemu/{guest.name}.pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    answer = move.until_stopped(a, Mode.MODE_GRACEFUL_THEN_FORCE, seconds=7)
    assert (answer.previous_power_state, answer.forced) == (RUNNING, True)
    assert a.inventory().facts.libvirt_connected


def test_force_is_at_once(fleet: TwoHosts, deaf_guest: Guest) -> None:
    a = fleet["a"]
    move = Move(a, fleet["b"], deaf_guest.uuid)
    answer = move.until_stopped(a, Mode.MODE_FORCE)
    assert (answer.previous_power_state, answer.forced) == (RUNNING, True)
    assert "POWEROFF" not in a.host.console(deaf_guest.name)


@pytest.mark.parametrize("dead", [False, True], ids=["", "hostd dead meanwhile"])
def test_a_guest_that_follows_the_request_too_late_is_started_again(
    fleet: TwoHosts, guest: Guest, dead: bool
) -> None:
    a = fleet["a"]
    move = Move(a, fleet["b"], guest.uuid)
    move.stop()
    a.host.forget_console(guest.name)
    move.call(a, pb.RestorePowerRequest())
    move.call(a, pb.ForgetMigrationRequest())
    a.host.wait_for_console(guest.name, "READY")
    a.host.forget_console(guest.name)
    if dead:
        a.hostd.kill()
    a.host.virsh("shutdown", guest.name, "--mode", "acpi")
    if dead:
        wait_for(lambda: a.host.state(guest.name) == "shut off", "the guest off")
        a.hostd.start()
    a.host.wait_for_console(guest.name, "READY")
    # Once only: whoever turns it off again means it.
    a.host.virsh("destroy", guest.name)
    assert a.host.state(guest.name) == "shut off"


def test_a_machine_that_is_off_stays_off(fleet: TwoHosts, guest: Guest) -> None:
    a = fleet["a"]
    a.host.virsh("destroy", guest.name)
    move = Move(a, fleet["b"], guest.uuid)
    assert move.stop().previous_power_state == SHUTOFF
    move.call(a, pb.RestorePowerRequest())
    assert a.host.state(guest.name) == "shut off"


def test_a_paused_machine_is_refused_untouched(fleet: TwoHosts, guest: Guest) -> None:
    a = fleet["a"]
    a.host.virsh("suspend", guest.name)
    move = Move(a, fleet["b"], guest.uuid)
    with pytest.raises(DroverError) as refused:
        move.stop()
    assert refused.value.reason.name == "INSTANCE_STATE"
    assert a.host.state(guest.name) == "paused"


def test_started_meanwhile_it_is_not_parked(fleet: TwoHosts, guest: Guest) -> None:
    a = fleet["a"]
    move = Move(a, fleet["b"], guest.uuid)
    move.stop()
    a.host.forget_console(guest.name)
    a.host.virsh("start", guest.name)
    with pytest.raises(DroverError) as refused:
        move.park()
    assert refused.value.reason.name == "INSTANCE_STARTED_MEANWHILE"
    move.undo()
    a.host.wait_for_console(guest.name, "READY")
    assert a.host.state(guest.name) == "running"
