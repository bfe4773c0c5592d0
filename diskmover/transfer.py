"""Receiving and sending volumes.

    hostd of the target                      hostd of the source
    Receiver  <====== N x mutual TLS ======  Push
      open_session(id, key, sender, ...)       Push(to, receiver, id, key, ...)
      session_status(id)                       progress(), wait()

Everything here blocks for a bounded time and releases the GIL; call it from a
thread when an event loop runs. The work itself is done by threads of the Rust
core, which never touch Python.

Threads do not go along in a fork: in a child, a `Receiver` or `Push` of its parent
raises RuntimeError whatever is asked of it. The child may make its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from diskmover import _core
from diskmover.exports import CoreExport, core_source
from diskmover.model import (
    EndedCopy,
    Holes,
    IncomingVolume,
    IoPriority,
    OnReadError,
    OutgoingVolume,
    Progress,
    Receipt,
    SessionState,
    SessionStatus,
    TlsFiles,
)

DEFAULT_BUFFER_BYTES = 64 << 20
DEFAULT_VOLUME_MEMORY_BYTES = 512 << 20


def take_notes() -> list[str]:
    """Take what an operator should know: copies that go on, but not as they do best.

    Such as a file system without direct I/O. Each is told once, for all copies of the
    process; at most 64 are kept until somebody asks.
    """
    return _core.take_notes()


class Receiver:
    """A listener for incoming copies; one is enough for a process.

    Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        listen: str,
        tls: TlsFiles,
        *,
        max_sessions: int = 16,
        max_connections: int = 128,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
        volume_memory_bytes: int = DEFAULT_VOLUME_MEMORY_BYTES,
        idle_timeout_seconds: float = 60.0,
        io_priority: IoPriority = "normal",
    ) -> None:
        """Bind and listen at once.

        Args:
            listen: "HOST:PORT"; port 0 lets the system choose (see `address`).
            tls: Own credentials. They are read again for each connection, so
                a renewed certificate needs no restart.
            max_sessions: Sessions that can be open at the same time.
            max_connections: Connections over all sessions.
            buffer_bytes: Memory for chunks in flight, for each session.
            volume_memory_bytes: Memory for what is known of volumes, over all sessions:
                about 2 MiB for each TiB of those that are open, and 40 bytes for each
                block that is looked up in seeds. A copy that there is no room for ends
                with LIMIT_EXCEEDED, and can be tried again; seeds are left out instead.
            idle_timeout_seconds: A connection on which nothing arrives for so
                long is dropped. Senders give a sign every few seconds.
            io_priority: How much its writes count beside others' on the same
                disk: "normal", "low" (behind all that did not ask for less) or
                "idle" (when nobody else wants it). The disk's scheduler has to
                heed it, as bfq and mq-deadline do.

        Raises:
            MoverError: INVALID_ARGUMENT, CREDENTIALS, or CONNECT_FAILED when
                the address cannot be bound.
        """
        self._core = _core.Receiver(
            listen,
            (tls.cert, tls.key, tls.ca),
            max_sessions,
            max_connections,
            buffer_bytes,
            volume_memory_bytes,
            idle_timeout_seconds,
            io_priority,
        )

    @property
    def address(self) -> str:
        """The address that is listened on, "HOST:PORT" with the real port."""
        return self._core.address()

    def open_session(
        self,
        session_id: str,
        key: bytes,
        *,
        sender: str,
        volumes: Sequence[IncomingVolume],
        tag: str,
    ) -> None:
        """Let one sender attempt write these volumes.

        An older opening of the same session is closed first (its parts stay),
        and its key is refused from then on with SESSION_KEY_REPLAYED.

        Args:
            session_id: 1 to 128 bytes.
            key: 32 secret bytes that only the sender knows as well.
            sender: The exact URI name in the sender's certificate.
            volumes: What it may write, and where.
            tag: Names the copy across attempts (a migration id): a later
                session with the same tag goes on from what is durable. 1 to 64
                of letters, digits, ".", "_", "-"; not beginning with ".".

        Raises:
            MoverError: INVALID_ARGUMENT, LIMIT_EXCEEDED.
        """
        self._core.open_session(
            session_id,
            key,
            sender,
            [
                (
                    (v.volume_id, v.root, v.name),
                    v.size_bytes,
                    (v.mode, v.uid, v.gid),
                    _placing(v),
                )
                for v in volumes
            ],
            tag,
        )

    def session_status(self, session_id: str) -> SessionStatus:
        """Tell where a session stands.

        Raises:
            MoverError: SESSION_UNKNOWN.
        """
        state, progress, receipts, error = self._core.session_status(session_id)
        return SessionStatus(
            session_id=session_id,
            state=SessionState(state),
            progress=_progress(progress),
            receipts=tuple(map(_receipt, receipts)),
            error=error,
        )

    def close_session(self, session_id: str) -> None:
        """Forget a session; does nothing when there is none.

        Its threads have ended and its locks are free when this returns. Parts
        and journals stay, so that another session can go on from them.
        """
        self._core.close_session(session_id)

    def serve_names(
        self,
        root: Path,
        *,
        devices: Mapping[str, Path] | None = None,
        paranoid: bool = False,
        readback: bool | None = None,
        seeds: Sequence[str] = (),
        format: Literal["as-sent", "qcow2"] = "as-sent",
        update: bool = False,
    ) -> None:
        """Accept any sender with a certificate of the CA, without sessions.

        This is what `diskmover serve` does: a sender names its files, they are
        placed directly in `root`, and never over an existing file. DEGRADED copies
        are taken, and `take_ended` tells of them as such.

        Args:
            root: The directory to place files in.
            devices: Block devices that are overwritten when a sender gives one
                of these names. Their journals and receipts go to `root`.
            paranoid: As in `IncomingVolume`.
            readback: As in `IncomingVolume`.
            seeds: Files in `root` whose content may be reused.
            format: As in `IncomingVolume`, for every file that is sent.
            update: As in `IncomingVolume`.

        Raises:
            MoverError: INVALID_ARGUMENT or TARGET_PATH when `root` is not a
                directory or a name is not a plain one.
        """
        self._core.serve_names(
            root,
            dict(devices or {}),
            paranoid,
            readback,
            [(root, name) for name in seeds],
            format == "qcow2",
            update,
        )

    def take_ended(self) -> list[EndedCopy]:
        """How copies to `serve_names` have ended since this was last called.

        The last 1000 are kept. One whose sender was cut off has not ended: it may
        go on.
        """
        return [
            EndedCopy(name, sender, tuple(map(_receipt, receipts)), error)
            for name, sender, receipts, error in self._core.take_ended()
        ]

    def close(self) -> None:
        """Stop listening and close all sessions; parts and journals stay."""
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Push:
    """A copy under way: it starts when it is made and runs in its own threads."""

    def __init__(
        self,
        *,
        to: str,
        receiver: str | None,
        tls: TlsFiles,
        session_id: str,
        key: bytes,
        tag: str,
        volumes: Sequence[OutgoingVolume],
        connections: int | None = None,
        limit_bytes_per_second: int | None = None,
        compression: int | Literal["adaptive"] | None = "adaptive",
        holes: Holes = "auto",
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
        reconnect_timeout_seconds: float = 30.0,
        io_priority: IoPriority = "normal",
        on_read_error: OnReadError = "fail",
        despite_lock: bool = False,
    ) -> None:
        """Open the sources and start to send.

        Args:
            to: Address of the receiver, "HOST:PORT".
            receiver: The exact URI name that its certificate must carry. None
                accepts every certificate of the CA, for the stand-alone tool.
            tls: Own credentials.
            session_id: As opened at the receiver.
            key: The secret of that opening, 32 bytes.
            tag: As opened at the receiver.
            volumes: What to send; all volumes of the session.
            connections: Number of connections, 1 to 64; None begins with 4 and adds
                some, up to 32, over long distances and as long as it helps.
            limit_bytes_per_second: Most bytes of frames a second over all
                connections; None for no limit.
            compression: "adaptive" compresses each chunk as hard as the link leaves
                time for; a zstd level (-7 to 19) uses that one for all chunks
                that it helps; None sends all chunks as they are.
            holes: "trust" skips what the file system reports as a hole; "read"
                reads it; "auto" trusts file systems with a good record (ext4, xfs,
                btrfs, tmpfs, bcachefs, overlay) and reads the holes of others, such
                as NFS, FUSE, 9p and ZFS, with a note.
            buffer_bytes: Memory for chunks in flight.
            reconnect_timeout_seconds: How long to try when no connection stands.
            io_priority: How much its reads count beside others', as in `Receiver`.
            on_read_error: What to do when a source gives EIO. "fail" fails with
                SOURCE_IO and the offset. "zero" reads around it and puts zeros in
                the place of the sectors that are lost; the copy is DEGRADED then,
                its receipt tells where, and it is for rescuing a dying disk, never
                for moving a machine. More than 1024 places or 64 MiB of a volume
                fail; other errors do, and so do NBD exports. Such a copy is never
                gone on from: another attempt compares everything.
            despite_lock: Copy also a file that a QEMU has open for writing. Otherwise
                that fails with SOURCE_CHANGED, retryable.

        Raises:
            MoverError: INVALID_ARGUMENT, CREDENTIALS, SOURCE_MISSING,
                SOURCE_INVALID, SOURCE_IO, or SOURCE_CHANGED when a QEMU has a source
                open for writing. Everything else comes from `wait`.
        """
        self._core = _core.Push(
            to,
            receiver,
            (tls.cert, tls.key, tls.ca),
            session_id,
            key,
            tag,
            [_outgoing(volume) for volume in volumes],
            connections,
            limit_bytes_per_second,
            compression,
            holes,
            buffer_bytes,
            reconnect_timeout_seconds,
            io_priority,
            on_read_error,
            despite_lock,
        )

    def progress(self) -> Progress:
        """Tell how far it has come; costs nothing, never blocks."""
        return _progress(self._core.progress())

    def cancel(self) -> None:
        """Stop, and return when the threads have ended (under 2 seconds).

        `wait` then raises CANCELLED, unless the copy was finished before. What
        is durable on the target stays there. May be called more than once.
        """
        self._core.cancel()

    def set_limit(self, limit_bytes_per_second: int | None) -> None:
        """Change the limit of the running copy; None lifts it."""
        self._core.set_limit(limit_bytes_per_second)

    def wait(self, timeout: float | None = None) -> list[Receipt] | None:
        """Wait for the end.

        Args:
            timeout: Seconds to wait at most; None to wait to the end. A signal
                (Ctrl-C) interrupts the waiting, not the copy.

        Returns:
            The receipts in the order of the volumes, or None when it still runs
            after `timeout`. Repeated calls give the same.

        Raises:
            MoverError: Why the copy failed; every code is possible.
        """
        receipts = self._core.wait(timeout)
        return None if receipts is None else [_receipt(told) for told in receipts]


def _progress(told: _core.Progress) -> Progress:
    """Progress as the core tells it."""
    done, total, resumed, wire, rate, (expected, low, high), limited_by, connections, unreadable = (
        told
    )
    return Progress(
        done_bytes=done,
        total_bytes=total,
        resumed_bytes=resumed,
        wire_bytes=wire,
        rate_bytes_per_second=rate,
        eta_seconds=expected,
        eta_low_seconds=low,
        eta_high_seconds=high,
        limited_by=limited_by,
        connections=connections,
        unreadable_bytes=unreadable,
    )


def _receipt(told: _core.Receipt) -> Receipt:
    """A receipt as the core tells it."""
    volume_id, size, data, zero, wire, chunk_size, digest, mode, unreadable, allocated = told
    return Receipt(
        volume_id, size, data, zero, wire, chunk_size, digest, mode, tuple(unreadable), allocated
    )


def _placing(
    volume: IncomingVolume,
) -> tuple[Path | None, bool, bool | None, Sequence[tuple[Path, str]], bool, bool, bool]:
    """How a volume is placed, as the core takes it."""
    is_qcow2 = volume.format == "qcow2"
    careful = (volume.device_state, volume.paranoid, volume.readback)
    return (*careful, volume.seeds, is_qcow2, volume.update, volume.accept_degraded)


def _outgoing(volume: OutgoingVolume) -> tuple[str, Path | None, CoreExport | None, int | None]:
    """A volume as the core takes it: with a path or an export."""
    return (volume.volume_id, *core_source(volume.source), volume.size_bytes)
