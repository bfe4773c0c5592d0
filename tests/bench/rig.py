"""Two sides with a link between them, and the processes that run on them."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.bench import meter
from tests.bench.links import Link

_START_SECONDS = 30.0
_LOOK_SECONDS = 0.02
_LONGEST_SECONDS = 1800.0


class ToolFailed(Exception):
    """A tool did not make its copy."""


class Rig:
    """Two sides, a link between them, and a directory for what both of them need."""

    def __init__(self, link: Link, directory: Path) -> None:
        self.link = link
        self.directory = directory
        self._sides: dict[str, meter.Side] = {}

    @contextmanager
    def sides(self) -> Iterator[None]:
        """Count what runs on each side, and leave nothing running."""
        with ExitStack() as stack:
            self._sides = {side: stack.enter_context(meter.Side(side)) for side in "ab"}
            yield

    def costs(self) -> tuple[meter.Cost, meter.Cost]:
        """What the sides, a and b, have taken so far."""
        return self._sides["a"].cost(), self._sides["b"].cost()

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

    def run(self, command: Sequence[str]) -> None:
        """Run a command on side a to its end.

        Raises:
            ToolFailed: It says so, or takes for ever.
        """
        process = self._start("a", command)
        # `Popen.wait` with a timeout looks every 50 ms, which a small copy would be charged.
        descriptor = os.pidfd_open(process.pid)
        ended, _, _ = select.select([descriptor], [], [], _LONGEST_SECONDS)
        os.close(descriptor)
        if not ended:
            raise ToolFailed(f"not done in {_LONGEST_SECONDS:.0f} s")
        code = process.wait()
        if code != 0:
            raise ToolFailed(f"{command[0]} exits with {code}; its words are in {self._log}")

    def run_until(self, enough: Callable[[], bool], command: Sequence[str]) -> None:
        """Run a command on side a, and kill all of that side as soon as it is enough.

        Returns when what the command had started on side b has ended, too.

        Raises:
            ToolFailed: It ended before, or side b did not notice.
        """
        servers = self._sides["b"].pids()
        process = self._start("a", command)
        while not enough():
            if process.poll() is not None:
                raise ToolFailed(f"{command[0]} ended before it was killed; see {self._log}")
            time.sleep(_LOOK_SECONDS)
        self._sides["a"].kill()
        process.wait()
        end = time.monotonic() + _START_SECONDS
        while self._sides["b"].pids() - servers:
            if time.monotonic() > end:
                raise ToolFailed(f"the target never noticed that {command[0]} was killed")
            time.sleep(_LOOK_SECONDS)

    def _start(self, side: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
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
            time.sleep(_LOOK_SECONDS)


def own_tool(name: str) -> str:
    """A program of the virtual environment that runs us."""
    return str(Path(sys.executable).parent / name)
