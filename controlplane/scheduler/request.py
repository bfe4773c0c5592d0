"""What the scheduler is asked and what it knows of each host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from controlplane.domain.model import Size
from controlplane.domain.states import HostState
from hostd.v1 import domain_pb2, host_pb2


@dataclass(frozen=True, kw_only=True)
class Request:
    """A machine that looks for a host.

    Attributes:
        machine: The machine as its source host describes it.
        size: What it will take on the target; `disk_bytes` over all roots.
        needed_by_root: The same disk by storage root.
        source: Host that it leaves.
        requested_host: The only host that will do; empty for any.
    """

    machine: domain_pb2.Domain
    size: Size
    needed_by_root: Mapping[str, int]
    source: str
    requested_host: str = ""


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A domain on a host that the machine would collide with.

    Attributes:
        name: Its libvirt name.
        uuid: Its UUID.
        mac: The MAC address that both have; empty when it is not that.
    """

    name: str
    uuid: str
    mac: str = ""


@dataclass(frozen=True, kw_only=True)
class HostView:
    """A host as the scheduler sees it.

    Attributes:
        name: Bare name.
        state: What operators decided.
        state_reason: Why.
        alive: True when it answered within the liveness window.
        last_seen: Last answer.
        facts: Its last report; None before the first one.
        limits: What all claims together may reach.
        claimed: What is claimed already.
        moves: Moves under way from or to it.
        neighbours: What the machine would collide with there.
    """

    name: str
    state: HostState = HostState.ENABLED
    state_reason: str = ""
    alive: bool = True
    last_seen: datetime | None = None
    facts: host_pb2.HostFacts | None = None
    limits: Size = field(default_factory=Size)
    claimed: Size = field(default_factory=Size)
    moves: int = 0
    neighbours: tuple[Neighbour, ...] = ()
