"""`make bench`: measure the matrix of images, links and tools."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import click

from tests.bench import disk
from tests.bench.bound import Model
from tests.bench.images import Images
from tests.bench.links import SHAPES, Link
from tests.bench.report import Report, Row
from tests.bench.rig import Rig
from tests.bench.tools import TOOLS

_DIRECTORY = Path("build/bench")
_OURS = ("drover raw", "drover")
_ALL = tuple(TOOLS)
_SOME = ("rsync (Nova)", "qemu-img", "drover")
# (image, link, tools); hopeless pairs are left out by Tool.reads_holes.
_Cells = tuple[tuple[str, str, tuple[str, ...]], ...]
_FULL: _Cells = (
    ("os", "unshaped", _ALL),
    ("os", "gigabit", _ALL),
    ("os-part", "wan", _ALL),
    ("sparse", "unshaped", _ALL),
    ("sparse", "gigabit", _ALL),
    ("random", "unshaped", _ALL),
    ("random", "gigabit", (*_SOME, "drover raw")),
    ("zeros", "unshaped", _ALL),
    ("fragmented", "unshaped", _ALL),
    ("compressed", "unshaped", _ALL),
    ("huge", "unshaped", _ALL),
)
_QUICK: _Cells = (
    ("os", "unshaped", _SOME),
    ("os-part", "gigabit", _SOME),
    ("os-part", "wan", ("drover",)),
    ("random", "unshaped", ("qemu-img", *_OURS)),
    ("sparse", "unshaped", ("qemu-img", "drover")),
    ("huge", "unshaped", ("qemu-img", "drover")),
)


@click.command()
@click.option("--quick", is_flag=True, help="Only the main cells: under 6 minutes.")
@click.option("--image", "images", multiple=True, help="Only this image, over any link.")
@click.option(
    "--link",
    "links",
    multiple=True,
    type=click.Choice(list(SHAPES)),
    help="Only this link, for any image.",
)
@click.option("--tool", "tools", multiple=True, type=click.Choice(_ALL), help="Only this tool.")
@click.option("--keep", default=_DIRECTORY, type=click.Path(path_type=Path), show_default=True,
              help="Where images and results are kept.")  # fmt: skip
def main(
    quick: bool, images: tuple[str, ...], links: tuple[str, ...], tools: tuple[str, ...], keep: Path
) -> None:
    """Copy images with Drover and its peers over shaped links, and compare."""
    if os.geteuid() != 0:
        raise click.ClickException("network namespaces and cgroups need root")
    keep = keep.resolve()
    shelf = Images(keep / "images")
    rate = disk.copy_rate(shelf.get("random").path, keep / "scratch")
    model = Model(rate)
    report = Report(keep, _facts(rate))
    cells = _QUICK if quick else _FULL
    if images or links:
        pairs = itertools.product(images or shelf.names, links or SHAPES)
        cells = tuple((name, shape_name, _ALL) for name, shape_name in pairs)
    for name, shape_name, chosen in cells:
        image, shape = shelf.get(name), SHAPES[shape_name]
        with Link(shape) as link:
            rig = Rig(link, keep)
            for tool in (TOOLS[one] for one in chosen if not tools or one in tools):
                if tool.reads_holes and image.size_bytes > 64 * image.allocated_bytes:
                    continue  # it would read for an hour
                click.echo(f"{name}, {shape.name}: {tool.name}", nl=False)
                result = rig.measure(tool, image)
                click.echo(f" {result.durable_seconds:.1f} s, CPU {result.cpu_seconds:.1f} s")
                report.add(Row(image, shape, tool, result, model.bound(image, shape, result)))
    report.print()
    click.echo(f"{keep}/mover.json, {report.plot()}")


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
