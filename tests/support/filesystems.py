"""Real file systems of a test's own, on loop devices."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def loop_device(image: Path, size_bytes: int, sector_bytes: int = 512) -> Iterator[str]:
    """A loop device over a new sparse file.

    Args:
        image: The file.
        size_bytes: Its size.
        sector_bytes: Logical block size of the device, 512 to 4096.
    """
    image.touch()
    os.truncate(image, size_bytes)
    command = ["losetup", "--find", "--show", "--sector-size", str(sector_bytes), str(image)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextmanager
def filesystem(
    at: Path,
    make: Sequence[str],
    *,
    size_bytes: int,
    sector_bytes: int = 512,
    options: str = "defaults",
) -> Iterator[Path]:
    """Make a file system and mount it at a directory that is made for it.

    Args:
        at: Where; its image lies beside it.
        make: The command that makes it, as ("mkfs.xfs", "-q"); the device is added.
        size_bytes: Size of the device.
        sector_bytes: Logical block size of the device.
        options: Of the mount.
    """
    at.mkdir()
    with loop_device(at.with_name(f"{at.name}.img"), size_bytes, sector_bytes) as device:
        subprocess.run([*make, device], check=True, capture_output=True)
        subprocess.run(["mount", "-o", options, device, str(at)], check=True)
        try:
            yield at
        finally:
            subprocess.run(["umount", str(at)], check=True)
