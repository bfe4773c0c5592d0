"""What a target lacks, on real hosts: named, before anything is changed on either."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.v1 import host_service_pb2 as pb
from hostd.v1 import preflight_pb2
from tests.hostd.fleet import Guest, HostdHost, Move, TwoHosts
from tests.hostd.unchanged import both_unchanged
from tests.lab.host import IMAGES, domain_xml, mac_of

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

TOO_MANY_CPUS = preflight_pb2.TargetSize(vcpus=9999, memory_mib=64)
Situation = Callable[[TwoHosts, Guest], AbstractContextManager[preflight_pb2.IncomingMachine]]


def machine_of(fleet: TwoHosts, guest: Guest) -> preflight_pb2.IncomingMachine:
    """The guest as its source describes it now."""
    domain = fleet["a"].client(pb.GetDomainRequest(domain_uuid=guest.uuid))
    return preflight_pb2.IncomingMachine(domain=domain)


@contextmanager
def neighbour(host: HostdHost, name: str, guest_uuid: str, mac: str) -> Iterator[None]:
    """A domain without disks that somebody else has defined."""
    xml = domain_xml(name, guest_uuid, f"{IMAGES}/none.raw", "raw", 64, 1, mac)
    file = host.host.path("/run/neighbour.xml")
    file.write_text(xml)
    host.host.virsh("define", "/run/neighbour.xml")
    file.unlink()
    try:
        yield
    finally:
        host.host.virsh("undefine", guest_uuid)


@contextmanager
def same_name(fleet: TwoHosts, guest: Guest) -> Iterator[preflight_pb2.IncomingMachine]:
    other = str(uuid.uuid4())
    with neighbour(fleet["b"], guest.name, other, mac_of(other)):
        yield machine_of(fleet, guest)


@contextmanager
def same_uuid(fleet: TwoHosts, guest: Guest) -> Iterator[preflight_pb2.IncomingMachine]:
    with neighbour(fleet["b"], "stranger", guest.uuid, mac_of(str(uuid.uuid4()))):
        yield machine_of(fleet, guest)


@contextmanager
def same_mac(fleet: TwoHosts, guest: Guest) -> Iterator[preflight_pb2.IncomingMachine]:
    with neighbour(fleet["b"], "stranger", str(uuid.uuid4()), mac_of(guest.uuid)):
        yield machine_of(fleet, guest)


@contextmanager
def another_bridge(fleet: TwoHosts, guest: Guest) -> Iterator[preflight_pb2.IncomingMachine]:
    host = fleet["a"].host
    nic = ("--type", "bridge", "--source", "br9", "--mac", "52:54:00:99:99:99", "--config")
    host.virsh("attach-interface", guest.uuid, *nic)
    try:
        yield machine_of(fleet, guest)
    finally:
        host.virsh("detach-interface", guest.uuid, *nic[:2], *nic[4:])


@contextmanager
def another_network(fleet: TwoHosts, guest: Guest) -> Iterator[preflight_pb2.IncomingMachine]:
    host = fleet["a"].host
    nic = ("--type", "network", "--source", "lan9", "--mac", "52:54:00:99:99:99", "--config")
    host.virsh("attach-interface", guest.uuid, *nic)
    try:
        yield machine_of(fleet, guest)
    finally:
        host.virsh("detach-interface", guest.uuid, *nic[:2], *nic[4:])


@contextmanager
def a_small_disk(fleet: TwoHosts, guest: Guest) -> Iterator[preflight_pb2.IncomingMachine]:
    with file_system_of(fleet["b"], "4m"):
        yield machine_of(fleet, guest)


@contextmanager
def a_file_in_the_way(fleet: TwoHosts, guest: Guest) -> Iterator[preflight_pb2.IncomingMachine]:
    file = fleet["b"].host.path(f"{IMAGES}/{guest.name}.qcow2")
    file.write_text("somebody else's")
    yield machine_of(fleet, guest)
    assert file.read_text() == "somebody else's"
    file.unlink()


@contextmanager
def a_link_in_the_way(fleet: TwoHosts, guest: Guest) -> Iterator[preflight_pb2.IncomingMachine]:
    """A directory of the volume's place leads out of the root."""
    outside = fleet["b"].host.path(f"{IMAGES}/away")
    outside.symlink_to("/etc")
    machine = machine_of(fleet, guest)
    machine.volume_mappings.add(volume_id="vda", root="images", name="away/hosts")
    yield machine
    outside.unlink()


def told(change: Callable[[preflight_pb2.IncomingMachine], object]) -> Situation:
    """The real target is told of a machine that is otherwise than the guest is."""

    @contextmanager
    def situation(fleet: TwoHosts, guest: Guest) -> Iterator[preflight_pb2.IncomingMachine]:
        machine = machine_of(fleet, guest)
        change(machine)
        yield machine

    return situation


@contextmanager
def file_system_of(host: HostdHost, size: str) -> Iterator[None]:
    """A file system of its own, of this size, for the images of a host."""
    host.host.run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", IMAGES)
    try:
        yield
    finally:
        host.host.run("umount", IMAGES)


def map_to(root: str, name: str) -> Callable[[preflight_pb2.IncomingMachine], object]:
    return lambda machine: machine.volume_mappings.add(volume_id="vda", root=root, name=name)


@pytest.mark.parametrize(
    ("situation", "reason", "words"),
    [
        (same_name, Reason.TARGET_NAME_TAKEN, "Another domain called"),
        (same_uuid, Reason.TARGET_UUID_TAKEN, "(stranger) is here already"),
        (same_mac, Reason.TARGET_MAC_TAKEN, "The domain stranger is here with the MAC address"),
        (another_bridge, Reason.TARGET_LACKS_BRIDGE, "no br9 here; there are bridges br0"),
        (another_network, Reason.TARGET_LACKS_NETWORK, "no active libvirt network lan9"),
        (a_small_disk, Reason.TARGET_LACKS_SPACE, "MiB are free in root images"),
        (a_file_in_the_way, Reason.TARGET_FILE_EXISTS, "is in the way of volume vda"),
        (a_link_in_the_way, Reason.DISK_OUTSIDE_ROOTS, "a symbolic link leads out of the root"),
        (
            told(lambda machine: setattr(machine.domain, "machine_type", "pc-q35-99.0")),
            Reason.TARGET_LACKS_MACHINE_TYPE,
            "no machine type pc-q35-99.0",
        ),
        (
            told(lambda machine: setattr(machine.domain, "virt_type", "hvf")),
            Reason.TARGET_LACKS_VIRT_TYPE,
            "It needs hvf; this host has",
        ),
        (
            told(lambda machine: setattr(machine.domain, "arch", "s390x")),
            Reason.TARGET_LACKS_VIRT_TYPE,
            "it needs s390x",
        ),
        (
            told(lambda machine: setattr(machine.size, "memory_mib", 1 << 30)),
            Reason.TARGET_LACKS_MEMORY,
            f"It needs {1 << 30} MiB of memory",
        ),
        (
            told(lambda machine: machine.size.MergeFrom(TOO_MANY_CPUS)),
            Reason.TARGET_LACKS_CPUS,
            "it needs 9999",
        ),
        (told(map_to("tape", "web.qcow2")), Reason.TARGET_LACKS_ROOT, "no storage root 'tape'"),
        (told(map_to("images", "../etc/passwd")), Reason.DISK_OUTSIDE_ROOTS, "'..' part"),
        (told(map_to("images", "/etc/passwd")), Reason.DISK_OUTSIDE_ROOTS, "not relative"),
    ],
)  # fmt: skip
def test_what_a_target_lacks_is_told_before_anything_changes(
    fleet: TwoHosts, still_guest: Guest, situation: Situation, reason: Reason, words: str
) -> None:
    b = fleet["b"]
    with situation(fleet, still_guest) as machine, both_unchanged(fleet):
        report = b.client(pb.CheckTargetRequest(machine=machine))
        failed = [c for c in report.checks if c.outcome == c.OUTCOME_FAIL]
        assert [check.reason for check in failed] == [reason.name]
        assert words in failed[0].message
        assert failed[0].fix
        move = Move(fleet["a"], b, still_guest.uuid)
        with pytest.raises(DroverError) as refused:
            b.client(pb.PrepareTargetRequest(fence=move.fence("prepare"), machine=machine))
        assert refused.value.reason is reason
        assert refused.value.subject == "hosts/b"
        assert [(v.subject, v.type) for v in refused.value.violations] == [("hosts/b", reason.name)]


def test_everything_that_is_wrong_is_told_at_once(fleet: TwoHosts, still_guest: Guest) -> None:
    b = fleet["b"]
    with (
        same_name(fleet, still_guest) as machine,
        a_file_in_the_way(fleet, still_guest),
        both_unchanged(fleet),
    ):
        move = Move(fleet["a"], b, still_guest.uuid)
        with pytest.raises(DroverError) as refused:
            b.client(pb.PrepareTargetRequest(fence=move.fence("prepare"), machine=machine))
        assert refused.value.reason is Reason.TARGET_NAME_TAKEN
        assert [v.type for v in refused.value.violations] == [
            "TARGET_NAME_TAKEN",
            "TARGET_FILE_EXISTS",
        ]


def test_room_that_another_move_has_reserved_is_not_promised_twice(
    fleet: TwoHosts, still_guest: Guest
) -> None:
    a, b = fleet["a"], fleet["b"]
    first = Move(a, b, still_guest.uuid)
    machine = machine_of(fleet, still_guest)
    with file_system_of(b, "40m"):
        first.prepare()
        second = preflight_pb2.IncomingMachine()
        second.CopyFrom(machine)
        second.domain.uuid, second.domain.name = str(uuid.uuid4()), "second"
        second.domain.volumes[0].name = "second.qcow2"
        second.domain.ClearField("interfaces")
        with both_unchanged(fleet):
            move = Move(a, b, second.domain.uuid)
            with pytest.raises(DroverError) as refused:
                b.client(pb.PrepareTargetRequest(fence=move.fence("prepare"), machine=second))
            assert refused.value.reason is Reason.TARGET_LACKS_SPACE
        first.undo()
        move.call(b, pb.PrepareTargetRequest(machine=second))
        move.call(b, pb.EnsureAbsentRequest())


def test_a_target_that_fills_up_in_mid_copy_gives_the_guest_back(
    fleet: TwoHosts, guest: Guest
) -> None:
    a, b = fleet["a"], fleet["b"]
    with both_unchanged(fleet), file_system_of(b, "60m"):
        move = Move(a, b, guest.uuid)
        move.prepare()
        move.stop()
        move.park()
        b.host.run("sh", "-c", f"head -c 55M /dev/zero > {IMAGES}/somebody-elses")
        with pytest.raises(DroverError) as full:
            move.copy()
        assert full.value.reason is Reason.TARGET_LACKS_SPACE
        a.host.forget_console(guest.name)
        move.undo()
        assert b.host.run("ls", "-A", IMAGES).split() == ["somebody-elses"]
        a.host.wait_for_console(guest.name, "READY")


def test_a_machine_parked_here_is_not_taken_in_again(fleet: TwoHosts, still_guest: Guest) -> None:
    a = fleet["a"]
    machine = machine_of(fleet, still_guest)
    with both_unchanged(fleet):
        away = Move(a, fleet["b"], still_guest.uuid)
        away.stop()
        away.park()
        back = Move(fleet["b"], a, still_guest.uuid, saga_seq=2)
        with pytest.raises(DroverError) as refused:
            a.client(pb.PrepareTargetRequest(fence=back.fence("prepare"), machine=machine))
        assert refused.value.reason is Reason.INSTANCE_BUSY
        assert away.id in refused.value.message
        away.saga_seq = 3
        away.undo()
