"""Results as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tests.bench.bound import Bound
from tests.bench.images import Image
from tests.bench.links import Shape
from tests.bench.rig import Result
from tests.bench.tools import Tool


@dataclass(frozen=True)
class Row:
    """One tool in one cell of the matrix."""

    image: Image
    shape: Shape
    tool: Tool
    result: Result
    bound: Bound

    @property
    def link_busy(self) -> float | None:
        """How much of the link's capacity was used; None when it has no limit."""
        if self.shape.mbit_per_second is None or self.result.carried_bytes is None:
            return None
        capacity = self.shape.mbit_per_second * 1e6 / 8 * self.result.wall_seconds
        return self.result.carried_bytes / capacity

    def as_json(self) -> dict[str, Any]:
        """As in mover.json."""
        return {
            "image": self.image.name,
            "image_size_bytes": self.image.size_bytes,
            "image_allocated_bytes": self.image.allocated_bytes,
            "link": self.shape.name,
            "tool": self.tool.name,
            "promises": sorted(self.tool.promises),
            **self.result.as_json(),
            "bound_seconds": self.bound.seconds,
            "bound_part": self.bound.part,
            "wall_over_bound": self.result.durable_seconds / self.bound.seconds,
            "link_busy": self.link_busy,
        }


class Report:
    """Everything measured so far; written anew after each copy."""

    def __init__(self, directory: Path, facts: dict[str, Any]) -> None:
        self._directory = directory
        self._facts = facts
        self._rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Note a result."""
        self._rows.append(row)
        measured = {"machine": self._facts, "results": [row.as_json() for row in self._rows]}
        (self._directory / "mover.json").write_text(json.dumps(measured, indent=1) + "\n")

    def print(self) -> None:
        """Show a table for each cell, the fastest first."""
        console = Console(width=150)
        for image, shape in dict.fromkeys((row.image, row.shape) for row in self._rows):
            rows = [row for row in self._rows if (row.image, row.shape) == (image, shape)]
            title = f"{image.name} ({image.about}), {shape.name}"
            table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
            table.add_column("tool")
            for name in _COLUMNS:
                table.add_column(name, justify="right")
            base = [row for row in rows if row.tool.name.startswith("rsync")]
            for row in sorted(rows, key=lambda row: row.result.durable_seconds):
                table.add_row(*_cells(row, base[0] if base else None))
            console.print(table)

    def plot(self) -> Path:
        """Draw the time of each tool, a group of bars for each cell."""
        picture = self._directory / "mover.png"
        tools = list(dict.fromkeys(row.tool.name for row in self._rows))
        lines = [" ".join(["cell", *(f'"{tool}"' for tool in tools)])]
        for image, shape in dict.fromkeys((row.image, row.shape) for row in self._rows):
            found = {
                row.tool.name: f"{row.result.durable_seconds:.2f}"
                for row in self._rows
                if (row.image, row.shape) == (image, shape)
            }
            cells = (found.get(tool, "?") for tool in tools)
            lines.append(" ".join([f'"{image.name}\\n{shape.name}"', *cells]))
        data = self._directory / "mover.dat"
        data.write_text("\n".join(lines) + "\n")
        columns = ", ".join(
            f"'{data}' using {index}{':xtic(1)' if index == 2 else ''} title columnheader"
            for index in range(2, len(tools) + 2)
        )
        subprocess.run(["gnuplot"], input=_PLOT.format(picture, columns), text=True, check=True)
        return picture


_COLUMNS = ("durable s", "/ rsync", "/ bound", "limit", "CPU s", "CPU s/GB", "wire MB",
            "link busy", "RSS a, b MB", "on disk MB", "cached MB", "identical")  # fmt: skip

_PLOT = """\
set terminal png size 1500,700
set output '{}'
set title 'Time until the copy is durable (seconds, logarithmic)'
set style data histograms
set style fill solid 0.9
set datafile missing '?'
set logscale y
set grid ytics
set key top right
plot {}
"""


def _cells(row: Row, base: Row | None) -> list[str]:
    result, mega = row.result, 1e6
    moved = max(disk_bytes(row.image), 1)
    busy = row.link_busy
    ratio = result.durable_seconds / base.result.durable_seconds if base else None
    promises = "" if "tls" in row.tool.promises else " (no TLS)"
    return [
        row.tool.name + promises,
        f"{result.durable_seconds:.1f}",
        f"{ratio:.2f}" if ratio is not None else "",
        f"{result.durable_seconds / row.bound.seconds:.2f}",
        row.bound.part,
        f"{result.cpu_seconds:.1f}",
        f"{result.cpu_seconds / (moved / 1e9):.2f}",
        f"{result.wire_bytes / mega:.0f}",
        f"{busy:.0%}" if busy is not None else "",
        f"{result.sender_rss_bytes / mega:.0f}, {result.receiver_rss_bytes / mega:.0f}",
        f"{result.allocated_bytes / mega:.0f}",
        f"{result.cached_bytes / mega:.0f}",
        "yes" if result.identical else "NO",
    ]


def disk_bytes(image: Image) -> int:
    """What has to be read of an image at least."""
    return min(image.allocated_bytes, image.size_bytes)
