"""The manifest of a parked machine: what was moved where, and how to undo it.

It lies beside the parked files, is written before anything is moved, and is meant
for people as well: with `how_to_restore` and the files that it names, virsh and mv
put the machine back without Drover.

The manifests of all later states are written together with the first one, beside
it. So a change of state is a rename, for which a full file system has room.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import msgspec
import structlog
from google.protobuf import json_format

from controlplane.common.errors import DroverError
from controlplane.common.foreign_json import decode
from controlplane.common.reasons import Reason
from hostd.disks.durable import sync_directory, write_file
from hostd.disks.roots import PARKING_DIRECTORY, StorageRoots
from hostd.disks.small_state import aside_name
from hostd.libvirt.capture import DOMAIN, NVRAM, TPM, Meta, checkpoint_files, snapshot_files
from hostd.v1 import domain_pb2

log = structlog.stdlib.get_logger(__name__)

MANIFEST = "manifest.json"
MACHINE = "machine"
_MIGRATION_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class ParkState(StrEnum):
    """Where a parked machine stands; drawn in `hostd.disks.parking`."""

    PARKING = "PARKING"
    PARKED = "PARKED"
    UNPARKING = "UNPARKING"
    DISCARDING = "DISCARDING"


class ParkedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that is set aside.

    Attributes:
        volume_id: The disk.
        original: Where it belongs.
        parked: Where it is set aside, on the same file system.
        inode: Its inode number, which a rename keeps.
    """

    volume_id: str
    original: str
    parked: str
    inode: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What parking does to a machine.

    Attributes:
        how_to_restore: Commands for a person, in order.
        state: Where it stands.
        migration_id: The move that parked it.
        domain_uuid: libvirt UUID.
        domain_name: libvirt name.
        machine: Directory of the captured domain, without its disks.
        files: The disks.
        nvram: Where the NVRAM file belongs; empty without one.
        tpm: Where the TPM state belongs; empty without any.
        volumes: Every volume of the machine, as hostd.v1.Volume in JSON, with the
            paths of before.
    """

    version: int = 1
    how_to_restore: list[str]
    state: ParkState
    migration_id: str
    domain_uuid: str
    domain_name: str
    machine: str
    files: list[ParkedFile]
    nvram: str = ""
    tpm: str = ""
    volumes: list[msgspec.Raw] = []


@dataclass(frozen=True)
class Home:
    """The directory that holds a manifest and what lies beside it."""

    path: Path

    @property
    def manifest(self) -> Path:
        """The manifest."""
        return self.path / MANIFEST

    def ahead(self, state: ParkState) -> Path:
        """The manifest of a state that is still to come."""
        return self.path / f"{MANIFEST}.{state}"

    @property
    def machine(self) -> Path:
        """The captured domain."""
        return self.path / MACHINE


def check_migration_id(migration_id: str) -> str:
    """Return a migration id that is safe in a path.

    Raises:
        DroverError: INVALID_FIELD.
    """
    if not _MIGRATION_ID.fullmatch(migration_id):
        raise DroverError(
            Reason.INVALID_FIELD,
            f"{migration_id!r} is not a UUID in lower-case form.",
            subject="migration_id",
        )
    return migration_id


def homes(migration_id: str, roots: StorageRoots, state_dir: Path) -> list[Home]:
    """Every place where a move may have a home on this host."""
    check_migration_id(migration_id)
    return [Home(place / migration_id) for place in parking_places(roots, state_dir)]


def parking_places(roots: StorageRoots, state_dir: Path) -> list[Path]:
    """The directories that hold parked machines, existing or not."""
    directories = {roots.directory(name) / PARKING_DIRECTORY for name in roots.names}
    return [*sorted(directories), state_dir / "parked"]


def find_manifest(
    migration_id: str, roots: StorageRoots, state_dir: Path
) -> tuple[Home, Manifest] | None:
    """The manifest of a move, or None.

    Raises:
        DroverError: DISK_IO_ERROR when there is one that cannot be read.
    """
    for home in homes(migration_id, roots, state_dir):
        if home.manifest.exists():
            return home, read_manifest(home)
    return None


def all_manifests(roots: StorageRoots, state_dir: Path) -> Iterator[tuple[Home, Manifest]]:
    """The manifests on this host; one that cannot be read is logged and left out."""
    for place in parking_places(roots, state_dir):
        for path in sorted(place.glob(f"*/{MANIFEST}")):
            try:
                yield Home(path.parent), read_manifest(Home(path.parent))
            except DroverError as error:
                log.error("a manifest cannot be read", path=str(path), error=error.message)


def read_manifest(home: Home) -> Manifest:
    """Read a manifest.

    Raises:
        DroverError: DISK_IO_ERROR.
    """
    try:
        manifest = decode(home.manifest.read_bytes(), Manifest)
        volumes_of(manifest)
    except (OSError, ValueError, json_format.ParseError) as error:
        raise DroverError(
            Reason.DISK_IO_ERROR,
            f"The manifest {home.manifest} cannot be read: {error}.",
            subject=str(home.manifest),
        ) from error
    return manifest


def write_manifest(home: Home, manifest: Manifest) -> None:
    """Write a manifest and those of the states to come; durable when it returns.

    Raises:
        OSError: They cannot be written; then there is no manifest.
    """
    for state in ParkState:
        if state is not manifest.state:
            _write(home.ahead(state), msgspec.structs.replace(manifest, state=state))
    _write(home.manifest, manifest)


def set_state(home: Home, manifest: Manifest, state: ParkState) -> Manifest:
    """Change the state in a manifest; durable when it returns.

    Raises:
        OSError: It cannot be changed.
    """
    changed = msgspec.structs.replace(manifest, state=state)
    if manifest.state is state:
        return manifest
    if home.ahead(state).exists():
        home.ahead(state).rename(home.manifest)
        sync_directory(home.path)
    else:
        # An earlier hostd wrote none ahead.
        _write(home.manifest, changed)
    return changed


def _write(path: Path, manifest: Manifest) -> None:
    write_file(path, msgspec.json.format(msgspec.json.encode(manifest), indent=2))


def volumes_of(manifest: Manifest) -> list[domain_pb2.Volume]:
    """The volumes with the paths at which they are while parked."""
    parked = {file.volume_id: file.parked for file in manifest.files}
    volumes = []
    for raw in manifest.volumes:
        volume = json_format.Parse(bytes(raw), domain_pb2.Volume())
        volume.path = parked.get(volume.volume_id, volume.path)
        volumes.append(volume)
    return volumes


def volume_json(volume: domain_pb2.Volume) -> msgspec.Raw:
    """A volume as a manifest holds it."""
    text = json_format.MessageToJson(volume, indent=None, preserving_proto_field_name=True)
    return msgspec.Raw(text.encode())


def restore_commands(home: Home, meta: Meta, files: list[ParkedFile], tpm: str) -> list[str]:
    """The commands that put a machine back by hand."""
    machine = home.machine

    def move(source: Path | str, target: str) -> str:
        return f"mv -n {shlex.quote(str(source))} {shlex.quote(target)}"

    uuid = shlex.quote(meta.uuid)
    lines = [
        f"# Puts the machine {meta.name} back on this host as it was, without Drover.",
        "# First make sure that it does not run on another host, and stop drover-hostd here.",
        "# A file that is in its place already was not moved yet: go on with the next line.",
    ]
    lines += [move(file.parked, file.original) for file in files]
    if meta.nvram:
        lines.append(move(machine / NVRAM, meta.nvram))
    if tpm:
        lines.append(move(machine / TPM, tpm))
    lines.append(f"virsh define {shlex.quote(str(machine / DOMAIN))}")
    for path in snapshot_files(machine):
        current = " --current" if path.name == meta.current_snapshot else ""
        lines.append(f"virsh snapshot-create {uuid} {shlex.quote(str(path))} --redefine{current}")
    for path in checkpoint_files(machine):
        lines.append(f"virsh checkpoint-create {uuid} {shlex.quote(str(path))} --redefine")
    if meta.autostart:
        lines.append(f"virsh autostart {uuid}")
    lines.append(f"# Then remove {home.path}, which is empty of disks now.")
    for place in (meta.nvram, tpm):
        if place:
            aside = aside_name(Path(place), home.path.name)
            lines.append(f"# Remove {aside} as well: it was {place} before the move.")
    return lines
