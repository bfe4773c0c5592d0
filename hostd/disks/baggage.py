"""The small part of a machine as one file: a captured domain in a tar.zst.

It comes from another host, so unpacking believes nothing: names are matched
against a list, only plain files and directories are taken, and sizes are bounded
before anything is written, decompressed bytes included.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from pathlib import Path
from typing import BinaryIO

import zstandard

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.disks.durable import make_private_directory, new_file, remove_tree

ARCHIVE_NAME = "baggage.tar.zst"
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_NAMES = re.compile(
    rf"(?:meta\.json|domain\.xml|nvram|tpm(?:/{_PART}){{0,4}}"
    r"|(?:snapshots|checkpoints)(?:/[0-9]{4}\.xml)?)"
)
# UEFI variable stores of aarch64 have 64 MiB; nothing else comes near.
MAX_MEMBER_BYTES = 128 << 20
MAX_TOTAL_BYTES = 512 << 20
MAX_MEMBERS = 8192
_MAX_WINDOW_BYTES = 128 << 20
_LEVEL = 6
_BLOCK_BYTES = 1 << 20
# The headers of one member with their pax records, and what is read ahead.
_HEADER_BYTES = 256 << 10


def pack(directory: Path, archive: Path) -> Path:
    """Pack a captured domain.

    Args:
        directory: What `hostd.libvirt.capture` wrote.
        archive: File to create or replace as a whole, readable by its owner only.

    Returns:
        `archive`.

    Raises:
        OSError: It cannot be written.
        DroverError: INSTANCE_IMMOVABLE when the other host would refuse it.
    """
    with new_file(archive) as temporary:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            _pack_into(file, directory)
            file.flush()
            os.fsync(fd)
    return archive


def _pack_into(file: BinaryIO, directory: Path) -> None:
    total = members = 0
    with (
        zstandard.ZstdCompressor(level=_LEVEL).stream_writer(file, closefd=False) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in sorted(directory.rglob("*")):
            name = path.relative_to(directory).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise _unpackable(name, "it is neither a file nor a directory")
            size_bytes = path.stat().st_size if path.is_file() else 0
            total, members = total + size_bytes, members + 1
            problem = _problem(name, size_bytes, total, members)
            if problem:
                raise _unpackable(name, problem)
            tar.add(path, name, recursive=False)


def unpack(archive: Path, into: Path) -> Path:
    """Unpack what another host packed.

    Args:
        archive: The file.
        into: Directory to create, private to its owner; replaced when it exists.

    Returns:
        `into`.

    Raises:
        DroverError: BUILD_FAILED when the archive is not one that `pack` writes;
            DISK_IO_ERROR when it cannot be read or written here. Then `into`
            does not exist.
    """
    remove_tree(into)
    try:
        make_private_directory(into)
        with archive.open("rb") as file:
            _unpack_stream(file, into)
    except (tarfile.TarError, zstandard.ZstdError, EOFError, ValueError) as error:
        remove_tree(into)
        raise DroverError(
            Reason.BUILD_FAILED, f"The baggage of the machine is unusable: {error}."
        ) from error
    except OSError as error:
        remove_tree(into)
        raise DroverError(
            Reason.DISK_IO_ERROR, f"{error.filename or archive}: {error.strerror}."
        ) from error
    return into


def _unpack_stream(file: BinaryIO, into: Path) -> None:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
    with decompressor.stream_reader(file) as stream:
        bounded = _Bounded(stream)
        total = members = 0
        with tarfile.open(fileobj=io.BufferedReader(bounded), mode="r|") as tar:
            for member in tar:
                total, members = total + member.size, members + 1
                problem = _problem(member.name, member.size, total, members)
                if not problem and member.type not in (tarfile.REGTYPE, tarfile.DIRTYPE):
                    problem = "it is neither a file nor a directory"
                if problem:
                    raise ValueError(f"{member.name[:80]!r}: {problem}")
                bounded.allow(member.size + _HEADER_BYTES)
                _extract(tar, member, into / member.name)


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    if member.isdir():
        make_private_directory(path)
        return
    make_private_directory(path.parent)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    content = tar.extractfile(member)
    if content is None:
        raise ValueError(f"{member.name!r} has no content")
    try:
        fd = os.open(path, flags, 0o600)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise ValueError(f"{member.name!r} is there twice") from error
    with os.fdopen(fd, "wb") as target:
        while block := content.read(_BLOCK_BYTES):
            target.write(block)
        target.flush()
        os.fsync(fd)


def _problem(name: str, size_bytes: int, total_bytes: int, members: int) -> str:
    if not _NAMES.fullmatch(name):
        return "its name is not one that baggage holds"
    if size_bytes < 0 or size_bytes > MAX_MEMBER_BYTES or total_bytes > MAX_TOTAL_BYTES:
        return "it is too large"
    if members > MAX_MEMBERS:
        return "there are too many files"
    return ""


def _unpackable(name: str, problem: str) -> DroverError:
    return DroverError(
        Reason.INSTANCE_IMMOVABLE,
        f"The machine's {name} cannot travel: {problem}.",
        metadata={"member": name},
    )


class _Bounded(io.RawIOBase):
    """A stream that gives no more than the next member needs.

    tarfile reads a long name or a pax record whole, before anybody can look at its
    size.
    """

    def __init__(self, stream: zstandard.ZstdDecompressionReader) -> None:
        self._stream = stream
        self._left_bytes = _HEADER_BYTES

    def allow(self, size_bytes: int) -> None:
        """Let so much be read from now on, and no more."""
        self._left_bytes = size_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self._stream.read(len(buffer))
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            raise ValueError("it decompresses to more than a machine's baggage can be")
        buffer[: len(data)] = data
        return len(data)
