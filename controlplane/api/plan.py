"""Planning a move: everything that can be known before anything is changed.

    read      instance, flavor, hosts, claims, clashes        one transaction
    rules     may this machine move, to where may it go       pure
    look      describe the machine afresh, may it leave       source host, live
    schedule  filters and weighers, a verdict for every host  pure
    look      would it run there, best candidate first        target hosts, live
    reach     can the source send there                       source host, live

Nothing is written. `moves.admit` writes the plan down, and looks once more at
what another call could have changed in between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from sqlalchemy import Connection

from controlplane.api.services import Services
from controlplane.common.errors import DroverError, Transient
from controlplane.common.identity import Identity
from controlplane.common.reasons import Reason
from controlplane.domain import rules
from controlplane.domain.capacity import limits_of, needed_by_root, needed_bytes
from controlplane.domain.model import (
    FlavorSize,
    Host,
    HostUsage,
    Instance,
    Placement,
    Size,
    Verdict,
)
from controlplane.domain.names import host_name, instance_name
from controlplane.domain.placement import no_valid_host
from controlplane.domain.preflight import failed_checks, warnings_of
from controlplane.domain.states import PowerState
from controlplane.scheduler.request import HostView, Neighbour, Request
from controlplane.scheduler.schedule import schedule
from controlplane.security import roles
from controlplane.store import flavors, hosts, instances, sightings
from controlplane.v1 import migration_pb2
from hostd.v1 import domain_pb2, host_service_pb2, preflight_pb2

LIVE_CHECKS = 3
_LOOK_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a caller asks for, checked for form.

    Attributes:
        instance_key: uid or display name.
        flavor: Bare name; empty to keep the size.
        host: Bare name of the target; empty for any.
        options: Every option set.
        caller: Who asks.
    """

    instance_key: str
    flavor: str
    host: str
    options: migration_pb2.MigrationOptions
    caller: Identity


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A move that can be made.

    Attributes:
        wish: What was asked for.
        instance: The machine as the store knew it.
        domain: The machine as its host described it just now.
        flavor: Size it will have; None to keep its own.
        size: What it will take on the target.
        placement: Where it goes, and why.
    """

    wish: Wish
    instance: Instance
    domain: domain_pb2.Domain
    flavor: FlavorSize | None
    size: Size
    placement: Placement


@dataclass(frozen=True)
class _Fleet:
    hosts: list[Host]
    usages: dict[str, HostUsage]
    neighbours: dict[str, tuple[Neighbour, ...]]


@dataclass(frozen=True)
class _Look:
    """What the live checks of targets go by."""

    services: Services
    source: str
    machine: preflight_pb2.IncomingMachine
    data_addresses: Mapping[str, str]


async def plan_move(services: Services, wish: Wish) -> Plan:
    """Find out whether, and to where, the machine can move.

    Raises:
        DroverError: Whatever stands in the way, as the API tells it.
    """
    instance, flavor, fleet = await services.database.run(lambda tx: _read(tx, wish, services))
    domain, warnings = await _look_at_source(services, instance)
    placement = _schedule(services, wish, instance, domain, flavor, fleet)
    placement = msgspec.structs.replace(placement, warnings=tuple(warnings))
    data_addresses = {h.name: h.facts.data_address for h in fleet.hosts if h.facts}
    look = _Look(services, instance.host, _incoming(domain, flavor), data_addresses)
    placement = await _look_at_targets(look, placement)
    if not placement.chosen_host:
        raise no_valid_host(placement, instance, wish.host)
    return Plan(
        wish=wish,
        instance=instance,
        domain=domain,
        flavor=flavor,
        size=size_after(domain, flavor),
        placement=placement,
    )


def size_after(domain: domain_pb2.Domain, flavor: FlavorSize | None) -> Size:
    """What the machine will take on a host that does not have its disks yet."""
    return Size(
        vcpus=flavor.vcpus if flavor else domain.vcpus,
        memory_mib=flavor.memory_mib if flavor else domain.memory_mib,
        disk_bytes=needed_bytes(domain),
    )


def _read(
    tx: Connection, wish: Wish, services: Services
) -> tuple[Instance, FlavorSize | None, _Fleet]:
    instance = instances.resolve(tx, wish.instance_key)
    roles.check_move(
        wish.caller,
        project=instance.project,
        resize=bool(wish.flavor),
        host_named=bool(wish.host),
    )
    now = services.clock()
    target = hosts.get(tx, wish.host) if wish.host else None
    flavor = flavors.get(tx, wish.flavor) if wish.flavor else None
    if target is not None and target.name == instance.host:
        rules.check_target(target, source=instance.host, alive=True)
    rules.check_movable(instance)
    source = hosts.get(tx, instance.host)
    rules.check_source(source, alive=source.is_alive(now, services.dead_after_seconds))
    if target is not None:
        alive = target.is_alive(now, services.dead_after_seconds)
        rules.check_target(target, source=instance.host, alive=alive)
    if flavor is not None:
        rules.check_flavor(instance, flavor)
    fleet = _Fleet(hosts.list_all(tx), hosts.usages(tx), _neighbours(tx, instance))
    return instance, flavor.size if flavor else None, fleet


def _neighbours(tx: Connection, instance: Instance) -> dict[str, tuple[Neighbour, ...]]:
    found: dict[str, tuple[Neighbour, ...]] = {}
    for clash in sightings.clashes(tx, instance.description):
        neighbour = Neighbour(name=clash.name, uuid=clash.uuid, mac=clash.mac)
        found[clash.host] = (*found.get(clash.host, ()), neighbour)
    return found


async def _look_at_source(
    services: Services, instance: Instance
) -> tuple[domain_pb2.Domain, list[str]]:
    """The machine as it is now, if it could leave its host now, and what to know of it.

    Raises:
        DroverError: INSTANCE_MISSING, INSTANCE_STATE, INSTANCE_IMMOVABLE, a
            failed check's reason, or HOST_UNREACHABLE.
    """
    try:
        domain, report = await asyncio.gather(
            services.clients.call(
                instance.host,
                lambda h: h.GetDomain,
                host_service_pb2.GetDomainRequest(domain_uuid=instance.uid),
                timeout_seconds=_LOOK_SECONDS,
            ),
            services.clients.call(
                instance.host,
                lambda h: h.CheckSource,
                host_service_pb2.CheckSourceRequest(domain_uuid=instance.uid),
                timeout_seconds=_LOOK_SECONDS,
            ),
        )
    except Transient as unknown:
        raise unknown.error from unknown
    except DroverError as refusal:
        if refusal.reason is not Reason.DOMAIN_NOT_FOUND:
            raise
        raise DroverError(
            Reason.INSTANCE_MISSING,
            f"{host_name(instance.host)} no longer has {instance.name}.",
            subject=instance_name(instance.uid),
            metadata={"host": instance.host},
        ) from refusal
    rules.check_power_state(instance, PowerState.from_number(domain.power_state))
    rules.check_obstacles(instance, tuple(domain.obstacles))
    refusal_ = failed_checks(report, instance_name(instance.uid))
    if refusal_ is not None:
        raise refusal_
    return domain, warnings_of(report, host_name(instance.host))


def _schedule(
    services: Services,
    wish: Wish,
    instance: Instance,
    domain: domain_pb2.Domain,
    flavor: FlavorSize | None,
    fleet: _Fleet,
) -> Placement:
    now = services.clock()
    views = []
    for host in fleet.hosts:
        usage = fleet.usages.get(host.name, HostUsage())
        views.append(
            HostView(
                name=host.name,
                state=host.state,
                state_reason=host.state_reason,
                alive=host.is_alive(now, services.dead_after_seconds),
                last_seen=host.last_seen,
                facts=host.facts,
                limits=limits_of(host.facts, services.ratios) if host.facts else Size(),
                claimed=usage.claimed,
                moves=usage.moves,
                neighbours=fleet.neighbours.get(host.name, ()),
            )
        )
    request = Request(
        machine=domain,
        size=size_after(domain, flavor),
        needed_by_root=needed_by_root(domain),
        source=instance.host,
        requested_host=wish.host,
    )
    return schedule(request, views)


def _incoming(
    domain: domain_pb2.Domain, flavor: FlavorSize | None
) -> preflight_pb2.IncomingMachine:
    machine = preflight_pb2.IncomingMachine(domain=domain)
    if flavor is not None:
        machine.size.vcpus = flavor.vcpus
        machine.size.memory_mib = flavor.memory_mib
        machine.size.root_disk_bytes = flavor.root_disk_bytes
    return machine


async def _look_at_targets(look: _Look, placement: Placement) -> Placement:
    """Ask the best candidates whether the machine would run there.

    Returns:
        The placement with those that refused moved to the end. Candidates
        behind the last one that was asked are taken at their facts' word only
        as alternates; when all that were asked refuse, none is chosen.
    """
    candidates = [verdict.host for verdict in placement.verdicts if verdict.fits]
    for asked, host in enumerate(candidates):
        if asked >= LIVE_CHECKS:
            break
        try:
            warnings = (*placement.warnings, *await _look_at_target(look, host))
            return msgspec.structs.replace(placement, chosen_host=host, warnings=warnings)
        except Transient as unknown:
            placement = _refused(placement, host, unknown.error)
        except DroverError as refusal:
            placement = _refused(placement, host, refusal)
    return msgspec.structs.replace(placement, chosen_host="")


async def _look_at_target(look: _Look, host: str) -> list[str]:
    """What to know of a host that would take the machine and that the source can send to.

    Raises:
        DroverError: It would not take it, or cannot be sent to.
        Transient: It did not answer.
    """
    living = await look.services.clients.call(
        host,
        lambda h: h.CheckTarget,
        host_service_pb2.CheckTargetRequest(machine=look.machine),
        timeout_seconds=_LOOK_SECONDS,
    )
    _raise_failed(living, host)
    reach = await look.services.clients.call(
        look.source,
        lambda h: h.CheckReach,
        host_service_pb2.CheckReachRequest(data_address=look.data_addresses[host]),
        timeout_seconds=_LOOK_SECONDS,
    )
    _raise_failed(reach, host)
    return warnings_of(living, host_name(host))


def _raise_failed(report: preflight_pb2.PreflightReport, host: str) -> None:
    refusal = failed_checks(report, host_name(host))
    if refusal is not None:
        raise refusal


def _refused(placement: Placement, host: str, refusal: DroverError) -> Placement:
    verdict = Verdict(host=host, fits=False, reason=refusal.reason.name, message=refusal.message)
    others = [other for other in placement.verdicts if other.host != host]
    verdicts = (
        *(other for other in others if other.fits),
        verdict,
        *(other for other in others if not other.fits),
    )
    return msgspec.structs.replace(placement, verdicts=verdicts)
