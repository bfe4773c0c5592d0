"""The least CPU of a copy: what its work costs, not what the tool took."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.bound import Model, least_cpu_seconds
from tests.bench.job import Tool
from tests.bench.price import Moving, Price, measure_moving
from tests.bench.samples import BARE, DROVER, GIGA, RSYNC, place, result

PRICE = Price(tls=1.0, hash=10.0)
MOVING = Moving(socket=100.0, read=1000.0, write=10000.0)


@pytest.mark.parametrize(
    ("tool", "seconds"), [(DROVER, 11111.0), (RSYNC, 11101.0), (BARE, 11100.0)]
)
def test_a_tool_pays_for_what_it_promises(tool: Tool, seconds: float) -> None:
    found = least_cpu_seconds(tool, place(), result(), PRICE, MOVING)
    assert found == pytest.approx(seconds)


def test_what_the_tool_took_says_nothing() -> None:
    costly = result(cpu_seconds=1e9, sender_cpu_seconds=1e9)
    found = least_cpu_seconds(DROVER, place(), costly, PRICE, MOVING)
    assert found == least_cpu_seconds(DROVER, place(), result(), PRICE, MOVING)


def test_what_is_not_sent_is_neither_encrypted_nor_moved() -> None:
    half = result(wire_bytes=GIGA // 2)
    found = least_cpu_seconds(DROVER, place(), half, PRICE, MOVING)
    assert found == pytest.approx(0.5 + 10 + 50 + 1000 + 10000)


def test_what_need_not_be_sent_is_not_counted() -> None:
    wasteful = result(wire_bytes=9 * GIGA, allocated_bytes=9 * GIGA)
    found = least_cpu_seconds(DROVER, place(), wasteful, PRICE, MOVING)
    assert found == pytest.approx(11111)


def test_zeros_are_read_and_nothing_else() -> None:
    found = least_cpu_seconds(
        DROVER, place(), result(wire_bytes=0, allocated_bytes=0), PRICE, MOVING
    )
    assert found == pytest.approx(1000)


def test_what_the_target_has_is_read_and_hashed_but_not_written() -> None:
    cell = place()
    older = replace(cell, older=replace(cell.image, alike=0.75))
    found = least_cpu_seconds(DROVER, older, result(), PRICE, MOVING)
    assert found == pytest.approx(0.25 * 10101 + 10 + 1000)


def test_the_slowest_part_is_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(tmp_path / "scratch", PRICE, MOVING)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    for disk, part, seconds in ((1.0, "cpu", 5555.5), (9999.0, "disk", 9999.0)):
        monkeypatch.setattr("tests.bench.disk.copy_seconds", lambda *_, disk=disk: disk)
        for _ in range(2):
            model.measure_disk(place().image)
        bound = model.bound(DROVER, place(), result())
        assert bound.part == part
        assert bound.seconds == pytest.approx(seconds)


def test_the_disk_is_what_it_was_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(tmp_path / "scratch", PRICE, MOVING)
    image = place().image
    for measured, mean in ((9.0, 9.0), (4.0, 6.5), (2.0, 3.0)):
        monkeypatch.setattr("tests.bench.disk.copy_seconds", lambda *_, found=measured: found)
        model.measure_disk(image)
        assert model.disk_seconds(image.path) == pytest.approx(mean)


def test_moving_bytes_can_be_measured_here(tmp_path: Path) -> None:
    found = measure_moving(tmp_path / "scratch", sample=8 << 20)
    assert min(found.socket, found.read, found.write) > 0
    assert list(tmp_path.iterdir()) == []
