"""Rows as a run would have made them, for tests of what is said about rows."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tests.bench.bound import Bound
from tests.bench.copying import Result
from tests.bench.images import Image
from tests.bench.job import Job, Tool
from tests.bench.links import SHAPES
from tests.bench.matrix import Cell
from tests.bench.place import Place
from tests.bench.rig import Rig
from tests.bench.row import Row, Run

GIGA = 10**9
MIB = 1 << 20


def _never(rig: Rig, job: Job) -> AbstractContextManager[list[str]]:
    raise AssertionError("nothing is copied here")


DROVER = Tool("drover", frozenset({"tls", "hash"}), _never)
RSYNC = Tool("rsync (Nova)", frozenset({"tls"}), _never)
BARE = Tool("qemu-img", frozenset(), _never)


def place(link: str = "unshaped", *, allocated: int = GIGA, size: int = 2 * GIGA) -> Place:
    """A cell with an image of a GB of data, and nothing at the target."""
    path = Path("disk.raw")
    image = Image("disk", "raw", path, "a sample", size, allocated, path)
    return Place(Cell("disk", link, ("drover",)), image, SHAPES[link], None)


def result(**told: Any) -> Result:
    """A good copy in a second; what is told is otherwise."""
    good: dict[str, Any] = {
        "wall_seconds": 1.0, "durable_seconds": 1.0, "cpu_seconds": 2.0,
        "sender_cpu_seconds": 1.0, "receiver_cpu_seconds": 1.0, "wire_bytes": GIGA,
        "carried_bytes": None, "sender_rss_bytes": 100 * MIB, "receiver_rss_bytes": 100 * MIB,
        "allocated_bytes": GIGA, "cached_bytes": 0, "identical": True,
    }  # fmt: skip
    return Result(**(good | told))


def row(*results: Result, tool: Tool = DROVER, at: Place | None = None) -> Row:
    """A row of these copies."""
    runs = tuple(Run(one, Bound(1.0, "disk")) for one in results)
    return Row(at or place(), tool, runs)
