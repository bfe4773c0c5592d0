"""Building on the target what was parked on the source; here one libvirtd plays both."""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import libvirt
import pytest

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.disks.baggage import pack, unpack
from hostd.disks.images import virtual_size_bytes
from hostd.disks.parked import discard
from hostd.disks.parking import park
from hostd.disks.roots import StorageRoots
from hostd.libvirt.build import (
    BuildOrder,
    build_domain,
    forget_built,
    give_autostart,
    remove_built,
    undefine_built,
)
from hostd.v1 import domain_pb2, preflight_pb2
from tests.hostd.disks.test_parking import EFI, MIGRATION, nvram_of, rich_guest, tpm_of
from tests.hostd.guests import MIB, Guest, disk_xml, guest_with_disks, make_disk
from tests.hostd.private_host import IMAGES, virsh

pytestmark = pytest.mark.lab


def arrive(
    conn: libvirt.virConnect, guest: Guest, roots: StorageRoots, state_dir: Path
) -> BuildOrder:
    """Park a guest, copy its volumes to other places, and forget the source."""
    parked = park(conn, guest.uuid, MIGRATION, roots, state_dir)
    paths: dict[str, Path] = {}
    for volume in parked.volumes:
        path = IMAGES / "arrived" / volume.volume_id / Path(volume.name).name
        path.parent.mkdir(parents=True)
        shutil.copyfile(volume.path, path)
        paths[volume.volume_id] = path
    baggage = paths.pop("baggage")
    discard(MIGRATION, roots, state_dir)
    for leftover in (IMAGES / "base.raw", IMAGES / "seed.iso"):
        leftover.unlink(missing_ok=True)
    return BuildOrder(MIGRATION, guest.uuid, guest.name, baggage, parked.volumes[:-1], paths)


def definition(guest: Guest) -> list[str]:
    """The definition without what is allowed to change: paths of volumes."""
    xml = virsh("dumpxml", guest.uuid, "--inactive", "--security-info")
    return [line for line in xml.splitlines() if "<source file=" not in line]


def test_a_rich_guest_arrives_as_it_was(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    guest = rich_guest()
    before = definition(guest)
    nvram, tpm = nvram_of(guest).read_bytes(), (tpm_of(guest) / "tpm2/state").read_bytes()
    guest.disks[0].chmod(0o640)
    order = arrive(conn, guest, roots, state_dir)

    built = build_domain(conn, order, roots, state_dir)

    assert definition(guest) == before
    assert nvram_of(guest).read_bytes() == nvram
    assert (tpm_of(guest) / "tpm2/state").read_bytes() == tpm
    assert list(built.obstacles) == []
    assert [(v.volume_id, v.path) for v in built.volumes] == [
        (volume_id, str(path)) for volume_id, path in order.volume_paths.items()
    ]
    assert order.volume_paths["vda"].stat().st_mode & 0o777 == 0o640
    assert virsh("snapshot-list", guest.uuid, "--name").split() == ["one", "two"]
    assert virsh("snapshot-current", guest.uuid, "--name").strip() == "one"
    embedded = virsh("snapshot-dumpxml", guest.uuid, "two")
    assert str(order.volume_paths["vdb"]) in embedded
    assert str(guest.disks[1]) not in embedded
    assert build_domain(conn, order, roots, state_dir) == built


def test_swtpm_and_qemu_can_read_their_state_as_the_users_they_are(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    """libvirt itself sets only the owner of the directory that holds the state."""
    guest = rich_guest()
    tss, qemu = pwd.getpwnam("tss"), pwd.getpwnam("libvirt-qemu")
    tpm_of(guest).chmod(0o711)
    for path in (tpm_of(guest) / "tpm2", tpm_of(guest) / "tpm2/state"):
        os.chown(path, tss.pw_uid, tss.pw_gid)
    os.chown(nvram_of(guest), qemu.pw_uid, qemu.pw_gid)
    before = {path: ownership(path) for path in small_state(guest)}
    order = arrive(conn, guest, roots, state_dir)
    build_domain(conn, order, roots, state_dir)
    assert {path: ownership(path) for path in small_state(guest)} == before


def small_state(guest: Guest) -> list[Path]:
    return [nvram_of(guest), tpm_of(guest), *sorted(tpm_of(guest).rglob("*"))]


def ownership(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mode, status.st_uid, status.st_gid


def starts_with_its_host(guest: Guest) -> bool:
    return "Autostart:      enable" in virsh("dominfo", guest.uuid)


def test_it_starts_with_its_new_host_only_once_it_belongs_there(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    """I2: a host that boots in mid-move starts no machine that is not its own."""
    guest = rich_guest()
    order = arrive(conn, guest, roots, state_dir)
    build_domain(conn, order, roots, state_dir)
    assert not starts_with_its_host(guest)
    # Taken away and built again it waits all the same.
    undefine_built(conn, guest.uuid, MIGRATION, state_dir)
    build_domain(conn, order, roots, state_dir)
    assert not starts_with_its_host(guest)
    give_autostart(conn, guest.uuid, MIGRATION, state_dir)
    assert starts_with_its_host(guest)
    # Once: what an operator sets afterwards counts.
    virsh("autostart", guest.uuid, "--disable")
    give_autostart(conn, guest.uuid, MIGRATION, state_dir)
    assert not starts_with_its_host(guest)
    virsh("autostart", guest.uuid)
    undefine_built(conn, guest.uuid, MIGRATION, state_dir)
    build_domain(conn, order, roots, state_dir)
    assert starts_with_its_host(guest)


def rewritten(
    order: BuildOrder, change: Callable[[str], str], work: Path, file: str = "domain.xml"
) -> BuildOrder:
    """The order as a source would send it that changes what was announced."""
    machine = unpack(order.baggage, work / "opened")
    definition = machine / file
    changed = change(definition.read_text("utf-8"))
    assert changed != definition.read_text("utf-8")
    definition.write_text(changed, "utf-8")
    return replace(order, baggage=pack(machine, work / "changed"))


SHADOW = (
    "<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
    "<source file='/etc/shadow'/><target dev='vdz' bus='virtio'/></disk>"
)
HOST_DEVICE = (
    "<hostdev mode='subsystem' type='pci'><source>"
    "<address domain='0' bus='0' slot='2' function='0'/></source></hostdev>"
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda xml: xml.replace("<name>plain</name>", "<name>../../../../tmp/x</name>"), "/tmp/x"),
        (lambda xml: xml.replace("<name>plain</name>", "<name>other</name>"), "announced"),
        (lambda xml: xml.replace("</devices>", HOST_DEVICE + "</devices>"), "passes a device"),
        (lambda xml: xml.replace("</devices>", SHADOW + "</devices>"), "/etc/shadow"),
        (lambda xml: xml.replace("</os>", "<nvram template='/etc/shadow'/></os>"), "/etc/shadow"),
    ],
    ids=["name that leads away", "another name", "device of the target", "disk", "NVRAM template"],
)
def test_a_machine_that_was_not_announced_is_refused(
    conn: libvirt.virConnect,
    roots: StorageRoots,
    state_dir: Path,
    tmp_path: Path,
    change: Callable[[str], str],
    words: str,
) -> None:
    guest = guest_with_disks("plain", os_=EFI)
    nvram_of(guest).parent.mkdir(parents=True, exist_ok=True)
    nvram_of(guest).write_bytes(b"nvram")
    order = rewritten(arrive(conn, guest, roots, state_dir), change, tmp_path)
    with pytest.raises(DroverError) as caught:
        build_domain(conn, order, roots, state_dir)
    assert caught.value.reason is Reason.BUILD_FAILED
    assert words in caught.value.message
    assert guest.uuid not in virsh("list", "--all", "--uuid")
    assert not Path("/tmp/x_VARS.fd").exists()


INTERNAL = "<disk name='vda' snapshot='internal'/>"


def replaced(old: str, new: str) -> Callable[[str], str]:
    return lambda xml: xml.replace(old, new, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replaced("</devices>", SHADOW + "</devices>"), "/etc/shadow"),
        (
            replaced("</devices>", SHADOW.replace("file", "block").replace(
                "source block", "source dev") + "</devices>"),
            "/etc/shadow",
        ),
        (
            replaced(INTERNAL, "<disk name='vda' snapshot='external'>"
                               "<source file='/etc/shadow'/></disk>"),
            "/etc/shadow",
        ),
        (
            replaced("<memory snapshot='no'/>", "<memory snapshot='external' file='/etc/shadow'/>"),
            "/etc/shadow",
        ),
        (
            replaced("<target dev='vdb'", "<backingStore type='file'><format type='raw'/><source"
                     " file='/etc/shadow'/><backingStore/></backingStore><target dev='vdb'"),
            "/etc/shadow",
        ),
        (replaced("</devices>", HOST_DEVICE + "</devices>"), "passes a device"),
        (replaced("</os>", "<kernel>/etc/shadow</kernel></os>"), "/etc/shadow"),
        (
            replaced("</os>", "<loader type='rom'>/etc/shadow</loader></os>"),
            "firmware image is /etc/shadow",
        ),
        (replaced("</os>", "<nvram template='/etc/shadow'/></os>"), "/etc/shadow"),
    ],
    ids=["disk", "device", "overlay", "memory", "backing", "host device", "kernel", "loader",
         "NVRAM template"],
)  # fmt: skip
def test_a_snapshot_that_names_what_is_not_the_machines_is_refused(
    conn: libvirt.virConnect,
    roots: StorageRoots,
    state_dir: Path,
    tmp_path: Path,
    change: Callable[[str], str],
    words: str,
) -> None:
    """Going back to it would hand a file of this host to the guest."""
    guest = rich_guest()
    order = arrive(conn, guest, roots, state_dir)
    order = rewritten(order, change, tmp_path, "snapshots/0001.xml")
    with pytest.raises(DroverError) as caught:
        build_domain(conn, order, roots, state_dir)
    assert caught.value.reason is Reason.BUILD_FAILED
    assert words in caught.value.message
    assert "snapshot two" in caught.value.message
    assert guest.uuid not in virsh("list", "--all", "--uuid")
    assert not nvram_of(guest).exists()


def test_a_snapshot_that_is_no_text_is_refused(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path, tmp_path: Path
) -> None:
    guest = rich_guest()
    order = arrive(conn, guest, roots, state_dir)
    machine = unpack(order.baggage, tmp_path / "opened")
    (machine / "snapshots/0001.xml").write_bytes(b"<domainsnapshot>\xff</domainsnapshot>")
    order = replace(order, baggage=pack(machine, tmp_path / "changed"))
    with pytest.raises(DroverError) as caught:
        build_domain(conn, order, roots, state_dir)
    assert caught.value.reason is Reason.BUILD_FAILED
    assert "0001.xml" in caught.value.message


def test_another_size_and_a_larger_disk(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    guest = guest_with_disks("grows", 2)
    order = arrive(conn, guest, roots, state_dir)
    size = preflight_pb2.TargetSize(vcpus=3, memory_mib=96, root_disk_bytes=8 * MIB)
    built = build_domain(conn, replace(order, size=size), roots, state_dir)
    assert (built.vcpus, built.memory_mib) == (3, 96)
    assert [volume.virtual_size_bytes for volume in built.volumes] == [8 * MIB, MIB]
    virsh("start", guest.uuid)


def test_undefined_and_built_again_continues_where_the_guest_was(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    guest = rich_guest()
    order = arrive(conn, guest, roots, state_dir)
    build_domain(conn, order, roots, state_dir)
    # What a guest that ran would leave behind.
    nvram_of(guest).write_bytes(b"written on the target")
    (tpm_of(guest) / "tpm2/state").write_bytes(b"sealed on the target")
    virsh("desc", guest.uuid, "--config", "edited on the target")
    before = definition(guest)

    for _ in range(2):
        undefine_built(conn, guest.uuid, MIGRATION, state_dir)
    assert guest.uuid not in virsh("list", "--all", "--uuid")
    assert not nvram_of(guest).exists()
    assert all(path.exists() for path in order.volume_paths.values())

    build_domain(conn, order, roots, state_dir)
    assert definition(guest) == before
    assert nvram_of(guest).read_bytes() == b"written on the target"
    assert (tpm_of(guest) / "tpm2/state").read_bytes() == b"sealed on the target"
    assert virsh("snapshot-list", guest.uuid, "--name").split() == ["one", "two"]

    for _ in range(2):
        remove_built(conn, guest.uuid, MIGRATION, state_dir)
    assert guest.uuid not in virsh("list", "--all", "--uuid")
    assert not nvram_of(guest).exists()
    assert not tpm_of(guest).exists()
    assert not (state_dir / "built" / MIGRATION).exists()
    assert all(path.exists() for path in order.volume_paths.values())


def test_a_running_machine_is_not_taken_away(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    guest = guest_with_disks("runs")
    order = arrive(conn, guest, roots, state_dir)
    build_domain(conn, order, roots, state_dir)
    virsh("start", guest.uuid)
    for take in (undefine_built, remove_built):
        with pytest.raises(DroverError) as caught:
            take(conn, guest.uuid, MIGRATION, state_dir)
        assert caught.value.reason is Reason.INSTANCE_STATE
    assert virsh("domstate", guest.uuid).strip() == "running"
    forget_built(MIGRATION, state_dir)
    virsh("destroy", guest.uuid)
    # Not this migration's any more.
    remove_built(conn, guest.uuid, MIGRATION, state_dir)
    assert guest.uuid in virsh("list", "--all", "--uuid")


def test_refuses_what_is_taken(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    guest = guest_with_disks("original")
    order = arrive(conn, guest, roots, state_dir)
    other = Guest("original")
    other.define(other.xml())
    with pytest.raises(DroverError) as caught:
        build_domain(conn, order, roots, state_dir)
    assert caught.value.reason is Reason.TARGET_NAME_TAKEN
    virsh("undefine", other.uuid)
    twin = Guest("twin", uuid=guest.uuid)
    twin.define(twin.xml())
    with pytest.raises(DroverError) as caught:
        build_domain(conn, order, roots, state_dir)
    assert caught.value.reason is Reason.TARGET_UUID_TAKEN
    assert virsh("domname", guest.uuid).strip() == "twin"


def test_places_that_the_source_names_are_not_used(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    guest = guest_with_disks("sly", 2)
    order = arrive(conn, guest, roots, state_dir)
    paths = {k: v for k, v in order.volume_paths.items() if k != "vdb"}
    with pytest.raises(DroverError) as caught:
        build_domain(conn, replace(order, volume_paths=paths), roots, state_dir)
    assert caught.value.reason is Reason.BUILD_FAILED
    assert str(guest.disks[1]) in caught.value.message
    assert guest.uuid not in virsh("list", "--all", "--uuid")


def test_baggage_of_another_machine_is_refused(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    order = arrive(conn, guest_with_disks("first"), roots, state_dir)
    other = replace(order, domain_uuid="00000000-0000-4000-8000-00000000abcd")
    with pytest.raises(DroverError) as caught:
        build_domain(conn, other, roots, state_dir)
    assert caught.value.reason is Reason.BUILD_FAILED


def test_an_overlay_finds_its_backing_file_at_its_new_place(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path
) -> None:
    base = make_disk(IMAGES / "base.raw", "raw", MIB)
    top = make_disk(IMAGES / "top.qcow2", backing=(str(base), "raw"))
    guest = Guest("layered", [top])
    guest.define(guest.xml(disk_xml("vda", top)))
    order = arrive(conn, guest, roots, state_dir)
    built = build_domain(conn, order, roots, state_dir)
    assert [v.path for v in built.volumes] == [
        str(order.volume_paths["vda"]),
        str(order.volume_paths["vda.backing1"]),
    ]
    assert built.volumes[1].kind == domain_pb2.VOLUME_KIND_BACKING
    assert virtual_size_bytes(order.volume_paths["vda"], "qcow2") == MIB
    virsh("start", guest.uuid)
