"""Images as QEMU makes them, and as nobody should: what is followed, and what keeps a machine.

Rows 37 to 39 and 41 to 43 of the nasty cases of disk movers; the parser itself meets
arbitrary bytes in tests/hostd/test_hostile_headers.py.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from controlplane.common.reasons import Reason
from hostd.disks.chain import MAX_DEPTH, Chain, DiskTop, read_chain
from hostd.disks.roots import StorageRoots
from hostd.v1 import domain_pb2
from tests.support import luks

DISK = domain_pb2.VOLUME_KIND_DISK
MIB = 1 << 20
_INCOMPATIBLE = 72  # offset of the bits in the header, big-endian

Make = Callable[[Path], None]


def create(path: Path, *options: str, size: str = "4M") -> None:
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path)]
    subprocess.run([*command, *([size] if size else [])], check=True)


def set_bit(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(_INCOMPATIBLE)
        bits = int.from_bytes(file.read(8), "big") | 1 << bit
        file.seek(_INCOMPATIBLE)
        file.write(bits.to_bytes(8, "big"))


def with_bit(bit: int) -> Make:
    def make(folder: Path) -> None:
        create(folder / "disk")
        set_bit(folder / "disk", bit)

    return make


def crashed(folder: Path) -> None:
    """As a QEMU leaves it that dies in its work, when it writes reference counts late."""
    create(folder / "disk", "-o", "lazy_refcounts=on")
    commands = ["-c", "write -q 0 64k", "-c", "abort"]
    died = subprocess.run(
        ["qemu-io", "-f", "qcow2", *commands, str(folder / "disk")], capture_output=True
    )
    assert died.returncode == -signal.SIGABRT


def closed(folder: Path) -> None:
    create(folder / "disk", "-o", "lazy_refcounts=on")
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -q 0 64k", str(folder / "disk")], check=True
    )


def rebased(to: str, backing_format: str = "raw") -> Make:
    """An overlay that names this backing file, whatever it is; nothing opens it."""

    def make(folder: Path) -> None:
        create(folder / "disk")
        command = ["qemu-img", "rebase", "-q", "-u", "-F", backing_format, "-b", to]
        subprocess.run([*command, str(folder / "disk")], check=True)

    return make


def plain(folder: Path) -> None:
    create(folder / "disk")


def chained(count: int) -> Make:
    """So many files, each over the next."""

    def make(folder: Path) -> None:
        create(folder / "layer1")
        for number in range(2, count + 1):
            create(folder / f"layer{number}", "-b", f"layer{number - 1}", "-F", "qcow2", size="")
        (folder / f"layer{count}").rename(folder / "disk")

    return make


def looped(folder: Path) -> None:
    create(folder / "below")
    create(folder / "disk", "-b", "below", "-F", "qcow2", size="")
    subprocess.run(
        ["qemu-img", "rebase", "-q", "-u", "-F", "qcow2", "-b", "disk", str(folder / "below")],
        check=True,
    )


def in_a_data_file(folder: Path) -> None:
    create(folder / "disk", "-o", f"data_file={folder / 'data'}")


def encrypted(folder: Path) -> None:
    key = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    secret = ["--object", "secret,id=s,data=x"]
    luks.qemu_img("create", "-q", "-f", "qcow2", *secret, "-o", key, str(folder / "disk"), "4M")


def with_snapshots_and_a_bitmap(folder: Path) -> None:
    create(folder / "disk", "-o", "extended_l2=on,compression_type=zstd")
    disk = str(folder / "disk")
    subprocess.run(["qemu-img", "snapshot", "-c", "one", disk], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", "-f", "qcow2", disk, "b0"], check=True)


def chain_of(folder: Path, make: Make) -> Chain:
    make(folder)
    roots = StorageRoots({"images": folder}, ["qcow2", "raw"])
    return read_chain(DiskTop("vda", DISK, folder / "disk", "qcow2"), roots)


@pytest.mark.parametrize(
    ("make", "files"),
    [
        (plain, 1),
        (with_bit(0), 1),
        (crashed, 1),
        (encrypted, 1),
        (with_snapshots_and_a_bitmap, 1),
        (chained(3), 3),
        (chained(MAX_DEPTH), MAX_DEPTH),
    ],
)
def test_what_is_copied_as_it_is(tmp_path: Path, make: Make, files: int) -> None:
    chain = chain_of(tmp_path, make)
    assert [obstacle.message for obstacle in chain.obstacles] == []
    assert len(chain.links) == files
    assert {link.virtual_size_bytes for link in chain.links} == {4 * MIB}


@pytest.mark.parametrize(
    ("make", "unclean"),
    [(plain, False), (closed, False), (with_bit(0), True), (crashed, True)],
)
def test_an_image_that_was_not_closed_is_told_of(tmp_path: Path, make: Make, unclean: bool) -> None:
    (link,) = chain_of(tmp_path, make).links
    assert (link.unclean, link.to_volume().unclean) == (unclean, unclean)


@pytest.mark.parametrize(
    ("make", "reason", "words"),
    [
        (with_bit(1), Reason.DISK_CORRUPT, "is marked as corrupt"),
        (with_bit(40), Reason.INSTANCE_IMMOVABLE, "features that are unknown here"),
        (in_a_data_file, Reason.INSTANCE_IMMOVABLE, "keeps its data in another file"),
        (
            rebased("json:" + json.dumps({"driver": "file", "filename": "/etc/shadow"})),
            Reason.INSTANCE_IMMOVABLE,
            "not a plain file",
        ),
        (rebased("nbd://10.0.0.1:10809/x"), Reason.INSTANCE_IMMOVABLE, "not a plain file"),
        (rebased("/etc/shadow"), Reason.DISK_OUTSIDE_ROOTS, "outside the storage roots"),
        (rebased("../../etc/shadow"), Reason.DISK_OUTSIDE_ROOTS, "outside the storage roots"),
        (rebased("gone"), Reason.DISK_MISSING, "is missing"),
        (looped, Reason.INSTANCE_IMMOVABLE, "is its own backing file"),
        (chained(MAX_DEPTH + 1), Reason.INSTANCE_IMMOVABLE, "files in its chain"),
    ],
)
def test_what_keeps_a_machine_where_it_is(
    tmp_path: Path, make: Make, reason: Reason, words: str
) -> None:
    (obstacle,) = chain_of(tmp_path, make).obstacles
    assert (obstacle.reason, words in obstacle.message) == (reason, True), obstacle.message
