"""A throw-away certificate authority and identities for tests."""

from __future__ import annotations

from pathlib import Path

from controlplane.common.identity import Identity, Role, host_identity
from controlplane.common.rpc import TlsPaths
from controlplane.security.pki import CertificateAuthority

FLEET = "lab"


class TestPki:
    """An authority in a directory, and the identities it issued.

    Args:
        directory: Where everything is written.
        fleet: Name of the fleet.
    """

    __test__ = False  # not a test class, whatever its name

    def __init__(self, directory: Path, fleet: str = FLEET) -> None:
        self.fleet = fleet
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.authority = CertificateAuthority.create(fleet)
        self.ca = directory / "ca.pem"
        self.ca.write_bytes(self.authority.certificate_pem)

    def issue(self, identity: Identity) -> TlsPaths:
        """Make a key and certificate; the same paths when asked again."""
        stem = f"{identity.role.value}-{identity.name}"
        paths = TlsPaths(
            cert=self.directory / f"{stem}.pem", key=self.directory / f"{stem}.key", ca=self.ca
        )
        if not paths.cert.exists():
            self.authority.issue(identity).write(paths.cert, paths.key)
        return paths

    def host(self, name: str) -> TlsPaths:
        """The identity of a host."""
        return self.issue(host_identity(self.fleet, name))

    def controlplane(self, name: str = "cp") -> TlsPaths:
        """The identity of a control plane."""
        return self.issue(Identity(self.fleet, Role.CONTROLPLANE, name))

    def person(self, role: Role, name: str = "eve") -> TlsPaths:
        """The identity of a person."""
        project = "p1" if role is Role.MEMBER else ""
        return self.issue(Identity(self.fleet, role, name, project))
