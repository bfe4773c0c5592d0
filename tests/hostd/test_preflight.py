"""The judging of a target, with facts that no machine here has: KVM, other CPUs, bare hosts.

What real hosts lack is in test_trouble_on_target.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.common.reasons import Reason
from hostd.preflight import check_parked, check_target
from hostd.preflight_model import FAIL, WARN, Neighbour, Supplies, TargetFacts
from hostd.v1 import domain_pb2, preflight_pb2
from tests.controlplane.machines import GIB, make_domain, make_facts


def machine(**changes: Any) -> preflight_pb2.IncomingMachine:
    return preflight_pb2.IncomingMachine(domain=make_domain(**changes))


def facts(host: dict[str, Any] | None = None, **changes: Any) -> TargetFacts:
    return TargetFacts(host=make_facts("b", **(host or {})), **changes)


def outcomes(report: preflight_pb2.PreflightReport, outcome: int) -> list[tuple[str, str]]:
    return [(c.check, c.reason) for c in report.checks if c.outcome == outcome]


HostNeeds = domain_pb2.HostNeeds
ON_4K = {"vda": 4096}


def on_disk(size_bytes: int, format_: str = "raw", block_bytes: int = 0) -> Any:
    """A machine whose disk is used past the page cache."""
    volume = domain_pb2.Volume(
        volume_id="vda", kind=domain_pb2.VOLUME_KIND_DISK, root="images", name="web1",
        path="/images/web1", format=format_, size_bytes=size_bytes, direct_io=True,
        virtual_size_bytes=size_bytes, logical_block_bytes=block_bytes,
    )  # fmt: skip
    return machine(volumes=[volume])


def network(kind: str, source: str) -> list[domain_pb2.NetworkInterface]:
    return [domain_pb2.NetworkInterface(type=kind, source=source, mac_address="52:54:00:0:0:1")]


def test_a_host_that_has_everything_passes() -> None:
    report = check_target(machine(), facts())
    assert outcomes(report, FAIL) == []
    assert {c.check for c in report.checks} == {
        "libvirt", "uuid", "name", "mac", "virt-type", "machine-type", "cpu", "firmware", "tpm",
        "memory", "vcpus", "bridge", "network", "loader", "cpu-pins", "numa", "hugepages",
        "network-filter", "root", "target-file", "space", "direct-io", "time",
    }  # fmt: skip
    assert all(c.message for c in report.checks)


@pytest.mark.parametrize(
    ("incoming", "found", "check", "reason"),
    [
        (machine(), facts(cpu_fits=False), "cpu", Reason.TARGET_LACKS_CPU_FEATURE),
        (machine(), facts({"virt_types": ["qemu"]}), "virt-type", Reason.TARGET_LACKS_VIRT_TYPE),
        (machine(), facts({"arch": "aarch64"}), "virt-type", Reason.TARGET_LACKS_VIRT_TYPE),
        (
            machine(),
            facts({"machine_types": ["pc"]}),
            "machine-type",
            Reason.TARGET_LACKS_MACHINE_TYPE,
        ),
        (machine(firmware="efi"), facts(), "firmware", Reason.TARGET_LACKS_FIRMWARE),
        (machine(has_tpm=True), facts(), "tpm", Reason.TARGET_LACKS_TPM),
        (machine(memory_mib=1 << 20), facts(), "memory", Reason.TARGET_LACKS_MEMORY),
        (
            machine(memory_mib=16000),
            facts({"reserved_memory_mib": 1024}),
            "memory",
            Reason.TARGET_LACKS_MEMORY,
        ),
        (machine(vcpus=300), facts(max_vcpus=288), "vcpus", Reason.TARGET_LACKS_CPUS),
        (
            machine(interfaces=network("direct", "eth7")),
            facts(),
            "bridge",
            Reason.TARGET_LACKS_BRIDGE,
        ),
        (
            machine(interfaces=network("network", "lan")),
            facts(),
            "network",
            Reason.TARGET_LACKS_NETWORK,
        ),
        (
            machine(host_needs=HostNeeds(loader_path="/x.fd")),
            facts(supplies=Supplies(loader_problem="The firmware image /x.fd is not here.")),
            "loader",
            Reason.TARGET_LACKS_FIRMWARE,
        ),
        (
            machine(host_needs=HostNeeds(cpus=[0, 8, 9])),
            facts(supplies=Supplies(cpus=frozenset(range(8)))),
            "cpu-pins",
            Reason.TARGET_LACKS_PINNED_CPUS,
        ),
        (
            machine(host_needs=HostNeeds(numa_nodes=[1])),
            facts(supplies=Supplies(numa_nodes=frozenset({0}))),
            "numa",
            Reason.TARGET_LACKS_NUMA_NODE,
        ),
        (
            machine(host_needs=HostNeeds(hugepage_kib=[1 << 20])),
            facts(supplies=Supplies(hugepages={4: 1 << 20, 2048: 1 << 20})),
            "hugepages",
            Reason.TARGET_LACKS_HUGEPAGES,
        ),
        (
            machine(host_needs=HostNeeds(hugepage_kib=[0]), memory_mib=64),
            facts(supplies=Supplies(hugepages={4: 1 << 20, 2048: 31}, default_hugepage_kib=2048)),
            "hugepages",
            Reason.TARGET_LACKS_HUGEPAGES,
        ),
        (
            machine(host_needs=HostNeeds(hugepage_kib=[0])),
            facts(supplies=Supplies(hugepages={4: 1 << 20})),
            "hugepages",
            Reason.TARGET_LACKS_HUGEPAGES,
        ),
        (
            machine(host_needs=HostNeeds(network_filters=["clean-traffic", "own"])),
            facts(supplies=Supplies(network_filters=frozenset({"clean-traffic"}))),
            "network-filter",
            Reason.TARGET_LACKS_NETWORK_FILTER,
        ),
        (
            on_disk(GIB + 512, block_bytes=4096),
            facts(direct_io_bytes=ON_4K),
            "direct-io",
            Reason.TARGET_LACKS_SMALL_BLOCKS,
        ),
        (machine(), facts({"roots": []}), "root", Reason.TARGET_LACKS_ROOT),
        (
            machine(),
            facts(neighbours=(Neighbour(make_domain().uuid, "twin"),)),
            "uuid",
            Reason.TARGET_UUID_TAKEN,
        ),
        (machine(), facts(occupied={"vda": "/x"}), "target-file", Reason.TARGET_FILE_EXISTS),
        (machine(), facts(misplaced={"vda": "Why."}), "target-file", Reason.DISK_OUTSIDE_ROOTS),
    ],
)
def test_what_a_host_lacks_fails_its_own_check_alone(
    incoming: preflight_pb2.IncomingMachine, found: TargetFacts, check: str, reason: Reason
) -> None:
    report = check_target(incoming, found)
    assert outcomes(report, FAIL) == [(check, reason.name)]
    failed = next(c for c in report.checks if c.outcome == FAIL)
    assert failed.message.endswith(".")
    assert failed.fix


@pytest.mark.parametrize(
    ("incoming", "found", "check"),
    [
        (machine(cpu_mode="host-passthrough"), facts(), "cpu"),
        (machine(cpu_xml="<cpu/>"), facts(), "cpu"),
        (machine(virt_type="qemu"), facts(cpu_fits=False), "cpu"),
        (machine(vcpus=9), facts(), "vcpus"),
        (machine(), facts(clock_synchronised=False), "time"),
        (on_disk(GIB), facts(direct_io_bytes=ON_4K), "direct-io"),
        (on_disk(GIB - 100), facts(direct_io_bytes=ON_4K), "direct-io"),
        (on_disk(GIB + 512, "qcow2"), facts(direct_io_bytes=ON_4K), "direct-io"),
        (machine(host_needs=HostNeeds(cpus=[0])), facts(), "cpu-pins"),
        (machine(host_needs=HostNeeds(numa_nodes=[0])), facts(), "numa"),
        (machine(host_needs=HostNeeds(hugepage_kib=[2048])), facts(), "hugepages"),
        (machine(host_needs=HostNeeds(network_filters=["own"])), facts(), "network-filter"),
    ],
)
def test_what_may_do_harm_is_a_warning_and_no_refusal(
    incoming: preflight_pb2.IncomingMachine, found: TargetFacts, check: str
) -> None:
    report = check_target(incoming, found)
    assert outcomes(report, FAIL) == []
    assert [name for name, _ in outcomes(report, WARN)] == [check]


def test_what_the_definition_takes_from_its_host_passes_where_it_is() -> None:
    needs = HostNeeds(
        loader_path="/usr/share/x.fd", cpus=[0, 1, 3], numa_nodes=[0], hugepage_kib=[0],
        network_filters=["own"],
    )  # fmt: skip
    supplies = Supplies(
        cpus=frozenset(range(4)),
        numa_nodes=frozenset({0}),
        hugepages={4: 0, 2048: 32},
        default_hugepage_kib=2048,
        network_filters=frozenset({"own"}),
    )
    report = check_target(machine(host_needs=needs, memory_mib=64), facts(supplies=supplies))
    assert outcomes(report, FAIL) == outcomes(report, WARN) == []
    pins = next(check for check in report.checks if check.check == "cpu-pins")
    assert "0-1, 3" in pins.message


@pytest.mark.parametrize(
    ("incoming", "units"),
    [
        (on_disk(GIB + 512), {}),
        (on_disk(GIB + 512), {"vda": 512}),
        (on_disk(GIB, block_bytes=4096), ON_4K),
    ],
)
def test_direct_io_passes_where_it_works(incoming: Any, units: dict[str, int]) -> None:
    report = check_target(incoming, facts(direct_io_bytes=units))
    assert outcomes(report, FAIL) == outcomes(report, WARN) == []


def test_a_resize_counts_for_the_end_of_a_raw_disk() -> None:
    incoming = on_disk(GIB + 512, block_bytes=4096)
    incoming.size.root_disk_bytes = 2 * GIB
    assert outcomes(check_target(incoming, facts(direct_io_bytes=ON_4K)), FAIL) == []
    incoming.size.root_disk_bytes = 2 * GIB + 512
    assert outcomes(check_target(incoming, facts(direct_io_bytes=ON_4K)), FAIL) == [
        ("direct-io", Reason.TARGET_LACKS_SMALL_BLOCKS.name)
    ]


def test_a_resize_counts_for_huge_pages() -> None:
    incoming = machine(host_needs=HostNeeds(hugepage_kib=[2048]), memory_mib=64)
    incoming.size.memory_mib = 128
    found = facts(supplies=Supplies(hugepages={2048: 32}))
    assert ("hugepages", "TARGET_LACKS_HUGEPAGES") in outcomes(check_target(incoming, found), FAIL)


def test_disks_that_may_outgrow_the_host_are_a_warning() -> None:
    small = make_facts().roots[0]
    small.available_bytes = 5 * GIB
    assert outcomes(check_target(machine(), facts({"roots": [small]})), WARN) == [("space", "")]


def test_while_libvirt_is_away_only_what_does_not_need_it_is_judged() -> None:
    away = facts({"libvirt_connected": False, "machine_types": [], "bridges": []})
    report = check_target(machine(), away)
    assert outcomes(report, FAIL) == [
        ("libvirt", Reason.LIBVIRT_UNAVAILABLE.name),
        ("bridge", Reason.TARGET_LACKS_BRIDGE.name),
    ]


def test_what_was_not_closed_is_a_warning_with_who_repairs_it() -> None:
    disk = domain_pb2.Volume(volume_id="vda", path="/images/web1.qcow2", unclean=True)
    base = domain_pb2.Volume(volume_id="vda.backing1", path="/b", unclean=True, read_only=True)
    report = check_parked([disk, base, domain_pb2.Volume(volume_id="vdb")])
    assert outcomes(report, WARN) == [("disk-closed", "")] * 2
    assert [c.message.endswith("repairs it when the guest starts.") for c in report.checks] == [
        True,
        False,
    ]
    assert all(check.fix for check in report.checks)
    assert outcomes(check_parked([domain_pb2.Volume(volume_id="vdb")]), WARN) == []
