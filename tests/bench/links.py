"""Two network namespaces and the link between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

ADDRESS = {"a": "10.77.0.1", "b": "10.77.0.2"}
_MTU = 1500
# Bytes of TCP payload in each 1538 bytes of an Ethernet frame on the wire, or in
# the 1500 bytes of a packet that the relay counts.
_ETHERNET, _PACKET = 1448 / 1538, 1448 / 1500


@dataclass(frozen=True)
class Shape:
    """What a link can do.

    Attributes:
        name: As in the table.
        mbit_per_second: Its rate; None when nothing limits it.
        rtt_ms: Round trip time of the relay; 0 without one.
        loss: Share of the packets that the relay loses, in both directions.
        cut_seconds: How often the relay cuts all connections; 0 for never.
        congestion: How TCP finds the rate, unless a program asks for another way. It is
            set because machines differ; this is what nearly all have.
    """

    name: str
    mbit_per_second: int | None = None
    rtt_ms: int = 0
    loss: float = 0.0
    cut_seconds: float = 0.0
    congestion: str = "cubic"

    @property
    def payload_bytes_per_second(self) -> float | None:
        """What TCP can carry at most; None when nothing limits it."""
        if self.mbit_per_second is None:
            return None
        share = _PACKET if self.rtt_ms else _ETHERNET
        return self.mbit_per_second * 1e6 / 8 * share * (1 - self.loss)


UNSHAPED = Shape("unshaped")
GIGABIT = Shape("1 Gbit/s", 1000)
WAN = Shape("100 Mbit/s 50 ms", 100, 50)
LOSSY = Shape("100 Mbit/s 50 ms, 1 % lost", 100, 50, loss=0.01)
LOSSY_BBR = Shape(f"{LOSSY.name}, BBR for all", 100, 50, loss=0.01, congestion="bbr")
CUT = Shape("100 Mbit/s 50 ms, cut every 10 s", 100, 50, cut_seconds=10)
SHAPES = {
    "unshaped": UNSHAPED, "gigabit": GIGABIT, "wan": WAN,
    "loss": LOSSY, "loss-bbr": LOSSY_BBR, "cut": CUT,
}  # fmt: skip


class Link:
    """The namespaces of both ends, while they are needed."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        tag = os.getpid() % 100_000
        self._netns = {side: f"bench{tag}{side}" for side in "ab"}
        self._device = {side: f"bn{tag}{side}" for side in "ab"}
        self._relay: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()

    def command(self, side: str, *command: str) -> list[str]:
        """The command, in the namespace of a side."""
        return ["ip", "netns", "exec", self._netns[side], *command]

    def sent_bytes(self) -> int:
        """Bytes that both interfaces have sent so far."""
        return sum(self._sent_by(side) for side in "ab")

    def carried_bytes(self) -> int | None:
        """Bytes that have gone from a to b as the limit counts them; None without one.

        Segmentation is left to the device: an interface counts one header for many
        packets on the wire, the kernel's limit counts each. The relay's devices have
        no such thing, and what it drops does not arrive.
        """
        if self.shape.mbit_per_second is None:
            return None
        if self.shape.rtt_ms:
            return self._counter("b", "rx_bytes")
        show = ["tc", "-s", "-j", "qdisc", "show", "dev", self._device["a"]]
        told = json.loads(subprocess.check_output(self.command("a", *show)))
        return int(told[0]["bytes"])

    def _make(self) -> None:
        for side in "ab":
            _ip("netns", "add", self._netns[side])
            _ip("-n", self._netns[side], "link", "set", "lo", "up")
        if self.shape.rtt_ms:
            self._start_relay()
        else:
            _ip("link", "add", self._device["a"], "type", "veth",
                "peer", "name", self._device["b"])  # fmt: skip
        for side, other in ("ab", "ba"):
            netns, device = self._netns[side], self._device[side]
            _ip("link", "set", device, "netns", netns)
            _ip("-n", netns, "address", "add", f"{ADDRESS[side]}/24", "dev", device)
            _ip("-n", netns, "link", "set", device, "mtu", str(_MTU), "up")
            _ip("-n", netns, "route", "replace", f"{ADDRESS[other]}/32", "dev", device,
                "congctl", self.shape.congestion)  # fmt: skip
            if self.shape.mbit_per_second and not self.shape.rtt_ms:
                rate = f"{self.shape.mbit_per_second}mbit"
                _run("tc", "-n", netns, "qdisc", "add", "dev", device, "root",
                     "tbf", "rate", rate, "burst", "1mb", "latency", "50ms")  # fmt: skip

    def _remove(self) -> None:
        if self._relay is not None:
            self._relay.communicate(timeout=10)  # it ends when its input does
        for side in "ab":
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", self._netns[side])

    def _sent_by(self, side: str) -> int:
        return self._counter(side, "tx_bytes")

    def _counter(self, side: str, name: str) -> int:
        path = f"/sys/class/net/{self._device[side]}/statistics/{name}"
        return int(subprocess.check_output(self.command(side, "cat", path)))

    def _start_relay(self) -> None:
        shape = self.shape
        nature = (shape.mbit_per_second, shape.rtt_ms / 2, shape.loss, shape.cut_seconds)
        self._relay = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.relay",
             self._device["a"], self._device["b"], *map(str, nature)],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._relay.stdout is not None
        if self._relay.stdout.readline() != b"ready\n":
            raise RuntimeError("the relay did not start; are there TUN devices (/dev/net/tun)?")


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
