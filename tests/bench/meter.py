"""What a copy costs: CPU of all processes of each side, memory, cache, bytes."""

from __future__ import annotations

import os
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_SAMPLE_SECONDS = 0.05
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Cost:
    """What the processes of one side took.

    Attributes:
        cpu_seconds: User and system time of all of them, ended or not.
        peak_rss_bytes: Most memory that all of them had together.
    """

    cpu_seconds: float
    peak_rss_bytes: int


class Side:
    """A control group for all processes of one side of a copy."""

    def __init__(self, name: str) -> None:
        self._group = _cgroup_root() / f"drover-bench-{os.getpid()}-{name}"
        self._peak = 0
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._group.mkdir()
        self._sampler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._sampler.join()
        self.kill()
        for _ in range(200):
            with suppress(OSError):
                self._group.rmdir()
                return
            threading.Event().wait(0.05)

    def join(self) -> None:
        """Bring the calling process into the group."""
        (self._group / "cgroup.procs").write_text(str(os.getpid()))

    def cost(self) -> Cost:
        """What it has taken so far."""
        stat = dict(line.split() for line in (self._group / "cpu.stat").read_text().splitlines())
        return Cost(int(stat["usage_usec"]) / 1e6, self._peak)

    def pids(self) -> set[int]:
        """Its processes."""
        return {int(pid) for pid in (self._group / "cgroup.procs").read_text().split()}

    def kill(self) -> None:
        """Kill all of them, as a machine that loses power does."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, 9)

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self._peak = max(self._peak, sum(_rss_bytes(pid) for pid in self.pids()))


def cached_bytes(*paths: Path) -> int:
    """How much of these files is in the page cache."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, paths)]
    return sum(int(number) for number in subprocess.check_output(command).split())


def used_bytes(directory: Path) -> int:
    """Disk that the files in a directory use, while they come and go."""
    used = 0
    for file in directory.iterdir():
        with suppress(FileNotFoundError):
            used += file.stat().st_blocks * 512
    return used


def evict(path: Path) -> None:
    """Make a file durable and drop it from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _rss_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def _cgroup_root() -> Path:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(mount)
    raise RuntimeError("no cgroup2 is mounted: the CPU of a side cannot be counted")
