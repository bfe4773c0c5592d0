"""Real file systems as targets: bytes, sizes, holes, what is gone on from, what is updated.

Row 36 of the nasty cases of disk movers (tests/README.md of the crate), and of 34 the
device with sectors of 4096 bytes.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import diskmover
from diskmover.model import Changes, NbdExport
from tests.diskmover import qemu, stranger, tool
from tests.diskmover.conftest import Certs
from tests.diskmover.copies import Copies
from tests.diskmover.tool import Running, Serve
from tests.support.filesystems import filesystem

MIB = 1 << 20
_MKFS_BTRFS = ("mkfs.btrfs", "-q")


@dataclass(frozen=True)
class Kind:
    """A file system that copies come to.

    Attributes:
        make: What makes it; empty for tmpfs.
        size_bytes: Size of its device.
        options: Of the mount.
        sector_bytes: Logical block size of its device.
        no_cow: Its files are written in place (chattr +C).
    """

    make: tuple[str, ...]
    size_bytes: int = 128 * MIB
    options: str = "defaults"
    sector_bytes: int = 512
    no_cow: bool = False


KINDS = {
    "ext4-inline": Kind(("mkfs.ext4", "-q", "-O", "inline_data", "-I", "512")),
    "ext4-4k": Kind(("mkfs.ext4", "-q"), sector_bytes=4096),
    "xfs": Kind(("mkfs.xfs", "-q"), 320 * MIB),
    "xfs-4k": Kind(("mkfs.xfs", "-q"), 320 * MIB, sector_bytes=4096),
    "btrfs-zstd": Kind(_MKFS_BTRFS, 256 * MIB, "compress=zstd"),
    "btrfs-nocow": Kind(_MKFS_BTRFS, 256 * MIB, no_cow=True),
    "tmpfs": Kind((), options="size=128m"),
}


@pytest.fixture(scope="module", params=KINDS)
def root(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A mounted file system; every test uses names of its own."""
    kind = KINDS[request.param]
    at = tmp_path_factory.mktemp(request.param) / "fs"
    if not kind.make:
        at.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", kind.options, "tmpfs", at], check=True)
        yield at
        subprocess.run(["umount", at], check=True)
        return
    with filesystem(
        at, kind.make, size_bytes=kind.size_bytes, sector_bytes=kind.sector_bytes,
        options=kind.options,
    ) as mounted:  # fmt: skip
        if kind.no_cow:
            subprocess.run(["chattr", "+C", mounted], check=True)
        yield mounted


def sparse(path: Path, size_bytes: int, *pieces: tuple[int, bytes]) -> Path:
    """A file of a size, with data in these places."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
    return path


# Where a file system keeps them in the inode, among others.
TINY = (1, 59, 60, 61, 156, 160, 200)
DISKS: dict[str, tuple[Any, ...]] = {
    "holes": (24 * MIB + 4096, (MIB, b"a" * 5000), (20 * MIB, os.urandom(MIB)), (24 * MIB, b"z")),
    "dense": (5 * MIB, (0, os.urandom(5 * MIB))),
    "dull": (4 * MIB, (0, b"all work and no play " * 199_000)),
    "odd": (3 * MIB + 777, (0, os.urandom(70_001)), (3 * MIB + 700, b"t" * 77)),
    "sectors": (2 * MIB + 512, (0, os.urandom(2 * MIB + 512))),
    "empty": (0,),
    "hole": (9 * MIB + 1,),
    **{f"tiny{size}": (size, (0, os.urandom(size))) for size in TINY},
}


def test_disks_arrive_and_stay_as_sparse_as_they_can(
    root: Path, copies: Copies, tmp_path: Path
) -> None:
    sources = {name: sparse(tmp_path / name, *disk) for name, disk in DISKS.items()}
    for receipt in copies.copy_all(sources, root):
        name = receipt.volume_id
        target = root / name
        assert tool.same(sources[name], target), name
        assert target.stat().st_size == sources[name].stat().st_size, name
        assert receipt.digest == stranger.digest_of(sources[name]), name
        allocated = target.stat().st_blocks * 512
        assert receipt.allocated_bytes == allocated, name
        assert allocated <= receipt.data_bytes + 16 * 4096, f"{name}: holes were filled"


def test_a_target_whose_space_was_reserved_keeps_all_of_it(
    root: Path, copies: Copies, tmp_path: Path
) -> None:
    """Holes, zeros that are allocated, and a run of them that is longer than a segment."""
    noise = os.urandom(3 * MIB)
    pieces = (MIB, b"a" * 5000), (3 * MIB, bytes(5 * MIB)), (9 * MIB, noise), (76 * MIB, b"z")
    source = sparse(tmp_path / "source", 76 * MIB + 777, *pieces)
    size_bytes = source.stat().st_size
    target, tag = root / "reserved", f"reserved.{root.parent.name}"
    diskmover.reserve(root, target.name, tag, size_bytes, allocate=True)
    assert tool.arrived_bytes(root, target.name) >= size_bytes
    receipt = copies.copy(source, target, size_bytes=size_bytes, tag=tag)
    assert tool.same(source, target)
    allocated = target.stat().st_blocks * 512
    assert allocated >= size_bytes, "space was given back"
    assert receipt.allocated_bytes == allocated
    assert receipt.wire_bytes < 4 * MIB, "zeros were sent"
    target.unlink()


def test_it_keeps_all_of_it_behind_dense_data_too(copies: Copies, tmp_path: Path) -> None:
    """Where blocks are laid ahead of data, zeros that come there give them back else."""
    source = tool.noise(tmp_path / "source", 70 * MIB)
    os.truncate(source, 100 * MIB)
    with filesystem(tmp_path / "fs", ("mkfs.ext4", "-q"), size_bytes=3 * 1024 * MIB) as root:
        diskmover.reserve(root, "dense", "dense", 100 * MIB, allocate=True)
        copies.copy(source, root / "dense", size_bytes=100 * MIB, tag="dense")
        assert tool.same(source, root / "dense")
        assert (root / "dense").stat().st_blocks * 512 >= 100 * MIB, "space was given back"


@pytest.mark.parametrize("root", ["xfs", "btrfs-zstd", "btrfs-nocow"], indirect=True)
def test_a_copy_whose_receiver_is_killed_goes_on(root: Path, certs: Certs, tmp_path: Path) -> None:
    source = tool.noise(tmp_path / "long", 16 * MIB + 777)
    serve = Serve(root, certs.options("b"))
    job: list[str | Path] = [source, "--to", serve.address, "--json", *certs.options("a")]
    push = Running(*job, "--limit", "8M")
    tool.eventually("some is durable", lambda: tool.durable_bytes(root, "long") >= 2 * MIB)
    serve.kill()
    again = Serve(root, certs.options("b"), serve.address)
    receipt = push.ended().receipt
    assert again.stop() == 0
    assert tool.same(source, root / "long")
    assert (root / "long").stat().st_size == source.stat().st_size
    assert receipt["wire_bytes"] <= source.stat().st_size - MIB, "what was durable was sent again"
    assert receipt["allocated_bytes"] == (root / "long").stat().st_blocks * 512


def test_an_older_copy_is_brought_up_to_date(root: Path, copies: Copies, tmp_path: Path) -> None:
    """Data becomes other data, and zeros; zeros become data; the rest is not sent."""
    size_bytes = 12 * MIB
    image = qemu.create(tmp_path / "disk.qcow2", size_bytes)
    source = tmp_path / "disk.raw"
    tool.noise(source, 8 * MIB)
    os.truncate(source, size_bytes)
    qemu.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, image)
    target, tag = root / "updated", f"updated.{root.parent.name}"
    with qemu.export(image, tmp_path / "s") as address:
        first = copies.copy(exported(address), target, size_bytes=size_bytes, tag=tag)
    qemu.write(image, "write -P 7 2M 64k", "write -z 4M 1M", "write -P 9 10M 70k")
    changes = Changes(since=first.digest)
    with qemu.export(image, tmp_path / "s") as address:
        second = copies.copy(
            exported(address, changes), target, size_bytes=size_bytes, tag=tag, update=True
        )
    qemu.compare(image, "qcow2", target, "raw")
    assert target.stat().st_size == size_bytes
    assert second.wire_bytes < MIB, "what did not change was sent"
    assert second.digest != first.digest
    assert second.allocated_bytes == target.stat().st_blocks * 512


def exported(address: str, changes: Changes | None = None) -> NbdExport:
    return NbdExport(address, changes=changes)
