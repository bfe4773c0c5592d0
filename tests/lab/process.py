"""A daemon of the lab: started with a log file, killed, started again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab.wait import wait_for

# Processes outlive their starter; Python warns of a handle that is dropped before.
KEPT: list[subprocess.Popen[bytes]] = []


@dataclass
class Daemon:
    """A process that outlives its starter.

    Attributes:
        name: For messages.
        command: What to run, namespaces entered already.
        log: Where its output goes; appended to.
        ready: True once it serves.
        environment: Variables beside the starter's own.
        pid: Of the running process; 0 when it does not run.
    """

    name: str
    command: Sequence[str]
    log: Path
    ready: Callable[[], bool]
    environment: Mapping[str, str] = field(default_factory=dict)
    pid: int = 0

    def start(self, timeout_seconds: float = 90.0) -> None:
        """Start it and wait until it is ready."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        self.pid = process.pid
        KEPT.append(process)

        def settled() -> bool:
            if process.poll() is not None:
                raise RuntimeError(
                    f"{self.name} ended with {process.returncode}; {self.log}:\n{self.tail()}"
                )
            return self.ready()

        wait_for(settled, f"{self.name} ready", timeout_seconds=timeout_seconds, explain=self.tail)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal and wait until the process is gone."""
        if self.pid and alive(self.pid):
            os.kill(self.pid, number)
            wait_for(lambda: not alive(self.pid), f"{self.name} gone", timeout_seconds=90)
        self.pid = 0

    def restart(self) -> None:
        """Kill it without warning and start it again."""
        self.kill()
        self.start()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop it from doing anything at all while the block runs; it stays alive."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def tail(self, lines: int = 30) -> str:
        """The end of its log."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def alive(pid: int) -> bool:
    """True while a process exists that is not a zombie; a zombie child is reaped."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kill_all(pids: Sequence[int]) -> None:
    """Kill processes and wait until they are gone."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    deadline = time.monotonic() + 10
    for pid in pids:
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
