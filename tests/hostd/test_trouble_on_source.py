"""What keeps a machine on its source, on a real host: named, and nothing is changed."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pytest

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.v1 import host_service_pb2 as pb
from tests.hostd.fleet import Guest, HostdHost, Mode, Move, TwoHosts
from tests.hostd.unchanged import both_unchanged
from tests.lab.host import IMAGES
from tests.lab.wait import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

Situation = Callable[[HostdHost, Guest], AbstractContextManager[None]]


@contextmanager
def disk_gone(host: HostdHost, guest: Guest) -> Iterator[None]:
    disk = host.host.path(f"{IMAGES}/{guest.name}.qcow2")
    aside = disk.rename(disk.with_suffix(".aside"))
    yield
    aside.rename(disk)


@contextmanager
def disk_open(host: HostdHost, guest: Guest) -> Iterator[None]:
    with host.host.path(f"{IMAGES}/{guest.name}.qcow2").open("rb") as disk:
        reader = subprocess.Popen(["sleep", "1000"], stdin=disk)
    yield
    reader.kill()
    reader.wait()


@contextmanager
def disk_on_a_loop_device(host: HostdHost, guest: Guest) -> Iterator[None]:
    disk = host.host.path(f"{IMAGES}/{guest.name}.qcow2")
    device = subprocess.run(
        ["losetup", "--find", "--show", str(disk)], check=True, capture_output=True, text=True
    ).stdout.strip()
    yield
    subprocess.run(["losetup", "--detach", device], check=True)


@contextmanager
def disk_is_a_link_out_of_the_roots(host: HostdHost, guest: Guest) -> Iterator[None]:
    disk = host.host.path(f"{IMAGES}/{guest.name}.qcow2")
    aside = disk.rename(disk.with_suffix(".aside"))
    disk.symlink_to("/etc/hostname")
    yield
    disk.unlink()
    aside.rename(disk)


@contextmanager
def disk_is_not_what_the_definition_says(host: HostdHost, guest: Guest) -> Iterator[None]:
    disk = host.host.path(f"{IMAGES}/{guest.name}.qcow2")
    aside = disk.rename(disk.with_suffix(".aside"))
    disk.write_bytes(bytes(4096))
    yield
    disk.unlink()
    aside.rename(disk)


def another_disk(path: str, format_: str, target: str = "vdb") -> Situation:
    """The guest has one more disk."""

    @contextmanager
    def situation(host: HostdHost, guest: Guest) -> Iterator[None]:
        host.host.virsh(
            "attach-disk", guest.uuid, path, target, "--config", "--driver", "qemu",
            "--subdriver", format_, "--sourcetype", "file",
        )  # fmt: skip
        yield
        host.host.virsh("detach-disk", guest.uuid, target, "--config")

    return situation


@contextmanager
def memory_saved(host: HostdHost, guest: Guest) -> Iterator[None]:
    host.host.virsh("start", guest.uuid)
    host.host.virsh("managedsave", guest.uuid)
    yield
    host.host.virsh("managedsave-remove", guest.uuid)


def refusal_of(move: Move) -> Reason | None:
    """Why the source neither stops nor parks the machine."""
    try:
        move.stop()
        move.park()
    except DroverError as refused:
        return refused.reason
    return None


@pytest.mark.parametrize(
    ("situation", "reason", "words"),
    [
        (disk_gone, Reason.DISK_MISSING, ".qcow2) is missing"),
        (disk_open, Reason.DISK_IN_USE, "is open in sleep (pid"),
        (disk_on_a_loop_device, Reason.DISK_IN_USE, "is open in the loop device /dev/loop"),
        (disk_is_a_link_out_of_the_roots, Reason.DISK_OUTSIDE_ROOTS, "outside the storage roots"),
        (disk_is_not_what_the_definition_says, Reason.DISK_CORRUPT, "given as qcow2, but"),
        (another_disk("/etc/hostname", "raw"), Reason.DISK_OUTSIDE_ROOTS, "(/etc/hostname)"),
        (another_disk(f"{IMAGES}/x.vmdk", "vmdk"), Reason.DISK_FORMAT_FORBIDDEN, "format vmdk"),
        (memory_saved, Reason.INSTANCE_STATE, "only a running or shut-off machine can move"),
    ],
)  # fmt: skip
def test_what_keeps_a_machine_is_told_and_nothing_changes(
    fleet: TwoHosts, still_guest: Guest, situation: Situation, reason: Reason, words: str
) -> None:
    a = fleet["a"]
    with situation(a, still_guest), both_unchanged(fleet):
        report = a.client(pb.CheckSourceRequest(domain_uuid=still_guest.uuid))
        failed = [c for c in report.checks if c.outcome == c.OUTCOME_FAIL]
        assert failed[0].reason == reason.name
        assert words in failed[0].message
        assert failed[0].fix
        move = Move(a, fleet["b"], still_guest.uuid)
        assert refusal_of(move) is reason
        move.undo()


def paused(host: HostdHost, guest: Guest) -> None:
    host.host.virsh("suspend", guest.uuid)


def suspended(host: HostdHost, guest: Guest) -> None:
    """S3, as a guest enters it: sleep type and enable bit in its power management register.

    The register is there once the firmware has placed it; what is written before is lost.
    """

    def asleep() -> bool:
        monitor(host, guest, "o/w 0x604 0x2400")
        return host.host.state(guest.name) == "pmsuspended"

    wait_for(asleep, "the guest asleep", interval_seconds=0.5)


def crashed(host: HostdHost, guest: Guest) -> None:
    """A panic, as a guest's driver reports it to the panic device."""
    host.host.virsh("set-lifecycle-action", guest.uuid, "crash", "preserve", "--live")
    monitor(host, guest, "o/b 0x505 1")


def monitor(host: HostdHost, guest: Guest, command: str) -> None:
    host.host.virsh("qemu-monitor-command", "--hmp", guest.uuid, command)


@pytest.mark.parametrize(
    ("bring", "state", "told"),
    [
        (paused, "paused", "PAUSED"),
        (suspended, "pmsuspended", "SUSPENDED"),
        (crashed, "crashed", "CRASHED"),
    ],
)
def test_a_machine_in_a_wrong_state_is_neither_stopped_nor_parked(
    fleet: TwoHosts,
    still_guest: Guest,
    bring: Callable[[HostdHost, Guest], None],
    state: str,
    told: str,
) -> None:
    a = fleet["a"]
    a.host.virsh("start", still_guest.uuid)
    bring(a, still_guest)
    wait_for(lambda: a.host.state(still_guest.name) == state, state)
    with both_unchanged(fleet):
        report = a.client(pb.CheckSourceRequest(domain_uuid=still_guest.uuid))
        assert (report.checks[0].check, report.checks[0].reason) == ("state", "INSTANCE_STATE")
        assert told in report.checks[0].message
        move = Move(a, fleet["b"], still_guest.uuid)
        for mode in (Mode.MODE_GRACEFUL, Mode.MODE_GRACEFUL_THEN_FORCE, Mode.MODE_FORCE):
            with pytest.raises(DroverError) as refused:
                move.stop(mode)
            assert refused.value.reason is Reason.INSTANCE_STATE
            assert told in refused.value.message
        with pytest.raises(DroverError) as refused:
            move.park()
        assert refused.value.reason in (Reason.INSTANCE_STARTED_MEANWHILE, Reason.INSTANCE_STATE)
        move.undo()


def test_a_machine_that_is_set_to_start_with_its_host_does_not_start_while_away(
    fleet: TwoHosts, still_guest: Guest
) -> None:
    """Autostart belongs to the definition; it is parked with it and comes back with it."""
    a = fleet["a"]
    a.host.virsh("autostart", still_guest.uuid)
    move = Move(a, fleet["b"], still_guest.uuid)
    move.prepare()
    move.stop()
    move.park()
    a.host.libvirtd.restart()
    assert still_guest.name not in a.domains()
    move.undo()
    assert a.host.state(still_guest.name) == "shut off"
    info = a.host.virsh("dominfo", still_guest.uuid)
    assert "enable" in info.split("Autostart:")[1].split("\n")[0]


def test_a_second_move_of_a_parked_machine_is_refused(fleet: TwoHosts, still_guest: Guest) -> None:
    a = fleet["a"]
    with both_unchanged(fleet):
        first = Move(a, fleet["b"], still_guest.uuid)
        first.stop()
        first.park()
        second = Move(a, fleet["b"], still_guest.uuid, saga_seq=2)
        with pytest.raises(DroverError) as refused:
            second.park()
        assert refused.value.reason is Reason.INSTANCE_BUSY
        assert first.id in refused.value.message
        first.saga_seq = 3
        first.undo()


@contextmanager
def renamed(path: Path) -> Iterator[None]:
    aside = path.rename(path.with_name("away"))
    yield
    aside.rename(path)


@pytest.mark.parametrize("lost", ["manifest.json", "."])
def test_a_parked_machine_that_is_nowhere_is_not_called_put_back(
    fleet: TwoHosts, still_guest: Guest, lost: str
) -> None:
    """As when its storage root is not mounted. Nothing is changed until it is there again."""
    a = fleet["a"]
    with both_unchanged(fleet):
        move = Move(a, fleet["b"], still_guest.uuid)
        move.stop()
        parked = a.host.path(move.park().manifest_path)
        with renamed((parked.parent / lost).resolve()), both_unchanged(fleet):
            for request in (pb.EnsureUnparkedRequest(), pb.DiscardParkedRequest()) * 2:
                with pytest.raises(DroverError) as refused:
                    move.call(a, request)
                assert refused.value.reason is Reason.PARKED_NOT_FOUND
                assert "manifest.json" in refused.value.message
                assert "mounted" in refused.value.message
                assert phase_of(a, move) == "PARKED"
        move.undo()


def test_a_definition_without_its_disks_is_not_called_put_back(
    fleet: TwoHosts, still_guest: Guest
) -> None:
    """Somebody has defined it again from a file, while its disks are who knows where."""
    a = fleet["a"]
    xml = a.host.virsh("dumpxml", "--inactive", still_guest.uuid)
    file = a.host.path("/run/again.xml")
    with both_unchanged(fleet):
        move = Move(a, fleet["b"], still_guest.uuid)
        move.stop()
        parked = a.host.path(move.park().manifest_path)
        with renamed(parked.parent.parent):
            file.write_text(xml)
            a.host.virsh("define", "/run/again.xml")
            with both_unchanged(fleet), pytest.raises(DroverError) as refused:
                move.call(a, pb.EnsureUnparkedRequest())
            assert refused.value.reason is Reason.PARKED_NOT_FOUND
            assert phase_of(a, move) == "PARKED"
            a.host.virsh("undefine", still_guest.uuid)
            file.unlink()
        move.undo()


def test_a_machine_that_was_parked_in_part_and_is_nowhere_is_not_called_put_back(
    fleet: TwoHosts, still_guest: Guest
) -> None:
    """hostd dies while it parks, and comes back without the storage root."""
    a = fleet["a"]
    with both_unchanged(fleet):
        move = Move(a, fleet["b"], still_guest.uuid)
        move.stop()
        parked = a.host.path(move.park().manifest_path)
        set_phase(a, move, "PARKING")
        with renamed(parked.parent), both_unchanged(fleet):
            with pytest.raises(DroverError) as refused:
                move.call(a, pb.EnsureUnparkedRequest())
            assert refused.value.reason is Reason.PARKED_NOT_FOUND
            assert phase_of(a, move) == "PARKING"
        move.undo()


def test_a_machine_put_back_by_hand_is_taken_as_it_is(fleet: TwoHosts, still_guest: Guest) -> None:
    a = fleet["a"]
    with both_unchanged(fleet):
        move = Move(a, fleet["b"], still_guest.uuid)
        move.stop()
        inside = Path(move.park().manifest_path)
        manifest = a.host.path(str(inside))
        for command in json.loads(manifest.read_text())["how_to_restore"]:
            if not command.startswith("#"):
                a.host.run("sh", "-ec", command)
        a.host.run("rm", "-r", str(inside.parent.parent))
        move.undo()
        assert phase_of(a, move) == ""


def phase_of(host: HostdHost, move: Move) -> str:
    """What hostd has on record of its half of the move; empty for nothing."""
    with closing(sqlite3.connect(host.host.path("/var/lib/drover/hostd.db"))) as state:
        row = state.execute("SELECT phase FROM source WHERE migration_id=?", (move.id,)).fetchone()
    return row[0] if row else ""


def set_phase(host: HostdHost, move: Move, phase: str) -> None:
    with closing(sqlite3.connect(host.host.path("/var/lib/drover/hostd.db"))) as state, state:
        state.execute("UPDATE source SET phase=? WHERE migration_id=?", (phase, move.id))


def test_a_disk_replaced_after_it_was_parked_is_not_sent(
    fleet: TwoHosts, still_guest: Guest
) -> None:
    a = fleet["a"]
    with both_unchanged(fleet):
        move = Move(a, fleet["b"], still_guest.uuid)
        move.prepare()
        move.stop()
        move.park()
        parked = a.host.path(move.volumes[0].path)
        with parked.open("r+b") as disk:
            disk.truncate(parked.stat().st_size + 65536)
        with pytest.raises(DroverError) as changed:
            move.copy()
        assert changed.value.reason is Reason.DISK_CHANGED
        with parked.open("r+b") as disk:
            disk.truncate(parked.stat().st_size - 65536)
        move.undo()
