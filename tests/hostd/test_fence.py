"""The fence: nothing older than the newest owner, not even after a restart."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.fence import FenceStore
from hostd.state import StateError, StateFile
from hostd.v1 import fence_pb2

DOMAIN = str(uuid.UUID(int=1))


def fence(saga_seq: int, generation: int, domain_uuid: str = DOMAIN) -> fence_pb2.Fence:
    return fence_pb2.Fence(
        domain_uuid=domain_uuid,
        migration_id=str(uuid.UUID(int=2)),
        saga_id=str(uuid.UUID(int=3)),
        saga_seq=saga_seq,
        generation=generation,
        step="park",
    )


def admitted(store: FenceStore, token: tuple[int, int]) -> bool:
    try:
        store.admit(fence(*token))
    except DroverError as error:
        if error.reason is Reason.STALE_GENERATION:
            return False
        raise
    return True


def test_a_lower_token_is_refused_after_a_restart(tmp_path: Path) -> None:
    state = StateFile(tmp_path)
    FenceStore(state).admit(fence(7, 3))
    state.close()
    state = StateFile(tmp_path)
    store = FenceStore(state)
    with pytest.raises(DroverError) as refused:
        store.admit(fence(7, 2))
    assert refused.value.reason is Reason.STALE_GENERATION
    assert refused.value.metadata["owner_generation"] == "3"
    store.admit(fence(7, 3))
    store.admit(fence(8, 1))
    with pytest.raises(DroverError):
        store.admit(fence(7, 99))
    state.close()


def test_machines_do_not_share_a_fence(tmp_path: Path) -> None:
    state = StateFile(tmp_path)
    store = FenceStore(state)
    store.admit(fence(9, 9))
    store.admit(fence(1, 1, str(uuid.UUID(int=77))))
    assert store.highest(DOMAIN) == (9, 9)
    state.close()


tokens = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(st.lists(tokens, min_size=1, max_size=12))
def test_admitted_tokens_never_go_back(
    tmp_path_factory: pytest.TempPathFactory, calls: list[tuple[int, int]]
) -> None:
    state = StateFile(tmp_path_factory.mktemp("fence"))
    store = FenceStore(state)
    highest = (0, 0)
    for token in calls:
        assert admitted(store, token) == (token >= highest)
        highest = max(highest, token)
        assert store.highest(DOMAIN) == highest
    state.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("domain_uuid", "../../etc/passwd"),
        ("domain_uuid", DOMAIN.replace("-", "")),
        ("migration_id", ""),
        ("migration_id", "ABCDEF00-0000-0000-0000-000000000000"),
        ("saga_id", "x"),
        ("saga_seq", 0),
        ("saga_seq", 2**63),
        ("generation", 0),
        ("step", ""),
    ],
)
def test_incomplete_fences_are_refused(tmp_path: Path, field: str, value: str | int) -> None:
    state = StateFile(tmp_path)
    bad = fence(1, 1)
    setattr(bad, field, value)
    with pytest.raises(DroverError) as refused:
        FenceStore(state).admit(bad)
    assert refused.value.reason is Reason.INVALID_FIELD
    assert refused.value.subject == f"fence.{field}"
    assert FenceStore(state).highest(DOMAIN) == (0, 0)
    state.close()


def test_a_second_hostd_on_the_same_state_refuses_to_start(tmp_path: Path) -> None:
    state = StateFile(tmp_path)
    with pytest.raises(StateError, match="Another drover-hostd"):
        StateFile(tmp_path)
    state.close()
    StateFile(tmp_path).close()


def test_the_state_of_a_newer_hostd_is_left_alone(tmp_path: Path) -> None:
    state = StateFile(tmp_path)
    with state.transaction() as tx:
        tx.execute("CREATE TABLE future (x INTEGER)")
    state._connection.execute("PRAGMA user_version=99")
    state.close()
    with pytest.raises(StateError, match="schema version 99"):
        StateFile(tmp_path)
