"""The copy of a move: a durable job on the source, started again until all has arrived."""

from __future__ import annotations

import secrets

import msgspec
from sqlalchemy import Connection

from controlplane.common.errors import DroverError, Transient
from controlplane.common.identity import host_identity
from controlplane.common.reasons import Reason
from controlplane.domain.model import Migration
from controlplane.saga.definition import StepContext, Wait
from controlplane.sagas.common import Move
from controlplane.sagas.payloads import Copied
from controlplane.store import migrations
from hostd.v1 import domain_pb2, job_pb2
from hostd.v1 import host_service_pb2 as hostd


async def copy(ctx: StepContext) -> Copied | Wait:
    """Have the source send its parked volumes until the target has all of them.

    Raises:
        Transient: The copy was cut off and has been started again; it goes on from
            what is durable on the target. Raised so that users see why it takes
            longer, and so that a link that never holds is tried ever more slowly.
    """
    move = await Move.of(ctx)
    before = await copy_job(move)
    cut = None if before is None else cut_off(before)
    job = await start_copy(move) if before is None or cut is not None else before
    await ctx.transaction(lambda tx: note_progress(tx, move.row, job))
    if cut is not None:
        raise Transient(cut)
    if job.state == job_pb2.Job.STATE_RUNNING:
        await keep_limit(move, job)
        return move.poll
    if job.state != job_pb2.Job.STATE_SUCCEEDED:
        error = DroverError.from_status(job.error)
        raise error or DroverError(
            Reason.INTERNAL, f"Copy {job.job_id} ended without saying why: {job.error.message}"
        )
    await ctx.transaction(lambda tx: note_receipts(tx, move.row.id, job))
    return Copied(digests={r.volume_id: r.digest for r in job.receipts})


async def keep_limit(move: Move, job: job_pb2.Job) -> None:
    """Have a running copy heed the limit that the move has now."""
    wanted = move.row.options.bandwidth_limit_bytes_per_second
    if job.progress.limit_bytes_per_second == wanted:
        return
    await move.on_source(
        lambda h: h.SetCopyLimit,
        hostd.SetCopyLimitRequest(
            fence=move.fence, job_id=move.job_id, limit_bytes_per_second=wanted
        ),
    )


def note_progress(tx: Connection, row: Migration, job: job_pb2.Job) -> None:
    """Show how far the copy is; what cut it off is over."""
    migrations.set_progress(tx, row.id, job.progress)
    if row.error is not None:
        migrations.update(tx, row.id, error=None)


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


def cut_off(job: job_pb2.Job) -> DroverError | None:
    """Why a copy ended that can go on from what is durable on the target; None for any other."""
    if job.state in (job_pb2.Job.STATE_INTERRUPTED, job_pb2.Job.STATE_CANCELLED):
        return DroverError(Reason.COPY_INTERRUPTED, f"Copy {job.job_id} was interrupted.")
    if job.state != job_pb2.Job.STATE_FAILED:
        return None
    error = DroverError.from_status(job.error)
    if error is not None and error.reason in (Reason.COPY_INTERRUPTED, Reason.SESSION_REFUSED):
        return error
    return None


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
