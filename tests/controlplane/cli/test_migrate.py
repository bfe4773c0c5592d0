"""`drover migrate`: what is asked for, what is shown, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal

import pytest

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.v1.migration_pb2 import Migration, MigrationOptions
from hostd.v1.job_pb2 import CopyProgress
from tests.controlplane.cli.recorded import MOVE, RecordedApi, make_move

COPYING = make_move(
    Migration.STATE_COPYING,
    step="copy",
    progress=CopyProgress(
        done_bytes=2 << 30,
        total_bytes=5 << 30,
        rate_bytes_per_second=300 << 20,
        eta_seconds=10.5,
    ),
)
MOVED = make_move(Migration.STATE_AWAITING_CONFIRM, throughput_bytes_per_second=300 << 20)
MOVED.downtime.FromMilliseconds(12_300)


async def test_dry_run_prints_the_verdicts_and_asks_to_change_nothing(api: RecordedApi) -> None:
    api.script.moves = [make_move(Migration.STATE_PENDING)]

    result = await api.run("migrate", "web1", "--dry-run")

    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["HOST", "VERDICT", "WEIGHT", "WHY"]
    assert lines[1].split()[:3] == ["b", "chosen", "1.50"]
    assert "TARGET_LACKS_SPACE: Root images has 2 GiB free" in lines[2]
    assert "Target b: Most free memory." in result.stdout
    (request,) = api.script.requests("CreateMigration")
    assert request.validate_only
    assert request.instance == "instances/web1"
    assert api.script.requests("WatchMigration") == []


async def test_dry_run_as_json_is_the_move(api: RecordedApi) -> None:
    api.script.moves = [make_move(Migration.STATE_PENDING)]

    result = await api.run("migrate", "web1", "--dry-run", "-o", "json")

    assert json.loads(result.stdout)["placement"]["chosenHost"] == "hosts/b"


async def test_every_option_reaches_the_request(api: RecordedApi) -> None:
    api.script.moves = [make_move(Migration.STATE_PENDING)]

    result = await api.run(
        *("migrate", "web1", "--no-wait", "--host", "b", "--flavor", "big"),
        *("--confirm", "30m", "--shutdown", "graceful", "--shutdown-timeout", "90s"),
        *("--limit", "100M", "--request-id", "9b2d7a44-6c1f-4b6e-8f0a-1f2e3d4c5b6a"),
    )

    assert result.exit_code == 0
    assert result.stdout == f"{MOVE}\n"
    (request,) = api.script.requests("CreateMigration")
    assert (request.host, request.flavor) == ("hosts/b", "flavors/big")
    assert request.request_id == "9b2d7a44-6c1f-4b6e-8f0a-1f2e3d4c5b6a"
    options = request.options
    assert options.confirm_policy == MigrationOptions.CONFIRM_POLICY_AFTER
    assert options.confirm_after.seconds == 1800
    assert options.shutdown_mode == MigrationOptions.SHUTDOWN_MODE_GRACEFUL
    assert options.shutdown_timeout.seconds == 90
    assert options.bandwidth_limit_bytes_per_second == 100_000_000


async def test_left_out_options_stay_the_fleets(api: RecordedApi) -> None:
    api.script.moves = [make_move(Migration.STATE_PENDING)]

    await api.run("migrate", "web1", "--no-wait")

    (request,) = api.script.requests("CreateMigration")
    assert request.options == MigrationOptions()
    assert request.request_id


@pytest.mark.parametrize(
    "arguments",
    [
        ("--confirm", "maybe"),
        ("--confirm", "999999999d"),
        ("--limit", "fast"),
        ("--limit", "9999999999999P"),
        ("--shutdown-timeout", "soon"),
        ("--request-id", "again"),
        ("--bogus",),
    ],
)
async def test_wrong_values_are_wrong_usage_and_ask_nothing(
    api: RecordedApi, arguments: tuple[str, ...]
) -> None:
    result = await api.run("migrate", "web1", *arguments)

    assert result.exit_code == 2
    assert api.script.asked == []


async def test_wait_shows_plain_lines_on_stderr_and_the_result_on_stdout(api: RecordedApi) -> None:
    api.script.moves = [make_move(Migration.STATE_PENDING)]
    api.script.streams = [[make_move(Migration.STATE_PENDING), COPYING, COPYING, MOVED]]

    result = await api.run("migrate", "web1")

    assert result.exit_code == 0
    assert "web1 moved from a to b (downtime 12.3 s, copied at 300.0 MiB/s)." in result.stdout
    assert f"drover migration confirm {MOVE}" in result.stdout
    assert "Target b: Most free memory." in result.stderr
    copy_lines = [line for line in result.stderr.splitlines() if "COPYING" in line]
    assert len(copy_lines) == 1  # the second says nothing new and comes too soon
    assert "2.0 GiB of 5.0 GiB (40 %), 300.0 MiB/s, 10 s left" in copy_lines[0]
    assert "\x1b" not in result.stderr


async def test_warnings_are_said_once_each_as_they_come(api: RecordedApi) -> None:
    begun, parked = make_move(Migration.STATE_PENDING), make_move(Migration.STATE_COPYING)
    begun.placement.warnings.append("hosts/b: Its disks can grow.")
    parked.placement.warnings.extend([*begun.placement.warnings, "hosts/a: vda was not closed."])
    api.script.moves = [begun]
    api.script.streams = [[begun, parked, parked, MOVED]]

    result = await api.run("migrate", "web1")

    assert result.exit_code == 0
    said = [line for line in result.stderr.splitlines() if "Warning" in line]
    assert said[0] == "Warning: hosts/b: Its disks can grow."
    assert [line.endswith("Warning: hosts/a: vda was not closed.") for line in said] == [
        False,
        True,
    ]
    assert "Warning" not in result.stdout


async def test_a_dry_run_and_show_tell_of_warnings(api: RecordedApi) -> None:
    move = make_move(Migration.STATE_PENDING)
    move.placement.warnings.append("hosts/b: Its disks can grow.")
    api.script.moves = [move]

    plan = await api.run("migrate", "web1", "--dry-run")
    shown = await api.run("migration", "show", MOVE)

    assert "Warning: hosts/b: Its disks can grow." in plan.stdout
    assert shown.stdout.count("hosts/b: Its disks can grow.") == 1


async def test_automatic_confirm_is_waited_for(api: RecordedApi) -> None:
    api.script.moves = [make_move(Migration.STATE_PENDING)]
    api.script.streams = [
        [MOVED, make_move(Migration.STATE_CONFIRMING), make_move(Migration.STATE_CONFIRMED)]
    ]

    result = await api.run("migrate", "web1", "--confirm", "auto")

    assert result.exit_code == 0
    assert "web1 lives on b alone. The copy on a is deleted." in result.stdout
    assert api.script.requests("WatchMigration")[0].until_final


async def test_automatic_confirm_that_fails_ends_the_wait(api: RecordedApi) -> None:
    cause = DroverError(Reason.DISK_MISSING, "b does not have all of web1.").to_status()
    api.script.moves = [make_move(Migration.STATE_PENDING)]
    waiting = make_move(Migration.STATE_AWAITING_CONFIRM, error=cause)
    api.script.streams = [[MOVED, make_move(Migration.STATE_CONFIRMING), waiting, None]]

    result = await api.run("migrate", "web1", "--confirm", "auto")

    assert result.exit_code == 1
    assert "DISK_MISSING" in result.stderr


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (Migration.STATE_FAILED, "failed; web1 is on a as it was"),
        (Migration.STATE_CANCELLED, "was cancelled; web1 is on a as it was"),
        (Migration.STATE_STUCK, "is stuck at step park"),
    ],
)
async def test_move_that_ends_badly_exits_1_with_the_reason(
    api: RecordedApi, state: Migration.State.ValueType, words: str
) -> None:
    cause = DroverError(Reason.SHUTDOWN_TIMEOUT, "web1 did not stop within 60 s.").to_status()
    api.script.moves = [make_move(Migration.STATE_PENDING)]
    api.script.streams = [[make_move(state, step="park", error=cause)]]

    result = await api.run("migrate", "web1")

    assert result.exit_code == 1
    assert result.stdout == ""
    assert words in result.stderr
    assert "SHUTDOWN_TIMEOUT: web1 did not stop within 60 s." in result.stderr


async def test_json_of_a_failed_move_is_printed_too(api: RecordedApi) -> None:
    api.script.moves = [make_move(Migration.STATE_PENDING)]
    api.script.streams = [[make_move(Migration.STATE_FAILED)]]

    result = await api.run("migrate", "web1", "-o", "json")

    assert result.exit_code == 1
    assert json.loads(result.stdout)["state"] == "STATE_FAILED"


async def test_retries_of_a_step_are_told(api: RecordedApi) -> None:
    cause = DroverError(Reason.HOST_UNREACHABLE, "hosts/b does not answer.").to_status()
    api.script.moves = [make_move(Migration.STATE_PENDING)]
    retried = make_move(Migration.STATE_PREPARING, step="prepare_target", attempt=3, error=cause)
    api.script.streams = [[retried, MOVED]]

    result = await api.run("migrate", "web1")

    assert "attempt 3, trying again after HOST_UNREACHABLE" in result.stderr


async def test_watch_survives_a_restart_of_the_server(api: RecordedApi) -> None:
    """The server goes away for real, and comes back on the same port."""
    api.script.moves = [make_move(Migration.STATE_PENDING)]
    api.script.streams = [[COPYING, None], [COPYING, MOVED]]

    running = asyncio.create_task(api.run("migrate", "web1"))
    async with asyncio.timeout(60):
        while not api.script.requests("WatchMigration"):  # noqa: ASYNC110 a bounded wait
            await asyncio.sleep(0.02)
    await api.stop()
    await asyncio.sleep(1)  # long enough for several refused connections
    await api.start()
    result = await running

    assert result.exit_code == 0
    assert result.stderr.count("The control plane is away") == 1
    assert result.stderr.count("The control plane is back") == 1
    assert "web1 moved from a to b" in result.stdout


async def test_stream_that_ends_early_is_opened_again(api: RecordedApi) -> None:
    api.script.moves = [make_move(Migration.STATE_PENDING)]
    api.script.streams = [
        [COPYING],
        [DroverError(Reason.SHUTTING_DOWN, "Shutting down.")],
        [MOVED],
    ]

    result = await api.run("migrate", "web1")

    assert result.exit_code == 0
    assert len(api.script.requests("WatchMigration")) == 3


async def test_refused_watch_ends_the_command(api: RecordedApi) -> None:
    api.script.moves = [make_move(Migration.STATE_PENDING)]
    api.script.refusals["WatchMigration"] = DroverError(Reason.MIGRATION_NOT_FOUND, "Gone.")

    assert (await api.run("migrate", "web1")).exit_code == 3


async def test_ctrl_c_stops_watching_and_not_the_move(api: RecordedApi) -> None:
    api.script.moves = [make_move(Migration.STATE_PENDING)]
    api.script.streams = [[COPYING, None]]

    process = await api.spawn("migrate", "web1")
    assert process.stderr is not None
    async with asyncio.timeout(60):
        while b"COPYING" not in await process.stderr.readline():
            pass
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), 20)

    assert process.returncode == 130
    assert "Stopped watching. The move goes on." in err.decode()
    assert f"drover migration watch {MOVE}" in err.decode()
    assert api.script.requests("CancelMigration") == []


async def test_what_cannot_be_cancelled_is_not_offered_a_cancel(api: RecordedApi) -> None:
    confirming = make_move(Migration.STATE_CONFIRMING)
    api.script.moves = [MOVED]
    api.script.streams = [[confirming, None]]

    process = await api.spawn("migration", "confirm", MOVE)
    assert process.stderr is not None
    async with asyncio.timeout(60):
        while b"CONFIRMING" not in await process.stderr.readline():
            pass
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), 20)

    assert process.returncode == 130
    assert f"drover migration watch {MOVE}" in err.decode()
    assert "cancel" not in err.decode()


async def test_terminal_gets_a_live_bar(api: RecordedApi) -> None:
    api.script.moves = [make_move(Migration.STATE_PENDING)]
    api.script.streams = [[COPYING, 1.0, MOVED]]
    leader, follower = pty.openpty()
    environment = {**api.environment, "TERM": "xterm", "COLUMNS": "160"}
    environment.pop("NO_COLOR")

    process = await api.spawn("migrate", "web1", stderr=follower, env=environment)
    os.close(follower)
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    seen = await asyncio.to_thread(drain, leader)

    assert process.returncode == 0
    assert "web1 moved from a to b" in out.decode()
    assert b"\x1b" not in out
    assert "2.0 GiB of 5.0 GiB (40 %), 300.0 MiB/s, 10 s left" in seen
    assert "━" in seen
    assert "[copy]" in seen


def drain(descriptor: int) -> str:
    """Everything that was written to a terminal whose other end is closed."""
    parts = []
    try:
        while part := os.read(descriptor, 65536):
            parts.append(part)
    except OSError:
        pass  # Linux says EIO once the other end is closed
    os.close(descriptor)
    return b"".join(parts).decode(errors="replace")
