"""Who else has a file open.

Three looks, because each sees what the others miss: file descriptors of all
processes, loop devices (the kernel holds their file), and the image locks that
QEMU sets, also from another host on shared storage.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

log = structlog.stdlib.get_logger(__name__)

_PROC = Path("/proc")
_LOOPS = Path("/sys/block")
# QEMU locks byte 100 + n for a permission it uses and 200 + n for one it denies others.
_QEMU_LOCK_START, _QEMU_LOCK_LENGTH = 100, 164
_FLOCK = struct.Struct("hhqqi4x")


@dataclass(frozen=True)
class FileUser:
    """A user of a file.

    Attributes:
        path: The file.
        pid: The process; 0 when it is not known.
        command: Its name, or what is known instead.
        arguments: Its command line, empty when unknown.
        locked: All that is known is a lock as QEMU sets it.
    """

    path: Path
    pid: int
    command: str
    arguments: tuple[str, ...] = ()
    locked: bool = False

    def runs_domain(self, domain_uuid: str) -> bool:
        """True for the QEMU process of the domain."""
        return any(
            option == "-uuid" and value == domain_uuid
            for option, value in zip(self.arguments, self.arguments[1:], strict=False)
        )

    def __str__(self) -> str:
        return f"{self.command} (pid {self.pid})" if self.pid else self.command


def find_users(paths: Sequence[Path]) -> list[FileUser]:
    """Find who has any of the files open, this process aside.

    Files that do not exist have no users. A user is reported once a file.
    """
    wanted: dict[tuple[int, int], Path] = {}
    for path in paths:
        with suppress(OSError):
            status = path.stat()
            wanted[status.st_dev, status.st_ino] = path
    if not wanted:
        return []
    users = [*_processes(wanted), *_loop_devices(wanted)]
    known = {user.path for user in users}
    for path in wanted.values():
        if path not in known and _is_locked_by_qemu(path):
            what = "a QEMU of another host (its image lock is held)"
            users.append(FileUser(path, 0, what, locked=True))
    return users


def _processes(wanted: dict[tuple[int, int], Path]) -> list[FileUser]:
    users: list[FileUser] = []
    hidden = 0
    for entry in _PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            for path in _open_files(entry, wanted):
                users.append(_describe(entry, path))
        except PermissionError:
            hidden += 1
        except OSError:
            # Processes come and go while we look.
            continue
    if hidden:
        log.warning("open files of other processes are hidden from hostd", processes=hidden)
    return users


def _open_files(process: Path, wanted: dict[tuple[int, int], Path]) -> list[Path]:
    found: dict[Path, None] = {}
    for descriptor in (process / "fd").iterdir():
        with suppress(OSError):
            status = descriptor.stat()
            path = wanted.get((status.st_dev, status.st_ino))
            if path is not None:
                found[path] = None
    return list(found)


def _describe(process: Path, path: Path) -> FileUser:
    command = (process / "comm").read_text("utf-8", "replace").strip()
    raw = (process / "cmdline").read_bytes().rstrip(b"\0")
    arguments = tuple(part.decode("utf-8", "replace") for part in raw.split(b"\0"))
    return FileUser(path, int(process.name), command, arguments)


def _loop_devices(wanted: dict[tuple[int, int], Path]) -> list[FileUser]:
    users = []
    for device in _LOOPS.glob("loop*"):
        with suppress(OSError):
            backing = Path((device / "loop/backing_file").read_text("utf-8").rstrip("\n"))
            status = backing.stat()
            path = wanted.get((status.st_dev, status.st_ino))
            if path is not None:
                users.append(FileUser(path, 0, f"the loop device /dev/{device.name}"))
    return users


def _is_locked_by_qemu(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        probe = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _QEMU_LOCK_START, _QEMU_LOCK_LENGTH, 0)
        answer: bytes = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, probe)
    except OSError:
        # The file system has no such locks.
        return False
    finally:
        os.close(fd)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
