"""What is on this host already and need not be sent again.

Blocks of these files are reused by content: diskmover hashes each one as it
arrives, and only reads the files. Nothing is offered but what others may know the
content of: base images and CDs, and files that the operator has named. The disk
of another machine never is: a sender could find out what it holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog

from controlplane.common.errors import DroverError
from hostd.config import StorageConfig
from hostd.hypervisor import Hypervisor
from hostd.incoming import SHARED, twin_name
from hostd.records import CreatedFile
from hostd.v1 import domain_pb2

log = structlog.stdlib.get_logger(__name__)

Seed = tuple[Path, str]

DISK = domain_pb2.VOLUME_KIND_DISK
# Each file is read once as a whole before anything is sent.
_MOST_BASES = 4


class Reuse:
    """Finds files whose blocks may be reused. All methods block.

    Args:
        storage: Roots, and the seeds that the operator has named.
        hypervisor: Knows the machines here, and what they have as base images.
    """

    def __init__(self, storage: StorageConfig, hypervisor: Hypervisor) -> None:
        self._roots = storage.roots
        self._named = [(storage.roots[root], name) for root, name in storage.seed_places]
        self._hypervisor = hypervisor

    def seeds(
        self, volumes: Sequence[domain_pb2.Volume], files: Mapping[str, CreatedFile]
    ) -> dict[str, tuple[Seed, ...]]:
        """Files to reuse, by volume id; the likeliest first.

        Args:
            volumes: What will arrive.
            files: volume_id -> where it will.
        """
        bases = self._bases() if any(volume.kind in SHARED for volume in volumes) else []
        found: dict[str, tuple[Seed, ...]] = {}
        for volume in volumes:
            seeds: list[Seed] = []
            if volume.kind in SHARED:
                seeds += _twin(files[volume.volume_id])
                seeds += self._alike(volume, bases)
            if volume.kind in (DISK, *SHARED):
                seeds += self._named
            found[volume.volume_id] = tuple(dict.fromkeys(seeds))
        return found

    def _alike(self, volume: domain_pb2.Volume, bases: Sequence[domain_pb2.Volume]) -> list[Seed]:
        """Base images that may be the same one under another name."""
        alike = {
            (self._roots[base.root], base.name): None
            for base in bases
            if base.size_bytes == volume.size_bytes
        }
        return list(alike)[:_MOST_BASES]

    def _bases(self) -> list[domain_pb2.Volume]:
        try:
            here = self._hypervisor.volumes()
        except DroverError as error:
            log.warning("base images are sent, not looked for", error=error.message)
            return []
        return [volume for volume in here if volume.kind in SHARED and volume.root in self._roots]


def _twin(file: CreatedFile) -> list[Seed]:
    name = twin_name(file)
    return [(file.root, name)] if name != file.name else []
