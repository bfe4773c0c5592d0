"""Copies take turns, and heed the limit that they were told last."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from controlplane.common.rpc import TlsPaths
from diskmover import IncomingVolume, OutgoingVolume, Receiver, TlsFiles
from diskmover.certs import issue, open_authority
from diskmover.model import uri_of
from hostd.copies import QUEUED, Copies, CopyOrder
from hostd.jobs import SUCCEEDED, JobBoard, JobOwner, JobStore
from hostd.state import StateFile
from hostd.v1 import job_pb2

SIZE = 6 << 20
SLOW = 1 << 20
_PATIENCE_SECONDS = 60.0


@dataclass
class Port:
    """A target for copies, and the source's copies, of which one sends at a time."""

    copies: Copies
    board: JobBoard
    receiver: Receiver
    folder: Path

    def order(self, name: str, limit: int) -> CopyOrder:
        """Open a session for a file of noise, and ask for its copy."""
        source = self.folder / name
        source.write_bytes(secrets.token_bytes(SIZE))
        key = self.open(name)
        return CopyOrder(
            job_id=name,
            owner=JobOwner(name, "d"),
            key=key,
            to=self.receiver.address,
            receiver=uri_of("target"),
            volumes=[OutgoingVolume("vda", source)],
            total_bytes=SIZE,
            connections=1,
            limit_bytes_per_second=limit,
        )

    def reopened(self, order: CopyOrder) -> CopyOrder:
        """The order under a new key, for which the session was opened anew; no limit."""
        key = self.open(order.job_id)
        return dataclasses.replace(order, key=key, limit_bytes_per_second=0)

    def open(self, name: str) -> bytes:
        """Open the session of a copy; returns its key."""
        key = secrets.token_bytes(32)
        incoming = IncomingVolume("vda", self.folder, f"{name}.copy", SIZE)
        self.receiver.open_session(name, key, sender=uri_of("source"), volumes=[incoming], tag=name)
        return key

    async def until(self, name: str, right: Callable[[job_pb2.Job], bool]) -> job_pb2.Job:
        """Wait until a job is as it should be."""
        async with asyncio.timeout(_PATIENCE_SECONDS):
            async for job in self.board.watch(name):
                if right(job):
                    return job
        raise AssertionError(f"{name} ended otherwise: {job}")


@pytest.fixture
async def port(tmp_path: Path) -> AsyncIterator[Port]:
    """Both ends."""
    authority = open_authority(tmp_path)
    source, target = (issue(authority, tmp_path, name) for name in ("source", "target"))
    ca = tmp_path / "ca.pem"
    state = StateFile(tmp_path / "state")
    store = JobStore(state)
    board = JobBoard(store)
    with Receiver("127.0.0.1:0", TlsFiles(*target, ca)) as receiver:
        copies = Copies(store, board, TlsPaths(cert=source[0], key=source[1], ca=ca), 1, "low")
        yield Port(copies, board, receiver, tmp_path)
        await copies.close()
    state.close()


async def test_a_copy_waits_for_its_turn_and_says_so(port: Port) -> None:
    await port.copies.start(port.order("first", SLOW))
    sending = await port.until("first", lambda job: job.progress.done_bytes > 0)
    assert sending.progress.limited_by != QUEUED
    await port.copies.start(port.order("second", 0))
    queued = await port.board.get("second")
    assert (queued.progress.limited_by, queued.progress.total_bytes) == (QUEUED, SIZE)
    await port.copies.set_limit(JobOwner("first", "d"), "first", 0)
    for name in ("first", "second"):
        ended = await port.until(name, lambda job: job.state == SUCCEEDED)
        assert ended.receipts[0].size_bytes == SIZE


async def test_a_limit_is_heeded_by_running_and_waiting_copies(port: Port) -> None:
    await port.copies.start(port.order("first", SLOW))
    slow = await port.until("first", lambda job: job.progress.limited_by == "throttle")
    assert slow.progress.limit_bytes_per_second == SLOW
    await port.copies.start(port.order("second", SLOW))
    told = await port.copies.set_limit(JobOwner("second", "d"), "second", 7)
    assert told.progress.limit_bytes_per_second == 7
    assert (await port.board.get("second")).progress.limit_bytes_per_second == 7
    await port.copies.set_limit(JobOwner("first", "d"), "first", 0)
    await port.until("first", lambda job: job.state == SUCCEEDED)
    crawling = await port.until("second", lambda job: job.progress.limited_by == "throttle")
    assert crawling.progress.limit_bytes_per_second == 7
    await port.copies.set_limit(JobOwner("second", "d"), "second", 0)
    await port.until("second", lambda job: job.state == SUCCEEDED)


async def test_a_copy_that_goes_on_tells_what_was_there_before(port: Port) -> None:
    order = port.order("first", SLOW)
    await port.copies.start(order)
    first = await port.until("first", lambda job: job.progress.done_bytes > 1 << 20)
    assert first.progress.resumed_bytes == 0

    await port.copies.cancel(order.owner, "first")
    await port.copies.start(port.reopened(order))

    ended = await port.until("first", lambda job: job.state == SUCCEEDED)
    assert 0 < ended.progress.resumed_bytes < SIZE
    assert ended.progress.done_bytes == SIZE
