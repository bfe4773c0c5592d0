"""The daemon: what hostd is made of, and how it starts and stops.

    state file -> libvirt -> data port -> stops resumed -> gRPC serving -> READY=1
    SIGTERM -> NOT_SERVING -> no new calls -> steps end -> copies cut -> state closed

hostd serves while libvirt is away: calls that need it answer LIBVIRT_UNAVAILABLE.
A copy that is cut by the stop is an INTERRUPTED job at the next start.
"""

from __future__ import annotations

import asyncio
import signal

import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from controlplane.common.config import ConfigError
from controlplane.common.rpc import SERVER_OPTIONS, ErrorInterceptor
from diskmover import MoverError
from hostd.authz import CallerCheck, StreamGuard
from hostd.config import HostdConfig
from hostd.copies import Copies
from hostd.fence import FenceStore
from hostd.hypervisor import Hypervisor
from hostd.incoming import IncomingFiles
from hostd.jobs import JobBoard, JobStore
from hostd.made_directories import MadeDirectories
from hostd.notes import Notes
from hostd.notify import notify
from hostd.preparing import Preparation
from hostd.records import Records
from hostd.service import HostServicer
from hostd.source import SourceSteps
from hostd.state import StateFile
from hostd.steps import StepRunner, Workers
from hostd.stopping import Stops
from hostd.target import TargetSteps
from hostd.transfer import DataPort
from hostd.v1 import host_service_pb2, host_service_pb2_grpc

log = structlog.stdlib.get_logger(__name__)

SERVICE = host_service_pb2.DESCRIPTOR.services_by_name["HostService"].full_name
_GRACE_SECONDS = 5.0


class Daemon:
    """One hostd; `start`, then `stop`.

    Args:
        config: What to be.

    Attributes:
        control_port: The port that the API listens on, once started.
        data_port: The receiver of copies, once started.
    """

    def __init__(self, config: HostdConfig) -> None:
        self._config = config
        self.control_port = 0

    async def start(self) -> None:
        """Open everything and serve.

        Raises:
            StateError: The state cannot be used.
            ConfigError: A port or certificate cannot be used.
        """
        config = self._config
        self._state = StateFile(config.state.directory)
        self._workers = Workers()
        records = Records(self._state)
        jobs = JobStore(self._state)
        self._board = JobBoard(jobs)
        self.data_port = await self._workers.step(self._open_data_port)
        self._hypervisor = Hypervisor(config)
        self._copies = Copies(
            jobs,
            self._board,
            config.tls.paths,
            config.limits.max_copies,
            config.limits.io_priority,
        )
        self._stops = Stops(records, self._hypervisor, self._workers)
        self._runner = StepRunner(FenceStore(self._state), self._workers)
        files = IncomingFiles(config, records, MadeDirectories(self._state))
        target = TargetSteps(config, self._hypervisor, records, self.data_port, files)
        servicer = HostServicer(
            config=config,
            hypervisor=self._hypervisor,
            runner=self._runner,
            workers=self._workers,
            records=records,
            jobs=jobs,
            board=self._board,
            copies=self._copies,
            stops=self._stops,
            source=SourceSteps(self._hypervisor, records),
            preparation=Preparation(config, self._hypervisor, records, files, target.remove),
            target=target,
        )
        self._stops.resume()
        self._notes = Notes()
        self._notes.start()
        await self._serve(servicer)

    def _open_data_port(self) -> DataPort:
        listen = self._config.listen.data
        try:
            limits = self._config.limits
            return DataPort(
                listen,
                self._config.tls.paths,
                volume_memory_bytes=limits.volume_memory_mib << 20,
                io_priority=limits.io_priority,
            )
        except MoverError as error:
            raise ConfigError(f"listen.data {listen}: {error.message}") from error

    async def _serve(self, servicer: HostServicer) -> None:
        check = CallerCheck(self._config.fleet)
        self._server = grpc.aio.server(
            interceptors=(
                StreamGuard(check),
                ErrorInterceptor(before=(check,), known=self._state.trouble),
            ),
            options=SERVER_OPTIONS,
        )
        host_service_pb2_grpc.add_HostServiceServicer_to_server(servicer, self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        listen = self._config.listen.control
        try:
            credentials = self._config.tls.paths.server_credentials()
            self.control_port = self._server.add_secure_port(listen, credentials)
        except OSError as error:
            raise ConfigError(f"{error}. Run `drover-hostd join TOKEN` first.") from error
        except RuntimeError as error:
            raise ConfigError(f"listen.control {listen}: {error}") from error
        await self._server.start()
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info(
            "serving",
            host=self._config.host,
            control=self.control_port,
            data=self.data_port.address,
        )

    async def stop(self) -> None:
        """Stop serving, let steps end, cut copies, and let go of the state."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(_GRACE_SECONDS)
        await self._runner.drain()
        await self._stops.close()
        await self._copies.close()
        await self._workers.step(self.data_port.close)
        await self._notes.close()
        await self._workers.step(self._hypervisor.close)
        self._workers.close()
        self._state.close()
        log.info("stopped")


async def serve(config: HostdConfig) -> None:
    """Run until SIGTERM or SIGINT.

    Raises:
        StateError: The state cannot be used.
        ConfigError: A port or certificate cannot be used.
    """
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    daemon = Daemon(config)
    await daemon.start()
    notify(f"READY=1\nSTATUS=Serving as {config.identity.uri}")
    await told.wait()
    notify("STOPPING=1\nSTATUS=Letting steps end")
    await daemon.stop()
