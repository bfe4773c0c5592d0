"""Describing domains of a real libvirtd."""

from __future__ import annotations

import subprocess
from pathlib import Path

import libvirt
import pytest

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.disks.roots import StorageRoots
from hostd.libvirt import domains, power
from hostd.libvirt.conn import LibvirtConnection
from hostd.v1 import domain_pb2
from tests.hostd.guests import MIB, Guest, disk_xml, guest_with_disks, make_disk
from tests.hostd.private_host import IMAGES, PrivateHost, virsh, wait_for

pytestmark = pytest.mark.lab


def test_describes_a_guest_with_a_chain(conn: libvirt.virConnect, roots: StorageRoots) -> None:
    base = make_disk(IMAGES / "base.raw", "raw", 2 * MIB)
    top = make_disk(IMAGES / "web.qcow2", "qcow2", 4 * MIB, backing=("base.raw", "raw"))
    guest = Guest("web")
    guest.define(guest.xml(disk_xml("vda", top) + _USER_NET))

    described = domains.describe(domains.find(conn, guest.uuid), roots)

    assert list(described.obstacles) == []
    assert (described.name, described.uuid) == ("web", guest.uuid)
    assert described.power_state == domain_pb2.POWER_STATE_SHUTOFF
    assert (described.vcpus, described.memory_mib) == (1, 64)
    assert (described.virt_type, described.arch) == ("qemu", "x86_64")
    assert described.machine_type.startswith("pc-q35-")
    assert described.firmware == "bios"
    assert described.has_secrets
    assert "s3cret" not in str(described)
    assert [(v.volume_id, v.kind, v.root, v.name, v.format) for v in described.volumes] == [
        ("vda", domain_pb2.VOLUME_KIND_DISK, "images", "web.qcow2", "qcow2"),
        ("vda.backing1", domain_pb2.VOLUME_KIND_BACKING, "images", "base.raw", "raw"),
    ]
    assert described.volumes[0].virtual_size_bytes == 4 * MIB
    assert described.volumes[0].backing_volume_id == "vda.backing1"
    assert described.volumes[0].size_bytes == top.stat().st_size
    assert described.volumes[1].size_bytes == base.stat().st_size
    assert described.disk_size_bytes == top.stat().st_size
    assert [(i.mac_address, i.type) for i in described.interfaces] == [
        ("52:54:00:12:34:56", "user")
    ]


_USER_NET = "<interface type='user'><mac address='52:54:00:12:34:56'/></interface>"


def test_power_goes_up_and_down(conn: libvirt.virConnect, roots: StorageRoots) -> None:
    dom = domains.find(conn, guest_with_disks("up").uuid)
    assert power.power_state(dom) == domain_pb2.POWER_STATE_SHUTOFF
    power.force_off(dom)
    power.request_shutdown(dom)
    power.start(dom)
    power.start(dom)
    assert power.power_state(dom) == domain_pb2.POWER_STATE_RUNNING
    assert not power.sync_time(dom)
    power.request_shutdown(dom)
    dom.suspend()
    assert power.power_state(dom) == domain_pb2.POWER_STATE_PAUSED
    power.force_off(dom)
    assert power.power_state(dom) == domain_pb2.POWER_STATE_SHUTOFF
    assert not power.went_off_by_itself(dom)


def test_a_start_that_fails_says_why(conn: libvirt.virConnect) -> None:
    guest = guest_with_disks("broken")
    guest.disks[0].unlink()
    with pytest.raises(DroverError) as caught:
        power.start(domains.find(conn, guest.uuid))
    assert caught.value.reason is Reason.START_FAILED
    assert str(guest.disks[0]) in caught.value.message


def test_unknown_domains(conn: libvirt.virConnect) -> None:
    with pytest.raises(DroverError) as caught:
        domains.find(conn, "00000000-0000-4000-8000-000000000000")
    assert caught.value.reason is Reason.DOMAIN_NOT_FOUND
    with pytest.raises(DroverError) as caught:
        domains.find(conn, "web")
    assert caught.value.reason is Reason.INVALID_NAME


@pytest.mark.parametrize(
    ("disk", "reason", "words"),
    [
        (disk_xml("vda", IMAGES / "gone.qcow2"), Reason.DISK_MISSING, "is missing"),
        (disk_xml("vda", "/etc/hostname", "raw"), Reason.DISK_OUTSIDE_ROOTS, "outside"),
        (disk_xml("vda", IMAGES / "link.raw", "raw"), Reason.DISK_OUTSIDE_ROOTS, "outside"),
        (disk_xml("vda", IMAGES / "x.vmdk", "vmdk"), Reason.DISK_FORMAT_FORBIDDEN, "vmdk"),
        (disk_xml("vda", IMAGES / "x.vmdk"), Reason.DISK_CORRUPT, "not begin with"),
        (
            "<disk type='network' device='disk'><driver name='qemu' type='raw'/>"
            "<source protocol='nbd' name='x'><host name='h' port='1'/></source>"
            "<target dev='vda' bus='virtio'/></disk>",
            Reason.INSTANCE_IMMOVABLE,
            "of type network",
        ),
        (
            "<filesystem type='mount'><source dir='/srv'/><target dir='x'/></filesystem>",
            Reason.INSTANCE_IMMOVABLE,
            "shares a directory",
        ),
    ],
)
def test_names_what_keeps_a_machine_here(
    conn: libvirt.virConnect, roots: StorageRoots, disk: str, reason: Reason, words: str
) -> None:
    (IMAGES / "link.raw").symlink_to("/etc/hostname")
    (IMAGES / "x.vmdk").write_bytes(b"KDMV" * 64)
    guest = Guest("stuck")
    guest.define(guest.xml(disk))
    found = domains.inspect(domains.find(conn, guest.uuid), roots)
    assert [obstacle.reason for obstacle in found.obstacles] == [reason]
    assert words in found.domain.obstacles[0]


def test_a_guest_cannot_choose_its_backing_file(
    conn: libvirt.virConnect, roots: StorageRoots, tmp_path: Path
) -> None:
    """I8: a raw disk whose guest wrote a qcow2 header stays raw."""
    secret = tmp_path / "secret"
    secret.write_text("x" * 512)
    evil = make_disk(IMAGES / "evil.raw", "qcow2", MIB, backing=(str(secret), "raw"))
    guest = Guest("evil")
    guest.define(guest.xml(disk_xml("vda", evil, "raw")))
    described = domains.describe(domains.find(conn, guest.uuid), roots)
    assert [v.volume_id for v in described.volumes] == ["vda"]
    assert described.volumes[0].virtual_size_bytes == evil.stat().st_size


def test_volumes_of_a_pool_are_files(conn: libvirt.virConnect, roots: StorageRoots) -> None:
    virsh("pool-create-as", "pool1", "dir", "--target", str(IMAGES))
    try:
        virsh("vol-create-as", "pool1", "p.qcow2", "1M", "--format", "qcow2")
        guest = Guest("pooled")
        disk = (
            "<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/>"
            "<source pool='pool1' volume='p.qcow2'/><target dev='vda' bus='virtio'/></disk>"
        )
        guest.define(guest.xml(disk))
        described = domains.describe(domains.find(conn, guest.uuid), roots)
        assert list(described.obstacles) == []
        assert described.volumes[0].name == "p.qcow2"
    finally:
        virsh("pool-destroy", "pool1")
    gone = domains.describe(domains.find(conn, guest.uuid), roots)
    assert "pool1/p.qcow2" in gone.obstacles[0]


def test_transient_and_saved_and_external_snapshots(
    conn: libvirt.virConnect, roots: StorageRoots
) -> None:
    guest = guest_with_disks("saved")
    dom = domains.find(conn, guest.uuid)
    virsh("snapshot-create-as", guest.uuid, "s1")
    assert list(domains.describe(dom, roots).obstacles) == []
    virsh("start", guest.uuid)
    virsh("managedsave", guest.uuid)
    saved = domains.describe(dom, roots)
    assert saved.power_state == domain_pb2.POWER_STATE_SAVED
    assert "managed save" in saved.obstacles[0]
    virsh("managedsave-remove", guest.uuid)
    virsh("snapshot-create-as", guest.uuid, "ext", "--disk-only")
    assert "ext is external" in domains.describe(dom, roots).obstacles[0]

    transient = Guest("fleeting")
    file = IMAGES / "t.xml"
    file.write_text(transient.xml())
    virsh("create", str(file))
    described = domains.describe(domains.find(conn, transient.uuid), roots)
    assert not described.persistent
    assert "transient" in described.obstacles[0]


def test_a_snapshot_of_a_disk_that_is_no_longer_the_machines(
    conn: libvirt.virConnect, roots: StorageRoots
) -> None:
    guest = guest_with_disks("changed", 2)
    virsh("snapshot-create-as", guest.uuid, "before")
    dom = domains.find(conn, guest.uuid)
    assert list(domains.describe(dom, roots).obstacles) == []
    virsh("detach-disk", guest.uuid, "vdb", "--config")
    (obstacle,) = domains.describe(dom, roots).obstacles
    assert "Its snapshot before" in obstacle
    assert str(guest.disks[1]) in obstacle
    assert "virsh snapshot-delete" in obstacle


def test_the_connection_mends_itself(
    connection: LibvirtConnection, on_host: PrivateHost, roots: StorageRoots
) -> None:
    guest = guest_with_disks("survivor")
    virsh("start", guest.uuid)
    with connection.get() as conn:
        dom = domains.find(conn, guest.uuid)
    on_host.stop_libvirtd()
    with pytest.raises(DroverError) as caught:
        power.power_state(dom)
    assert caught.value.reason is Reason.LIBVIRT_UNAVAILABLE
    wait_for(lambda: not connection.connected, "the close callback")
    with pytest.raises(DroverError) as caught, connection.get():
        pass
    assert caught.value.reason is Reason.LIBVIRT_UNAVAILABLE
    on_host.restart_libvirtd()
    with connection.get() as conn:
        again = domains.describe(domains.find(conn, guest.uuid), roots)
    assert again.power_state == domain_pb2.POWER_STATE_RUNNING


def test_block_jobs_are_obstacles(conn: libvirt.virConnect, roots: StorageRoots) -> None:
    guest = guest_with_disks("busy")
    virsh("start", guest.uuid)
    virsh("blockcopy", guest.uuid, "vda", str(IMAGES / "copy.qcow2"), "--transient-job")
    dom = domains.find(conn, guest.uuid)
    assert "block job" in domains.describe(dom, roots).obstacles[0]
    virsh("blockjob", guest.uuid, "vda", "--abort")
    assert list(domains.describe(dom, roots).obstacles) == []


def test_unavailable_libvirt_is_named() -> None:
    nowhere = LibvirtConnection("qemu+unix:///system?socket=/nonexistent")
    with pytest.raises(DroverError) as caught, nowhere.get():
        pass
    assert caught.value.reason is Reason.LIBVIRT_UNAVAILABLE
    assert not nowhere.connected


def test_a_loop_in_the_chain_is_named(conn: libvirt.virConnect, roots: StorageRoots) -> None:
    a = make_disk(IMAGES / "a.qcow2")
    b = make_disk(IMAGES / "b.qcow2", backing=("a.qcow2", "qcow2"))
    subprocess.run(
        ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2", str(a)],
        check=True,
    )
    guest = Guest("loop")
    guest.define(guest.xml(disk_xml("vda", b)))
    described = domains.describe(domains.find(conn, guest.uuid), roots)
    assert "own backing file" in described.obstacles[0]
