"""Configuration of the control plane: controlplane.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from controlplane.common.config import ConfigError
from controlplane.common.identity import NAME_PATTERN, Identity
from controlplane.common.rpc import TlsPaths
from controlplane.domain.model import Ratios
from controlplane.security.authn import parse_identities
from controlplane.v1.migration_pb2 import MigrationOptions

Address = Annotated[str, msgspec.Meta(pattern=r"^(\[[0-9a-fA-F:.]+\]|[^:\s]+):\d{1,5}$")]
HIGHEST_PORT = 65535
Positive = Annotated[float, msgspec.Meta(gt=0)]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A section; unknown keys are refused."""


class Listen(_Section, frozen=True, kw_only=True):
    """Ports.

    Attributes:
        api: Where the API listens, mutual TLS.
        enrol: Where hosts join, TLS without a client certificate.
        advertise: How users reach the API.
        advertise_enrol: How new hosts reach the enrolment port; goes into join
            tokens.
    """

    advertise: Address
    advertise_enrol: Address
    api: Address = "0.0.0.0:7440"
    enrol: Address = "0.0.0.0:7441"


class DatabaseSection(_Section, frozen=True, kw_only=True):
    """The store.

    Attributes:
        url: SQLAlchemy URL of a SQLite file or a PostgreSQL database.
    """

    url: str = "sqlite:////var/lib/drover/controlplane.db"


class Tls(_Section, frozen=True, kw_only=True):
    """Certificates, PEM files.

    Attributes:
        ca: Authority that callers and hosts are checked against.
        cert: The server's certificate.
        key: Its private key.
        client_cert: Certificate shown to hosts; its role is controlplane.
        client_key: Its private key.
        ca_key: Key of `ca`, to sign joining hosts. Left out with an authority of
            your own; then the enrolment port stays closed.
    """

    ca: Path
    cert: Path
    key: Path
    client_cert: Path
    client_key: Path
    ca_key: Path | None = None

    @property
    def server(self) -> TlsPaths:
        """Files of the API and enrolment ports."""
        return TlsPaths(cert=self.cert, key=self.key, ca=self.ca)

    @property
    def client(self) -> TlsPaths:
        """Files of calls to hosts."""
        return TlsPaths(cert=self.client_cert, key=self.client_key, ca=self.ca)


class Defaults(_Section, frozen=True, kw_only=True):
    """What a move takes when the one who asks for it does not say.

    Attributes:
        shutdown_mode: How the guest is stopped.
        shutdown_timeout_seconds: How long it may take to stop.
        confirm_policy: What happens to the source copy.
        confirm_after_seconds: Window of the policy "after".
        bandwidth_limit_bytes_per_second: Network limit of a move; 0 for none.
    """

    shutdown_mode: Literal["graceful", "graceful-then-force", "force"] = "graceful-then-force"
    shutdown_timeout_seconds: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 60.0
    confirm_policy: Literal["manual", "auto", "after"] = "manual"
    confirm_after_seconds: Annotated[float, msgspec.Meta(ge=1)] | None = None
    bandwidth_limit_bytes_per_second: Annotated[int, msgspec.Meta(ge=0)] = 0

    def options(self) -> MigrationOptions:
        """As the options of a move, every one set."""
        options = MigrationOptions(
            bandwidth_limit_bytes_per_second=self.bandwidth_limit_bytes_per_second
        )
        mode = self.shutdown_mode.replace("-", "_").upper()
        options.shutdown_mode = MigrationOptions.ShutdownMode.Value(f"SHUTDOWN_MODE_{mode}")
        options.shutdown_timeout.FromMilliseconds(round(self.shutdown_timeout_seconds * 1000))
        policy = f"CONFIRM_POLICY_{self.confirm_policy.upper()}"
        options.confirm_policy = MigrationOptions.ConfirmPolicy.Value(policy)
        if self.confirm_after_seconds is not None:
            options.confirm_after.FromMilliseconds(round(self.confirm_after_seconds * 1000))
        return options


class Inventory(_Section, frozen=True, kw_only=True):
    """How hosts are asked for reports.

    Attributes:
        interval_seconds: How often.
        dead_after_seconds: A host that has not answered for so long is dead.
    """

    interval_seconds: Positive = 5.0
    dead_after_seconds: Positive = 20.0


class Scheduler(_Section, frozen=True, kw_only=True):
    """How much more than it has a host may promise.

    Attributes:
        cpu_allocation_ratio: Virtual CPUs per host CPU.
        memory_allocation_ratio: Guest memory per usable host memory.
    """

    cpu_allocation_ratio: Positive = 4.0
    memory_allocation_ratio: Positive = 1.0

    def ratios(self) -> Ratios:
        """As the scheduler takes them."""
        return Ratios(cpu=self.cpu_allocation_ratio, memory=self.memory_allocation_ratio)


class SagaSection(_Section, frozen=True, kw_only=True):
    """The saga kernel.

    Attributes:
        lease_seconds: How long a replica owns a saga without renewing; another
            one takes over after that.
        poll_seconds: How often sagas to run are looked for.
        concurrency: Sagas that this replica holds at a time.
        copy_connections: Connections of one copy; 0 for diskmover's default.
    """

    lease_seconds: Annotated[float, msgspec.Meta(ge=2)] = 30.0
    poll_seconds: Positive = 1.0
    concurrency: Annotated[int, msgspec.Meta(ge=1)] = 256
    copy_connections: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0


class Security(_Section, frozen=True, kw_only=True):
    """Who is who.

    Attributes:
        identities: For certificates of another authority: URI name ->
            "role/name", or "member/name/project".
        join_token_minutes: How long a join token works.
    """

    identities: dict[str, str] = {}
    join_token_minutes: Positive = 60.0


class MetricsSection(_Section, frozen=True, kw_only=True):
    """Metrics for Prometheus.

    Attributes:
        listen: Where they are served, plain HTTP, so loopback or a protected
            network only. Left out for no port.
    """

    listen: Address | None = None


class Log(_Section, frozen=True, kw_only=True):
    """Logging.

    Attributes:
        level: Least important level that is written.
    """

    level: Literal["debug", "info", "warning", "error"] = "info"


class ControlPlaneConfig(_Section, frozen=True, kw_only=True):
    """controlplane.toml.

    Attributes:
        fleet: Name of the fleet.
        listen: Ports.
        database: The store.
        tls: Certificates.
        defaults: Choices of a move that are left out.
        inventory: Reports of hosts.
        scheduler: Overcommit.
        saga: The kernel.
        security: Who is who.
        metrics: Metrics for Prometheus.
        log: Logging.
    """

    fleet: str
    listen: Listen
    tls: Tls
    database: DatabaseSection = DatabaseSection()
    defaults: Defaults = Defaults()
    inventory: Inventory = Inventory()
    scheduler: Scheduler = Scheduler()
    saga: SagaSection = SagaSection()
    security: Security = Security()
    metrics: MetricsSection = MetricsSection()
    log: Log = Log()

    def identities(self) -> dict[str, Identity]:
        """The map of foreign URI names, parsed."""
        return parse_identities(self.fleet, self.security.identities)


def check(config: ControlPlaneConfig) -> None:
    """Check what types alone cannot say.

    Raises:
        ConfigError: A value is wrong; the message names it.
    """
    if not NAME_PATTERN.fullmatch(config.fleet):
        raise ConfigError(f"fleet: {config.fleet!r} is not 1 to 63 of a-z, 0-9, '-' and '.'")
    try:
        config.identities()
    except ValueError as error:
        raise ConfigError(f"[security.identities]: {error}") from error
    defaults = config.defaults
    if (defaults.confirm_policy == "after") != (defaults.confirm_after_seconds is not None):
        raise ConfigError(
            '[defaults]: confirm_after_seconds goes with confirm_policy = "after", and only with it'
        )
    if config.inventory.dead_after_seconds < 2 * config.inventory.interval_seconds:
        raise ConfigError(
            "[inventory]: dead_after_seconds has to be at least twice interval_seconds, or one "
            "lost report makes a host look dead"
        )
    metrics = config.metrics.listen
    if metrics is not None and int(metrics.rpartition(":")[2]) > HIGHEST_PORT:
        raise ConfigError(f"[metrics] listen: {metrics}: ports go up to {HIGHEST_PORT}")
    for name in ("ca", "cert", "key", "client_cert", "client_key", "ca_key"):
        path: Path | None = getattr(config.tls, name)
        if path is not None:
            _check_readable(f"[tls] {name}", path)


def _check_readable(place: str, path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"{place}: {path}: {error.strerror}") from error
