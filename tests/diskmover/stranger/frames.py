"""Frames, and one TLS connection that carries them."""

from __future__ import annotations

import socket
import ssl
import struct
from dataclasses import dataclass
from pathlib import Path

import zstandard
from blake3 import blake3

from tests.diskmover.stranger.content import ZERO

HEADER = struct.Struct("<2sBBHHIQQ32s")
HELLO, OPEN, DATA, ZEROS, FINISH, HASHES, PATCH, DIRTY = range(1, 9)
WELCOME, STATE, OPENED, ACK, RECEIPT, WANT = range(16, 22)
ERROR, PING = 30, 31
CONTENT = (DATA, ZEROS, HASHES, PATCH)
RAW, ZSTD = 0, 1
CHUNK_CORRUPT, TARGET_BUSY, CANCELLED = 30, 52, 60

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


def pack(blocks: bytes, *, compress: bool) -> tuple[int, bytes]:
    """Blocks as they travel, and the codec that says how."""
    packed = zstandard.compress(blocks) if compress else blocks
    return (ZSTD, packed) if len(packed) < len(blocks) else (RAW, blocks)


def unpack(codec: int, body: bytes, length: int) -> bytes:
    """The blocks that travelled, which have to be this long."""
    if codec == ZSTD:
        assert zstandard.frame_content_size(body) == length
        body = zstandard.decompress(body, max_output_size=length)
    assert len(body) == length
    return body


def content_bytes(frames: list[Frame]) -> int:
    """Bytes of those frames that bring a volume, headers and all."""
    return sum(64 + len(frame.payload) for frame in frames if frame.kind in CONTENT)


class Told(Exception):
    """The other end has sent ERROR.

    Attributes:
        code: Which.
        offset: Where in the volume.
    """

    def __init__(self, payload: bytes) -> None:
        self.code, _retryable, _side, self.offset = struct.unpack("<HBBQ", payload[:12])
        _volume, message = take_text(payload[12:])
        super().__init__(f"{self.code}: {message.decode()}")


class Wire:
    """Frames over one TLS connection.

    Attributes:
        sent: What was sent.
        heard: What has arrived.
        captured: The same as bytes, as a capture inside of TLS has them.
    """

    def __init__(self, tls: ssl.SSLSocket) -> None:
        self._tls = tls
        self.sent: list[Frame] = []
        self.heard: list[Frame] = []
        self.captured = bytearray()

    def send(self, frame: Frame) -> None:
        """Send one frame."""
        self._tls.sendall(frame.encode())
        self.sent.append(frame)

    def receive(self) -> Frame | None:
        """The next frame; None at the end, also of one that broke off within a frame."""
        head = self._exactly(64)
        if head is None:
            return None
        assert crc32c(head[:60]) == int.from_bytes(head[60:], "little")
        magic, kind, codec, volume, reserved, size, offset, length, auth = HEADER.unpack(head[:60])
        assert (magic, reserved) == (b"DM", 0)
        payload = self._exactly(size)
        if payload is None:
            return None
        frame = Frame(kind, codec, volume, offset, length, payload, auth)
        self.heard.append(frame)
        return frame

    def expect(self, *kinds: int) -> Frame:
        """The next frame of these kinds; a receiver answers PING meanwhile."""
        while (frame := self.receive()) is not None:
            if frame.kind in kinds:
                return frame
            if frame.kind == ERROR:
                raise Told(frame.payload)
            assert frame.kind == PING, f"{frame.kind}: {frame.payload!r}"
            if self._tls.server_side:
                self.send(frame)
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
