"""The images that are copied: made once, kept, and remade when their recipe changes."""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
GIB = 1 << 30
_SEED = 20  # of everything that is random here, so that two runs compare


@dataclass(frozen=True)
class Image:
    """An image to copy.

    Attributes:
        name: Short name, for the table.
        format: "raw" or "qcow2", as QEMU calls it.
        path: The file.
        about: What is in it, in a few words.
    """

    name: str
    format: str
    path: Path
    about: str

    @property
    def size_bytes(self) -> int:
        """Length of the file."""
        return self.path.stat().st_size

    @property
    def allocated_bytes(self) -> int:
        """Bytes of disk that the file uses."""
        return self.path.stat().st_blocks * 512


class Images:
    """The images below one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._recipes: dict[str, tuple[str, str, Callable[[Path], None]]] = {
            "os": ("qcow2", "files of a real system in ext4", self._os),
            "os-part": ("qcow2", "1 GiB of the above", self._os_part),
            "sparse": ("raw", "16 GiB, 90 % holes, the rest as in os", self._sparse),
            "random": ("raw", "2 GiB that no codec can shrink", self._random),
            "zeros": ("raw", "4 GiB of zeros, all allocated", self._zeros),
            "fragmented": ("qcow2", "1 GiB written in random order", self._fragmented),
            "compressed": ("qcow2", "2 GiB as in os, zstd clusters", self._compressed),
            "huge": ("raw", "1 TiB with 1 GiB of data in 10,000 places", self._huge),
        }

    @property
    def names(self) -> list[str]:
        """All images that can be had."""
        return list(self._recipes)

    def get(self, name: str) -> Image:
        """An image, made if it is not there yet."""
        format_, about, make = self._recipes[name]
        path = self._directory / f"{name}.{format_}"
        if not path.exists():
            print(f"making image {name}: {about}", flush=True)
            unfinished = path.with_suffix(".new")
            unfinished.unlink(missing_ok=True)
            make(unfinished)
            _sync(unfinished)
            unfinished.rename(path)
        return Image(name, format_, path, about)

    def _os_raw(self) -> Path:
        path = self._directory / "os.raw"
        if not path.exists():
            unfinished = path.with_suffix(".new")
            with unfinished.open("wb") as file:
                file.truncate(8 * GIB)
            _run("mkfs.ext4", "-q", "-F", "-d", "/usr", str(unfinished))
            unfinished.rename(path)
        return path

    def _os(self, path: Path) -> None:
        _run("qemu-img", "convert", "-O", "qcow2", str(self._os_raw()), str(path))
        if path.stat().st_size < 4 * GIB:
            raise RuntimeError(f"{path} is under 4 GiB: /usr of this machine is too small")

    def _os_part(self, path: Path) -> None:
        with tempfile.NamedTemporaryFile(dir=self._directory) as part:
            self._cut(Path(part.name), GIB)
            _run("qemu-img", "convert", "-O", "qcow2", part.name, str(path))

    def _compressed(self, path: Path) -> None:
        codec = ("-c", "-o", "compression_type=zstd")
        with tempfile.NamedTemporaryFile(dir=self._directory) as part:
            self._cut(Path(part.name), 2 * GIB)
            _run("qemu-img", "convert", "-O", "qcow2", *codec, part.name, str(path))

    def _sparse(self, path: Path) -> None:
        dice = random.Random(_SEED)
        wanted = 16 * GIB // 10
        with path.open("wb") as out, self._os_raw().open("rb") as source:
            out.truncate(16 * GIB)
            source.seek(GIB)
            while wanted > 0:
                run = dice.randint(16, 4096) * 4096
                out.seek(dice.randrange(16 * GIB // MIB - 16) * MIB)
                out.write(source.read(run))
                wanted -= run

    def _random(self, path: Path) -> None:
        with path.open("wb") as out:
            for _ in range(2 * GIB // (8 * MIB)):
                out.write(os.urandom(8 * MIB))

    def _zeros(self, path: Path) -> None:
        with path.open("wb") as out:
            for _ in range(4 * GIB // (8 * MIB)):
                out.write(bytes(8 * MIB))

    def _fragmented(self, path: Path) -> None:
        """Both the clusters in the image and the image on the disk lie anyhow."""
        cluster, pieces = 65536, 512
        dice = random.Random(_SEED)
        order = list(range(GIB // cluster))
        dice.shuffle(order)
        with tempfile.TemporaryDirectory(dir=self._directory) as scratch:
            with self._os_raw().open("rb") as source:
                source.seek(GIB)
                for piece in range(pieces):
                    (Path(scratch) / str(piece)).write_bytes(source.read(cluster))
            commands = "".join(
                f"write -q -s {scratch}/{dice.randrange(pieces)} {at * cluster} {cluster}\n"
                for at in order
            )
            _run("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(GIB))
            command = ["qemu-io", "-f", "qcow2", "-n", str(path)]
            subprocess.run(
                command, input=commands, text=True, check=True, stdout=subprocess.DEVNULL
            )

    def _huge(self, path: Path) -> None:
        extents, size = 10_000, 1 << 40
        dice = random.Random(_SEED)
        length = GIB // extents // 4096 * 4096
        with path.open("wb") as out:
            out.truncate(size)
            for slot in range(extents):
                room = size // extents // 4096
                start = (slot * room + dice.randrange(room - length // 4096)) * 4096
                out.seek(start)
                out.write(dice.randbytes(length // 2) + bytes([slot % 255 + 1]) * (length // 2))

    def _cut(self, path: Path, size_bytes: int) -> None:
        """Take data out of the middle of the system image."""
        with self._os_raw().open("rb") as source, path.open("wb") as out:
            source.seek(GIB)
            for _ in range(size_bytes // (8 * MIB)):
                out.write(source.read(8 * MIB))


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
