"""Plain progress lines: which ones appear, by a clock of our own."""

from __future__ import annotations

import io

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
