"""Values that go into and come out of diskmover."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum, unique
from pathlib import Path
from typing import Literal

from diskmover.errors import MoverError

IoPriority = Literal["normal", "low", "idle"]
OnReadError = Literal["fail", "zero"]
Holes = Literal["auto", "trust", "read"]


def uri_of(name: str) -> str:
    """The URI name of the certificate that `diskmover certs` makes for `name`."""
    return name if "://" in name else f"diskmover://{name}"


@dataclass(frozen=True)
class TlsFiles:
    """Own credentials, PEM files.

    Attributes:
        cert: Certificate chain, leaf first, with a URI subject alternative name.
        key: Private key of the leaf, PKCS#8, SEC1 or PKCS#1.
        ca: The authority (or several) that peers must come from.
    """

    cert: Path
    key: Path
    ca: Path


@dataclass(frozen=True)
class IncomingVolume:
    """A volume that a session may receive.

    Attributes:
        volume_id: Name of the volume on the wire, 1 to 255 bytes.
        root: Directory that the target must stay beneath. Must exist.
        name: Target relative to `root`; directories in it must exist.
        size_bytes: Exact size; another size announced by the sender is refused.
        mode: Permission bits of the published file; None leaves what it has: 0600 when
            it is new, its own when it is brought up to date (`update`).
        uid: Owner of the published file; None leaves it likewise.
        gid: Group of the published file; None leaves it likewise. Its SELinux label is
            always left: that of a new file is what files of its directory get.
        device_state: The target is a block device, which is overwritten, and
            this directory keeps its journal and receipt. None for a file. The
            device must be at least as large as the volume and not in use; what
            lies behind the volume is not touched.
        paranoid: When a copy goes on where it stopped, read back and hash all
            that an earlier attempt placed, not only what it placed last.
        readback: Read all of it back from the medium and compare it with what was
            sent, 64 MiB at a time once that is durable, while the rest still comes.
            What is wrong fails with TARGET_IO at once, and nothing is published before
            all is right. None does so for a device, and not for a file.
        seeds: Older copies and base images, as pairs of a directory and a path
            beneath it. Blocks of 64 KiB that they have, anywhere, are copied
            from them (shared, where the file system can) and not sent; every
            one is hashed as it arrives. The first use reads a seed and, from 64 MiB
            on, leaves a list of its hashes beside it, `.NAME.dm-hashes`. Seeds that are
            missing are left out.
        format: "as-sent" places the bytes as they are. "qcow2" makes an image of
            them, and takes only what is sent as a guest sees it: a volume of
            whole sectors, to a file. `size_bytes` is the disk's either way.
        update: When this tag has published the very copy that a sender's
            `Changes` begin with, take its name away and bring it up to date,
            instead of answering that it is there. It must not be in use. Until
            the new content is complete and verified, no file has the name.
        accept_degraded: Take a copy also when its sender could not read all of the
            source and puts zeros there (`Push(on_read_error="zero")`). Its receipt
            tells where. Otherwise such a copy fails with SOURCE_IO, and nothing is
            published.
    """

    volume_id: str
    root: Path
    name: str
    size_bytes: int
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    device_state: Path | None = None
    paranoid: bool = False
    readback: bool | None = None
    seeds: tuple[tuple[Path, str], ...] = ()
    format: Literal["as-sent", "qcow2"] = "as-sent"
    update: bool = False
    accept_degraded: bool = False


@dataclass(frozen=True)
class Changes:
    """What changed in an export since an earlier copy.

    Attributes:
        since: Digest of the earlier copy's receipt.
        bitmap: The dirty bitmap that tells; the export has to offer it (`qemu-nbd
            --bitmap`), and it has to know of everything that was written since
            the state that was copied then. None when there is none to rely on:
            everything is read, and what differs is sent.
    """

    since: str
    bitmap: str | None = None


@dataclass(frozen=True)
class NbdExport:
    """A disk as its guest sees it, exported by QEMU's tools or a libvirt backup.

    The export must be read-only: content that can change while it is read has
    no digest. Its backing chain, compression and snapshots are the server's
    business; what is sent is one flat volume.

    Attributes:
        address: "unix:PATH" or "tcp:HOST:PORT". NBD is not encrypted here, so
            TCP is for addresses of the own host.
        name: Name of the export; the default one has the empty name.
        content_id: A promise that the same id always stands for the same bytes
            (a stopped guest's disk and its time of change, say). Only with it
            can another attempt go on where one stopped: an export tells neither
            inode nor time, so without it every attempt starts over.
        changes: Bring an earlier copy up to date, and read only what a dirty
            bitmap says was written since. What the target holds is hashed and
            has to be that copy; if it is another one, everything is read and
            compared. None to make a first copy.
    """

    address: str
    name: str = ""
    content_id: str | None = None
    changes: Changes | None = None


@dataclass(frozen=True)
class OutgoingVolume:
    """A volume to send.

    Attributes:
        volume_id: Name of the volume on the wire, as the receiver knows it.
        source: What to read. A regular file or block device is opened
            read-only, and a symlink as the last part is refused: the caller has
            resolved it. An NBD export is read as its guest sees it.
        size_bytes: Refuse with SOURCE_INVALID when it has another size; None to
            take the size that it has.
    """

    volume_id: str
    source: Path | NbdExport
    size_bytes: int | None = None


@dataclass(frozen=True)
class Progress:
    """How far a copy has come.

    Attributes:
        done_bytes: Bytes of the volumes that are placed on the target, sent or
            known to be zero or found there on resume.
        total_bytes: Bytes of all volumes together.
        resumed_bytes: The part of `done_bytes` that was durable on the target
            before this copy began.
        wire_bytes: Bytes of frames sent, after compression, without TLS framing.
        rate_bytes_per_second: Bytes of volume a second, smoothed over seconds.
        eta_seconds: Expected time to the end; None while unknown.
        eta_low_seconds: Time to the end if all goes on as in the fastest of the
            last seconds; None while unknown.
        eta_high_seconds: The same for the slowest of them; None also when nothing
            moved in it.
        limited_by: What limits the rate: "source-read", "compress" (scanning and
            hashing too), "network", "target-write" (all that the receiver does),
            "throttle" (the limit that was set), or "" while unknown and at the
            receiver.
        connections: Connections that stand now.
        unreadable_bytes: Bytes of the source that could not be read, where the copy
            goes on with zeros: it is DEGRADED when this is not 0. Only the sender
            knows before the end.
    """

    done_bytes: int
    total_bytes: int
    resumed_bytes: int
    wire_bytes: int
    rate_bytes_per_second: int
    eta_seconds: float | None
    eta_low_seconds: float | None
    eta_high_seconds: float | None
    limited_by: str
    connections: int
    unreadable_bytes: int = 0


@dataclass(frozen=True)
class Receipt:
    """What was placed on the target, proven by a digest that both ends computed.

    Attributes:
        volume_id: The volume.
        size_bytes: Its length.
        data_bytes: Bytes in 4 KiB blocks that are not all zero.
        zero_bytes: The rest: never sent.
        wire_bytes: Bytes of frames that the last sender sent for it.
        chunk_size_bytes: Chunk size of the digest.
        digest: Root digest of docs/wire-protocol.md, lower-case hex. It depends
            on nothing but the content.
        mode: "verbatim": the bytes of a file or device as they are; or
            "guest-visible": the disk as its guest sees it, whatever was made of
            it at the target. Digest and sizes are those of these bytes.
        unreadable: Where the source could not be read and zeros stand instead, as
            pairs of offset and length. Empty, unless the sender was told to go on
            then: a copy with any is DEGRADED, and its digest is that of what was
            placed, not of what the source should hold.
        allocated_bytes: What the target's file system had allocated for it when the
            receipt was given, as it counts (btrfs leaves out what compression spares).
            None for a block device, which allocates nothing. It is what the receiver
            says, and part of no digest.
    """

    volume_id: str
    size_bytes: int
    data_bytes: int
    zero_bytes: int
    wire_bytes: int
    chunk_size_bytes: int
    digest: str
    mode: str
    unreadable: tuple[tuple[int, int], ...] = ()
    allocated_bytes: int | None = None

    @property
    def is_degraded(self) -> bool:
        """Whether something of the source is missing."""
        return bool(self.unreadable)

    @property
    def unreadable_bytes(self) -> int:
        """Bytes that are missing."""
        return sum(length for _, length in self.unreadable)


@dataclass(frozen=True)
class FileDigest:
    """The digest of a local file or block device.

    Attributes:
        size_bytes: Its length.
        data_bytes: Bytes in 4 KiB blocks that are not all zero.
        zero_bytes: The rest.
        chunk_size_bytes: Chunk size of the digest.
        digest: Root digest, equal to that of a `Receipt` for the same content.
    """

    size_bytes: int
    data_bytes: int
    zero_bytes: int
    chunk_size_bytes: int
    digest: str


@dataclass(frozen=True)
class EndedCopy:
    """How a copy to a receiver without sessions ended.

    Attributes:
        name: The name that the sender gave.
        sender: URI name in its certificate.
        receipts: One when it is there, else empty. It may be DEGRADED: look at its
            `is_degraded`.
        error: Why it is not.
    """

    name: str
    sender: str
    receipts: tuple[Receipt, ...]
    error: MoverError | None


@unique
class SessionState(StrEnum):
    """Where a receiving session stands.

    WAITING -> RECEIVING -> DONE | FAILED. DONE and FAILED are final: the key is
    used up, and only another `open_session` begins again.
    """

    WAITING = "WAITING"
    RECEIVING = "RECEIVING"
    DONE = "DONE"
    FAILED = "FAILED"


@dataclass(frozen=True)
class SessionStatus:
    """A snapshot of a receiving session.

    Attributes:
        session_id: The session.
        state: Where it stands.
        progress: How far it has come, as the receiver sees it.
        receipts: One for each volume when DONE, else empty.
        error: Why, when FAILED.
    """

    session_id: str
    state: SessionState
    progress: Progress
    receipts: tuple[Receipt, ...]
    error: MoverError | None
