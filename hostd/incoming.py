"""The files of a move on its target: where they go, what room they take, who made them.

Every file is noted in the state before it is created, and is removed only when
diskmover's receipt proves that this move placed it. Peers name volumes by storage
root and relative name; only this host turns those into paths.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import structlog

import diskmover
from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from diskmover import IncomingVolume, MoverError
from hostd.config import HostdConfig
from hostd.records import CreatedFile, Records, TargetPhase, TargetRecord
from hostd.transfer import mover_error
from hostd.v1 import domain_pb2, preflight_pb2

log = structlog.stdlib.get_logger(__name__)

BAGGAGE = domain_pb2.VOLUME_KIND_BAGGAGE
BAGGAGE_FILE = "baggage.tar.zst"


class IncomingFiles:
    """Files that come to this host. All methods block.

    Args:
        config: Storage roots and the state directory.
        records: Where files are noted.
    """

    def __init__(self, config: HostdConfig, records: Records) -> None:
        self._roots = config.storage.roots
        self._private = config.state.directory / "moves"
        self._records = records

    # --- room

    def room(
        self,
        machine: preflight_pb2.IncomingMachine,
        placements: Mapping[str, tuple[str, str]],
        preallocate: bool,
    ) -> dict[str, int]:
        """Bytes that the volumes will take, by root name."""
        total: dict[str, int] = {}
        for volume in machine.domain.volumes:
            if volume.volume_id in placements:
                root = placements[volume.volume_id][0]
                size_bytes = volume.size_bytes if preallocate else volume.allocated_bytes
                total[root] = total.get(root, 0) + size_bytes
        return total

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

    def announce(self, record: TargetRecord, volume: domain_pb2.Volume) -> IncomingVolume:
        """Note a volume that will arrive, and make its directory.

        Raises:
            DroverError: INVALID_FIELD, TARGET_LACKS_ROOT, DISK_OUTSIDE_ROOTS.
        """
        file = self._note(record, volume)
        return IncomingVolume(
            volume_id=file.volume_id,
            root=file.root,
            name=file.name,
            size_bytes=volume.size_bytes,
        )

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
        self._make_directory(noted)
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

    def _make_directory(self, file: CreatedFile) -> None:
        """Make the directories between root and file, following no symlink."""
        made = ""
        for part in PurePosixPath(file.name).parts[:-1]:
            try:
                parent = diskmover.open_beneath(
                    file.root, made or ".", os.O_RDONLY | os.O_DIRECTORY
                )
            except MoverError as error:
                raise mover_error(error, f"volumes/{file.volume_id}") from error
            try:
                os.mkdir(part, 0o755, dir_fd=parent)
            except FileExistsError:
                pass
            finally:
                os.close(parent)
            made = f"{made}/{part}" if made else part

    def private(self, migration_id: str) -> Path:
        """A folder of this move that only hostd can read; made when missing."""
        folder = self._private / migration_id
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def remove(self, record: TargetRecord) -> None:
        """Remove what the move created here, and nothing else.

        Raises:
            DroverError: A file cannot be removed.
        """
        for file in self._records.created_files(record.migration_id).values():
            if not file.root.exists():
                continue
            try:
                diskmover.discard_published(file.root, file.name, record.migration_id)
                diskmover.discard(file.root, file.name, record.migration_id)
            except MoverError as error:
                raise mover_error(error, f"migrations/{record.migration_id}") from error
        shutil.rmtree(self._private / record.migration_id, ignore_errors=True)

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
        shutil.rmtree(self._private / record.migration_id, ignore_errors=True)


def _bad_field(field: str, what: str) -> DroverError:
    return DroverError(Reason.INVALID_FIELD, f"{field} {what}.", subject=field)
