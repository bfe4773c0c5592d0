"""Rows as the API shows them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from controlplane.api.etags import etag_of
from controlplane.common.errors import status_from_json
from controlplane.domain.model import (
    AuditEntry,
    Flavor,
    Host,
    HostUsage,
    Instance,
    Migration,
    MigrationEvent,
    Placement,
)
from controlplane.domain.names import flavor_name, host_name, instance_name, migration_name
from controlplane.domain.states import PowerState, ProtoEnum
from controlplane.v1 import (
    flavor_pb2,
    host_pb2,
    instance_pb2,
    migration_pb2,
    migration_service_pb2,
)


def timestamp(moment: datetime) -> Timestamp:
    """A time as the API shows it."""
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp


def host_to_proto(host: Host, usage: HostUsage, *, alive: bool) -> host_pb2.Host:
    """A host with what is promised on it."""
    return host_pb2.Host(
        name=host_name(host.name),
        uid=host.uid,
        state=host.state.number,
        alive=alive,
        state_reason=host.state_reason,
        address=host.address,
        last_seen_time=None if host.last_seen is None else timestamp(host.last_seen),
        facts=host.facts,
        usage=host_pb2.HostUsage(
            vcpus=usage.claimed.vcpus,
            memory_mib=usage.claimed.memory_mib,
            claimed_disk_bytes=usage.claimed.disk_bytes,
            instances=usage.instances,
            moves=usage.moves,
        ),
        adopt_domains=host.adopt_domains,
        etag=etag_of(host.generation),
        create_time=timestamp(host.create_time),
        last_error=host.last_error,
    )


def instance_to_proto(instance: Instance) -> instance_pb2.Instance:
    """An instance."""
    return instance_pb2.Instance(
        name=instance_name(instance.uid),
        uid=instance.uid,
        display_name=instance.name,
        host=host_name(instance.host),
        vm_state=instance.vm_state.number,
        task_state=_number(instance.task_state),
        power_state=_number(instance.power_state),
        project=instance.project,
        vcpus=instance.vcpus,
        memory_mib=instance.memory_mib,
        disk_size_bytes=instance.disk_size_bytes,
        migration=migration_name(instance.migration_id),
        lock_reason=instance.lock_reason,
        locked_by=instance.locked_by,
        conflict=instance.conflict,
        obstacles=instance.description.obstacles,
        interfaces=instance.description.interfaces,
        volumes=instance.description.volumes,
        flavor=flavor_name(instance.flavor),
        etag=etag_of(instance.generation),
        create_time=timestamp(instance.create_time),
        update_time=timestamp(instance.update_time),
    )


def flavor_to_proto(flavor: Flavor) -> flavor_pb2.Flavor:
    """A flavor."""
    return flavor_pb2.Flavor(
        name=flavor_name(flavor.name),
        vcpus=flavor.vcpus,
        memory_mib=flavor.memory_mib,
        root_disk_bytes=flavor.root_disk_bytes,
        etag=etag_of(flavor.generation),
        create_time=timestamp(flavor.create_time),
    )


def placement_to_proto(placement: Placement) -> migration_pb2.Placement:
    """A scheduling decision."""
    return migration_pb2.Placement(
        chosen_host=host_name(placement.chosen_host),
        estimated_bytes=placement.estimated_bytes,
        warnings=placement.warnings,
        verdicts=[
            migration_pb2.HostVerdict(
                host=host_name(verdict.host),
                fits=verdict.fits,
                reason=verdict.reason,
                message=verdict.message,
                weight=verdict.weight,
            )
            for verdict in placement.verdicts
        ],
    )


def migration_to_listed_proto(move: Migration) -> migration_pb2.Migration:
    """A move without its verdicts: one for each host and move is too much for a page."""
    listed = migration_to_proto(move)
    listed.placement.ClearField("verdicts")
    return listed


def migration_to_proto(move: Migration) -> migration_pb2.Migration:
    """A move."""
    return migration_pb2.Migration(
        name=migration_name(move.id),
        instance=instance_name(move.instance_uid),
        instance_display_name=move.instance_name,
        kind=move.kind.number,
        state=move.state.number,
        step=move.step,
        attempt=move.attempt,
        source_host=host_name(move.source_host),
        target_host=host_name(move.target_host),
        flavor=flavor_name(move.flavor.name) if move.flavor else "",
        options=move.options,
        placement=move.placement,
        progress=move.progress,
        receipts=move.receipts,
        error=None if move.error is None else status_from_json(move.error),
        confirm_deadline=(
            None if move.confirm_deadline is None else timestamp(move.confirm_deadline)
        ),
        downtime=_downtime(move),
        created_by=move.created_by,
        cancel_requested=move.cancel_requested,
        etag=etag_of(move.generation),
        create_time=timestamp(move.create_time),
        update_time=timestamp(move.update_time),
        throughput_bytes_per_second=move.throughput_bytes_per_second,
    )


def event_to_proto(event: MigrationEvent) -> migration_pb2.MigrationEvent:
    """A line of a move's history."""
    return migration_pb2.MigrationEvent(
        sequence=event.seq,
        time=timestamp(event.time),
        saga=event.saga,
        step=event.step,
        kind=event.kind,
        message=event.message,
        error=None if event.error is None else status_from_json(event.error),
    )


def audit_to_proto(entry: AuditEntry) -> migration_service_pb2.AuditEntry:
    """An entry of the audit log."""
    return migration_service_pb2.AuditEntry(
        sequence=entry.seq,
        time=timestamp(entry.time),
        principal=entry.principal,
        peer=entry.peer,
        method=entry.method,
        resource=entry.resource,
        outcome=entry.outcome,
        reason=entry.reason,
        request_id=entry.request_id,
    )


def _number(state: ProtoEnum | None) -> Any:
    return 0 if state is None else state.number


def _downtime(move: Migration) -> Duration | None:
    if move.previous_power_state is not PowerState.RUNNING:
        return None
    if move.stop_time is None or move.running_time is None:
        return None
    duration = Duration()
    duration.FromTimedelta(move.running_time - move.stop_time)
    return duration
