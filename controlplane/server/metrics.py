"""Metrics for Prometheus: what the steps of sagas came to, and how the fleet stands.

    saga event committed --Metrics.count--> counters and histograms of this replica
    scrape ---------------FleetCollector--> gauges read from the database, now

The first kind only goes up and begins at zero with each start of a replica, for
every step that a saga declares; add replicas up. The second kind is the same at
every replica. The port is plain HTTP: it tells states and numbers, never names,
and nobody can change anything through it.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import prometheus_client
import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from sqlalchemy import Connection

from controlplane.domain.model import Host
from controlplane.domain.states import HostState, MigrationState
from controlplane.saga.definition import Saga
from controlplane.saga.log import Event, EventKind, SagaView
from controlplane.saga.runner import Stats
from controlplane.server.ports import PortError
from controlplane.store import hosts, migrations, sql_saga
from controlplane.store.engine import Database
from controlplane.store.types import utc_now

log = structlog.stdlib.get_logger(__name__)

OUTCOMES = {
    EventKind.SUCCEEDED: "done",
    EventKind.FAILED: "failed",
    EventKind.UNDO_FINISHED: "undone",
    EventKind.UNDO_FAILED: "undo_failed",
}
"""What a step can come to, by the event that says so."""

STEP_SECONDS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)
"""Limits of the histogram: from a write in the database to a copy of many terabytes."""

LIVENESS = ("alive", "dead", "joining", "gone")

SCRAPE_SECONDS = 5.0
"""How long a scrape waits for the database, and the port for a client."""

# A second series per counter that says when it was made; nobody here asks for it.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """What the sagas of this replica have done.

    Args:
        sagas: Every definition that it conducts; each of their steps has its
            series from the start.

    Attributes:
        registry: All metrics that the port serves.
    """

    def __init__(self, sagas: Sequence[Saga]) -> None:
        self.registry = CollectorRegistry()
        self._steps = Counter(
            "drover_saga_steps",
            "Steps of sagas that ended, by what they came to.",
            ("saga", "step", "outcome"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "drover_saga_step_seconds",
            "Time from the start of a step to its success, waits and retries included.",
            ("saga", "step"),
            buckets=STEP_SECONDS,
            registry=self.registry,
        )
        for saga in sagas:
            for step in saga.steps:
                self._seconds.labels(saga.kind, step.name)
                for outcome in OUTCOMES.values():
                    self._steps.labels(saga.kind, step.name, outcome)

    def count(self, saga: SagaView) -> None:
        """Take the last event of a saga into account; see `controlplane.saga.context.Listener`."""
        event = saga.events[-1]
        outcome = OUTCOMES.get(event.kind)
        if outcome is None:
            return
        self._steps.labels(saga.kind, event.step, outcome).inc()
        took = _seconds_of(event, saga.events)
        if event.kind is EventKind.SUCCEEDED and took is not None:
            self._seconds.labels(saga.kind, event.step).observe(took)


def _seconds_of(end: Event, events: Sequence[Event]) -> float | None:
    """How long a step took by the times in the log, which another replica may have begun."""
    for event in reversed(events):
        if event.kind is EventKind.STARTED and event.step == end.step:
            if event.time is None or end.time is None:
                return None
            return max(0.0, (end.time - event.time).total_seconds())
    return None


@dataclass(frozen=True)
class Standing:
    """How the fleet stands.

    Attributes:
        moves: Number of moves in each state that some are in.
        stuck: Number of stuck sagas of each kind that has some.
        hosts: Every host.
    """

    moves: dict[MigrationState, int]
    stuck: dict[str, int]
    hosts: list[Host]


def _read(tx: Connection) -> Standing:
    return Standing(migrations.count_by_state(tx), sql_saga.count_stuck(tx), hosts.list_all(tx))


class FleetCollector:
    """Reads the database at each scrape; runs on the port's threads.

    A database that does not answer leaves its gauges out and says so in
    drover_database_up, rather than show old numbers as new ones.

    Args:
        database: The store.
        loop: Loop that the database is used from.
        sagas: Definitions whose kinds are shown.
        stats: What the runner has done.
        dead_after_seconds: Liveness window of hosts.
    """

    def __init__(
        self,
        database: Database,
        loop: asyncio.AbstractEventLoop,
        sagas: Sequence[Saga],
        stats: Stats,
        dead_after_seconds: float,
    ) -> None:
        self._database = database
        self._loop = loop
        self._kinds = [saga.kind for saga in sagas]
        self._stats = stats
        self._dead_after_seconds = dead_after_seconds

    def collect(self) -> Iterable[Metric]:
        """Every metric that is not counted event by event."""
        standing = self._standing()
        yield _counter("drover_saga_retries", "Step outcomes not known.", self._stats.retries)
        yield _counter(
            "drover_saga_leases_lost", "Sagas taken over by others.", self._stats.lost_leases
        )
        yield GaugeMetricFamily(
            "drover_saga_unclaimable",
            "Live sagas of a version that this replica does not know.",
            self._stats.unclaimable,
        )
        yield GaugeMetricFamily(
            "drover_database_up", "1 when the database answered.", float(standing is not None)
        )
        if standing is not None:
            yield from self._gauges(standing)

    def _standing(self) -> Standing | None:
        asked = asyncio.run_coroutine_threadsafe(self._database.run(_read), self._loop)
        try:
            return asked.result(SCRAPE_SECONDS)
        except Exception as error:
            # Whatever it is, a scrape shows what is known without the database.
            asked.cancel()
            # Not the whole text of an SQLAlchemy error, which holds statements.
            cause = getattr(error, "orig", None) or repr(error)
            log.warning("metrics without the database", error=str(cause))
            return None

    def _gauges(self, standing: Standing) -> Iterable[Metric]:
        states = [state.value for state in MigrationState]
        yield _gauge("drover_migrations", "Moves by state.", "state", states, standing.moves)
        yield _gauge(
            "drover_saga_stuck", "Sagas that wait for you.", "saga", self._kinds, standing.stuck
        )
        yield _gauge(
            "drover_hosts", "Hosts by liveness.", "liveness", LIVENESS, self._alive(standing.hosts)
        )

    def _alive(self, known: Iterable[Host]) -> Tally[str]:
        now = utc_now()
        return Tally(
            _liveness(host, host.is_alive(now, self._dead_after_seconds)) for host in known
        )


def _liveness(host: Host, alive: bool) -> str:
    if host.state in (HostState.JOINING, HostState.GONE):
        return host.state.value.lower()
    return "alive" if alive else "dead"


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value)


def _gauge(
    name: str, text: str, label: str, values: Iterable[str], numbers: Any
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=(label,))
    for value in values:
        family.add_metric((value,), numbers.get(value, 0))
    return family


class _Request(WSGIRequestHandler):
    """One scrape; whoever says nothing for so many seconds is let go."""

    timeout = SCRAPE_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are no news."""


class _Server(ThreadingMixIn, WSGIServer):
    """A thread per scrape."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        self.address_family = found[0][0]
        super().__init__((host, port), _Request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A scraper that went away or fell silent is its own business."""
        log.info("metrics not delivered", error=repr(sys.exception()))


def serve(address: str, registry: CollectorRegistry) -> tuple[int, Callable[[], None]]:
    """Open the port, plain HTTP. Both this and what it returns block for a moment.

    Returns:
        The port number, and what closes it.

    Raises:
        PortError: The address cannot be bound.
    """
    host, _, port = address.rpartition(":")
    try:
        server = _Server(host.strip("[]"), int(port))
    except OSError as error:
        raise PortError(f"[metrics] listen: {address} cannot be opened: {error}") from error
    server.set_app(prometheus_client.make_wsgi_app(registry))
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, close
