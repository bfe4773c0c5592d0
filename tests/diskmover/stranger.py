"""A peer written from docs/wire-protocol.md alone, with nobody else's code.

It shares nothing with diskmover: Python's ssl, `blake3`, `zstandard` and a
CRC-32C of its own. What it understands, a stranger's peer can understand.
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import zstandard
from blake3 import blake3

CHUNK = 1 << 20
BLOCK = 4096
SEGMENT = 64
HEADER = struct.Struct("<2sBBHHIQQ32s")
ZERO = bytes(32)

VERBATIM = bytes([0])
HELLO, OPEN, DATA, ZEROS, FINISH = 1, 2, 3, 4, 5
WELCOME, STATE, OPENED, ACK, RECEIPT = 16, 17, 18, 19, 20
ERROR, PING = 30, 31
RAW, ZSTD = 0, 1
# What its file system has allocated, if anybody asks the stranger.
ALLOCATED = 12345

# Without sessions the key is 32 zero bytes.
FRAME_KEY = blake3(ZERO, derive_key_context="diskmover 1 frame key").digest()


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli)."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


# --- the digest ---------------------------------------------------------------


def split(chunk: bytes) -> tuple[bytes, bytes]:
    """Bitmap of the blocks that are not all zero, and those blocks."""
    bitmap = bytearray(32)
    kept = []
    for index in range(0, len(chunk), BLOCK):
        block = chunk[index : index + BLOCK]
        if any(block):
            number = index // BLOCK
            bitmap[number // 8] |= 1 << number % 8
            kept.append(block)
    return bytes(bitmap), b"".join(kept)


def chunk_hash(bitmap: bytes, data: bytes) -> bytes:
    """Hash of a chunk; zeros for a zero chunk."""
    return blake3(bitmap + data).digest() if data else ZERO


def root_digest(chunks: Iterator[bytes], size: int) -> bytes:
    """Root digest of a volume from its chunks in order."""
    hashes = [chunk_hash(*split(chunk)) for chunk in chunks]
    root = blake3(b"diskmover root 1\n" + struct.pack("<QI", size, CHUNK))
    for first in range(0, len(hashes), SEGMENT):
        segment = b"".join(hashes[first : first + SEGMENT])
        root.update(blake3(segment).digest() if any(segment) else ZERO)
    return root.digest()


def digest_of(path: Path) -> str:
    """Root digest of a file, as receipts give it."""
    with path.open("rb") as file:
        return root_digest(iter(lambda: file.read(CHUNK), b""), path.stat().st_size).hex()


def data_bytes_of(path: Path) -> int:
    """Bytes in blocks that are not all zero."""
    with path.open("rb") as file:
        return sum(len(split(chunk)[1]) for chunk in iter(lambda: file.read(CHUNK), b""))


# --- frames -------------------------------------------------------------------


@dataclass
class Frame:
    """One frame."""

    kind: int
    codec: int = 0
    volume: int = 0
    offset: int = 0
    length: int = 0
    payload: bytes = b""
    auth: bytes = ZERO

    def _signed_part(self) -> bytes:
        head = (b"DM", self.kind, self.codec, self.volume, 0)
        return HEADER.pack(*head, len(self.payload), self.offset, self.length, ZERO)[:28]

    def authenticator(self, content: bytes) -> bytes:
        """What `auth` has to be for content with this hash."""
        return blake3(self._signed_part() + content, key=FRAME_KEY).digest()

    def encode(self) -> bytes:
        """Header and payload."""
        head = self._signed_part() + self.auth
        return head + struct.pack("<I", crc32c(head)) + self.payload


def text(value: str) -> bytes:
    """A string with its length in front."""
    raw = value.encode()
    return bytes([len(raw)]) + raw


def take_text(raw: bytes) -> tuple[str, bytes]:
    """A string off the front."""
    return raw[1 : 1 + raw[0]].decode(), raw[1 + raw[0] :]


class Wire:
    """Frames over one TLS connection.

    Attributes:
        heard: What has arrived.
        captured: The same as bytes, as a capture inside of TLS has them.
    """

    def __init__(self, tls: ssl.SSLSocket) -> None:
        self._tls = tls
        self.heard: list[Frame] = []
        self.captured = bytearray()

    def send(self, frame: Frame) -> None:
        """Send one frame."""
        self._tls.sendall(frame.encode())

    def receive(self) -> Frame | None:
        """The next frame; None at the end."""
        head = self._exactly(64)
        if head is None:
            return None
        assert crc32c(head[:60]) == int.from_bytes(head[60:], "little")
        magic, kind, codec, volume, reserved, size, offset, length, auth = HEADER.unpack(head[:60])
        assert (magic, reserved) == (b"DM", 0)
        payload = self._exactly(size)
        assert payload is not None
        frame = Frame(kind, codec, volume, offset, length, payload, auth)
        self.heard.append(frame)
        return frame

    def expect(self, *kinds: int) -> Frame:
        """The next frame of these kinds; PING is passed over."""
        while (frame := self.receive()) is not None:
            if frame.kind in kinds:
                return frame
            assert frame.kind == PING, f"{frame.kind}: {frame.payload!r}"
        raise AssertionError(f"the connection ended before {kinds}")

    def close(self) -> None:
        """End the connection."""
        self._tls.close()

    def _exactly(self, count: int) -> bytes | None:
        parts = []
        while count:
            try:
                part = self._tls.recv(min(count, 65536))
            except (ssl.SSLEOFError, ConnectionResetError):
                return None
            if not part:
                return None
            parts.append(part)
            self.captured += part
            count -= len(part)
        return b"".join(parts)


def context(server: bool, cert: Path, key: Path, ca: Path) -> ssl.SSLContext:
    """Mutual TLS 1.3 with the protocol's ALPN name."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False  # names are URIs, not addresses
    made.verify_mode = ssl.CERT_REQUIRED
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.load_cert_chain(cert, key)
    made.load_verify_locations(ca)
    made.set_alpn_protocols(["diskmover/1"])
    return made


def dial(address: str, tls: ssl.SSLContext) -> Wire:
    """Connect as a sender."""
    host, port = address.rsplit(":", 1)
    raw = socket.create_connection((host, int(port)), timeout=60)
    return Wire(tls.wrap_socket(raw))


# --- both roles ---------------------------------------------------------------


def push(wire: Wire, path: Path, name: str, *, compress: bool) -> dict[str, object]:
    """Send a file to a receiver without sessions; returns its receipt."""
    size = path.stat().st_size
    hello = struct.pack("<HI16s32s", 1, CHUNK, b"stranger's nonce", ZERO)
    wire.send(Frame(HELLO, payload=hello + text(f"open/{name}") + text("any")))
    assert wire.expect(WELCOME).payload == struct.pack("<H", 1)
    identity = struct.pack("<QqqQ", size, 1, 2, 3)
    wire.send(Frame(OPEN, payload=identity + VERBATIM + text(name)))
    while wire.expect(STATE, OPENED).kind == STATE:
        pass  # what is there already may be sent again
    chunks = []
    with path.open("rb") as file:
        for offset in range(0, size, CHUNK):
            chunk = file.read(CHUNK)
            chunks.append(chunk)
            bitmap, data = split(chunk)
            frame = Frame(ZEROS, offset=offset, length=len(chunk))
            if data:
                packed = zstandard.compress(data) if compress else data
                codec = ZSTD if compress and len(packed) < len(data) else RAW
                body = packed if codec == ZSTD else data
                frame = Frame(DATA, codec, 0, offset, len(chunk), bitmap + body)
            frame.auth = frame.authenticator(chunk_hash(bitmap, data))
            wire.send(frame)
            ack = wire.expect(ACK)
            assert (ack.offset, ack.length) == (offset, len(chunk))
    root = root_digest(iter(chunks), size)
    finish = Frame(FINISH, length=size, payload=root + struct.pack("<Q", 0))
    finish.auth = finish.authenticator(root)
    wire.send(finish)
    told = wire.expect(RECEIPT)
    return read_receipt(told.payload) | {"allocated_bytes": told.length}


def read_receipt(payload: bytes) -> dict[str, object]:
    """The fields of a receipt."""
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
    }


@dataclass
class Arrived:
    """A volume as it was decoded from the frames."""

    name: str
    content: bytearray
    chunks: set[int] = field(default_factory=set)


def serve_one(wire: Wire) -> Arrived:
    """Receive one volume over one connection, checking every frame."""
    hello = wire.expect(HELLO).payload
    version, chunk, _nonce, _proof = struct.unpack("<HI16s32s", hello[:54])
    assert (version, chunk) == (1, CHUNK)
    session, rest = take_text(hello[54:])
    _tag, rest = take_text(rest)
    assert session.startswith("open/")
    assert rest == b""
    wire.send(Frame(WELCOME, volume=1, payload=struct.pack("<H", 1)))
    opening = wire.expect(OPEN).payload
    size = int.from_bytes(opening[:8], "little")
    mode = opening[32:33]
    name, rest = take_text(opening[33:])
    assert (session, rest) == (f"open/{name}", b"")
    wire.send(Frame(OPENED))
    arrived = Arrived(name, bytearray(size))
    while (frame := wire.expect(DATA, ZEROS, FINISH)).kind != FINISH:
        _place(arrived, frame)
        wire.send(Frame(ACK, 0, frame.volume, frame.offset, frame.length))
    root = root_digest(iter(_chunks(arrived.content)), size)
    assert frame.payload[:32] == root
    assert frame.auth == frame.authenticator(root)
    data = sum(len(split(chunk)[1]) for chunk in _chunks(arrived.content))
    proof = struct.pack("<QQQ", size, data, 0) + root + mode + text(name)
    wire.send(Frame(RECEIPT, length=ALLOCATED, payload=proof))
    return arrived


def _chunks(content: bytes | bytearray) -> list[bytes]:
    return [bytes(content[at : at + CHUNK]) for at in range(0, len(content), CHUNK)]


def _place(arrived: Arrived, frame: Frame) -> None:
    assert frame.offset % CHUNK == 0
    assert frame.offset + frame.length <= len(arrived.content)
    if frame.kind == ZEROS:
        assert frame.auth == frame.authenticator(ZERO)
        return
    bitmap, body = frame.payload[:32], frame.payload[32:]
    blocks = [
        range(at, min(at + BLOCK, frame.length))
        for at in range(0, frame.length, BLOCK)
        if bitmap[at // BLOCK // 8] & 1 << at // BLOCK % 8
    ]
    expected = sum(len(block) for block in blocks)
    data = body
    if frame.codec == ZSTD:
        assert zstandard.frame_content_size(body) == expected
        data = zstandard.decompress(body, max_output_size=expected)
    assert len(data) == expected
    assert frame.auth == frame.authenticator(chunk_hash(bitmap, data))
    taken = 0
    for block in blocks:
        at = frame.offset + block.start
        arrived.content[at : at + len(block)] = data[taken : taken + len(block)]
        taken += len(block)
    arrived.chunks.add(frame.offset // CHUNK)
