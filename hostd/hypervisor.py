"""libvirt and the storage roots, as the steps of a move use them.

The steps name machines by UUID and migrations by id; the libvirt package works on
open connections and domains. This is the seam between the two: it lends a
connection for each operation, so that the next one finds libvirtd again after a
restart. Everything blocks; everything raises DroverError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import libvirt

from hostd.config import HostdConfig
from hostd.libvirt import power
from hostd.libvirt.conn import LibvirtConnection
from hostd.v1 import domain_pb2


class Hypervisor:
    """This host.

    Args:
        config: libvirt's URI and the storage roots.
    """

    def __init__(self, config: HostdConfig) -> None:
        self._connection = LibvirtConnection(config.libvirt.uri)

    def close(self) -> None:
        """Let go of libvirt."""
        self._connection.close()

    @contextmanager
    def _domain(self, domain_uuid: str) -> Iterator[libvirt.virDomain]:
        with self._connection.get(f"domains/{domain_uuid}") as connection:
            yield connection.lookupByUUIDString(domain_uuid)

    # --- power

    def state(self, domain_uuid: str) -> domain_pb2.PowerState.ValueType:
        """What the machine does."""
        with self._domain(domain_uuid) as dom:
            return power.power_state(dom)

    def went_off_by_itself(self, domain_uuid: str) -> bool:
        """True when it is off because the guest shut itself down."""
        with self._domain(domain_uuid) as dom:
            return power.went_off_by_itself(dom)

    def request_shutdown(self, domain_uuid: str) -> None:
        """Press the ACPI power button; does nothing when it is off."""
        with self._domain(domain_uuid) as dom:
            power.request_shutdown(dom)

    def power_off(self, domain_uuid: str) -> None:
        """Pull the plug; does nothing when it is off."""
        with self._domain(domain_uuid) as dom:
            power.force_off(dom)

    def start(self, domain_uuid: str) -> None:
        """Power it on; does nothing when it runs."""
        with self._domain(domain_uuid) as dom:
            power.start(dom)

    def sync_time(self, domain_uuid: str) -> bool:
        """Give the guest the host's time; True when its agent took it."""
        with self._domain(domain_uuid) as dom:
            return power.sync_time(dom)
