"""The one table of reasons that diskmover gives for a failure.

The Rust core has the same table (src/error.rs); a test holds the two together.
A code is part of the API: it is never renamed and never reused.
"""

from __future__ import annotations

from enum import StrEnum, unique


@unique
class ErrorCode(StrEnum):
    """Every reason, with what it means."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    """The caller gave something impossible: a bad name, key, size or address."""
    CREDENTIALS = "CREDENTIALS"
    """Own certificate, key or CA file cannot be read or used."""

    SESSION_UNKNOWN = "SESSION_UNKNOWN"
    """The receiver has no such session; it may have restarted. Open it anew."""
    SESSION_KEY_WRONG = "SESSION_KEY_WRONG"
    """The sender does not hold the key that the session was opened with."""
    SESSION_KEY_REPLAYED = "SESSION_KEY_REPLAYED"
    """The key was used before: it works for one sender attempt of one opening."""
    SESSION_CLOSED = "SESSION_CLOSED"
    """The receiver closed or replaced the session while it was in use."""

    PEER_UNTRUSTED = "PEER_UNTRUSTED"
    """A certificate does not lead to the fleet's CA, is expired or is missing."""
    PEER_IDENTITY = "PEER_IDENTITY"
    """A trusted certificate, but of another party than the expected one."""
    PROTOCOL = "PROTOCOL"
    """The peer broke the wire protocol, or is not diskmover at all."""
    LIMIT_EXCEEDED = "LIMIT_EXCEEDED"
    """The receiver has all the sessions, or the session all the connections, that it
    takes; or a host gives no memory or no thread."""
    CONNECT_FAILED = "CONNECT_FAILED"
    """The receiver cannot be reached."""
    LINK_LOST = "LINK_LOST"
    """All connections broke and reconnecting did not help, or the other end said for
    too long only that it lives; resume later."""

    CHUNK_CORRUPT = "CHUNK_CORRUPT"
    """A chunk did not match its authenticator, also not when it was asked for again;
    nothing of it was written."""
    DIGEST_MISMATCH = "DIGEST_MISMATCH"
    """Both ends hold different root digests; nothing was published."""

    SOURCE_MISSING = "SOURCE_MISSING"
    """The source file does not exist."""
    SOURCE_INVALID = "SOURCE_INVALID"
    """The source is a symlink, a directory, of another size than announced, or too large."""
    SOURCE_CHANGED = "SOURCE_CHANGED"
    """The source was written, replaced or cut while it was copied, or (retryable) a
    QEMU has it open for writing."""
    SOURCE_IO = "SOURCE_IO"
    """The source cannot be read; the offset says where. At a receiver: the sender went
    on with zeros, and no degraded copy is taken there."""

    TARGET_EXISTS = "TARGET_EXISTS"
    """The final name is taken by a file that this tag did not publish."""
    TARGET_PATH = "TARGET_PATH"
    """The target path leaves its root, crosses a symlink, or is no plain file."""
    TARGET_BUSY = "TARGET_BUSY"
    """Another session writes this target."""
    TARGET_IO = "TARGET_IO"
    """The target cannot be written or made durable."""
    NO_SPACE = "NO_SPACE"
    """The target's file system is full; what is durable is kept for a resume."""
    QUOTA = "QUOTA"
    """A disk quota on the target is used up; what is durable is kept."""

    CANCELLED = "CANCELLED"
    """The caller cancelled; what is durable on the target is kept."""
    INTERNAL = "INTERNAL"
    """A bug in diskmover."""


class MoverError(Exception):
    """A failure, as data.

    Attributes:
        code: What kind of failure.
        message: What happened, to what, why, and what to do next.
        volume_id: The volume concerned; None when it is not about one.
        offset: Byte offset within the volume; None when it is not about one.
        side: "sender" or "receiver": where it was found.
        retryable: Whether the same copy can succeed without anybody acting,
            in a new session (new key) if the old one is used up. What is
            durable on the target is kept in any case.
    """

    def __init__(
        self,
        code: str,
        message: str,
        volume_id: str | None = None,
        offset: int | None = None,
        side: str = "sender",
        retryable: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = ErrorCode(code)
        self.message = message
        self.volume_id = volume_id
        self.offset = offset
        self.side = side
        self.retryable = retryable

    def __str__(self) -> str:
        where = f" (volume {self.volume_id}" if self.volume_id is not None else ""
        if where and self.offset is not None:
            where += f" at byte {self.offset}"
        return f"{self.code.value}: {self.message}{where + ')' if where else ''}"
