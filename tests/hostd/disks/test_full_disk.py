"""Parking where no block is free: a machine always comes back, and it is said what to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.disks.parked import discard, unpark
from hostd.disks.parking import park
from hostd.disks.roots import StorageRoots
from tests.hostd.guests import Guest, disk_xml, make_disk
from tests.hostd.private_host import IMAGES, PrivateHost, virsh
from tests.hostd.small_filesystem import filled, small_filesystem

pytestmark = pytest.mark.lab

MIGRATION = "11111111-2222-4333-8444-555555555555"
DEFINITIONS = Path("/etc/libvirt/qemu")
NVRAM = Path("/var/lib/libvirt/qemu/nvram")
SWTPM = Path("/var/lib/libvirt/swtpm")
TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
EFI = "<firmware><feature enabled='no' name='secure-boot'/></firmware>"


@pytest.fixture
def pool(on_host: PrivateHost, tmp_path: Path) -> Iterator[Path]:
    """A storage root with a small file system of its own."""
    with small_filesystem(IMAGES / "pool", tmp_path / "pool.img") as mounted:
        yield mounted


@pytest.fixture
def pool_roots(pool: Path) -> StorageRoots:
    return StorageRoots({"pool": pool})


def guest_in(pool: Path) -> Guest:
    """A machine with a disk in the pool, UEFI variables and a TPM, both with content."""
    guest = Guest("full", [make_disk(pool / "full.qcow2")])
    guest.define(guest.xml(disk_xml("vda", guest.disks[0]) + TPM, EFI))
    for file in (nvram_of(guest), tpm_of(guest) / "tpm2/state"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"state" * 1000)
    return guest


def nvram_of(guest: Guest) -> Path:
    return NVRAM / f"{guest.name}_VARS.fd"


def tpm_of(guest: Guest) -> Path:
    return SWTPM / guest.uuid


def state_of(guest: Guest) -> dict[str, object]:
    """Everything about the machine that has to be the same afterwards, and what lies beside it."""
    tops = (*(disk.parent for disk in guest.disks), NVRAM, SWTPM)
    files = sorted(path for top in tops for path in top.rglob("*") if path.name != "filler")
    return {
        "files": {str(path): path.read_bytes() for path in files if path.is_file()},
        "directories": [str(path) for path in files if path.is_dir()],
        "xml": virsh("dumpxml", guest.uuid, "--inactive", "--security-info"),
    }


def is_defined(guest: Guest) -> bool:
    return guest.uuid in virsh("list", "--all", "--uuid").split()


def test_a_parked_machine_comes_back_on_a_full_pool(
    conn: libvirt.virConnect, pool: Path, pool_roots: StorageRoots, state_dir: Path
) -> None:
    guest = guest_in(pool)
    before = state_of(guest)
    park(conn, guest.uuid, MIGRATION, pool_roots, state_dir)
    with filled(pool):
        unpark(conn, MIGRATION, pool_roots, state_dir)
        assert state_of(guest) == before


def test_a_machine_that_finds_no_room_to_be_parked_comes_back(
    conn: libvirt.virConnect, pool: Path, pool_roots: StorageRoots, state_dir: Path
) -> None:
    """The pool fills up after the definition is gone and before the baggage is packed."""
    guest = guest_in(pool)
    before = state_of(guest)
    full = filled(pool)

    def fill(point: str) -> None:
        if point == "undefined":
            full.__enter__()

    with pytest.raises(DroverError) as refused:
        park(conn, guest.uuid, MIGRATION, pool_roots, state_dir, at=fill)
    assert refused.value.reason is Reason.SOURCE_LACKS_SPACE
    assert str(pool) in refused.value.message
    assert not is_defined(guest)
    unpark(conn, MIGRATION, pool_roots, state_dir)
    assert state_of(guest) == before
    full.__exit__(None, None, None)


def test_no_room_to_begin_parking_changes_nothing(
    conn: libvirt.virConnect, pool: Path, pool_roots: StorageRoots, state_dir: Path
) -> None:
    guest = guest_in(pool)
    before = state_of(guest)
    with filled(pool):
        with pytest.raises(DroverError) as refused:
            park(conn, guest.uuid, MIGRATION, pool_roots, state_dir)
        assert refused.value.reason is Reason.SOURCE_LACKS_SPACE
        unpark(conn, MIGRATION, pool_roots, state_dir)
        assert state_of(guest) == before


def test_a_confirmed_machine_is_deleted_on_a_full_pool(
    conn: libvirt.virConnect, pool: Path, pool_roots: StorageRoots, state_dir: Path
) -> None:
    """Deleting is what makes room, so it must not need any."""
    guest = guest_in(pool)
    park(conn, guest.uuid, MIGRATION, pool_roots, state_dir)
    with filled(pool):
        assert discard(MIGRATION, pool_roots, state_dir) > 0
    assert list(pool.iterdir()) == []
    assert list(NVRAM.iterdir()) == []
    assert list(SWTPM.iterdir()) == []


@pytest.mark.parametrize("place", [NVRAM, SWTPM])
def test_small_state_comes_back_where_its_own_file_system_is_full(
    conn: libvirt.virConnect, place: Path, roots: StorageRoots, state_dir: Path, tmp_path: Path
) -> None:
    with small_filesystem(place, tmp_path / "small.img"):
        guest = guest_in(IMAGES / "ample")
        before = state_of(guest)
        park(conn, guest.uuid, MIGRATION, roots, state_dir)
        with filled(place):
            unpark(conn, MIGRATION, roots, state_dir)
            assert state_of(guest) == before
        nvram_of(guest).unlink()


def test_libvirt_without_room_for_the_definition_is_asked_again(
    conn: libvirt.virConnect, roots: StorageRoots, state_dir: Path, tmp_path: Path
) -> None:
    with small_filesystem(DEFINITIONS, tmp_path / "etc.img"):
        guest = guest_in(IMAGES / "ample")
        before = state_of(guest)
        park(conn, guest.uuid, MIGRATION, roots, state_dir)
        with filled(DEFINITIONS):
            for _ in range(2):
                with pytest.raises(DroverError) as waits:
                    unpark(conn, MIGRATION, roots, state_dir)
                assert waits.value.reason is Reason.HOST_DISK_FULL
                assert "No space left" in waits.value.message
                assert not is_defined(guest)
        unpark(conn, MIGRATION, roots, state_dir)
        assert state_of(guest) == before
        virsh("undefine", guest.uuid, "--nvram")
