"""Disks as their guests see them, read from real QEMU exports."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from diskmover import ErrorCode, MoverError, NbdExport, digest
from tests.diskmover import qemu
from tests.diskmover.copies import Copies
from tests.diskmover.qemu import MIB
from tests.diskmover.stranger import digest_of

SIZE = 24 * MIB + 512


def compressed(folder: Path) -> Path:
    plain = fragmented(folder)
    image = folder / "compressed.qcow2"
    qemu.run("qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", plain, image)
    return image


def chain(folder: Path) -> Path:
    base = qemu.create(folder / "base.qcow2", SIZE - MIB)
    qemu.write(base, "write -P 1 0 8M", "write -P 2 20M 2M")
    middle = qemu.create(folder / "middle.qcow2", SIZE, "-b", "base.qcow2", "-F", "qcow2")
    qemu.write(middle, "write -P 3 1M 64k", "write -z 2M 1M", f"write -P 4 {SIZE - 512} 512")
    top = qemu.create(folder / "top.qcow2", SIZE, "-b", "middle.qcow2", "-F", "qcow2")
    qemu.write(top, "write -P 5 4097k 3k", "discard 5M 1M")
    return top


def with_snapshots(folder: Path) -> Path:
    image = qemu.create(folder / "snapshots.qcow2", SIZE)
    for number in (1, 2, 3):
        qemu.write(image, f"write -P {number} {number}M 3M")
        qemu.run("qemu-img", "snapshot", "-c", f"s{number}", image)
    qemu.write(image, "write -P 9 2M 64k")
    return image


def allocated_zeros(folder: Path) -> Path:
    image = qemu.create(folder / "zeros.qcow2", SIZE)
    qemu.write(
        image, "write -P 0 0 16M", "write -P 7 3M 4k", "write -z 17M 2M", "write -z -u 20M 1M"
    )
    return image


def fragmented(folder: Path) -> Path:
    image = qemu.create(folder / "fragments.qcow2", SIZE)
    clusters = random.Random(5).sample(range(SIZE // 65536), 150)
    qemu.write(image, *(f"write -P {1 + at % 250} {at * 64}k 8k" for at in clusters))
    return image


def small_clusters(folder: Path) -> Path:
    image = qemu.create(folder / "small.qcow2", SIZE, "-o", "cluster_size=512")
    qemu.write(image, *(f"write -P {1 + at % 250} {at * 3 * 512} 512" for at in range(200)))
    return image


def empty(folder: Path) -> Path:
    return qemu.create(folder / "empty.qcow2", SIZE)


IMAGES = [compressed, chain, with_snapshots, allocated_zeros, fragmented, small_clusters, empty]


@pytest.mark.parametrize("make", IMAGES, ids=lambda make: make.__name__)
def test_what_arrives_is_what_the_guest_sees(
    make: Callable[[Path], Path], copies: Copies, tmp_path: Path
) -> None:
    image, target = make(tmp_path), tmp_path / "target.raw"
    with qemu.export(image, tmp_path / "s") as address:
        receipt = copies.copy(NbdExport(address), target, size_bytes=SIZE)
    qemu.compare(image, "qcow2", target, "raw")
    assert target.stat().st_size == SIZE
    found = digest(target)
    assert (receipt.digest, receipt.data_bytes) == (found.digest, found.data_bytes)
    assert receipt.mode == "guest-visible"
    assert receipt.digest == digest_of(target), "a stranger finds another digest"


def test_a_raw_image_can_be_exported_too(copies: Copies, tmp_path: Path) -> None:
    image, target = tmp_path / "image.raw", tmp_path / "target.raw"
    qemu.run("qemu-img", "create", "-q", "-f", "raw", image, str(SIZE))
    qemu.write(image, "write -P 3 1M 5M", image_format="raw")
    with qemu.export(image, tmp_path / "s", image_format="raw") as address:
        receipt = copies.copy(NbdExport(address), target, size_bytes=SIZE)
    assert receipt.digest == digest(image).digest


def test_an_export_is_chosen_by_name(copies: Copies, tmp_path: Path) -> None:
    image, target = fragmented(tmp_path), tmp_path / "target.raw"
    with qemu.export(image, tmp_path / "s", "--export-name=vda") as address:
        with pytest.raises(MoverError, match="no export of that name") as failed:
            copies.copy(NbdExport(address, "vdb"), target, size_bytes=SIZE)
        assert failed.value.code is ErrorCode.SOURCE_INVALID
        copies.copy(NbdExport(address, "vda"), target, size_bytes=SIZE)
    qemu.compare(image, "qcow2", target, "raw")


def test_one_connection_is_enough(copies: Copies, tmp_path: Path) -> None:
    image, target = fragmented(tmp_path), tmp_path / "target.raw"
    with qemu.export(image, tmp_path / "s", "--shared=1") as address:
        copies.copy(NbdExport(address), target, size_bytes=SIZE)
    qemu.compare(image, "qcow2", target, "raw")


def test_zeros_of_a_huge_disk_are_neither_read_nor_sent(copies: Copies, tmp_path: Path) -> None:
    size = 8 << 40
    image, target = qemu.create(tmp_path / "huge.qcow2", size), tmp_path / "target.raw"
    qemu.write(image, "write -P 1 5T 64k", f"write -P 2 {size - 512} 512")
    with qemu.export(image, tmp_path / "s") as address:
        receipt = copies.copy(NbdExport(address), target, size_bytes=size)
    assert receipt.data_bytes == 65536 + 4096
    assert receipt.wire_bytes < MIB
    with target.open("rb") as file:
        file.seek(5 << 40)
        assert file.read(65536) == b"\x01" * 65536
        file.seek(size - 512)
        assert file.read() == b"\x02" * 512


def test_an_export_that_can_be_written_is_refused(copies: Copies, tmp_path: Path) -> None:
    image = empty(tmp_path)
    command = ["qemu-storage-daemon", "--nbd-server", f"addr.type=unix,addr.path={tmp_path}/s"]
    command += ["--blockdev", f"driver=file,filename={image},node-name=f"]
    command += ["--blockdev", "driver=qcow2,file=f,node-name=q"]
    command += ["--export", "nbd,id=e,node-name=q,name=vda,writable=on"]
    with (
        qemu.serving(command, tmp_path / "s") as address,
        pytest.raises(MoverError, match="is writable") as failed,
    ):
        copies.copy(NbdExport(address, "vda"), tmp_path / "t", size_bytes=SIZE)
    assert failed.value.code is ErrorCode.SOURCE_INVALID


def test_nobody_there(copies: Copies, tmp_path: Path) -> None:
    with pytest.raises(MoverError, match="cannot connect") as failed:
        copies.copy(NbdExport(f"unix:{tmp_path}/s"), tmp_path / "t", size_bytes=SIZE)
    assert failed.value.code is ErrorCode.SOURCE_INVALID


def test_another_size_than_expected_is_refused(copies: Copies, tmp_path: Path) -> None:
    with (
        qemu.export(empty(tmp_path), tmp_path / "s") as address,
        pytest.raises(MoverError, match=f"{SIZE} bytes") as failed,
    ):
        copies.copy(NbdExport(address), tmp_path / "t", size_bytes=MIB)
    assert failed.value.code is ErrorCode.SOURCE_INVALID


def test_a_server_that_dies_is_an_error_and_publishes_nothing(
    copies: Copies, tmp_path: Path
) -> None:
    image, target = tmp_path / "big.qcow2", tmp_path / "target.raw"
    size = 96 * MIB
    qemu.create(image, size)
    qemu.write(image, "write -P 1 0 96M")
    with qemu.export(image, tmp_path / "s") as address:
        push = copies.start(NbdExport(address), target, size_bytes=size, limit=8 * MIB)
        while push.progress().done_bytes == 0:
            assert push.wait(0.01) is None
    with pytest.raises(MoverError, match="closed the connection") as failed:
        push.wait(60)
    assert failed.value.code is ErrorCode.SOURCE_IO
    assert not target.exists()


@pytest.mark.parametrize("content_id", ["disk-7@12:00", None])
def test_only_named_content_is_gone_on_with(
    content_id: str | None, copies: Copies, tmp_path: Path
) -> None:
    image, target = tmp_path / "big.qcow2", tmp_path / "target.raw"
    size = 96 * MIB
    qemu.create(image, size)
    qemu.write(image, "write -P 1 0 96M")
    with qemu.export(image, tmp_path / "s") as address:
        export = NbdExport(address, content_id=content_id)
        push = copies.start(export, target, size_bytes=size, tag="again", limit=32 * MIB)
        while push.progress().done_bytes < 32 * MIB:
            assert push.wait(0.01) is None
        push.cancel()
        push = copies.start(export, target, size_bytes=size, tag="again")
        assert push.wait(60) is not None
    assert (push.progress().resumed_bytes > 0) == (content_id is not None)
    qemu.compare(image, "qcow2", target, "raw")
