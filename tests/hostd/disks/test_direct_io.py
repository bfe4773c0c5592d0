"""Units of direct I/O as real file systems have them, and as the real QEMU finds them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hostd.disks.direct_io import direct_io_unit
from tests.support.filesystems import filesystem

MIB = 1 << 20


@pytest.mark.parametrize("sector_bytes", [512, 4096])
@pytest.mark.parametrize("make", [("mkfs.ext4", "-q", "-b", "4096"), ("mkfs.xfs", "-q")])
def test_it_is_the_block_of_the_device(
    tmp_path: Path, make: tuple[str, ...], sector_bytes: int
) -> None:
    size_bytes = 320 * MIB
    at = tmp_path / "fs"
    with filesystem(at, make, size_bytes=size_bytes, sector_bytes=sector_bytes) as root:
        before = list(root.iterdir())
        assert direct_io_unit(root) == sector_bytes
        assert list(root.iterdir()) == before
        for odd, starts in ((0, True), (512, sector_bytes == 512)):
            disk = root / "disk.raw"
            disk.write_bytes(b"x" * (MIB + odd))
            assert starts_past_the_page_cache(disk) is starts


def test_where_it_is_not_to_be_had_nothing_is_known() -> None:
    assert direct_io_unit(Path("/proc")) is None


def starts_past_the_page_cache(disk: Path) -> bool:
    """Whether a QEMU that is stopped at once takes the disk for its guest."""
    drive = f"file={disk},format=raw,cache=none,if=virtio"
    command = ["qemu-system-x86_64", "-machine", "q35,accel=tcg", "-m", "32", "-display", "none"]
    command += ["-nodefaults", "-S", "-drive", drive, "-qmp", "stdio"]
    quit_ = '{"execute": "qmp_capabilities"} {"execute": "quit"}'
    ended = subprocess.run(command, input=quit_, capture_output=True, text=True, timeout=60)
    if ended.returncode:
        assert "Image size is not a multiple of request alignment" in ended.stderr
    return ended.returncode == 0
