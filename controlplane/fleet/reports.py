"""What a host's report changes: its facts, the sightings, and the instances.

Everything of one report commits together. What it means for an instance is
decided by `controlplane.domain.adoption`; here it is only written down.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

import structlog
from sqlalchemy import Connection

from controlplane.domain.adoption import (
    Adoption,
    Change,
    LiveMove,
    Policy,
    plausible,
    reconcile,
)
from controlplane.domain.model import DEFAULT_PROJECT, Migration, Size
from controlplane.domain.states import PARKED_STATES, HostState, MigrationState
from controlplane.store import claims, hosts, instances, migrations, sightings
from hostd.v1 import host_pb2

log = structlog.stdlib.get_logger(__name__)


def apply_report(
    tx: Connection,
    host: str,
    inventory: host_pb2.Inventory,
    *,
    asked: datetime,
    now: datetime,
    missing_after_seconds: float,
) -> None:
    """Take over a report that the host was asked for at `asked` and that came in at `now`.

    Nothing is taken over from a host that has been declared gone meanwhile.
    """
    found = hosts.find(tx, host)
    if found is None or found.state is HostState.GONE:
        return
    hosts.record_report(tx, host, inventory.facts, now)
    if not inventory.facts.libvirt_connected:
        # Without libvirt the list of domains is not known to be complete.
        return
    forget_before = now - timedelta(seconds=missing_after_seconds)
    domains = [domain for domain in inventory.domains if plausible(domain)]
    if len(domains) < len(inventory.domains):
        log.warning(
            "domains that cannot be were left out of a report",
            host=host,
            count=len(inventory.domains) - len(domains),
        )
    touched = sightings.replace(tx, host, domains, now, forget_before, asked=asked)
    touched |= instances.uids_on(tx, host)
    reconcile_uuids(tx, touched, now=now, missing_after_seconds=missing_after_seconds)


def reconcile_uuids(
    tx: Connection, uuids: Collection[str], *, now: datetime, missing_after_seconds: float
) -> None:
    """Bring the instances with these UUIDs into line with what hosts report."""
    if not uuids:
        return
    policy = Policy(
        adopting_hosts=hosts.adopting(tx),
        now=now,
        missing_after_seconds=missing_after_seconds,
    )
    known = instances.of_uids(tx, uuids)
    seen = sightings.of_uuids(tx, uuids)
    moves = migrations.live_of(tx, uuids)
    for uuid in sorted(uuids):
        move = moves.get(uuid)
        decision = reconcile(
            known.get(uuid),
            seen.get(uuid, {}).values(),
            None if move is None else _live_move(move),
            policy,
        )
        _carry_out(tx, decision)


def _carry_out(tx: Connection, decision: Adoption | Change | None) -> None:
    match decision:
        case Adoption(host=host, domain=domain, vm_state=vm_state, conflict=conflict):
            instance = instances.create(
                tx,
                host=host,
                domain=domain,
                vm_state=vm_state,
                project=DEFAULT_PROJECT,
                conflict=conflict,
            )
            claims.put(tx, claims.instance_consumer(instance.uid), host, instance.size)
            log.info("adopted", instance=instance.uid, name=instance.name, host=host)
        case Change(uid=uid, values=values):
            instance = instances.update(tx, uid, **values)
            if "vcpus" in values:
                size = Size(vcpus=instance.vcpus, memory_mib=instance.memory_mib)
                claims.put(tx, claims.instance_consumer(uid), instance.host, size)
            if values.get("conflict"):
                log.warning("reported by several hosts", instance=uid, hosts=values["conflict"])
        case None:
            pass


def _live_move(move: Migration) -> LiveMove:
    return LiveMove(
        source=move.source_host,
        target=move.target_host,
        parked=move.state in PARKED_STATES,
        waiting=move.state is MigrationState.AWAITING_CONFIRM,
    )
