"""Direct access to files: what the disk can do, and what is really in a file."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blake3
import zstandard

_MIB = 1 << 20
_SEGMENT_BLOCKS = 64
_THREADS = 4
_HUGE_PAGE = 2 * _MIB
_BLOCK = 4096
_ZERO = bytes(_MIB)


def fingerprint(path: Path) -> bytes:
    """A hash of length and content that shares no code with the mover.

    Holes and zeros are the same; both the length and the place of each MiB that
    is not zero count.
    """
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def of_blocks(blocks: list[int]) -> bytes:
        hasher = blake3.blake3()
        buffer = mmap.mmap(-1, _MIB)
        for block in blocks:
            length = os.preadv(descriptor, [buffer], block * _MIB)
            data = buffer[: min(length, size - block * _MIB)]
            if data != _ZERO[: len(data)]:
                hasher.update(block.to_bytes(8, "little") + data)
        return hasher.digest()

    try:
        segments: dict[int, list[int]] = {}
        for block in sorted(_data_blocks(descriptor, size)):
            segments.setdefault(block // _SEGMENT_BLOCKS, []).append(block)
        with ThreadPoolExecutor(_THREADS) as pool:
            parts = zip(segments, pool.map(of_blocks, segments.values()), strict=True)
            empty = blake3.blake3().digest()
            told = b"".join(
                segment.to_bytes(8, "little") + part for segment, part in parts if part != empty
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


def copy_seconds(source: Path, scratch: Path) -> float:
    """How long a local copy of a file's data takes that does nothing else, made durable.

    Both ends of the benchmark share one disk, so this is what it gives at best to a
    reader and a writer at once, for data that lies as it does in this file: the blocks
    are there before they are written, and the memory is in huge pages, so that a request
    is few pieces.
    """
    size = source.stat().st_size
    reading = os.open(source, os.O_RDONLY | os.O_DIRECT)
    writing = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o600)

    def copy(pieces: list[range]) -> None:
        buffer = _in_huge_page()
        for piece in pieces:
            memory = buffer[: -(-len(piece) // _BLOCK) * _BLOCK]
            os.preadv(reading, [memory], piece.start)
            os.pwritev(writing, [memory], piece.start)

    try:
        extents = list(_extents(reading, size))
        pieces = [
            range(at, min(at + _MIB, end))
            for start, end in extents
            for at in range(start, end, _MIB)
        ]
        began = time.monotonic()
        os.ftruncate(writing, size)
        for start, end in extents:
            os.posix_fallocate(writing, start, end - start)
        with ThreadPoolExecutor(_THREADS) as pool:
            starts = range(0, len(pieces), _SEGMENT_BLOCKS)
            list(pool.map(lambda at: copy(pieces[at : at + _SEGMENT_BLOCKS]), starts))
        os.fdatasync(writing)
        return time.monotonic() - began
    finally:
        os.close(reading)
        os.close(writing)
        scratch.unlink()


def _in_huge_page() -> memoryview:
    """A MiB of memory that is one piece for the disk, where the system has such."""
    memory = mmap.mmap(-1, 2 * _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _HUGE_PAGE
    buffer = memoryview(memory)[start : start + _MIB]
    buffer[:] = _ZERO
    return buffer


def _extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    at = 0
    while at < size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:
            return  # nothing but a hole up to the end
        at = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, at


def _data_blocks(descriptor: int, size: int) -> set[int]:
    """Numbers of the MiB that have data."""
    return {
        block
        for start, end in _extents(descriptor, size)
        for block in range(start // _MIB, -(-end // _MIB))
    }
