"""What the tool shows: a live line on a terminal, lines of text, or lines of JSON."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from typing import Any

import click

from diskmover.errors import MoverError
from diskmover.model import EndedCopy, Progress, Receipt
from diskmover.transfer import take_notes

_WIDEST_BAR = 30
_NARROWEST_BAR = 8


class Live:
    """Progress of one copy.

    Args:
        name: Name of the volume.
        as_json: JSON lines on standard output; else a line on standard error that is
            written over, and only when that is a terminal.
    """

    def __init__(self, name: str, *, as_json: bool) -> None:
        self._name = name
        self._as_json = as_json
        self._on_terminal = sys.stderr.isatty() and not as_json

    def show(self, progress: Progress) -> None:
        """Tell how far it is."""
        if self._as_json:
            emit({"file": self._name, "progress": asdict(progress)})
        elif self._on_terminal:
            width = shutil.get_terminal_size().columns
            self._write(line(self._name, progress, width - 1))

    def clear(self) -> None:
        """Leave the terminal as if there had been no line."""
        if self._on_terminal:
            self._write("")
        say_notes()

    def _write(self, text: str) -> None:
        click.echo(f"\r\x1b[K{text}", nl=False, err=True)


def say_notes() -> None:
    """Say what makes copies slower than they could be."""
    for note in take_notes():
        click.echo(f"diskmover: {printable(note)}", err=True)


def line(name: str, progress: Progress, width: int) -> str:
    """A progress line that is at most so wide; the bar shrinks first."""
    share = progress.done_bytes / progress.total_bytes if progress.total_bytes else 1.0
    name = printable(name)
    name = name if len(name) <= width // 3 else f"{name[: width // 3 - 1]}~"
    front, back = f"{name} {share:4.0%} ", f" {_words(progress)}"
    room = min(width - len(front) - len(back) - 2, _WIDEST_BAR)
    if room < _NARROWEST_BAR:
        return (front + back.lstrip())[:width]
    return f"{front}[{'#' * int(share * room):-<{room}}]{back}"


def _words(progress: Progress) -> str:
    total = size(progress.total_bytes)
    if not progress.connections:
        return f"of {total}, {'reconnecting' if progress.wire_bytes else 'connecting'}"
    left = time_left(progress)
    lost = progress.unreadable_bytes
    words = [
        f"of {total}",
        *([f"DEGRADED: {size(lost)} unreadable"] if lost else []),
        f"{size(progress.rate_bytes_per_second)}/s",
        *([f"{left} left"] if left else []),
    ]
    stage = f" [{progress.limited_by}]" if progress.limited_by else ""
    return ", ".join(words) + stage


def time_left(progress: Progress) -> str:
    """Time to the end, as "12 s", "10 s to 2m 05s" or "10 s or more"; empty while unknown."""
    low, high = progress.eta_low_seconds, progress.eta_high_seconds
    if progress.eta_seconds is None:
        return ""
    if low is None:
        return duration(progress.eta_seconds)
    if high is None:
        return f"{duration(low)} or more"
    return (
        duration(low) if duration(low) == duration(high) else f"{duration(low)} to {duration(high)}"
    )


def duration(seconds: float) -> str:
    """A time as "12 s", "2m 05s" or "3h 20m"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"


def size(count: int) -> str:
    """Bytes as "4.9 KiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def told(receipt: Receipt, progress: Progress, seconds: float) -> str:
    """A finished copy in one line, and a line for each place that is missing."""
    what = f"{size(receipt.size_bytes)}, of it {size(receipt.data_bytes)} data"
    what = f"{printable(receipt.volume_id)}: {degraded(receipt)}{what}"
    if receipt.wire_bytes and not progress.wire_bytes:
        return f"{what}, was there already, digest {receipt.digest}{_places(receipt)}"
    before = f"{size(progress.resumed_bytes)} were there, " if progress.resumed_bytes else ""
    wire = f"{size(receipt.wire_bytes)} on the wire, {seconds:.1f} s"
    return f"{what}, {before}{wire}, digest {receipt.digest}{_places(receipt)}"


def printable(text: str) -> str:
    """A text in one line, whose author (of a name, say) cannot act on the terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def degraded(receipt: Receipt) -> str:
    """What a copy has to say first when it is not a good one; else nothing."""
    if not receipt.is_degraded:
        return ""
    return f"DEGRADED, {size(receipt.unreadable_bytes)} could not be read and are zeros: "


def _places(receipt: Receipt) -> str:
    """A line for each place that is missing."""
    return "".join(
        f"\n  unreadable: {length} bytes at byte {offset}" for offset, length in receipt.unreadable
    )


def proof(receipt: Receipt) -> dict[str, Any]:
    """A receipt as JSON; one of a degraded copy is not called a receipt."""
    return {"degraded" if receipt.is_degraded else "receipt": asdict(receipt)}


def arrival(copy: EndedCopy, *, as_json: bool) -> None:
    """Tell how a copy ended, at its receiver."""
    if as_json:
        about: dict[str, Any] = {"file": copy.name, "sender": copy.sender}
        outcome = failure(copy.error) if copy.error else proof(copy.receipts[0])
        emit(about | outcome)
        return
    if copy.error:
        what = str(copy.error)
    else:
        (receipt,) = copy.receipts
        what = f"{degraded(receipt)}{size(receipt.size_bytes)}, digest {receipt.digest}"
    click.echo(printable(f"{copy.name} from {copy.sender}: {what}"))


def failure(error: MoverError) -> dict[str, Any]:
    """An error as JSON."""
    return {
        "error": {
            "code": error.code.value,
            "message": error.message,
            "volume_id": error.volume_id,
            "offset": error.offset,
            "side": error.side,
            "retryable": error.retryable,
        }
    }


def emit(value: dict[str, Any]) -> None:
    """Print a line of JSON."""
    click.echo(json.dumps(value))
