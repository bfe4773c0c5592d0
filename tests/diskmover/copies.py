"""Copies between two ends in one process."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diskmover import IncomingVolume, OutgoingVolume, Push, Receipt, Receiver, TlsFiles
from diskmover.model import NbdExport, uri_of

_PATIENCE_SECONDS = 60.0


@dataclass
class Copies:
    """Makes copies over a real connection."""

    receiver: Receiver
    tls: TlsFiles
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def start(
        self,
        source: Path | NbdExport,
        target: Path,
        *,
        size_bytes: int,
        tag: str | None = None,
        limit: int | None = None,
        **placing: Any,
    ) -> Push:
        """Begin to copy a source to a target; `placing` as in `IncomingVolume`."""
        incoming = IncomingVolume("vda", target.parent, target.name, size_bytes, **placing)
        outgoing = OutgoingVolume("vda", source)
        return self._push(
            [incoming], [outgoing], tag, limit_bytes_per_second=limit, compression=None
        )

    def copy(
        self,
        source: Path | NbdExport,
        target: Path,
        *,
        size_bytes: int,
        tag: str | None = None,
        **placing: Any,
    ) -> Receipt:
        """Copy a source to a target; the receipt."""
        return finish(self.start(source, target, size_bytes=size_bytes, tag=tag, **placing))

    def copy_all(self, sources: Mapping[str, Path], root: Path) -> list[Receipt]:
        """Copy files to files of these names beneath a directory, in one session."""
        incoming = [
            IncomingVolume(name, root, name, source.stat().st_size)
            for name, source in sources.items()
        ]
        outgoing = [OutgoingVolume(name, source) for name, source in sources.items()]
        return finish_all(self._push(incoming, outgoing))

    def _push(
        self,
        incoming: Sequence[IncomingVolume],
        outgoing: Sequence[OutgoingVolume],
        tag: str | None = None,
        **options: Any,
    ) -> Push:
        """Open a session of its own for a copy, and begin it."""
        tag = tag or f"t{next(self._numbers)}"
        session, key = f"session of {tag}", secrets.token_bytes(32)
        self.receiver.open_session(session, key, sender=uri_of("source"), volumes=incoming, tag=tag)
        return Push(
            to=self.receiver.address,
            receiver=uri_of("target"),
            tls=self.tls,
            session_id=session,
            key=key,
            tag=tag,
            volumes=outgoing,
            **options,
        )


def finish_all(push: Push) -> list[Receipt]:
    """Wait for the end of a copy; the receipts."""
    try:
        receipts = push.wait(_PATIENCE_SECONDS)
    finally:
        push.cancel()
    assert receipts is not None, push.progress()
    return receipts


def finish(push: Push) -> Receipt:
    """Wait for the end of a copy of one volume; the receipt."""
    return finish_all(push)[0]
