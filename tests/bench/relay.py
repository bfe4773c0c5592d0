"""A link in user space: `python -m tests.bench.relay TUN TUN MBIT DELAY_MS`.

Carries IP packets between two TUN devices with a rate, a one-way delay and a
queue of one bandwidth-delay product that drops what is too much, as a router
would. (The kernel's netem is not everywhere.)
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from contextlib import suppress

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_PACKET = 65536


class Direction:
    """One way of the link."""

    def __init__(self, entry: int, exit_: int, bytes_per_second: float, delay: float) -> None:
        self.entry, self._exit = entry, exit_
        self._rate, self._delay = bytes_per_second, delay
        self._free_at = 0.0
        self._flying: deque[tuple[float, bytes]] = deque()

    def take_in(self, now: float) -> None:
        """Queue what has come."""
        while True:
            try:
                packet = os.read(self.entry, _PACKET)
            except BlockingIOError:
                return
            begin = max(now, self._free_at)
            if begin - now > 2 * self._delay:
                continue  # the queue is full
            self._free_at = begin + len(packet) / self._rate
            self._flying.append((self._free_at + self._delay, packet))

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


def open_tun(name: str) -> int:
    """Make a TUN device that lives as long as the descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return descriptor


def main() -> None:
    """Make both devices, say so, and carry until the pipe to our parent closes."""
    name_a, name_b, mbit, delay_ms = sys.argv[1:]
    os.nice(-10)  # it stands for hardware
    a, b = open_tun(name_a), open_tun(name_b)
    rate, delay = float(mbit) * 1e6 / 8, float(delay_ms) / 1000
    ways = [Direction(a, b, rate, delay), Direction(b, a, rate, delay)]
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
