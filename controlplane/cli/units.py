"""Sizes, rates and times as people write and read them."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import click
from google.protobuf import timestamp_pb2

_BINARY = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMGTP]?)(?P<binary>i?)B?", re.IGNORECASE)
_DURATION = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>s|m|h|d)?")
_MOST_BYTES = 2**63 - 1
_LONGEST_SECONDS = 10 * 365 * 86_400
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class RateType(click.ParamType[int]):
    """Bytes per second: 100M is 100,000,000, 100Mi is 104,857,600."""

    name = "rate"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Parse; numbers pass through."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).removesuffix("/s"))
        units = _BINARY if match and match["binary"] else _DECIMAL
        rate = _bytes(match, units[match["unit"].upper()]) if match else None
        if rate is None:
            self.fail(f"{value!r} is not a rate such as 100M or 12.5Mi (bytes per second)")
        return rate


class LimitType(RateType):
    """A rate, or "none" as 0."""

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Parse; numbers pass through."""
        if value == "none":
            return 0
        return super().convert(value, param, ctx)


class SizeType(click.ParamType[int]):
    """Bytes of memory or disk, where G is GiB, as QEMU reads it.

    Args:
        bare_unit: Bytes that a number without a unit stands for.
    """

    name = "size"

    def __init__(self, bare_unit: int) -> None:
        self._bare_unit = bare_unit

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Parse; numbers pass through."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value))
        unit = _BINARY[match["unit"].upper()] if match and match["unit"] else self._bare_unit
        size = _bytes(match, unit) if match else None
        if size is None:
            self.fail(f"{value!r} is not a size such as 512M or 20G")
        return size


def _bytes(match: re.Match[str], unit: int) -> int | None:
    """None when there are more than a file can have."""
    number = float(match["number"]) * unit
    return round(number) if number <= _MOST_BYTES else None


class DurationType(click.ParamType[float]):
    """Seconds: 90, 90s, 30m, 12h, 2d."""

    name = "duration"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse; numbers pass through."""
        if isinstance(value, int | float):
            return float(value)
        seconds = parse_duration(str(value))
        if seconds is None:
            self.fail(f"{value!r} is not a duration such as 90s, 30m, 12h or 2d, up to 10 years")
        return seconds


def parse_duration(text: str) -> float | None:
    """Seconds of a duration such as 30m; None when it is not one, or over 10 years."""
    match = _DURATION.fullmatch(text)
    if match is None:
        return None
    seconds = float(match["number"]) * _SECONDS[match["unit"] or "s"]
    return seconds if seconds <= _LONGEST_SECONDS else None


def format_bytes(size_bytes: float) -> str:
    """Bytes in the largest fitting binary unit, as "5.9 GiB"."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("the loop ends at TiB")


def format_seconds(seconds: float) -> str:
    """A duration as "12.3 s", "4m 05s", "3h 20m" or "2d 4h"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h {minutes:02d}m"
    days, hours = divmod(hours, 24)
    return f"{days}d {hours}h"


def format_time(stamp: timestamp_pb2.Timestamp) -> str:
    """A point in time in the local zone; "-" for none."""
    if not stamp.seconds:
        return "-"
    moment = stamp.ToDatetime(tzinfo=UTC).astimezone()
    return moment.strftime("%Y-%m-%d %H:%M:%S")


def format_age(stamp: timestamp_pb2.Timestamp, *, now: datetime | None = None) -> str:
    """How long ago a point in time was; "-" for none."""
    if not stamp.seconds:
        return "-"
    age = (now or datetime.now(UTC)) - stamp.ToDatetime(tzinfo=UTC)
    return f"{format_seconds(max(0.0, age.total_seconds()))} ago"
