"""The time that a copy takes at least on this machine, and which part says so.

Both ends share one disk and the cores, so: the disk must carry the data in and
out at once, the link what is left of it after compression, and the cores what
the tool itself spent.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from tests.bench import disk
from tests.bench.images import Image
from tests.bench.links import Shape
from tests.bench.rig import Result

_LEVEL = 3  # what a core does at the rate of a gigabit link
_SLOW_LEVEL, _SLOW_MBIT = 9, 200


@dataclass(frozen=True)
class Bound:
    """A least time.

    Attributes:
        seconds: How long.
        part: "disk", "link" or "cpu".
    """

    seconds: float
    part: str


class Model:
    """The least time of copies, from what the parts of this machine can do."""

    def __init__(self, disk_bytes_per_second: float) -> None:
        self._disk = disk_bytes_per_second
        self._shares: dict[tuple[str, int], float] = {}

    def bound(self, image: Image, shape: Shape, result: Result) -> Bound:
        """The bound of one copy."""
        data = min(image.allocated_bytes, image.size_bytes)
        parts = {
            "disk": data / self._disk,
            "cpu": result.cpu_seconds / (os.cpu_count() or 1),
        }
        payload = shape.payload_bytes_per_second
        if payload is not None:
            slow = (shape.mbit_per_second or 0) <= _SLOW_MBIT
            share = self._share(image, _SLOW_LEVEL if slow else _LEVEL)
            parts["link"] = data * share / payload
        part = max(parts, key=lambda name: parts[name])
        return Bound(max(parts[part], 1e-3), part)

    def _share(self, image: Image, level: int) -> float:
        key = (image.name, level)
        if key not in self._shares:
            self._shares[key] = disk.compressed_share(image.path, level)
        return self._shares[key]
