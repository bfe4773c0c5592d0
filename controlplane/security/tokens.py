"""Join tokens: what an operator carries to a new host.

A token is one word of base64url (no padding) around a JSON object:

    {"v": 1, "server": "10.0.0.1:7441", "server_name": "api.controlplane.lab.drover.internal",
     "fleet": "lab", "host": "c", "secret": "...", "ca_pem": "-----BEGIN CERTIFICATE-----..."}

The authority's certificate inside lets the host know the server it talks to
before it owns a certificate itself. The secret works once and for that host
name only; the control plane stores its SHA-256 alone, which is enough because
the secret is 256 random bits and cannot be guessed from its hash.
"""

from __future__ import annotations

import base64
import hashlib
import secrets

import msgspec

from controlplane.common.foreign_json import decode

TOKEN_VERSION = 1
_SECRET_BYTES = 32


class JoinToken(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a join token.

    Attributes:
        v: Version of the format.
        server: Address of the enrolment port, HOST:PORT.
        server_name: DNS name that the server's certificate has to carry.
        fleet: Name of the fleet.
        host: Name that the host will have.
        secret: One-time credential.
        ca_pem: Certificate authority of the fleet, PEM.
    """

    v: int
    server: str
    server_name: str
    fleet: str
    host: str
    secret: str
    ca_pem: str

    def __repr__(self) -> str:
        return f"JoinToken(server={self.server!r}, fleet={self.fleet!r}, host={self.host!r}, ...)"

    def encode(self) -> str:
        """The token as one word."""
        return base64.urlsafe_b64encode(msgspec.json.encode(self)).rstrip(b"=").decode()

    @classmethod
    def decode(cls, word: str) -> JoinToken:
        """Read a token.

        Raises:
            ValueError: It is cut off, mistyped or of another version.
        """
        try:
            raw = base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_", validate=True)
            token = decode(raw, cls)
        except ValueError as error:
            raise ValueError("the join token is damaged; copy the whole word again") from error
        if token.v != TOKEN_VERSION:
            raise ValueError(f"the join token has version {token.v}, not {TOKEN_VERSION}")
        return token


def new_secret() -> str:
    """A fresh one-time credential."""
    return secrets.token_urlsafe(_SECRET_BYTES)


def secret_digest(secret: str) -> str:
    """What is stored of a credential: its SHA-256, lower-case hex."""
    return hashlib.sha256(secret.encode()).hexdigest()
