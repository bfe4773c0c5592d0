"""One copy by one tool: servers, the timed command, and what it took."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench import disk, meter
from tests.bench.images import Image
from tests.bench.links import Link

_START_SECONDS = 30.0


@dataclass(frozen=True)
class Result:
    """What one copy took.

    Attributes:
        wall_seconds: From the start of the command to its end.
        durable_seconds: The same, and until the target is surely on the disk.
        cpu_seconds: Of all processes of both sides.
        sender_cpu_seconds, receiver_cpu_seconds: Of each side.
        wire_bytes: Sent by both interfaces.
        carried_bytes: What the link carried to the target of what it can; None when
            nothing limits it.
        sender_rss_bytes, receiver_rss_bytes: Most memory of each side.
        allocated_bytes: Disk that the target uses.
        cached_bytes: Of source and target in the page cache afterwards.
        identical: The target has exactly the content of the source.
    """

    wall_seconds: float
    durable_seconds: float
    cpu_seconds: float
    sender_cpu_seconds: float
    receiver_cpu_seconds: float
    wire_bytes: int
    carried_bytes: int | None
    sender_rss_bytes: int
    receiver_rss_bytes: int
    allocated_bytes: int
    cached_bytes: int
    identical: bool

    def as_json(self) -> dict[str, Any]:
        """As in the report."""
        return asdict(self)


class Rig:
    """Two sides, a link between them, and a directory that the target goes to."""

    def __init__(self, link: Link, directory: Path) -> None:
        self.link = link
        self.directory = directory
        self._known: dict[Path, bytes] = {}
        self._sides: dict[str, meter.Side] = {}

    @property
    def target_directory(self) -> Path:
        """Where targets are placed."""
        return self.directory / "target"

    def measure(self, tool: Any, image: Image) -> Result:
        """Copy an image with a tool, from cold caches."""
        shutil.rmtree(self.target_directory, ignore_errors=True)
        self.target_directory.mkdir(parents=True)
        target = self.target_directory / image.path.name
        meter.evict(image.path)
        with ExitStack() as stack:
            for side in "ab":
                self._sides[side] = stack.enter_context(meter.Side(side))
            command = stack.enter_context(tool.prepare(self, image, target))
            sent, carried = self.link.sent_bytes(), self.link.carried_bytes()
            began = time.monotonic()
            self._run("a", command)
            wall = time.monotonic() - began
            _fsync(target)
            durable = time.monotonic() - began
            wire = self.link.sent_bytes() - sent
            if carried is not None:
                carried = (self.link.carried_bytes() or 0) - carried
            sender, receiver = (self._sides[side].cost() for side in "ab")
            cached = meter.cached_bytes(image.path, target)
        return Result(
            wall_seconds=wall,
            durable_seconds=durable,
            cpu_seconds=sender.cpu_seconds + receiver.cpu_seconds,
            sender_cpu_seconds=sender.cpu_seconds,
            receiver_cpu_seconds=receiver.cpu_seconds,
            wire_bytes=wire,
            carried_bytes=carried,
            sender_rss_bytes=sender.peak_rss_bytes,
            receiver_rss_bytes=receiver.peak_rss_bytes,
            allocated_bytes=target.stat().st_blocks * 512,
            cached_bytes=cached,
            identical=self._same(image, target),
        )

    @contextmanager
    def server(self, side: str, *command: str, port: int | None = None) -> Iterator[None]:
        """A server on a side, as long as the copy runs; waits until it listens."""
        process = self._start(side, command)
        try:
            if port is not None:
                self._wait_listening(side, port, process)
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _run(self, side: str, command: list[str]) -> None:
        process = self._start(side, command)
        if process.wait() != 0:
            raise RuntimeError(f"{command[0]} failed; its words are in {self._log}")

    def _start(self, side: str, command: tuple[str, ...] | list[str]) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self.link.command(side, *command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=self._sides[side].join,
            )

    @property
    def _log(self) -> Path:
        return self.directory / "tools.log"

    def _wait_listening(self, side: str, port: int, process: subprocess.Popen[bytes]) -> None:
        command = self.link.command(side, "ss", "-Hltn", f"sport = :{port}")
        end = time.monotonic() + _START_SECONDS
        while not subprocess.check_output(command):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"no server on port {port}; its words are in {self._log}")
            time.sleep(0.02)

    def _same(self, image: Image, target: Path) -> bool:
        if image.path not in self._known:
            self._known[image.path] = disk.fingerprint(image.path)
        if disk.fingerprint(target) == self._known[image.path]:
            return True
        # Tools that copy what the guest sees lay out a qcow2 file in another way.
        compare = ["qemu-img", "compare", "-q", "-U", "-T", "none",
                   "-f", image.format, "-F", image.format]  # fmt: skip
        done = subprocess.run([*compare, str(image.path), str(target)], check=False)
        return image.format == "qcow2" and done.returncode == 0


def _fsync(path: Path) -> None:
    for one in (path, path.parent):
        descriptor = os.open(one, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def own_tool(name: str) -> str:
    """A program of the virtual environment that runs us."""
    return str(Path(sys.executable).parent / name)
