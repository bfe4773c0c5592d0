"""Only what changed: passes by the dirty bitmaps of real QEMU exports."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from diskmover import Changes, ErrorCode, MoverError, NbdExport, Receipt, digest
from tests.diskmover import qemu
from tests.diskmover.copies import Copies, finish
from tests.diskmover.qemu import MIB

SIZE = 200 * MIB
DIRTY = ("write -P 9 70M 64k", "write -z 3M 1M", "write -P 8 199M 1M", "discard 20M 64k")
DIRTY_BYTES = 4 * MIB  # chunks that those touch
Server = Callable[[Path, Path], AbstractContextManager[str]]


@contextmanager
def nbd(image: Path, socket: Path) -> Iterator[str]:
    """The image and its bitmap, by `qemu-nbd`."""
    with qemu.export(image, socket, "--bitmap=b0") as address:
        yield address


@contextmanager
def daemon(image: Path, socket: Path) -> Iterator[str]:
    """The same by `qemu-storage-daemon`."""
    command = ["qemu-storage-daemon", "--nbd-server", f"addr.type=unix,addr.path={socket}"]
    command += ["--blockdev", f"driver=file,filename={image},node-name=f,read-only=on"]
    command += ["--blockdev", "driver=qcow2,file=f,node-name=q,read-only=on"]
    command += ["--export", "type=nbd,id=e,node-name=q,name=,writable=off,bitmaps.0=b0"]
    with qemu.serving(command, socket) as address:
        yield address


class Disk:
    """An image with a bitmap that began when the first copy was made."""

    def __init__(
        self, copies: Copies, folder: Path, granularity: str = "64K", **placing: Any
    ) -> None:
        self.copies, self.folder, self.placing = copies, folder, placing
        self.image = qemu.create(folder / "disk.qcow2", SIZE)
        self.target = folder / "target"
        qemu.write(self.image, "write -P 1 1M 90M", "write -P 2 150M 50M")
        with qemu.export(self.image, folder / "s") as address:
            self.first = copies.copy(
                NbdExport(address), self.target, size_bytes=SIZE, tag=self.tag, **placing
            )
        self.begin(granularity)

    def begin(self, granularity: str = "64K") -> None:
        """Begin a bitmap."""
        options = ("--add", "--granularity", granularity, "-f", "qcow2")
        qemu.run("qemu-img", "bitmap", *options, self.image, "b0")

    @property
    def tag(self) -> str:
        """Of all its copies."""
        return f"disk-{self.folder.name}"

    def export(self, address: str, since: str = "", content_id: str | None = None) -> NbdExport:
        """What changed since the first copy, or another one."""
        changes = Changes(since or self.first.digest, "b0")
        return NbdExport(address, content_id=content_id, changes=changes)

    def now(self) -> str:
        """Digest of all that the guest sees now."""
        with qemu.export(self.image, self.folder / "n") as address:
            return digest(NbdExport(address)).digest

    def is_right(self, receipt: Receipt) -> bool:
        """Whether the target is what a full copy would be."""
        target_format = "qcow2" if self.placing.get("format") == "qcow2" else "raw"
        qemu.compare(self.image, "qcow2", self.target, target_format)
        full = self.folder / "full"
        with qemu.export(self.image, self.folder / "n") as address:
            whole = self.copies.copy(NbdExport(address), full, size_bytes=SIZE)
        full.unlink()
        facts = (receipt.digest, receipt.data_bytes, receipt.mode)
        return facts == (whole.digest, whole.data_bytes, whole.mode)


@pytest.fixture
def disk(copies: Copies, tmp_path: Path) -> Disk:
    """A disk of which a first copy was made."""
    return Disk(copies, tmp_path)


@pytest.mark.parametrize("server", [nbd, daemon], ids=["qemu-nbd", "qemu-storage-daemon"])
def test_only_what_changed_is_read_and_sent(server: Server, disk: Disk) -> None:
    assert disk.target.stat().st_mode & 0o7777 == 0o600
    disk.target.chmod(0o640)
    qemu.write(disk.image, *DIRTY)
    with server(disk.image, disk.folder / "s") as address:
        push = disk.copies.start(
            disk.export(address), disk.target, size_bytes=SIZE, tag=disk.tag, update=True
        )
        receipt = finish(push)
    assert push.progress().resumed_bytes == SIZE - DIRTY_BYTES
    assert receipt.wire_bytes < 3 * MIB
    assert disk.is_right(receipt)
    assert disk.target.stat().st_mode & 0o7777 == 0o640
    assert sorted(path.name for path in disk.folder.glob(".target.*")) == [
        f".target.dm-{disk.tag}.receipt"
    ]


@pytest.mark.parametrize(
    ("granularity", "unchanged"),
    # In the last, each of the four chunks takes its neighbour along.
    [("512", SIZE - DIRTY_BYTES), ("1M", SIZE - DIRTY_BYTES), ("2M", SIZE - 2 * DIRTY_BYTES)],
)
def test_a_bitmap_may_be_finer_or_coarser_than_chunks(
    granularity: str, unchanged: int, copies: Copies, tmp_path: Path
) -> None:
    disk = Disk(copies, tmp_path, granularity)
    qemu.write(disk.image, *DIRTY)
    with nbd(disk.image, tmp_path / "s") as address:
        push = copies.start(
            disk.export(address), disk.target, size_bytes=SIZE, tag=disk.tag, update=True
        )
        receipt = finish(push)
    assert push.progress().resumed_bytes == unchanged
    assert disk.is_right(receipt)


def test_an_inconsistent_bitmap_is_no_base(disk: Disk) -> None:
    # Killed with the bitmap in memory: what was written since is not in the image's.
    writer = ["qemu-nbd", "--persistent", f"--socket={disk.folder}/w", "--format=qcow2"]
    with qemu.serving([*writer, str(disk.image)], disk.folder / "w"):
        address = f"nbd+unix:///?socket={disk.folder}/w"
        qemu.run("qemu-io", "-f", "raw", "-c", "write -P 7 100M 1M", "-c", "flush", address)
    told = json.loads(qemu.run("qemu-img", "info", "--output=json", disk.image))
    bitmap = told["format-specific"]["data"]["bitmaps"][0]
    assert "in-use" in bitmap["flags"], "this is how QEMU calls it"
    # QEMU does not export it, and without it there is nothing to rely on.
    command = ["qemu-nbd", "--read-only", "--bitmap=b0", f"--socket={disk.folder}/s"]
    refused = subprocess.run(
        [*command, "--format=qcow2", disk.image], check=False, capture_output=True, timeout=60
    )
    assert refused.returncode != 0
    assert re.search(rb"inconsistent|in use", refused.stderr), refused.stderr
    with (
        qemu.export(disk.image, disk.folder / "s") as address,
        pytest.raises(MoverError, match="no dirty bitmap") as failed,
    ):
        disk.copies.copy(
            disk.export(address), disk.target, size_bytes=SIZE, tag=disk.tag, update=True
        )
    assert failed.value.code is ErrorCode.SOURCE_INVALID
    assert digest(disk.target).digest == disk.first.digest
    # A new one begins with a new copy, which has what the old one has missed.
    qemu.run("qemu-img", "bitmap", "--remove", "-f", "qcow2", disk.image, "b0")
    disk.target.unlink()
    disk.begin()
    with qemu.export(disk.image, disk.folder / "s") as address:
        receipt = disk.copies.copy(NbdExport(address), disk.target, size_bytes=SIZE, tag="anew")
    assert receipt.digest == disk.now() != disk.first.digest


def test_nothing_changed(disk: Disk) -> None:
    with nbd(disk.image, disk.folder / "s") as address:
        receipt = disk.copies.copy(
            disk.export(address), disk.target, size_bytes=SIZE, tag=disk.tag, update=True
        )
    assert (receipt.digest, receipt.data_bytes) == (disk.first.digest, disk.first.data_bytes)
    assert disk.is_right(receipt)


def test_one_pass_after_the_other(disk: Disk) -> None:
    since = disk.first.digest
    for number in range(3):
        qemu.write(disk.image, f"write -P {20 + number} {60 * number}M 100k")
        with nbd(disk.image, disk.folder / "s") as address:
            since = disk.copies.copy(
                disk.export(address, since),
                disk.target,
                size_bytes=SIZE,
                tag=disk.tag,
                update=True,
            ).digest
        # The next bitmap begins where this copy ends.
        qemu.run("qemu-img", "bitmap", "--clear", "-f", "qcow2", disk.image, "b0")
        assert since == disk.now()
    qemu.compare(disk.image, "qcow2", disk.target, "raw")


def test_an_image_is_brought_up_to_date_too(copies: Copies, tmp_path: Path) -> None:
    disk = Disk(copies, tmp_path, format="qcow2")
    qemu.write(disk.image, *DIRTY)
    with nbd(disk.image, tmp_path / "s") as address:
        push = copies.start(
            disk.export(address),
            disk.target,
            size_bytes=SIZE,
            tag=disk.tag,
            update=True,
            format="qcow2",
        )
        receipt = finish(push)
    assert push.progress().resumed_bytes == SIZE - DIRTY_BYTES
    assert disk.is_right(receipt)
    qemu.check(disk.target)


def test_a_device_is_brought_up_to_date_in_place(copies: Copies, tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    with backing.open("wb") as file:
        file.truncate(SIZE + MIB)
    found = qemu.run("losetup", "--find", "--show", backing).strip()
    try:
        (tmp_path / "state").mkdir()
        device = Path(found)
        disk = DeviceDisk(copies, tmp_path, device)
        qemu.write(disk.image, *DIRTY)
        with nbd(disk.image, tmp_path / "s") as address:
            push = copies.start(
                disk.export(address),
                device,
                size_bytes=SIZE,
                tag=disk.tag,
                update=True,
                **disk.placing,
            )
            receipt = finish(push)
        assert push.progress().resumed_bytes == SIZE - DIRTY_BYTES
        assert receipt.digest == disk.now()
        with backing.open("rb") as file, (tmp_path / "flat").open("wb") as flat:
            flat.write(file.read(SIZE))
        assert digest(tmp_path / "flat").digest == receipt.digest
    finally:
        qemu.run("losetup", "--detach", found)


class DeviceDisk(Disk):
    """The same disk, copied to a block device."""

    def __init__(self, copies: Copies, folder: Path, device: Path) -> None:
        self.device = device
        super().__init__(copies, folder, device_state=folder / "state")

    @property
    def target(self) -> Path:
        """The device."""
        return self.device

    @target.setter
    def target(self, _: Path) -> None:
        pass


def test_a_copy_that_was_touched_is_compared_as_a_whole(disk: Disk) -> None:
    qemu.write(disk.target, "write -P 77 120M 1M", image_format="raw")
    qemu.write(disk.image, *DIRTY)
    with nbd(disk.image, disk.folder / "s") as address:
        push = disk.copies.start(
            disk.export(address), disk.target, size_bytes=SIZE, tag=disk.tag, update=True
        )
        receipt = finish(push)
    assert push.progress().resumed_bytes == 0
    assert disk.is_right(receipt)


def test_a_receiver_that_does_not_allow_it_keeps_what_it_has(disk: Disk) -> None:
    qemu.write(disk.image, *DIRTY)
    before = digest(disk.target).digest
    with (
        nbd(disk.image, disk.folder / "s") as address,
        pytest.raises(MoverError, match="has placed") as failed,
    ):
        disk.copies.copy(disk.export(address), disk.target, size_bytes=SIZE, tag=disk.tag)
    assert failed.value.code is ErrorCode.TARGET_EXISTS
    assert digest(disk.target).digest == before == disk.first.digest


def test_a_bitmap_since_another_copy_changes_nothing(disk: Disk) -> None:
    qemu.write(disk.image, *DIRTY)
    with (
        nbd(disk.image, disk.folder / "s") as address,
        pytest.raises(MoverError, match="has placed") as failed,
    ):
        disk.copies.copy(
            disk.export(address, "ab" * 32),
            disk.target,
            size_bytes=SIZE,
            tag=disk.tag,
            update=True,
        )
    assert failed.value.code is ErrorCode.TARGET_EXISTS
    assert digest(disk.target).digest == disk.first.digest


def test_a_copy_in_use_is_left_alone(disk: Disk) -> None:
    qemu.write(disk.image, *DIRTY)
    user = ["qemu-nbd", "--persistent", f"--socket={disk.folder}/u", "--format=raw"]
    with (
        qemu.serving([*user, str(disk.target)], disk.folder / "u"),
        nbd(disk.image, disk.folder / "s") as address,
        pytest.raises(MoverError, match="in use") as failed,
    ):
        disk.copies.copy(
            disk.export(address), disk.target, size_bytes=SIZE, tag=disk.tag, update=True
        )
    assert failed.value.code is ErrorCode.TARGET_BUSY
    assert digest(disk.target).digest == disk.first.digest


def test_an_export_without_the_bitmap_is_refused(disk: Disk) -> None:
    with (
        qemu.export(disk.image, disk.folder / "s") as address,
        pytest.raises(MoverError, match="no dirty bitmap") as failed,
    ):
        disk.copies.copy(disk.export(address), disk.target, size_bytes=SIZE, tag=disk.tag)
    assert failed.value.code is ErrorCode.SOURCE_INVALID


def test_a_digest_has_64_digits(disk: Disk) -> None:
    with pytest.raises(MoverError, match="64 hexadecimal digits") as failed:
        disk.copies.copy(disk.export("unix:/none", "abc"), disk.target, size_bytes=SIZE)
    assert failed.value.code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.parametrize("content_id", ["disk-7@12:00", None])
def test_a_pass_that_was_stopped_goes_on(content_id: str | None, disk: Disk) -> None:
    subprocess.run(["sync"], check=True)
    qemu.write(disk.image, "write -P 5 0 140M")
    with nbd(disk.image, disk.folder / "s") as address:
        export = disk.export(address, content_id=content_id)
        push = disk.copies.start(
            export, disk.target, size_bytes=SIZE, tag=disk.tag, update=True, limit=24 * MIB
        )
        while push.progress().done_bytes < SIZE - 140 * MIB + 48 * MIB:
            assert push.wait(0.01) is None
        push.cancel()
        assert not disk.target.exists(), "a mix has the name"
        push = disk.copies.start(export, disk.target, size_bytes=SIZE, tag=disk.tag, update=True)
        receipt = finish(push)
    # Without a name of the content it is compared; with one it is known.
    assert (push.progress().resumed_bytes > SIZE - 140 * MIB) == (content_id is not None)
    assert disk.is_right(receipt)
