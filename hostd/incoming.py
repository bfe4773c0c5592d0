"""The files of a move on its target: where they go, what room they take, who made them.

Every file is noted in the state before it is created, and is removed only when
diskmover's receipt proves that this move placed it. Peers name volumes by storage
root and relative name; only this host turns those into paths.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

import structlog

import diskmover
from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from diskmover import IncomingVolume, MoverError
from hostd.config import HostdConfig
from hostd.made_directories import MadeDirectories
from hostd.preflight_storage import placements
from hostd.records import CreatedFile, Records, TargetPhase, TargetRecord
from hostd.transfer import mover_error
from hostd.v1 import domain_pb2, preflight_pb2

log = structlog.stdlib.get_logger(__name__)

BACKING = domain_pb2.VOLUME_KIND_BACKING
BAGGAGE = domain_pb2.VOLUME_KIND_BAGGAGE
# Only read, so that several machines may have the same file.
SHARED = (BACKING, domain_pb2.VOLUME_KIND_MEDIUM)
BAGGAGE_FILE = "baggage.tar.zst"
# Other machines may share a backing file and run under another user.
_BACKING_MODE = 0o644
_DISK_MODE = 0o600


class IncomingFiles:
    """Files that come to this host. All methods block.

    Args:
        config: Storage roots and the state directory.
        records: Where files are noted.
        directories: Where the directories are noted that are made for them.
    """

    def __init__(self, config: HostdConfig, records: Records, directories: MadeDirectories) -> None:
        self._roots = config.storage.roots
        self._private = config.state.directory / "moves"
        self._records = records
        self._directories = directories

    # --- room

    def room(self, machine: preflight_pb2.IncomingMachine, *, preallocate: bool) -> dict[str, int]:
        """Bytes that the volumes will take, by root name."""
        root_of = {place.volume_id: place.root for place in placements(machine)}
        total: dict[str, int] = {}
        for volume in machine.domain.volumes:
            size_bytes = volume.size_bytes if preallocate else volume.allocated_bytes
            root = root_of[volume.volume_id]
            total[root] = total.get(root, 0) + size_bytes
        return total

    def place_beside(
        self, machine: preflight_pb2.IncomingMachine, tag: str
    ) -> preflight_pb2.IncomingMachine:
        """Give backing files and media whose place is taken a place beside it.

        Hosts often have the same base images and CDs. Whether a file of the same name is the
        same file is known once its twin has arrived and has a digest: then one of the
        two goes (`drop_duplicates`).

        Args:
            machine: The machine.
            tag: Makes the place a move's own.
        """
        placed = preflight_pb2.IncomingMachine()
        placed.CopyFrom(machine)
        places = placements(machine)
        kept = {
            path
            for record in self._records.targets()
            if record.migration_id != tag
            for path in self.kept_places(record)
        }
        del placed.volume_mappings[:]
        kinds = {volume.volume_id: volume.kind for volume in machine.domain.volumes}
        taken: set[tuple[str, str]] = set()
        for place in places:
            beside = preflight_pb2.VolumeMapping()
            beside.CopyFrom(place)
            if kinds.get(place.volume_id) in SHARED and (
                (place.root, place.name) in taken or self._is_taken(place, kept)
            ):
                beside.name = f"{place.name}.drover-{tag[:8]}-{place.volume_id}"
            taken.add((beside.root, beside.name))
            placed.volume_mappings.append(beside)
        return placed

    def _is_taken(self, place: preflight_pb2.VolumeMapping, kept: Collection[str]) -> bool:
        root = self._roots.get(place.root)
        if root is None:
            return False
        path = root / place.name
        return os.path.lexists(path) or str(path) in kept

    def kept_places(self, record: TargetRecord) -> frozenset[str]:
        """Paths at which a move's volumes are, or will be."""
        return frozenset(
            str(self._roots[root] / name)
            for root, name in record.placements.values()
            if root in self._roots
        )

    def reserved_bytes(self, *, but: str = "") -> dict[str, int]:
        """Bytes that moves have reserved and not yet filled, by root name.

        Args:
            but: A migration whose own reservation does not count.
        """
        total: dict[str, int] = {}
        for record in self._records.targets():
            if record.migration_id == but or record.phase is TargetPhase.BUILT:
                continue
            filled = self._filled_bytes(record.migration_id)
            for root, size_bytes in record.reservations.items():
                open_bytes = max(0, size_bytes - filled.get(self._roots.get(root), 0))
                total[root] = total.get(root, 0) + open_bytes
        return total

    def _filled_bytes(self, migration_id: str) -> dict[Path | None, int]:
        filled: dict[Path | None, int] = {}
        for file in self._records.created_files(migration_id).values():
            part = file.path.with_name(f".{file.path.name}.dm-{migration_id}.part")
            for path in (part, file.path):
                try:
                    found = path.lstat()
                except OSError:
                    continue
                filled[file.root] = filled.get(file.root, 0) + found.st_blocks * 512
        return filled

    # --- files

    def announce(self, record: TargetRecord, volume: domain_pb2.Volume) -> CreatedFile:
        """Note a volume that will arrive, and make its directory.

        Raises:
            DroverError: INVALID_FIELD, TARGET_LACKS_ROOT, DISK_OUTSIDE_ROOTS.
        """
        return self._note(record, volume)

    def allocate(self, record: TargetRecord, volume: domain_pb2.Volume) -> None:
        """Reserve the space of a volume now, all of it.

        Raises:
            MoverError: There is no room, or the name is taken.
            DroverError: As `announce`.
        """
        file = self._note(record, volume)
        diskmover.reserve(
            file.root, file.name, record.migration_id, volume.size_bytes, allocate=True
        )

    def _note(self, record: TargetRecord, volume: domain_pb2.Volume) -> CreatedFile:
        noted = self._records.created_files(record.migration_id).get(volume.volume_id)
        if noted is None:
            noted = self._place(record, volume)
            self._records.add_created_file(record.migration_id, noted)
        self._directories.make_parents(record.migration_id, noted.root, noted.name)
        return noted

    def _place(self, record: TargetRecord, volume: domain_pb2.Volume) -> CreatedFile:
        if not volume.volume_id:
            raise _bad_field("volumes.volume_id", "is empty")
        if volume.kind == BAGGAGE:
            return CreatedFile(volume.volume_id, self.private(record.migration_id), BAGGAGE_FILE)
        if volume.volume_id not in record.placements:
            raise _bad_field("volumes", f"{volume.volume_id} was not announced to PrepareTarget")
        root, name = record.placements[volume.volume_id]
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts:
            raise _bad_field("volumes.name", f"{name!r} is not a relative path")
        if root not in self._roots:
            raise DroverError(
                Reason.TARGET_LACKS_ROOT,
                f"Storage root {root!r} of volume {volume.volume_id} is not configured here.",
                subject=f"migrations/{record.migration_id}",
                metadata={"root": root},
            )
        return CreatedFile(volume.volume_id, self._roots[root], name)

    def private(self, migration_id: str) -> Path:
        """A folder of this move that only hostd can read; made when missing."""
        folder = self._private / migration_id
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def baggage(self, record: TargetRecord) -> Path:
        """The baggage of a move, once it has arrived."""
        return self.private(record.migration_id) / BAGGAGE_FILE

    def volume_paths(self, record: TargetRecord) -> dict[str, Path]:
        """Where the machine's volumes are on this host, by volume id."""
        arrived = self._records.created_files(record.migration_id)
        paths: dict[str, Path] = {}
        for volume in record.machine.domain.volumes:
            if volume.volume_id in arrived:
                paths[volume.volume_id] = arrived[volume.volume_id].path
            elif volume.volume_id in record.placements:
                # A backing file whose twin was here already.
                root, name = record.placements[volume.volume_id]
                paths[volume.volume_id] = self._roots[root] / _twin(name, volume.volume_id)
        return paths

    def twins(self, record: TargetRecord) -> dict[str, Path]:
        """Files that were here already beside one that arrived, by volume id.

        What another move has brought is left out while that move may take it away.
        """
        brought = {
            file.path
            for other in self._records.targets()
            if other.migration_id != record.migration_id and other.phase is not TargetPhase.BUILT
            for file in self._records.created_files(other.migration_id).values()
        }
        found: dict[str, Path] = {}
        for file in self._records.created_files(record.migration_id).values():
            name = _twin(file.name, file.volume_id)
            if name != file.name and file.root / name not in brought and _is_file(file.root, name):
                found[file.volume_id] = file.root / name
        return found

    def drop_duplicates(
        self, record: TargetRecord, twins: Mapping[str, Path], digests: Mapping[str, str]
    ) -> None:
        """Remove files that arrived beside an identical one.

        Args:
            record: The move.
            twins: volume_id -> file that was here already and that nobody writes to.
            digests: volume_id -> digest of what arrived.

        Raises:
            DroverError: A file cannot be read or removed.
        """
        for volume_id, twin in twins.items():
            file = self._records.created_files(record.migration_id)[volume_id]
            try:
                if diskmover.digest(twin).digest != digests[volume_id]:
                    continue
                diskmover.discard_published(file.root, file.name, record.migration_id)
            except MoverError as error:
                raise mover_error(error, f"migrations/{record.migration_id}") from error
            self._records.drop_created_file(record.migration_id, file.volume_id)
            log.info("an identical file was here already", path=str(twin))

    def remove(self, record: TargetRecord, *, keep: Collection[Path] = ()) -> None:
        """Remove what the move created here, and nothing else.

        Args:
            record: The move.
            keep: Published files to leave where they are.

        Raises:
            DroverError: TARGET_LACKS_ROOT when a storage root that files were brought to
                is missing; or a file cannot be removed.
        """
        private = self._private / record.migration_id
        for file in self._records.created_files(record.migration_id).values():
            if not file.root.exists():
                if file.root == private:
                    # Gone already, with all that was in it.
                    continue
                raise _missing_root(file, record.migration_id)
            try:
                if file.path not in keep:
                    diskmover.discard_published(file.root, file.name, record.migration_id)
                diskmover.discard(file.root, file.name, record.migration_id)
            except MoverError as error:
                raise mover_error(error, f"migrations/{record.migration_id}") from error
        self._directories.remove(record.migration_id)
        shutil.rmtree(private, ignore_errors=True)

    def keep(self, record: TargetRecord) -> None:
        """Leave the volumes to the machine and remove what only the move needed.

        Raises:
            DroverError: A file cannot be removed.
        """
        for file in self._records.created_files(record.migration_id).values():
            try:
                diskmover.discard(file.root, file.name, record.migration_id)
            except MoverError as error:
                raise mover_error(error, f"migrations/{record.migration_id}") from error
        self._directories.forget(record.migration_id)
        shutil.rmtree(self._private / record.migration_id, ignore_errors=True)


def incoming(
    file: CreatedFile,
    volume: domain_pb2.Volume,
    seeds: tuple[tuple[Path, str], ...],
    *,
    readback: bool,
) -> IncomingVolume:
    """A volume as diskmover receives it, reusing blocks of `seeds`."""
    return IncomingVolume(
        volume_id=file.volume_id,
        root=file.root,
        name=file.name,
        size_bytes=volume.size_bytes,
        mode=_BACKING_MODE if volume.kind == BACKING else _DISK_MODE,
        readback=readback,
        seeds=seeds,
    )


def twin_name(file: CreatedFile) -> str:
    """The name beside which `place_beside` put a file; its own name if it did not."""
    return _twin(file.name, file.volume_id)


def present_path(file: CreatedFile) -> Path:
    """Where a file that arrived is: its own place, or its twin's if it was dropped."""
    twin = file.root / _twin(file.name, file.volume_id)
    return file.path if file.path.exists() or not twin.exists() else twin


def _twin(name: str, volume_id: str) -> str:
    """The name beside which `place_beside` put a file; the name itself if it did not."""
    return re.sub(rf"\.drover-[0-9a-f]{{8}}-{re.escape(volume_id)}$", "", name)


def _is_file(root: Path, name: str) -> bool:
    """True for a plain file that no symlink leads to."""
    try:
        descriptor = diskmover.open_beneath(root, name, os.O_RDONLY | os.O_NONBLOCK)
    except (MoverError, OSError):
        return False
    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def _missing_root(file: CreatedFile, migration_id: str) -> DroverError:
    return DroverError(
        Reason.TARGET_LACKS_ROOT,
        f"The storage root {file.root} is not there, so volume {file.volume_id} of migration"
        f" {migration_id} cannot be removed from it. Mount it and try again.",
        subject=f"migrations/{migration_id}",
        metadata={"root": str(file.root), "volume_id": file.volume_id},
    )


def _bad_field(field: str, what: str) -> DroverError:
    return DroverError(Reason.INVALID_FIELD, f"{field} {what}.", subject=field)
