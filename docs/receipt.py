#!/usr/bin/env python3
"""Recompute a receipt of diskmover, from a file or from what was sent of it.

    receipt.py FILE                      the receipt that a copy of FILE gets
    receipt.py --stream CAPTURE ...      the same from the frames of a sender
                  [--write FILE]         and the volume that they make up
                  [--key HEX]            session key; without one, that of `serve`

It shares nothing with diskmover: it was written from wire-protocol.md alone and
needs the packages `blake3` and `zstandard`. A capture holds what one connection of
the sender carried inside TLS; give all of them, in any order.
"""

from __future__ import annotations

import argparse
import io
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard
from blake3 import blake3

CHUNK, BLOCK, SEGMENT = 1 << 20, 4096, 64
ZERO = bytes(32)
HEADER = struct.Struct("<2sBBHHIQQ32sI")
HELLO, OPEN, DATA, ZEROS, FINISH, PING = 1, 2, 3, 4, 5, 31
ZSTD = 1


def split(chunk: bytes) -> tuple[bytes, bytes]:
    """The bitmap of blocks that are not all zero, and these blocks."""
    bitmap, kept = bytearray(32), []
    for number in range(-(-len(chunk) // BLOCK)):
        block = chunk[number * BLOCK : (number + 1) * BLOCK]
        if any(block):
            bitmap[number // 8] |= 1 << number % 8
            kept.append(block)
    return bytes(bitmap), b"".join(kept)


def chunk_hash(bitmap: bytes, data: bytes) -> bytes:
    """H of a chunk."""
    return blake3(bitmap + data).digest() if data else ZERO


def receipt(volume: BinaryIO) -> dict[str, int | str]:
    """What a receipt says of this content; the same wherever its holes are."""
    size = data_bytes = 0
    hashes: list[bytes] = []
    while chunk := volume.read(CHUNK):
        bitmap, data = split(chunk)
        size, data_bytes = size + len(chunk), data_bytes + len(data)
        hashes.append(chunk_hash(bitmap, data))
    root = blake3(b"diskmover root 1\n" + struct.pack("<QI", size, CHUNK))
    for first in range(0, len(hashes), SEGMENT):
        segment = b"".join(hashes[first : first + SEGMENT])
        root.update(blake3(segment).digest() if any(segment) else ZERO)
    return {
        "chunk_size_bytes": CHUNK,
        "data_bytes": data_bytes,
        "digest": root.hexdigest(),
        "size_bytes": size,
        "zero_bytes": size - data_bytes,
    }


def crc32c(data: bytes) -> int:
    """CRC-32C, bit by bit."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


class Decoder:
    """Puts a volume together from the frames of its sender, checking each.

    Args:
        session_key: 32 bytes; zeros for a receiver without sessions.
    """

    def __init__(self, session_key: bytes = ZERO) -> None:
        self._frame_key = blake3(session_key, derive_key_context="diskmover 1 frame key").digest()
        self._chunks: dict[int, bytes] = {}
        self._size = 0
        self._root = b""

    def feed(self, stream: BinaryIO) -> None:
        """Take in what one connection carried."""
        for head, payload in frames(stream):
            _, kind, codec, _, _, _, offset, length, auth, _ = HEADER.unpack(head)
            content = ZERO
            if kind == OPEN:
                self._size = int.from_bytes(payload[:8], "little")
            elif kind == ZEROS:
                self._chunks[offset] = bytes(length)
            elif kind == DATA:
                bitmap, body = payload[:32], payload[32:]
                data = unpack(body, data_len(bitmap, length)) if codec == ZSTD else body
                self._chunks[offset] = spread(bitmap, data, length)
                content = chunk_hash(bitmap, data)
            elif kind == FINISH:
                self._root = content = payload[:32]
            else:
                require(kind in (HELLO, PING), "it builds on what the receiver had already")
            if kind in (ZEROS, DATA, FINISH):
                expected = blake3(head[:28] + content, key=self._frame_key).digest()
                require(auth == expected, "a frame does not match its authenticator")

    def volume(self) -> bytes:
        """The volume, once all was fed."""
        content = bytearray()
        for offset in sorted(self._chunks):
            require(offset == len(content), f"what belongs at byte {len(content)} was not sent")
            content += self._chunks[offset]
        require(len(content) == self._size, f"what belongs at byte {len(content)} was not sent")
        return bytes(content)

    def receipt(self) -> dict[str, int | str]:
        """Its receipt."""
        made = receipt(io.BytesIO(self.volume()))
        require(made["digest"] == self._root.hex(), "the sender's root digest is another one")
        return made


def frames(stream: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Header and payload of each frame."""
    while head := stream.read(HEADER.size):
        require(len(head) == HEADER.size and head[:2] == b"DM", "it is no stream of frames")
        require(crc32c(head[:60]) == int.from_bytes(head[60:], "little"), "a header is damaged")
        size = int.from_bytes(head[8:12], "little")
        payload = stream.read(size)
        require(len(payload) == size, "it ends within a frame")
        yield head, payload


def data_len(bitmap: bytes, length: int) -> int:
    """Bytes of the blocks that are marked in a chunk of this length."""
    return sum(min(BLOCK, length - at) for at in marked(bitmap, length))


def marked(bitmap: bytes, length: int) -> list[int]:
    """Where the blocks that are marked begin."""
    numbers = range(-(-length // BLOCK))
    return [number * BLOCK for number in numbers if bitmap[number // 8] >> number % 8 & 1]


def unpack(body: bytes, length: int) -> bytes:
    """One zstd frame of exactly this content size."""
    require(zstandard.frame_content_size(body) == length, "a frame unpacks to another length")
    return zstandard.ZstdDecompressor().decompress(body, max_output_size=length)


def spread(bitmap: bytes, data: bytes, length: int) -> bytes:
    """A chunk from its marked blocks."""
    require(
        len(data) == data_len(bitmap, length), "a frame has another length than its bitmap says"
    )
    chunk, taken = bytearray(length), 0
    for at in marked(bitmap, length):
        end = min(at + BLOCK, length)
        chunk[at:end] = data[taken : taken + end - at]
        taken += end - at
    return bytes(chunk)


def require(holds: bool, otherwise: str) -> None:
    """Give up on a stream that is not what it should be."""
    if not holds:
        raise SystemExit(f"receipt.py: {otherwise}")


def main() -> None:
    """Print the receipt in its canonical form: JSON with sorted keys, no blanks."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--write")
    parser.add_argument("--key", type=bytes.fromhex, default=ZERO)
    chosen = parser.parse_args()
    if chosen.stream:
        decoder = Decoder(chosen.key)
        for path in chosen.paths:
            with Path(path).open("rb") as stream:
                decoder.feed(stream)
        made = decoder.receipt()
        if chosen.write:
            Path(chosen.write).write_bytes(decoder.volume())
    else:
        with Path(chosen.paths[0]).open("rb") as volume:
            made = receipt(volume)
    sys.stdout.write(json.dumps(made, sort_keys=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
