"""A move on the host that the machine leaves: stopped and set aside, or given back."""

from __future__ import annotations

from sqlalchemy import Connection

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.domain.names import host_name
from controlplane.domain.preflight import warnings_of
from controlplane.domain.states import (
    PowerState,
    ShutdownMode,
)
from controlplane.saga.definition import StepContext, Wait
from controlplane.sagas.common import Move
from controlplane.sagas.payloads import Parked, ParkedVolume, Stopped
from controlplane.sagas.placement import with_warnings
from controlplane.store import migrations
from controlplane.store.types import utc_now
from hostd.v1 import domain_pb2
from hostd.v1 import host_service_pb2 as hostd

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
    try:
        await move.on_source(lambda h: h.RestorePower, hostd.RestorePowerRequest(fence=move.fence))
    except DroverError as error:
        # Never parked and yet not there: somebody undefined it by hand.
        by_hand = error.reason is Reason.DOMAIN_NOT_FOUND and ctx.output_or_none("park") is None
        if not by_hand:
            raise
    await move.forget_on_source()


async def park(ctx: StepContext) -> Parked:
    """Undefine the stopped machine and move its files aside."""
    move = await Move.of(ctx)
    answer = await move.on_source(
        lambda h: h.EnsureParked, hostd.EnsureParkedRequest(fence=move.fence)
    )
    await move.note_absence(move.row.source_host)
    warnings = warnings_of(answer.report, host_name(move.row.source_host))
    await ctx.transaction(lambda tx: note_warnings(tx, move.row.id, warnings))
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


def note_warnings(tx: Connection, migration_id: str, warnings: list[str]) -> None:
    """Add to what a person should know of the move."""
    placement = migrations.get(tx, migration_id).placement
    after = with_warnings(placement, [*placement.warnings, *warnings])
    if after != placement:
        migrations.update(tx, migration_id, placement=after)


async def unpark(ctx: StepContext) -> None:
    """Undo of `park`: files and definition are back where they were.

    A host that has nothing parked puts nothing back, and says that all is well,
    also when its parked files were lost or their file system is not mounted: so
    the machine itself is looked for.
    """
    move = await Move.of(ctx)
    await move.on_source(lambda h: h.EnsureUnparked, hostd.EnsureUnparkedRequest(fence=move.fence))
    await move.verify_whole(
        move.row.source_host, f"What {move.row.target_host} has of it was kept."
    )
