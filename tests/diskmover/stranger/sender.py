"""A peer that sends a file to a receiver without sessions."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from blake3 import blake3

from tests.diskmover.stranger.content import (
    CHUNK,
    PIECE,
    SEGMENT,
    ZERO,
    chunk_hash,
    cut,
    is_zero,
    piece_hash,
    root_of_segments,
    segment_hash,
    split,
)
from tests.diskmover.stranger.frames import (
    ACK,
    CONTENT,
    DATA,
    DIRTY,
    FINISH,
    HASHES,
    HELLO,
    OPEN,
    OPENED,
    PATCH,
    RECEIPT,
    STATE,
    WANT,
    WELCOME,
    ZEROS,
    Frame,
    Wire,
    content_bytes,
    pack,
    take_text,
    text,
)
from tests.diskmover.stranger.state import Known, bits, dirty

VERBATIM = bytes([0])
SENDS_AGAIN = 1


class Sender:
    """One attempt over one connection, with one frame under way at a time.

    Attributes:
        wire: The connection.
        known: What the receiver has said that it has.
        older_bytes: For how much of the volume it may have older content.
        published: The receipt, when it has all of it under its name already.
        spoil: How often the content of a chunk still goes out with a flipped bit.
    """

    def __init__(self, wire: Wire, path: Path, name: str, *, compress: bool = False) -> None:
        self.wire = wire
        self.known = Known()
        self.older_bytes = 0
        self.published: dict[str, object] | None = None
        self.spoil: dict[int, int] = {}
        self._path = path
        self._name = name
        self._compress = compress
        self._size = path.stat().st_size
        self._hashes: dict[int, bytes] = {}

    def open(self, *, changed: int = 1, since: tuple[str, Iterable[int]] | None = None) -> None:
        """Say who it is, and hear what the receiver has.

        Args:
            changed: When the source changed last, as its identity has it.
            since: Digest of an earlier copy, and the chunks that may differ from it.
        """
        hello = struct.pack("<HI16s32s", 1, CHUNK, os.urandom(16), ZERO)
        hello += text(f"open/{self._name}") + text("any")
        self.wire.send(Frame(HELLO, length=SENDS_AGAIN, payload=hello))
        welcome = self.wire.expect(WELCOME)
        assert (welcome.volume, welcome.payload) == (1, struct.pack("<H", 1))
        inode = 3
        if since is not None:
            told = dirty(bytes.fromhex(since[0]), since[1])
            inode = int.from_bytes(blake3(b"".join(told)).digest()[:8], "little")
            for payload in told:
                self.wire.send(Frame(DIRTY, payload=payload))
        identity = struct.pack("<QqqQ", self._size, changed, changed, inode)
        self.wire.send(Frame(OPEN, payload=identity + VERBATIM + text(self._name)))
        while (told_of := self.wire.expect(STATE, OPENED)).kind == STATE:
            self.known.learn(told_of.payload)
        if told_of.payload:
            self.published = read_receipt(told_of)
            return
        assert told_of.offset == self.known.data_bytes
        self.older_bytes = told_of.length

    def bring(self, chunks: Iterable[int] | None = None) -> None:
        """Send these chunks, or all, as far as the receiver does not have them."""
        with self._path.open("rb") as file:
            for number in range(-(-self._size // CHUNK)) if chunks is None else chunks:
                if not self.known.has(number):
                    file.seek(number * CHUNK)
                    self._bring(number, file.read(CHUNK))

    def finish(self) -> dict[str, object]:
        """The receipt."""
        root = self._root()
        payload = root + struct.pack("<Q", content_bytes(self.wire.sent))
        told = self._exchange(Frame(FINISH, length=self._size, payload=payload), root, RECEIPT)
        return read_receipt(told)

    def _bring(self, number: int, chunk: bytes) -> None:
        """Until the receiver is content: by hashes first where it may have older content."""
        self._hashes[number] = digest = chunk_hash(chunk)
        frame = self._first(number * CHUNK, chunk)
        while (answer := self._exchange(frame, digest, ACK, WANT)).kind == WANT:
            (mask,) = struct.unpack("<H", answer.payload)
            if frame.kind == HASHES:
                frame = self._patch(frame.offset, chunk, mask)
            elif frame.kind == PATCH:
                frame = self._data(frame.offset, chunk)

    def _first(self, offset: int, chunk: bytes) -> Frame:
        if is_zero(chunk):
            return Frame(ZEROS, offset=offset, length=len(chunk))
        if offset < self.older_bytes:
            hashes = chunk_hash(chunk) + b"".join(map(piece_hash, cut(chunk, PIECE)))
            return Frame(HASHES, offset=offset, length=len(chunk), payload=hashes)
        return self._data(offset, chunk)

    def _data(self, offset: int, chunk: bytes) -> Frame:
        bitmap, blocks = split(chunk)
        codec, body = pack(blocks, compress=self._compress)
        return Frame(DATA, codec, 0, offset, len(chunk), bitmap + body)

    def _patch(self, offset: int, chunk: bytes, mask: int) -> Frame:
        pieces = cut(chunk, PIECE)
        wanted = [number for number in bits(mask) if number < len(pieces)]
        blocks = b"".join(split(pieces[number])[1] for number in wanted)
        codec, body = pack(blocks, compress=self._compress)
        payload = struct.pack("<H", mask) + split(chunk)[0] + body
        return Frame(PATCH, codec, 0, offset, len(chunk), payload)

    def _exchange(self, frame: Frame, content: bytes, *answers: int) -> Frame:
        frame.auth = frame.authenticator(content)
        self.wire.send(self._spoilt(frame))
        answer = self.wire.expect(*answers)
        if answer.kind != RECEIPT:
            assert (answer.offset, answer.length) == (frame.offset, frame.length)
        return answer

    def _spoilt(self, frame: Frame) -> Frame:
        number = frame.offset // CHUNK
        if frame.kind not in CONTENT or not self.spoil.get(number):
            return frame
        self.spoil[number] -= 1
        if frame.kind == ZEROS:
            return replace(frame, auth=_flipped(frame.auth, 0))
        # Of HASHES only H is authentic.
        return replace(frame, payload=_flipped(frame.payload, 0 if frame.kind == HASHES else -1))

    def _root(self) -> bytes:
        hashes = self.known.chunks | self._hashes
        chunks = -(-self._size // CHUNK)
        segments = (
            self.known.segments.get(first // SEGMENT)
            or segment_hash([hashes[n] for n in range(first, min(first + SEGMENT, chunks))])
            for first in range(0, chunks, SEGMENT)
        )
        return root_of_segments(segments, self._size)


def _flipped(content: bytes, at: int) -> bytes:
    spoilt = bytearray(content)
    spoilt[at] ^= 1
    return bytes(spoilt)


def push(wire: Wire, path: Path, name: str, *, compress: bool) -> dict[str, object]:
    """Send a file as a whole; returns its receipt."""
    sender = Sender(wire, path, name, compress=compress)
    sender.open()
    sender.bring()
    return sender.finish()


def read_receipt(told: Frame) -> dict[str, object]:
    """The fields of a receipt, as RECEIPT or OPENED brings it."""
    payload = told.payload
    size, data, wire_bytes = struct.unpack("<QQQ", payload[:24])
    volume, rest = take_text(payload[57:])
    assert rest == b""
    return {
        "volume_id": volume,
        "size_bytes": size,
        "data_bytes": data,
        "wire_bytes": wire_bytes,
        "digest": payload[24:56].hex(),
        "mode": ["verbatim", "guest-visible"][payload[56]],
        "allocated_bytes": told.length,
    }
