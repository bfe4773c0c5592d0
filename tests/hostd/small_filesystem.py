"""A real file system of a few MiB that a test can fill to its last block."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.hostd.guests import KIB, MIB

_FILLER = "filler"


@contextmanager
def small_filesystem(at: Path, image: Path, size_bytes: int = 16 * MIB) -> Iterator[Path]:
    """Mount an ext4 of its own, without a reserve for root, at a directory.

    Args:
        at: Where; made when missing.
        image: The file that it lies in.
        size_bytes: Its size.
    """
    at.mkdir(parents=True, exist_ok=True)
    image.touch()
    os.truncate(image, size_bytes)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(at)], check=True)
    try:
        (at / "lost+found").rmdir()
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


@contextmanager
def filled(mounted: Path) -> Iterator[None]:
    """Leave no free block in a file system until the block ends."""
    filler = mounted / _FILLER
    with filler.open("wb") as file:
        for step in (MIB, 64 * KIB, 4 * KIB, KIB):
            _allocate_all(file.fileno(), step)
        os.fsync(file.fileno())
    assert os.statvfs(mounted).f_bavail == 0
    try:
        yield
    finally:
        filler.unlink()
        os.sync()


def _allocate_all(descriptor: int, step: int) -> None:
    while True:
        try:
            os.posix_fallocate(descriptor, os.fstat(descriptor).st_size, step)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return
