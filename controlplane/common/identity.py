"""Who is at the other end: the URI name in a certificate.

A certificate of the fleet carries exactly one URI subject alternative name:

    drover://FLEET/ROLE/NAME
    drover://FLEET/member/NAME/PROJECT

ROLE is one of the `Role` values. Certificates of another authority may carry
other URIs (SPIFFE ids, say); the configuration maps those to the same form.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

SCHEME = "drover"
_NAME = r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?"
NAME_PATTERN = re.compile(_NAME)
_URI = re.compile(
    rf"{SCHEME}://(?P<fleet>{_NAME})/(?P<role>[a-z]+)/(?P<name>{_NAME})(/(?P<project>{_NAME}))?"
)


class Role(StrEnum):
    """What a certificate's holder is to the fleet."""

    VIEWER = "viewer"
    MEMBER = "member"
    OPERATOR = "operator"
    ADMIN = "admin"
    HOST = "host"
    CONTROLPLANE = "controlplane"


@dataclass(frozen=True)
class Identity:
    """A parsed URI name.

    Attributes:
        fleet: Name of the fleet.
        role: What the holder is.
        name: Name of the person, host or replica.
        project: Project of a member; empty for every other role.
    """

    fleet: str
    role: Role
    name: str
    project: str = ""

    @property
    def uri(self) -> str:
        """The URI name."""
        tail = f"/{self.project}" if self.project else ""
        return f"{SCHEME}://{self.fleet}/{self.role.value}/{self.name}{tail}"

    @property
    def dns_name(self) -> str:
        """The DNS name that stands for the identity in the same certificate.

        gRPC clients verify servers by DNS name only; they ask for this one, so
        that it does not matter at which address the server is reached.
        """
        return f"{self.name}.{self.role.value}.{self.fleet}.drover.internal"

    def __str__(self) -> str:
        return self.uri

    @classmethod
    def parse(cls, uri: str) -> Identity:
        """Parse a URI name.

        Raises:
            ValueError: It is not of the form above.
        """
        match = _URI.fullmatch(uri)
        if match is None:
            raise ValueError(f"{uri!r} is not of the form drover://FLEET/ROLE/NAME")
        try:
            role = Role(match["role"])
        except ValueError:
            raise ValueError(f"{uri!r} has no known role") from None
        project = match["project"] or ""
        if bool(project) != (role is Role.MEMBER):
            raise ValueError(f"{uri!r}: a project goes with the role member, and only with it")
        return cls(match["fleet"], role, match["name"], project)


def host_identity(fleet: str, host: str) -> Identity:
    """The identity of a host's hostd and of its data port."""
    return Identity(fleet, Role.HOST, host)
