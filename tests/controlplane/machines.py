"""Machines, hosts and moves for tests."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

from controlplane.domain.model import Host, Instance
from controlplane.domain.states import HostState, PowerState, VmState
from hostd.v1 import domain_pb2, host_pb2

GIB = 1024**3
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def make_domain(name: str = "web1", **changes: Any) -> domain_pb2.Domain:
    """A running machine with one qcow2 disk of 10 GiB, 2 GiB of it allocated."""
    values: dict[str, Any] = {
        "uuid": str(uuid.uuid5(uuid.NAMESPACE_DNS, name)),
        "name": name,
        "power_state": domain_pb2.POWER_STATE_RUNNING,
        "persistent": True,
        "vcpus": 2,
        "memory_mib": 1024,
        "virt_type": "kvm",
        "arch": "x86_64",
        "machine_type": "pc-q35-7.2",
        "firmware": "bios",
        "disk_size_bytes": 2 * GIB,
        "volumes": [
            domain_pb2.Volume(
                volume_id="vda",
                kind=domain_pb2.VOLUME_KIND_DISK,
                root="images",
                name=f"{name}.qcow2",
                format="qcow2",
                size_bytes=2 * GIB,
                allocated_bytes=2 * GIB,
                virtual_size_bytes=10 * GIB,
            )
        ],
        "interfaces": [
            domain_pb2.NetworkInterface(
                mac_address=f"52:54:00:{abs(hash_of(name)) % 256:02x}:00:01",
                type="bridge",
                source="br0",
            )
        ],
    }
    return domain_pb2.Domain(**(values | changes))


def hash_of(name: str) -> int:
    """A small number that is the same in every process."""
    return sum(name.encode())


def make_facts(name: str = "b", **changes: Any) -> host_pb2.HostFacts:
    """A host with 8 CPUs, 16 GiB of memory and 100 GiB of disk."""
    values: dict[str, Any] = {
        "name": name,
        "arch": "x86_64",
        "cpus": 8,
        "memory_mib": 16384,
        "virt_types": ["kvm", "qemu"],
        "machine_types": ["pc-q35-7.2", "q35"],
        "firmwares": ["bios"],
        "bridges": ["br0"],
        "roots": [
            host_pb2.StorageRoot(
                name="images",
                path="/images",
                capacity_bytes=100 * GIB,
                available_bytes=80 * GIB,
                device_id=7,
            )
        ],
        "data_address": "127.0.0.1:7443",
        "libvirt_connected": True,
    }
    return host_pb2.HostFacts(**(values | changes))


def make_instance(domain: domain_pb2.Domain | None = None, **changes: Any) -> Instance:
    """An idle instance of a machine on host a."""
    domain = domain or make_domain()
    values: dict[str, Any] = {
        "uid": domain.uuid,
        "name": domain.name,
        "host": "a",
        "vm_state": VmState.ACTIVE,
        "task_state": None,
        "power_state": PowerState.from_number(domain.power_state),
        "project": "default",
        "vcpus": domain.vcpus,
        "memory_mib": domain.memory_mib,
        "disk_size_bytes": domain.disk_size_bytes,
        "flavor": "",
        "migration_id": "",
        "lock_reason": "",
        "locked_by": "",
        "conflict": "",
        "description": domain,
        "released": False,
        "generation": 1,
        "create_time": NOW,
        "update_time": NOW,
    }
    return Instance(**(values | changes))


def make_host(name: str = "a", **changes: Any) -> Host:
    """A host that is enabled and has just answered."""
    values: dict[str, Any] = {
        "name": name,
        "uid": str(uuid.uuid5(uuid.NAMESPACE_DNS, name)),
        "state": HostState.ENABLED,
        "state_reason": "",
        "address": "127.0.0.1:7442",
        "adopt_domains": True,
        "certificate_sha256": "",
        "generation": 1,
        "create_time": NOW,
        "update_time": NOW,
        "facts": make_facts(name),
        "last_seen": NOW,
        "last_error": "",
    }
    return Host(**(values | changes))
