"""Changes to files that are whole after a crash: either made, or not made.

A rename or a new name is durable only once its directory is synced; each function
here returns after that.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# Called by name after each step that a crash could follow; does nothing in
# production, ends the process in tests.
CrashPoint = Callable[[str], None]
_BLOCK_BYTES = 1 << 20
_TEMPORARY = ".drover-new"


def no_crash(_point: str) -> None:
    """The crash point of production."""


def sync_directory(path: Path) -> None:
    """Make names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Create or replace a file as a whole."""
    with new_file(path) as temporary:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Let the block write a file under another name, and give it its own once it is whole.

    The block syncs what it writes. Nothing is left of a file that is not whole; its
    error names the file.
    """
    temporary = path.with_name(path.name + _TEMPORARY)
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        temporary.rename(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    sync_directory(path.parent)


def copy_file(source: Path, target: Path) -> None:
    """Create or replace `target` with the content, mode and owner of `source`."""
    with new_file(target) as temporary, source.open("rb") as reader:
        status = os.fstat(reader.fileno())
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as writer:
            shutil.copyfileobj(reader, writer, _BLOCK_BYTES)
            writer.flush()
            os.fchown(fd, status.st_uid, status.st_gid)
            os.fchmod(fd, stat.S_IMODE(status.st_mode))
            os.fsync(fd)


def copy_tree(source: Path, target: Path) -> None:
    """Copy the directories and plain files of a tree to where nothing is yet.

    The whole tree appears at once. Modes and owners are kept; anything but files
    and directories is left out, as are lock files.
    """
    temporary = target.with_name(target.name + _TEMPORARY)
    remove_tree(temporary)
    _copy_directory(source, temporary)
    temporary.rename(target)
    sync_directory(target.parent)


def _copy_directory(source: Path, target: Path) -> None:
    target.mkdir(mode=0o700)
    for entry in sorted(source.iterdir()):
        status = entry.lstat()
        if stat.S_ISDIR(status.st_mode):
            _copy_directory(entry, target / entry.name)
        elif stat.S_ISREG(status.st_mode) and entry.name != ".lock":
            copy_file(entry, target / entry.name)
    status = source.stat()
    os.chown(target, status.st_uid, status.st_gid)
    target.chmod(stat.S_IMODE(status.st_mode))
    sync_directory(target)


def remove_tree(path: Path) -> None:
    """Remove a directory and all in it; does nothing when it is gone."""
    with suppress(FileNotFoundError):
        shutil.rmtree(path)


def make_private_directory(path: Path) -> None:
    """Make a directory, and its missing parents, that only its owner can enter."""
    if path.is_dir():
        return
    make_private_directory(path.parent)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
        sync_directory(path.parent)


def move_file(source: Path, target: Path) -> None:
    """Give a file another name on the same file system, never replacing one.

    Interrupted, the file has both names; repeating the move ends that.

    Raises:
        FileExistsError: Another file has the target name.
        OSError: It cannot be moved.
    """
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        if not os.path.samestat(source.lstat(), target.lstat()):
            raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        # A file system without hard links.
        if os.path.lexists(target):
            raise FileExistsError(
                errno.EEXIST, "another file has this name", str(target)
            ) from error
        source.rename(target)
    else:
        sync_directory(target.parent)
    with suppress(FileNotFoundError):
        source.unlink()
    sync_directory(target.parent)
    sync_directory(source.parent)


@dataclass(frozen=True)
class Owner:
    """Owner and mode of a file, by number and by name.

    Numbers are right on the same host; on another one names are.
    """

    uid: int
    gid: int
    user: str
    group: str
    mode: int


def owner_of(path: Path) -> Owner:
    """Owner and mode of a file."""
    status = path.stat()
    user = group = ""
    with suppress(KeyError):
        user = pwd.getpwuid(status.st_uid).pw_name
    with suppress(KeyError):
        group = grp.getgrgid(status.st_gid).gr_name
    return Owner(status.st_uid, status.st_gid, user, group, stat.S_IMODE(status.st_mode))


def give_to(path: Path, owner: Owner) -> None:
    """Set owner and mode by name; a name that is unknown here leaves that half alone."""
    uid = gid = -1
    with suppress(KeyError):
        uid = pwd.getpwnam(owner.user).pw_uid
    with suppress(KeyError):
        gid = grp.getgrnam(owner.group).gr_gid
    os.chown(path, uid, gid)
    path.chmod(owner.mode & 0o777)
