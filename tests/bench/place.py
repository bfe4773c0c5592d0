"""A cell of the matrix with what its names stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.bench.images import Image
from tests.bench.links import Shape
from tests.bench.matrix import Cell


@dataclass(frozen=True)
class Place:
    """Where tools are compared.

    Attributes:
        cell: The names, and how it is measured.
        image: What is copied.
        shape: The link.
        older: What the target has before; None for nothing.
    """

    cell: Cell
    image: Image
    shape: Shape
    older: Image | None

    @property
    def title(self) -> str:
        """In a few words."""
        older = f", {self.older.name} at the target" if self.older else ""
        killed = ", killed halfway" if self.cell.killed else ""
        return f"{self.image.name}, {self.shape.name}{older}{killed}"

    @property
    def new_bytes(self) -> float:
        """What the target does not have yet of the image's data."""
        there = self.older.data_bytes * self.older.alike if self.older else 0
        return self.image.data_bytes - there

    @property
    def undisturbed(self) -> tuple[str, str, str]:
        """The same for this and for the cell in which nothing is killed."""
        return self.cell.image, self.cell.link, self.cell.older

    def as_json(self) -> dict[str, Any]:
        """As in mover.json."""
        return {
            "image": self.image.name,
            "image_size_bytes": self.image.size_bytes,
            "image_allocated_bytes": self.image.allocated_bytes,
            "link": self.shape.name,
            "older": self.cell.older,
            "killed": self.cell.killed,
        }
