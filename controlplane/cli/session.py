"""How the commands reach the control plane: configuration, channel, calls."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
import grpc
import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from controlplane.cli import errors
from controlplane.cli.errors import CliError
from controlplane.common.config import ConfigError, load_config
from controlplane.common.rpc import CHANNEL_OPTIONS, TlsPaths
from controlplane.v1.flavor_service_pb2_grpc import FlavorServiceStub
from controlplane.v1.host_service_pb2_grpc import HostServiceStub
from controlplane.v1.instance_service_pb2_grpc import InstanceServiceStub
from controlplane.v1.migration_service_pb2_grpc import MigrationServiceStub

CALL_TIMEOUT_SECONDS = 60.0
PATIENCE_SECONDS = 6.0
SYSTEM_CONFIG = Path("/etc/drover/cli.toml")
_FILES_ADVICE = (
    "The files are named in the configuration, or by DROVER_CA, DROVER_CERT and DROVER_KEY.\n"
    "An administrator's key is readable by root only; ask for a certificate of your own "
    "(`drover cert issue`)."
)
# How gRPC says that the other side took the connection and then closed it.
_CLOSED_ON_US = ("socket closed", "connection reset", "handshake", "broken pipe")

Q = TypeVar("Q")
A = TypeVar("A")


class CliConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the control plane is and who the user is.

    Attributes:
        server: Address of the API port, HOST:PORT.
        ca: Certificate authority of the fleet, PEM.
        cert: The user's certificate, PEM.
        key: Its private key, PEM.
        server_name: DNS name to expect in the server's certificate; empty to
            expect the address itself.
    """

    server: str = ""
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str = ""


def config_candidates(environ: Mapping[str, str]) -> list[Path]:
    """Configuration files that are tried, in order."""
    home = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME", "/root"), ".config")
    return [Path(home) / "drover" / "config.toml", SYSTEM_CONFIG]


def read_config(path: Path | None, overrides: CliConfig, environ: Mapping[str, str]) -> CliConfig:
    """The configuration file with the options and variables given on top.

    Args:
        path: The file that was named; None to look in the usual places.
        overrides: Values that win where they are set.
        environ: Environment that says where the usual places are.

    Raises:
        CliError: A file is wrong or a value is missing.
    """
    found = path or next((p for p in config_candidates(environ) if p.is_file()), None)
    try:
        base = load_config(found, CliConfig, environ={}) if found else CliConfig()
    except ConfigError as error:
        raise CliError(str(error), exit_code=errors.USAGE) from error
    folder = found.parent if found else Path()
    same_server = overrides.server in ("", base.server)
    config = CliConfig(
        server=overrides.server or base.server,
        ca=overrides.ca or _under(folder, base.ca),
        cert=overrides.cert or _under(folder, base.cert),
        key=overrides.key or _under(folder, base.key),
        server_name=overrides.server_name or (base.server_name if same_server else ""),
    )
    missing = [name for name in ("server", "ca", "cert", "key") if not getattr(config, name)]
    if missing:
        looked = ", ".join(str(p) for p in ([found] if found else config_candidates(environ)))
        raise CliError(
            f"Not configured: {', '.join(missing)} (looked in {looked}).",
            exit_code=errors.USAGE,
            advice="On a new control plane run `drover init`; elsewhere point DROVER_CONFIG at a "
            "copy of its cli.toml,\nor set "
            + ", ".join(f"DROVER_{name.upper()}" for name in missing)
            + ".",
        )
    if ":" not in config.server:
        raise CliError(
            f"server is {config.server!r}; it has to be HOST:PORT, as in 10.0.0.5:7440.",
            exit_code=errors.USAGE,
        )
    return config


def _under(folder: Path, path: Path | None) -> Path | None:
    return folder / path if path else None


class Session:
    """One run of the command: the configuration and, once needed, a channel.

    Args:
        load: Reads the configuration; called at the first need of it, so that
            commands that need none work without.
    """

    def __init__(self, load: Callable[[], CliConfig]) -> None:
        self._load = load
        self._config: CliConfig | None = None
        self._channel: grpc.Channel | None = None

    @property
    def config(self) -> CliConfig:
        """The configuration."""
        if self._config is None:
            self._config = self._load()
        return self._config

    @property
    def channel(self) -> grpc.Channel:
        """The channel to the API port."""
        if self._channel is None:
            self._channel = open_channel(self.config)
        return self._channel

    def close(self) -> None:
        """Close the channel, if it was opened."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    @property
    def hosts(self) -> HostServiceStub:
        """HostService of the server."""
        return HostServiceStub(self.channel)

    @property
    def instances(self) -> InstanceServiceStub:
        """InstanceService of the server."""
        return InstanceServiceStub(self.channel)

    @property
    def flavors(self) -> FlavorServiceStub:
        """FlavorService of the server."""
        return FlavorServiceStub(self.channel)

    @property
    def migrations(self) -> MigrationServiceStub:
        """MigrationService of the server."""
        return MigrationServiceStub(self.channel)

    def explain(self, error: grpc.RpcError) -> CliError:
        """What to tell the user about a failed call."""
        failure = errors.from_rpc_error(error, server=self.config.server)
        text = " ".join(failure.details).lower()
        if failure.exit_code != errors.UNAVAILABLE or not any(
            sign in text for sign in _CLOSED_ON_US
        ):
            return failure
        trouble = certificate_trouble(self.config)
        if not trouble:
            return failure
        return CliError(
            f"The control plane at {self.config.server} does not let you in: {trouble}",
            exit_code=errors.DENIED,
            details=failure.details,
            advice="Ask for a new one, made with `drover cert issue` or `drover cert renew`.",
        )

    def call(
        self,
        method: grpc.UnaryUnaryMultiCallable[Q, A],
        request: Q,
        *,
        timeout_seconds: float = CALL_TIMEOUT_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> A:
        """Make a call; ask again for a while when the server is out of reach.

        Asking again is safe for every method: reads change nothing, and every
        mutation carries a request id.

        Raises:
            CliError: It failed.
        """
        give_up = time.monotonic() + patience_seconds
        pause_seconds = 0.2
        while True:
            try:
                return method(request, timeout=timeout_seconds)
            except grpc.RpcError as error:
                failure = self.explain(error)
                again = _code(error) is grpc.StatusCode.UNAVAILABLE
                if not again or failure.exit_code == errors.DENIED or time.monotonic() > give_up:
                    raise _with_request_id(failure, request) from error
            time.sleep(pause_seconds)
            pause_seconds = min(1.0, pause_seconds * 2)


def certificate_trouble(config: CliConfig, *, now: datetime | None = None) -> str:
    """Why the server may refuse the user's certificate; empty when it looks right.

    A server that refuses a certificate just closes the connection, so the reason
    has to be looked for on this side.
    """
    if config.cert is None or config.ca is None:
        return ""
    try:
        own, *chain = x509.load_pem_x509_certificates(config.cert.read_bytes())
        authority = x509.load_pem_x509_certificate(config.ca.read_bytes())
    except (OSError, ValueError):
        return ""
    if own.not_valid_after_utc < (now or datetime.now(UTC)):
        return f"{config.cert} expired on {own.not_valid_after_utc:%Y-%m-%d %H:%M} UTC."
    if chain:
        return ""  # intermediate authorities: the server judges better
    try:
        own.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return f"{config.cert} was not issued by {config.ca}."
    return ""


def open_channel(config: CliConfig) -> grpc.Channel:
    """A mutual-TLS channel to the API port.

    Raises:
        CliError: A certificate file cannot be read.
    """
    if config.ca is None or config.cert is None or config.key is None:
        raise AssertionError("read_config checks that all files are named")
    options: list[tuple[str, Any]] = list(CHANNEL_OPTIONS)
    if config.server_name:
        options.append(("grpc.ssl_target_name_override", config.server_name))
    try:
        credentials = TlsPaths(config.cert, config.key, config.ca).channel_credentials()
        _check_pair(config.cert, config.key)
    except OSError as error:
        raise CliError(
            f"{error.filename}: {error.strerror}.", exit_code=errors.USAGE, advice=_FILES_ADVICE
        ) from error
    return grpc.secure_channel(config.server, credentials, options)


def _check_pair(cert: Path, key: Path) -> None:
    """A key that does not fit would only show as a server that cannot be reached."""
    try:
        certified = x509.load_pem_x509_certificate(cert.read_bytes()).public_key()
        own = load_pem_private_key(key.read_bytes(), None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CliError(
            f"{cert} or {key} is not a certificate or a private key in PEM form: {error}",
            exit_code=errors.USAGE,
            advice=_FILES_ADVICE,
        ) from error
    if own != certified:
        raise CliError(
            f"{key} is not the private key of {cert}.", exit_code=errors.USAGE, advice=_FILES_ADVICE
        )


def new_request_id() -> str:
    """A fresh id that makes a mutation repeatable."""
    return str(uuid.uuid4())


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    call: Any = error
    code: grpc.StatusCode = call.code()
    return code


def _with_request_id(failure: CliError, request: Any) -> CliError:
    request_id = getattr(request, "request_id", "")
    if failure.exit_code != errors.UNAVAILABLE or not request_id:
        return failure
    note = (
        f"It is not known whether the request {request_id} was carried out; look before you "
        "repeat the command."
    )
    return CliError(
        failure.message,
        exit_code=failure.exit_code,
        details=failure.details,
        advice="\n".join(part for part in (failure.advice, note) if part),
        reason=failure.reason,
    )


pass_session = click.make_pass_decorator(Session)
