"""The data port: one diskmover receiver for all copies that come to this host.

A session is opened for a migration, with a key that only the sender knows; it is
named and tagged after the migration, so that the next opening goes on from what
is durable. Keys are handed on to diskmover and kept nowhere else.

This module also says, in one table, what a diskmover failure means to a caller.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

import structlog

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.common.rpc import TlsPaths
from diskmover import (
    ErrorCode,
    IncomingVolume,
    MoverError,
    Receipt,
    Receiver,
    SessionState,
    TlsFiles,
)
from diskmover.model import IoPriority

log = structlog.stdlib.get_logger(__name__)

KEY_BYTES = 32

_REASONS: dict[ErrorCode, Reason] = {
    ErrorCode.INVALID_ARGUMENT: Reason.INVALID_FIELD,
    ErrorCode.CREDENTIALS: Reason.UNAUTHENTICATED,
    ErrorCode.SESSION_UNKNOWN: Reason.SESSION_REFUSED,
    ErrorCode.SESSION_KEY_WRONG: Reason.SESSION_REFUSED,
    ErrorCode.SESSION_KEY_REPLAYED: Reason.SESSION_REFUSED,
    ErrorCode.SESSION_CLOSED: Reason.SESSION_REFUSED,
    ErrorCode.PEER_UNTRUSTED: Reason.UNAUTHENTICATED,
    ErrorCode.PEER_IDENTITY: Reason.UNAUTHENTICATED,
    ErrorCode.PROTOCOL: Reason.INTERNAL,
    ErrorCode.LIMIT_EXCEEDED: Reason.COPY_INTERRUPTED,
    ErrorCode.CONNECT_FAILED: Reason.COPY_INTERRUPTED,
    ErrorCode.LINK_LOST: Reason.COPY_INTERRUPTED,
    ErrorCode.CHUNK_CORRUPT: Reason.DIGEST_MISMATCH,
    ErrorCode.DIGEST_MISMATCH: Reason.DIGEST_MISMATCH,
    ErrorCode.SOURCE_MISSING: Reason.DISK_MISSING,
    ErrorCode.SOURCE_INVALID: Reason.DISK_CHANGED,
    ErrorCode.SOURCE_CHANGED: Reason.DISK_CHANGED,
    ErrorCode.SOURCE_IO: Reason.DISK_IO_ERROR,
    ErrorCode.TARGET_EXISTS: Reason.TARGET_FILE_EXISTS,
    ErrorCode.TARGET_PATH: Reason.DISK_OUTSIDE_ROOTS,
    ErrorCode.TARGET_BUSY: Reason.COPY_INTERRUPTED,
    ErrorCode.TARGET_IO: Reason.DISK_IO_ERROR,
    ErrorCode.NO_SPACE: Reason.TARGET_LACKS_SPACE,
    ErrorCode.QUOTA: Reason.TARGET_LACKS_SPACE,
    ErrorCode.CANCELLED: Reason.CANCELLED,
    ErrorCode.INTERNAL: Reason.INTERNAL,
}


def mover_error(error: MoverError, subject: str) -> DroverError:
    """What a diskmover failure means to a caller.

    One that can go away by itself is COPY_INTERRUPTED, unless a new session is
    all that it takes: that is SESSION_REFUSED.

    Args:
        error: The failure.
        subject: What it is about, as "jobs/..." or "migrations/...".
    """
    reason = _REASONS[error.code]
    if error.retryable and reason is not Reason.SESSION_REFUSED:
        reason = Reason.COPY_INTERRUPTED
    metadata = {"mover_code": error.code.value, "side": error.side}
    if error.volume_id is not None:
        metadata["volume_id"] = error.volume_id
    if error.offset is not None:
        metadata["offset"] = str(error.offset)
    return DroverError(reason, f"{error}.".replace("..", "."), subject=subject, metadata=metadata)


def tls_files(paths: TlsPaths) -> TlsFiles:
    """The host's certificate as diskmover takes it."""
    return TlsFiles(cert=paths.cert, key=paths.key, ca=paths.ca)


class DataPort:
    """The receiver and its sessions. All methods block.

    Args:
        listen: HOST:PORT.
        tls: The host's certificate.
        volume_memory_bytes: Most memory for what is known of volumes, over all sessions.
        io_priority: How much writes count beside those of others.

    Raises:
        MoverError: The address cannot be bound, or the certificate is unusable.
    """

    def __init__(
        self,
        listen: str,
        tls: TlsPaths,
        *,
        volume_memory_bytes: int,
        io_priority: IoPriority = "normal",
    ) -> None:
        self._receiver = Receiver(
            listen,
            tls_files(tls),
            volume_memory_bytes=volume_memory_bytes,
            io_priority=io_priority,
        )
        self._lock = threading.Lock()
        # Migration -> digest of the key that its session was opened with.
        self._keys: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        """The address that is listened on, with the real port."""
        return self._receiver.address

    def open(
        self, migration_id: str, key: bytes, sender: str, volumes: Sequence[IncomingVolume]
    ) -> None:
        """Let the sender write a migration's volumes; an opening under another key ends.

        Raises:
            DroverError: The session cannot be opened.
        """
        fingerprint = hashlib.sha256(key).digest()
        with self._lock:
            if self._keys.get(migration_id) == fingerprint and self._is_open(migration_id):
                # The same call again: opening anew would use the key up.
                return
            self._keys[migration_id] = fingerprint
        try:
            self._receiver.open_session(
                migration_id, key, sender=sender, volumes=volumes, tag=migration_id
            )
        except MoverError as error:
            raise mover_error(error, f"migrations/{migration_id}") from error

    def _is_open(self, migration_id: str) -> bool:
        try:
            self._receiver.session_status(migration_id)
        except MoverError as error:
            if error.code is ErrorCode.SESSION_UNKNOWN:
                return False
            raise
        return True

    def receipts(self, migration_id: str) -> dict[str, Receipt]:
        """Receipts of a migration's finished session by volume id; empty when unknown."""
        try:
            status = self._receiver.session_status(migration_id)
        except MoverError as error:
            if error.code is ErrorCode.SESSION_UNKNOWN:
                return {}
            raise mover_error(error, f"migrations/{migration_id}") from error
        if status.state is not SessionState.DONE:
            return {}
        return {receipt.volume_id: receipt for receipt in status.receipts}

    def close_session(self, migration_id: str) -> None:
        """End a migration's session; its files are let go of when this returns."""
        with self._lock:
            self._keys.pop(migration_id, None)
        self._receiver.close_session(migration_id)

    def close(self) -> None:
        """Stop listening; what has arrived is kept."""
        self._receiver.close()
