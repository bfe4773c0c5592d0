"""What a copy of Drover may take, said in words when it is more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.job import Tool
from tests.bench.judge import failed, faults
from tests.bench.price import Moving, Price
from tests.bench.report import Report
from tests.bench.row import Failure
from tests.bench.samples import BARE, DROVER, GIGA, MIB, RSYNC, place, result, row


def test_a_good_row_has_nothing_to_say() -> None:
    assert faults(row(result(), result())) == []


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"identical": False}, "the target is not what the source is"),
        ({"sender_rss_bytes": 300 * MIB}, "the sender took 300 MiB of memory; below 300"),
        ({"receiver_rss_bytes": 301 * MIB}, "the receiver took 301 MiB of memory; below 300"),
        ({"cached_bytes": 256 * MIB}, "256 MiB stayed in the page cache; below 256"),
        ({"allocated_bytes": 1_022_000_000}, "the target takes 1.022 of the source's disk; 1.02"),
    ],
)
def test_what_is_too_much_is_said_of_its_cell(told: dict[str, int], words: str) -> None:
    (fault,) = faults(row(result(**told)))
    assert fault.startswith("disk, unshaped: drover: ")
    assert words in fault


def test_every_run_counts_not_only_the_typical_one() -> None:
    slow = result(durable_seconds=9.0, cached_bytes=GIGA)
    assert len(faults(row(result(), slow, result()))) == 1


def test_up_to_the_limit_is_good() -> None:
    most = result(
        sender_rss_bytes=300 * MIB - 1, cached_bytes=256 * MIB - 1, allocated_bytes=1_020_000_000
    )
    assert faults(row(most)) == []


@pytest.mark.parametrize("tool", [RSYNC, BARE])
def test_of_other_tools_only_a_copy_that_is_none_is_told(tool: Tool) -> None:
    greedy = result(sender_rss_bytes=GIGA, cached_bytes=GIGA, allocated_bytes=9 * GIGA)
    assert faults(row(greedy, tool=tool)) == []
    (fault,) = faults(row(replace(greedy, identical=False), tool=tool))
    assert "not what the source is" in fault


def test_disk_is_not_compared_where_an_older_copy_gave_its_blocks() -> None:
    cell = place()
    reused = replace(cell, older=cell.image)
    assert faults(row(result(allocated_bytes=2 * GIGA), at=reused)) == []


def test_of_hardly_any_data_single_blocks_are_not_two_percent() -> None:
    small = place(allocated=40960)
    assert faults(row(result(allocated_bytes=65536), at=small)) == []
    assert len(faults(row(result(allocated_bytes=2 * MIB), at=small))) == 1


def test_a_copy_that_was_not_made_is_told_but_where_links_are_cut() -> None:
    assert "drover: it failed" in (failed(Failure(place(), DROVER, "it failed")) or "")
    assert failed(Failure(place("cut"), DROVER, "it failed")) is None


def test_a_report_is_sound_when_nobody_has_anything_to_say(tmp_path: Path) -> None:
    report = Report(tmp_path, {}, Price(0.1, 0.1), Moving(0.1, 0.1, 0.1))
    report.add(row(result()))
    report.add(Failure(place("cut"), RSYNC, "gave up"))
    assert report.faults == []
    report.add(row(result(cached_bytes=GIGA)))
    report.add(Failure(place(), RSYNC, "gave up"))
    assert len(report.faults) == 2
