"""Disks that become qcow2 images at the target; QEMU judges them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from diskmover import ErrorCode, MoverError, NbdExport, digest
from tests.diskmover import qemu
from tests.diskmover.copies import Copies, finish
from tests.diskmover.qemu import MIB
from tests.diskmover.test_nbd import IMAGES, SIZE, fragmented


def is_image_of(source: Path, source_format: str, target: Path, expected: str) -> None:
    """QEMU and the digest agree that the image holds what the source shows."""
    qemu.compare(source, source_format, target, "qcow2")
    qemu.check(target)
    with qemu.export(target, target.parent / "made") as address:
        assert digest(NbdExport(address)).digest == expected


@pytest.mark.parametrize("make", IMAGES, ids=lambda make: make.__name__)
def test_an_image_shows_what_the_source_shows(
    make: Callable[[Path], Path], copies: Copies, tmp_path: Path
) -> None:
    image, target = make(tmp_path), tmp_path / "target.qcow2"
    with qemu.export(image, tmp_path / "s") as address:
        receipt = copies.copy(
            NbdExport(address), target, size_bytes=SIZE, format="qcow2", readback=True
        )
    assert (receipt.size_bytes, receipt.mode) == (SIZE, "guest-visible")
    is_image_of(image, "qcow2", target, receipt.digest)


@pytest.mark.parametrize("size", [0, 512, 65536, MIB + 512, 512 * MIB, 2049 * MIB])
def test_disks_of_every_size(size: int, copies: Copies, tmp_path: Path) -> None:
    image, target = tmp_path / "image.raw", tmp_path / "target.qcow2"
    qemu.run("qemu-img", "create", "-q", "-f", "raw", image, str(size))
    if size:
        qemu.write(image, f"write -P 3 {size - 512} 512", "write -P 4 0 512", image_format="raw")
    with qemu.export(image, tmp_path / "s", image_format="raw") as address:
        receipt = copies.copy(NbdExport(address), target, size_bytes=size, format="qcow2")
    is_image_of(image, "raw", target, receipt.digest)


def test_an_image_takes_as_much_room_as_its_data(copies: Copies, tmp_path: Path) -> None:
    size = 8 << 40
    image, target = qemu.create(tmp_path / "huge.qcow2", size), tmp_path / "target.qcow2"
    qemu.write(image, "write -P 1 5T 64k", f"write -P 2 {size - 512} 512")
    with qemu.export(image, tmp_path / "s") as address:
        receipt = copies.copy(NbdExport(address), target, size_bytes=size, format="qcow2")
    assert target.stat().st_blocks * 512 < 4 * MIB
    is_image_of(image, "qcow2", target, receipt.digest)


def test_an_image_can_be_used(copies: Copies, tmp_path: Path) -> None:
    image, target = fragmented(tmp_path), tmp_path / "target.qcow2"
    with qemu.export(image, tmp_path / "s") as address:
        copies.copy(NbdExport(address), target, size_bytes=SIZE, format="qcow2")
    uses = ("write -P 200 0 24M", "discard 1M 2M", "write -P 201 7M 3k", "write -z 9M 1M")
    for each in (image, target):
        qemu.write(each, *uses)
        qemu.run("qemu-img", "snapshot", "-c", "before", each)
        qemu.write(each, "write -P 202 3M 5M")
        qemu.run("qemu-img", "resize", "-q", "--shrink", each, str(20 * MIB))
        qemu.run("qemu-img", "snapshot", "-d", "before", each)
        qemu.run("qemu-img", "resize", "-q", each, str(700 * MIB))
        qemu.write(each, "write -P 203 690M 1M")
    qemu.compare(image, "qcow2", target, "qcow2")
    qemu.check(target)


@pytest.mark.parametrize("content_id", ["disk-7@12:00", None])
def test_an_image_that_was_stopped_goes_on(
    content_id: str | None, copies: Copies, tmp_path: Path
) -> None:
    image, target, size = tmp_path / "big.qcow2", tmp_path / "target.qcow2", 300 * MIB
    qemu.create(image, size)
    qemu.write(image, "write -P 1 1M 96M", "write -P 2 200M 30M")
    with qemu.export(image, tmp_path / "s") as address:
        export = NbdExport(address, content_id=content_id)
        push = copies.start(
            export, target, size_bytes=size, tag="again", limit=32 * MIB, format="qcow2"
        )
        while push.progress().done_bytes < 64 * MIB:
            assert push.wait(0.01) is None
        push.cancel()
        assert not target.exists()
        push = copies.start(export, target, size_bytes=size, tag="again", format="qcow2")
        receipt = finish(push)
    assert (push.progress().resumed_bytes > 0) == (content_id is not None)
    is_image_of(image, "qcow2", target, receipt.digest)


def test_a_half_raw_copy_does_not_become_half_an_image(copies: Copies, tmp_path: Path) -> None:
    image, target, size = tmp_path / "big.qcow2", tmp_path / "target.qcow2", 96 * MIB
    qemu.create(image, size)
    qemu.write(image, "write -P 1 0 80M")
    with qemu.export(image, tmp_path / "s") as address:
        export = NbdExport(address, content_id="the same")
        push = copies.start(export, target, size_bytes=size, tag="turn", limit=32 * MIB)
        while push.progress().done_bytes < 48 * MIB:
            assert push.wait(0.01) is None
        push.cancel()
        receipt = copies.copy(export, target, size_bytes=size, tag="turn", format="qcow2")
        is_image_of(image, "qcow2", target, receipt.digest)
        assert target.stat().st_blocks * 512 < 81 * MIB, "the raw copy still takes room"


def test_the_receipt_of_a_raw_copy_does_not_answer_for_an_image(
    copies: Copies, tmp_path: Path
) -> None:
    image, target = fragmented(tmp_path), tmp_path / "target"
    with qemu.export(image, tmp_path / "s") as address:
        export = NbdExport(address)
        copies.copy(export, target, size_bytes=SIZE, tag="kind")
        with pytest.raises(MoverError, match="now it would be a qcow2 image") as failed:
            copies.copy(export, target, size_bytes=SIZE, tag="kind", format="qcow2")
    assert failed.value.code is ErrorCode.TARGET_EXISTS
    qemu.compare(image, "qcow2", target, "raw")


def test_a_copy_that_is_an_image_already_is_answered_by_its_receipt(
    copies: Copies, tmp_path: Path
) -> None:
    image, target = fragmented(tmp_path), tmp_path / "target"
    with qemu.export(image, tmp_path / "s") as address:
        first, again = (
            copies.copy(NbdExport(address), target, size_bytes=SIZE, tag="twice", format="qcow2")
            for _ in range(2)
        )
    assert first == again


def test_a_file_as_it_is_does_not_become_an_image(copies: Copies, tmp_path: Path) -> None:
    image, target = fragmented(tmp_path), tmp_path / "target"
    size = image.stat().st_size
    with pytest.raises(MoverError, match="send it from an NBD export") as failed:
        copies.copy(image, target, size_bytes=size, format="qcow2")
    assert failed.value.code is ErrorCode.SOURCE_INVALID
    assert [path.name for path in tmp_path.iterdir()] == [image.name]


def test_a_device_does_not_become_an_image(copies: Copies, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with (
        qemu.export(fragmented(tmp_path), tmp_path / "s") as address,
        pytest.raises(MoverError, match="cannot become a qcow2 image") as failed,
    ):
        copies.copy(
            NbdExport(address),
            tmp_path / "device",
            size_bytes=SIZE,
            format="qcow2",
            device_state=tmp_path / "state",
        )
    assert failed.value.code is ErrorCode.INVALID_ARGUMENT
