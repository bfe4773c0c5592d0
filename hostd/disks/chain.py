"""The files of one disk: the one a domain names, and the backing files below it.

    vda (format from the XML) -> vda.backing1 (format from vda's header) -> ...

A file is looked into only when its format is *given* as qcow2, and a backing
file's format only ever comes from the overlay's header. A raw disk is never
looked into: its first bytes belong to the guest.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from controlplane.common.reasons import Reason
from hostd.disks.qcow2 import Qcow2Error, Qcow2Header, read_header
from hostd.disks.roots import StorageRoots
from hostd.v1 import domain_pb2

MAX_DEPTH = 32
_SECTOR_BYTES = 512


@dataclass(frozen=True)
class Obstacle:
    """Something that keeps a machine from moving.

    Attributes:
        reason: Why, from the table.
        message: One sentence.
    """

    reason: Reason
    message: str


@dataclass(frozen=True)
class DiskTop:
    """What a definition says of a disk.

    Attributes:
        volume_id: Target device, as "vda".
        kind: DISK or MEDIUM.
        path: The file.
        format: As given; empty when not given.
        read_only: As given.
        direct_io: QEMU is to go past the page cache.
        logical_block_bytes: As given; 0 when not given.
    """

    volume_id: str
    kind: domain_pb2.VolumeKind.ValueType
    path: Path
    format: str
    read_only: bool = False
    direct_io: bool = False
    logical_block_bytes: int = 0


@dataclass(frozen=True)
class ChainLink:
    """One file of a disk.

    Attributes:
        volume_id: "vda", "vda.backing1", ...
        kind: DISK, MEDIUM or BACKING.
        path: Where it was found, as named.
        root: Storage root; empty when outside of all.
        name: Name relative to the root.
        format: As given, never probed.
        size_bytes: Length of the file.
        allocated_bytes: What the file system has allocated.
        virtual_size_bytes: What the guest sees.
        read_only: Whether the guest may not write.
        backing_volume_id: The link below; empty at the end.
        unclean: It says that it was not closed cleanly.
        direct_io: QEMU is to go past the page cache.
        logical_block_bytes: A block as the guest is told; 0 for QEMU's default.
    """

    volume_id: str
    kind: domain_pb2.VolumeKind.ValueType
    path: Path
    root: str
    name: str
    format: str
    size_bytes: int = 0
    allocated_bytes: int = 0
    virtual_size_bytes: int = 0
    read_only: bool = False
    backing_volume_id: str = ""
    unclean: bool = False
    direct_io: bool = False
    logical_block_bytes: int = 0

    def to_volume(self) -> domain_pb2.Volume:
        """As hosts tell each other."""
        return domain_pb2.Volume(
            volume_id=self.volume_id,
            kind=self.kind,
            root=self.root,
            name=self.name,
            path=str(self.path),
            format=self.format,
            size_bytes=self.size_bytes,
            allocated_bytes=self.allocated_bytes,
            virtual_size_bytes=self.virtual_size_bytes,
            backing_volume_id=self.backing_volume_id,
            read_only=self.read_only,
            unclean=self.unclean,
            direct_io=self.direct_io,
            logical_block_bytes=self.logical_block_bytes,
        )


@dataclass(frozen=True)
class Chain:
    """A disk's files, the topmost first, and what is wrong with them."""

    links: tuple[ChainLink, ...]
    obstacles: tuple[Obstacle, ...]


def read_chain(top: DiskTop, roots: StorageRoots) -> Chain:
    """Read a disk's chain.

    Never raises for what is found on disk: that becomes an obstacle, and the
    chain ends there.

    Args:
        top: The disk as the definition names it.
        roots: Where its files may lie, and in which formats.
    """
    links: list[ChainLink] = []
    obstacles: list[Obstacle] = []
    seen: set[tuple[int, int]] = set()
    path, format_, volume_id, kind = top.path, top.format, top.volume_id, top.kind
    while True:
        read_only = top.read_only or kind == domain_pb2.VOLUME_KIND_BACKING
        bare = ChainLink(volume_id, kind, path, "", "", format_, read_only=read_only)
        if not links:
            bare = replace(
                bare, direct_io=top.direct_io, logical_block_bytes=top.logical_block_bytes
            )
        link, below, problem = _read_link(bare, roots, seen)
        if problem is None and below is not None and len(links) + 1 >= MAX_DEPTH:
            problem = _immovable(f"{_what(link)} has more than {MAX_DEPTH} files in its chain.")
        if problem is not None or below is None:
            links.append(link)
            obstacles += [problem] if problem is not None else []
            return Chain(tuple(links), tuple(obstacles))
        next_id = f"{top.volume_id}.backing{len(links) + 1}"
        links.append(replace(link, backing_volume_id=next_id))
        path, format_ = below
        volume_id, kind = next_id, domain_pb2.VOLUME_KIND_BACKING


def _read_link(
    link: ChainLink, roots: StorageRoots, seen: set[tuple[int, int]]
) -> tuple[ChainLink, tuple[Path, str] | None, Obstacle | None]:
    """One file: the link filled in, the file below it, and what is wrong."""
    located = roots.locate(link.path)
    if located is None:
        message = f"{_what(link)} lies outside the storage roots of this host."
        return link, None, Obstacle(Reason.DISK_OUTSIDE_ROOTS, message)
    link = replace(link, root=located[0], name=located[1])
    if link.format not in roots.allowed_formats:
        return link, None, _format_problem(link)
    try:
        fd = roots.open(link.root, link.name, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        reason = Reason.DISK_MISSING if missing else Reason.DISK_IO_ERROR
        what = "is missing" if missing else f"cannot be opened: {error.strerror}"
        return link, None, Obstacle(reason, f"{_what(link)} {what}.")
    try:
        return _read_open(link, fd, seen)
    except OSError as error:
        message = f"{_what(link)} cannot be read: {error.strerror}."
        return link, None, Obstacle(Reason.DISK_IO_ERROR, message)
    finally:
        os.close(fd)


def _read_open(
    link: ChainLink, fd: int, seen: set[tuple[int, int]]
) -> tuple[ChainLink, tuple[Path, str] | None, Obstacle | None]:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        return link, None, _immovable(f"{_what(link)} is not a regular file.")
    if (status.st_dev, status.st_ino) in seen:
        return link, None, _immovable(f"{_what(link)} is its own backing file.")
    seen.add((status.st_dev, status.st_ino))
    link = replace(
        link,
        size_bytes=status.st_size,
        allocated_bytes=status.st_blocks * _SECTOR_BYTES,
        virtual_size_bytes=status.st_size,
    )
    if link.format != "qcow2":
        return link, None, None
    try:
        header = read_header(fd)
    except Qcow2Error as error:
        message = f"{_what(link)} is given as qcow2, but {error}."
        return link, None, Obstacle(Reason.DISK_CORRUPT, message)
    link = replace(link, virtual_size_bytes=header.virtual_size_bytes, unclean=header.dirty)
    below, problem = _below(link, header)
    return link, below, problem


def _below(link: ChainLink, header: Qcow2Header) -> tuple[tuple[Path, str] | None, Obstacle | None]:
    problem = _header_problem(link, header)
    if problem is not None or header.backing_file is None:
        return None, problem
    name = header.backing_file
    if name.startswith("json:") or _has_protocol(name):
        return None, _immovable(f"{_what(link)} has the backing file {name}, not a plain file.")
    name = name.removeprefix("file:")
    if header.backing_format is None:
        return None, Obstacle(
            Reason.DISK_FORMAT_FORBIDDEN,
            f"{_what(link)} does not say the format of its backing file {name};"
            f" set it with `qemu-img rebase -u -b {name} -F FORMAT`.",
        )
    if not name.startswith("/") and link.path.parent != Path(os.path.realpath(link.path)).parent:
        return None, _immovable(
            f"{_what(link)} is reached through a symbolic link and has the relative backing"
            f" file {name}, which would be looked for in another directory after a move."
        )
    return (link.path.parent / name, header.backing_format), None


def _header_problem(link: ChainLink, header: Qcow2Header) -> Obstacle | None:
    if header.corrupt:
        return Obstacle(Reason.DISK_CORRUPT, f"{_what(link)} is marked as corrupt.")
    if header.data_file:
        return _immovable(f"{_what(link)} keeps its data in another file.")
    if header.unknown_incompatible_bits:
        bits = f"{header.unknown_incompatible_bits:#x}"
        return _immovable(f"{_what(link)} uses qcow2 features that are unknown here ({bits}).")
    return None


def _has_protocol(name: str) -> bool:
    scheme, colon, _ = name.partition(":")
    return bool(colon) and "/" not in scheme and scheme != "file"


def _format_problem(link: ChainLink) -> Obstacle:
    if not link.format:
        message = f"The format of {_what(link, capital=False)} is not given."
    else:
        message = f"{_what(link)} has the format {link.format}, which this host does not allow."
    return Obstacle(Reason.DISK_FORMAT_FORBIDDEN, message)


def _immovable(message: str) -> Obstacle:
    return Obstacle(Reason.INSTANCE_IMMOVABLE, message)


def _what(link: ChainLink, *, capital: bool = True) -> str:
    return f"{'Disk' if capital else 'disk'} {link.volume_id} ({link.path})"
