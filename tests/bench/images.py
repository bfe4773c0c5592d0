"""The images that are copied: made once, and kept as their recipes say."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.recipes import RECIPES, make_system


@dataclass(frozen=True)
class Image:
    """An image to copy, as it was when it was made.

    Attributes:
        name: Short name, for the table.
        format: "raw" or "qcow2", as QEMU calls it.
        path: The file.
        about: What is in it, in a few words.
        size_bytes: Length of all files of it.
        allocated_bytes: Bytes of disk that they use.
        replaced_by: Of what this is an older copy; itself when it is none.
        alike: How much of it is the same in that.
        below: The file that it is an overlay of; None when it needs none.
        verbatim: It has more in it than a guest sees: QEMU's tools have to copy it as
            if it were a raw disk, or lose something.
        shrinks: Whether a codec can make it smaller.
    """

    name: str
    format: str
    path: Path
    about: str
    size_bytes: int
    allocated_bytes: int
    replaced_by: Path
    alike: float = 1.0
    below: Path | None = None
    verbatim: bool = False
    shrinks: bool = True

    @property
    def files(self) -> tuple[Path, ...]:
        """All that has to be copied."""
        return (self.path,) if self.below is None else (self.path, self.below)

    @property
    def read_as(self) -> str:
        """The format by which QEMU's tools have to read it."""
        return "raw" if self.verbatim else self.format

    @property
    def data_bytes(self) -> int:
        """What has to be read at least."""
        return min(self.allocated_bytes, self.size_bytes)


class Images:
    """The images below one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> Image:
        """An image, made if it is not there yet."""
        recipe = RECIPES[name]
        path = self._path(name)
        below = self.file(recipe.below) if recipe.below else None
        if not path.exists():
            print(f"making image {name}: {recipe.about}", flush=True)
            self._make(path, lambda unfinished: recipe.make(unfinished, self))
        told = [file.stat() for file in (path, below) if file]
        return Image(
            name=name,
            format=recipe.format,
            path=path,
            about=recipe.about,
            size_bytes=sum(one.st_size for one in told),
            allocated_bytes=sum(one.st_blocks * 512 for one in told),
            replaced_by=self._path(recipe.replaced_by or name),
            alike=recipe.alike,
            below=below,
            verbatim=recipe.verbatim,
            shrinks=recipe.shrinks,
        )

    def file(self, name: str) -> Path:
        """The file of an image, made if it is not there yet."""
        return self.get(name).path

    def system(self) -> Path:
        """The raw disk with a real system's files that others are made of."""
        path = self.directory / "os.raw"
        if not path.exists():
            self._make(path, make_system)
        return path

    def drop(self, name: str) -> None:
        """Remove an image, unless making it again takes long."""
        if not RECIPES[name].kept:
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.{RECIPES[name].format}"

    def _make(self, path: Path, make: Callable[[Path], None]) -> None:
        unfinished = path.with_suffix(".new")
        unfinished.unlink(missing_ok=True)
        make(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.rename(path)
