"""The control plane, put together: store, sagas, fleet, API.

Start                                   Stop
  1 open the store, bring it up to date   1 health NOT_SERVING: new calls go elsewhere
  2 conduct sagas, ask hosts              2 stop claiming, release every lease
  3 open the ports                        3 end open calls, close the ports
  4 health SERVING while sagas are        4 stop asking hosts, close the store
    claimed

Whatever is cut off by a stop, or by kill -9, another replica or the next start
goes on with: nothing here is the only place where something is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc.aio
import structlog
from sqlalchemy import Connection

from controlplane.api import moves
from controlplane.api.services import Sagas, Services
from controlplane.api.watch import Notifier
from controlplane.common.notify import notify
from controlplane.domain.model import Host, Migration
from controlplane.fleet.autoconfirm import AutoConfirmer
from controlplane.fleet.clients import HostClients, tls_channels
from controlplane.fleet.inventory import InventoryPoller, InventorySettings
from controlplane.saga.log import SagaView
from controlplane.saga.runner import Runner, RunnerConfig
from controlplane.sagas import ALL, confirm, move, revert
from controlplane.sagas.resources import MoveResources
from controlplane.security.audit import AuditLog
from controlplane.security.authn import Authenticator
from controlplane.security.pki import RENEW_BEFORE, CertificateAuthority, remaining_lifetime
from controlplane.server import metrics, ports
from controlplane.server.config import ControlPlaneConfig
from controlplane.server.enroller import FleetEnroller
from controlplane.server.registry import API_SERVICES, api_registrations, enrolment_registrations
from controlplane.store import hosts
from controlplane.store.engine import Database
from controlplane.store.sql_saga import SqlSagaStore
from controlplane.store.upgrade import upgrade

log = structlog.stdlib.get_logger(__name__)

GRACE_SECONDS = 5.0
HEALTH_SECONDS = 1.0
CERTIFICATE_CHECK_SECONDS = 6 * 3600.0
SAGAS = Sagas(move=move.SAGA, confirm=confirm.SAGA, revert=revert.SAGA)


class App:
    """One replica of the control plane; `async with App(config)` runs it.

    Args:
        config: Its configuration, checked.
        grace_seconds: How long open calls may take at a stop.

    Attributes:
        api_port: Number of the API port, once started.
        enrol_port: Number of the enrolment port, once started; 0 when it is closed.
        metrics_port: Number of the metrics port, once started; 0 when there is none.
    """

    def __init__(self, config: ControlPlaneConfig, *, grace_seconds: float = GRACE_SECONDS) -> None:
        self.config = config
        self.api_port = 0
        self.enrol_port = 0
        self.metrics_port = 0
        self._grace_seconds = grace_seconds
        self._health = ports.Health(API_SERVICES)
        self._exits = contextlib.AsyncExitStack()
        self._loops: list[asyncio.Task[None]] = []
        self._runner: Runner | None = None
        self._notifier = Notifier()
        self._metrics = metrics.Metrics(ALL)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start everything; what was started is stopped again when a part fails.

        Raises:
            PortError: A port cannot be opened.
            DatabaseInUse: Another control plane runs on this SQLite file.
            SQLAlchemyError: The database cannot be used.
        """
        try:
            await self._start()
        except BaseException:
            await self._exits.aclose()
            raise

    async def stop(self) -> None:
        """Stop in the order of the module's table; may be called once."""
        notify("STOPPING=1")
        log.info("stopping")
        await self._health.shut_down()
        await self._exits.aclose()
        log.info("stopped")

    async def _start(self) -> None:
        config = self.config
        await self._health.not_serving()
        database = await asyncio.to_thread(Database, config.database.url)
        self._exits.callback(database.close)
        await asyncio.to_thread(upgrade, database)

        clients = self._make_clients(database)
        self._exits.push_async_callback(clients.close)
        self._exits.push_async_callback(self._stop_loops)
        runner = self._make_runner(database, clients)
        poller = InventoryPoller(
            database,
            clients,
            InventorySettings(
                interval_seconds=config.inventory.interval_seconds,
                dead_after_seconds=config.inventory.dead_after_seconds,
            ),
        )
        services = self._make_services(database, clients, runner, poller)
        await self._open_ports(database, services)
        await self._open_metrics(database, runner)
        await runner.start()
        self._exits.push_async_callback(runner.stop)
        self._runner = runner

        self._loop("inventory", poller.run())
        self._loop("autoconfirm", AutoConfirmer(database, _begin_confirm(services)).run())
        self._loop("health", self._watch_health())
        self._loop("certificates", self._watch_certificates())
        log.info("started", fleet=config.fleet, api_port=self.api_port, enrol_port=self.enrol_port)

    def _make_clients(self, database: Database) -> HostClients:
        async def lookup(name: str) -> Host:
            return await database.run(lambda tx: hosts.get(tx, name))

        return HostClients(lookup, tls_channels(self.config.fleet, self.config.tls.client))

    def _make_runner(self, database: Database, clients: HostClients) -> Runner:
        saga = self.config.saga
        resources = MoveResources(
            fleet=self.config.fleet,
            hosts=clients,
            poll_seconds=saga.poll_seconds,
            ratios=self.config.scheduler.ratios(),
            copy_connections=saga.copy_connections,
        )
        return Runner(
            database,
            SqlSagaStore(),
            ALL,
            resources,
            RunnerConfig(
                lease_seconds=saga.lease_seconds,
                poll_seconds=saga.poll_seconds,
                concurrency=saga.concurrency,
            ),
            tell=self._tell,
        )

    def _tell(self, saga: SagaView) -> None:
        self._metrics.count(saga)
        self._notifier.changed(saga.params["migration_id"])

    def _make_services(
        self, database: Database, clients: HostClients, runner: Runner, poller: InventoryPoller
    ) -> Services:
        config = self.config
        return Services(
            database=database,
            clients=clients,
            sagas=SAGAS,
            enroller=self._make_enroller(),
            ratios=config.scheduler.ratios(),
            dead_after_seconds=config.inventory.dead_after_seconds,
            join_token_seconds=config.security.join_token_minutes * 60,
            defaults=config.defaults.options(),
            notifier=self._notifier,
            nudge=runner.nudge,
            host_joined=poller.wake,
        )

    def _make_enroller(self) -> FleetEnroller | None:
        tls = self.config.tls
        if tls.ca_key is None:
            return None
        authority = CertificateAuthority.load(tls.ca, tls.ca_key)
        return FleetEnroller(self.config.fleet, authority, self.config.listen.advertise_enrol)

    async def _open_ports(self, database: Database, services: Services) -> None:
        config = self.config
        audit = AuditLog(database.run)
        api = ports.make_api_server(
            Authenticator(config.fleet, config.identities()),
            audit,
            self._health,
            api_registrations(services),
            API_SERVICES,
        )
        self.api_port = ports.bind_api(api, config.listen.api, config.tls.server)
        await self._serve(api)
        if services.enroller is None:
            log.info("enrolment port stays closed: no ca_key is configured")
            return
        enrolment = ports.make_enrolment_server(
            audit, enrolment_registrations(services, services.enroller)
        )
        self.enrol_port = ports.bind_enrolment(enrolment, config.listen.enrol, config.tls.server)
        await self._serve(enrolment)

    async def _open_metrics(self, database: Database, runner: Runner) -> None:
        listen = self.config.metrics.listen
        if listen is None:
            return
        self._metrics.registry.register(
            metrics.FleetCollector(
                database,
                asyncio.get_running_loop(),
                ALL,
                runner.stats,
                self.config.inventory.dead_after_seconds,
            )
        )
        self.metrics_port, close = await asyncio.to_thread(
            metrics.serve, listen, self._metrics.registry
        )
        self._exits.push_async_callback(asyncio.to_thread, close)

    async def _serve(self, server: grpc.aio.Server) -> None:
        await server.start()
        self._exits.push_async_callback(server.stop, self._grace_seconds)

    # --- loops -------------------------------------------------------------------

    def _loop(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self._loops.append(asyncio.create_task(work, name=name))

    async def _stop_loops(self) -> None:
        for loop in self._loops:
            loop.cancel()
        for loop, outcome in zip(
            self._loops, await asyncio.gather(*self._loops, return_exceptions=True), strict=True
        ):
            if isinstance(outcome, Exception):
                log.error("loop had ended", loop=loop.get_name(), exc_info=outcome)

    def healthy(self) -> bool:
        """True while sagas are claimed and every loop is alive."""
        alive = not any(loop.done() for loop in self._loops)
        return alive and self._runner is not None and self._runner.healthy()

    async def _watch_health(self) -> None:
        was = False
        while True:
            now = self.healthy()
            if now != was:
                log.info("health", serving=now)
                await (self._health.serving() if now else self._health.not_serving())
                if now:
                    notify("READY=1", "STATUS=Serving")
                else:
                    notify("STATUS=Not serving: sagas are not being claimed")
                was = now
            if now:
                notify("WATCHDOG=1")
            await asyncio.sleep(HEALTH_SECONDS if was else HEALTH_SECONDS / 10)

    async def _watch_certificates(self) -> None:
        while True:
            for path in (self.config.tls.cert, self.config.tls.client_cert):
                _warn_of_expiry(path)
            await asyncio.sleep(CERTIFICATE_CHECK_SECONDS)


def _begin_confirm(services: Services) -> Callable[[Connection, Migration], object]:
    return lambda tx, migration: moves.confirm(tx, services, migration, by="the confirm policy")


def _warn_of_expiry(path: Path) -> None:
    try:
        left = remaining_lifetime(path)
    except (OSError, ValueError) as error:
        log.error("certificate cannot be read", path=str(path), error=str(error))
        return
    if left < RENEW_BEFORE:
        log.warning(
            "certificate expires soon",
            path=str(path),
            days_left=left.days,
            help=f"drover cert renew {path}",
        )


async def serve(app: App) -> None:
    """Run until SIGTERM or SIGINT."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    async with app:
        await asked.wait()
