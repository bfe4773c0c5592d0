"""One copy by one tool, and what it took."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench import disk, layers, meter
from tests.bench.images import Image
from tests.bench.job import Job, Tool
from tests.bench.rig import Rig


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


class Copying:
    """Copies over one rig."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._known: dict[Path, bytes] = {}

    def measure(self, tool: Tool, image: Image, older: Image | None, killed: bool) -> Result:
        """Copy an image with a tool, from cold caches.

        Args:
            tool: What copies.
            image: What is copied.
            older: What the target has before.
            killed: The sender is killed halfway, and the same command run again.

        Raises:
            ToolFailed: It did not make the copy.
        """
        rig, job = self._rig, self._lay_out(tool, image, older)
        with rig.sides(), tool.prepare(rig, job) as command:
            sent, carried = rig.link.sent_bytes(), rig.link.carried_bytes()
            began = time.monotonic()
            if killed:
                half = image.data_bytes / 2
                rig.run_until(lambda: meter.used_bytes(job.directory) >= half, command)
            rig.run(command)
            wall = time.monotonic() - began
            targets = [file for file in job.targets if file.exists()]
            _fsync(*targets, job.directory)
            durable = time.monotonic() - began
            wire = rig.link.sent_bytes() - sent
            if carried is not None:
                carried = (rig.link.carried_bytes() or 0) - carried
            sender, receiver = rig.costs()
            cached = meter.cached_bytes(*image.files, *targets)
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
            allocated_bytes=sum(target.stat().st_blocks * 512 for target in targets),
            cached_bytes=cached,
            identical=self._same(job),
        )

    def _lay_out(self, tool: Tool, image: Image, older: Image | None) -> Job:
        """A target directory with nothing in it but an older copy, and all of it cold."""
        directory = self._rig.directory / "target"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        there = None
        if older is not None:
            name = older.replaced_by.name
            there = directory / (name if tool.updates else f"older-{name}")
            layers.copy(older.path, there)
            meter.evict(there)
        for file in image.files:
            meter.evict(file)
        return Job(image, directory, there)

    def _same(self, job: Job) -> bool:
        if all(map(self._alike, job.image.files, job.targets)):
            return True
        # Tools that copy what the guest sees lay out a qcow2 file in another way.
        compare = ["qemu-img", "compare", "-q", "-U", "-T", "none", "-f", "qcow2", "-F", "qcow2"]
        done = [*compare, str(job.image.path), str(job.target)]
        return job.image.read_as == "qcow2" and subprocess.run(done, check=False).returncode == 0

    def _alike(self, file: Path, target: Path) -> bool:
        if file not in self._known:
            self._known[file] = disk.fingerprint(file)
        return target.exists() and disk.fingerprint(target) == self._known[file]


def _fsync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
