"""Which other domains of this host need a file.

Moving or deleting a disk that another machine has as its own disk or as a backing
file would break that machine, also while it is off and has nothing open.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import libvirt

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.disks.chain import ChainLink, DiskTop, read_chain
from hostd.disks.roots import StorageRoots
from hostd.libvirt.domains import read_definition, source_path
from hostd.libvirt.errors import translated
from hostd.v1 import domain_pb2


@dataclass(frozen=True)
class Sharer:
    """A domain that needs a file.

    Attributes:
        path: The file.
        domain_name: libvirt name of the domain.
        volume_id: What the file is to it.
        writes: It is a disk that the domain may write to.
    """

    path: Path
    domain_name: str
    volume_id: str
    writes: bool = False

    def __str__(self) -> str:
        return f"{self.path} is also {self.volume_id} of the domain {self.domain_name}"


def find_sharers(
    conn: libvirt.virConnect, domain_uuid: str, paths: Sequence[Path], roots: StorageRoots
) -> list[Sharer]:
    """Find domains other than `domain_uuid` that need any of the files.

    Raises:
        DroverError: LIBVIRT_UNAVAILABLE.
    """
    wanted = {os.path.realpath(path): path for path in paths}
    if not wanted:
        return []
    with translated(f"domains/{domain_uuid}"):
        others = [dom for dom in conn.listAllDomains(0) if dom.UUIDString() != domain_uuid]
    found = []
    for dom in others:
        try:
            with translated(f"domains/{domain_uuid}"):
                name, files = dom.name(), list(_files(dom, roots))
        except DroverError as error:
            if error.reason is Reason.DOMAIN_NOT_FOUND:
                continue
            raise
        for link in files:
            real = os.path.realpath(link.path)
            if real in wanted:
                writes = link.kind == domain_pb2.VOLUME_KIND_DISK
                found.append(Sharer(wanted[real], name, link.volume_id, writes))
    return found


def _files(dom: libvirt.virDomain, roots: StorageRoots) -> Iterator[ChainLink]:
    for disk in read_definition(dom).disks:
        path, _ = source_path(dom.connect(), disk)
        if path is not None:
            top = DiskTop(disk.target, disk.kind, path, disk.format, disk.read_only)
            yield from read_chain(top, roots).links
