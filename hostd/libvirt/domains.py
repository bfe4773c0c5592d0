"""Finding domains, and describing them with their disks as other hosts need it.

Only the persistent definition counts: it is what remains once the guest is off,
and it is what moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import libvirt

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.disks.chain import Chain, DiskTop, Obstacle, read_chain
from hostd.disks.roots import StorageRoots
from hostd.libvirt.definition import Definition, Disk, parse_definition
from hostd.libvirt.errors import translated
from hostd.libvirt.power import is_hung, power_state
from hostd.libvirt.snapshots import snapshot_obstacles
from hostd.libvirt.xml import XmlError
from hostd.v1 import domain_pb2


@dataclass(frozen=True)
class Inspection:
    """A domain, looked at closely.

    Attributes:
        domain: As hosts tell each other.
        definition: What its definition says.
        obstacles: What keeps it from moving, with reasons.
    """

    domain: domain_pb2.Domain
    definition: Definition
    obstacles: tuple[Obstacle, ...]


def try_find(conn: libvirt.virConnect, domain_uuid: str) -> libvirt.virDomain | None:
    """The domain with this UUID, or None.

    Raises:
        DroverError: LIBVIRT_UNAVAILABLE, INVALID_NAME for a malformed UUID.
    """
    subject = f"domains/{domain_uuid}"
    with translated(subject):
        try:
            return conn.lookupByUUIDString(domain_uuid)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            if error.get_error_code() == libvirt.VIR_ERR_INVALID_ARG:
                message = f"{domain_uuid!r} is not a UUID."
                raise DroverError(Reason.INVALID_NAME, message, subject=subject) from error
            raise


def find(conn: libvirt.virConnect, domain_uuid: str) -> libvirt.virDomain:
    """The domain with this UUID.

    Raises:
        DroverError: DOMAIN_NOT_FOUND, LIBVIRT_UNAVAILABLE, INVALID_NAME.
    """
    dom = try_find(conn, domain_uuid)
    if dom is None:
        raise DroverError(
            Reason.DOMAIN_NOT_FOUND,
            f"libvirt on this host knows no domain {domain_uuid}.",
            subject=f"domains/{domain_uuid}",
        )
    return dom


def describe(dom: libvirt.virDomain, roots: StorageRoots) -> domain_pb2.Domain:
    """Describe a domain; see `inspect`."""
    return inspect(dom, roots).domain


def describe_all(conn: libvirt.virConnect, roots: StorageRoots) -> list[domain_pb2.Domain]:
    """Describe every domain, in name order.

    A domain that goes away meanwhile is left out.

    Raises:
        DroverError: LIBVIRT_UNAVAILABLE.
    """
    found: list[domain_pb2.Domain] = []
    with translated("libvirt"):
        domains = conn.listAllDomains(0)
    for dom in domains:
        try:
            found.append(describe(dom, roots))
        except DroverError as error:
            if error.reason is not Reason.DOMAIN_NOT_FOUND:
                raise
    return sorted(found, key=lambda domain: domain.name)


def inspect(dom: libvirt.virDomain, roots: StorageRoots) -> Inspection:
    """Look at a domain and at its disks. No secret is kept or reported.

    Args:
        dom: The domain.
        roots: Where its disks may lie.

    Raises:
        DroverError: DOMAIN_NOT_FOUND, LIBVIRT_UNAVAILABLE.
    """
    uuid = dom.UUIDString()
    with translated(f"domains/{uuid}"):
        definition = read_definition(dom)
        obstacles = [*definition.obstacles, *_libvirt_obstacles(dom, definition)]
        chains = [_chain(dom, disk, roots) for disk in definition.disks]
        links = [link for chain in chains for link in chain.links]
        obstacles += [obstacle for chain in chains for obstacle in chain.obstacles]
        obstacles += snapshot_obstacles(dom, definition, links)
        described = domain_pb2.Domain(
            uuid=uuid,
            name=definition.name,
            power_state=power_state(dom),
            persistent=bool(dom.isPersistent()),
            autostart=bool(dom.isPersistent() and dom.autostart()),
        )
    _fill(described, definition)
    described.volumes.extend(link.to_volume() for link in links)
    described.disk_size_bytes = sum(
        link.size_bytes for link in links if link.kind != domain_pb2.VOLUME_KIND_BACKING
    )
    described.obstacles.extend(dict.fromkeys(obstacle.message for obstacle in obstacles))
    return Inspection(described, definition, tuple(dict.fromkeys(obstacles)))


def read_definition(dom: libvirt.virDomain) -> Definition:
    """The persistent definition.

    Raises:
        libvirt.libvirtError: libvirt does not give it.
        DroverError: INTERNAL when it cannot be read.
    """
    flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
    try:
        return parse_definition(dom.XMLDesc(flags))
    except XmlError as error:
        raise DroverError(
            Reason.INTERNAL,
            f"The definition of {dom.name()} cannot be read: {error}.",
            subject=f"domains/{dom.UUIDString()}",
        ) from error


def _fill(described: domain_pb2.Domain, definition: Definition) -> None:
    described.vcpus = definition.vcpus
    described.memory_mib = definition.memory_mib
    described.virt_type = definition.virt_type
    described.arch = definition.arch
    described.machine_type = definition.machine_type
    described.cpu_mode = definition.cpu_mode
    described.cpu_xml = definition.cpu_xml
    described.firmware = definition.firmware
    described.has_tpm = definition.has_tpm
    described.has_secrets = definition.has_secrets
    described.interfaces.extend(definition.interfaces)
    described.host_needs.CopyFrom(definition.host_needs)


def _chain(dom: libvirt.virDomain, disk: Disk, roots: StorageRoots) -> Chain:
    path, problem = source_path(dom.connect(), disk)
    if path is None:
        obstacles = (Obstacle(Reason.INSTANCE_IMMOVABLE, problem),) if problem else ()
        return Chain((), obstacles)
    top = DiskTop(
        volume_id=disk.target,
        kind=disk.kind,
        path=path,
        format=disk.format,
        read_only=disk.read_only,
        direct_io=disk.direct_io,
        logical_block_bytes=disk.logical_block_bytes,
    )
    return read_chain(top, roots)


def source_path(conn: libvirt.virConnect, disk: Disk) -> tuple[Path | None, str]:
    """The file of a disk, its pool resolved.

    Returns:
        (path, ""), or (None, why not); the reason is empty when the definition's
        own obstacles name it already.

    Raises:
        libvirt.libvirtError: libvirt could not be asked.
    """
    if disk.source.kind in ("file", "block"):
        return Path(disk.source.path), ""
    if disk.source.kind != "volume":
        return None, ""
    try:
        pool = conn.storagePoolLookupByName(disk.source.pool)
        return Path(pool.storageVolLookupByName(disk.source.volume).path()), ""
    except libvirt.libvirtError as error:
        missing = (
            libvirt.VIR_ERR_NO_STORAGE_POOL,
            libvirt.VIR_ERR_NO_STORAGE_VOL,
            libvirt.VIR_ERR_OPERATION_INVALID,
        )
        if error.get_error_code() not in missing:
            raise
        where = f"{disk.source.pool}/{disk.source.volume}"
        return None, f"Disk {disk.target} is the volume {where}, which libvirt does not find."


def _libvirt_obstacles(dom: libvirt.virDomain, definition: Definition) -> Iterator[Obstacle]:
    if not dom.isPersistent():
        yield _immovable("It is transient: it has no definition that outlives its power-off.")
        return
    if dom.hasManagedSaveImage(0):
        yield _immovable("Its memory lies in a managed save image; start it or drop the image.")
    if dom.isActive():
        yield from _block_jobs(dom, definition)


def _block_jobs(dom: libvirt.virDomain, definition: Definition) -> Iterator[Obstacle]:
    for disk in definition.disks:
        # Asking takes the domain's job lock, which a QEMU that hangs never lets go.
        if is_hung(dom):
            yield _immovable("Its QEMU does not answer libvirt; see what it waits for.")
            return
        try:
            busy = bool(dom.blockJobInfo(disk.target, 0))
        except libvirt.libvirtError as error:
            passing = (
                # Plugged in since, or the guest went off while we looked.
                libvirt.VIR_ERR_INVALID_ARG,
                libvirt.VIR_ERR_OPERATION_INVALID,
                # Another call has the job lock: it hangs, or is done the next time.
                libvirt.VIR_ERR_OPERATION_TIMEOUT,
                # A driver without such jobs, as that of libvirt's tests.
                libvirt.VIR_ERR_NO_SUPPORT,
            )
            if error.get_error_code() not in passing:
                raise
            continue
        if busy:
            yield _immovable(f"A block job runs on its disk {disk.target}; let it end first.")


def _immovable(message: str) -> Obstacle:
    return Obstacle(Reason.INSTANCE_IMMOVABLE, message)
