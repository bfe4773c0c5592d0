"""How much a host can promise, from its facts."""

from __future__ import annotations

from controlplane.domain.model import Ratios, Size
from hostd.v1 import domain_pb2, host_pb2


def limits_of(facts: host_pb2.HostFacts, ratios: Ratios) -> Size:
    """What all claims on a host together may reach.

    The disk limit is what the file systems of the storage roots have available,
    each file system counted once; a single root can be fuller, which the
    scheduler and the target's own preflight look at.
    """
    guest_memory_mib = max(0, facts.memory_mib - facts.reserved_memory_mib)
    available_by_device: dict[tuple[int, str], int] = {}
    for root in facts.roots:
        device = (root.device_id, "" if root.device_id else root.name)
        known = available_by_device.get(device, root.available_bytes)
        available_by_device[device] = min(known, root.available_bytes)
    return Size(
        vcpus=int(facts.cpus * ratios.cpu),
        memory_mib=int(guest_memory_mib * ratios.memory),
        disk_bytes=sum(available_by_device.values()),
    )


def needed_by_root(domain: domain_pb2.Domain) -> dict[str, int]:
    """Bytes that a machine's volumes take on a target, by storage root.

    Verbatim copies keep holes, so a volume takes what it has allocated; backing
    files are counted as well, since the target may lack them. A disk that grows
    grows sparsely and takes no more until the guest writes.
    """
    needed: dict[str, int] = {}
    for volume in domain.volumes:
        needed[volume.root] = needed.get(volume.root, 0) + volume.allocated_bytes
    return needed


def needed_bytes(domain: domain_pb2.Domain) -> int:
    """Bytes that have to be read and placed on a target, over all storage roots."""
    return sum(needed_by_root(domain).values())


def root_disk(domain: domain_pb2.Domain) -> domain_pb2.Volume | None:
    """The first writable disk, the one that a flavor's root_disk_bytes is about."""
    return next((v for v in domain.volumes if v.kind == domain_pb2.VOLUME_KIND_DISK), None)
