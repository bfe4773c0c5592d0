"""Sizes, rates and times."""

from __future__ import annotations

import click
import pytest

from controlplane.cli.units import (
    DurationType,
    RateType,
    SizeType,
    format_bytes,
    format_seconds,
    parse_duration,
)


@pytest.mark.parametrize(
    ("text", "bytes_per_second"),
    [("100M", 100_000_000), ("100Mi", 104_857_600), ("12.5MB/s", 12_500_000), ("7", 7)],
)
def test_rates(text: str, bytes_per_second: int) -> None:
    assert RateType().convert(text, None, None) == bytes_per_second


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("512M", 512 << 20), ("4G", 4 << 30), ("4GiB", 4 << 30), ("3", 3072)]
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert SizeType(bare_unit=1024).convert(text, None, None) == size_bytes


@pytest.mark.parametrize("text", ["", "-1", "1e3", "10X", "M", "9" * 400, "9" * 20])
def test_nonsense_is_refused(text: str) -> None:
    for kind in (RateType(), SizeType(bare_unit=1), DurationType()):
        with pytest.raises(click.BadParameter):
            kind.convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("1.5h", 5400), ("2d", 172_800)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5 << 30, "5.0 GiB"),
        (1 << 52, "4096.0 TiB"),
    ],
)
def test_bytes_for_people(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.21, "3.2 s"), (42, "42 s"), (65, "1m 05s"), (3661, "1h 01m"), (180_000, "2d 2h")],
)
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
