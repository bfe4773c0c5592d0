"""What a receiver has already, as STATE tells it, and what DIRTY says has changed."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tests.diskmover.stranger.content import (
    CHUNK,
    SEGMENT,
    ZERO,
    chunk_hash,
    cut,
    is_zero,
    segment_hash,
    split,
)

CLOSED, PARTIAL, ZERO_RUN = 0, 1, 2


@dataclass
class Known:
    """What a sender was told.

    Attributes:
        segments: Hash of each segment that is there as a whole.
        chunks: Hash of each other chunk that is there.
        data_bytes: Of all of them.
        kinds: Entries by which it was told.
    """

    segments: dict[int, bytes] = field(default_factory=dict)
    chunks: dict[int, bytes] = field(default_factory=dict)
    data_bytes: int = 0
    kinds: list[int] = field(default_factory=list)

    def has(self, chunk: int) -> bool:
        """Whether a chunk need not be sent."""
        return chunk // SEGMENT in self.segments or chunk in self.chunks

    def learn(self, payload: bytes) -> None:
        """Take in the entries of a STATE."""
        while payload:
            kind, segment = struct.unpack_from("<BI", payload)
            payload = payload[5:]
            self.kinds.append(kind)
            if kind == CLOSED:
                data, digest = struct.unpack_from("<I32s", payload)
                payload = payload[36:]
                self.segments[segment] = digest
                self.data_bytes += data
            elif kind == PARTIAL:
                (mask,) = struct.unpack_from("<Q", payload)
                payload = payload[8:]
                for number in bits(mask):
                    data, digest = struct.unpack_from("<I32s", payload)
                    payload = payload[36:]
                    self.chunks[segment * SEGMENT + number] = digest
                    self.data_bytes += data
            else:
                assert kind == ZERO_RUN
                (count,) = struct.unpack_from("<I", payload)
                payload = payload[4:]
                self.segments |= dict.fromkeys(range(segment, segment + count), ZERO)


def entries(content: bytes | bytearray, done: set[int]) -> bytes:
    """STATE for the chunks of a volume that are there."""
    told = b""
    for segment, part in enumerate(cut(content, SEGMENT * CHUNK)):
        chunks = {
            number: chunk
            for number, chunk in enumerate(cut(part, CHUNK))
            if segment * SEGMENT + number in done
        }
        if not chunks:
            continue
        hashes = {number: chunk_hash(chunk) for number, chunk in chunks.items()}
        data = {number: len(split(chunk)[1]) for number, chunk in chunks.items()}
        if len(chunks) < len(cut(part, CHUNK)):
            told += struct.pack("<BIQ", PARTIAL, segment, mask_of(chunks))
            told += b"".join(struct.pack("<I32s", data[n], hashes[n]) for n in chunks)
        elif not is_zero(part):
            digest = segment_hash(list(hashes.values()))
            told += struct.pack("<BII32s", CLOSED, segment, sum(data.values()), digest)
        else:
            told += struct.pack("<BII", ZERO_RUN, segment, 1)
    return told


def dirty(base: bytes, chunks: Iterable[int]) -> list[bytes]:
    """DIRTY, a frame a segment: these chunks may differ from the copy with this digest."""
    masks: dict[int, int] = {}
    for chunk in chunks:
        masks[chunk // SEGMENT] = masks.get(chunk // SEGMENT, 0) | 1 << chunk % SEGMENT
    return [base + struct.pack("<IQ", *segment) for segment in masks.items()] or [base]


def read_dirty(payload: bytes) -> tuple[bytes, set[int]]:
    """The digest and the chunks of a DIRTY."""
    segments = struct.iter_unpack("<IQ", payload[32:])
    changed = {segment * SEGMENT + number for segment, mask in segments for number in bits(mask)}
    return payload[:32], changed


def bits(mask: int) -> Iterator[int]:
    """The numbers of the bits that are set."""
    return (number for number in range(64) if mask >> number & 1)


def mask_of(numbers: Iterable[int]) -> int:
    """A mask with these bits."""
    return sum(1 << number for number in numbers)
