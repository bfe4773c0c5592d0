"""Copies: the jobs that send parked volumes to another host.

    StartCopy -> queued (RUNNING, limited_by "queue") -> sending (RUNNING)
                   |                                        |
                   +---- CancelJob --> CANCELLED <----------+--> SUCCEEDED | FAILED

The bytes are sent by diskmover's own threads; a task per job follows them and
writes the outcome down before anybody is told. When hostd stops, jobs are left
RUNNING on disk, which the next start reads as INTERRUPTED.

Asking for a RUNNING job again with another session key means that the caller has
lost the first key and opened the target's session anew: the job then goes on
under the new key.
"""

from __future__ import annotations

import asyncio
import hmac
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import structlog

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.common.rpc import TlsPaths
from diskmover import ErrorCode, MoverError, OutgoingVolume, Push, Receipt
from diskmover.model import IoPriority
from hostd.jobs import CANCELLED, FAILED, RUNNING, SUCCEEDED, JobBoard, JobOwner, JobStore
from hostd.transfer import mover_error, tls_files
from hostd.v1 import job_pb2

log = structlog.stdlib.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

QUEUED = "queue"
_POLL_SECONDS = 0.3
_WRITE_RETRY_SECONDS = 2.0
# Besides the sending threads, some that start and cancel copies.
_SPARE_THREADS = 4


@dataclass(frozen=True)
class CopyOrder:
    """What to send where.

    Attributes:
        job_id: Chosen by the caller.
        owner: Whom the job belongs to.
        key: Session key. Not shown in `repr`, never stored.
        to: Address of the target's data port.
        receiver: URI name in its certificate.
        volumes: What to send.
        total_bytes: Their sizes together.
        connections: Number of connections; 0 for as many as the distance asks for.
        limit_bytes_per_second: 0 for no limit.
    """

    job_id: str
    owner: JobOwner
    key: bytes = field(repr=False)
    to: str
    receiver: str
    volumes: Sequence[OutgoingVolume]
    total_bytes: int
    connections: int
    limit_bytes_per_second: int


class _Run:
    """One attempt of one job."""

    def __init__(self, order: CopyOrder) -> None:
        self.order = order
        self.limit_bytes_per_second = order.limit_bytes_per_second
        self.push: Push | None = None
        # How the attempt is to end when it is told to; None: let it run.
        self.ending: str | None = None
        self.told = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


_CANCEL = "cancel"
_REPLACE = "replace"
_SHUT_DOWN = "shut down"


class Copies:
    """The copies that this host sends. Lives on the event loop.

    Args:
        store: Where jobs are kept.
        board: Where progress is told.
        tls: The host's certificate.
        max_copies: Copies that send at once.
        io_priority: How much their reads count beside those of others.
    """

    def __init__(
        self,
        store: JobStore,
        board: JobBoard,
        tls: TlsPaths,
        max_copies: int,
        io_priority: IoPriority = "normal",
    ) -> None:
        self._store = store
        self._board = board
        self._tls = tls
        self._io_priority: IoPriority = io_priority
        self._slots = asyncio.Semaphore(max_copies)
        self._pool = ThreadPoolExecutor(max_copies + _SPARE_THREADS, thread_name_prefix="copy")
        self._runs: dict[str, _Run] = {}
        self._closing = False

    @property
    def running(self) -> int:
        """Number of jobs that are queued or sending."""
        return len(self._runs)

    async def start(self, order: CopyOrder) -> job_pb2.Job:
        """Start a job, go on with one that ended without success, or return it.

        Raises:
            DroverError: INVALID_FIELD when the id is another migration's job.
        """
        found = await self._job_of(order.owner, order.job_id)
        if found is not None and found.state == SUCCEEDED:
            return found
        run = self._runs.get(order.job_id)
        if run is not None:
            if hmac.compare_digest(run.order.key, order.key):
                return await self._board.get(order.job_id)
            log.info("copy goes on under a new session key", job=order.job_id)
            await self._end(run, _REPLACE)
        return await self._begin(order, found)

    async def _begin(self, order: CopyOrder, before: job_pb2.Job | None) -> job_pb2.Job:
        job = job_pb2.Job(job_id=order.job_id, state=RUNNING)
        if before is not None:
            job.create_time.CopyFrom(before.create_time)
        job.progress.total_bytes = order.total_bytes
        job.progress.limited_by = QUEUED
        job.progress.limit_bytes_per_second = order.limit_bytes_per_second
        await self._blocking(self._store.put, job, order.owner)
        await self._board.show(job)
        run = _Run(order)
        self._runs[order.job_id] = run
        run.task = asyncio.create_task(self._follow(run, job))
        return job

    async def set_limit(
        self, owner: JobOwner, job_id: str, limit_bytes_per_second: int
    ) -> job_pb2.Job:
        """Change the limit of a running copy; does nothing to one that has ended.

        Raises:
            DroverError: JOB_NOT_FOUND; INVALID_FIELD when it is not this owner's.
        """
        await self._job_of(owner, job_id)
        job = await self._board.get(job_id)
        run = self._runs.get(job_id)
        if run is None:
            return job
        run.limit_bytes_per_second = limit_bytes_per_second
        if run.push is not None:
            await self._blocking(run.push.set_limit, limit_bytes_per_second or None)
        # Until the next look at the copy, this is what is told.
        job.progress.limit_bytes_per_second = limit_bytes_per_second
        return job

    async def cancel(self, owner: JobOwner, job_id: str) -> None:
        """End a job and wait until it has let go of its files; nothing when there is none.

        Raises:
            DroverError: INVALID_FIELD when it is not this owner's.
        """
        job = await self._job_of(owner, job_id)
        run = self._runs.get(job_id)
        if run is not None:
            await self._end(run, _CANCEL)
        elif job is not None and job.state not in (SUCCEEDED, FAILED, CANCELLED):
            job.state = CANCELLED
            await self._blocking(self._store.put, job, owner)

    async def cancel_all(self, owner: JobOwner) -> None:
        """End all jobs of a migration."""
        for job_id in await self._blocking(self._store.ids_of, owner.migration_id):
            await self.cancel(owner, job_id)

    async def _job_of(self, owner: JobOwner, job_id: str) -> job_pb2.Job | None:
        """The job as it was last written; None when there is none of that id.

        Raises:
            DroverError: INVALID_FIELD when it is not this owner's.
        """
        found = await self._blocking(self._store.get, job_id)
        if found is not None and found[1] != owner:
            raise DroverError(
                Reason.INVALID_FIELD,
                f"Job {job_id} belongs to migration {found[1].migration_id} of domain"
                f" {found[1].domain_uuid}, not to the one of the fence.",
                subject="job_id",
            )
        return found[0] if found is not None else None

    async def close(self) -> None:
        """Stop sending; jobs stay RUNNING on disk and are INTERRUPTED at the next start."""
        self._closing = True
        for run in list(self._runs.values()):
            await self._end(run, _SHUT_DOWN)
        self._pool.shutdown(wait=True)

    # --- one attempt

    async def _end(self, run: _Run, how: str) -> None:
        run.ending = how
        run.told.set()
        if run.push is not None:
            await self._blocking(run.push.cancel)
        if run.task is not None:
            await asyncio.wait({run.task})

    async def _follow(self, run: _Run, job: job_pb2.Job) -> None:
        with structlog.contextvars.bound_contextvars(
            migration=run.order.owner.migration_id,
            domain=run.order.owner.domain_uuid,
            job=run.order.job_id,
        ):
            try:
                final = await self._outcome(run, job)
                await self._finish(run, job, final)
            finally:
                # Only now: a start in between would begin the job a second time.
                self._runs.pop(job.job_id, None)

    async def _outcome(self, run: _Run, job: job_pb2.Job) -> job_pb2.Job:
        try:
            return await self._send(run, job)
        except MoverError as error:
            if error.code is ErrorCode.CANCELLED:
                return job_pb2.Job(job_id=job.job_id, state=CANCELLED)
            return _failed(job, mover_error(error, f"jobs/{job.job_id}"))
        except Exception:
            # The edge of a background task: nobody else would see it.
            log.exception("copy failed unexpectedly")
            bug = DroverError(Reason.INTERNAL, f"Copy {job.job_id} met a bug; see the log.")
            return _failed(job, bug)

    async def _finish(self, run: _Run, job: job_pb2.Job, final: job_pb2.Job) -> None:
        if run.ending in (_REPLACE, _SHUT_DOWN) and final.state != SUCCEEDED:
            log.info("copy set aside", why=run.ending)
            return
        final.create_time.CopyFrom(job.create_time)
        if not await self._write(run, final):
            return
        await self._board.show(final)
        log.info(
            "copy ended",
            state=job_pb2.Job.State.Name(final.state),
            error=final.error.message if final.HasField("error") else None,
        )

    async def _write(self, run: _Run, final: job_pb2.Job) -> bool:
        """Put an outcome on disk; False when hostd stops before the disk takes it."""
        while True:
            try:
                await self._blocking(self._store.put, final, run.order.owner)
                return True
            except sqlite3.Error:
                log.exception("the outcome of a copy cannot be stored; trying again")
            if run.ending == _SHUT_DOWN:
                return False
            await asyncio.sleep(_WRITE_RETRY_SECONDS)

    async def _send(self, run: _Run, job: job_pb2.Job) -> job_pb2.Job:
        """Wait for a slot, send, and tell progress on the way.

        Raises:
            MoverError: Why it failed, or CANCELLED.
        """
        async with _slot(self._slots, run.told) as mine:
            if not mine or run.ending is not None:
                raise MoverError(ErrorCode.CANCELLED, "cancelled while it waited for its turn")
            run.push = await self._blocking(self._push, run)
            log.info("copy started", to=run.order.to, volumes=len(run.order.volumes))
            if run.ending is not None:
                # Told between the two: nobody else has seen this push to cancel it.
                await self._blocking(run.push.cancel)
            # It may have been told another limit meanwhile.
            await self._blocking(run.push.set_limit, run.limit_bytes_per_second or None)
            while (receipts := await self._blocking(run.push.wait, _POLL_SECONDS)) is None:
                await self._board.show(_with_progress(job, run))
            return _succeeded(_with_progress(job, run), receipts)

    def _push(self, run: _Run) -> Push:
        order = run.order
        return Push(
            to=order.to,
            receiver=order.receiver,
            tls=tls_files(self._tls),
            session_id=order.owner.migration_id,
            key=order.key,
            tag=order.owner.migration_id,
            volumes=order.volumes,
            connections=order.connections or None,
            limit_bytes_per_second=run.limit_bytes_per_second or None,
            io_priority=self._io_priority,
        )

    async def _blocking(self, work: Callable[P, T], *arguments: P.args, **_: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)


class _slot:  # noqa: N801  # reads as a block
    """Hold one of the sending slots, unless told to end while waiting for it."""

    def __init__(self, slots: asyncio.Semaphore, told: asyncio.Event) -> None:
        self._slots = slots
        self._told = told
        self._mine = False

    async def __aenter__(self) -> bool:
        turn = asyncio.ensure_future(self._slots.acquire())
        told = asyncio.ensure_future(self._told.wait())
        await asyncio.wait({turn, told}, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        self._mine = turn.done()
        if not self._mine:
            turn.cancel()
            await asyncio.wait({turn})
            if not turn.cancelled():
                # It came in the same instant.
                self._slots.release()
        return self._mine

    async def __aexit__(self, *exc: object) -> None:
        if self._mine:
            self._slots.release()


def _with_progress(job: job_pb2.Job, run: _Run) -> job_pb2.Job:
    shown = job_pb2.Job()
    shown.CopyFrom(job)
    shown.progress.limit_bytes_per_second = run.limit_bytes_per_second
    if run.push is None:
        return shown
    progress = run.push.progress()
    shown.progress.CopyFrom(
        job_pb2.CopyProgress(
            done_bytes=progress.done_bytes,
            total_bytes=progress.total_bytes,
            resumed_bytes=progress.resumed_bytes,
            wire_bytes=progress.wire_bytes,
            rate_bytes_per_second=progress.rate_bytes_per_second,
            eta_seconds=progress.eta_seconds,
            eta_low_seconds=progress.eta_low_seconds,
            eta_high_seconds=progress.eta_high_seconds,
            limited_by=progress.limited_by,
            limit_bytes_per_second=run.limit_bytes_per_second,
        )
    )
    return shown


def _succeeded(ended: job_pb2.Job, receipts: Sequence[Receipt]) -> job_pb2.Job:
    ended.state = SUCCEEDED
    for receipt in receipts:
        ended.receipts.add(
            volume_id=receipt.volume_id,
            size_bytes=receipt.size_bytes,
            data_bytes=receipt.data_bytes,
            zero_bytes=receipt.zero_bytes,
            wire_bytes=receipt.wire_bytes,
            digest=receipt.digest,
            mode=receipt.mode,
            allocated_bytes=receipt.allocated_bytes,
        )
    return ended


def _failed(job: job_pb2.Job, error: DroverError) -> job_pb2.Job:
    return job_pb2.Job(job_id=job.job_id, state=FAILED, error=error.to_status())
