"""What the promises of Drover cost on this machine that qemu-img does not make.

Drover encrypts and hashes; qemu-img without TLS does neither. So what is fair to
ask of Drover, where nothing can be compressed, is at most the CPU that qemu-img
takes plus what the bare ciphers and hashes of both ends take.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_GIGA = 10**9
_SAMPLE = 250 * 10**6  # bytes of each measurement
_ROUNDS = 5
_KEY_BITS = 256  # both ends of Drover's TLS agree on TLS_AES_256_GCM_SHA384
_RECORD, _TAG, _HEAD, _NONCE = 16384, 16, bytes(5), bytes(12)
_CHUNK = 1 << 20


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
