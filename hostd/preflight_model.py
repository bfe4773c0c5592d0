"""What preflight judges by, and the words of its checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from controlplane.common.reasons import Reason
from hostd.v1 import host_pb2, preflight_pb2

Check = preflight_pb2.PreflightCheck
IncomingMachine = preflight_pb2.IncomingMachine
PASS = preflight_pb2.PreflightCheck.OUTCOME_PASS
WARN = preflight_pb2.PreflightCheck.OUTCOME_WARN
FAIL = preflight_pb2.PreflightCheck.OUTCOME_FAIL


@dataclass(frozen=True)
class Supplies:
    """What this host has of the things that a definition takes by number, size or name.

    None where libvirt cannot tell.

    Attributes:
        cpus: Numbers of the CPUs that are online.
        numa_nodes: Numbers of the NUMA nodes.
        hugepages: Page size in KiB -> pages that are free.
        default_hugepage_kib: Size that is taken when none is given; 0 without any.
        network_filters: Names of the defined network filters.
        loader_problem: Why the machine's firmware image cannot be used here; empty when
            it can, or when it names none.
    """

    cpus: frozenset[int] | None = None
    numa_nodes: frozenset[int] | None = None
    hugepages: Mapping[int, int] | None = None
    default_hugepage_kib: int = 0
    network_filters: frozenset[str] | None = None
    loader_problem: str = ""


@dataclass(frozen=True)
class Neighbour:
    """A machine that is on the target already, or that a move keeps a place for there.

    Attributes:
        uuid: libvirt UUID.
        name: libvirt name.
        mac_addresses: Of its network cards.
        places: Paths that its move keeps for its files.
        migration_id: The move that parked it here or brings it here; empty for a
            domain that libvirt knows.
    """

    uuid: str
    name: str
    mac_addresses: frozenset[str] = frozenset()
    places: frozenset[str] = frozenset()
    migration_id: str = ""

    @property
    def where(self) -> str:
        """Where it is, as the end of a sentence."""
        return f"belongs here by migration {self.migration_id}" if self.migration_id else "is here"


@dataclass(frozen=True)
class TargetFacts:
    """What the checks of a target go by.

    Attributes:
        host: Facts of the host; `available_bytes` without what others reserved.
        neighbours: Domains here, the one that this migration built left out.
        network_devices: Names of all network interfaces.
        max_vcpus: Most virtual CPUs of the machine's type; 0 when unknown.
        cpu_fits: Whether the guest's CPU can be had; None when libvirt cannot tell.
        occupied: volume_id -> path, where a file is in a volume's way.
        misplaced: volume_id -> why its place cannot be used.
        clock_synchronised: Whether the host's clock is; None when unknown.
        supplies: What the machine could take by number, size or name.
        direct_io_bytes: volume_id -> unit of direct I/O where the volume would lie, for
            those that need it; left out when unknown.
    """

    host: host_pb2.HostFacts
    neighbours: tuple[Neighbour, ...] = ()
    network_devices: frozenset[str] = frozenset()
    max_vcpus: int = 0
    cpu_fits: bool | None = None
    occupied: Mapping[str, str] = field(default_factory=dict)
    misplaced: Mapping[str, str] = field(default_factory=dict)
    clock_synchronised: bool | None = None
    supplies: Supplies = Supplies()
    direct_io_bytes: Mapping[str, int] = field(default_factory=dict)


def passed(check: str, message: str) -> Check:
    """A check that is fine."""
    return Check(check=check, outcome=PASS, message=message)


def warned(check: str, message: str, fix: str) -> Check:
    """A check that may do harm."""
    return Check(check=check, outcome=WARN, message=message, fix=fix)


def failed(check: str, reason: Reason, message: str, fix: str) -> Check:
    """A check that forbids the move."""
    return Check(check=check, outcome=FAIL, reason=reason.name, message=message, fix=fix)
