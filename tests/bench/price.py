"""What a copy costs at least on this machine: to move bytes, and to keep promises.

Drover encrypts and hashes; qemu-img without TLS does neither. So what is fair to
ask of Drover, where nothing can be compressed, is at most the CPU that qemu-img
takes plus what the bare ciphers and hashes of both ends take. Moving bytes, from a disk,
through a socket and to a disk, nobody is spared.
"""

from __future__ import annotations

import mmap
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_GIGA = 10**9
_SAMPLE = 250 * 10**6  # bytes of each measurement
_ROUNDS = 5
_KEY_BITS = 256  # both ends of Drover's TLS agree on TLS_AES_256_GCM_SHA384
_RECORD, _TAG, _HEAD, _NONCE = 16384, 16, bytes(5), bytes(12)
_CHUNK = 1 << 20
_MOVED = 1 << 30  # bytes of each measurement of moving


@dataclass(frozen=True)
class Price:
    """CPU seconds for each GB of data, of both ends together.

    Attributes:
        tls: Encrypting it once and decrypting it once.
        hash: Hashing it with BLAKE3 at each end.
    """

    tls: float
    hash: float

    @property
    def of_both(self) -> float:
        """Of all promises."""
        return self.tls + self.hash


@dataclass(frozen=True)
class Moving:
    """CPU seconds for each GB that is moved, in large pieces and with no work on it.

    Attributes:
        socket: Through a TCP connection over loopback, both ends together.
        read: From a file, past the page cache.
        write: To a file whose blocks are there, past the page cache.
    """

    socket: float
    read: float
    write: float


def measure_moving(scratch: Path, sample: int = _MOVED) -> Moving:
    """Measure it, with a file at `scratch`, which is removed."""
    write, read = _of_file(scratch, sample)
    return Moving(socket=_of_socket(sample), read=read, write=write)


def measure() -> Price:
    """Measure it, on one core."""
    return Price(tls=_per_gigabyte(_sealer()), hash=_per_gigabyte(_hasher()))


def _per_gigabyte(work: Callable[[], int]) -> float:
    """CPU seconds for a GB, if each call works on as many bytes as it returns."""

    def once() -> float:
        done, began = 0, time.thread_time()
        while done < _SAMPLE:
            done += work()
        return (time.thread_time() - began) / done * _GIGA

    return statistics.median(once() for _ in range(_ROUNDS))


def _sealer() -> Callable[[], int]:
    """Makes a TLS record and opens it; up to a third of the time is that of the calls."""
    cipher = AESGCM(AESGCM.generate_key(_KEY_BITS))
    plain, sealed, opened = bytes(_RECORD), bytearray(_RECORD + _TAG), bytearray(_RECORD)

    def work() -> int:
        cipher.encrypt_into(_NONCE, plain, _HEAD, sealed)
        cipher.decrypt_into(_NONCE, sealed, _HEAD, opened)
        return _RECORD

    return work


def _hasher() -> Callable[[], int]:
    chunk = bytes(_CHUNK)

    def work() -> int:
        for _ in "ab":
            blake3.blake3(chunk).digest()
        return _CHUNK

    return work


def _of_socket(sample: int) -> float:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        sending = socket.create_connection(listening.getsockname())
        receiving, _ = listening.accept()
    with sending, receiving:
        reader = threading.Thread(target=_drain, args=(receiving, sample))
        reader.start()
        began = time.process_time()
        piece = bytes(_CHUNK)
        for _ in range(sample // _CHUNK):
            sending.sendall(piece)
        reader.join()
        return (time.process_time() - began) / sample * _GIGA


def _drain(receiving: socket.socket, sample: int) -> None:
    buffer = bytearray(_CHUNK)
    while sample > 0 and (count := receiving.recv_into(buffer)):
        sample -= count


def _of_file(scratch: Path, sample: int) -> tuple[float, float]:
    """Of writing it, and of reading it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DIRECT
    descriptor = os.open(scratch, flags, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, sample)
        memory = mmap.mmap(-1, _CHUNK)  # as aligned as direct I/O asks for
        memory.write(bytes([7]) * _CHUNK)

        def cost(work: Callable[[int, list[mmap.mmap], int], int]) -> float:
            began = time.process_time()
            for at in range(0, sample, _CHUNK):
                work(descriptor, [memory], at)
            return (time.process_time() - began) / sample * _GIGA

        return cost(os.pwritev), cost(os.preadv)
    finally:
        os.close(descriptor)
        scratch.unlink()
