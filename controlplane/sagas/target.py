"""A move on the host that the machine goes to: prepared, built, started, or left traceless."""

from __future__ import annotations

import msgspec
from sqlalchemy import Connection

from controlplane.common.errors import DroverError, Transient
from controlplane.common.reasons import Reason
from controlplane.domain import rules
from controlplane.domain.capacity import limits_of, needed_bytes
from controlplane.domain.model import Instance, Migration, Size
from controlplane.domain.names import host_name, instance_name
from controlplane.domain.preflight import failed_checks, warnings_of
from controlplane.saga.definition import StepContext, Wait
from controlplane.sagas.common import Move, gone
from controlplane.sagas.payloads import Prepared
from controlplane.sagas.placement import next_candidate, refuse_host, with_warnings
from controlplane.sagas.resources import MoveResources
from controlplane.store import claims, hosts, instances, migrations
from controlplane.store.types import utc_now
from hostd.v1 import host_service_pb2 as hostd
from hostd.v1 import preflight_pb2


async def prepare_target(ctx: StepContext) -> Prepared | Wait:
    """Have the target check and reserve; a definite refusal tries the next host."""
    move = await Move.of(ctx)
    domain = await move.on_source(
        lambda h: h.GetDomain, hostd.GetDomainRequest(domain_uuid=move.row.instance_uid)
    )
    leaving = await move.on_source(
        lambda h: h.CheckSource, hostd.CheckSourceRequest(domain_uuid=move.row.instance_uid)
    )
    refusal = failed_checks(leaving, instance_name(move.row.instance_uid))
    if refusal is not None:
        raise refusal
    await ctx.transaction(lambda tx: migrations.update(tx, move.row.id, description=domain))
    request = hostd.PrepareTargetRequest(
        fence=move.fence,
        machine=preflight_pb2.IncomingMachine(domain=domain, size=target_size(move)),
    )
    try:
        prepared = await move.on_target(lambda h: h.PrepareTarget, request)
        await refuse_out_of_reach(move, prepared.data_address)
    except DroverError as error:
        if error.reason is Reason.STALE_GENERATION:
            raise
        return await go_to_next_host(move, error)
    warnings = [
        *warnings_of(leaving, host_name(move.row.source_host)),
        *warnings_of(prepared.report, host_name(move.row.target_host)),
    ]
    placement = with_warnings(move.row.placement, warnings)

    def note(tx: Connection) -> None:
        leave_disk_to_the_host(tx, move.row)
        migrations.update(tx, move.row.id, placement=placement)

    await ctx.transaction(note)
    return Prepared(data_identity=prepared.data_identity)


async def refuse_out_of_reach(move: Move, data_address: str) -> None:
    """Have the source connect to the target's data port once, while the guest still runs.

    Raises:
        DroverError: TARGET_UNREACHABLE.
    """
    report = await move.on_source(
        lambda h: h.CheckReach, hostd.CheckReachRequest(data_address=data_address)
    )
    refusal = failed_checks(report, host_name(move.row.target_host))
    if refusal is not None:
        raise refusal


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
    """Undo of `prepare_target`: the target keeps nothing of this move.

    Once it has received all, its copy is deleted only when the source is seen to
    have the machine.
    """
    move = await Move.of(ctx)
    if not move.row.target_host:
        return
    if move.row.receipts:
        await move.verify_whole(
            move.row.source_host, f"The copy on {move.row.target_host} was kept."
        )
    try:
        await move.on_target(lambda h: h.EnsureAbsent, hostd.EnsureAbsentRequest(fence=move.fence))
        await move.note_absence(move.row.target_host)
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
    """The target has no definition any more that anybody could start."""
    move = await Move.of(ctx)
    try:
        await move.on_target(
            lambda h: h.EnsureUndefined, hostd.EnsureUndefinedRequest(fence=move.fence)
        )
        await move.note_absence(move.row.target_host)
    except DroverError as error:
        if not gone(error):
            raise


async def take_down_on_target(ctx: StepContext) -> Wait | None:
    """Undo of `build`: off and undefined, even if somebody on the target started it.

    The machine is not the target's at this point; what it wrote there is dropped
    with the failed move.
    """
    waiting = await stop_on_target(ctx)
    if waiting is None:
        await undefine_on_target(ctx)
    return waiting


async def start(ctx: StepContext) -> Wait | None:
    """Start the guest on the target if it ran before, and see it running.

    Not while another host reports the machine, as a source on which somebody has
    put it back by hand: it would run twice. That passes, or the move is cancelled.
    """
    if not ctx.output("stop").ran:
        return None
    move = await Move.of(ctx)
    try:
        rules.check_no_conflict(
            await ctx.transaction(lambda tx: instances.get(tx, move.row.instance_uid))
        )
    except DroverError as conflict:
        raise Transient(conflict) from None
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
