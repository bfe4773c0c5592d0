"""Plain progress lines: which ones appear, by a clock of our own."""

from __future__ import annotations

import io

import pytest

from controlplane.cli.describe import copy_words, time_left
from controlplane.cli.progress import COPY_LINE_SECONDS, PlainReporter
from controlplane.v1.migration_pb2 import Migration
from hostd.v1.job_pb2 import CopyProgress
from tests.controlplane.cli.recorded import make_move


def copying(done_bytes: int) -> Migration:
    progress = CopyProgress(done_bytes=done_bytes, total_bytes=1000)
    return make_move(Migration.STATE_COPYING, step="copy", progress=progress)


def test_copy_lines_come_every_few_seconds() -> None:
    stream, now = io.StringIO(), 0.0
    reporter = PlainReporter(stream, clock=lambda: now)

    for second in range(11):
        now = float(second)
        reporter.update(copying(second * 100))

    lines = stream.getvalue().splitlines()
    assert COPY_LINE_SECONDS == 5
    assert [line.split("disks: ")[1].split(" of")[0] for line in lines] == [
        "0 B",
        "500 B",
        "1000 B",
    ]


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({}, ""),
        ({"eta_seconds": 12.0}, "12 s"),
        ({"eta_seconds": 12.0, "eta_low_seconds": 10.4, "eta_high_seconds": 130.0}, "10 s to 2m"),
        ({"eta_seconds": 12.0, "eta_low_seconds": 12.1, "eta_high_seconds": 12.2}, "12 s"),
        ({"eta_seconds": 12.0, "eta_low_seconds": 10.4}, "10 s or more"),
    ],
)
def test_the_time_left_is_a_range(known: dict[str, float], words: str) -> None:
    told = time_left(CopyProgress(**known))  # type: ignore[arg-type]
    assert told.startswith(words)
    assert bool(told) == bool(words)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("network", "0 B of 9 B (0 %), limited by network"),
        ("queue", "0 B of 9 B (0 %), waiting for other copies of its host"),
        ("", "0 B of 9 B (0 %)"),
    ],
)
def test_what_limits_the_copy_is_told(stage: str, words: str) -> None:
    progress = CopyProgress(total_bytes=9, limited_by=stage)
    assert copy_words(make_move(Migration.STATE_COPYING, progress=progress)) == words


def test_what_an_earlier_attempt_had_placed_is_told() -> None:
    progress = CopyProgress(
        done_bytes=6 << 20,
        total_bytes=8 << 20,
        resumed_bytes=4 << 20,
        rate_bytes_per_second=1 << 20,
    )

    words = copy_words(make_move(Migration.STATE_COPYING, progress=progress))

    assert words == "6.0 MiB of 8.0 MiB (75 %), 4.0 MiB of it by an earlier attempt, 1.0 MiB/s"


def test_each_state_and_step_has_one_line() -> None:
    stream = io.StringIO()
    reporter = PlainReporter(stream, clock=lambda: 0.0)

    for move in (
        make_move(Migration.STATE_PENDING, step="admit"),
        make_move(Migration.STATE_PENDING, step="admit", etag="8"),
        make_move(Migration.STATE_STOPPING, step="stop"),
        make_move(Migration.STATE_STOPPING, step="park"),
    ):
        reporter.update(move)

    steps = [line.split("[")[1].split("]")[0] for line in stream.getvalue().splitlines()]
    assert steps == ["admit", "stop", "park"]
