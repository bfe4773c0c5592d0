"""Following a move to where the caller wants it, through restarts of the server.

A broken stream says nothing about the move, which goes on by itself: the watch
is opened again, for ever, and says so once for each time the server is away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import click
import grpc

from controlplane.cli import describe, errors
from controlplane.cli.errors import CliError
from controlplane.cli.names import short
from controlplane.cli.output import visible
from controlplane.cli.progress import Reporter, make_reporter
from controlplane.cli.session import Session
from controlplane.v1 import migration_service_pb2
from controlplane.v1.migration_pb2 import Migration

_AWAY = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INTERNAL,
    }
)
_LONGEST_PAUSE_SECONDS = 5.0
_STREAM_SECONDS = 3600.0

Goal = Callable[[Migration], bool]


def changes(
    session: Session, name: str, *, until_final: bool, note: Callable[[str], None]
) -> Iterator[Migration]:
    """Every change of a move, from its present state on.

    Ends when the server ends the stream because the move is at rest.

    Args:
        session: Where the server is.
        name: Resource name of the move.
        until_final: True to go on past AWAITING_CONFIRM.
        note: Told once when the server goes away and once when it is back.

    Raises:
        CliError: The server refuses.
    """
    request = migration_service_pb2.WatchMigrationRequest(name=name, until_final=until_final)
    pause_seconds, away = 0.2, False
    last: Migration | None = None
    while True:
        stream: Any = session.migrations.WatchMigration(request, timeout=_STREAM_SECONDS)
        try:
            for move in stream:
                if away:
                    note("The control plane is back.")
                if last is not None and not move.placement.verdicts:
                    move.placement.verdicts.extend(last.placement.verdicts)
                pause_seconds, away, last = 0.2, False, move
                yield move
            if _is_rest(last, until_final=until_final):
                return
        except grpc.RpcError as error:
            failure = session.explain(error)
            call: Any = error
            if call.code() not in _AWAY or failure.exit_code == errors.DENIED:
                raise failure from error
            if not away and call.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                note(
                    "The control plane is away; the move goes on by itself and is watched again "
                    "as soon as it is back."
                )
                away = True
        finally:
            stream.cancel()
        time.sleep(pause_seconds)
        pause_seconds = min(_LONGEST_PAUSE_SECONDS, pause_seconds * 2)


def _is_rest(last: Migration | None, *, until_final: bool) -> bool:
    # A server that shuts down may end the stream in good order before the move rests.
    if last is None:
        return False
    waits = last.state == Migration.STATE_AWAITING_CONFIRM
    return last.state in describe.AT_REST and not (waits and until_final)


def follow(
    session: Session,
    move: Migration,
    *,
    reached: Goal,
    until_final: bool,
    reporter: Reporter | None = None,
) -> Migration:
    """Show a move until it is where the caller wants it or can get no further.

    Warnings that `move` does not have yet are shown as they come.

    Args:
        session: Where the server is.
        move: The move as it was when last seen.
        reached: True for a state at which to stop.
        until_final: As for `changes`.
        reporter: Shows the changes; chosen by the terminal if None.

    Returns:
        The last state seen.

    Raises:
        CliError: The server refuses, or the user pressed Ctrl-C (exit code 130).
    """
    last = move
    warned = set(move.placement.warnings)
    try:
        with reporter or make_reporter() as shown:
            for change in changes(session, move.name, until_final=until_final, note=shown.note):
                last = change
                for warning in change.placement.warnings:
                    if warning not in warned:
                        shown.note(describe.warning_line(warning))
                warned.update(change.placement.warnings)
                shown.update(change)
                if reached(change) or change.state in describe.ENDED:
                    break
    except KeyboardInterrupt:
        ident = short(move.name)
        advice = f"Watch it again:  drover migration watch {ident}"
        if last.state in describe.CANCELLABLE:
            advice += f"\nUndo it:         drover migration cancel {ident}"
        raise CliError(
            "Stopped watching. The move goes on.", exit_code=errors.INTERRUPTED, advice=advice
        ) from None
    return last


def fail_unless(move: Migration, wanted: frozenset[Migration.State.ValueType]) -> None:
    """End the command with the reason when a move did not end as wanted.

    Raises:
        CliError: It did not; exit code 1.
    """
    if move.state in wanted:
        return
    details = [describe.trouble(move)] if describe.trouble(move) else []
    if move.HasField("error"):
        cause = errors.from_status(move.error)
        details += [line for line in cause.details if line not in details]
        if cause.advice and move.state != Migration.STATE_CANCELLED:
            details.append(cause.advice)
    message, _, advice = describe.summary(move).partition("\n")
    if move.state == Migration.STATE_AWAITING_CONFIRM:
        message = f"It did not go through; nothing was changed. {message}"
    raise CliError(message, exit_code=errors.FAILED, details=details, advice=advice)


def say(text: str) -> None:
    """A line for people on standard error."""
    click.echo(visible(text), err=True)
