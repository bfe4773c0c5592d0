"""What a target has already is not sent again, and is only read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd.v1 import job_pb2
from tests.hostd.fleet import KEPT, Guest, HostdHost, Mode, Move, TwoHosts
from tests.hostd.tiny import define, disk, emptied, make_image
from tests.lab.host import IMAGES

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

SIZE = 80 << 20


@pytest.fixture(autouse=True)
def nothing_left(fleet: TwoHosts) -> Iterator[None]:
    with emptied(fleet):
        yield


@pytest.fixture(scope="module")
def content() -> bytes:
    """What no compression makes smaller."""
    return os.urandom(SIZE)


def place(host: HostdHost, name: str, content: bytes) -> Path:
    path = host.host.path(f"{IMAGES}/{name}")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def overlay(host: HostdHost, name: str, base: str) -> Guest:
    """A machine whose disk is 1 MiB over a base image."""
    make_image(host, f"{name}.qcow2", backing=base)
    return define(host, name, disk(f"{name}.qcow2"))


def arrive(source: HostdHost, target: HostdHost, guest: Guest, saga_seq: int) -> job_pb2.Job:
    """Move a machine that is off for good; how it was copied."""
    move = Move(source, target, guest.uuid, saga_seq=saga_seq)
    move.prepare()
    move.stop(Mode.MODE_GRACEFUL)
    move.park()
    job = move.copy()
    move.build()
    move.confirm()
    return job


def sent(job: job_pb2.Job) -> int:
    """Bytes on the wire for the one large volume."""
    (receipt,) = (receipt for receipt in job.receipts if receipt.size_bytes == SIZE)
    return receipt.wire_bytes


@pytest.mark.parametrize("known_as", ["base.raw", "debian.raw"])
def test_a_base_image_that_is_there_is_not_sent(
    fleet: TwoHosts, content: bytes, known_as: str
) -> None:
    a, b = fleet["a"], fleet["b"]
    place(a, "base.raw", content)
    there = place(b, known_as, content)
    overlay(b, "other", known_as)
    before = there.stat()

    wire = sent(arrive(a, b, overlay(a, "web", "base.raw"), saga_seq=1))

    assert wire < SIZE // 500, f"{wire} bytes for what was there"
    assert b.host.path(f"{IMAGES}/base.raw").read_bytes() == content
    after = there.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_another_image_of_the_same_name_and_size_is_no_base(
    fleet: TwoHosts, content: bytes
) -> None:
    a, b = fleet["a"], fleet["b"]
    place(a, "base.raw", content)
    there = place(b, "base.raw", content[::-1])
    overlay(b, "other", "base.raw")

    assert sent(arrive(a, b, overlay(a, "web", "base.raw"), saga_seq=1)) > SIZE

    assert there.read_bytes() == content[::-1]
    (beside,) = (name for name in b.images() if name.startswith("base.raw.drover-"))
    assert b.host.path(f"{IMAGES}/{beside}").read_bytes() == content


def test_a_second_move_sends_what_has_changed_since_a_copy_was_kept(
    fleet: TwoHosts, content: bytes
) -> None:
    a, b = fleet["a"], fleet["b"]
    place(a, "web.raw", content)
    place(a, KEPT, content)
    web = define(a, "web", disk("web.raw", format_="raw"))
    assert sent(arrive(a, b, web, saga_seq=1)) > SIZE
    with b.host.path(f"{IMAGES}/web.raw").open("r+b") as file:
        for at in (5, 40, 70):
            file.seek(at << 20)
            file.write(b"changed")

    wire = sent(arrive(b, a, web, saga_seq=3))

    assert 3 * 65536 < wire < 3 * 65536 + SIZE // 500, f"{wire} bytes for three blocks"
    assert a.host.path(f"{IMAGES}/{KEPT}").read_bytes() == content
    assert a.host.path(f"{IMAGES}/web.raw").read_bytes() != content
    # The list of its hashes spares the next reading.
    assert a.host.path(f"{IMAGES}/kept/.copy.raw.dm-hashes").exists()
