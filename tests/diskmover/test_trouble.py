"""Processes killed, disks full, files in the way: what a user sees, and what is left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.diskmover import stranger, tool
from tests.diskmover.conftest import Certs
from tests.diskmover.tool import Running, Serve, durable_bytes

MIB = 1 << 20
SIZE = 64 * MIB
LIMIT = "10M"  # slow enough to be caught in the middle on a busy machine
SNAIL = "2M"  # for what is stopped in the middle anyway
SOME = 16 * MIB


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tool.noise(tmp_path_factory.mktemp("source") / "disk", SIZE)


def _push(serve: Serve, certs: Certs, source: Path, name: str) -> list[str | Path]:
    return [source, "--to", serve.address, "--name", name, "--json", *certs.options("a")]


def test_a_killed_sender_is_gone_on_from(serve: Serve, certs: Certs, disk: Path) -> None:
    job = _push(serve, certs, disk, "killed-sender")
    first = Running(*job, "--limit", LIMIT)
    tool.eventually("some is durable", lambda: durable_bytes(serve.root, "killed-sender") >= SOME)
    first.send(signal.SIGKILL)
    assert first.ended().code == -signal.SIGKILL
    assert not (serve.root / "killed-sender").exists()
    receipt = tool.push_when_free(*job).receipt
    assert tool.same(disk, serve.root / "killed-sender")
    assert receipt["digest"] == stranger.digest_of(disk)
    assert receipt["wire_bytes"] <= SIZE - SOME + MIB, "what was durable was sent again"


def test_a_killed_receiver_is_gone_on_from_by_the_same_command(
    certs: Certs, disk: Path, tmp_path: Path
) -> None:
    serve = Serve(tmp_path, certs.options("b"))
    job = Running(*_push(serve, certs, disk, "disk"), "--limit", LIMIT)
    tool.eventually("some is durable", lambda: durable_bytes(tmp_path, "disk") >= SOME)
    serve.kill()
    again = Serve(tmp_path, certs.options("b"), serve.address)
    receipt = job.ended().receipt
    assert tool.same(disk, tmp_path / "disk")
    assert receipt["digest"] == stranger.digest_of(disk)
    assert receipt["wire_bytes"] <= SIZE - SOME + MIB, "what was durable was sent again"
    assert again.stop() == 0


def test_a_receiver_that_stays_away_is_told_as_out_of_reach(
    certs: Certs, disk: Path, tmp_path: Path
) -> None:
    serve = Serve(tmp_path, certs.options("b"))
    job = Running(*_push(serve, certs, disk, "disk"), "--limit", LIMIT, "--retry-for", "1")
    tool.eventually("something arrives", lambda: tool.arrived_bytes(tmp_path, "disk") > MIB)
    serve.kill()
    ended = job.ended()
    assert ended.code == 5
    assert ended.error["code"] == "LINK_LOST"
    assert ended.error["retryable"]
    assert not (tmp_path / "disk").exists()


def test_an_interrupted_push_cancels_and_goes_on_later(
    serve: Serve, certs: Certs, disk: Path
) -> None:
    job = _push(serve, certs, disk, "interrupted")
    first = Running(*job, "--limit", SNAIL)
    tool.eventually(
        "some of it is durable", lambda: durable_bytes(serve.root, "interrupted") >= 4 * MIB
    )
    first.send(signal.SIGINT)
    ended = first.ended()
    assert ended.code == 130, ended
    assert "the same command goes on" in ended.err
    assert not (serve.root / "interrupted").exists()
    assert tool.push_when_free(*job).receipt["wire_bytes"] < SIZE - 3 * MIB
    assert tool.same(disk, serve.root / "interrupted")


def test_a_program_that_closes_the_output_ends_the_push(
    serve: Serve, certs: Certs, disk: Path
) -> None:
    job = Running(*_push(serve, certs, disk, "unread"), "--limit", SNAIL)
    assert json.loads(job.next_line())["progress"]
    job.stop_reading()
    ended = job.ended()
    assert ended.code == 5, ended
    assert ended.err == (
        "diskmover: nobody reads its output any more; the same command goes on from here\n"
    )


def test_a_second_push_of_the_same_file_meanwhile_is_refused(
    serve: Serve, certs: Certs, disk: Path
) -> None:
    job = _push(serve, certs, disk, "twice")
    first = Running(*job, "--limit", SNAIL)
    tool.eventually("it is under way", lambda: tool.arrived_bytes(serve.root, "twice") > 0)
    second = tool.run("push", *job)
    assert (second.code, second.error["code"]) == (5, "TARGET_BUSY")
    first.send(signal.SIGINT)
    first.ended()


def test_a_source_that_is_written_meanwhile_is_copied_as_it_is_in_the_end(
    serve: Serve, certs: Certs, tmp_path: Path
) -> None:
    source = tool.noise(tmp_path / "moving", 24 * MIB)
    job = Running(*_push(serve, certs, source, "moving"), "--limit", LIMIT)
    tool.eventually("it is under way", lambda: tool.arrived_bytes(serve.root, "moving") > 0)
    with source.open("r+b") as file:
        file.write(b"!")
    ended = job.ended()
    assert ended.code == 0, ended.err
    assert ended.receipt["digest"] == stranger.digest_of(source)
    assert tool.same(source, serve.root / "moving")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 48 MiB."""
    image, root = tmp_path / "small.img", tmp_path / "small"
    image.touch()
    subprocess.run(["truncate", "-s", "48M", image], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    root.mkdir()
    subprocess.run(["mount", "-o", "loop", image, root], check=True)
    yield root
    subprocess.run(["umount", root], check=True)


def test_a_full_disk_is_told_and_the_same_command_goes_on_when_there_is_space(
    certs: Certs, tmp_path: Path, small_disk: Path
) -> None:
    """The room that the error asks for is enough, and not more than what is missing."""
    source = tool.noise(tmp_path / "disk", 32 * MIB)
    ballast = tool.noise(small_disk / "ballast", 20 * MIB)
    serve = Serve(small_disk, certs.options("b"))
    try:
        job = _push(serve, certs, source, "disk")
        full = tool.run("push", *job)
        assert (full.code, full.error["code"], full.error["side"]) == (1, "NO_SPACE", "receiver")
        assert "free space there" in full.err
        assert full.error["offset"] is not None
        assert not (small_disk / "disk").exists()
        told = re.search(r"\(up to (\d+) bytes are still to come\)", full.error["message"])
        assert told, full.error
        needed = int(told[1])
        assert 32 * MIB - tool.arrived_bytes(small_disk, "disk") <= needed
        assert needed <= 32 * MIB - durable_bytes(small_disk, "disk")
        free = os.statvfs(small_disk)
        more = needed + MIB - free.f_bavail * free.f_frsize  # a MiB for what is no data
        os.truncate(ballast, 20 * MIB - more)
        receipt = tool.push_when_free(*job).receipt
        assert receipt["digest"] == stranger.digest_of(source)
        assert receipt["wire_bytes"] < 30 * MIB, "nothing of the first attempt was used"
        assert tool.same(source, small_disk / "disk")
    finally:
        assert serve.stop() == 0


def test_nothing_is_ever_replaced(serve: Serve, certs: Certs, tmp_path: Path) -> None:
    source = tool.noise(tmp_path / "new", 1000)
    (serve.root / "taken").write_bytes(b"precious")
    refused = tool.run("push", *_push(serve, certs, source, "taken"))
    assert (refused.code, refused.error["code"]) == (1, "TARGET_EXISTS")
    assert (serve.root / "taken").read_bytes() == b"precious"


def test_a_repeated_push_is_answered_without_sending(
    serve: Serve, certs: Certs, tmp_path: Path
) -> None:
    source = tool.noise(tmp_path / "again", 3 * MIB)
    job = _push(serve, certs, source, "again")
    assert tool.run("push", *job).receipt == tool.run("push", *job).receipt
    tool.noise(source, 3 * MIB)
    changed = tool.run("push", *job)
    assert (changed.code, changed.error["code"]) == (1, "TARGET_EXISTS"), "old content was passed"
    tool.noise(source, 4 * MIB)
    grown = tool.run("push", *job)
    assert (grown.code, grown.error["code"]) == (1, "TARGET_EXISTS")
    assert "other content now" in grown.err


def test_a_symlink_at_the_target_is_not_followed(
    serve: Serve, certs: Certs, tmp_path: Path
) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (serve.root / "linked").symlink_to(tmp_path / "victim")
    refused = tool.run("push", *_push(serve, certs, tool.noise(tmp_path / "new", 1000), "linked"))
    assert (refused.code, refused.error["code"]) == (1, "TARGET_EXISTS")
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert (serve.root / "linked").is_symlink()
