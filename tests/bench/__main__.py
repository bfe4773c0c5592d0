"""`make bench`: measure the matrix of images, links and tools."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from tests.bench import matrix, price
from tests.bench.bound import Model
from tests.bench.copying import Copying
from tests.bench.images import Images
from tests.bench.job import Tool
from tests.bench.links import SHAPES, Link
from tests.bench.place import Place
from tests.bench.recipes import RECIPES
from tests.bench.report import Report
from tests.bench.rig import Rig, ToolFailed
from tests.bench.row import Failure, Row, Run
from tests.bench.tools import TOOLS

_DIRECTORY = Path("build/bench")


@click.command()
@click.option("--quick", is_flag=True, help="Only the main cells, once: under 6 minutes.")
@click.option("--image", "images", multiple=True, type=click.Choice(list(RECIPES)),
              help="Only this image.")  # fmt: skip
@click.option(
    "--link", "links", multiple=True, type=click.Choice(list(SHAPES)), help="Only this link."
)
@click.option("--tool", "tools", multiple=True, type=click.Choice(list(TOOLS)),
              help="Only this tool.")  # fmt: skip
@click.option("--repeat", type=click.IntRange(min=1), metavar="N",
              help="Measure all N times.  [default: headlines 3 times, the rest once]")  # fmt: skip
@click.option("--keep", default=_DIRECTORY, type=click.Path(path_type=Path), show_default=True,
              help="Where images and results are kept.")  # fmt: skip
def main(
    quick: bool,
    images: tuple[str, ...],
    links: tuple[str, ...],
    tools: tuple[str, ...],
    repeat: int | None,
    keep: Path,
) -> None:
    """Copy images with Drover and its peers over shaped links, and compare.

    Options that name something choose among the cells of the matrix; what has no cell
    is measured when both image and link are named.
    """
    if os.geteuid() != 0:
        raise click.ClickException("network namespaces and cgroups need root")
    cells = matrix.choose(matrix.QUICK if quick else matrix.FULL, images, links, tools)
    if not cells:
        raise click.UsageError("no cell has these; name an image and a link")
    # Tools may keep their bytecode, as installed ones do: none compiles itself at each start.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and leave nothing behind
    keep = keep.resolve()
    bench = _Bench(keep, repeat)
    for number, cell in enumerate(cells, start=1):
        bench.measure(cell)
        bench.drop(cell.images - {name for later in cells[number:] for name in later.images})
    bench.report.print()
    click.echo(f"{keep}/mover.json, {bench.report.plot()}")
    if faults := bench.report.faults:
        raise click.ClickException("\n  ".join(["not all is as it should be:", *faults]))


class _Bench:
    """What is the same for all cells."""

    def __init__(self, keep: Path, repeat: int | None) -> None:
        self._keep, self._repeat = keep, repeat
        self._images = Images(keep / "images")
        cost, moving = price.measure(), price.measure_moving(keep / "scratch")
        self._model = Model(keep / "scratch", cost, moving)
        dense = self._images.get("random")
        rate = dense.data_bytes / self._model.disk_seconds(dense.path)
        self.report = Report(keep, _facts(rate), cost, moving)

    def measure(self, cell: matrix.Cell) -> None:
        """Measure each tool of a cell."""
        older = self._images.get(cell.older) if cell.older else None
        place = Place(cell, self._images.get(cell.image), SHAPES[cell.link], older)
        sparse = place.image.size_bytes > 64 * place.image.allocated_bytes
        with Link(place.shape) as link:
            copying = Copying(Rig(link, self._keep))
            for tool in (TOOLS[name] for name in cell.tools):
                if not (sparse and tool.reads_holes):  # it would read for an hour
                    self.report.add(self._row(copying, place, tool))

    def drop(self, names: set[str]) -> None:
        """Remove images that no cell needs any more."""
        for name in names:
            self._images.drop(name)

    def _row(self, copying: Copying, place: Place, tool: Tool) -> Row | Failure:
        is_unshaped = place.shape.mbit_per_second is None
        if is_unshaped:
            self._model.measure_disk(place.image)
        runs = []
        for _ in range(self._repeat or place.cell.times(tool.name)):
            click.echo(f"{place.title}: {tool.name}", nl=False)
            try:
                result = copying.measure(tool, place.image, place.older, place.cell.killed)
            except ToolFailed as failed:
                click.echo(f" FAILED: {failed}")
                return Failure(place, tool, str(failed))
            click.echo(f" {result.durable_seconds:.1f} s, CPU {result.cpu_seconds:.1f} s")
            if is_unshaped:
                self._model.measure_disk(place.image)
            runs.append(Run(result, self._model.bound(tool, place, result)))
        return Row(place, tool, tuple(runs))


def _facts(rate: float) -> dict[str, Any]:
    def version(*command: str) -> str:
        return subprocess.check_output(command, text=True, stderr=subprocess.STDOUT).split("\n")[0]

    return {
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "load": os.getloadavg()[0],
        "disk_copy_bytes_per_second": rate,
        "rsync": version("rsync", "--version"),
        "ssh": version("ssh", "-V"),
        "qemu": version("qemu-img", "--version"),
        "nbdcopy": version("nbdcopy", "--version"),
        "zstd": version("zstd", "--version"),
    }


if __name__ == "__main__":
    main()
