"""The directories that Drover may touch, and paths that are certain to lie in them.

Hosts name files to each other by (root, relative name). A path becomes such a
name only after its symlinks are resolved, so a link that leads out of the roots
leads to nothing; and a name becomes an open file only component by component,
following no link at all.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason

# Parked files lie here, in each root; nothing else may.
PARKING_DIRECTORY = ".drover-parked"
DEFAULT_FORMATS = ("qcow2", "raw")
_LONGEST_NAME = 1024
_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class RootUsage:
    """The file system beneath a root.

    Attributes:
        capacity_bytes: Its size.
        available_bytes: What an unprivileged process could still write.
        filesystem: Its type, as "ext4".
        device_id: Its device number.
    """

    capacity_bytes: int
    available_bytes: int
    filesystem: str
    device_id: int


class StorageRoots:
    """The configured roots.

    Args:
        roots: Name -> absolute directory.
        allowed_formats: Disk formats that may be moved.
    """

    def __init__(
        self, roots: Mapping[str, Path], allowed_formats: Sequence[str] = DEFAULT_FORMATS
    ) -> None:
        self._roots = {name: Path(path) for name, path in roots.items()}
        self.allowed_formats = frozenset(allowed_formats)

    @property
    def names(self) -> list[str]:
        """Names of the roots, sorted."""
        return sorted(self._roots)

    def directory(self, root: str) -> Path:
        """The directory of a root.

        Raises:
            DroverError: TARGET_LACKS_ROOT.
        """
        found = self._roots.get(root)
        if found is None:
            raise DroverError(
                Reason.TARGET_LACKS_ROOT,
                f"This host has no storage root {root!r}; it has {', '.join(self.names)}.",
                subject="root",
                metadata={"root": root},
            )
        return found

    def locate(self, path: Path | str) -> tuple[str, str] | None:
        """Name a path by root and relative name.

        Symlinks are resolved first. The innermost of nested roots counts.

        Returns:
            (root name, relative name), or None when the path lies in no root or
            among parked files.
        """
        real = Path(os.path.realpath(path))
        best: tuple[int, str, str] | None = None
        for root, directory in self._roots.items():
            base = Path(os.path.realpath(directory))
            if real == base or not real.is_relative_to(base):
                continue
            name = real.relative_to(base)
            if best is None or len(base.parts) > best[0]:
                best = (len(base.parts), root, str(name))
        if best is None or name_problem(best[2]):
            return None
        return best[1], best[2]

    def resolve(self, root: str, name: str) -> Path:
        """The path of a name, whether or not the file exists.

        Raises:
            DroverError: TARGET_LACKS_ROOT, or DISK_OUTSIDE_ROOTS when the name is
                malformed or a symlink on the way leads out of the root.
        """
        directory = self.directory(root)
        problem = name_problem(name)
        path = directory / name
        if not problem:
            base = Path(os.path.realpath(directory))
            if not Path(os.path.realpath(path)).is_relative_to(base):
                problem = "a symbolic link leads out of the root"
        if problem:
            raise _outside(root, name, problem)
        return path

    def open(self, root: str, name: str, flags: int, mode: int = 0o600) -> int:
        """Open a file beneath a root, following no symlink at all.

        Args:
            root: Name of the root.
            name: Relative name.
            flags: As for `os.open`.
            mode: Permission bits for O_CREAT.

        Returns:
            A file descriptor; the caller closes it.

        Raises:
            DroverError: TARGET_LACKS_ROOT, DISK_OUTSIDE_ROOTS.
            OSError: What the kernel said otherwise; ELOOP for a symlink.
        """
        problem = name_problem(name)
        if problem:
            raise _outside(root, name, problem)
        *folders, last = PurePosixPath(name).parts
        at = os.open(self.directory(root), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for folder in folders:
                inner = os.open(
                    folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at
                )
                os.close(at)
                at = inner
            return os.open(last, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=at)
        finally:
            os.close(at)

    def usage(self, root: str) -> RootUsage:
        """Size and free space of a root's file system.

        Raises:
            DroverError: TARGET_LACKS_ROOT, also when the directory is gone.
        """
        directory = self.directory(root)
        try:
            space = os.statvfs(directory)
            device_id = directory.stat().st_dev
        except OSError as error:
            raise DroverError(
                Reason.TARGET_LACKS_ROOT,
                f"Storage root {root} ({directory}) cannot be used: {error.strerror}.",
                subject="root",
                metadata={"root": root},
            ) from error
        return RootUsage(
            capacity_bytes=space.f_blocks * space.f_frsize,
            available_bytes=space.f_bavail * space.f_frsize,
            filesystem=_filesystem_type(directory),
            device_id=device_id,
        )


def name_problem(name: str) -> str:
    """What is wrong with a relative name; empty when nothing is.

    Pure: looks at the text only.
    """
    if not name or len(name.encode("utf-8", "surrogateescape")) > _LONGEST_NAME:
        return "it is empty or too long"
    if name.startswith("/") or name.endswith("/"):
        return "it is not relative to the root, or names a directory"
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "it has an empty, '.' or '..' part"
    if not name.isprintable():
        return "it has unprintable characters"
    if PARKING_DIRECTORY in parts:
        return f"{PARKING_DIRECTORY} belongs to Drover"
    return ""


def _outside(root: str, name: str, problem: str) -> DroverError:
    return DroverError(
        Reason.DISK_OUTSIDE_ROOTS,
        f"{name!r} is not a usable name in storage root {root}: {problem}.",
        subject="name",
        metadata={"root": root, "name": name},
    )


def _filesystem_type(directory: Path, mounts: Path = _MOUNTS) -> str:
    """Type of the file system a directory lies on, from the innermost mount above it."""
    real = os.path.realpath(directory)
    best, found = -1, ""
    with suppress(OSError):
        for line in mounts.read_text("utf-8", "surrogateescape").splitlines():
            fields, _, rest = line.partition(" - ")
            point = fields.split(" ")[4].encode().decode("unicode_escape", "replace")
            inside = real == point or real.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= best:
                best, found = len(point), rest.split(" ")[0]
    return found


def existing(paths: Collection[Path]) -> list[Path]:
    """Those of the paths that exist, dangling links included."""
    return [path for path in paths if os.path.lexists(path)]
