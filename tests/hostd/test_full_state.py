"""hostd's own state where no block is free: the way back needs none, and the rest is named."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from controlplane.common.reasons import Reason
from hostd.fence import FenceStore
from hostd.records import Records, SourcePhase, SourceRecord, StopRecord, StopState
from hostd.state import StateError, StateFile
from hostd.v1 import domain_pb2, fence_pb2
from hostd.v1 import host_service_pb2 as pb
from tests.hostd.small_filesystem import filled, small_filesystem

pytestmark = pytest.mark.lab

DOMAIN = "11111111-2222-4333-8444-000000000001"
MIGRATION = "11111111-2222-4333-8444-000000000002"


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A state directory with a small file system of its own."""
    with small_filesystem(tmp_path / "state", tmp_path / "state.img") as mounted:
        yield mounted


def fence(generation: int) -> fence_pb2.Fence:
    return fence_pb2.Fence(
        domain_uuid=DOMAIN, migration_id=MIGRATION, saga_id=MIGRATION, saga_seq=1,
        generation=generation, step="x",
    )  # fmt: skip


def go_back(state: StateFile, generation: int) -> None:
    """What hostd writes while a machine is put back and started."""
    records = Records(state)
    FenceStore(state).admit(fence(generation))
    records.put_source(SourceRecord(MIGRATION, DOMAIN, SourcePhase.UNPARKING))
    records.drop_source(MIGRATION)
    records.put_stop(
        StopRecord(
            MIGRATION, DOMAIN, MIGRATION, domain_pb2.POWER_STATE_RUNNING,
            pb.EnsureStoppedRequest.MODE_GRACEFUL, 1.0, 1.0, 1.0, StopState.GUARDED,
        )
    )  # fmt: skip
    records.drop_stop(MIGRATION)


def use_up_the_room(state: StateFile) -> None:
    """Write large records until the disk takes no more."""
    large = pb.EnsureParkedResponse(manifest_path="x" * 5000)
    for number in range(10_000):
        record = SourceRecord(str(number), DOMAIN, SourcePhase.PARKED, large)
        Records(state).put_source(record)


def test_a_machine_is_put_back_while_the_state_is_full(directory: Path) -> None:
    state = StateFile(directory)
    Records(state).put_source(SourceRecord(MIGRATION, DOMAIN, SourcePhase.PARKED))
    with filled(directory):
        for generation in range(1, 200):
            go_back(state, generation)
        assert FenceStore(state).highest(DOMAIN) == (1, 199)
    state.close()


def test_hostd_starts_again_while_the_state_is_full(directory: Path) -> None:
    StateFile(directory).close()
    with filled(directory):
        state = StateFile(directory)
        go_back(state, 1)
        state.close()
        state = StateFile(directory)
        assert FenceStore(state).highest(DOMAIN) == (1, 1)
        state.close()


def test_room_is_made_after_a_start_that_died_while_it_made_some(directory: Path) -> None:
    StateFile(directory).close()
    with closing(sqlite3.connect(directory / "hostd.db", isolation_level=None)) as died:
        died.execute("CREATE TABLE room (page BLOB)")
        died.execute("VACUUM")
    StateFile(directory).close()
    with closing(sqlite3.connect(directory / "hostd.db")) as found:
        (free_pages,) = found.execute("PRAGMA freelist_count").fetchone()
    assert free_pages >= 64


def test_a_state_that_takes_no_more_says_so_and_loses_nothing(directory: Path) -> None:
    state = StateFile(directory)
    records = Records(state)
    with filled(directory):
        with pytest.raises(sqlite3.OperationalError) as full:
            use_up_the_room(state)
        told = state.trouble(full.value)
        assert told is not None
        assert told.reason is Reason.HOST_DISK_FULL
        assert str(directory) in told.message
        kept = len(records.sources_of(DOMAIN))
    # What is written later is durable, not part of the transaction that failed.
    records.put_source(SourceRecord("later", DOMAIN, SourcePhase.PARKED))
    state.close()
    state = StateFile(directory)
    assert len(Records(state).sources_of(DOMAIN)) == kept + 1
    state.close()


def test_the_state_of_a_hostd_that_kept_a_write_ahead_log_is_taken_over(tmp_path: Path) -> None:
    StateFile(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "hostd.db", isolation_level=None)) as before:
        before.execute("PRAGMA journal_mode=WAL")
        before.execute(
            "INSERT INTO fence VALUES (?, 7, 3, ?, ?, 0)", (DOMAIN, MIGRATION, MIGRATION)
        )
        # As after a kill: the log holds what the file does not yet.
        assert (tmp_path / "hostd.db-wal").stat().st_size > 0
        for name in ("hostd.db", "hostd.db-wal"):
            (tmp_path / "killed").mkdir(exist_ok=True)
            shutil.copy(tmp_path / name, tmp_path / "killed" / name)
    state = StateFile(tmp_path / "killed")
    assert FenceStore(state).highest(DOMAIN) == (7, 3)
    state.close()
    assert not (tmp_path / "killed/hostd.db-wal").exists()
    assert (tmp_path / "killed/hostd.db-journal").exists()


def test_a_new_state_without_room_is_refused_in_words(directory: Path) -> None:
    with filled(directory), pytest.raises(StateError, match="full"):
        StateFile(directory)
