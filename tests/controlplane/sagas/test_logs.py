"""Stored logs: a later release reads what this one has written, payloads and all.

One that no longer replays strands every move that was under way when the control
plane was upgraded. So the files in `logs/` are never changed: when a definition
changes what it writes, its version is raised, the old definition stays, and
another file is added, by

    python -m tests.controlplane.sagas.test_logs
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from controlplane.saga.definition import Saga, decode
from controlplane.saga.log import Event, EventKind, SagaView, fold
from controlplane.saga.plan import plan
from controlplane.sagas import ALL
from controlplane.store.engine import Database
from controlplane.store.upgrade import upgrade
from tests.controlplane.sagas.worlds import ConfirmWorld, MoveWorld, RevertWorld
from tests.engine.harness import conduct, failing, with_step

LOGS = Path(__file__).parent / "logs"


def failed_move() -> MoveWorld:
    """A move whose guest does not start on the target."""
    world = MoveWorld()
    world.saga = with_step(world.saga, "start", failing)
    return world


WORLDS: dict[str, Callable[[], MoveWorld]] = {
    "move-done": MoveWorld,
    "move-failed": failed_move,
    "confirm-done": ConfirmWorld,
    "revert-done": RevertWorld,
}


def record(saga: Saga, view: SagaView) -> dict[str, Any]:
    """A saga's log with what the planner says after each of its events."""
    plans = []
    for length in range(len(view.events) + 1):
        following = plan(saga, fold(view.events[:length]), cancel_requested=False)
        plans.append([following.verb.value, following.step.name if following.step else ""])
    return {
        "kind": view.kind,
        "version": view.version,
        "params": view.params,
        "events": [
            {"kind": e.kind.value, "step": e.step, "output": e.output, "error": e.error}
            for e in view.events
        ],
        "plans": plans,
    }


def shape(value: Any) -> Any:
    """Names and types, without the values that differ from run to run."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value]
    return type(value).__name__


def test_there_is_a_log_of_every_present_definition() -> None:
    stored = {path.stem for path in LOGS.glob("*.json")}
    present = {saga.kind: saga.version for saga in ALL}
    assert {_stem(name, present[name.partition("-")[0]]) for name in WORLDS} <= stored


@pytest.mark.parametrize("path", sorted(LOGS.glob("*.json")), ids=lambda path: path.stem)
def test_stored_logs_replay(path: Path) -> None:
    stored = json.loads(path.read_text())
    saga = next(s for s in ALL if (s.kind, s.version) == (stored["kind"], stored["version"]))
    decode(stored["params"], saga.params)
    events = [
        Event(
            seq=n, kind=EventKind(e["kind"]), step=e["step"], output=e["output"], error=e["error"]
        )
        for n, e in enumerate(stored["events"], 1)
    ]
    for length, expected in enumerate(stored["plans"]):
        following = plan(saga, fold(events[:length]), cancel_requested=False)
        assert [following.verb.value, following.step.name if following.step else ""] == expected
    for event in events:
        if event.kind is EventKind.SUCCEEDED:
            kind = saga.step(event.step).output
            if kind is None:
                assert event.output is None
            else:
                decode(event.output, kind)


@pytest.mark.parametrize("name", WORLDS)
async def test_what_is_written_today_is_what_is_stored(database: Database, name: str) -> None:
    world = WORLDS[name]()
    written = record(world.saga, await conduct(database, world))
    stored = json.loads((LOGS / f"{_stem(name, written['version'])}.json").read_text())
    assert written["plans"] == stored["plans"]
    assert shape(written) == shape(stored)


def _stem(name: str, version: int) -> str:
    kind, _, ending = name.partition("-")
    return f"{kind}-{version}-{ending}"


async def _write() -> None:
    for name, make_world in WORLDS.items():
        with tempfile.TemporaryDirectory() as folder:
            database = Database(f"sqlite:///{folder}/controlplane.db")
            upgrade(database)
            world = make_world()
            written = record(world.saga, await conduct(database, world))
            database.close()
        path = LOGS / f"{_stem(name, written['version'])}.json"
        if not path.exists():
            path.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    asyncio.run(_write())
