"""diskmover: copies disk images between hosts, sparse, verified and resumable.

The core is Rust (`_core`); docs/wire-protocol.md tells what goes over the wire.

    with Receiver("0.0.0.0:7443", tls) as receiver:
        receiver.open_session(id, key, sender=uri, volumes=[...], tag=migration)

    push = Push(to="b:7443", receiver=uri, tls=tls, session_id=id, key=key,
                tag=migration, volumes=[...])
    receipts = push.wait()
"""

from diskmover.errors import ErrorCode, MoverError
from diskmover.files import (
    digest,
    discard,
    discard_device,
    discard_published,
    open_beneath,
    reserve,
)
from diskmover.model import (
    Changes,
    EndedCopy,
    FileDigest,
    IncomingVolume,
    NbdExport,
    OutgoingVolume,
    Progress,
    Receipt,
    SessionState,
    SessionStatus,
    TlsFiles,
)
from diskmover.transfer import Push, Receiver, take_notes

__all__ = [
    "Changes",
    "EndedCopy",
    "ErrorCode",
    "FileDigest",
    "IncomingVolume",
    "MoverError",
    "NbdExport",
    "OutgoingVolume",
    "Progress",
    "Push",
    "Receipt",
    "Receiver",
    "SessionState",
    "SessionStatus",
    "TlsFiles",
    "digest",
    "discard",
    "discard_device",
    "discard_published",
    "open_beneath",
    "reserve",
    "take_notes",
]
