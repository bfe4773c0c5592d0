"""Files beneath a root: safe opening, space reservation, removal, digests.

A copy with tag T to NAME uses these files, all in the directory of NAME:

    .NAME.dm-T.part      what has arrived; becomes NAME when it is complete
    .NAME.dm-T.journal   which chunks of it are durable
    .NAME.dm-T.receipt   that T published NAME, and with what digest

The part and the journal are gone once NAME is published; the receipt stays, so
that repeating the copy is answered without sending, until `discard` (NAME is
kept) or `discard_published` (NAME goes too) removes it.
"""

from __future__ import annotations

from pathlib import Path

from diskmover import _core
from diskmover.exports import core_source
from diskmover.model import FileDigest, NbdExport


def reserve(root: Path, name: str, tag: str, size_bytes: int, *, allocate: bool) -> None:
    """Create the part of a copy before the copy begins; idempotent.

    Args:
        root: Directory that the target must stay beneath.
        name: Target relative to `root`; its directory must exist.
        tag: The copy, as in `Receiver.open_session`.
        size_bytes: Size of the volume.
        allocate: Reserve the space now, all of it. The published file then is
            fully allocated, not sparse.

    Raises:
        MoverError: NO_SPACE or QUOTA (then nothing is left behind),
            TARGET_EXISTS, TARGET_PATH, TARGET_BUSY, TARGET_IO,
            INVALID_ARGUMENT.
    """
    _core.reserve(root, name, tag, size_bytes, allocate)


def discard(root: Path, name: str, tag: str) -> None:
    """Make sure that this copy has left no part, journal or receipt.

    A published file is never touched. Does nothing when there is nothing, also
    when the directory of `name` is gone.

    Raises:
        MoverError: TARGET_BUSY when a session is writing it (close it first),
            TARGET_PATH, TARGET_IO, INVALID_ARGUMENT.
    """
    _core.discard(root, name, tag)


def discard_device(state: Path, name: str, tag: str) -> None:
    """Make sure that this copy to a block device has left no journal or receipt.

    What it wrote to the device stays there.

    Args:
        state: The directory given as `IncomingVolume.device_state`.
        name: The device, as in `IncomingVolume.name`.
        tag: The copy.

    Raises:
        MoverError: TARGET_PATH, TARGET_IO, INVALID_ARGUMENT.
    """
    _core.discard_device(state, name, tag)


def discard_published(root: Path, name: str, tag: str) -> bool:
    """Remove the published file, if this copy published it, and the receipt.

    The receipt proves it: it names the inode. A file that another copy or a
    person placed under the name is left alone, whatever it contains.

    Returns:
        Whether a file was removed.

    Raises:
        MoverError: TARGET_PATH, TARGET_IO, INVALID_ARGUMENT.
    """
    return _core.discard_published(root, name, tag)


def digest(source: Path | NbdExport) -> FileDigest:
    """Compute the root digest of a regular file or block device, or of an export.

    It needs no key: the digest of a `Receipt` can be compared with it, the one of
    an image that was made at a target with the digest of its export. Holes are
    not read. A file that is written meanwhile is refused.

    Raises:
        MoverError: SOURCE_MISSING, SOURCE_INVALID, SOURCE_CHANGED, SOURCE_IO.
    """
    return FileDigest(*_core.digest(*core_source(source)))


def open_beneath(root: Path, name: str, flags: int, mode: int = 0) -> int:
    """Open a file that is certain to lie beneath a directory.

    No symlink anywhere below `root` is followed, and neither "..", an absolute
    path nor a magic link leads out (openat2).

    Args:
        root: The directory.
        name: Path relative to it.
        flags: As for `os.open`; O_CLOEXEC is added.
        mode: Permission bits when O_CREAT is given.

    Returns:
        A file descriptor; the caller closes it.

    Raises:
        MoverError: TARGET_PATH when the path leads out or crosses a symlink.
        OSError: What the kernel said otherwise (ENOENT, EACCES, ...).
    """
    return _core.open_beneath(root, name, flags, mode)
