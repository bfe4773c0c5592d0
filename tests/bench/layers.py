"""What is done to qcow2 files after they were made: written over, layered, encrypted, aged."""

from __future__ import annotations

import random
import subprocess
import tempfile
from pathlib import Path

from tests.support import luks

MIB = 1 << 20
GIB = 1 << 30
SEED = 20  # of everything that is random here, so that two runs compare
_BLOCK = 65536
_MOST_PIECES = 4096


def run(*command: str) -> None:
    """Run a command that has nothing to say."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def copy(source: Path, path: Path) -> None:
    """A copy of a file, holes and all."""
    run("cp", "--sparse=always", "--reflink=auto", str(source), str(path))


def overwrite(path: Path, system: Path, share: float, seed: int = SEED) -> None:
    """Write a system's data to a share of the clusters of a GiB of disk, in random order."""
    dice = random.Random(seed)
    places = dice.sample(range(GIB // _BLOCK), int(GIB // _BLOCK * share))
    pieces = min(len(places), _MOST_PIECES)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        with system.open("rb") as source:
            source.seek(3 * GIB + (seed - SEED) * 256 * MIB)
            for piece in range(pieces):
                (Path(scratch) / str(piece)).write_bytes(source.read(_BLOCK))
        commands = "".join(
            f"write -q -s {scratch}/{number % pieces} {place * _BLOCK} {_BLOCK}\n"
            for number, place in enumerate(places)
        )
        command = ["qemu-io", "-f", "qcow2", "-n", str(path)]
        subprocess.run(command, input=commands, text=True, check=True, stdout=subprocess.DEVNULL)


def overlay(path: Path, below: Path) -> None:
    """An empty qcow2 over another in the same directory."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", below.name, str(path))


def encrypt(path: Path, source: Path) -> None:
    """The disk of a qcow2 in one that is encrypted by LUKS."""
    secret = ("--object", "secret,id=key,data=bench")
    key = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    luks.qemu_img("convert", *secret, "-O", "qcow2", "-o", key, str(source), str(path))
    pad(path)


def pad(path: Path) -> None:
    """Make the file as long as whole clusters, which it must be to be copied as a raw disk."""
    run("truncate", "--size=%64K", str(path))


def age(path: Path, share: float) -> None:
    """Put something else into a share of the blocks of a file."""
    dice = random.Random(SEED)
    blocks = path.stat().st_size // _BLOCK
    with path.open("r+b") as file:
        for block in dice.sample(range(blocks), int(blocks * share)):
            file.seek(block * _BLOCK)
            file.write(dice.randbytes(_BLOCK))
