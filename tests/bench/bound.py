"""The time that a copy takes at least on this machine, and which part says so.

Both ends share one disk and the cores, so: the disk must carry the data in and
out at once, the link what the target does not have of it, compressed, and the cores
what the work costs at least: what was measured for a GB of each part of it, not what
the tool took.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from tests.bench import disk
from tests.bench.copying import Result
from tests.bench.images import Image
from tests.bench.job import Tool
from tests.bench.place import Place
from tests.bench.price import Moving, Price

_LEVEL = 3  # what a core does at the rate of a gigabit link
_SLOW_LEVEL, _SLOW_MBIT = 9, 200
_GIGA = 10**9


@dataclass(frozen=True)
class Bound:
    """A least time.

    Attributes:
        seconds: How long.
        part: "disk", "link" or "cpu".
    """

    seconds: float
    part: str


def least_cpu_seconds(
    tool: Tool, place: Place, result: Result, price: Price, moving: Moving
) -> float:
    """What the work of a copy costs at least, at both ends together.

    All of the data is read, and what the target did not have is written; what went over
    the wire and had to is moved, and encrypted if the tool promises that. Who promises
    a hash computes it over all that is not zero. Compression is the tool's own choice and
    not counted: it costs CPU and saves some of what is.
    """
    content = min(place.image.data_bytes, result.allocated_bytes)
    written = min(place.new_bytes, content)
    wire = min(place.new_bytes, result.wire_bytes)
    on_wire = moving.socket + (price.tls if "tls" in tool.promises else 0)
    hashed = price.hash if "hash" in tool.promises else 0
    read = moving.read * place.image.data_bytes
    return (on_wire * wire + hashed * content + moving.write * written + read) / _GIGA


class Model:
    """The least time of copies, from what the parts of this machine can do."""

    def __init__(self, scratch: Path, price: Price, moving: Moving) -> None:
        """Measure the disk by copies to `scratch`, which is removed each time."""
        self._scratch = scratch
        self._price = price
        self._moving = moving
        self._disk: dict[Path, list[float]] = {}
        self._shares: dict[tuple[str, int], float] = {}

    def bound(self, tool: Tool, place: Place, result: Result) -> Bound:
        """The bound of one copy."""
        cpu = least_cpu_seconds(tool, place, result, self._price, self._moving)
        parts = {
            "disk": sum(self.disk_seconds(file) for file in place.image.files),
            "cpu": cpu / (os.cpu_count() or 1),
        }
        payload = place.shape.payload_bytes_per_second
        if payload is not None:
            slow = (place.shape.mbit_per_second or 0) <= _SLOW_MBIT
            share = self._share(place.image, _SLOW_LEVEL if slow else _LEVEL)
            parts["link"] = place.new_bytes * share / payload
        part = max(parts, key=lambda name: parts[name])
        return Bound(max(parts[part], 1e-3), part)

    def measure_disk(self, image: Image) -> None:
        """Measure the disk anew: others use it too, so what it gives changes within
        minutes. Whoever does so before and after a copy gets the mean of both as its bound."""
        for file in image.files:
            found = self._disk.get(file, [])
            self._disk[file] = [*found[-1:], disk.copy_seconds(file, self._scratch)]

    def disk_seconds(self, file: Path) -> float:
        """What the disk needs for the data of a file, as it lies there."""
        if file not in self._disk:
            self._disk[file] = [disk.copy_seconds(file, self._scratch)]
        return fmean(self._disk[file])

    def _share(self, image: Image, level: int) -> float:
        key = (image.name, level)
        if key not in self._shares:
            self._shares[key] = disk.compressed_share(image.path, level)
        return self._shares[key]
