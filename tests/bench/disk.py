"""Direct access to files: what the disk can do, and what is really in a file."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blake3
import zstandard

_MIB = 1 << 20
_SEGMENT = 64 * _MIB
_THREADS = 4
_ZERO = bytes(_MIB)


def fingerprint(path: Path) -> bytes:
    """A hash of length and content that shares no code with the mover.

    Holes and zeros are the same; both the length and the place of each MiB that
    is not zero count.
    """
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def of_segment(start: int) -> bytes:
        hasher = blake3.blake3()
        for offset, data in _blocks(descriptor, start, min(start + _SEGMENT, size)):
            if data != _ZERO[: len(data)]:
                hasher.update(offset.to_bytes(8, "little") + data)
        return hasher.digest()

    try:
        starts = sorted({at // _SEGMENT * _SEGMENT for at in _data_places(descriptor, size)})
        with ThreadPoolExecutor(_THREADS) as pool:
            parts = zip(starts, pool.map(of_segment, starts), strict=True)
            empty = blake3.blake3().digest()
            told = b"".join(
                start.to_bytes(8, "little") + part for start, part in parts if part != empty
            )
    finally:
        os.close(descriptor)
    return blake3.blake3(size.to_bytes(8, "little") + told).digest()


def data_bytes(path: Path) -> int:
    """Bytes in the extents that the file system says are data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return sum(end - start for start, end in _extents(descriptor, path.stat().st_size))
    finally:
        os.close(descriptor)


def compressed_share(path: Path, level: int) -> float:
    """The part that is left of the data of a file at this zstd level, by samples."""
    size = path.stat().st_size
    codec = zstandard.ZstdCompressor(level=level)
    descriptor = os.open(path, os.O_RDONLY)
    before = after = 0
    try:
        extents = list(_extents(descriptor, size))
        total = sum(end - start for start, end in extents)
        step, due, passed = max(total // 128, 1), 0, 0
        for start, end in extents:
            while due < passed + end - start:
                sample = os.pread(descriptor, _MIB, start + due - passed)
                before += len(sample)
                if sample != _ZERO[: len(sample)]:
                    after += min(len(codec.compress(sample)), len(sample))
                due += step
            passed += end - start
    finally:
        os.close(descriptor)
    return after / before if before else 0.0


def copy_rate(source: Path, scratch: Path, size_bytes: int = 1 << 30) -> float:
    """Bytes a second of a local copy that does nothing else, made durable.

    Both ends of the benchmark share one disk, so this is what it gives at best
    to a reader and a writer at once.
    """
    reading = os.open(source, os.O_RDONLY | os.O_DIRECT)
    writing = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o600)

    def copy(start: int) -> None:
        buffer = mmap.mmap(-1, _MIB)
        for at in range(start, start + _SEGMENT, _MIB):
            os.preadv(reading, [buffer], at)
            os.pwritev(writing, [buffer], at)

    try:
        os.ftruncate(writing, size_bytes)
        began = time.monotonic()
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(copy, range(0, size_bytes, _SEGMENT)))
        os.fdatasync(writing)
        return size_bytes / (time.monotonic() - began)
    finally:
        os.close(reading)
        os.close(writing)
        scratch.unlink()


def _blocks(descriptor: int, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    buffer = mmap.mmap(-1, _MIB)
    for offset in range(start, end, _MIB):
        length = os.preadv(descriptor, [buffer], offset)
        yield offset, buffer[: min(length, end - offset)]


def _extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    at = 0
    while at < size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:
            return  # nothing but a hole up to the end
        at = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, at


def _data_places(descriptor: int, size: int) -> Iterator[int]:
    for start, end in _extents(descriptor, size):
        yield from range(start, end, _SEGMENT)
        yield end - 1
