"""What the head of an image says is missing from it; for notes, and nothing else.

A file is sent as it is, whatever is found here: a guest can have written these bytes
(a raw disk may begin like a qcow2), so nothing is decided by them and no name in them is
opened. hostd, which decides, goes by the definition of the machine.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diskmover.show import printable

NAME_LENGTH = 60  # of a name in a note, in characters
_MAGIC = b"QFI\xfb"
_START = struct.Struct(">4sIQI")  # magic, version, where the backing name is, its length
_FEATURES = struct.Struct(">Q")
_FEATURES_AT = 72
_LENGTH_OF = {2: 72, 3: 104}  # bytes of the fixed part, by version
_DIRTY, _CORRUPT, _DATA_FILE = 1 << 0, 1 << 1, 1 << 2
_LONGEST_NAME = 1023
_LONGEST_HEADER = 2 << 20  # names lie in the first cluster, and this is the largest


@dataclass(frozen=True)
class Lack:
    """Why a copy of the file alone may be no disk.

    Attributes:
        code: BACKING_FILE, DATA_FILE, NOT_CLOSED or CORRUPT.
        message: What it is and what to do, printable; the name of the copy goes before it.
    """

    code: str
    message: str


@dataclass(frozen=True)
class _Head:
    """The fixed part of a header, and the backing name: None without, empty if unreadable."""

    features: int
    backing: bytes | None


def lacks(file: Path, sent: Sequence[Path]) -> list[Lack]:
    """What a file that looks like a qcow2 says is missing from it or wrong with it.

    Reads 104 bytes and at most 1023 of a name. What cannot be read, is no qcow2, or is
    neither a file nor a block device lacks nothing: sending it will tell.

    Args:
        file: The file, as it was given.
        sent: All files that are sent with it, this one too: a backing file among them is
            not missing.
    """
    head = _read(file)
    return list(_told(head, file, sent)) if head else []


def _told(head: _Head, file: Path, sent: Sequence[Path]) -> Iterator[Lack]:
    if head.backing is not None and not _is_sent(head.backing, file, sent):
        name = f'"{_short(head.backing)}"' if head.backing else "whose name cannot be read"
        yield Lack(
            "BACKING_FILE",
            f"looks like a qcow2 over the backing file {name}, which is not sent with it:"
            " without that it is no disk",
        )
    if head.features & _DATA_FILE:
        yield Lack(
            "DATA_FILE",
            "looks like a qcow2 whose data lies in another file (data_file of `qemu-img info`):"
            " without that it is no disk",
        )
    if head.features & _DIRTY:
        yield Lack(
            "NOT_CLOSED",
            "looks like a qcow2 that was not closed (marked dirty): `qemu-img check -r all`"
            " repairs it, here or there, and so does a QEMU that opens it to write",
        )
    if head.features & _CORRUPT:
        yield Lack(
            "CORRUPT",
            "looks like a qcow2 that QEMU has marked corrupt: `qemu-img check` tells what is"
            " wrong; the copy will be no better",
        )


def _read(file: Path) -> _Head | None:
    try:
        # Whoever opens a pipe waits for its other end.
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None
    try:
        mode = os.fstat(descriptor).st_mode
        return _head(descriptor) if stat.S_ISREG(mode) or stat.S_ISBLK(mode) else None
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _head(descriptor: int) -> _Head | None:
    start = os.pread(descriptor, max(_LENGTH_OF.values()), 0)
    if len(start) < _START.size:
        return None
    magic, version, at, length = _START.unpack_from(start)
    if magic != _MAGIC or len(start) < _LENGTH_OF.get(version, len(start) + 1):
        return None
    features = _FEATURES.unpack_from(start, _FEATURES_AT)[0] if version > 2 else 0
    if not (at and length):
        return _Head(features, None)
    if length > _LONGEST_NAME or at + length > _LONGEST_HEADER:
        return _Head(features, b"")
    name = os.pread(descriptor, length, at)
    return _Head(features, name if len(name) == length else b"")


def _short(name: bytes) -> str:
    """A name as it can be shown; of a long path the end, which tells most."""
    text = printable(name.decode(errors="replace"))
    return text if len(text) <= NAME_LENGTH else f"...{text[3 - NAME_LENGTH :]}"


def _is_sent(backing: bytes, file: Path, sent: Sequence[Path]) -> bool:
    """Whether one of the other files has the name; told by names alone, nothing is opened."""
    named = {
        os.path.normpath(os.path.join(os.fsencode(one.parent), backing)) for one in _names(file)
    }
    others = {os.fsencode(one) for other in sent for one in _names(other)}
    own = {os.fsencode(one) for one in _names(file)}
    return bool(backing and named & (others - own))


def _names(file: Path) -> tuple[Path, Path]:
    """A file as it was given and as it is, both from the root."""
    return Path(os.path.normpath(file.absolute())), file.resolve()
