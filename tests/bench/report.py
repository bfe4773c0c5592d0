"""Results as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tests.bench import judge
from tests.bench.place import Place
from tests.bench.price import Moving, Price
from tests.bench.row import Failure, Row


class Report:
    """Everything measured so far; written anew after each copy."""

    def __init__(
        self, directory: Path, facts: dict[str, Any], price: Price, moving: Moving
    ) -> None:
        self._directory = directory
        self._facts = facts
        self._price = price
        self._moving = moving
        self._rows: list[Row] = []
        self._failures: list[Failure] = []

    def add(self, found: Row | Failure) -> None:
        """Note a result."""
        if isinstance(found, Row):
            self._rows.append(found)
        else:
            self._failures.append(found)
        measured = {
            "machine": self._facts,
            "promises_cpu_seconds_per_gb": asdict(self._price),
            "moving_cpu_seconds_per_gb": asdict(self._moving),
            "results": [
                {
                    **row.as_json(),
                    "sent_again_bytes": self._sent_again(row),
                    "fair": self._fair(row),
                }
                for row in self._rows
            ],
            "failures": [failure.as_json() for failure in self._failures],
        }
        (self._directory / "mover.json").write_text(json.dumps(measured, indent=1) + "\n")

    def print(self) -> None:
        """Show a table for each cell, the fastest first."""
        console = Console(width=180)
        for place in self._places():
            table = Table(
                title=f"{place.title} ({place.image.about})",
                title_justify="left",
                box=box.SIMPLE_HEAD,
            )
            table.add_column("tool", no_wrap=True)
            for name in _COLUMNS:
                table.add_column(name, justify="right")
            rows = self._of(place)
            base = next((row for row in rows if row.tool.name.startswith("rsync")), None)
            for row in sorted(rows, key=lambda row: row.typical.durable_seconds):
                table.add_row(*_cells(row, base, self._sent_again(row)))
            for failure in self._failures:
                if failure.place == place:
                    table.add_row(failure.tool.name, "failed")
            console.print(table)
            for row in rows:
                console.print(*self._words_on_price(row))

    def plot(self) -> Path:
        """Draw the time of each tool, a group of bars for each cell."""
        picture = self._directory / "mover.png"
        tools = list(dict.fromkeys(row.tool.name for row in self._rows))
        lines = [" ".join(["cell", *(f'"{tool}"' for tool in tools)])]
        for place in self._places():
            found = {row.tool.name: row.typical.durable_seconds for row in self._of(place)}
            cells = (f"{found[tool]:.2f}" if tool in found else "?" for tool in tools)
            label = place.title.replace(", ", "\\n")
            lines.append(" ".join([f'"{label}"', *cells]))
        data = self._directory / "mover.dat"
        data.write_text("\n".join(lines) + "\n")
        columns = ", ".join(
            f"'{data}' using {index}{':xtic(1)' if index == 2 else ''} title columnheader"
            for index in range(2, len(tools) + 2)
        )
        width = max(1500, 140 * len(lines))
        script = _PLOT.format(width, picture, columns)
        subprocess.run(["gnuplot"], input=script, text=True, check=True)
        return picture

    @property
    def faults(self) -> list[str]:
        """What is not as it should be, each with its cell and tool."""
        of_rows = [words for row in self._rows for words in judge.faults(row)]
        return of_rows + [words for one in self._failures if (words := judge.failed(one))]

    def _places(self) -> list[Place]:
        rows, failures = self._rows, self._failures
        return list(dict.fromkeys([one.place for one in rows] + [one.place for one in failures]))

    def _of(self, place: Place) -> list[Row]:
        return [row for row in self._rows if row.place == place]

    def _sent_again(self, row: Row) -> int | None:
        """What a killed copy put on the wire that one which is let alone does not.

        None for copies that were not killed, and for tools that never send the same twice.
        """
        if not row.place.cell.killed or row.tool.adapts:
            return None
        for other in self._rows:
            same = other.place.undisturbed == row.place.undisturbed and other.tool == row.tool
            if same and not other.place.cell.killed:
                return row.typical.wire_bytes - other.typical.wire_bytes
        return None

    def _fair(self, row: Row) -> dict[str, float] | None:
        """The CPU seconds a GB that a copy of Drover may take of what cannot shrink."""
        peer = [one for one in self._of(row.place) if one.tool.name == "qemu-img"]
        if row.place.image.shrinks or "hash" not in row.tool.promises or not peer:
            return None
        bare = peer[0].cpu_seconds_per_gb
        return {"qemu_img": bare, **asdict(self._price), "sum": bare + self._price.of_both}

    def _words_on_price(self, row: Row) -> list[str]:
        fair = self._fair(row)
        if fair is None:
            return []
        parts = "qemu-img {qemu_img:.2f} + TLS {tls:.2f} + BLAKE3 {hash:.2f} = {sum:.2f}"
        verdict = "at or below" if row.cpu_seconds_per_gb <= fair["sum"] else "ABOVE"
        own = f"{row.tool.name}: {row.cpu_seconds_per_gb:.2f} CPU s/GB"
        return [f"  {own}, {verdict} {parts.format(**fair)}"]


_COLUMNS = (
    "durable s", "min-max", "/ rsync", "/ bound", "limit", "CPU s", "CPU s/GB", "wire MB",
    "again MB", "link busy", "RSS a, b MB", "on disk MB", "cached MB", "identical",
)  # fmt: skip

_PLOT = """\
set terminal png size {},700
set output '{}'
set title 'Time until the copy is durable (seconds, logarithmic)'
set style data histograms
set style fill solid 0.9
set datafile missing '?'
set logscale y
set grid ytics
set key top right
set bmargin 6
plot {}
"""


def _cells(row: Row, base: Row | None, sent_again: int | None) -> list[str]:
    result, mega = row.typical, 1e6
    busy = row.link_busy
    ratio = result.durable_seconds / base.typical.durable_seconds if base else None
    promises = "" if "tls" in row.tool.promises else " (no TLS)"
    return [
        row.tool.name + promises,
        f"{result.durable_seconds:.1f}",
        "{:.1f}-{:.1f}".format(*row.spread) if len(row.runs) > 1 else "",
        f"{ratio:.2f}" if ratio is not None else "",
        f"{row.nearest.over_bound:.2f}",
        row.nearest.bound.part,
        f"{result.cpu_seconds:.1f}",
        f"{row.cpu_seconds_per_gb:.2f}",
        f"{result.wire_bytes / mega:.0f}",
        f"{sent_again / mega:.0f}" if sent_again is not None else "",
        f"{busy:.0%}" if busy is not None else "",
        f"{result.sender_rss_bytes / mega:.0f}, {result.receiver_rss_bytes / mega:.0f}",
        f"{result.allocated_bytes / mega:.0f}",
        f"{result.cached_bytes / mega:.0f}",
        "yes" if row.identical else "NO",
    ]
