"""Connections that are cut, as by a router that forgets them: both ends get a reset."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

_SYN, _RST, _ACK = 0x02, 0x04, 0x10
_TCP = 6


class Cutter:
    """Cuts each TCP connection at the end of the period in which it began."""

    def __init__(self, period_seconds: float) -> None:
        self._seconds = period_seconds
        self._born: dict[frozenset[bytes], int] = {}

    def resets(self, packet: bytes, now: float) -> tuple[bytes, bytes] | None:
        """What the sender and the receiver of a packet get in its place; None if it may pass.

        Both are accepted: a receiver believes a reset that has the very number that it
        waits for. One that has missed packets before answers with the right number, to
        which it gets a reset in turn.
        """
        segment = Segment.of(packet)
        if segment is None or segment.flags & _RST:
            return None
        period = int(now / self._seconds)
        if segment.flags & _SYN:
            self._born[segment.connection] = period
        if self._born.get(segment.connection) == period:
            return None
        return segment.reset_back(), segment.reset_onward()


@dataclass(frozen=True)
class Segment:
    """The head of a TCP segment.

    Attributes:
        source, target: Address and port of each end.
        number: Sequence number of its first byte.
        awaited: The number that its sender waits for.
        flags: Its control bits.
    """

    source: bytes
    target: bytes
    number: int
    awaited: int
    flags: int

    @classmethod
    def of(cls, packet: bytes) -> Self | None:
        """The segment in an IPv4 packet; None when it has none."""
        if packet[0] >> 4 != 4 or packet[9] != _TCP:
            return None
        at = (packet[0] & 15) * 4
        number, awaited = struct.unpack_from("!II", packet, at + 4)
        source, target = (
            packet[12:16] + packet[at : at + 2],
            packet[16:20] + packet[at + 2 : at + 4],
        )
        return cls(source, target, number, awaited, packet[at + 13])

    @property
    def connection(self) -> frozenset[bytes]:
        """The same for both directions."""
        return frozenset((self.source, self.target))

    def reset_back(self) -> bytes:
        """A reset for its sender, as if from its receiver."""
        return _reset(self.target, self.source, self.awaited, self.number)

    def reset_onward(self) -> bytes:
        """A reset for its receiver, as if from its sender."""
        return _reset(self.source, self.target, self.number, self.awaited)


def _reset(source: bytes, target: bytes, number: int, awaited: int) -> bytes:
    addresses, ports = source[:4] + target[:4], source[4:] + target[4:]

    def segment(checksum: int) -> bytes:
        rest = struct.pack("!IIBBHHH", number, awaited, 5 << 4, _RST | _ACK, 0, checksum, 0)
        return ports + rest

    def head(checksum: int) -> bytes:
        return struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0x4000, 64, _TCP, checksum) + addresses

    pseudo = addresses + struct.pack("!HH", _TCP, 20)
    return head(_checksum(head(0))) + segment(_checksum(pseudo + segment(0)))


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
