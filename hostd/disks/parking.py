"""Setting a machine aside so that it cannot start here, and putting it back.

    (nothing) --park--> PARKING --> PARKED --discard--> DISCARDING --> (nothing)
                           |           |
                           +-----------+--unpark--> UNPARKING --> (nothing)

The manifest is the one commit point. Before it exists nothing of the machine has
been changed; each later action can be repeated and undone from what the manifest
says; and it goes only when everything is back, or everything is deleted. A crash
at any line leaves a state from which `park` and `unpark` both go on.

    <root>/.drover-parked/<migration id>/     home, in the root of the first disk
        manifest.json                         what is where, and how to restore
        machine/                              hostd.libvirt.capture
        baggage.tar.zst                       the same, packed for the other host
    <file system>/.drover-parked/<migration id>/<volume id>/<file>     the disks

Disks are renamed, never copied, so each is set aside on its own file system; so are
NVRAM and TPM state, beside the copies in machine/, with the migration id in the name.
Putting everything back thus needs no free block, however full the disks became.
Backing files and read-only media may be shared with other machines: they stay.
A machine without disks has its home in the state directory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import libvirt
import structlog

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.disks.baggage import ARCHIVE_NAME, pack
from hostd.disks.durable import (
    CrashPoint,
    make_private_directory,
    move_file,
    no_crash,
    sync_directory,
)
from hostd.disks.manifest import (
    Home,
    Manifest,
    ParkedFile,
    ParkState,
    check_migration_id,
    find_manifest,
    homes,
    restore_commands,
    set_state,
    volume_json,
    volumes_of,
    write_manifest,
)
from hostd.disks.parked import (
    being_discarded,
    missing_disk,
    refuse_users,
    remove_leftovers,
    unpark,
)
from hostd.disks.roots import PARKING_DIRECTORY, StorageRoots
from hostd.disks.small_state import (
    set_aside_small_state,
)
from hostd.disks.trouble import io_trouble
from hostd.libvirt.capture import capture, keeps_tpm, undefine
from hostd.libvirt.domains import Inspection, inspect, try_find
from hostd.libvirt.sharing import find_sharers
from hostd.v1 import domain_pb2

log = structlog.stdlib.get_logger(__name__)

BAGGAGE_VOLUME_ID = "baggage"
_SECTOR_BYTES = 512


@dataclass(frozen=True)
class Parked:
    """A machine that is set aside.

    Attributes:
        volumes: Everything to copy, the baggage last. Paths are where the files
            are now; root and name are where they belong. The baggage has no root.
        manifest_path: The manifest.
        domain_name: libvirt name.
    """

    volumes: tuple[domain_pb2.Volume, ...]
    manifest_path: Path
    domain_name: str


def park(
    conn: libvirt.virConnect,
    domain_uuid: str,
    migration_id: str,
    roots: StorageRoots,
    state_dir: Path,
    *,
    at: CrashPoint = no_crash,
) -> Parked:
    """Set a machine aside that is off; does nothing when it is already.

    Args:
        conn: libvirt.
        domain_uuid: The machine.
        migration_id: The move.
        roots: Where its disks may lie.
        state_dir: hostd's own directory.
        at: Called after each step; for tests that end the process there.

    Raises:
        DroverError: INSTANCE_STARTED_MEANWHILE, INSTANCE_STATE,
            INSTANCE_IMMOVABLE or a reason about its disks (then nothing has been
            changed); PARKED_NOT_FOUND when it is being discarded;
            DOMAIN_NOT_FOUND; DISK_IN_USE, DISK_CHANGED, DISK_IO_ERROR,
            SOURCE_LACKS_SPACE, LIBVIRT_UNAVAILABLE (repeat it, or unpark).
    """
    check_migration_id(migration_id)
    subject = f"domains/{domain_uuid}"
    with io_trouble(subject, full=Reason.SOURCE_LACKS_SPACE):
        found = find_manifest(migration_id, roots, state_dir)
        if found is not None and found[1].state is ParkState.UNPARKING:
            unpark(conn, migration_id, roots, state_dir, at=at)
            found = None
        if found is not None and found[1].state is ParkState.DISCARDING:
            raise being_discarded(migration_id)
        dom = try_find(conn, domain_uuid)
        if dom is not None:
            if found is not None:
                _refuse_if_set_aside(found[1], dom)
                # Written before a crash; the machine may have changed since.
                found[0].manifest.unlink()
                sync_directory(found[0].path)
            home, manifest = _prepare(dom, migration_id, roots, state_dir, at)
            undefine(dom)
            at("undefined")
        elif found is not None:
            home, manifest = found
        else:
            message = f"libvirt on this host knows no domain {domain_uuid}, and it is not parked."
            raise DroverError(Reason.DOMAIN_NOT_FOUND, message, subject=subject)
        _set_aside(home, manifest, at, refresh=keeps_tpm(conn))
    return _answer(home, manifest)


def _prepare(
    dom: libvirt.virDomain,
    migration_id: str,
    roots: StorageRoots,
    state_dir: Path,
    at: CrashPoint,
) -> tuple[Home, Manifest]:
    """Write down all that is needed to put the machine back; changes nothing of it."""
    found = inspect(dom, roots)
    _refuse_unless_parkable(found)
    disks = [v for v in found.domain.volumes if v.kind == domain_pb2.VOLUME_KIND_DISK]
    paths = [Path(volume.path) for volume in disks]
    refuse_users(paths, found.domain.name)
    _refuse_sharers(dom, paths, roots)
    all_homes = homes(migration_id, roots, state_dir)
    remove_leftovers(all_homes, [])
    place = roots.directory(disks[0].root) / PARKING_DIRECTORY if disks else state_dir / "parked"
    home = Home(place / migration_id)
    make_private_directory(home.path)
    files = [_plan(volume, migration_id, roots) for volume in disks]
    for file in files:
        make_private_directory(Path(file.parked).parent)
    volume_paths = [(v.volume_id, Path(v.path)) for v in found.domain.volumes]
    meta = capture(dom, volume_paths, home.machine)
    at("captured")
    manifest = Manifest(
        how_to_restore=restore_commands(home, meta, files, meta.tpm),
        state=ParkState.PARKING,
        migration_id=migration_id,
        domain_uuid=meta.uuid,
        domain_name=meta.name,
        machine=str(home.machine),
        files=files,
        nvram=meta.nvram,
        tpm=meta.tpm,
        volumes=[volume_json(volume) for volume in found.domain.volumes],
    )
    write_manifest(home, manifest)
    at("manifest written")
    return home, manifest


def _plan(volume: domain_pb2.Volume, migration_id: str, roots: StorageRoots) -> ParkedFile:
    directory = Path(os.path.realpath(roots.directory(volume.root)))
    original = directory / volume.name
    status = original.stat()
    # Parked beside the mount point if the root holds further file systems.
    top = original.parent
    while top != directory and top.parent.stat().st_dev == status.st_dev:
        top = top.parent
    parked = top / PARKING_DIRECTORY / migration_id / volume.volume_id / original.name
    return ParkedFile(
        volume_id=volume.volume_id,
        original=str(original),
        parked=str(parked),
        inode=status.st_ino,
    )


def _refuse_unless_parkable(found: Inspection) -> None:
    domain = found.domain
    subject = f"domains/{domain.uuid}"
    if domain.power_state != domain_pb2.POWER_STATE_SHUTOFF:
        state = domain_pb2.PowerState.Name(domain.power_state).removeprefix("POWER_STATE_")
        running = domain.power_state == domain_pb2.POWER_STATE_RUNNING
        raise DroverError(
            Reason.INSTANCE_STARTED_MEANWHILE if running else Reason.INSTANCE_STATE,
            f"{domain.name} is {state}, not shut off; it was left alone.",
            subject=subject,
            metadata={"power_state": state},
        )
    if found.obstacles:
        first = found.obstacles[0]
        raise DroverError(first.reason, f"{domain.name}: {first.message}", subject=subject)


def _refuse_if_set_aside(manifest: Manifest, dom: libvirt.virDomain) -> None:
    """A definition beside files that are set aside is somebody else's doing."""
    disks_aside = any(os.path.lexists(file.parked) for file in manifest.files)
    nvram_aside = manifest.nvram and not Path(manifest.nvram).exists()
    if not (disks_aside or nvram_aside or manifest.state is ParkState.PARKED):
        return
    active = bool(dom.isActive())
    raise DroverError(
        Reason.INSTANCE_STARTED_MEANWHILE if active else Reason.INSTANCE_STATE,
        f"{manifest.domain_name} was defined again by somebody while migration"
        f" {manifest.migration_id} keeps its disks aside.",
        subject=f"domains/{manifest.domain_uuid}",
    )


def _set_aside(home: Home, manifest: Manifest, at: CrashPoint, *, refresh: bool) -> None:
    if manifest.state is ParkState.PARKED:
        return
    refuse_users([Path(file.original) for file in manifest.files], manifest.domain_name)
    for file in manifest.files:
        _move_aside(file)
        at(f"aside {file.volume_id}")
    set_aside_small_state(
        home.machine, manifest.nvram, manifest.tpm, aside=manifest.migration_id, refresh=refresh
    )
    at("small state aside")
    pack(home.machine, home.path / ARCHIVE_NAME)
    at("packed")
    set_state(home, manifest, ParkState.PARKED)
    at("parked")
    log.info("parked", migration=manifest.migration_id, domain=manifest.domain_uuid)


def _move_aside(file: ParkedFile) -> None:
    original, parked = Path(file.original), Path(file.parked)
    if parked.exists() and not original.exists():
        return
    try:
        status = original.lstat()
    except FileNotFoundError as error:
        raise missing_disk(file) from error
    if status.st_ino != file.inode:
        raise DroverError(
            Reason.DISK_CHANGED,
            f"Disk {file.volume_id} ({original}) was replaced by another file meanwhile.",
            metadata={"volume_id": file.volume_id},
        )
    move_file(original, parked)


def _answer(home: Home, manifest: Manifest) -> Parked:
    archive = home.path / ARCHIVE_NAME
    status = archive.stat()
    baggage = domain_pb2.Volume(
        volume_id=BAGGAGE_VOLUME_ID,
        kind=domain_pb2.VOLUME_KIND_BAGGAGE,
        name=ARCHIVE_NAME,
        path=str(archive),
        format="raw",
        size_bytes=status.st_size,
        allocated_bytes=status.st_blocks * _SECTOR_BYTES,
        virtual_size_bytes=status.st_size,
    )
    return Parked((*volumes_of(manifest), baggage), home.manifest, manifest.domain_name)


def _refuse_sharers(dom: libvirt.virDomain, paths: Sequence[Path], roots: StorageRoots) -> None:
    for sharer in find_sharers(dom.connect(), dom.UUIDString(), paths, roots):
        raise DroverError(
            Reason.INSTANCE_IMMOVABLE,
            f"{sharer}, which would be left without it.",
            subject=f"domains/{dom.UUIDString()}",
        )
