"""What joining a host takes: the authority that signs and the words of the token."""

from __future__ import annotations

from controlplane.security.pki import CertificateAuthority, api_server_identity
from controlplane.security.tokens import TOKEN_VERSION, JoinToken


class FleetEnroller:
    """Signs the hosts of one fleet; see `controlplane.api.services.Enroller`.

    Args:
        fleet: Name of the fleet.
        authority: The fleet's authority.
        server: Address of the enrolment port for new hosts, HOST:PORT.
    """

    def __init__(self, fleet: str, authority: CertificateAuthority, server: str) -> None:
        self._fleet = fleet
        self._authority = authority
        self._server = server

    @property
    def fleet(self) -> str:
        """Name of the fleet."""
        return self._fleet

    @property
    def ca_pem(self) -> bytes:
        """The fleet's certificate authority, PEM."""
        return self._authority.certificate_pem

    def join_token(self, host: str, secret: str) -> str:
        """What `drover-hostd join` takes."""
        return JoinToken(
            v=TOKEN_VERSION,
            server=self._server,
            server_name=api_server_identity(self._fleet).dns_name,
            fleet=self._fleet,
            host=host,
            secret=secret,
            ca_pem=self.ca_pem.decode(),
        ).encode()

    def sign_host_csr(self, csr_pem: bytes, host: str) -> bytes:
        """Certify a host's key.

        Raises:
            DroverError: INVALID_FIELD when the request cannot be used.
        """
        return self._authority.sign_host_csr(csr_pem, fleet=self._fleet, host=host)
