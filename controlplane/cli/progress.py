"""Showing a move while it runs, on standard error.

A terminal gets a live bar; anything else gets plain lines: one for each change
of state, step or trouble, and one every few seconds of copying.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, Protocol, Self

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from controlplane.cli import describe
from controlplane.cli.output import visible
from controlplane.v1.migration_pb2 import Migration

COPY_LINE_SECONDS = 5.0


class Reporter(Protocol):
    """Shows what a stream of Migrations says."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End; leave the terminal in order."""

    def update(self, move: Migration) -> None:
        """Show a change."""

    def note(self, text: str) -> None:
        """Show a line that is not about the move itself."""


class PlainReporter:
    """Plain lines, for logs and pipes.

    Args:
        stream: Where to.
        clock: Seconds of a monotonic clock.
    """

    def __init__(self, stream: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._seen: tuple[object, ...] = ()
        self._copy_line_at = float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def update(self, move: Migration) -> None:
        """Print a line when it says something new or a copy line is due."""
        trouble = describe.trouble(move)
        seen = (move.state, move.step, trouble, move.target_host)
        copying = move.state == Migration.STATE_COPYING and move.progress.total_bytes > 0
        due = copying and self._clock() - self._copy_line_at >= COPY_LINE_SECONDS
        if seen == self._seen and not due:
            return
        self._seen = seen
        if copying:
            self._copy_line_at = self._clock()
        self.note(_line(move, trouble))

    def note(self, text: str) -> None:
        """Print a line."""
        click.echo(f"{time.strftime('%H:%M:%S')} {visible(text)}", file=self._stream)


def _line(move: Migration, trouble: str) -> str:
    step = f" [{move.step}]" if move.step else ""
    words = describe.doing(move)
    if move.state == Migration.STATE_COPYING and move.progress.total_bytes:
        words = f"{words}: {describe.copy_words(move)}"
    line = f"{move.instance_display_name} {describe.state_word(move.state)}{step} {words}"
    if trouble and move.state not in describe.AT_REST:
        line += f"; attempt {move.attempt}, trying again after {trouble}"
    return line


class BarReporter:
    """A live bar, for a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("{task.fields[name]} [bold]{task.fields[state]}[/bold]"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[words]}"),
            console=console or Console(stderr=True, highlight=False),
            refresh_per_second=5,
        )
        self._task = self._progress.add_task("", total=None, name="", state="", words="connecting")
        self._trouble = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, move: Migration) -> None:
        """Redraw the bar; print new trouble above it."""
        copying = move.state == Migration.STATE_COPYING and move.progress.total_bytes > 0
        at_rest = move.state in describe.AT_REST
        total = float(move.progress.total_bytes) if copying else (1.0 if at_rest else None)
        completed = float(move.progress.done_bytes) if copying else (1.0 if at_rest else 0.0)
        words = describe.copy_words(move) if copying else describe.doing(move)
        step = f" [{move.step}]" if move.step and not at_rest else ""
        self._progress.update(
            self._task,
            total=total,
            completed=completed,
            name=escape(visible(move.instance_display_name)),
            state=describe.state_word(move.state),
            words=escape(visible(words + step)),
        )
        trouble = describe.trouble(move)
        if trouble and trouble != self._trouble and not at_rest:
            self.note(f"attempt {move.attempt}, trying again after {trouble}")
        self._trouble = trouble

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(escape(visible(text)))


def make_reporter() -> Reporter:
    """A bar when standard error is a terminal, else plain lines."""
    return BarReporter() if sys.stderr.isatty() else PlainReporter(sys.stderr)
