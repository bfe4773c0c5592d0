"""What Drover knows: hosts, instances, flavors, moves and the claims between them.

Rows of the store in typed, frozen form. Names are bare ("a", not "hosts/a"),
times are aware UTC datetimes, protos are those that hostd sends or the API
shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec

from controlplane.domain.states import (
    HostState,
    MigrationKind,
    MigrationState,
    PowerState,
    TaskState,
    VmState,
)
from controlplane.v1 import migration_pb2
from hostd.v1 import domain_pb2, host_pb2, job_pb2

DEFAULT_PROJECT = "default"


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """Room that a machine takes, or the room that there is.

    Attributes:
        vcpus: Virtual CPUs.
        memory_mib: Guest memory in MiB.
        disk_bytes: Disk that is promised but not yet written, in bytes.
    """

    vcpus: int = 0
    memory_mib: int = 0
    disk_bytes: int = 0


class Ratios(msgspec.Struct, frozen=True, kw_only=True):
    """How much more than it has a host may promise.

    Attributes:
        cpu: Virtual CPUs per host CPU.
        memory: Guest memory per host memory that guests may use.
    """

    cpu: float = 4.0
    memory: float = 1.0


class FlavorSize(msgspec.Struct, frozen=True, kw_only=True):
    """A flavor as it was when a resize asked for it; deleting it changes nothing.

    Attributes:
        name: Bare name.
        vcpus: Virtual CPUs.
        memory_mib: Guest memory in MiB.
        root_disk_bytes: Smallest size of the first disk; 0 leaves it.
    """

    name: str
    vcpus: int
    memory_mib: int
    root_disk_bytes: int = 0


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Why a host was or was not chosen.

    Attributes:
        host: Bare name.
        fits: True when the machine could go there.
        reason: Reason symbol of a refusal; empty when it fits.
        message: One sentence.
        weight: Sum of the weighers, higher is better; 0 for a refusal.
    """

    host: str
    fits: bool
    reason: str = ""
    message: str = ""
    weight: float = 0.0


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """A scheduling decision.

    Attributes:
        chosen_host: Bare name; empty when none fits.
        verdicts: Every host, best first, refused ones last.
        estimated_bytes: What has to be read and sent, before compression.
        warnings: What a person should know though the machine can move.
    """

    chosen_host: str = ""
    verdicts: tuple[Verdict, ...] = ()
    estimated_bytes: int = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Flavor:
    """A named size, as stored."""

    name: str
    vcpus: int
    memory_mib: int
    root_disk_bytes: int
    generation: int
    create_time: datetime
    update_time: datetime

    @property
    def size(self) -> FlavorSize:
        """The part that a resize keeps."""
        return FlavorSize(
            name=self.name,
            vcpus=self.vcpus,
            memory_mib=self.memory_mib,
            root_disk_bytes=self.root_disk_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class Host:
    """A hypervisor: what operators decided (with the generation) and its last report.

    Reports do not raise the generation, or an etag would be stale in seconds.
    """

    name: str
    uid: str
    state: HostState
    state_reason: str
    address: str
    adopt_domains: bool
    certificate_sha256: str
    generation: int
    create_time: datetime
    update_time: datetime
    facts: host_pb2.HostFacts | None = None
    last_seen: datetime | None = None
    last_error: str = ""

    def is_alive(self, now: datetime, dead_after_seconds: float) -> bool:
        """True when it answered within the liveness window."""
        return (
            self.last_seen is not None
            and (now - self.last_seen).total_seconds() <= dead_after_seconds
        )


@dataclass(frozen=True, kw_only=True)
class HostUsage:
    """What is promised on a host; `claimed` counts instances and moves."""

    claimed: Size = field(default_factory=Size)
    instances: int = 0
    moves: int = 0


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """A domain that a host reported.

    Attributes:
        host: The host.
        uuid: libvirt UUID.
        domain: The domain as of `last_seen`.
        last_seen: Time of the last report that held it.
        current: True when it was in the host's latest report.
    """

    host: str
    uuid: str
    domain: domain_pb2.Domain
    last_seen: datetime
    current: bool = True


@dataclass(frozen=True, kw_only=True)
class Instance:
    """A virtual machine that Drover looks after, or has released."""

    uid: str
    name: str
    host: str
    vm_state: VmState
    task_state: TaskState | None
    power_state: PowerState | None
    project: str
    vcpus: int
    memory_mib: int
    disk_size_bytes: int
    flavor: str
    migration_id: str
    lock_reason: str
    locked_by: str
    conflict: str
    description: domain_pb2.Domain
    released: bool
    generation: int
    create_time: datetime
    update_time: datetime

    @property
    def size(self) -> Size:
        """What it takes on the host that has it; its disks are there already."""
        return Size(vcpus=self.vcpus, memory_mib=self.memory_mib)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Room held on a host by "instances/{uid}" or "migrations/{id}"."""

    consumer: str
    host: str
    size: Size


@dataclass(frozen=True, kw_only=True)
class Migration:
    """One move. `target_host` and `saga_id` are empty until there is one."""

    id: str
    instance_uid: str
    instance_name: str
    kind: MigrationKind
    state: MigrationState
    step: str
    attempt: int
    saga_id: str
    source_host: str
    target_host: str
    flavor: FlavorSize | None
    options: migration_pb2.MigrationOptions
    placement: migration_pb2.Placement
    description: domain_pb2.Domain | None
    progress: job_pb2.CopyProgress | None
    receipts: tuple[job_pb2.VolumeReceipt, ...]
    error: Mapping[str, Any] | None
    previous_power_state: PowerState | None
    confirm_deadline: datetime | None
    stop_time: datetime | None
    running_time: datetime | None
    throughput_bytes_per_second: int
    cancel_requested: bool
    created_by: str
    generation: int
    create_time: datetime
    update_time: datetime


@dataclass(frozen=True, kw_only=True)
class MigrationEvent:
    """One line of a move's history."""

    migration_id: str
    seq: int
    time: datetime
    saga: str
    step: str
    kind: str
    message: str
    error: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class AuditEntry:
    """One request that could change something."""

    seq: int
    time: datetime
    principal: str
    peer: str
    method: str
    resource: str
    outcome: str
    reason: str
    request_id: str


@dataclass(frozen=True, kw_only=True)
class JoinToken:
    """A one-time token; only its hash is kept."""

    secret_sha256: str
    host: str
    expire_time: datetime
    used_time: datetime | None = field(default=None)
