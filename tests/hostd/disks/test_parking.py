"""Parking real domains: put aside, put back, and killed at every step on the way."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import libvirt
import pytest

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.disks.parked import discard, find_parked, unpark
from hostd.disks.parking import park
from hostd.disks.roots import StorageRoots
from hostd.v1 import domain_pb2
from tests.hostd.guests import MIB, Guest, disk_xml, guest_with_disks, make_disk
from tests.hostd.private_host import IMAGES, virsh
from tests.support.forking import fork

pytestmark = pytest.mark.lab

MIGRATION = "11111111-2222-4333-8444-555555555555"
TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
EFI = "<firmware><feature enabled='no' name='secure-boot'/></firmware>"


def rich_guest() -> Guest:
    """Two disks, one of them with a backing file; a CD; UEFI; a TPM; snapshots; autostart."""
    (IMAGES / "rich").mkdir()
    make_disk(IMAGES / "base.raw", "raw", MIB)
    make_disk(IMAGES / "seed.iso", "raw", MIB)
    disks = [
        make_disk(IMAGES / "rich/a b.qcow2", backing=("../base.raw", "raw")),
        make_disk(IMAGES / "rich/second.qcow2"),
    ]
    cd = (
        "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>"
        f"<source file='{IMAGES}/seed.iso'/><target dev='sda' bus='sata'/><readonly/></disk>"
    )
    guest = Guest("rich", disks)
    devices = disk_xml("vda", disks[0]) + disk_xml("vdb", disks[1]) + cd + TPM
    guest.define(guest.xml(devices, EFI))
    for file, content in ((nvram_of(guest), b"nvram"), (tpm_of(guest) / "tpm2/state", b"tpm")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content * 1000)
    virsh("autostart", guest.uuid)
    (IMAGES / "rich/first.xml").write_text("<domainsnapshot><name>first</name></domainsnapshot>")
    redefinable_snapshots(guest)
    return guest


def redefinable_snapshots(guest: Guest) -> None:
    """Two snapshots, the first one current again; metadata only, as pflash allows no others."""
    domain = virsh("dumpxml", guest.uuid, "--security-info")
    for name, parent, current in (("one", "", "1"), ("two", "one", "0")):
        parents = f"<parent><name>{parent}</name></parent>" if parent else ""
        file = IMAGES / "rich/first.xml"
        file.write_text(
            f"<domainsnapshot><name>{name}</name><state>shutoff</state>{parents}"
            f"<creationTime>1700000000</creationTime><memory snapshot='no'/>"
            "<disks><disk name='vda' snapshot='internal'/><disk name='vdb' snapshot='internal'/>"
            f"</disks>{domain}</domainsnapshot>"
        )
        flags = ["--redefine", *(["--current"] if current == "1" else [])]
        virsh("snapshot-create", guest.uuid, str(file), *flags)
    file.unlink()


def nvram_of(guest: Guest) -> Path:
    return Path("/var/lib/libvirt/qemu/nvram") / f"{guest.name}_VARS.fd"


def tpm_of(guest: Guest) -> Path:
    return Path("/var/lib/libvirt/swtpm") / guest.uuid


def state_of(guest: Guest) -> dict[str, object]:
    """Everything about a guest that has to be the same afterwards."""
    files = {}
    for top in (IMAGES, nvram_of(guest).parent, tpm_of(guest)):
        for path in sorted(top.rglob("*")):
            if path.is_file():
                status = path.stat()
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                files[str(path)] = (content, status.st_mode, status.st_uid, status.st_gid)
    snapshots = virsh("snapshot-list", guest.uuid, "--name").split()
    return {
        "files": files,
        "inodes": [path.stat().st_ino for path in guest.disks],
        "xml": virsh("dumpxml", guest.uuid, "--inactive", "--security-info"),
        "snapshots": [virsh("snapshot-dumpxml", guest.uuid, name) for name in snapshots],
        "current": virsh("snapshot-current", guest.uuid, "--name") if snapshots else "",
        "autostart": "Autostart:      enable" in virsh("dominfo", guest.uuid),
    }


def is_defined(guest: Guest) -> bool:
    return guest.uuid in virsh("list", "--all", "--uuid").split()


def test_there_and_back(conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path) -> None:
    guest = rich_guest()
    before = state_of(guest)

    parked = park(conn, guest.uuid, MIGRATION, roots, state_dir)

    assert not is_defined(guest)
    assert [p for p in [*guest.disks, nvram_of(guest), tpm_of(guest)] if p.exists()] == []
    assert (IMAGES / "base.raw").exists()
    assert (IMAGES / "seed.iso").exists()
    assert [(v.volume_id, v.kind, v.name) for v in parked.volumes] == [
        ("vda", domain_pb2.VOLUME_KIND_DISK, "rich/a b.qcow2"),
        ("vda.backing1", domain_pb2.VOLUME_KIND_BACKING, "base.raw"),
        ("vdb", domain_pb2.VOLUME_KIND_DISK, "rich/second.qcow2"),
        ("sda", domain_pb2.VOLUME_KIND_MEDIUM, "seed.iso"),
        ("baggage", domain_pb2.VOLUME_KIND_BAGGAGE, "baggage.tar.zst"),
    ]
    for volume in parked.volumes:
        assert Path(volume.path).stat().st_size == volume.size_bytes
    home = parked.manifest_path.parent
    assert home == IMAGES / ".drover-parked" / MIGRATION
    for path in [home, *home.parents[:1], home / "baggage.tar.zst", home / "machine/domain.xml"]:
        assert path.stat().st_mode & 0o077 == 0, path
    assert park(conn, guest.uuid, MIGRATION, roots, state_dir) == parked
    found = find_parked(roots, state_dir)
    assert [(m.domain_uuid, m.domain_name, m.migration_id) for m in found] == [
        (guest.uuid, "rich", MIGRATION)
    ]
    assert found[0].allocated_bytes > 0

    unpark(conn, MIGRATION, roots, state_dir)

    assert state_of(guest) == before
    assert find_parked(roots, state_dir) == []
    assert not (IMAGES / ".drover-parked").exists()
    unpark(conn, MIGRATION, roots, state_dir)
    assert state_of(guest) == before


def test_by_hand_with_mv_and_virsh_only(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    guest = rich_guest()
    before = state_of(guest)
    parked = park(conn, guest.uuid, MIGRATION, roots, state_dir)

    lines = json.loads(parked.manifest_path.read_text())["how_to_restore"]
    commands = [line for line in lines if not line.startswith("#")]
    assert {shlex.split(command)[0] for command in commands} == {"mv", "virsh"}
    for command in commands:
        subprocess.run(["sh", "-ec", command], check=True, capture_output=True)

    # Drover may come to it later and tidies up.
    unpark(conn, MIGRATION, roots, state_dir)
    assert state_of(guest) == before
    assert not (IMAGES / ".drover-parked").exists()


def test_discard_deletes_the_copy_and_nothing_else(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    guest = rich_guest()
    in_child(conn, lambda c, at: park(c, guest.uuid, MIGRATION, roots, state_dir, at=at), 3)
    with pytest.raises(DroverError) as caught:
        discard(MIGRATION, roots, state_dir)
    assert caught.value.reason is Reason.MIGRATION_STATE

    parked = park(conn, guest.uuid, MIGRATION, roots, state_dir)
    disks = sum(v.allocated_bytes for v in parked.volumes if v.volume_id in ("vda", "vdb"))
    freed = discard(MIGRATION, roots, state_dir)

    assert freed >= disks
    assert sorted(p.name for p in IMAGES.rglob("*")) == ["base.raw", "rich", "seed.iso"]
    assert discard(MIGRATION, roots, state_dir) == 0
    unpark(conn, MIGRATION, roots, state_dir)
    assert not is_defined(guest)


Step = Callable[[libvirt.virConnect, Callable[[str], None]], object]


def in_child(conn: libvirt.virConnect, step: Step, crash_at: int | None) -> list[str]:
    """Run a step in a process that dies at its n-th crash point; the points it passed."""
    read, write = os.pipe()
    pid = fork()
    if pid == 0:
        passed = 0

        def at(point: str) -> None:
            nonlocal passed
            os.write(write, point.encode() + b"\n")
            if passed == crash_at:
                os._exit(42)
            passed += 1

        status = 1
        try:
            # The parent's connection must not be used by two processes.
            step(libvirt.open("qemu:///system"), at)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        points = pipe.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == (0 if crash_at is None or crash_at >= len(points) else 42), points
    return points


def test_killed_anywhere_while_parking(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    guest = rich_guest()
    before = state_of(guest)

    def parking(connection: libvirt.virConnect, at: Callable[[str], None]) -> object:
        return park(connection, guest.uuid, MIGRATION, roots, state_dir, at=at)

    points = in_child(conn, parking, None)
    unpark(conn, MIGRATION, roots, state_dir)
    assert len(points) >= 8
    for number, point in enumerate(points):
        for go_on in (True, False):
            in_child(conn, parking, number)
            if go_on:
                park(conn, guest.uuid, MIGRATION, roots, state_dir)
                assert not is_defined(guest), point
            unpark(conn, MIGRATION, roots, state_dir)
            assert state_of(guest) == before, point
            assert not (IMAGES / ".drover-parked").exists(), point


def test_killed_anywhere_while_unparking(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    guest = rich_guest()
    before = state_of(guest)

    def unparking(connection: libvirt.virConnect, at: Callable[[str], None]) -> None:
        unpark(connection, MIGRATION, roots, state_dir, at=at)

    park(conn, guest.uuid, MIGRATION, roots, state_dir)
    points = in_child(conn, unparking, None)
    assert len(points) >= 5
    for number, point in enumerate(points):
        for park_again in (False, True):
            park(conn, guest.uuid, MIGRATION, roots, state_dir)
            in_child(conn, unparking, number)
            if park_again:
                park(conn, guest.uuid, MIGRATION, roots, state_dir)
                assert not is_defined(guest), point
            unpark(conn, MIGRATION, roots, state_dir)
            assert state_of(guest) == before, point
            assert not (IMAGES / ".drover-parked").exists(), point


def test_killed_anywhere_while_discarding(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    def discarding(_: libvirt.virConnect, at: Callable[[str], None]) -> int:
        return discard(MIGRATION, roots, state_dir, at=at)

    def park_another() -> None:
        park(conn, guest_with_disks("gone", 2).uuid, MIGRATION, roots, state_dir)

    park_another()
    points = in_child(conn, discarding, None)
    assert len(points) >= 4
    for number, point in enumerate(points):
        park_another()
        in_child(conn, discarding, number)
        if point != "manifest gone":
            with pytest.raises(DroverError) as caught:
                unpark(conn, MIGRATION, roots, state_dir)
            assert caught.value.reason is Reason.PARKED_NOT_FOUND
        discard(MIGRATION, roots, state_dir)
        assert [p for p in IMAGES.rglob("*") if p.is_file()] == [], point
        assert not (IMAGES / ".drover-parked").exists(), point


def test_a_guest_that_runs_is_left_alone(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    guest = guest_with_disks("alive")
    virsh("start", guest.uuid)
    with pytest.raises(DroverError) as caught:
        park(conn, guest.uuid, MIGRATION, roots, state_dir)
    assert caught.value.reason is Reason.INSTANCE_STARTED_MEANWHILE
    assert virsh("domstate", guest.uuid).strip() == "running"
    assert guest.disks[0].exists()


def test_a_guest_that_starts_in_the_last_moment_keeps_its_definition(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    guest = guest_with_disks("quick")

    def start(point: str) -> None:
        if point == "manifest written":
            virsh("start", guest.uuid)

    with pytest.raises(DroverError) as caught:
        park(conn, guest.uuid, MIGRATION, roots, state_dir, at=start)
    assert caught.value.reason is Reason.INSTANCE_STARTED_MEANWHILE
    assert virsh("domstate", guest.uuid).strip() == "running"
    assert "yes" in virsh("dominfo", guest.uuid).split("Persistent:")[1].split("\n")[0]
    assert guest.disks[0].exists()
    unpark(conn, MIGRATION, roots, state_dir)
    assert virsh("domstate", guest.uuid).strip() == "running"
    assert find_parked(roots, state_dir) == []


def test_a_definition_changed_after_a_crash_is_not_lost(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    guest = guest_with_disks("edited")
    in_child(conn, lambda c, at: park(c, guest.uuid, MIGRATION, roots, state_dir, at=at), 1)
    virsh("desc", guest.uuid, "--config", "edited since")
    park(conn, guest.uuid, MIGRATION, roots, state_dir)
    unpark(conn, MIGRATION, roots, state_dir)
    assert "edited since" in virsh("dumpxml", guest.uuid)


def test_disks_in_use_or_needed_by_others_stay(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    guest = guest_with_disks("held")
    with guest.disks[0].open("rb") as disk:
        holder = subprocess.Popen(["sleep", "100"], stdin=disk)
    try:
        with pytest.raises(DroverError) as caught:
            park(conn, guest.uuid, MIGRATION, roots, state_dir)
    finally:
        holder.kill()
        holder.wait()
    assert caught.value.reason is Reason.DISK_IN_USE
    assert caught.value.metadata["pid"] == str(holder.pid)
    assert "sleep" in caught.value.message

    overlay = make_disk(IMAGES / "child.qcow2", backing=(str(guest.disks[0]), "qcow2"))
    child = Guest("child", [overlay])
    child.define(child.xml(disk_xml("vda", overlay)))
    with pytest.raises(DroverError) as caught:
        park(conn, guest.uuid, MIGRATION, roots, state_dir)
    assert caught.value.reason is Reason.INSTANCE_IMMOVABLE
    assert "vda.backing1 of the domain child" in caught.value.message
    assert is_defined(guest)
    assert guest.disks[0].exists()


def test_another_file_in_a_disks_place_is_kept(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    guest = guest_with_disks("taken")
    before = state_of(guest)
    park(conn, guest.uuid, MIGRATION, roots, state_dir)
    guest.disks[0].write_text("somebody else's")
    with pytest.raises(DroverError) as caught:
        unpark(conn, MIGRATION, roots, state_dir)
    assert caught.value.reason is Reason.TARGET_FILE_EXISTS
    assert guest.disks[0].read_text() == "somebody else's"
    guest.disks[0].unlink()
    unpark(conn, MIGRATION, roots, state_dir)
    assert state_of(guest) == before


def test_a_machine_without_disks(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    guest = Guest("bare")
    guest.define(guest.xml())
    before = state_of(guest)
    parked = park(conn, guest.uuid, MIGRATION, roots, state_dir)
    assert parked.manifest_path.is_relative_to(state_dir)
    assert [v.volume_id for v in parked.volumes] == ["baggage"]
    unpark(conn, MIGRATION, roots, state_dir)
    assert state_of(guest) == before


def test_a_malformed_migration_id_reaches_no_file(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    for bad in ("", "..", "../../etc", "11111111-2222-4333-8444-55555555555G"):
        with pytest.raises(DroverError) as caught:
            unpark(conn, bad, roots, state_dir)
        assert caught.value.reason is Reason.INVALID_FIELD
