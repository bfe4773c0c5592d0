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

import secrets
from datetime import datetime

import msgspec
from sqlalchemy import Connection

from controlplane.common.errors import DroverError
from controlplane.common.identity import host_identity
from controlplane.common.reasons import Reason
from controlplane.domain.capacity import limits_of, needed_bytes
from controlplane.domain.model import Instance, Migration, Size
from controlplane.domain.names import host_name, instance_name
from controlplane.domain.states import (
    ConfirmPolicy,
    MigrationState,
    PowerState,
    ShutdownMode,
    TaskState,
    VmState,
)
from controlplane.saga.definition import Saga, Step, StepContext, StepKind, Wait
from controlplane.saga.log import EventKind, SagaView
from controlplane.sagas.common import MigrationParams, Move, gone, refuse_failed_checks
from controlplane.sagas.placement import next_candidate, refuse_host
from controlplane.sagas.projection import Endings, Phase, note_retry, project, settle
from controlplane.sagas.resources import MoveResources
from controlplane.store import claims, hosts, instances, migrations
from controlplane.store.types import utc_now
from controlplane.v1 import migration_pb2
from hostd.v1 import domain_pb2, job_pb2, preflight_pb2
from hostd.v1 import host_service_pb2 as hostd

KIND = "move"


class Prepared(msgspec.Struct, frozen=True):
    """Output of `prepare_target`.

    Attributes:
        data_identity: URI name in the certificate of the target's data port.
    """

    data_identity: str


class Stopped(msgspec.Struct, frozen=True):
    """Output of `stop`.

    Attributes:
        ran: True when the guest ran before.
        forced: True when it had to be powered off.
    """

    ran: bool
    forced: bool


class ParkedVolume(msgspec.Struct, frozen=True):
    """A volume to copy, by root and name; fields as in hostd.v1.Volume."""

    volume_id: str
    kind: int
    root: str
    name: str
    format: str
    size_bytes: int
    allocated_bytes: int
    virtual_size_bytes: int
    backing_volume_id: str
    read_only: bool


class Parked(msgspec.Struct, frozen=True):
    """Output of `park`.

    Attributes:
        volumes: What is to be copied, the baggage last.
    """

    volumes: list[ParkedVolume]


class Copied(msgspec.Struct, frozen=True):
    """Output of `copy`.

    Attributes:
        digests: Root digest of each volume, lower-case hex, by volume id.
    """

    digests: dict[str, str]


# --- admit -------------------------------------------------------------------


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


# --- prepare_target ----------------------------------------------------------


async def prepare_target(ctx: StepContext) -> Prepared | Wait:
    """Have the target check and reserve; a definite refusal tries the next host."""
    move = await Move.of(ctx)
    domain = await move.on_source(
        lambda h: h.GetDomain, hostd.GetDomainRequest(domain_uuid=move.row.instance_uid)
    )
    leaving = await move.on_source(
        lambda h: h.CheckSource, hostd.CheckSourceRequest(domain_uuid=move.row.instance_uid)
    )
    refuse_failed_checks(leaving, instance_name(move.row.instance_uid))
    await ctx.transaction(lambda tx: migrations.update(tx, move.row.id, description=domain))
    request = hostd.PrepareTargetRequest(
        fence=move.fence,
        machine=preflight_pb2.IncomingMachine(domain=domain, size=target_size(move)),
    )
    try:
        prepared = await move.on_target(lambda h: h.PrepareTarget, request)
    except DroverError as refusal:
        if refusal.reason is Reason.STALE_GENERATION:
            raise
        return await go_to_next_host(move, refusal)
    await ctx.transaction(lambda tx: leave_disk_to_the_host(tx, move.row))
    return Prepared(data_identity=prepared.data_identity)


def leave_disk_to_the_host(tx: Connection, row: Migration) -> None:
    """Claim no disk any more: the target has reserved it and reports that much less."""
    size = size_after(instances.get(tx, row.instance_uid), row)
    claims.put(tx, claims.migration_consumer(row.id), row.target_host, size)


async def go_to_next_host(move: Move, refusal: DroverError) -> Wait:
    """Take the claim to the next candidate, or fail with the refusal.

    Raises:
        DroverError: No candidate is left; the refusal itself when the host had
            been asked for by name.
    """
    if not gone(refusal):
        await ensure_target_absent(move.context)

    def take_next(tx: Connection) -> bool:
        row = migrations.get(tx, move.row.id)
        placement = refuse_host(row.placement, row.target_host, refusal)
        claims.drop(tx, claims.migration_consumer(row.id))
        while candidate := next_candidate(placement):
            if claim_room(tx, row, candidate, move.resources):
                placement.chosen_host = host_name(candidate)
                migrations.update(tx, row.id, target_host=candidate, placement=placement)
                return True
            lost = DroverError(Reason.CLAIM_LOST, f"hosts/{candidate} has filled up meanwhile.")
            placement = refuse_host(placement, candidate, lost)
        migrations.update(tx, row.id, placement=placement)
        return False

    if await move.context.transaction(take_next):
        return Wait(0)
    raise refusal


def claim_room(tx: Connection, row: Migration, host: str, resources: MoveResources) -> bool:
    """Hold room for the machine on a host in the name of its move, if there is any."""
    found = hosts.find(tx, host)
    if found is None or found.facts is None:
        return False
    size = size_after(instances.get(tx, row.instance_uid), row)
    with_disk = msgspec.structs.replace(
        size, disk_bytes=needed_bytes(row.description) if row.description else 0
    )
    return claims.try_claim(
        tx,
        claims.migration_consumer(row.id),
        host,
        with_disk,
        limits_of(found.facts, resources.ratios),
    )


def size_after(instance: Instance, row: Migration) -> Size:
    """The room that the machine takes once it has moved."""
    if row.flavor is None:
        return instance.size
    return Size(vcpus=row.flavor.vcpus, memory_mib=row.flavor.memory_mib)


async def ensure_target_absent(ctx: StepContext) -> None:
    """Undo of `prepare_target`: the target keeps nothing of this move."""
    move = await Move.of(ctx)
    if not move.row.target_host:
        return
    try:
        await move.on_target(lambda h: h.EnsureAbsent, hostd.EnsureAbsentRequest(fence=move.fence))
        await move.forget_on_target()
    except DroverError as error:
        if not gone(error):
            raise


def target_size(move: Move) -> preflight_pb2.TargetSize | None:
    """The size that a resize asks of the target; None for a migration."""
    flavor = move.row.flavor
    if flavor is None:
        return None
    return preflight_pb2.TargetSize(
        vcpus=flavor.vcpus,
        memory_mib=flavor.memory_mib,
        root_disk_bytes=flavor.root_disk_bytes,
    )


# --- stop --------------------------------------------------------------------

_SHUTDOWN_MODES = {
    ShutdownMode.GRACEFUL: hostd.EnsureStoppedRequest.MODE_GRACEFUL,
    ShutdownMode.GRACEFUL_THEN_FORCE: hostd.EnsureStoppedRequest.MODE_GRACEFUL_THEN_FORCE,
    ShutdownMode.FORCE: hostd.EnsureStoppedRequest.MODE_FORCE,
}


async def stop(ctx: StepContext) -> Stopped | Wait:
    """Bring the guest down on the source and remember whether it ran."""
    move = await Move.of(ctx)
    options = move.row.options
    mode = ShutdownMode.from_number(options.shutdown_mode) or ShutdownMode.GRACEFUL_THEN_FORCE
    request = hostd.EnsureStoppedRequest(
        fence=move.fence, mode=_SHUTDOWN_MODES[mode], timeout=options.shutdown_timeout
    )
    await ctx.transaction(lambda tx: note_stop_time(tx, move.row.id))
    answer = await move.on_source(lambda h: h.EnsureStopped, request)
    if not answer.stopped:
        return move.poll
    ran = answer.previous_power_state == domain_pb2.POWER_STATE_RUNNING
    before = PowerState.RUNNING if ran else PowerState.SHUTOFF
    await ctx.transaction(
        lambda tx: migrations.update(tx, move.row.id, previous_power_state=before)
    )
    return Stopped(ran=ran, forced=answer.forced)


def note_stop_time(tx: Connection, migration_id: str) -> None:
    """The downtime counts from the first attempt to stop the guest."""
    if migrations.get(tx, migration_id).stop_time is None:
        migrations.update(tx, migration_id, stop_time=utc_now())


async def restore_power(ctx: StepContext) -> None:
    """Undo of `stop`: the guest runs on the source again if it ran there before."""
    move = await Move.of(ctx)
    await move.on_source(lambda h: h.RestorePower, hostd.RestorePowerRequest(fence=move.fence))
    await move.forget_on_source()


# --- park --------------------------------------------------------------------


async def park(ctx: StepContext) -> Parked:
    """Undefine the stopped machine and move its files aside."""
    move = await Move.of(ctx)
    answer = await move.on_source(
        lambda h: h.EnsureParked, hostd.EnsureParkedRequest(fence=move.fence)
    )
    return Parked(
        volumes=[
            ParkedVolume(
                volume_id=v.volume_id,
                kind=v.kind,
                root=v.root,
                name=v.name,
                format=v.format,
                size_bytes=v.size_bytes,
                allocated_bytes=v.allocated_bytes,
                virtual_size_bytes=v.virtual_size_bytes,
                backing_volume_id=v.backing_volume_id,
                read_only=v.read_only,
            )
            for v in answer.volumes
        ]
    )


async def unpark(ctx: StepContext) -> None:
    """Undo of `park`: files and definition are back where they were."""
    move = await Move.of(ctx)
    await move.on_source(lambda h: h.EnsureUnparked, hostd.EnsureUnparkedRequest(fence=move.fence))


# --- copy --------------------------------------------------------------------


async def copy(ctx: StepContext) -> Copied | Wait:
    """Have the source send its parked volumes until the target has all of them."""
    move = await Move.of(ctx)
    job = await copy_job(move)
    if job is None or must_start_again(job):
        job = await start_copy(move)
    await ctx.transaction(lambda tx: migrations.set_progress(tx, move.row.id, job.progress))
    if job.state == job_pb2.Job.STATE_RUNNING:
        return move.poll
    if job.state != job_pb2.Job.STATE_SUCCEEDED:
        error = DroverError.from_status(job.error)
        raise error or DroverError(
            Reason.INTERNAL, f"Copy {job.job_id} ended without saying why: {job.error.message}"
        )
    await ctx.transaction(lambda tx: note_receipts(tx, move.row.id, job))
    return Copied(digests={r.volume_id: r.digest for r in job.receipts})


def note_receipts(tx: Connection, migration_id: str, job: job_pb2.Job) -> None:
    """Keep the receipts, and the average rate over the whole copy."""
    size_bytes = sum(r.size_bytes for r in job.receipts)
    seconds = (job.update_time.ToNanoseconds() - job.create_time.ToNanoseconds()) / 1e9
    migrations.update(
        tx,
        migration_id,
        receipts=tuple(job.receipts),
        throughput_bytes_per_second=round(size_bytes / seconds) if seconds > 0 else 0,
    )


async def copy_job(move: Move) -> job_pb2.Job | None:
    """The copy job as the source knows it; None when it was never started."""
    try:
        return await move.on_source(lambda h: h.GetJob, hostd.GetJobRequest(job_id=move.job_id))
    except DroverError as error:
        if error.reason is Reason.JOB_NOT_FOUND:
            return None
        raise


def must_start_again(job: job_pb2.Job) -> bool:
    """True for a copy that ended but can go on from what is durable on the target."""
    if job.state in (job_pb2.Job.STATE_INTERRUPTED, job_pb2.Job.STATE_CANCELLED):
        return True
    if job.state != job_pb2.Job.STATE_FAILED:
        return False
    error = DroverError.from_status(job.error)
    return error is not None and error.reason in (
        Reason.COPY_INTERRUPTED,
        Reason.SESSION_REFUSED,
    )


async def start_copy(move: Move) -> job_pb2.Job:
    """Open a data session under a fresh key and have the source send.

    The key is made here, each time anew, and is nowhere stored: when anything
    is lost, the next attempt opens another session and goes on from what the
    target has.
    """
    key = secrets.token_bytes(32)
    volumes = move.context.output("park").volumes
    opened = await move.on_target(
        lambda h: h.OpenReceive,
        hostd.OpenReceiveRequest(
            fence=move.fence,
            session_key=key,
            sender_identity=host_identity(move.resources.fleet, move.row.source_host).uri,
            volumes=[domain_pb2.Volume(**msgspec.to_builtins(v)) for v in volumes],
        ),
    )
    return await move.on_source(
        lambda h: h.StartCopy,
        hostd.StartCopyRequest(
            fence=move.fence,
            job_id=move.job_id,
            session_key=key,
            data_address=opened.data_address,
            receiver_identity=move.context.output("prepare_target").data_identity,
            limit_bytes_per_second=move.row.options.bandwidth_limit_bytes_per_second,
            connections=move.resources.copy_connections,
            volume_ids=[v.volume_id for v in volumes],
        ),
    )


async def cancel_copy(ctx: StepContext) -> None:
    """Undo of `copy`: the source no longer reads its parked files.

    What the target received is removed by the undo of `prepare_target`, after
    the guest is back: the guest comes first.
    """
    move = await Move.of(ctx)
    await move.on_source(
        lambda h: h.CancelJob, hostd.CancelJobRequest(fence=move.fence, job_id=move.job_id)
    )


# --- build -------------------------------------------------------------------


async def build(ctx: StepContext) -> None:
    """Define the machine on the target from what was received and verified."""
    move = await Move.of(ctx)
    digests = ctx.output("copy").digests
    await move.on_target(
        lambda h: h.EnsureBuilt,
        hostd.EnsureBuiltRequest(
            fence=move.fence,
            size=target_size(move),
            digests=[
                hostd.ExpectedDigest(volume_id=volume_id, digest=digest)
                for volume_id, digest in digests.items()
            ],
        ),
        timeout_seconds=300.0,
    )


async def undefine_on_target(ctx: StepContext) -> None:
    """Undo of `build`: the target has no definition that anybody could start."""
    move = await Move.of(ctx)
    try:
        await move.on_target(
            lambda h: h.EnsureUndefined, hostd.EnsureUndefinedRequest(fence=move.fence)
        )
    except DroverError as error:
        if not gone(error):
            raise


# --- switch_owner ------------------------------------------------------------


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


# --- start -------------------------------------------------------------------


async def start(ctx: StepContext) -> Wait | None:
    """Start the guest on the target if it ran before, and see it running."""
    if not ctx.output("stop").ran:
        return None
    move = await Move.of(ctx)
    answer = await move.on_target(
        lambda h: h.EnsureStarted, hostd.EnsureStartedRequest(fence=move.fence)
    )
    if not answer.running:
        return move.poll
    await ctx.transaction(lambda tx: migrations.update(tx, move.row.id, running_time=utc_now()))
    return None


async def stop_on_target(ctx: StepContext) -> Wait | None:
    """Undo of `start`: the guest does not run on the target."""
    move = await Move.of(ctx)
    request = hostd.EnsureStoppedRequest(
        fence=move.fence, mode=hostd.EnsureStoppedRequest.MODE_FORCE
    )
    try:
        answer = await move.on_target(lambda h: h.EnsureStopped, request)
    except DroverError as error:
        if gone(error) or error.reason is Reason.DOMAIN_NOT_FOUND:
            return None
        raise
    return None if answer.stopped else move.poll


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
        undefine_on_target,
        None,
        "Undone by taking the definition away: from then on the target cannot start the machine.",
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
    failed = any(event.kind is EventKind.FAILED for event in saga.events)
    state = MigrationState.FAILED if failed else MigrationState.CANCELLED
    error = row.error
    if not failed:
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
)
