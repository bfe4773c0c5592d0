"""`drover migration`: looking at moves and deciding on them."""

from __future__ import annotations

import json

import pytest

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.v1.migration_pb2 import Migration
from tests.controlplane.cli.recorded import MOVE, UID, RecordedApi, make_instance, make_move

MOVED = make_move(Migration.STATE_AWAITING_CONFIRM)


async def test_list_and_filters(api: RecordedApi) -> None:
    api.script.instances = [make_instance()]
    api.script.moves = [MOVED]

    result = await api.run(
        *("migration", "list", "--instance", "web1", "--host", "b"),
        *("--state", "awaiting_confirm", "--state", "stuck"),
    )

    assert result.stdout.splitlines()[1].split()[:4] == [
        MOVE,
        "web1",
        "migration",
        "AWAITING_CONFIRM",
    ]
    request = api.script.requests("ListMigrations")[-1]
    assert request.instance == f"instances/{UID}"
    assert request.host == "hosts/b"
    assert list(request.states) == [Migration.STATE_AWAITING_CONFIRM, Migration.STATE_STUCK]


@pytest.mark.parametrize("name", [MOVE, MOVE[:4], f"migrations/{MOVE}", "web1"])
async def test_a_move_has_many_names(api: RecordedApi, name: str) -> None:
    api.script.instances = [make_instance(migration=f"migrations/{MOVE}")]
    api.script.moves = [MOVED]

    result = await api.run("migration", "show", name)

    assert result.exit_code == 0, result.stderr
    assert MOVE in result.stdout


async def test_show_tells_what_was_placed_of_each_volume(api: RecordedApi) -> None:
    move = make_move(Migration.STATE_AWAITING_CONFIRM)
    told = {"size_bytes": 5 << 30, "wire_bytes": 1 << 30, "digest": "ab" * 32}
    move.receipts.add(volume_id="vda", allocated_bytes=2 << 30, **told)
    move.receipts.add(volume_id="vdb", **told)
    api.script.moves = [move]

    shown = (await api.run("migration", "show", MOVE)).stdout

    sent = "1.0 GiB sent, digest abababababababab..."
    assert f"vda: 5.0 GiB, 2.0 GiB allocated, {sent}" in shown
    assert f"vdb: 5.0 GiB, {sent}" in shown


async def test_instance_without_a_live_move_stands_for_its_newest(api: RecordedApi) -> None:
    api.script.instances = [make_instance()]
    api.script.moves = [make_move(Migration.STATE_CONFIRMED)]

    assert (await api.run("migration", "show", "web1")).exit_code == 0


async def test_start_of_two_ids_shows_both(api: RecordedApi) -> None:
    other = f"{MOVE[:-1]}2"
    api.script.moves = [MOVED, make_move(Migration.STATE_FAILED, name=f"migrations/{other}")]

    result = await api.run("migration", "confirm", MOVE[:8])

    assert result.exit_code == 2
    assert MOVE in result.stderr
    assert other in result.stderr
    assert api.script.requests("ConfirmMigration") == []


@pytest.mark.parametrize("name", ["nope", "abcd", UID])
async def test_unknown_move_exits_3(api: RecordedApi, name: str) -> None:
    assert (await api.run("migration", "show", name)).exit_code == 3


async def test_revert_says_what_is_lost_and_needs_agreement(api: RecordedApi) -> None:
    api.script.moves = [MOVED]

    result = await api.run("migration", "revert", MOVE)

    assert result.exit_code == 2
    assert "Everything that web1 has written on b since it moved is dropped." in result.stderr
    assert "--yes" in result.stderr
    assert api.script.requests("RevertMigration") == []


async def test_revert_of_what_cannot_be_reverted_asks_nothing(api: RecordedApi) -> None:
    api.script.moves = [make_move(Migration.STATE_CONFIRMED)]
    api.script.refusals["RevertMigration"] = DroverError(Reason.MIGRATION_STATE, "It is over.")

    result = await api.run("migration", "revert", MOVE)

    assert result.exit_code == 4
    assert "dropped" not in result.stderr
    assert "It is over. [MIGRATION_STATE]" in result.stderr


async def test_revert_with_agreement_acts_on_the_move_as_it_was_shown(api: RecordedApi) -> None:
    api.script.moves = [MOVED]
    api.script.streams = [
        [make_move(Migration.STATE_REVERTING), make_move(Migration.STATE_REVERTED)]
    ]

    result = await api.run("migration", "revert", MOVE, "--yes")

    assert result.exit_code == 0
    assert "web1 is back on a, as it was when it was stopped there." in result.stdout
    assert api.script.requests("RevertMigration")[0].etag == "7"


async def test_confirm_waits_until_the_copy_is_gone(api: RecordedApi) -> None:
    api.script.moves = [MOVED]
    api.script.streams = [
        [make_move(Migration.STATE_CONFIRMING), make_move(Migration.STATE_CONFIRMED)]
    ]

    result = await api.run("migration", "confirm", MOVE)

    assert result.exit_code == 0
    assert "The copy on a is deleted." in result.stdout
    assert api.script.requests("WatchMigration")[0].until_final


async def test_confirm_that_gets_stuck_exits_1(api: RecordedApi) -> None:
    api.script.moves = [MOVED]
    api.script.streams = [[make_move(Migration.STATE_STUCK, step="discard_parked")]]

    result = await api.run("migration", "confirm", MOVE)

    assert result.exit_code == 1
    assert "drover migration retry" in result.stderr


@pytest.mark.parametrize(
    ("verb", "state"),
    [("confirm", Migration.STATE_CONFIRMING), ("revert", Migration.STATE_REVERTING)],
)
async def test_decision_that_fails_ends_the_wait(
    api: RecordedApi, verb: str, state: Migration.State.ValueType
) -> None:
    """The server puts the move back to waiting, which must not be waited for again."""
    cause = DroverError(Reason.DISK_MISSING, "b does not have all of web1.").to_status()
    api.script.moves = [MOVED]
    waiting = make_move(Migration.STATE_AWAITING_CONFIRM, error=cause)
    api.script.streams = [[make_move(state), waiting, None]]

    result = await api.run("migration", verb, MOVE, *(["--yes"] if verb == "revert" else []))

    assert result.exit_code == 1
    assert "did not go through" in result.stderr
    assert "DISK_MISSING: b does not have all of web1." in result.stderr


async def test_cancel_that_comes_too_late_exits_4(api: RecordedApi) -> None:
    api.script.moves = [MOVED]
    api.script.refusals["CancelMigration"] = DroverError(Reason.CANCEL_TOO_LATE, "It has moved.")

    result = await api.run("migration", "cancel", MOVE)

    assert result.exit_code == 4
    assert "drover migration revert" in result.stderr


async def test_cancel_waits_until_the_guest_is_back(api: RecordedApi) -> None:
    api.script.moves = [make_move(Migration.STATE_COPYING)]
    api.script.streams = [
        [make_move(Migration.STATE_UNWINDING), make_move(Migration.STATE_CANCELLED)]
    ]

    result = await api.run("migration", "cancel", MOVE)

    assert result.exit_code == 0
    assert "The move of web1 was cancelled; web1 is on a as it was." in result.stdout


@pytest.mark.parametrize(
    ("rate", "sent", "says"),
    [("12.5Mi", 13_107_200, "at most 12.5 MiB/s"), ("none", 0, "as fast as it can")],
)
async def test_limit_changes_a_move_under_way(
    api: RecordedApi, rate: str, sent: int, says: str
) -> None:
    api.script.moves = [make_move(Migration.STATE_COPYING)]

    result = await api.run("migration", "limit", MOVE, rate)

    assert result.exit_code == 0, result.stderr
    assert f"The move of web1 copies {says}." in result.stdout
    (request,) = api.script.requests("LimitMigration")
    assert request.bandwidth_limit_bytes_per_second == sent
    assert (await api.run("migration", "limit", MOVE, "fast")).exit_code == 2


async def test_abandon_needs_comment_and_agreement(api: RecordedApi) -> None:
    api.script.moves = [make_move(Migration.STATE_STUCK)]

    assert (await api.run("migration", "abandon", MOVE)).exit_code == 2
    assert (await api.run("migration", "abandon", MOVE, "--comment", "x")).exit_code == 2
    assert api.script.requests("AbandonMigration") == []


async def test_watch_as_json_is_a_line_a_change(api: RecordedApi) -> None:
    api.script.moves = [MOVED]
    api.script.streams = [[make_move(Migration.STATE_COPYING), MOVED]]

    result = await api.run("migration", "watch", MOVE, "-o", "json")

    states = [json.loads(line)["state"] for line in result.stdout.splitlines()]
    assert states == ["STATE_COPYING", "STATE_AWAITING_CONFIRM"]


async def test_events(api: RecordedApi) -> None:
    api.script.moves = [MOVED]

    result = await api.run("migration", "events", MOVE)

    assert "move  copy  STARTED  Copying." in result.stdout
