"""The inventory that the control plane gets: what libvirt says, and whose move is here."""

from __future__ import annotations

from hostd.hypervisor import Hypervisor
from hostd.incoming import IncomingFiles
from hostd.records import Records
from hostd.v1 import host_pb2


def take_inventory(
    hypervisor: Hypervisor, records: Records, files: IncomingFiles
) -> host_pb2.Inventory:
    """Everything on this host; with the last known libvirt facts while libvirt is away."""
    inventory = hypervisor.inventory(files.reserved_bytes())
    moving = {record.domain_uuid: record.migration_id for record in records.targets()}
    for domain in inventory.domains:
        domain.migration_id = moving.get(domain.uuid, "")
    return inventory
