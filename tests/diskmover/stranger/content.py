"""What a volume consists of: chunks of blocks, pieces, and the hashes over them."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from blake3 import blake3

CHUNK = 1 << 20
PIECE = 64 << 10
BLOCK = 4096
SEGMENT = 64  # chunks
ZERO = bytes(32)


def cut(content: bytes | bytearray, step: int) -> list[bytes]:
    """Content in parts of this many bytes; the last may be shorter."""
    return [bytes(content[at : at + step]) for at in range(0, len(content), step)]


def is_zero(content: bytes) -> bool:
    """Whether all bytes are zero."""
    return content == bytes(len(content))


def split(chunk: bytes) -> tuple[bytes, bytes]:
    """Bitmap of the blocks that are not all zero, and those blocks."""
    bitmap = bytearray(32)
    kept = []
    for number, block in enumerate(cut(chunk, BLOCK)):
        if not is_zero(block):
            bitmap[number // 8] |= 1 << number % 8
            kept.append(block)
    return bytes(bitmap), b"".join(kept)


def marked(bitmap: bytes, length: int) -> list[range]:
    """Where in a chunk of this length the blocks lie that a bitmap marks."""
    blocks = (range(at, min(at + BLOCK, length)) for at in range(0, length, BLOCK))
    return [block for number, block in enumerate(blocks) if bitmap[number // 8] >> number % 8 & 1]


def chunk_hash(chunk: bytes) -> bytes:
    """H: zeros for a zero chunk."""
    return ZERO if is_zero(chunk) else blake3(b"".join(split(chunk))).digest()


def piece_hash(piece: bytes) -> bytes:
    """P: zeros for a zero piece."""
    return ZERO if is_zero(piece) else blake3(piece).digest()


def segment_hash(chunk_hashes: list[bytes]) -> bytes:
    """S: zeros when its chunks are all zero."""
    joined = b"".join(chunk_hashes)
    return ZERO if is_zero(joined) else blake3(joined).digest()


def root_of_segments(segment_hashes: Iterable[bytes], size: int) -> bytes:
    """Root digest of a volume from S of its segments, in order."""
    root = blake3(b"diskmover root 1\n" + struct.pack("<QI", size, CHUNK))
    for digest in segment_hashes:
        root.update(digest)
    return root.digest()


def root_digest(chunks: Iterable[bytes], size: int) -> bytes:
    """Root digest of a volume from its chunks, in order."""
    hashes = [chunk_hash(chunk) for chunk in chunks]
    segments = (hashes[first : first + SEGMENT] for first in range(0, len(hashes), SEGMENT))
    return root_of_segments(map(segment_hash, segments), size)


def chunks_of(path: Path) -> Iterator[bytes]:
    """The chunks of a file."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def digest_of(path: Path) -> str:
    """Root digest of a file, as receipts give it."""
    return root_digest(chunks_of(path), path.stat().st_size).hex()


def data_bytes_of(path: Path) -> int:
    """Bytes in blocks that are not all zero."""
    return sum(len(split(chunk)[1]) for chunk in chunks_of(path))
