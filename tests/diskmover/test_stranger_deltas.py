"""Copies that go on, build on an older one or are mended, with a stranger at one end."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.diskmover import qemu, stranger, tool
from tests.diskmover.conftest import Certs
from tests.diskmover.stranger import frames
from tests.diskmover.stranger.frames import DATA, DIRTY, HASHES, PATCH, WANT, ZEROS, Frame
from tests.diskmover.stranger.state import CLOSED, PARTIAL, ZERO_RUN, read_dirty
from tests.diskmover.strangers import CHUNKS, MIB, Stranger, disk, kinds, sent_to_a_stranger, write
from tests.diskmover.tool import Serve


@pytest.fixture(scope="module")
def updating(certs: Certs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """A receiver that brings copies up to date, and has a template."""
    root = tmp_path_factory.mktemp("updated")
    disk(root / "template")
    running = Serve(root, certs.options("b"), options=["--update", "--seed", "template"])
    yield running
    assert running.stop() == 0


def change(source: Path) -> None:
    """Change a piece in three chunks; one becomes zero, one is in the last and short one."""
    write(source, 66 * MIB + 5 * 65536 + 1, b"changed")
    write(source, 129 * MIB, bytes(65536))
    write(source, (CHUNKS - 1) * MIB + 66_000, b"the end")


# What has to be brought of it: of zeros nothing, wherever they are.
CHANGED = {66: 1 << 5, CHUNKS - 1: 1 << 1}


def wanted(heard: list[Frame]) -> dict[int, int]:
    """The pieces that were asked for, by chunk."""
    asked = (frame for frame in heard if frame.kind == WANT)
    return {frame.offset // MIB: struct.unpack("<H", frame.payload)[0] for frame in asked}


def chunks_of(heard: list[Frame], *kinds: int) -> list[int]:
    """The chunks that frames of content, or others, were about, each as often as it came."""
    content = (frame for frame in heard if frame.kind in (kinds or frames.CONTENT))
    return sorted(
        number
        for frame in content
        for number in range(frame.offset // MIB, -(-(frame.offset + frame.length) // MIB))
    )


# --- a stranger that sends ------------------------------------------------------


def test_a_stranger_goes_on(serve: Serve, certs: Certs, tmp_path: Path) -> None:
    peer = Stranger(serve, certs, disk(tmp_path / "goes-on"))
    with closing((first := peer.opens()).wire):
        first.bring([*range(128), 129, 133, 136])
    assert not peer.target.exists()
    with closing((second := peer.opens()).wire):
        assert sorted(second.known.kinds) == [CLOSED, PARTIAL, ZERO_RUN]
        assert set(second.known.segments) == {0, 1}
        assert set(second.known.chunks) == {129, 133, 136}
        assert second.known.data_bytes == 10 * MIB
        second.bring()
        receipt = second.finish()
    assert kinds(second.wire.sent) == {DATA: 5, ZEROS: 9}
    assert peer.is_right(second, receipt)
    with closing((third := peer.opens()).wire):
        assert third.published == receipt


@pytest.mark.parametrize("older", ["a part", "a template"])
def test_a_stranger_sends_what_the_older_content_does_not_have(
    older: str, serve: Serve, updating: Serve, certs: Certs, tmp_path: Path
) -> None:
    at = serve if older == "a part" else updating
    peer = Stranger(at, certs, disk(tmp_path / "older"))
    if older == "a part":
        with closing((first := peer.opens()).wire):
            first.bring()
    change(peer.source)
    with closing((second := peer.opens(changed=2)).wire):
        assert second.known.kinds == []
        assert second.older_bytes == peer.source.stat().st_size
        second.bring()
        receipt = second.finish()
    assert kinds(second.wire.sent) == {ZEROS: 130, HASHES: 15, PATCH: 2}
    assert wanted(second.wire.heard) == CHANGED
    assert frames.content_bytes(second.wire.sent) < 100_000
    assert peer.is_right(second, receipt)


@pytest.mark.parametrize("touched", [False, True])
def test_a_stranger_sends_what_has_changed_since(
    touched: bool, updating: Serve, certs: Certs, tmp_path: Path
) -> None:
    peer = Stranger(updating, certs, disk(tmp_path / f"since-{touched}"))
    with closing((first := peer.opens()).wire):
        first.bring()
        digest = str(first.finish()["digest"])
    if touched:
        write(peer.target, 40 * MIB, b"somebody else's")
    change(peer.source)
    dirty = {66, 129, CHUNKS - 1}
    with closing((second := peer.opens(changed=2, since=(digest, dirty))).wire):
        clean = {number for number in range(CHUNKS) if second.known.has(number)}
        assert clean == (set() if touched else set(range(CHUNKS)) - dirty)
        assert second.older_bytes == peer.source.stat().st_size
        second.bring()
        receipt = second.finish()
    sent = {ZEROS: 130, HASHES: 15, PATCH: 2} if touched else {HASHES: 3, PATCH: 2}
    assert kinds(second.wire.sent) == sent
    assert wanted(second.wire.heard) == CHANGED
    assert peer.is_right(second, receipt)


def test_a_stranger_is_asked_again_for_what_came_corrupt(
    updating: Serve, certs: Certs, tmp_path: Path
) -> None:
    peer = Stranger(updating, certs, disk(tmp_path / "mended"))
    change(peer.source)
    with closing((sender := peer.opens()).wire):
        # Zeros, hashes of what is there, and hashes, then a patch, of what is not.
        sender.spoil = {3: 3, 65: 1, 66: 2}
        sender.bring()
        receipt = sender.finish()
    assert kinds(sender.wire.sent) == {ZEROS: 133, HASHES: 15, PATCH: 3, DATA: 1}
    assert wanted(sender.wire.heard) == CHANGED | dict.fromkeys(sender.spoil, 0xFFFF)
    assert peer.is_right(sender, receipt)


def test_a_stranger_who_spoils_all_is_not_asked_for_ever(
    serve: Serve, certs: Certs, tmp_path: Path
) -> None:
    peer = Stranger(serve, certs, disk(tmp_path / "spoilt"))
    with closing((sender := peer.opens()).wire):
        sender.spoil = {64: 4}
        with pytest.raises(stranger.Told) as told:
            sender.bring([64])
    assert (told.value.code, told.value.offset) == (frames.CHUNK_CORRUPT, 64 * MIB)
    assert kinds(sender.wire.sent) == {DATA: 4}


# --- a stranger that receives ---------------------------------------------------


def test_a_push_goes_on_at_a_stranger(certs: Certs, tmp_path: Path) -> None:
    source = disk(tmp_path / "disk")
    stopped, volume, _ = sent_to_a_stranger(certs, source, at_most=15)
    assert (stopped.code, stopped.error["code"]) == (5, "CANCELLED")
    done = set(volume.done)
    pushed, volume, wire = sent_to_a_stranger(certs, source, volume=volume)
    assert chunks_of(wire.heard) == sorted(set(range(CHUNKS)) - done)
    assert pushed.receipt["digest"] == stranger.digest_of(source)
    assert volume.content == source.read_bytes()


def test_a_push_is_answered_by_a_strangers_receipt(certs: Certs, tmp_path: Path) -> None:
    source = tool.noise(tmp_path / "disk", 3 * MIB + 5)
    pushed, volume, _ = sent_to_a_stranger(certs, source)
    again, volume, wire = sent_to_a_stranger(certs, source, volume=volume)
    assert again.receipt == pushed.receipt
    write(source, MIB, b"changed")
    other, _, _ = sent_to_a_stranger(certs, source, volume=volume)
    assert (other.code, other.error["code"]) == (1, "TARGET_EXISTS")
    assert kinds(wire.heard) == {}


def test_a_push_sends_what_a_stranger_does_not_have(certs: Certs, tmp_path: Path) -> None:
    source = disk(tmp_path / "disk")
    volume = stranger.Volume(content=bytearray(source.read_bytes()), older=True)
    change(source)
    pushed, volume, wire = sent_to_a_stranger(certs, source, volume=volume)
    assert (kinds(wire.heard)[HASHES], kinds(wire.heard)[PATCH]) == (15, 2)
    assert wanted(wire.sent) == CHANGED
    assert pushed.receipt["wire_bytes"] == frames.content_bytes(wire.heard) < 100_000
    assert pushed.receipt["digest"] == stranger.digest_of(source)
    assert volume.content == source.read_bytes()


def test_a_push_sends_what_has_changed_since_to_a_stranger(certs: Certs, tmp_path: Path) -> None:
    image, got = qemu.create(tmp_path / "disk.qcow2", 145 * MIB), tmp_path / "got"
    qemu.write(image, "write -P 1 64M 8M", "write -P 2 128M 6M")
    with qemu.export(image, tmp_path / "s") as address:
        first, volume, _ = sent_to_a_stranger(certs, "--nbd", address, "--name", "disk")
    qemu.run("qemu-img", "bitmap", "--add", "-f", "qcow2", image, "b0")
    qemu.write(image, "write -P 9 66M 64k", "write -z 129M 1M", "write -P 8 144M 64k")
    since = ["--bitmap", "b0", "--since", first.receipt["digest"]]
    volume = stranger.Volume(content=volume.content, older=True)
    with qemu.export(image, tmp_path / "s", "--bitmap=b0") as address:
        options = ["--nbd", address, "--name", "disk", *since]
        pushed, volume, wire = sent_to_a_stranger(certs, *options, volume=volume)
    told = [read_dirty(frame.payload) for frame in wire.heard if frame.kind == DIRTY]
    assert told == [(bytes.fromhex(first.receipt["digest"]), {66, 129, 144})]
    assert sorted(kinds(wire.heard).items()) == [(ZEROS, 1), (HASHES, 2), (PATCH, 2)]
    assert wanted(wire.sent) == {66: 1, 144: 1}
    got.write_bytes(volume.content)
    qemu.compare(image, "qcow2", got, "raw")
    assert pushed.receipt["digest"] == stranger.digest_of(got)


def test_a_push_brings_again_what_a_stranger_calls_corrupt(certs: Certs, tmp_path: Path) -> None:
    source = disk(tmp_path / "disk")
    pushed, volume, wire = sent_to_a_stranger(certs, source, corrupt=2)
    asked = [frame for frame in wire.sent if frame.kind == WANT]
    assert len(asked) == 2
    assert chunks_of(wire.heard) == sorted([*range(CHUNKS), *chunks_of(asked, WANT)])
    assert "came corrupt" in pushed.err
    assert pushed.receipt["wire_bytes"] == frames.content_bytes(wire.heard)
    assert volume.content == source.read_bytes()
