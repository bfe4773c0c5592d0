"""Which domains become instances, and what reports change about instances.

A pure function of one libvirt UUID: its instance, the sightings of it on all
hosts, and its live move. One UUID is one instance on one host. When several
hosts report it the instance says so in `conflict` and does not move; reports
are never merged, and the owner does not change by a report.

    not known  --reported by a host that adopts-->  instance
    instance   --released by an operator-->         released (stays so)
    instance   --absent from its host's reports-->  MISSING  --reported again--> idle state
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from controlplane.domain.model import Instance, Sighting
from controlplane.domain.names import canonical_uuid, host_name
from controlplane.domain.states import PowerState, VmState, vm_state_of
from hostd.v1 import domain_pb2

_LONGEST_NAME = 255
_MOST_VCPUS = 1 << 16
_MOST_MEMORY_MIB = 1 << 32
_MOST_DISK_BYTES = 1 << 60


@dataclass(frozen=True)
class LiveMove:
    """A move that has not ended.

    Attributes:
        source: Host that the machine leaves.
        target: Host that it goes to; empty until one is claimed.
        parked: True while the source has the machine parked. It has no
            definition of it then, unless somebody made one by hand.
        waiting: True while it awaits confirm: the guest then lives on its owner.
    """

    source: str
    target: str
    parked: bool
    waiting: bool

    @property
    def hosts(self) -> frozenset[str]:
        """Hosts that may report the machine."""
        return frozenset({self.target} if self.parked else {self.source, self.target} - {""})


@dataclass(frozen=True)
class Adoption:
    """A domain to take under care."""

    host: str
    domain: domain_pb2.Domain
    vm_state: VmState
    conflict: str


@dataclass(frozen=True)
class Change:
    """What to change about an instance, by attribute name; never empty."""

    uid: str
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Policy:
    """What adoption goes by besides the reports.

    Attributes:
        adopting_hosts: Hosts whose domains become instances by themselves.
        now: The present.
        missing_after_seconds: How long a machine may be absent from its host's
            reports before it is MISSING.
    """

    adopting_hosts: frozenset[str]
    now: datetime
    missing_after_seconds: float


def reconcile(
    instance: Instance | None,
    sightings: Iterable[Sighting],
    move: LiveMove | None,
    policy: Policy,
) -> Adoption | Change | None:
    """Decide about one UUID.

    Args:
        instance: Its instance, released or not; None when there is none.
        sightings: Where it was reported, older reports included.
        move: Its move that has not ended, if any.
        policy: What else to go by.

    Returns:
        What to do; None when nothing changes.
    """
    by_host = {sighting.host: sighting for sighting in sightings}
    present = {host: s for host, s in by_host.items() if s.current}
    if instance is None:
        return _adoption(present, policy)
    if instance.released:
        return None
    values: dict[str, Any] = {}
    conflict = _conflict(instance, present, move)
    if conflict != instance.conflict:
        values["conflict"] = conflict
    if move is None or move.waiting:
        values |= _report_changes(instance, present.get(instance.host), move)
    if move is None:
        values |= _vm_state_change(instance, by_host, policy)
    return Change(instance.uid, values) if values else None


def plausible(domain: domain_pb2.Domain) -> bool:
    """A description that libvirt can have given.

    A host is believed about itself, within bounds: numbers that overflow a sum,
    or names that act on a terminal, would be trouble for others.
    """
    return (
        canonical_uuid(domain.uuid) == domain.uuid
        and 0 < len(domain.name) <= _LONGEST_NAME
        and domain.name.isprintable()
        and domain.vcpus <= _MOST_VCPUS
        and domain.memory_mib <= _MOST_MEMORY_MIB
        and domain.disk_size_bytes <= _MOST_DISK_BYTES
    )


def material(domain: domain_pb2.Domain) -> domain_pb2.Domain:
    """A description without what changes by itself while a guest runs."""
    copy = domain_pb2.Domain()
    copy.CopyFrom(domain)
    for volume in copy.volumes:
        volume.ClearField("allocated_bytes")
        if volume.format == "qcow2":
            volume.ClearField("size_bytes")
    copy.ClearField("power_state")
    copy.ClearField("disk_size_bytes")
    return copy


def _adoption(present: Mapping[str, Sighting], policy: Policy) -> Adoption | None:
    # A domain that a migration parked or builds belongs to that migration.
    free = {host: s for host, s in present.items() if not s.domain.migration_id}
    adopting = sorted(host for host in free if host in policy.adopting_hosts)
    if not adopting:
        return None
    host = adopting[0]
    domain = free[host].domain
    state = vm_state_of(PowerState.from_number(domain.power_state)) or VmState.ACTIVE
    return Adoption(host, domain, state, _hosts_text(present) if len(present) > 1 else "")


def _conflict(instance: Instance, present: Mapping[str, Sighting], move: LiveMove | None) -> str:
    entitled = move.hosts if move is not None else frozenset({instance.host})
    outsiders = present.keys() - entitled
    if not outsiders:
        return ""
    if move is None and instance.host not in present and len(outsiders) == 1:
        # Not a duplicate: it was taken elsewhere by hand, and is MISSING here.
        return ""
    owner = instance.host if instance.host in entitled else next(iter(entitled))
    return _hosts_text({*outsiders, owner})


def _report_changes(
    instance: Instance, sighting: Sighting | None, move: LiveMove | None
) -> dict[str, Any]:
    if sighting is None:
        return {}
    domain = sighting.domain
    values: dict[str, Any] = {}
    power = PowerState.from_number(domain.power_state)
    if power is not None and power is not instance.power_state:
        values["power_state"] = power
    if move is not None:
        return values
    if material(domain) != material(instance.description):
        values |= {
            "name": domain.name,
            "vcpus": domain.vcpus,
            "memory_mib": domain.memory_mib,
            "disk_size_bytes": domain.disk_size_bytes,
            "description": domain,
        }
    return values


def _vm_state_change(
    instance: Instance, by_host: Mapping[str, Sighting], policy: Policy
) -> dict[str, Any]:
    sighting = by_host.get(instance.host)
    if sighting is not None and sighting.current:
        state = vm_state_of(PowerState.from_number(sighting.domain.power_state))
        if state is None:
            # Between two states; one that was missing is back all the same.
            state = VmState.ACTIVE if instance.vm_state is VmState.MISSING else instance.vm_state
    else:
        # A change of ours counts as a sign of life: the report may be older than
        # the end of the move that brought the machine here.
        last = instance.update_time
        if sighting is not None:
            last = max(last, sighting.last_seen)
        absent_seconds = (policy.now - last).total_seconds()
        state = (
            VmState.MISSING if absent_seconds > policy.missing_after_seconds else instance.vm_state
        )
    return {} if state is instance.vm_state else {"vm_state": state}


def _hosts_text(hosts: Iterable[str]) -> str:
    return ", ".join(host_name(host) for host in sorted(hosts))
