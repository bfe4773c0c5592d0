"""What in the snapshots and checkpoints of a domain keeps it from moving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import libvirt

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.disks.chain import ChainLink, Obstacle
from hostd.libvirt.definition import Definition
from hostd.libvirt.foreign import Own, foreign_in_snapshot
from hostd.libvirt.transform import transform_snapshot
from hostd.libvirt.xml import XmlError, attribute, parse


def snapshot_obstacles(
    dom: libvirt.virDomain, definition: Definition, links: Sequence[ChainLink]
) -> Iterator[Obstacle]:
    """Each snapshot and checkpoint that could not come along, as a target would judge it.

    Args:
        dom: The domain.
        definition: What its definition says.
        links: The files of its disks.

    Raises:
        libvirt.libvirtError: libvirt does not tell.
    """
    paths = {link.volume_id: str(link.path) for link in links}
    own = Own(set(paths.values()), definition.nvram, definition.host_needs.loader_path)
    for snapshot in dom.listAllSnapshots(0):
        xml = snapshot.getXMLDesc(0)
        if _is_external(xml):
            yield _immovable(f"Its snapshot {snapshot.getName()} is external; merge it first.")
            continue
        problem = _problem(xml, paths, own)
        if problem:
            remove = f"virsh snapshot-delete {definition.name} {snapshot.getName()}"
            yield _immovable(f"Its {problem} Remove it first: {remove}")
    for checkpoint in _checkpoints(dom):
        problem = _problem(checkpoint.getXMLDesc(0), paths, own)
        if problem:
            remove = f"virsh checkpoint-delete {definition.name} {checkpoint.getName()}"
            yield _immovable(f"Its {problem} Remove it first: {remove}")


def _problem(xml: str, paths: dict[str, str], own: Own) -> str:
    # Disks that the machine still has follow it, whatever they were called then.
    try:
        return foreign_in_snapshot(transform_snapshot(xml, paths, own.nvram or None), own)
    except (XmlError, DroverError) as error:
        return f"snapshot cannot be read: {error}."


def _checkpoints(dom: libvirt.virDomain) -> list[libvirt.virDomainCheckpoint]:
    try:
        found: list[libvirt.virDomainCheckpoint] = dom.listAllCheckpoints(0)
    except libvirt.libvirtError as error:
        # A driver without checkpoints, as that of libvirt's tests.
        if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
            raise
        return []
    return found


def _is_external(snapshot_xml: str) -> bool:
    try:
        root = parse(snapshot_xml, "domainsnapshot")
    except XmlError:
        # What cannot be read cannot be taken along either.
        return True
    parts = [*root.iterfind("memory"), *root.iterfind("disks/disk")]
    return any(attribute(part, "snapshot") == "external" for part in parts)


def _immovable(message: str) -> Obstacle:
    return Obstacle(Reason.INSTANCE_IMMOVABLE, message)
