"""What stopping and guarding a machine needs of the hypervisor."""

from __future__ import annotations

from typing import Protocol, TypeAlias

from hostd.v1 import domain_pb2

PowerState: TypeAlias = domain_pb2.PowerState.ValueType
RUNNING = domain_pb2.POWER_STATE_RUNNING
SHUTOFF = domain_pb2.POWER_STATE_SHUTOFF
CHANGING = domain_pb2.POWER_STATE_CHANGING


class Power(Protocol):
    """Power of machines by UUID; everything blocks.

    Every method raises DroverError: DOMAIN_NOT_FOUND, LIBVIRT_UNAVAILABLE, or what
    the operation met.
    """

    def state(self, domain_uuid: str) -> PowerState:
        """What the machine does."""
        ...

    def went_off_by_itself(self, domain_uuid: str) -> bool:
        """True when it is off because the guest shut itself down."""
        ...

    def request_shutdown(self, domain_uuid: str) -> None:
        """Press the ACPI power button; does nothing when it is off."""
        ...

    def power_off(self, domain_uuid: str) -> None:
        """Pull the plug; does nothing when it is off."""
        ...

    def start(self, domain_uuid: str) -> None:
        """Power it on; does nothing when it runs."""
        ...
