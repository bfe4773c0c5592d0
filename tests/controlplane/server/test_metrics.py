"""The metrics port: what is there from the start, what is counted, what is wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import socket
import sqlite3
import urllib.request
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from controlplane.common.config import ConfigError
from controlplane.domain.states import HostState, MigrationState
from controlplane.saga.definition import Saga
from controlplane.saga.log import Event, EventKind, SagaState, SagaView
from controlplane.saga.runner import Stats
from controlplane.sagas import ALL, MOVE
from controlplane.server.app import App
from controlplane.server.main import read_config
from controlplane.server.metrics import (
    LIVENESS,
    OUTCOMES,
    SCRAPE_SECONDS,
    FleetCollector,
    Metrics,
    _Request,
)
from controlplane.server.ports import PortError
from controlplane.store import hosts
from controlplane.store.engine import Database
from controlplane.store.types import utc_now
from tests.controlplane.machines import NOW, make_facts
from tests.controlplane.sagas.worlds import MoveWorld
from tests.engine import matrix
from tests.engine.harness import failing, running, undo_failing, wait_for_end, with_step

OPERATIONS = Path(__file__).parents[3] / "docs/operations.md"
LABELS = ("saga", "step", "outcome", "state", "liveness")
Samples = dict[tuple[str, tuple[str, ...]], float]


def samples(text: str) -> Samples:
    """Every sample by its name and the values of its labels, in the order of LABELS."""
    return {
        (
            sample.name,
            tuple(sample.labels[label] for label in LABELS if label in sample.labels),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def listening(directory: Path, address: str) -> Path:
    path = directory / "controlplane.toml"
    path.write_text(f'{path.read_text()}\n[metrics]\nlisten = "{address}"\n')
    return path


async def ask(app: App) -> tuple[str, str]:
    def get() -> tuple[str, str]:
        url = f"http://127.0.0.1:{app.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.headers["Content-Type"], answer.read().decode()

    return await asyncio.to_thread(get)


async def scrape(app: App) -> tuple[str, Samples]:
    kind, text = await ask(app)
    return kind, samples(text)


async def labels_of(app: App) -> list[tuple[str, set[str]]]:
    """Every sample's name with the names of its labels."""
    _, text = await ask(app)
    families = text_string_to_metric_families(text)
    return [(s.name, set(s.labels) - {"le"}) for family in families for s in family.samples]


@pytest.fixture
async def app(directory: Path) -> AsyncIterator[App]:
    config = read_config(listening(directory, "127.0.0.1:0"))
    async with App(config, grace_seconds=0.2) as started:
        yield started


async def test_everything_has_its_series_before_anything_happens(app: App) -> None:
    kind, found = await scrape(app)

    assert kind.startswith("text/plain")
    assert found["drover_database_up", ()] == 1
    for saga in ALL:
        assert found["drover_saga_stuck", (saga.kind,)] == 0
        for step in saga.steps:
            assert found["drover_saga_step_seconds_count", (saga.kind, step.name)] == 0
            for outcome in OUTCOMES.values():
                assert found["drover_saga_steps_total", (saga.kind, step.name, outcome)] == 0
    assert {found["drover_migrations", (state.value,)] for state in MigrationState} == {0}
    assert {found["drover_hosts", (liveness,)] for liveness in LIVENESS} == {0}
    names = ("retries_total", "leases_lost_total", "unclaimable")
    assert [found[f"drover_saga_{name}", ()] for name in names] == [0, 0, 0]


async def test_the_page_has_every_metric_with_its_labels(app: App) -> None:
    served = {
        re.sub("_(bucket|sum|count)$", "", name): labels for name, labels in await labels_of(app)
    }
    rows = re.findall(r"^\| `(drover_\w+)` \|([^|]*)\|", OPERATIONS.read_text(), re.MULTILINE)

    assert {name: set(re.findall(r"\w+", labels)) for name, labels in rows} == served


async def test_no_port_unless_asked_for(directory: Path) -> None:
    async with App(read_config(directory / "controlplane.toml"), grace_seconds=0) as app:
        assert app.metrics_port == 0


async def test_the_port_closes_with_the_control_plane(directory: Path) -> None:
    config = read_config(listening(directory, "127.0.0.1:0"))
    async with App(config, grace_seconds=0) as app:
        pass

    with pytest.raises(OSError, match="refused"):
        await scrape(app)


async def test_a_client_that_says_nothing_is_let_go(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _Request.timeout == SCRAPE_SECONDS
    monkeypatch.setattr(_Request, "timeout", 0.1)
    with capture_logs() as told:
        reader, writer = await asyncio.open_connection("127.0.0.1", app.metrics_port)
        assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()
        await writer.wait_closed()

    assert [line for line in told if line["event"] == "metrics not delivered"]


async def test_a_database_that_does_not_answer_leaves_no_old_numbers(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Database, function: Any) -> Any:
        raise OperationalError("SELECT 1", {}, sqlite3.OperationalError("disk I/O error"))

    monkeypatch.setattr(Database, "_run", fail)
    with capture_logs() as told:
        _, found = await scrape(app)
    monkeypatch.undo()

    (line,) = [line for line in told if line["event"] == "metrics without the database"]
    assert line["error"] == "disk I/O error"

    assert found["drover_database_up", ()] == 0
    assert ("drover_saga_stuck", ("move",)) not in found
    assert ("drover_saga_retries_total", ()) in found


async def test_a_move_and_its_steps_are_counted(database: Database) -> None:
    world = MoveWorld()
    metrics = await conduct(database, world, MOVE)

    for step in MOVE.steps:
        assert metrics("steps_total", step.name, "done") == 1
        assert metrics("step_seconds_count", step.name) == 1
        assert metrics("steps_total", step.name, "failed") == 0


async def test_a_failed_step_and_those_undone_for_it_are_counted(database: Database) -> None:
    first, last = matrix.before_pivot(MOVE)[0], matrix.before_pivot(MOVE)[-1]
    metrics = await conduct(database, MoveWorld(), with_step(MOVE, last, failing))

    assert metrics("steps_total", last, "failed") == 1
    assert metrics("step_seconds_count", last) == 0
    assert metrics("steps_total", first, "done") == 1
    assert metrics("steps_total", first, "undone") == 1


async def test_a_stuck_saga_and_its_undo_are_counted(database: Database) -> None:
    first, last = matrix.before_pivot(MOVE)[0], matrix.before_pivot(MOVE)[-1]
    saga = with_step(with_step(MOVE, last, failing), first, undo_failing)
    metrics = await conduct(database, MoveWorld(), saga)

    assert metrics("steps_total", first, "undo_failed") == 1
    assert metrics("stuck") == 1
    assert metrics.found["drover_migrations", ("STUCK",)] == 1
    assert metrics.found["drover_hosts", ("alive",)] == 3


async def test_hosts_are_told_apart_by_liveness(database: Database) -> None:
    def work(tx: Connection) -> None:
        for name, state in (
            ("new", HostState.JOINING),
            ("alive", HostState.ENABLED),
            ("silent", HostState.DISABLED),
            ("gone", HostState.GONE),
        ):
            hosts.create(tx, name, adopt_domains=True)
            hosts.update(tx, name, state=state)
        hosts.record_report(tx, "alive", make_facts("alive"), utc_now())
        hosts.record_report(tx, "silent", make_facts("silent"), utc_now() - timedelta(hours=1))

    await database.run(work)
    found = await collected(database, Metrics(ALL), Stats())

    assert {liveness: found["drover_hosts", (liveness,)] for liveness in LIVENESS} == {
        "alive": 1,
        "dead": 1,
        "joining": 1,
        "gone": 1,
    }


def test_a_step_takes_as_long_as_the_log_says_since_its_last_start() -> None:
    name = MOVE.steps[0].name
    times = ((EventKind.STARTED, 0), (EventKind.STARTED, 100), (EventKind.SUCCEEDED, 130))
    events = tuple(
        Event(seq, kind, name, time=NOW + timedelta(seconds=after))
        for seq, (kind, after) in enumerate(times, 1)
    )
    metrics = Metrics(ALL)

    metrics.count(view_of(MOVE, events))

    assert metrics.registry.get_sample_value(
        "drover_saga_step_seconds_sum", {"saga": MOVE.kind, "step": name}
    ) == pytest.approx(30)


@pytest.mark.parametrize("address", ["9440", "127.0.0.1:99999", "127.0.0.1:port", ":9440"])
def test_a_wrong_address_is_refused_with_its_place(directory: Path, address: str) -> None:
    path = listening(directory, address)

    with pytest.raises(ConfigError, match=r"metrics\W*listen") as caught:
        read_config(path)

    assert str(path) in str(caught.value)


async def test_a_taken_port_is_named(directory: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = read_config(listening(directory, address))
        with pytest.raises(PortError, match=rf"\[metrics\] listen: {address} cannot be opened"):
            await App(config).start()


# --- how the numbers of a saga come about --------------------------------------


@dataclasses.dataclass(frozen=True)
class Counted:
    """Samples of the subsystem "saga" for moves."""

    found: Samples

    def __call__(self, name: str, *labels: str) -> float:
        return self.found[f"drover_saga_{name}", ("move", *labels)]


async def conduct(database: Database, world: MoveWorld, saga: Saga) -> Counted:
    """Run a saga to its end and read the metrics as the port would show them."""
    metrics = Metrics(ALL)
    saga_id = await database.run(world.begin)
    with capture_logs():
        async with running(database, world, saga=saga, tell=metrics.count) as runner:
            await wait_for_end(database, saga_id)
    return Counted(await collected(database, metrics, runner.stats))


async def collected(database: Database, metrics: Metrics, stats: Stats) -> Samples:
    """What the port would show."""
    loop = asyncio.get_running_loop()
    metrics.registry.register(FleetCollector(database, loop, ALL, stats, dead_after_seconds=20))
    return samples((await asyncio.to_thread(generate_latest, metrics.registry)).decode())


def view_of(saga: Saga, events: tuple[Event, ...]) -> SagaView:
    return SagaView(
        id="s",
        seq=1,
        subject="instances/x",
        kind=saga.kind,
        version=saga.version,
        params={},
        state=SagaState.RUNNING,
        generation=1,
        owner="r",
        attempt=1,
        cancel_requested=False,
        error=None,
        create_time=NOW,
        update_time=NOW,
        events=events,
    )
