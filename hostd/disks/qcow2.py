"""The header of a qcow2 file, read without trusting it.

Only what Drover decides by is read: size, backing file, and the features that
make a verbatim copy unsafe. Nobody opens a disk by what is found here; formats
come from the domain's definition (invariant I8).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from enum import StrEnum

MAGIC = b"QFI\xfb"
_V2_LENGTH = 72
_V3_LENGTH = 104
_MIN_CLUSTER_BITS, _MAX_CLUSTER_BITS = 9, 21
LONGEST_HEADER_BYTES = 1 << _MAX_CLUSTER_BITS
_LONGEST_BACKING_NAME = 1023
_EXTENSION_END = 0
_EXTENSION_BACKING_FORMAT = 0xE2792ACA
_EXTENSION_DATA_FILE = 0x44415441
_DIRTY, _CORRUPT, _DATA_FILE = 1 << 0, 1 << 1, 1 << 2
# dirty, corrupt, external data file, compression type, extended L2 entries
_KNOWN_INCOMPATIBLE = 0b11111


class Qcow2Error(ValueError):
    """The bytes are not a qcow2 header that Drover understands."""


class Encryption(StrEnum):
    """How a qcow2 file is encrypted."""

    NONE = "none"
    AES = "aes"
    LUKS = "luks"


@dataclass(frozen=True)
class Qcow2Header:
    """What a header says.

    Attributes:
        version: 2 or 3.
        cluster_bits: Cluster size is 2 to this power.
        virtual_size_bytes: Size of the disk that the guest sees.
        backing_file: Backing file name as written, or None.
        backing_format: Its format from the header extension, or None.
        dirty: Not closed cleanly; its reference counts need a repair.
        corrupt: QEMU found it corrupt.
        data_file: Its data lies in another file.
        unknown_incompatible_bits: Feature bits that this code does not know.
        snapshot_count: Number of internal snapshots.
        encryption: How it is encrypted.
    """

    version: int
    cluster_bits: int
    virtual_size_bytes: int
    backing_file: str | None
    backing_format: str | None
    dirty: bool
    corrupt: bool
    data_file: bool
    unknown_incompatible_bits: int
    snapshot_count: int
    encryption: Encryption


def read_header(fd: int) -> Qcow2Header:
    """Read and parse the header of an open file.

    Args:
        fd: Open for reading; its position does not matter and is kept.

    Raises:
        Qcow2Error: It is not a qcow2 file that Drover understands.
        OSError: It cannot be read.
    """
    start = os.pread(fd, _V3_LENGTH, 0)
    cluster_bits = struct.unpack_from(">I", start, 20)[0] if len(start) >= _V2_LENGTH else 0
    if _MIN_CLUSTER_BITS <= cluster_bits <= _MAX_CLUSTER_BITS:
        start = os.pread(fd, 1 << cluster_bits, 0)
    return parse_header(start)


def parse_header(data: bytes) -> Qcow2Header:
    """Parse a header. Pure; never raises anything but Qcow2Error.

    Args:
        data: The file's first cluster, or as much of it as there is.

    Raises:
        Qcow2Error: It is not a qcow2 header that Drover understands.
    """
    if len(data) < _V2_LENGTH or data[:4] != MAGIC:
        raise Qcow2Error("it does not begin with a qcow2 header")
    (version, backing_offset, backing_length, cluster_bits, virtual_size, crypt) = (
        struct.unpack_from(">IQIIQI", data, 4)
    )
    (snapshot_count,) = struct.unpack_from(">I", data, 60)
    if version not in (2, 3):
        raise Qcow2Error(f"its version is {version}, not 2 or 3")
    if not _MIN_CLUSTER_BITS <= cluster_bits <= _MAX_CLUSTER_BITS:
        raise Qcow2Error(f"its cluster size is 2^{cluster_bits}")
    if virtual_size > (1 << 63) - 1:
        raise Qcow2Error("its virtual size is beyond what files can hold")
    if crypt > 2:
        raise Qcow2Error(f"its encryption method {crypt} is unknown")
    incompatible, header_length = _version_3_fields(data) if version == 3 else (0, _V2_LENGTH)
    extensions_end = backing_offset if backing_offset else 1 << cluster_bits
    extensions = _extensions(data, header_length, min(extensions_end, len(data)))
    return Qcow2Header(
        version=version,
        cluster_bits=cluster_bits,
        virtual_size_bytes=virtual_size,
        backing_file=_backing_file(data, backing_offset, backing_length, cluster_bits),
        backing_format=_text(extensions.get(_EXTENSION_BACKING_FORMAT), "backing format"),
        dirty=bool(incompatible & _DIRTY),
        corrupt=bool(incompatible & _CORRUPT),
        data_file=bool(incompatible & _DATA_FILE) or _EXTENSION_DATA_FILE in extensions,
        unknown_incompatible_bits=incompatible & ~_KNOWN_INCOMPATIBLE,
        snapshot_count=snapshot_count,
        encryption=(Encryption.NONE, Encryption.AES, Encryption.LUKS)[crypt],
    )


def _version_3_fields(data: bytes) -> tuple[int, int]:
    if len(data) < _V3_LENGTH:
        raise Qcow2Error("its header is cut short")
    (incompatible,) = struct.unpack_from(">Q", data, 72)
    (header_length,) = struct.unpack_from(">I", data, 100)
    if header_length < _V3_LENGTH or header_length % 8 or header_length > len(data):
        raise Qcow2Error(f"its header length is {header_length}")
    return incompatible, header_length


def _extensions(data: bytes, start: int, end: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = start
    while at + 8 <= end:
        kind, length = struct.unpack_from(">II", data, at)
        if kind == _EXTENSION_END:
            break
        at += 8
        if length > end - at:
            raise Qcow2Error("a header extension is longer than the header")
        if kind in found:
            raise Qcow2Error(f"header extension {kind:#x} is there twice")
        found[kind] = data[at : at + length]
        at += (length + 7) & ~7
    return found


def _backing_file(data: bytes, offset: int, length: int, cluster_bits: int) -> str | None:
    if offset == 0:
        return None
    if not 0 < length <= _LONGEST_BACKING_NAME:
        raise Qcow2Error(f"its backing file name has {length} bytes")
    if offset + length > min(1 << cluster_bits, len(data)):
        raise Qcow2Error("its backing file name lies outside the header")
    return _text(data[offset : offset + length], "backing file name")


def _text(raw: bytes | None, what: str) -> str | None:
    if raw is None:
        return None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Qcow2Error(f"its {what} is not UTF-8") from error
    if not text or not text.isprintable():
        raise Qcow2Error(f"its {what} is empty or has unprintable characters")
    return text
