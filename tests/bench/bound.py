"""The time that a copy takes at least on this machine, and which part says so.

Both ends share one disk and the cores, so: the disk must carry the data in and
out at once, the link what the target does not have of it, compressed, and the cores
what the tool itself spent.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tests.bench import disk
from tests.bench.copying import Result
from tests.bench.images import Image
from tests.bench.place import Place

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

    def __init__(self, scratch: Path) -> None:
        """Measure the disk by copies to `scratch`, which is removed each time."""
        self._scratch = scratch
        self._disk: dict[Path, float] = {}
        self._shares: dict[tuple[str, int], float] = {}

    def bound(self, place: Place, result: Result) -> Bound:
        """The bound of one copy."""
        parts = {
            "disk": sum(self.disk_seconds(file) for file in place.image.files),
            "cpu": result.cpu_seconds / (os.cpu_count() or 1),
        }
        payload = place.shape.payload_bytes_per_second
        if payload is not None:
            slow = (place.shape.mbit_per_second or 0) <= _SLOW_MBIT
            share = self._share(place.image, _SLOW_LEVEL if slow else _LEVEL)
            parts["link"] = place.new_bytes * share / payload
        part = max(parts, key=lambda name: parts[name])
        return Bound(max(parts[part], 1e-3), part)

    def forget_disk(self) -> None:
        """Measure the disk anew when it is asked for: others use it too, so what it
        gives changes within minutes."""
        self._disk.clear()

    def disk_seconds(self, file: Path) -> float:
        """What the disk needs for the data of a file, as it lies there."""
        if file not in self._disk:
            self._disk[file] = disk.copy_seconds(file, self._scratch)
        return self._disk[file]

    def _share(self, image: Image, level: int) -> float:
        key = (image.name, level)
        if key not in self._shares:
            self._shares[key] = disk.compressed_share(image.path, level)
        return self._shares[key]
