"""Headers of qcow2 images: those that QEMU writes, broken ones, and any bytes.

The parser understands or refuses them: it raises its own error and no other, and what
it finds is possible.
"""

from __future__ import annotations

import os
import struct
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostd.disks.qcow2 import MAGIC, Qcow2Error, Qcow2Header, parse_header

# `make fuzz` asks for more.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))


def header(
    version: int = 3,
    backing: tuple[int, int] = (0, 0),
    cluster_bits: int = 16,
    size: int = 1 << 30,
    crypt: int = 0,
    snapshots: int = 0,
    incompatible: int = 0,
    length: int = 104,
    rest: bytes = b"",
) -> bytes:
    start = struct.pack(">4sIQIIQIIQQIIQ", MAGIC, version, *backing, cluster_bits, size, crypt,
                        0, 0, 0, 0, snapshots, 0)  # fmt: skip
    return start + struct.pack(">QQQII", incompatible, 0, 0, 4, length) + rest


u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
near = st.integers(0, 600)
headers = st.builds(
    header,
    version=st.sampled_from([2, 3]) | u32,
    backing=st.tuples(near | u64, near | u32),
    cluster_bits=st.integers(9, 21) | u32,
    size=u64,
    crypt=st.integers(0, 3) | u32,
    snapshots=u32,
    incompatible=st.integers(0, 31) | u64,
    length=st.sampled_from([104, 112]) | u32,
    rest=st.binary(max_size=512),
)


def looked_into(data: bytes) -> Qcow2Header | None:
    """What is found in a header, which is possible; None when it is refused."""
    try:
        found = parse_header(data)
    except Qcow2Error:
        return None
    assert 0 <= found.virtual_size_bytes < 1 << 63
    assert 9 <= found.cluster_bits <= 21
    for name in (found.backing_file, found.backing_format):
        assert name is None or (name and name.isprintable())
    return found


def test_the_headers_of_these_tests_are_real() -> None:
    found = looked_into(header(backing=(104, 4), rest=b"base"))
    assert found is not None
    assert (found.version, found.backing_file, found.virtual_size_bytes) == (3, "base", 1 << 30)


# First clusters that `qemu-img` has written (without the zeros at their ends, and with
# one flag set in the last three), and headers of which one thing is broken. What a
# fuzzer or a user finds is put there too, once it is mended.
CORPUS = Path(__file__).parent / "corpus" / "qcow2"
REAL = {path.name: path.read_bytes() for path in sorted((CORPUS / "real").iterdir())}
BROKEN = {path.name: path.read_bytes() for path in sorted((CORPUS / "broken").iterdir())}
PLAIN: dict[str, object] = {
    "version": 3, "cluster_bits": 16, "virtual_size_bytes": 1 << 30, "backing_file": None,
    "backing_format": None, "dirty": False, "corrupt": False, "data_file": False,
    "unknown_incompatible_bits": 0, "snapshot_count": 0, "encryption": "none",
}  # fmt: skip
# What else than PLAIN is said of them.
TOLD: dict[str, dict[str, object]] = {
    "v2": {"version": 2},
    "v3": {},
    "backing": {"virtual_size_bytes": 1 << 20, "backing_file": "base.raw", "backing_format": "raw"},
    "backing-v2": {"version": 2, "virtual_size_bytes": 5 << 20, "backing_format": "raw",
                   "backing_file": "nowhere/base.img"},
    "smallest-clusters": {"cluster_bits": 9, "virtual_size_bytes": 64 << 20},
    "largest-clusters": {"cluster_bits": 21, "virtual_size_bytes": 1 << 40},
    "extended-l2-zstd": {},
    "lazy-refcounts": {},
    "data-file": {"virtual_size_bytes": 1 << 20, "data_file": True},
    "luks": {"virtual_size_bytes": 1 << 20, "encryption": "luks"},
    "aes": {"virtual_size_bytes": 1 << 20, "encryption": "aes"},
    "snapshots": {"virtual_size_bytes": 1 << 20, "snapshot_count": 2},
    "bitmap": {"virtual_size_bytes": 1 << 20},
    "empty": {"virtual_size_bytes": 0},
    "not-closed": {"dirty": True},
    "corrupt": {"corrupt": True},
    "feature-of-the-future": {"unknown_incompatible_bits": 1 << 5},
}  # fmt: skip


def test_headers_that_qemu_writes_are_understood() -> None:
    assert sorted(REAL) == sorted(TOLD)
    for name, data in REAL.items():
        assert asdict(parse_header(data)) == PLAIN | TOLD[name], name


@pytest.mark.parametrize("name", BROKEN)
def test_headers_that_are_broken_in_one_place_are_refused(name: str) -> None:
    with pytest.raises(Qcow2Error):
        parse_header(BROKEN[name])


@given(
    st.sampled_from([*REAL.values(), *BROKEN.values()]),
    st.lists(st.tuples(st.integers(0, 639), st.binary(min_size=1, max_size=8)), max_size=3),
)
@settings(max_examples=EXAMPLES)
def test_any_change_to_them_is_understood_or_refused(
    data: bytes, changes: list[tuple[int, bytes]]
) -> None:
    for at, put in changes:
        data = data[:at] + put + data[at + len(put) :]
    looked_into(data)


@given(headers | st.binary(max_size=700) | st.binary(max_size=600).map(lambda b: MAGIC + b))
@settings(max_examples=EXAMPLES)
def test_a_qcow2_header_is_understood_or_refused(data: bytes) -> None:
    looked_into(data)


@given(headers, st.integers(0, 700))
@settings(max_examples=EXAMPLES)
def test_a_qcow2_header_cut_short_is_understood_or_refused(data: bytes, length: int) -> None:
    looked_into(data[:length])
