"""A fleet's certificates in a directory, made with the product's own authority."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from controlplane.common.identity import Identity, Role, host_identity
from controlplane.common.rpc import TlsPaths
from controlplane.security.pki import CertificateAuthority, api_server_identity

FLEET = "lab"


class FleetPki:
    """Issues certificates into files.

    Args:
        directory: Where to.
        fleet: Name of the fleet.
    """

    def __init__(self, directory: Path, fleet: str = FLEET) -> None:
        self.fleet = fleet
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.authority = CertificateAuthority.create(fleet)
        self.ca = directory / "ca.pem"
        self.ca_key = directory / "ca.key"
        self.authority.write(self.ca, self.ca_key)

    def issue(
        self,
        identity: Identity,
        *,
        stem: str = "",
        names: tuple[str, ...] = (),
        now: datetime | None = None,
        lifetime: timedelta | None = None,
    ) -> TlsPaths:
        stem = stem or f"{identity.role.value}-{identity.name}"
        paths = TlsPaths(self.directory / f"{stem}.pem", self.directory / f"{stem}.key", self.ca)
        pair = self.authority.issue(identity, names=names, now=now, lifetime=lifetime)
        pair.write(paths.cert, paths.key, replace=True)
        return paths

    def server(self) -> TlsPaths:
        return self.issue(
            api_server_identity(self.fleet), stem="server", names=("localhost", "127.0.0.1")
        )

    def person(self, role: Role, name: str = "eve", project: str = "web") -> TlsPaths:
        return self.issue(Identity(self.fleet, role, name, project if role is Role.MEMBER else ""))

    def host(self, name: str) -> TlsPaths:
        return self.issue(host_identity(self.fleet, name))

    def expired(self, role: Role) -> TlsPaths:
        then = datetime.now(UTC) - timedelta(days=30)
        return self.issue(Identity(self.fleet, role, "late"), now=then, lifetime=timedelta(days=1))


def channel(port: int, tls: TlsPaths, *, server_name: str = "") -> grpc.aio.Channel:
    options: list[tuple[str, Any]] = [("grpc.enable_retries", 0)]
    if server_name:
        options.append(("grpc.ssl_target_name_override", server_name))
    return grpc.aio.secure_channel(f"127.0.0.1:{port}", tls.channel_credentials(), options)
