"""A link in user space: `python -m tests.bench.relay TUN TUN MBIT DELAY_MS LOSS CUT_SECONDS`.

Carries IP packets between two TUN devices with a rate, a one-way delay and a
queue of one bandwidth-delay product that drops what is too much, as a router
would. On the way a share of LOSS is lost, in both directions, and every CUT_SECONDS
all connections are cut (0: never). (The kernel's netem is not everywhere, and what is
lost in the sender's own host is told to its TCP.)
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from tests.bench.cut import Cutter

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_PACKET = 65536
_SEED = 20  # so that the same packets are lost in two runs


@dataclass(frozen=True)
class Nature:
    """What the link does to packets.

    Attributes:
        bytes_per_second: Its rate.
        delay: Seconds that a packet flies.
        loss: Share of the packets that are lost.
        cutter: Cuts connections; None when nothing does.
    """

    bytes_per_second: float
    delay: float
    loss: float = 0.0
    cutter: Cutter | None = None


class Direction:
    """One way of the link."""

    def __init__(self, entry: int, exit_: int, nature: Nature) -> None:
        self.entry, self._exit = entry, exit_
        self._nature = nature
        self._dice = random.Random(_SEED)
        self._free_at = 0.0
        self._flying: deque[tuple[float, bytes]] = deque()

    def take_in(self, now: float) -> None:
        """Queue what has come."""
        while True:
            try:
                packet = os.read(self.entry, _PACKET)
            except BlockingIOError:
                return
            packet = self._cut(packet, now)
            begin = max(now, self._free_at)
            if begin - now > 2 * self._nature.delay:
                continue  # the queue is full
            self._free_at = begin + len(packet) / self._nature.bytes_per_second
            if self._dice.random() >= self._nature.loss:
                self._flying.append((self._free_at + self._nature.delay, packet))

    def let_out(self, now: float) -> float | None:
        """Deliver what is due; tell when the next packet is."""
        while self._flying:
            due, packet = self._flying[0]
            if due > now:
                return due
            self._flying.popleft()
            with suppress(OSError):  # the device is down: lost
                os.write(self._exit, packet)
        return None

    def _cut(self, packet: bytes, now: float) -> bytes:
        """What goes on in the place of a packet: itself, or the end of its connection."""
        resets = self._nature.cutter.resets(packet, now) if self._nature.cutter else None
        if resets is None:
            return packet
        back, onward = resets
        with suppress(OSError):  # the device is down
            os.write(self.entry, back)
        return onward


def open_tun(name: str) -> int:
    """Make a TUN device that lives as long as the descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return descriptor


def main() -> None:
    """Make both devices, say so, and carry until the pipe to our parent closes."""
    name_a, name_b, mbit, delay_ms, loss, cut_seconds = sys.argv[1:]
    os.nice(-10)  # it stands for hardware
    a, b = open_tun(name_a), open_tun(name_b)
    cutter = Cutter(float(cut_seconds)) if float(cut_seconds) else None
    nature = Nature(float(mbit) * 1e6 / 8, float(delay_ms) / 1000, float(loss), cutter)
    ways = [Direction(a, b, nature), Direction(b, a, nature)]
    print("ready", flush=True)
    wait = None
    while True:
        ready, _, _ = select.select([a, b, 0], [], [], wait)
        if 0 in ready:
            return
        now = time.monotonic()
        for way in ways:
            if way.entry in ready:
                way.take_in(now)
        due = [at for way in ways if (at := way.let_out(now)) is not None]
        wait = max(min(due) - time.monotonic(), 0.0) if due else None


if __name__ == "__main__":
    main()
