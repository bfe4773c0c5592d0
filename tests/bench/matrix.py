"""The cells that are measured: what is copied, over which link, by which tools."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

ALL = ("rsync (Nova)", "scp (Nova)", "zstd | ssh", "nbdcopy", "qemu-img", "drover raw", "drover")
_SOME = ("rsync (Nova)", "qemu-img", "drover")
_FAR = ("rsync (Nova)", "zstd | ssh", "qemu-img", "drover")
_DELTA = ("rsync --inplace", "drover")
_RESUME = ("rsync --partial", "drover raw", "drover")


@dataclass(frozen=True)
class Cell:
    """One image over one link.

    Attributes:
        image, link: Their names.
        tools: Names of those that copy it; hopeless ones are left out by `Tool.reads_holes`.
        older: Name of an image that the target has before; empty for none.
        killed: The sender is killed halfway, and the same command run again.
        thrice: Names of the tools that are measured three times.
    """

    image: str
    link: str
    tools: tuple[str, ...]
    older: str = ""
    killed: bool = False
    thrice: tuple[str, ...] = ()

    @property
    def images(self) -> set[str]:
        """Names of all images that it needs."""
        return {self.image, self.older} - {""}

    def times(self, tool: str) -> int:
        """How often a tool is measured."""
        return 3 if tool in self.thrice else 1


FULL = (
    Cell("os", "unshaped", (*ALL, "qemu-img, TLS"), thrice=_SOME),
    Cell("os", "gigabit", ALL, thrice=("rsync (Nova)", "drover")),
    # What a copy costs beside its data.
    Cell("os-small", "unshaped", (*_SOME, "nbdcopy")),
    Cell("os-part", "wan", _FAR, thrice=("rsync (Nova)", "drover")),
    Cell("sparse", "unshaped", ALL),
    Cell("sparse", "gigabit", (*_SOME, "nbdcopy", "drover raw")),
    Cell("random", "unshaped", (*ALL, "qemu-img, TLS")),
    Cell("random", "gigabit", (*_SOME, "drover raw")),
    Cell("zeros", "unshaped", ALL),
    Cell("fragmented", "unshaped", ALL),
    Cell("compressed", "unshaped", ALL),
    Cell("huge", "unshaped", ALL),
    # One connection carries little there, so the peers get a small image.
    Cell("os-part", "loss", ("drover",)),
    Cell("os-small", "loss", ("rsync (Nova)", "drover")),
    Cell("os-small", "loss-bbr", ("rsync (Nova)", "drover")),
    Cell("os-part", "cut", ("qemu-img", "rsync, retried", "drover")),
    Cell("overlay", "gigabit", _SOME),
    Cell("overlay", "gigabit", _DELTA, older="os-part"),
    Cell("luks", "gigabit", _SOME),
    Cell("snapshots", "gigabit", _SOME),
    Cell("os-part", "gigabit", _DELTA, older="stale-1"),
    Cell("os-part", "unshaped", _DELTA, older="stale-1"),
    Cell("os-part", "gigabit", _DELTA, older="stale-10"),
    Cell("os-part", "unshaped", _DELTA, older="stale-10"),
    Cell("os-part", "gigabit", _RESUME),
    Cell("os-part", "gigabit", _RESUME, killed=True),
)
QUICK = (
    Cell("os", "unshaped", _SOME),
    Cell("os-small", "unshaped", _SOME),
    Cell("os-part", "gigabit", _SOME),
    Cell("os-part", "wan", ("drover",)),
    Cell("random", "unshaped", ("qemu-img", "drover raw", "drover")),
    Cell("sparse", "unshaped", ("qemu-img", "drover")),
    Cell("huge", "unshaped", ("qemu-img", "drover")),
)


def choose(
    cells: Iterable[Cell],
    images: tuple[str, ...],
    links: tuple[str, ...],
    tools: tuple[str, ...],
) -> list[Cell]:
    """The cells with one of these images, links and tools; no names stand for any.

    An image and a link that have no cell get one.
    """
    found = [
        replace(cell, tools=tuple(one for one in cell.tools if not tools or one in tools))
        for cell in cells
        if (not images or cell.image in images) and (not links or cell.link in links)
    ]
    found = [cell for cell in found if cell.tools]
    if found:
        return found
    return [Cell(*pair, tools or ALL) for pair in itertools.product(images, links)]
