"""What the servicers work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from controlplane.api.watch import Notifier
from controlplane.domain.model import Ratios
from controlplane.fleet.clients import HostClients
from controlplane.fleet.inventory import Runner
from controlplane.saga.definition import Saga
from controlplane.store.types import utc_now
from controlplane.v1 import migration_pb2


class Enroller(Protocol):
    """What joining a host takes from the security side."""

    @property
    def fleet(self) -> str:
        """Name of the fleet."""
        ...

    @property
    def ca_pem(self) -> bytes:
        """The fleet's certificate authority, PEM."""
        ...

    def join_token(self, host: str, secret: str) -> str:
        """What `drover-hostd join` takes."""
        ...

    def sign_host_csr(self, csr_pem: bytes, host: str) -> bytes:
        """Certify a host's key.

        Raises:
            DroverError: INVALID_FIELD when the request cannot be used.
        """
        ...


@dataclass(frozen=True)
class Sagas:
    """The definitions that the API starts; params are {"migration_id": id}."""

    move: Saga
    confirm: Saga
    revert: Saga

    def of_kind(self, kind: str) -> Saga:
        """The definition of that kind.

        Raises:
            KeyError: There is none.
        """
        return {saga.kind: saga for saga in (self.move, self.confirm, self.revert)}[kind]


def _no_nudge() -> None:
    return None


def default_options() -> migration_pb2.MigrationOptions:
    """The options of a move when neither the caller nor the configuration says."""
    options = migration_pb2.MigrationOptions(
        shutdown_mode=migration_pb2.MigrationOptions.SHUTDOWN_MODE_GRACEFUL_THEN_FORCE,
        confirm_policy=migration_pb2.MigrationOptions.CONFIRM_POLICY_MANUAL,
    )
    options.shutdown_timeout.FromSeconds(60)
    return options


@dataclass(frozen=True, kw_only=True)
class Services:
    """What the servicers work with.

    Attributes:
        database: The store.
        clients: Calls to hosts.
        sagas: What moves, confirms and reverts.
        enroller: Signs hosts; None with an outside authority.
        ratios: How much more than it has a host may promise.
        dead_after_seconds: Liveness window.
        join_token_seconds: How long a join token works.
        defaults: Options of a move that its caller left out, every one set.
        notifier: Wakes watchers in this process.
        nudge: Tells the saga runner of this process that there is work.
        host_joined: Tells the inventory poller of this process of a new host.
        clock: The present; a parameter for tests.
    """

    database: Runner
    clients: HostClients
    sagas: Sagas
    enroller: Enroller | None = None
    ratios: Ratios = field(default_factory=Ratios)
    dead_after_seconds: float = 20.0
    join_token_seconds: float = 3600.0
    defaults: migration_pb2.MigrationOptions = field(default_factory=default_options)
    notifier: Notifier = field(default_factory=Notifier)
    nudge: Callable[[], None] = _no_nudge
    host_joined: Callable[[], None] = _no_nudge
    clock: Callable[[], datetime] = utc_now
