"""A machine that is set aside: put back, deleted for good, or listed.

How it came there, and the states, are in `hostd.disks.parking`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import libvirt
import structlog

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.disks.baggage import ARCHIVE_NAME
from hostd.disks.durable import (
    CrashPoint,
    move_file,
    no_crash,
    remove_tree,
    sync_directory,
)
from hostd.disks.manifest import (
    Home,
    ParkedFile,
    ParkState,
    all_manifests,
    check_migration_id,
    find_manifest,
    homes,
    set_state,
)
from hostd.disks.roots import StorageRoots
from hostd.disks.small_state import (
    drop_small_state_aside,
    put_back_small_state,
)
from hostd.disks.trouble import io_trouble
from hostd.disks.users import find_users
from hostd.libvirt.capture import define, keeps_tpm, read_meta
from hostd.libvirt.domains import try_find
from hostd.v1 import host_pb2

log = structlog.stdlib.get_logger(__name__)

_SECTOR_BYTES = 512


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
            remove_leftovers(homes(migration_id, roots, state_dir), [])
            return
        home, manifest = found
        if manifest.state is ParkState.DISCARDING:
            raise being_discarded(migration_id)
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
        remove_leftovers(homes(migration_id, roots, state_dir), manifest.files)
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
            remove_leftovers(homes(migration_id, roots, state_dir), [])
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
        refuse_users(paths, manifest.domain_name)
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
        remove_leftovers(homes(migration_id, roots, state_dir), manifest.files)
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


def _put_back(file: ParkedFile) -> None:
    original, parked = Path(file.original), Path(file.parked)
    if not parked.exists():
        if original.exists():
            return
        raise missing_disk(file)
    try:
        move_file(parked, original)
    except FileExistsError as error:
        raise DroverError(
            Reason.TARGET_FILE_EXISTS,
            f"Another file has taken the place of disk {file.volume_id} at {original};"
            f" the disk is kept at {parked}.",
            metadata={"volume_id": file.volume_id, "path": str(original)},
        ) from error


def refuse_users(paths: Sequence[Path], domain_name: str) -> None:
    """Raise when a process has one of the files open.

    Raises:
        DroverError: DISK_IN_USE.
    """
    for user in find_users(paths):
        raise DroverError(
            Reason.DISK_IN_USE,
            f"{user.path} of {domain_name} is open in {user}.",
            metadata={"path": str(user.path), "pid": str(user.pid), "command": user.command},
        )


def remove_leftovers(all_homes: Sequence[Home], files: Sequence[ParkedFile]) -> None:
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


def missing_disk(file: ParkedFile) -> DroverError:
    """That a disk is in neither of its places."""
    return DroverError(
        Reason.DISK_MISSING,
        f"Disk {file.volume_id} is neither at {file.original} nor at {file.parked}.",
        metadata={"volume_id": file.volume_id},
    )


def being_discarded(migration_id: str) -> DroverError:
    """That a machine is on its way out for good."""
    return DroverError(
        Reason.PARKED_NOT_FOUND,
        "The parked copy is being deleted for good; it cannot be put back.",
        subject=f"migrations/{migration_id}",
    )
