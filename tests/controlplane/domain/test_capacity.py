from __future__ import annotations

from controlplane.domain.capacity import limits_of, needed_by_root, needed_bytes, root_disk
from controlplane.domain.model import Ratios, Size
from hostd.v1 import domain_pb2, host_pb2
from tests.controlplane.machines import GIB, make_domain, make_facts


def test_limits_apply_ratios_and_leave_out_what_the_host_keeps() -> None:
    facts = make_facts(reserved_memory_mib=384)
    assert limits_of(facts, Ratios(cpu=4.0, memory=1.0)) == Size(
        vcpus=32, memory_mib=16000, disk_bytes=80 * GIB
    )


def test_roots_on_one_file_system_are_counted_once() -> None:
    def root(name: str, free: int, device: int) -> host_pb2.StorageRoot:
        return host_pb2.StorageRoot(name=name, available_bytes=free, device_id=device)

    facts = make_facts(roots=[root("x", 10, 1), root("y", 9, 1), root("z", 5, 2)])
    assert limits_of(facts, Ratios()).disk_bytes == 14


def test_a_machine_needs_what_its_volumes_have_allocated() -> None:
    domain = make_domain()
    domain.volumes.add(root="fast", allocated_bytes=5, size_bytes=50)
    assert needed_by_root(domain) == {"images": 2 * GIB, "fast": 5}
    assert needed_bytes(domain) == 2 * GIB + 5


def test_the_root_disk_is_the_first_writable_one() -> None:
    domain = make_domain(volumes=[])
    assert root_disk(domain) is None
    domain.volumes.add(volume_id="sda", kind=domain_pb2.VOLUME_KIND_MEDIUM)
    domain.volumes.add(volume_id="vda", kind=domain_pb2.VOLUME_KIND_DISK)
    found = root_disk(domain)
    assert found is not None
    assert found.volume_id == "vda"
