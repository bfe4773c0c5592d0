"""A copy that shall be made, and a tool that can."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.images import Image
from tests.bench.rig import Rig


@dataclass(frozen=True)
class Job:
    """What goes where.

    Attributes:
        image: What is copied.
        directory: Where its files go, under the names that they have.
        older: What the target has of it before the copy; None for nothing.
    """

    image: Image
    directory: Path
    older: Path | None = None

    @property
    def targets(self) -> list[Path]:
        """Where each file of it goes."""
        return [self.directory / file.name for file in self.image.files]

    @property
    def target(self) -> Path:
        """Where the image itself goes."""
        return self.directory / self.image.path.name


# Sets up servers and yields the command to time, to run on side a.
Prepare = Callable[[Rig, Job], AbstractContextManager[list[str]]]


@dataclass(frozen=True)
class Tool:
    """A way to copy an image.

    Attributes:
        name: As in the table.
        promises: What holds when it has ended: "tls" (or ssh) and "hash", an end
            to end check of the content.
        prepare: How it is run.
        reads_holes: It reads a hole byte by byte: hopeless on huge images.
        updates: It writes over the older copy that the target has, so that one has to
            have the name already; the others find it beside.
        adapts: How much it sends depends on how fast the link and the cores are just now.
    """

    name: str
    promises: frozenset[str]
    prepare: Prepare
    reads_holes: bool = False
    updates: bool = False
    adapts: bool = False
