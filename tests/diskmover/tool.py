"""The stand-alone tool as users run it: real processes, real files."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import selectors
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 60.0
_TOOL = [sys.executable, "-m", "diskmover"]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The JSON lines that it printed."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def receipt(self) -> dict[str, Any]:
        """The receipt that it printed."""
        assert self.code == 0, self.err
        return next(line["receipt"] for line in self.lines if "receipt" in line)

    @property
    def error(self) -> dict[str, Any]:
        """The error that it printed."""
        return next(line["error"] for line in self.lines if "error" in line)


def run(*arguments: str | Path, within: Sequence[str] = ()) -> Ended:
    """Run a command to its end, within another one if that is given."""
    command = [*within, *_TOOL, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS * 2)
    return Ended(done.returncode, done.stdout, done.stderr)


def check(*command: str) -> None:
    """Run another program, which must succeed."""
    subprocess.run(command, check=True)


def on_terminal(*arguments: str | Path, columns: int) -> str:
    """Run a command on a terminal that is so wide; what it shows, with \\n as line ends."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [*_TOOL, *map(str, arguments)]
    shown = bytearray()
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        # When the last one to write is gone, reading fails.
        with suppress(OSError):
            while part := os.read(master, 65536):
                shown += part
        code = process.wait(PATIENCE_SECONDS)
    os.close(master)
    assert code == 0, shown
    return shown.decode().replace("\r\n", "\n")


def push_when_free(*arguments: str | Path, within: Sequence[str] = ()) -> Ended:
    """Push; wait while the receiver has not noticed the end of the last attempt."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        ended = run("push", *arguments, within=within)
        if ended.code == 0 or ended.error["code"] != "TARGET_BUSY" or time.monotonic() > end:
            return ended


class Serve:
    """A `diskmover serve` process.

    Args:
        root: Where files go.
        tls: Its --cert, --key and --ca.
        listen: Where it listens; the address of an earlier one to take its place.
        within: A command that runs it in a network namespace.
        options: Further options.
    """

    def __init__(
        self,
        root: Path,
        tls: list[str],
        listen: str = "127.0.0.1:0",
        within: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> None:
        self.root = root
        self._process = subprocess.Popen(
            [*within, *_TOOL, "serve", "--root", str(root), "--listen", listen, "--json", *tls,
             *options],
            stdout=subprocess.PIPE,
            bufsize=0,  # else one reading could take two lines
        )  # fmt: skip
        self.address: str = self.next_line()["listening"]

    def next_line(self) -> dict[str, Any]:
        """The next JSON line that it prints."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._process.stdout, selectors.EVENT_READ)
            assert waiting.select(PATIENCE_SECONDS), "serve says nothing"
        said: dict[str, Any] = json.loads(self._process.stdout.readline())
        return said

    def said_to_the_end(self) -> list[dict[str, Any]]:
        """All lines that it still prints, told to end as by a service manager."""
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGTERM)
        said = self._process.stdout.read()
        assert self._end() == 0
        return [json.loads(line) for line in said.splitlines()]

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._end()

    def stop(self) -> int:
        """End it as a service manager would; returns the exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._end()

    def _end(self) -> int:
        code = self._process.wait(PATIENCE_SECONDS)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code


class Running:
    """A `diskmover push` process under way, or another command."""

    def __init__(
        self, *arguments: str | Path, within: Sequence[str] = (), command: str = "push"
    ) -> None:
        self._process = subprocess.Popen(
            [*within, *_TOOL, command, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def next_line(self) -> str:
        """The next line that it prints."""
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def stop_reading(self) -> None:
        """Close our end of its output."""
        assert self._process.stdout is not None
        self._process.stdout.close()

    def threads(self) -> int:
        """Threads that it has now."""
        return len(os.listdir(f"/proc/{self._process.pid}/task"))

    def ended(self) -> Ended:
        """How it ends."""
        out, err = self._process.communicate(timeout=PATIENCE_SECONDS)
        return Ended(self._process.returncode, out, err)


def eventually(what: str, holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.02)


def part_of(root: Path, name: str) -> Path | None:
    """The part of a file that is being received."""
    return next(iter(root.glob(f".{name}.dm-*.part")), None)


def arrived_bytes(root: Path, name: str) -> int:
    """Bytes of a part that are allocated: those that have been written."""
    part = part_of(root, name)
    return part.stat().st_blocks * 512 if part else 0


def durable_bytes(root: Path, name: str) -> int:
    """A lower bound of what a receiver's journal notes as durable."""
    journal = next(iter(root.glob(f".{name}.dm-*.journal")), None)
    records = max(journal.stat().st_size - 200, 0) if journal else 0
    return records // 60 << 20


def noise(path: Path, size: int) -> Path:
    """A file that does not compress."""
    with path.open("wb") as file:
        for at in range(0, size, 1 << 20):
            file.write(os.urandom(min(1 << 20, size - at)))
    return path


def same(one: Path, two: Path) -> bool:
    """What cmp says."""
    return subprocess.run(["cmp", one, two], capture_output=True).returncode == 0
