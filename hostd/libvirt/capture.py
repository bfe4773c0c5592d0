"""A domain without its disks, in a directory: taken from libvirt and given back.

    meta.json              what follows, see `Meta`
    domain.xml             the persistent definition, secrets included
    nvram                  UEFI variables, when there are any
    tpm/                   state of the emulated TPM, when there is any
    snapshots/0000.xml     metadata of snapshots, parents first
    checkpoints/0000.xml   metadata of checkpoints, parents first

The same directory serves parking, the trip to another host (`hostd.disks.baggage`)
and setting a built domain aside. It is private to its owner: it holds secrets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import libvirt
import msgspec

from controlplane.common.errors import DroverError
from controlplane.common.foreign_json import decode
from controlplane.common.reasons import Reason
from hostd.disks.durable import (
    Owner,
    copy_file,
    copy_tree,
    give_to,
    make_private_directory,
    owner_of,
    remove_tree,
    write_file,
)
from hostd.libvirt.definition import parse_definition
from hostd.libvirt.domains import try_find
from hostd.libvirt.errors import translated

TPM_DIRECTORY = Path("/var/lib/libvirt/swtpm")
# From this release on libvirt can undefine a domain and keep its TPM state.
_KEEP_TPM_SINCE = 8_009_000
_SECURE = libvirt.VIR_DOMAIN_XML_SECURE
META = "meta.json"
DOMAIN = "domain.xml"
NVRAM = "nvram"
TPM = "tpm"
SNAPSHOTS = "snapshots"
CHECKPOINTS = "checkpoints"


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """What goes with the files of a captured domain.

    Attributes:
        uuid: libvirt UUID.
        name: libvirt name.
        autostart: libvirt starts it together with the host.
        nvram: Where its NVRAM file lies; empty without one.
        tpm: Where its TPM state lies; empty without any.
        current_snapshot: File name of the current snapshot; empty without one.
        owners: volume_id -> owner of the disk file.
        nvram_owner: Owner of the NVRAM file; None without one.
        tpm_owners: Path below the TPM state, "." for its top -> owner. swtpm runs as
            a user of its own and needs each of them.
    """

    version: int = 1
    uuid: str
    name: str
    autostart: bool
    nvram: str = ""
    tpm: str = ""
    current_snapshot: str = ""
    owners: dict[str, Owner] = {}
    nvram_owner: Owner | None = None
    tpm_owners: dict[str, Owner] = {}


def capture(dom: libvirt.virDomain, disks: Sequence[tuple[str, Path]], into: Path) -> Meta:
    """Write a domain that is off to a new directory; durable when it returns.

    Args:
        dom: The domain.
        disks: volume_id and path of its disks, for their owners.
        into: The directory; replaced when it exists.

    Raises:
        DroverError: LIBVIRT_UNAVAILABLE, or what libvirt met.
        OSError: It cannot be written.
    """
    uuid = dom.UUIDString()
    with translated(f"domains/{uuid}"):
        remove_tree(into)
        make_private_directory(into)
        xml = dom.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | _SECURE)
        definition = parse_definition(xml)
        tpm = TPM_DIRECTORY / uuid if definition.has_tpm else None
        nvram = Path(definition.nvram) if definition.nvram else None
        write_file(into / DOMAIN, xml.encode())
        current = _write_snapshots(dom, into / SNAPSHOTS)
        _write_checkpoints(dom, into / CHECKPOINTS)
        copy_small_state(into, nvram, tpm)
        meta = Meta(
            uuid=uuid,
            name=definition.name,
            autostart=bool(dom.autostart()),
            nvram=str(nvram) if nvram is not None and (into / NVRAM).exists() else "",
            tpm=str(tpm) if tpm is not None and (into / TPM).exists() else "",
            current_snapshot=current,
            owners={volume_id: owner_of(path) for volume_id, path in disks},
            nvram_owner=owner_of(into / NVRAM) if (into / NVRAM).exists() else None,
            tpm_owners=_owners_below(into / TPM),
        )
        write_file(into / META, msgspec.json.format(msgspec.json.encode(meta)))
    return meta


def _owners_below(top: Path) -> dict[str, Owner]:
    found = [top, *sorted(top.rglob("*"))] if top.is_dir() else []
    return {path.relative_to(top).as_posix(): owner_of(path) for path in found}


def give_small_state(meta: Meta, nvram: str, tpm: str) -> None:
    """Give NVRAM and TPM state that came from another host to their owners, by name.

    Args:
        meta: What the other host noted.
        nvram: Where the NVRAM file lies here; empty without one.
        tpm: Where the TPM state lies here; empty without any.

    Raises:
        OSError: They cannot be changed.
    """
    if nvram and meta.nvram_owner is not None and Path(nvram).exists():
        give_to(Path(nvram), meta.nvram_owner)
    if not tpm:
        return
    top = Path(tpm)
    for path in [top, *top.rglob("*")]:
        owner = meta.tpm_owners.get(path.relative_to(top).as_posix())
        if owner is not None and path.exists():
            give_to(path, owner)


def read_meta(directory: Path) -> Meta:
    """Read what `capture` noted.

    Raises:
        DroverError: BUILD_FAILED when it is missing or malformed.
    """
    try:
        return decode((directory / META).read_bytes(), Meta)
    except (OSError, ValueError) as error:
        raise DroverError(
            Reason.BUILD_FAILED, f"{directory / META} cannot be read: {error}."
        ) from error


def copy_small_state(into: Path, nvram: Path | None, tpm: Path | None) -> None:
    """Copy NVRAM and TPM state, where they exist, replacing earlier copies.

    Raises:
        OSError: They cannot be copied.
    """
    if nvram is not None and nvram.exists():
        copy_file(nvram, into / NVRAM)
    if tpm is not None and tpm.is_dir():
        remove_tree(into / TPM)
        copy_tree(tpm, into / TPM)


def keeps_tpm(conn: libvirt.virConnect) -> bool:
    """True when undefining here leaves TPM state alone."""
    return bool(conn.getLibVersion() >= _KEEP_TPM_SINCE)


def undefine(dom: libvirt.virDomain) -> None:
    """Take the definition away; disks, NVRAM and (if libvirt can) TPM state stay.

    A guest that was started in this very moment goes on running, and its
    definition is put back.

    Raises:
        DroverError: INSTANCE_STARTED_MEANWHILE, LIBVIRT_UNAVAILABLE, or what
            libvirt met.
    """
    conn, uuid = dom.connect(), dom.UUIDString()
    subject = f"domains/{uuid}"
    flags = (
        libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM
        | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
        | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    )
    with translated(subject, Reason.INSTANCE_STATE):
        xml = dom.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | _SECURE)
        if dom.isActive():
            raise _started_meanwhile(dom.name(), subject)
        if keeps_tpm(conn):
            flags |= libvirt.VIR_DOMAIN_UNDEFINE_KEEP_TPM
        dom.undefineFlags(flags)
        if try_find(conn, uuid) is not None:
            # It runs without a definition now.
            conn.defineXML(xml)
            raise _started_meanwhile(dom.name(), subject)


def define(
    conn: libvirt.virConnect,
    directory: Path,
    meta: Meta,
    *,
    autostart: bool,
    full: Reason = Reason.BUILD_FAILED,
) -> None:
    """Define a captured domain again, with snapshots, checkpoints and autostart.

    Repeating it is harmless.

    Args:
        conn: Where.
        directory: What `capture` wrote; its XML already fits this host.
        meta: Its meta data.
        autostart: Whether libvirt starts it together with the host.
        full: The reason when libvirt has no room to write.

    Raises:
        DroverError: BUILD_FAILED or `full` with libvirt's words, TARGET_NAME_TAKEN,
            LIBVIRT_UNAVAILABLE.
    """
    subject = f"domains/{meta.uuid}"
    refuse_taken_name(conn, meta.name, meta.uuid)
    with translated(subject, Reason.BUILD_FAILED, full):
        dom = conn.defineXML((directory / DOMAIN).read_text("utf-8"))
        redefine = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
        for path in _numbered(directory / SNAPSHOTS):
            current = path.name == meta.current_snapshot
            flags = redefine | (libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT if current else 0)
            dom.snapshotCreateXML(path.read_text("utf-8"), flags)
        for path in _numbered(directory / CHECKPOINTS):
            flags = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
            dom.checkpointCreateXML(path.read_text("utf-8"), flags)
        dom.setAutostart(int(autostart))


def refuse_taken_name(conn: libvirt.virConnect, name: str, domain_uuid: str) -> None:
    """Raise when another domain has the name.

    Raises:
        DroverError: TARGET_NAME_TAKEN, LIBVIRT_UNAVAILABLE.
    """
    with translated(f"domains/{domain_uuid}"):
        others = [dom for dom in conn.listAllDomains(0) if dom.name() == name]
    for other in others:
        if other.UUIDString() != domain_uuid:
            raise DroverError(
                Reason.TARGET_NAME_TAKEN,
                f"Another domain called {name} is here ({other.UUIDString()}).",
                subject=f"domains/{domain_uuid}",
                metadata={"name": name},
            )


def rewrite(directory: Path, domain: Callable[[str], str], metadata: Callable[[str], str]) -> None:
    """Change the XML of a captured domain in place.

    Args:
        directory: What `capture` wrote.
        domain: Changes the definition.
        metadata: Changes each snapshot and checkpoint.

    Raises:
        DroverError: BUILD_FAILED when one of them is no text.
        OSError: They cannot be read or written.
    """
    _rewrite(directory / DOMAIN, domain)
    for path in [*snapshot_files(directory), *checkpoint_files(directory)]:
        _rewrite(path, metadata)


def _rewrite(path: Path, change: Callable[[str], str]) -> None:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DroverError(Reason.BUILD_FAILED, f"{path} is no text: {error}.") from error
    write_file(path, change(text).encode())


def snapshot_files(directory: Path) -> list[Path]:
    """Snapshot metadata, parents first."""
    return _numbered(directory / SNAPSHOTS)


def checkpoint_files(directory: Path) -> list[Path]:
    """Checkpoint metadata, parents first."""
    return _numbered(directory / CHECKPOINTS)


def _write_snapshots(dom: libvirt.virDomain, into: Path) -> str:
    topological = libvirt.VIR_DOMAIN_SNAPSHOT_LIST_TOPOLOGICAL
    current = ""
    for number, snapshot in enumerate(dom.listAllSnapshots(topological)):
        make_private_directory(into)
        path = into / f"{number:04}.xml"
        xml = snapshot.getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE)
        write_file(path, xml.encode())
        current = path.name if snapshot.isCurrent(0) else current
    return current


def _write_checkpoints(dom: libvirt.virDomain, into: Path) -> None:
    topological = libvirt.VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL
    for number, checkpoint in enumerate(dom.listAllCheckpoints(topological)):
        make_private_directory(into)
        xml = checkpoint.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_SECURE)
        write_file(into / f"{number:04}.xml", xml.encode())


def _numbered(directory: Path) -> list[Path]:
    return sorted(directory.glob("[0-9][0-9][0-9][0-9].xml"))


def _started_meanwhile(name: str, subject: str) -> DroverError:
    return DroverError(
        Reason.INSTANCE_STARTED_MEANWHILE,
        f"{name} was started while it was about to be moved; it runs on, untouched.",
        subject=subject,
    )
