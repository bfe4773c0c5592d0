"""Jobs survive a restart, and watchers see every state and the end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.jobs import INTERRUPTED, RUNNING, SUCCEEDED, JobBoard, JobOwner, JobStore
from hostd.state import StateFile
from hostd.v1 import job_pb2

OWNER = JobOwner("m1", "d1")


def test_a_running_job_is_interrupted_by_a_restart_and_keeps_its_birthday(tmp_path: Path) -> None:
    state = StateFile(tmp_path)
    store = JobStore(state)
    store.put(job_pb2.Job(job_id="j1", state=RUNNING), OWNER)
    done = job_pb2.Job(job_id="j2", state=SUCCEEDED)
    done.receipts.add(volume_id="vda", digest="ab" * 32, size_bytes=5)
    store.put(done, OWNER)
    born = store.get("j1")
    assert born is not None
    state.close()

    state = StateFile(tmp_path)
    store = JobStore(state)
    cut = store.get("j1")
    assert cut is not None
    assert cut[0].state == INTERRUPTED
    assert cut[0].create_time == born[0].create_time
    assert cut[1] == OWNER
    kept = store.get("j2")
    assert kept is not None
    assert kept[0].state == SUCCEEDED
    assert kept[0].receipts[0].digest == "ab" * 32
    store.drop("m1")
    assert store.get("j1") is None
    state.close()


async def test_watchers_see_the_present_state_and_every_change(tmp_path: Path) -> None:
    state = StateFile(tmp_path)
    store = JobStore(state)
    board = JobBoard(store)
    job = job_pb2.Job(job_id="j", state=RUNNING)
    store.put(job, OWNER)
    await board.show(job)
    seen: list[job_pb2.Job] = []

    async def watch() -> None:
        seen.extend([snapshot async for snapshot in board.watch("j")])

    watcher = asyncio.create_task(watch())
    half = job_pb2.Job()
    half.CopyFrom(job)
    half.progress.done_bytes = 5
    await asyncio.sleep(0)
    await board.show(half)
    end = job_pb2.Job()
    end.CopyFrom(half)
    end.state = SUCCEEDED
    store.put(end, OWNER)
    await board.show(end)
    await asyncio.wait_for(watcher, 10)
    assert seen[-1].state == SUCCEEDED
    assert [snapshot.state for snapshot in seen[:-1]] == [RUNNING] * (len(seen) - 1)
    state.close()


async def test_an_unknown_job_is_not_found(tmp_path: Path) -> None:
    state = StateFile(tmp_path)
    board = JobBoard(JobStore(state))
    with pytest.raises(DroverError) as missing:
        await board.get("nope")
    assert missing.value.reason is Reason.JOB_NOT_FOUND
    state.close()
