"""`diskmover push`: one source after the other, through restarts of the receiver."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import click

from diskmover import show
from diskmover.errors import ErrorCode, MoverError
from diskmover.model import NbdExport, OutgoingVolume, Progress, Receipt, TlsFiles, uri_of
from diskmover.not_whole import lacks
from diskmover.transfer import Push

_NO_KEY = bytes(32)  # `serve` has no sessions: certificates decide
_RESTARTED = (ErrorCode.SESSION_UNKNOWN, ErrorCode.SESSION_CLOSED)
_ATTEMPTS = 10  # each ends with a restart of the receiver
_TAG = "open"  # and it makes the tag from the names of sender and file
_LOOK_SECONDS = 0.5


def check_names(names: Sequence[str]) -> None:
    """Refuse names that cannot be used before the first file is sent.

    Raises:
        click.UsageError: One is no text, or two are the same.
    """
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise click.UsageError(f"{name!r} is not UTF-8: give another one with --name") from None
        if names.count(name) > 1:
            raise click.UsageError(f"two files are called {name!r}: push each by itself")


def push_files(
    files: Sequence[Path], names: Sequence[str], *, as_json: bool, options: dict[str, Any]
) -> bool:
    """Push files, and say first of each when a copy of it alone may be no disk.

    Returns:
        Whether all of them is there; False when a copy is DEGRADED.

    Raises:
        MoverError: One failed; those behind it are not sent.
    """
    whole = []
    for file, name in zip(files, names, strict=True):
        for lack in lacks(file, files):
            if as_json:
                show.emit({"file": name, "note": asdict(lack)})
            click.echo(f"diskmover: NOTE: {show.printable(name)} {lack.message}", err=True)
        whole.append(push_one(file.resolve(), name, as_json=as_json, options=options))
    return all(whole)


def push_one(
    source: Path | NbdExport, name: str, *, as_json: bool, options: dict[str, Any]
) -> bool:
    """Push a source and tell its receipt.

    Returns:
        Whether all of it is there; False when the copy is DEGRADED.

    Raises:
        MoverError: It failed.
    """
    started = time.monotonic()
    receipts, progress = _push_through(source, name, as_json, options)
    seconds = time.monotonic() - started
    for receipt in receipts:
        if as_json:
            show.emit({**show.proof(receipt), "seconds": round(seconds, 3)})
        else:
            click.echo(show.told(receipt, progress, seconds))
    return not any(receipt.is_degraded for receipt in receipts)


def _push_through(
    source: Path | NbdExport, name: str, as_json: bool, options: dict[str, Any]
) -> tuple[list[Receipt], Progress]:
    """Push a source; go on when the receiver has restarted meanwhile."""
    for attempt in itertools.count(1):
        job = _start(source, name, options)
        try:
            return _follow(job, name, as_json), job.progress()
        except MoverError as error:
            if error.code not in _RESTARTED or attempt == _ATTEMPTS:
                raise
        except KeyboardInterrupt:
            job.cancel()
            raise
    raise AssertionError("the last attempt returns or raises")


def _start(source: Path | NbdExport, name: str, options: dict[str, Any]) -> Push:
    peer: str | None = options["peer"]
    return Push(
        to=options["to"],
        receiver=uri_of(peer) if peer else None,
        tls=TlsFiles(options["cert"], options["key"], options["ca"]),
        session_id=f"open/{name}",
        key=_NO_KEY,
        tag=_TAG,
        volumes=[OutgoingVolume(name, source)],
        connections=options["connections"],
        limit_bytes_per_second=options["limit"],
        compression=_compression(options["level"], options["no_compress"]),
        holes=options["holes"],
        reconnect_timeout_seconds=options["retry_for"],
        io_priority=options["io_priority"],
        on_read_error=options["on_read_error"],
        despite_lock=options["force"],
    )


def _compression(level: int | None, off: bool) -> int | Literal["adaptive"] | None:
    if off:
        return None
    return "adaptive" if level is None else level


def _follow(job: Push, name: str, as_json: bool) -> list[Receipt]:
    live = show.Live(name, as_json=as_json)
    try:
        while (receipts := job.wait(_LOOK_SECONDS)) is None:
            live.show(job.progress())
    finally:
        live.clear()
    return receipts
