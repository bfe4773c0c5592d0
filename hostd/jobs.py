"""Durable jobs: long operations that a caller names and asks for again.

    (no job) -> RUNNING -> SUCCEEDED
                  |  ^
                  |  +---------- started again ----------+
                  +--> FAILED | CANCELLED | INTERRUPTED --+

The state is on disk before it is told to anybody; progress lives in memory only.
A job that is RUNNING when hostd starts was cut off and becomes INTERRUPTED.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from google.protobuf import json_format

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.state import StateFile, now
from hostd.v1 import fence_pb2, job_pb2

RUNNING = job_pb2.Job.STATE_RUNNING
SUCCEEDED = job_pb2.Job.STATE_SUCCEEDED
FAILED = job_pb2.Job.STATE_FAILED
CANCELLED = job_pb2.Job.STATE_CANCELLED
INTERRUPTED = job_pb2.Job.STATE_INTERRUPTED


@dataclass(frozen=True)
class JobOwner:
    """Whom a job belongs to.

    Attributes:
        migration_id: The move.
        domain_uuid: The machine.
    """

    migration_id: str
    domain_uuid: str

    @classmethod
    def of(cls, fence: fence_pb2.Fence) -> JobOwner:
        """Whom a fence speaks for."""
        return cls(fence.migration_id, fence.domain_uuid)


class JobStore:
    """Jobs on disk.

    Args:
        state: Where they are kept. Jobs that are RUNNING there become INTERRUPTED.
    """

    def __init__(self, state: StateFile) -> None:
        self._state = state
        with state.transaction() as tx:
            rows = tx.execute(
                "SELECT job_id FROM job WHERE state=?", (job_pb2.Job.State.Name(RUNNING),)
            ).fetchall()
            for row in rows:
                found = self.get(row["job_id"])
                if found is not None:
                    job, owner = found
                    job.state = INTERRUPTED
                    job.ClearField("progress")
                    self.put(job, owner)

    def get(self, job_id: str) -> tuple[job_pb2.Job, JobOwner] | None:
        """A job as it was last written, or None."""
        with self._state.transaction() as tx:
            row = tx.execute("SELECT * FROM job WHERE job_id=?", (job_id,)).fetchone()
        if row is None:
            return None
        job = json_format.Parse(row["snapshot"], job_pb2.Job())
        return job, JobOwner(row["migration_id"], row["domain_uuid"])

    def put(self, job: job_pb2.Job, owner: JobOwner) -> None:
        """Write a job, setting its times; durable when it returns."""
        stamp = now()
        job.update_time.FromNanoseconds(round(stamp * 1e9))
        if not job.HasField("create_time"):
            job.create_time.CopyFrom(job.update_time)
        with self._state.transaction() as tx:
            tx.execute(
                "INSERT INTO job VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (job_id) DO UPDATE SET"
                " state=excluded.state, snapshot=excluded.snapshot,"
                " update_time=excluded.update_time",
                (
                    job.job_id,
                    owner.migration_id,
                    owner.domain_uuid,
                    job_pb2.Job.State.Name(job.state),
                    json_format.MessageToJson(job, indent=None),
                    stamp,
                    stamp,
                ),
            )

    def ids_of(self, migration_id: str) -> list[str]:
        """Ids of the jobs of a move."""
        with self._state.transaction() as tx:
            rows = tx.execute(
                "SELECT job_id FROM job WHERE migration_id=? ORDER BY create_time, job_id",
                (migration_id,),
            ).fetchall()
        return [row["job_id"] for row in rows]

    def drop(self, migration_id: str) -> None:
        """Forget the jobs of a move."""
        with self._state.transaction() as tx:
            tx.execute("DELETE FROM job WHERE migration_id=?", (migration_id,))


class JobBoard:
    """What is told about jobs: the stored state with live progress over it.

    Lives on the event loop.

    Args:
        store: The jobs on disk.
    """

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._live: dict[str, job_pb2.Job] = {}
        self._changed = asyncio.Condition()

    async def show(self, job: job_pb2.Job) -> None:
        """Tell watchers of a new snapshot. A final one must be on disk already."""
        async with self._changed:
            if job.state == RUNNING:
                self._live[job.job_id] = job
            else:
                self._live.pop(job.job_id, None)
            self._changed.notify_all()

    async def get(self, job_id: str) -> job_pb2.Job:
        """The job now.

        Raises:
            DroverError: JOB_NOT_FOUND.
        """
        live = self._live.get(job_id)
        if live is not None:
            return live
        found = await asyncio.to_thread(self._store.get, job_id)
        if found is None:
            raise DroverError(
                Reason.JOB_NOT_FOUND,
                f"Job {job_id} was never started on this host.",
                subject=f"jobs/{job_id}",
            )
        # It may have started while the file was read.
        return self._live.get(job_id, found[0])

    async def watch(self, job_id: str) -> AsyncIterator[job_pb2.Job]:
        """The job now, then each change, until it is no longer RUNNING.

        Raises:
            DroverError: JOB_NOT_FOUND.
        """
        shown = await self.get(job_id)
        yield shown
        while shown.state == RUNNING:
            async with self._changed:
                while self._live.get(job_id) is shown:
                    await self._changed.wait()
            latest = await self.get(job_id)
            if latest != shown:
                yield latest
            shown = latest
