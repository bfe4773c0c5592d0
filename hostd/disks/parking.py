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
from contextlib import suppress
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
    remove_tree,
    sync_directory,
)
from hostd.disks.manifest import (
    Home,
    Manifest,
    ParkedFile,
    ParkState,
    all_manifests,
    check_migration_id,
    find_manifest,
    homes,
    restore_commands,
    set_state,
    volume_json,
    volumes_of,
    write_manifest,
)
from hostd.disks.roots import PARKING_DIRECTORY, StorageRoots
from hostd.disks.small_state import (
    drop_small_state_aside,
    put_back_small_state,
    set_aside_small_state,
)
from hostd.disks.trouble import io_trouble
from hostd.disks.users import find_users
from hostd.libvirt.capture import capture, define, keeps_tpm, read_meta, undefine
from hostd.libvirt.domains import Inspection, inspect, try_find
from hostd.libvirt.sharing import find_sharers
from hostd.v1 import domain_pb2, host_pb2

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
            raise _discarded(migration_id)
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


def unpark(
    conn: libvirt.virConnect,
    migration_id: str,
    roots: StorageRoots,
    state_dir: Path,
    *,
    at: CrashPoint = no_crash,
) -> None:
    """Put a machine back as it was, powered off; nothing when it is not parked.

    It needs no free block where its files lie: they all are there, under other names.

    Args:
        conn: libvirt.
        migration_id: The move that parked it.
        roots: As for `park`.
        state_dir: As for `park`.
        at: As for `park`.

    Raises:
        DroverError: PARKED_NOT_FOUND when it is being discarded;
            TARGET_FILE_EXISTS when another file took a disk's place;
            TARGET_NAME_TAKEN, BUILD_FAILED, DISK_MISSING, DISK_IO_ERROR,
            HOST_DISK_FULL when libvirt has no room for the definition,
            LIBVIRT_UNAVAILABLE. It can be repeated once the cause is gone.
    """
    check_migration_id(migration_id)
    with io_trouble(f"migrations/{migration_id}", full=Reason.HOST_DISK_FULL):
        found = find_manifest(migration_id, roots, state_dir)
        if found is None:
            _remove_leftovers(homes(migration_id, roots, state_dir), [])
            return
        home, manifest = found
        if manifest.state is ParkState.DISCARDING:
            raise _discarded(migration_id)
        manifest = set_state(home, manifest, ParkState.UNPARKING)
        at("unparking")
        for file in manifest.files:
            _put_back(file)
            at(f"back {file.volume_id}")
        # A libvirt that removes TPM state may have died in the middle of it.
        replace_tpm = not keeps_tpm(conn) and try_find(conn, manifest.domain_uuid) is None
        put_back_small_state(
            home.machine, manifest.nvram, manifest.tpm, aside=migration_id, replace_tpm=replace_tpm
        )
        at("small state back")
        meta = read_meta(home.machine)
        define(conn, home.machine, meta, autostart=meta.autostart, full=Reason.HOST_DISK_FULL)
        at("defined")
        home.manifest.unlink()
        sync_directory(home.path)
        at("manifest gone")
        _remove_leftovers(homes(migration_id, roots, state_dir), manifest.files)
    log.info("unparked", migration=migration_id, domain=manifest.domain_uuid)


def discard(
    migration_id: str, roots: StorageRoots, state_dir: Path, *, at: CrashPoint = no_crash
) -> int:
    """Delete a parked machine for good; nothing when it is not parked.

    Returns:
        Allocated bytes of what this call deleted.

    Raises:
        DroverError: MIGRATION_STATE when the machine is not wholly parked;
            DISK_IN_USE; DISK_IO_ERROR; HOST_DISK_FULL.
    """
    check_migration_id(migration_id)
    with io_trouble(f"migrations/{migration_id}", full=Reason.HOST_DISK_FULL):
        found = find_manifest(migration_id, roots, state_dir)
        if found is None:
            _remove_leftovers(homes(migration_id, roots, state_dir), [])
            return 0
        home, manifest = found
        if manifest.state not in (ParkState.PARKED, ParkState.DISCARDING):
            raise DroverError(
                Reason.MIGRATION_STATE,
                f"{manifest.domain_name} is {manifest.state} here, not PARKED;"
                " nothing was deleted.",
                subject=f"migrations/{migration_id}",
            )
        paths = [Path(file.parked) for file in manifest.files]
        _refuse_users(paths, manifest.domain_name)
        manifest = set_state(home, manifest, ParkState.DISCARDING)
        at("discarding")
        freed_bytes = 0
        for path in [*paths, home.path / ARCHIVE_NAME]:
            freed_bytes += _delete(path)
            at(f"deleted {path.name}")
        remove_tree(home.machine)
        drop_small_state_aside(manifest.nvram, manifest.tpm, aside=migration_id)
        at("machine gone")
        _remove_volume_directories(manifest.files)
        home.manifest.unlink()
        sync_directory(home.path)
        at("manifest gone")
        _remove_leftovers(homes(migration_id, roots, state_dir), manifest.files)
    log.info("parked copy deleted", migration=migration_id, freed_bytes=freed_bytes)
    return freed_bytes


def find_parked(roots: StorageRoots, state_dir: Path) -> list[host_pb2.ParkedMachine]:
    """Every parked machine on this host, in name order."""
    found = []
    for home, manifest in all_manifests(roots, state_dir):
        files = [Path(file.parked) for file in manifest.files]
        files += [path for path in home.path.rglob("*") if path not in files]
        found.append(
            host_pb2.ParkedMachine(
                domain_uuid=manifest.domain_uuid,
                domain_name=manifest.domain_name,
                migration_id=manifest.migration_id,
                manifest_path=str(home.manifest),
                allocated_bytes=sum(_allocated_bytes(path) for path in files),
            )
        )
    return sorted(found, key=lambda machine: machine.domain_name)


# --- parking


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
    _refuse_users(paths, found.domain.name)
    _refuse_sharers(dom, paths, roots)
    all_homes = homes(migration_id, roots, state_dir)
    _remove_leftovers(all_homes, [])
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
    _refuse_users([Path(file.original) for file in manifest.files], manifest.domain_name)
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
        raise _missing(file) from error
    if status.st_ino != file.inode:
        raise DroverError(
            Reason.DISK_CHANGED,
            f"Disk {file.volume_id} ({original}) was replaced by another file meanwhile.",
            metadata={"volume_id": file.volume_id},
        )
    move_file(original, parked)


def _put_back(file: ParkedFile) -> None:
    original, parked = Path(file.original), Path(file.parked)
    if not parked.exists():
        if original.exists():
            return
        raise _missing(file)
    try:
        move_file(parked, original)
    except FileExistsError as error:
        raise DroverError(
            Reason.TARGET_FILE_EXISTS,
            f"Another file has taken the place of disk {file.volume_id} at {original};"
            f" the disk is kept at {parked}.",
            metadata={"volume_id": file.volume_id, "path": str(original)},
        ) from error


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


# --- shared


def _refuse_users(paths: Sequence[Path], domain_name: str) -> None:
    for user in find_users(paths):
        raise DroverError(
            Reason.DISK_IN_USE,
            f"{user.path} of {domain_name} is open in {user}.",
            metadata={"path": str(user.path), "pid": str(user.pid), "command": user.command},
        )


def _refuse_sharers(dom: libvirt.virDomain, paths: Sequence[Path], roots: StorageRoots) -> None:
    for sharer in find_sharers(dom.connect(), dom.UUIDString(), paths, roots):
        raise DroverError(
            Reason.INSTANCE_IMMOVABLE,
            f"{sharer}, which would be left without it.",
            subject=f"domains/{dom.UUIDString()}",
        )


def _remove_leftovers(all_homes: Sequence[Home], files: Sequence[ParkedFile]) -> None:
    """Remove what is left where no manifest is. A disk is never among it."""
    _remove_volume_directories(files)
    for home in all_homes:
        if not home.path.is_dir() or home.manifest.exists():
            continue
        remove_tree(home.machine)
        for path in home.path.iterdir():
            if path.is_dir():
                _remove_empty_directory(path)
            elif path.name.startswith((ARCHIVE_NAME, "manifest.json")):
                path.unlink()
        _remove_empty_directory(home.path)
        _remove_empty_directory(home.path.parent)


def _remove_volume_directories(files: Sequence[ParkedFile]) -> None:
    for file in files:
        volume = Path(file.parked).parent
        for directory in (volume, volume.parent, volume.parent.parent):
            _remove_empty_directory(directory)


def _remove_empty_directory(path: Path) -> None:
    # Not empty, or gone: both are fine.
    with suppress(OSError):
        path.rmdir()


def _delete(path: Path) -> int:
    try:
        freed_bytes = _allocated_bytes(path)
        path.unlink()
    except FileNotFoundError:
        return 0
    sync_directory(path.parent)
    return freed_bytes


def _allocated_bytes(path: Path) -> int:
    with suppress(OSError):
        status = path.lstat()
        return 0 if path.is_dir() else status.st_blocks * _SECTOR_BYTES
    return 0


def _missing(file: ParkedFile) -> DroverError:
    return DroverError(
        Reason.DISK_MISSING,
        f"Disk {file.volume_id} is neither at {file.original} nor at {file.parked}.",
        metadata={"volume_id": file.volume_id},
    )


def _discarded(migration_id: str) -> DroverError:
    return DroverError(
        Reason.PARKED_NOT_FOUND,
        "The parked copy is being deleted for good; it cannot be put back.",
        subject=f"migrations/{migration_id}",
    )
