"""What the steps of a move leave in its log for later steps: JSON with a schema, no secrets."""

from __future__ import annotations

import msgspec


class Prepared(msgspec.Struct, frozen=True):
    """Output of `prepare_target`.

    Attributes:
        data_identity: URI name in the certificate of the target's data port.
    """

    data_identity: str


class Stopped(msgspec.Struct, frozen=True):
    """Output of `stop`.

    Attributes:
        ran: True when the guest ran before.
        forced: True when it had to be powered off.
    """

    ran: bool
    forced: bool


class ParkedVolume(msgspec.Struct, frozen=True):
    """A volume to copy, by root and name; fields as in hostd.v1.Volume."""

    volume_id: str
    kind: int
    root: str
    name: str
    format: str
    size_bytes: int
    allocated_bytes: int
    virtual_size_bytes: int
    backing_volume_id: str
    read_only: bool


class Parked(msgspec.Struct, frozen=True):
    """Output of `park`.

    Attributes:
        volumes: What is to be copied, the baggage last.
    """

    volumes: list[ParkedVolume]


class Copied(msgspec.Struct, frozen=True):
    """Output of `copy`.

    Attributes:
        digests: Root digest of each volume, lower-case hex, by volume id.
    """

    digests: dict[str, str]
