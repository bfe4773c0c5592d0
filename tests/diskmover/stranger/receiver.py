"""A peer that receives one volume over one connection, checking every frame."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from tests.diskmover.stranger.content import (
    CHUNK,
    PIECE,
    ZERO,
    chunk_hash,
    cut,
    marked,
    piece_hash,
    root_digest,
    split,
)
from tests.diskmover.stranger.frames import (
    ACK,
    CANCELLED,
    DATA,
    DIRTY,
    ERROR,
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
    take_text,
    text,
    unpack,
)
from tests.diskmover.stranger.state import entries, mask_of, read_dirty

# What its file system has allocated, if anybody asks the stranger.
ALLOCATED = 12345
ALL = 0xFFFF  # pieces


@dataclass
class Volume:
    """What there is of a volume.

    Attributes:
        name: Its id.
        content: Its bytes; beside chunks that are done, older ones.
        done: Chunks that were placed, and need not be sent again.
        older: Whether `content` may be what the sender has at other places.
        receipt: Its receipt, once all of it was there.
    """

    name: str = ""
    content: bytearray = field(default_factory=bytearray)
    done: set[int] = field(default_factory=set)
    older: bool = False
    receipt: bytes = b""


def serve_one(wire: Wire, volume: Volume, *, at_most: int | None = None, corrupt: int = 0) -> None:
    """Receive a volume, from what there is of it.

    Args:
        wire: The connection.
        volume: What there is, and what is there in the end.
        at_most: Ends the session with CANCELLED after so many frames of content.
        corrupt: So many frames of content are taken for corrupt at first.
    """
    _welcome(wire, volume)
    mode = _open(wire, volume)
    if volume.receipt:
        return
    held = {piece_hash(piece): piece for piece in cut(volume.content, PIECE) if volume.older}
    placing = _Placing(volume, held)
    placed = 0
    while (frame := wire.expect(DATA, ZEROS, HASHES, PATCH, FINISH)).kind != FINISH:
        if placed == at_most:
            wire.send(
                Frame(ERROR, payload=struct.pack("<HBBQ", CANCELLED, 1, 1, 2**64 - 1) + b"\0")
            )
            return
        mask = ALL if placed < corrupt else placing.place(frame)
        wanted = b"" if mask is None else struct.pack("<H", mask)
        kind = ACK if mask is None else WANT
        wire.send(Frame(kind, 0, frame.volume, frame.offset, frame.length, wanted))
        placed += 1
    chunks = cut(volume.content, CHUNK)
    root = root_digest(chunks, len(volume.content))
    assert (frame.payload[:32], frame.length) == (root, len(volume.content))
    assert frame.auth == frame.authenticator(root)
    data = sum(len(split(chunk)[1]) for chunk in chunks)
    proof = struct.pack("<QQ", len(volume.content), data) + frame.payload[32:40] + root
    volume.receipt = proof + mode + text(volume.name)
    wire.send(Frame(RECEIPT, length=ALLOCATED, payload=volume.receipt))


def _welcome(wire: Wire, volume: Volume) -> None:
    hello = wire.expect(HELLO).payload
    version, chunk, _nonce, _proof = struct.unpack("<HI16s32s", hello[:54])
    assert (version, chunk) == (1, CHUNK)
    session, rest = take_text(hello[54:])
    _tag, rest = take_text(rest)
    assert session.startswith("open/")
    assert rest == b""
    volume.name = session.removeprefix("open/")
    wire.send(Frame(WELCOME, volume=1, payload=struct.pack("<H", 1)))


def _open(wire: Wire, volume: Volume) -> bytes:
    """Tell what there is of the volume; returns its mode."""
    base, changed = b"", set[int]()
    while (frame := wire.expect(DIRTY, OPEN)).kind == DIRTY:
        told, more = read_dirty(frame.payload)
        base, changed = told, changed | more if told == base else more
    size = int.from_bytes(frame.payload[:8], "little")
    assert take_text(frame.payload[33:]) == (volume.name, b"")
    if volume.receipt:
        wire.send(Frame(OPENED, length=ALLOCATED, payload=volume.receipt))
        return frame.payload[32:33]
    if base and root_digest(cut(volume.content, CHUNK), len(volume.content)) == base:
        volume.done = set(range(-(-size // CHUNK))) - changed
    volume.content += bytes(max(size - len(volume.content), 0))
    del volume.content[size:]
    if volume.done:
        wire.send(Frame(STATE, payload=entries(volume.content, volume.done)))
    chunks = cut(volume.content, CHUNK)
    data = sum(len(split(chunks[number])[1]) for number in volume.done)
    wire.send(Frame(OPENED, offset=data, length=size if volume.older else 0))
    return frame.payload[32:33]


class _Placing:
    """Puts frames in their place."""

    def __init__(self, volume: Volume, held: dict[bytes, bytes]) -> None:
        self._volume = volume
        self._held = held
        self._asked: dict[int, list[bytes | None]] = {}

    def place(self, frame: Frame) -> int | None:
        """Place what a frame is about; else the mask of the pieces that are missing."""
        end = frame.offset + frame.length
        assert frame.offset % CHUNK == 0
        assert end <= len(self._volume.content)
        assert end % CHUNK == 0 or end == len(self._volume.content)
        if frame.kind == HASHES:
            return self._find(frame)
        if frame.kind == ZEROS:
            content, digest = bytes(frame.length), ZERO
        else:
            content = self._data(frame) if frame.kind == DATA else self._patched(frame)
            digest = chunk_hash(content)
        self._write(frame, content, digest)
        return None

    def _find(self, frame: Frame) -> int | None:
        """Look up the pieces that HASHES names."""
        digest, *wanted = cut(frame.payload, 32)
        assert len(wanted) == -(-frame.length // PIECE)
        assert frame.auth == frame.authenticator(digest)
        found = [bytes(PIECE) if name == ZERO else self._held.get(name) for name in wanted]
        missing = mask_of(number for number, piece in enumerate(found) if piece is None)
        if missing:
            self._asked[frame.offset] = found
            return missing
        content = b"".join(piece for piece in found if piece)[: frame.length]
        self._write(frame, content, digest)
        return None

    def _data(self, frame: Frame) -> bytes:
        return spread(frame, frame.payload[:32], frame.payload[32:], range(16))

    def _patched(self, frame: Frame) -> bytes:
        """What was found, and what PATCH brings."""
        (mask,) = struct.unpack_from("<H", frame.payload)
        bitmap, body = frame.payload[2:34], frame.payload[34:]
        brought = [number for number in range(16) if mask >> number & 1]
        pieces = cut(spread(frame, bitmap, body, brought), PIECE)
        for number, piece in enumerate(self._asked.pop(frame.offset)):
            if number not in brought:
                assert piece is not None, "it was wanted and not brought"
                pieces[number] = piece
        content = b"".join(pieces)[: frame.length]
        assert split(content)[0] == bitmap
        return content

    def _write(self, frame: Frame, content: bytes, digest: bytes) -> None:
        assert len(content) == frame.length
        assert chunk_hash(content) == digest or frame.kind == ZEROS
        assert frame.auth == frame.authenticator(digest)
        self._volume.content[frame.offset : frame.offset + frame.length] = content
        first = frame.offset // CHUNK
        self._volume.done |= set(range(first, first + -(-frame.length // CHUNK)))


def spread(frame: Frame, bitmap: bytes, body: bytes, pieces: range | list[int]) -> bytes:
    """A chunk with the blocks of these pieces at their places, else zeros."""
    blocks = [block for block in marked(bitmap, frame.length) if block.start // PIECE in pieces]
    data = unpack(frame.codec, body, sum(map(len, blocks)))
    chunk, taken = bytearray(frame.length), 0
    for block in blocks:
        chunk[block.start : block.stop] = data[taken : taken + len(block)]
        taken += len(block)
    return bytes(chunk)
