"""How each image is made, always in the same way."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.bench import layers
from tests.bench.layers import GIB, MIB, SEED, run


class Shelf(Protocol):
    """Where recipes find what they are made of."""

    def file(self, name: str) -> Path:
        """The file of another image."""
        ...

    def system(self) -> Path:
        """A raw disk of 8 GiB with a real system's files."""
        ...


@dataclass(frozen=True)
class Recipe:
    """How an image is made; the other attributes are those of the image.

    Attributes:
        make: Makes it at this path, of what the shelf has.
        kept: It stays when its cells are done; what is made within seconds need not.
    """

    format: str
    about: str
    make: Callable[[Path, Shelf], None]
    replaced_by: str = ""
    alike: float = 1.0
    below: str = ""
    verbatim: bool = False
    shrinks: bool = True
    kept: bool = True


def make_system(path: Path) -> None:
    """A file system with the programs of this machine."""
    with path.open("wb") as file:
        file.truncate(8 * GIB)
    run("mkfs.ext4", "-q", "-F", "-d", "/usr", str(path))


def _os(path: Path, shelf: Shelf) -> None:
    run("qemu-img", "convert", "-O", "qcow2", str(shelf.system()), str(path))
    if path.stat().st_size < 4 * GIB:
        raise RuntimeError(f"{path} is under 4 GiB: /usr of this machine is too small")


def _os_part(size_bytes: int, *options: str) -> Callable[[Path, Shelf], None]:
    """Data out of the middle of the system, as qcow2."""

    def make(path: Path, shelf: Shelf) -> None:
        with tempfile.NamedTemporaryFile(dir=path.parent) as part:
            with shelf.system().open("rb") as source:
                source.seek(GIB)
                for _ in range(size_bytes // (8 * MIB)):
                    part.write(source.read(8 * MIB))
            part.flush()
            run("qemu-img", "convert", "-O", "qcow2", *options, part.name, str(path))

    return make


def _sparse(path: Path, shelf: Shelf) -> None:
    dice = random.Random(SEED)
    wanted = 16 * GIB // 10
    with path.open("wb") as out, shelf.system().open("rb") as source:
        out.truncate(16 * GIB)
        source.seek(GIB)
        while wanted > 0:
            length = dice.randint(16, 4096) * 4096
            out.seek(dice.randrange(16 * GIB // MIB - 16) * MIB)
            out.write(source.read(length))
            wanted -= length


def _random(path: Path, shelf: Shelf) -> None:
    with path.open("wb") as out:
        for _ in range(2 * GIB // (8 * MIB)):
            out.write(os.urandom(8 * MIB))


def _zeros(path: Path, shelf: Shelf) -> None:
    with path.open("wb") as out:
        for _ in range(4 * GIB // (8 * MIB)):
            out.write(bytes(8 * MIB))


def _fragmented(path: Path, shelf: Shelf) -> None:
    """Both the clusters in the image and the image on the disk lie anyhow."""
    run("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(GIB))
    layers.overwrite(path, shelf.system(), share=1.0)


def _huge(path: Path, shelf: Shelf) -> None:
    extents, size = 10_000, 1 << 40
    dice = random.Random(SEED)
    length = GIB // extents // 4096 * 4096
    with path.open("wb") as out:
        out.truncate(size)
        for slot in range(extents):
            room = size // extents // 4096
            start = (slot * room + dice.randrange(room - length // 4096)) * 4096
            out.seek(start)
            out.write(dice.randbytes(length // 2) + bytes([slot % 255 + 1]) * (length // 2))


def _overlay(path: Path, shelf: Shelf) -> None:
    layers.overlay(path, shelf.file("os-part"))
    layers.overwrite(path, shelf.system(), share=0.25)


def _luks(path: Path, shelf: Shelf) -> None:
    layers.encrypt(path, shelf.file("os-part"))


def _snapshots(path: Path, shelf: Shelf) -> None:
    layers.copy(shelf.file("os-part"), path)
    for number in range(3):
        run("qemu-img", "snapshot", "-c", f"s{number}", str(path))
        layers.overwrite(path, shelf.system(), share=0.05, seed=SEED + number)
    run("qemu-img", "bitmap", "--add", str(path), "b0")
    layers.overwrite(path, shelf.system(), share=0.05, seed=SEED + 3)
    layers.pad(path)


def _stale(share: float) -> Callable[[Path, Shelf], None]:
    def make(path: Path, shelf: Shelf) -> None:
        layers.copy(shelf.file("os-part"), path)
        layers.age(path, share)

    return make


_ZSTD = ("-c", "-o", "compression_type=zstd")
RECIPES = {
    "os": Recipe("qcow2", "files of a real system in ext4", _os),
    "os-part": Recipe("qcow2", "1 GiB of the above", _os_part(GIB)),
    "os-small": Recipe("qcow2", "16 MiB of the above", _os_part(16 * MIB), kept=False),
    "sparse": Recipe("raw", "16 GiB, 90 % holes, the rest as in os", _sparse),
    "random": Recipe("raw", "2 GiB that no codec can shrink", _random, shrinks=False),
    "zeros": Recipe("raw", "4 GiB of zeros, all allocated", _zeros),
    "fragmented": Recipe("qcow2", "1 GiB written in random order", _fragmented),
    "compressed": Recipe("qcow2", "2 GiB as in os, zstd clusters", _os_part(2 * GIB, *_ZSTD)),
    "huge": Recipe("raw", "1 TiB with 1 GiB of data in 10,000 places", _huge),
    "overlay": Recipe("qcow2", "256 MiB over os-part", _overlay, below="os-part", kept=False),
    "luks": Recipe(
        "qcow2", "os-part, encrypted", _luks, verbatim=True, shrinks=False, kept=False
    ),
    "snapshots": Recipe(
        "qcow2", "os-part with 3 snapshots and a bitmap", _snapshots, verbatim=True, kept=False
    ),
    "stale-1": Recipe(
        "qcow2", "os-part, 1 % of its blocks different", _stale(0.01),
        replaced_by="os-part", alike=0.99, kept=False,
    ),
    "stale-10": Recipe(
        "qcow2", "os-part, 10 % of its blocks different", _stale(0.10),
        replaced_by="os-part", alike=0.90, kept=False,
    ),
}  # fmt: skip
