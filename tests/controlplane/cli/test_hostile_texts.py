"""Names and messages come from hosts and guests; none of them acts on the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from controlplane.cli.output import visible
from controlplane.cli.progress import BarReporter, PlainReporter
from controlplane.common.errors import DroverError, Violation
from controlplane.common.reasons import Reason
from controlplane.v1.migration_pb2 import Migration
from tests.controlplane.cli.recorded import MOVE, UID, RecordedApi, make_instance, make_move

# Clears the screen, sets the title, hides what follows, writes backwards.
HOSTILE = "web\x1b[2J\x1b]0;x\x07\x9b8m\u202e1"
SHOWN = r"web\x1b[2J\x1b]0;x\x07\x9b8m\u202e1"


def test_what_acts_on_a_terminal_is_spelt_out() -> None:
    assert visible(HOSTILE) == SHOWN
    assert visible("zwei\nZeilen mit Ümlaut, 表") == "zwei\nZeilen mit Ümlaut, 表"


@pytest.mark.parametrize(
    "arguments", [("instance", "list"), ("instance", "show", UID), ("migration", "list"),
                  ("migration", "show", MOVE)],
)  # fmt: skip
async def test_no_table_and_no_page_acts_on_the_terminal(
    api: RecordedApi, arguments: tuple[str, ...]
) -> None:
    api.script.instances = [make_instance(HOSTILE)]
    move = make_move(Migration.STATE_STUCK, instance_display_name=HOSTILE)
    move.error.message = HOSTILE
    move.placement.verdicts[1].message = HOSTILE
    api.script.moves = [move]
    result = await api.run(*arguments)
    for text in (result.stdout, result.stderr):
        assert all(c.isprintable() or c == "\n" for c in text)
    assert SHOWN in result.stdout + result.stderr


async def test_no_error_acts_on_the_terminal(api: RecordedApi) -> None:
    api.script.refusals["ListHosts"] = DroverError(
        Reason.BUILD_FAILED, HOSTILE, violations=[Violation("hosts/b", HOSTILE, "X")]
    )
    result = await api.run("host", "list")
    assert SHOWN in result.stderr
    assert all(c.isprintable() or c == "\n" for c in result.stderr)


@pytest.mark.parametrize("name", [HOSTILE, "web[/x]1", "[bold]web1", "[link=x]"])
def test_no_progress_acts_on_the_terminal(name: str) -> None:
    move = make_move(Migration.STATE_COPYING, instance_display_name=name)
    plain = io.StringIO()
    PlainReporter(plain).update(move)
    assert visible(name) in plain.getvalue()
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=200, highlight=False)
    with BarReporter(console) as reporter:
        reporter.update(move)
        reporter.note(name)
    assert visible(name) in terminal.getvalue()
    assert "\x9b" not in terminal.getvalue()


async def test_no_sentence_acts_on_the_terminal(api: RecordedApi) -> None:
    api.script.instances = [make_instance(HOSTILE)]
    api.script.moves = [make_move(Migration.STATE_AWAITING_CONFIRM, instance_display_name=HOSTILE)]
    for arguments in (
        ("migration", "revert", MOVE),
        ("instance", "release", UID),
        ("migrate", UID, "--dry-run"),
        ("migrate", UID, "--no-wait"),
    ):
        result = await api.run(*arguments)
        assert SHOWN in result.stdout + result.stderr, arguments
        assert all(c.isprintable() or c == "\n" for c in result.stdout + result.stderr)
