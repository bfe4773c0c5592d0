"""The move: a machine leaves one host and runs on another.

    CreateMigration            one transaction: plan, claim, this saga (docs/adr/0003)
        |
      admit ........ db       the machine is still as it was when asked
      prepare_target target   checks, reserves space; a refusal tries the next host
      (precopy)      source   place of the warm copy that shortens the downtime
      stop ......... source   ACPI, then force if allowed
      park ......... source   undefined, files aside: it cannot start here
      copy ......... both     disks and baggage, verified
      build ........ target   defined from baggage and disks
      switch_owner . db       from here on the target owns the machine
      start ........ target   if it ran before
        |
    AWAITING_CONFIRM           confirm.py or revert.py

Why this order: nothing that can be refused beforehand costs the guest a second
of downtime; the source copy is complete until somebody confirms; and at every
instant at most one host can start the machine: the source until `park`, nobody
until `switch_owner`, the target after it.

Every undo is run for every step that was started and means "ensure absent".
Undone in reverse, a failed move first makes sure that the target cannot run
the machine, then gives it back to the source, then cleans up.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.domain.model import Migration
from controlplane.domain.names import instance_name
from controlplane.domain.states import (
    ConfirmPolicy,
    MigrationState,
    TaskState,
    VmState,
)
from controlplane.saga.definition import Saga, Step, StepContext, StepKind
from controlplane.saga.log import SagaView
from controlplane.sagas.common import MigrationParams
from controlplane.sagas.copying import cancel_copy, copy
from controlplane.sagas.payloads import Copied, Parked, Prepared, Stopped
from controlplane.sagas.projection import (
    Endings,
    Phase,
    failure_of,
    labels,
    note_retry,
    project,
    settle,
)
from controlplane.sagas.source import park, restore_power, stop, unpark
from controlplane.sagas.target import (
    build,
    ensure_target_absent,
    prepare_target,
    size_after,
    start,
    stop_on_target,
    take_down_on_target,
)
from controlplane.store import claims, instances, migrations
from controlplane.store.types import utc_now
from controlplane.v1 import migration_pb2

KIND = "move"


def admit(tx: Connection, ctx: StepContext) -> None:
    """Check once more that the machine is where it was when the move was asked for."""
    row = migrations.get(tx, ctx.params.migration_id)
    instance = instances.get(tx, row.instance_uid)
    if instance.host != row.source_host:
        raise DroverError(
            Reason.INSTANCE_STATE,
            f"{instance.name} is on host {instance.host}, no longer on {row.source_host}.",
            subject=instance_name(instance.uid),
            metadata={"host": instance.host},
        )


def switch_owner(tx: Connection, ctx: StepContext) -> None:
    """The target owns the machine; the migration now holds the room on the source."""
    row = migrations.get(tx, ctx.params.migration_id)
    instance = instances.get(tx, row.instance_uid)
    if instance.host == row.target_host:
        return
    size = size_after(instance, row)
    claims.put(tx, claims.migration_consumer(row.id), row.source_host, instance.size)
    claims.put(tx, claims.instance_consumer(instance.uid), row.target_host, size)
    instances.update(
        tx, instance.uid, host=row.target_host, vcpus=size.vcpus, memory_mib=size.memory_mib
    )


def switch_owner_back(tx: Connection, ctx: StepContext) -> None:
    """Undo of `switch_owner`: the source owns the machine, with the size it had there."""
    row = migrations.get(tx, ctx.params.migration_id)
    instance = instances.get(tx, row.instance_uid)
    held = claims.find(tx, claims.migration_consumer(row.id))
    if instance.host == row.source_host or held is None:
        return
    claims.put(tx, claims.migration_consumer(row.id), row.target_host, instance.size)
    claims.put(tx, claims.instance_consumer(instance.uid), row.source_host, held.size)
    instances.update(
        tx,
        instance.uid,
        host=row.source_host,
        vcpus=held.size.vcpus,
        memory_mib=held.size.memory_mib,
    )


STEPS = (
    Step(
        "admit",
        StepKind.DB,
        admit,
        None,
        None,
        "No undo: it only looks. The claim and the marks on the machine were made together with "
        "the saga and go with the status change that ends it.",
    ),
    Step(
        "prepare_target",
        StepKind.REMOTE,
        prepare_target,
        ensure_target_absent,
        Prepared,
        "Undone last, after the guest is back: removes all that the target holds of this move.",
    ),
    Step(
        "stop",
        StepKind.REMOTE,
        stop,
        restore_power,
        Stopped,
        "Undone by starting the guest again if it ran; hostd remembers, even if we never heard.",
    ),
    Step(
        "park",
        StepKind.REMOTE,
        park,
        unpark,
        Parked,
        "Undone by moving files and definition back; accepts a machine parked half or not at all.",
    ),
    Step(
        "copy",
        StepKind.REMOTE,
        copy,
        cancel_copy,
        Copied,
        "Undone by ending the job, so that nothing reads the files while they are moved back.",
    ),
    Step(
        "build",
        StepKind.REMOTE,
        build,
        take_down_on_target,
        None,
        "Undone by taking the definition away, off first if somebody started it: from then on "
        "the target cannot start the machine.",
    ),
    Step(
        "switch_owner",
        StepKind.DB,
        switch_owner,
        switch_owner_back,
        None,
        "Undone by switching back; both directions are one transaction with their log entry.",
    ),
    Step(
        "start",
        StepKind.REMOTE,
        start,
        stop_on_target,
        None,
        "Undone by powering off: what the guest wrote there is dropped with the failed move.",
    ),
)

PHASES = {
    "admit": Phase(MigrationState.PENDING, TaskState.RESIZE_PREP),
    "prepare_target": Phase(MigrationState.PREPARING, TaskState.RESIZE_PREP),
    "stop": Phase(MigrationState.STOPPING, TaskState.RESIZE_MIGRATING),
    "park": Phase(MigrationState.STOPPING, TaskState.RESIZE_MIGRATING),
    "copy": Phase(MigrationState.COPYING, TaskState.RESIZE_MIGRATING),
    "build": Phase(MigrationState.FINISHING, TaskState.RESIZE_MIGRATED),
    "switch_owner": Phase(MigrationState.FINISHING, TaskState.RESIZE_MIGRATED),
    "start": Phase(MigrationState.FINISHING, TaskState.RESIZE_FINISH),
}


def come_to_rest(tx: Connection, row: Migration, saga: SagaView) -> None:
    """The machine lives on the target; the source copy waits for confirm or revert."""
    instances.update(tx, row.instance_uid, vm_state=VmState.RESIZED, task_state=None)
    migrations.update(
        tx,
        row.id,
        state=MigrationState.AWAITING_CONFIRM,
        confirm_deadline=confirm_deadline(row.options),
        error=None,
    )


def confirm_deadline(options: migration_pb2.MigrationOptions) -> datetime | None:
    """When the source copy is deleted by itself; None when somebody has to confirm."""
    match ConfirmPolicy.from_number(options.confirm_policy):
        case ConfirmPolicy.AUTO:
            return utc_now()
        case ConfirmPolicy.AFTER:
            return utc_now() + options.confirm_after.ToTimedelta()
        case _:
            return None


def fall_back(tx: Connection, row: Migration, saga: SagaView) -> None:
    """All is undone: the machine is as it was, and nothing of the move is held."""
    state, error = MigrationState.FAILED, failure_of(saga)
    if error is None:
        state = MigrationState.CANCELLED
        error = DroverError(Reason.CANCELLED, "The move was cancelled.").to_json()
    claims.drop(tx, claims.migration_consumer(row.id))
    migrations.update(tx, row.id, state=state, error=error)
    instance = instances.get(tx, row.instance_uid)
    settle(tx, row, row.previous_power_state or instance.power_state)


SAGA = Saga(
    kind=KIND,
    version=1,
    params=MigrationParams,
    steps=STEPS,
    pivot=None,
    observe=project(KIND, PHASES, Endings(done=come_to_rest, undone=fall_back)),
    retrying=note_retry,
    labels=labels,
)
