"""One tool in one cell of the matrix: its runs, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench.bound import Bound
from tests.bench.copying import Result
from tests.bench.job import Tool
from tests.bench.place import Place


@dataclass(frozen=True)
class Failure:
    """A tool that did not make its copy."""

    place: Place
    tool: Tool
    why: str

    def as_json(self) -> dict[str, Any]:
        """As in mover.json."""
        return {**self.place.as_json(), "tool": self.tool.name, "failed": self.why}


@dataclass(frozen=True)
class Run:
    """One copy, and the least time that it could have taken just then."""

    result: Result
    bound: Bound

    @property
    def over_bound(self) -> float:
        """How many times as long it took."""
        return self.result.durable_seconds / self.bound.seconds

    def as_json(self) -> dict[str, Any]:
        """As in mover.json."""
        return {
            **self.result.as_json(),
            "bound_seconds": self.bound.seconds,
            "bound_part": self.bound.part,
            "wall_over_bound": self.over_bound,
        }


@dataclass(frozen=True)
class Row:
    """A tool that did, once or several times."""

    place: Place
    tool: Tool
    runs: tuple[Run, ...]

    @property
    def typical(self) -> Result:
        """The run with the median time until durable, the lower one of two."""
        return _median(self.runs, lambda run: run.result.durable_seconds).result

    @property
    def nearest(self) -> Run:
        """The run with the median of how near each came to its bound."""
        return _median(self.runs, lambda run: run.over_bound)

    @property
    def spread(self) -> tuple[float, float]:
        """The shortest and the longest time until durable, in seconds."""
        seconds = [run.result.durable_seconds for run in self.runs]
        return min(seconds), max(seconds)

    @property
    def identical(self) -> bool:
        """Whether each run made a true copy."""
        return all(run.result.identical for run in self.runs)

    @property
    def cpu_seconds_per_gb(self) -> float:
        """CPU of both sides for each GB of the image's data."""
        return self.typical.cpu_seconds / (max(self.place.image.data_bytes, 1) / 1e9)

    @property
    def link_busy(self) -> float | None:
        """How much of the link's capacity was used; None when it has no limit."""
        mbit, result = self.place.shape.mbit_per_second, self.typical
        if mbit is None or result.carried_bytes is None:
            return None
        return result.carried_bytes / (mbit * 1e6 / 8 * result.wall_seconds)

    def as_json(self) -> dict[str, Any]:
        """As in mover.json: the typical run, and each."""
        return {
            **self.place.as_json(),
            "tool": self.tool.name,
            "promises": sorted(self.tool.promises),
            **self.typical.as_json(),
            "identical": self.identical,
            "bound_seconds": self.nearest.bound.seconds,
            "bound_part": self.nearest.bound.part,
            "wall_over_bound": self.nearest.over_bound,
            "link_busy": self.link_busy,
            "cpu_seconds_per_gb": self.cpu_seconds_per_gb,
            "runs": [run.as_json() for run in self.runs],
        }


def _median(runs: Sequence[Run], key: Callable[[Run], float]) -> Run:
    return sorted(runs, key=key)[(len(runs) - 1) // 2]
