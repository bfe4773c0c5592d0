"""libvirt and the storage roots, as the steps of a move use them.

The steps name machines by UUID and migrations by id; the libvirt package works on
open connections and domains. This is the seam between the two: it lends a
connection for each operation, so that the next one finds libvirtd again after a
restart. Everything blocks; everything raises DroverError.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import libvirt

from hostd import inventory, preflight, preflight_facts
from hostd.config import HostdConfig
from hostd.disks import parked, parking
from hostd.disks.manifest import all_manifests, find_manifest
from hostd.disks.roots import StorageRoots
from hostd.inventory import HostSettings
from hostd.libvirt import build, domains, power
from hostd.libvirt.conn import LibvirtConnection
from hostd.libvirt.sharing import find_sharers
from hostd.preflight_model import Neighbour
from hostd.v1 import domain_pb2, host_pb2, host_service_pb2, preflight_pb2


class Hypervisor:
    """This host.

    Args:
        config: libvirt's URI, the storage roots and the state directory.

    Attributes:
        roots: The storage roots.
    """

    def __init__(self, config: HostdConfig) -> None:
        self._connection = LibvirtConnection(config.libvirt.uri)
        # A QEMU that hangs keeps the call that waits for it, and libvirt is slow to
        # answer others on the same connection meanwhile.
        self._buttons = LibvirtConnection(config.libvirt.uri)
        self._state_dir = config.state.directory
        self._settings = HostSettings(
            name=config.host,
            hostd_version=metadata.version("drover"),
            data_address=config.listen.data_address,
            reserved_memory_mib=config.limits.reserved_memory_mib,
        )
        self._last_facts: host_pb2.HostFacts | None = None
        self.roots = StorageRoots(config.storage.roots, config.storage.allowed_formats)

    def close(self) -> None:
        """Let go of libvirt."""
        self._connection.close()
        self._buttons.close()

    @contextmanager
    def _domain(self, domain_uuid: str) -> Iterator[libvirt.virDomain]:
        with self._connection.get(f"domains/{domain_uuid}") as connection:
            yield domains.find(connection, domain_uuid)

    # --- looking

    def inventory(self, reserved_bytes: Mapping[str, int]) -> host_pb2.Inventory:
        """Facts, domains and parked machines.

        While libvirt is away its last known facts are given, and no domains.
        """
        found = inventory.collect(
            self._connection,
            self.roots,
            self._settings,
            self._state_dir,
            reserved_bytes=reserved_bytes,
            previous=self._last_facts,
        )
        if found.facts.libvirt_connected:
            self._last_facts = found.facts
        return found

    def describe(self, domain_uuid: str) -> domain_pb2.Domain:
        """The machine, afresh from libvirt and its disks."""
        with self._domain(domain_uuid) as dom:
            return domains.describe(dom, self.roots)

    def volumes(self) -> list[domain_pb2.Volume]:
        """What all machines here have as disks, base images and media.

        Raises:
            DroverError: LIBVIRT_UNAVAILABLE.
        """
        with self._connection.get() as connection:
            described = domains.describe_all(connection, self.roots)
        return [volume for domain in described for volume in domain.volumes]

    def check_source(self, domain_uuid: str) -> preflight_pb2.PreflightReport:
        """Could the machine leave now."""
        with self._connection.get(f"domains/{domain_uuid}") as connection:
            return preflight_facts.check_source_now(connection, domain_uuid, self.roots)

    def check_target(
        self,
        machine: preflight_pb2.IncomingMachine,
        reserved_bytes: Mapping[str, int],
        own_files: Collection[Path] = (),
        coming: Sequence[Neighbour] = (),
    ) -> preflight_pb2.PreflightReport:
        """Could the machine live here now.

        Args:
            machine: The machine.
            reserved_bytes: Root name -> bytes that other moves have reserved.
            own_files: Files that its own move has created here.
            coming: Machines that other moves are bringing here.
        """
        aside = [
            Neighbour(
                manifest.domain_uuid,
                manifest.domain_name,
                places=frozenset(file.original for file in manifest.files),
                migration_id=manifest.migration_id,
            )
            for _, manifest in all_manifests(self.roots, self._state_dir)
            if manifest.domain_uuid != machine.domain.uuid
        ]
        facts = preflight_facts.gather_target(
            self._connection,
            self.roots,
            self._settings,
            machine,
            reserved_bytes=reserved_bytes,
            own_files=own_files,
            others=[*aside, *coming],
        )
        return preflight.check_target(machine, facts)

    def in_use_by_others(
        self, domain_uuid: str, paths: Sequence[Path], *, written: bool = False
    ) -> set[Path]:
        """Those of the files that a domain other than this one needs.

        Args:
            domain_uuid: The machine.
            paths: The files.
            written: Only those that another domain may write to.
        """
        with self._connection.get(f"domains/{domain_uuid}") as connection:
            sharers = find_sharers(connection, domain_uuid, paths, self.roots)
        return {sharer.path for sharer in sharers if sharer.writes or not written}

    def is_here(self, domain_uuid: str, disks: Sequence[domain_pb2.Volume]) -> bool:
        """True when libvirt knows the machine and these of its disks are where they belong."""
        with self._connection.get(f"domains/{domain_uuid}") as connection:
            if domains.try_find(connection, domain_uuid) is None:
                return False
        return all(
            disk.root in self.roots.names and (self.roots.directory(disk.root) / disk.name).exists()
            for disk in disks
        )

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
        with self._buttons.get(f"domains/{domain_uuid}") as connection:
            power.request_shutdown(domains.find(connection, domain_uuid))

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

    # --- setting aside

    def park(self, migration_id: str, domain_uuid: str) -> host_service_pb2.EnsureParkedResponse:
        """Undefine a machine that is off and move its files aside."""
        with self._connection.get(f"domains/{domain_uuid}") as connection:
            aside = parking.park(connection, domain_uuid, migration_id, self.roots, self._state_dir)
        return host_service_pb2.EnsureParkedResponse(
            volumes=aside.volumes,
            manifest_path=str(aside.manifest_path),
            report=preflight.check_parked(aside.volumes),
        )

    def unpark(self, migration_id: str, domain_uuid: str) -> None:
        """Put a machine back; nothing when it is not set aside."""
        with self._connection.get(f"domains/{domain_uuid}") as connection:
            parked.unpark(connection, migration_id, self.roots, self._state_dir)

    def discard_parked(self, migration_id: str) -> int:
        """Delete a machine that is set aside; returns the allocated bytes freed."""
        return parked.discard(migration_id, self.roots, self._state_dir)

    def is_parked(self, migration_id: str) -> bool:
        """True when there is a manifest of what the move set aside."""
        return find_manifest(migration_id, self.roots, self._state_dir) is not None

    def find_parked(self) -> list[host_pb2.ParkedMachine]:
        """Every machine that is set aside here."""
        return parked.find_parked(self.roots, self._state_dir)

    # --- building

    def build(self, order: build.BuildOrder) -> domain_pb2.Domain:
        """Define a machine from what arrived; nothing when that is done."""
        with self._connection.get(f"domains/{order.domain_uuid}") as connection:
            return build.build_domain(connection, order, self.roots, self._state_dir)

    def undefine_built(self, migration_id: str, domain_uuid: str) -> None:
        """Take away the definition that the move made here; disks and state are kept."""
        with self._connection.get(f"domains/{domain_uuid}") as connection:
            build.undefine_built(connection, domain_uuid, migration_id, self._state_dir)

    def remove_built(self, migration_id: str, domain_uuid: str) -> None:
        """Remove all but the disks of what the move made here."""
        with self._connection.get(f"domains/{domain_uuid}") as connection:
            build.remove_built(connection, domain_uuid, migration_id, self._state_dir)

    def give_autostart(self, migration_id: str, domain_uuid: str) -> None:
        """Let a machine that the move built start with this host, if it is to."""
        with self._connection.get(f"domains/{domain_uuid}") as connection:
            build.give_autostart(connection, domain_uuid, migration_id, self._state_dir)

    def forget_built(self, migration_id: str) -> None:
        """Drop what was noted of a build; the machine stays."""
        build.forget_built(migration_id, self._state_dir)
