"""In which units QEMU does direct I/O on the files of a directory."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

# As QEMU tries them.
_UNITS = (1, 512, 1024, 2048, 4096)
_SAFE_UNIT = max(4096, mmap.PAGESIZE)


def direct_io_unit(directory: Path) -> int | None:
    """Bytes that offsets and lengths have to be multiples of.

    It is asked as QEMU asks, so that the answer is QEMU's: by reading without the page
    cache, here from a file without a name that is gone at once. Where any length can be
    read, QEMU trusts none and takes a page.

    Args:
        directory: Where; nothing is left in it.

    Returns:
        None when it cannot be found out: no direct I/O, no files without a name, no room.
    """
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        with mmap.mmap(-1, _SAFE_UNIT) as page, memoryview(page) as buffer:
            if os.pwrite(fd, buffer, 0) != _SAFE_UNIT:
                return None
            unit = next((unit for unit in _UNITS if _reads(fd, buffer, unit)), None)
    except OSError:
        return None
    finally:
        os.close(fd)
    return _SAFE_UNIT if unit == 1 else unit


def _reads(fd: int, buffer: memoryview, length: int) -> bool:
    with buffer[:length] as part:
        try:
            return os.preadv(fd, [part], 0) == length
        except OSError:
            return False
