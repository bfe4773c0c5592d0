"""What a host reports: its facts, its domains, what is parked on it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import libvirt
import structlog

from controlplane.common.errors import DroverError
from hostd.disks.parked import find_parked
from hostd.disks.roots import StorageRoots
from hostd.libvirt.capabilities import capabilities
from hostd.libvirt.conn import LibvirtConnection
from hostd.libvirt.domains import describe_all
from hostd.v1 import host_pb2

log = structlog.stdlib.get_logger(__name__)

_ACTIVE = libvirt.VIR_CONNECT_LIST_NETWORKS_ACTIVE
_NETWORK_INTERFACES = Path("/sys/class/net")


@dataclass(frozen=True)
class HostSettings:
    """What the configuration says of the host.

    Attributes:
        name: Drover's name of it.
        hostd_version: As "0.1.0".
        data_address: HOST:PORT of the data port, as other hosts reach it.
        reserved_memory_mib: Memory that guests never get.
    """

    name: str
    hostd_version: str
    data_address: str
    reserved_memory_mib: int = 0


def collect(
    connection: LibvirtConnection,
    roots: StorageRoots,
    settings: HostSettings,
    state_dir: Path,
    *,
    reserved_bytes: Mapping[str, int] | None = None,
    previous: host_pb2.HostFacts | None = None,
) -> host_pb2.Inventory:
    """Everything a host reports.

    While libvirt is away there are no domains in it and `facts.libvirt_connected`
    is false.

    Args:
        connection: libvirt.
        roots: Where disks may lie.
        settings: What the configuration says.
        state_dir: hostd's own directory.
        reserved_bytes: Root name -> bytes that running moves have reserved.
        previous: Facts of the last report, for while libvirt is away.
    """
    facts = collect_facts(
        connection, roots, settings, reserved_bytes=reserved_bytes, previous=previous
    )
    inventory = host_pb2.Inventory(facts=facts, parked=find_parked(roots, state_dir))
    if facts.libvirt_connected:
        try:
            with connection.get() as conn:
                inventory.domains.extend(describe_all(conn, roots))
        except DroverError as error:
            # Domains that are not listed would be taken for gone.
            log.warning("libvirt went away during the inventory", error=str(error))
            inventory.facts.libvirt_connected = False
    return inventory


def collect_facts(
    connection: LibvirtConnection,
    roots: StorageRoots,
    settings: HostSettings,
    *,
    reserved_bytes: Mapping[str, int] | None = None,
    previous: host_pb2.HostFacts | None = None,
) -> host_pb2.HostFacts:
    """The facts of this host; see `collect`."""
    facts = host_pb2.HostFacts()
    try:
        _libvirt_facts(connection, facts)
    except DroverError as error:
        log.warning("libvirt does not answer", error=str(error))
        facts = host_pb2.HostFacts()
        if previous is not None:
            facts.CopyFrom(previous)
        facts.libvirt_connected = False
    facts.name = settings.name
    facts.hostd_version = settings.hostd_version
    facts.data_address = settings.data_address
    facts.reserved_memory_mib = settings.reserved_memory_mib
    del facts.bridges[:]
    facts.bridges.extend(bridges())
    del facts.roots[:]
    facts.roots.extend(storage_roots(roots, reserved_bytes or {}))
    facts.time.GetCurrentTime()
    return facts


def bridges(interfaces: Path = _NETWORK_INTERFACES) -> list[str]:
    """Names of the host's Linux bridges, sorted."""
    return sorted(path.parent.name for path in interfaces.glob("*/bridge"))


def network_devices(interfaces: Path = _NETWORK_INTERFACES) -> list[str]:
    """Names of the host's network interfaces, sorted."""
    return sorted(path.name for path in interfaces.glob("*"))


def storage_roots(
    roots: StorageRoots, reserved_bytes: Mapping[str, int]
) -> list[host_pb2.StorageRoot]:
    """The storage roots; one whose directory cannot be used is left out.

    Roots of one file system share its space, and what is reserved in one of them
    is not available in the others.
    """
    found: list[host_pb2.StorageRoot] = []
    for name in roots.names:
        try:
            usage = roots.usage(name)
        except DroverError as error:
            log.warning("a storage root cannot be used", root=name, error=error.message)
            continue
        found.append(
            host_pb2.StorageRoot(
                name=name,
                path=str(roots.directory(name)),
                capacity_bytes=usage.capacity_bytes,
                available_bytes=usage.available_bytes,
                filesystem=usage.filesystem,
                device_id=usage.device_id,
            )
        )
    for root in found:
        same = [other.name for other in found if other.device_id == root.device_id]
        reserved = sum(reserved_bytes.get(name, 0) for name in same)
        root.available_bytes = max(0, root.available_bytes - reserved)
    return found


def _libvirt_facts(connection: LibvirtConnection, facts: host_pb2.HostFacts) -> None:
    offer = capabilities(connection)
    with connection.get() as conn:
        networks = sorted(network.name() for network in conn.listAllNetworks(_ACTIVE))
    facts.libvirt_host_uuid = offer.host_uuid
    facts.libvirt_version = offer.libvirt_version
    facts.qemu_version = offer.qemu_version
    facts.arch = offer.arch
    facts.cpu_model = offer.cpu_model
    facts.cpus = offer.cpus
    facts.memory_mib = offer.memory_mib
    facts.virt_types.extend(offer.virt_types)
    facts.machine_types.extend(offer.machine_types)
    facts.firmwares.extend(offer.firmwares)
    facts.tpm = offer.tpm and shutil.which("swtpm") is not None
    facts.networks.extend(networks)
    facts.libvirt_connected = True
