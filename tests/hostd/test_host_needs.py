"""What a definition takes from its host by number, size or name, on two real hosts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.v1 import host_service_pb2 as pb
from hostd.v1 import preflight_pb2
from tests.hostd.fleet import Guest, HostdHost, Mode, Move, TwoHosts
from tests.hostd.tiny import define, disk, emptied, make_image
from tests.hostd.unchanged import both_unchanged

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

LOADER = "/usr/share/OVMF/OVMF_CODE_4M.fd"
FILTER = "<filter name='own-rules'><rule action='accept' direction='inout'/></filter>"
CARD = "<interface type='bridge'><source bridge='br0'/><filterref filter='own-rules'/></interface>"
ACPI = "<features><acpi/></features>"


@pytest.fixture(autouse=True)
def nothing_left(fleet: TwoHosts) -> Iterator[None]:
    with emptied(fleet):
        yield


def guest_on_a(fleet: TwoHosts, *, head: str = "", devices: str = "", os_: str = "") -> Guest:
    make_image(fleet["a"], "web.qcow2")
    return define(fleet["a"], "web", disk("web.qcow2") + devices, head=head, os_=os_)


def failed_on_b(fleet: TwoHosts, guest: Guest) -> dict[str, tuple[str, str]]:
    """Check -> reason and message of what fails on `b`."""
    domain = fleet["a"].client(pb.GetDomainRequest(domain_uuid=guest.uuid))
    machine = preflight_pb2.IncomingMachine(domain=domain)
    report = fleet["b"].client(pb.CheckTargetRequest(machine=machine))
    return {c.check: (c.reason, c.message) for c in report.checks if c.outcome == c.OUTCOME_FAIL}


@contextmanager
def network_filter(host: HostdHost) -> Iterator[None]:
    file = host.host.path("/run/filter.xml")
    file.write_text(FILTER)
    host.host.virsh("nwfilter-define", "/run/filter.xml")
    file.unlink()
    yield
    host.host.virsh("nwfilter-undefine", "own-rules")


def test_what_the_target_lacks_is_found_before_anything_is_stopped(fleet: TwoHosts) -> None:
    head = (
        "<memoryBacking><hugepages><page size='16' unit='GiB'/></hugepages></memoryBacking>"
        "<cputune><vcpupin vcpu='0' cpuset='0,4001'/><emulatorpin cpuset='4001-4002'/></cputune>"
        "<numatune><memory mode='preferred' nodeset='0'/></numatune>"
    )
    with network_filter(fleet["a"]):
        guest = guest_on_a(fleet, head=head, devices=CARD)
    with both_unchanged(fleet):
        found = failed_on_b(fleet, guest)
        assert {check: reason for check, (reason, _) in found.items()} == {
            "cpu-pins": "TARGET_LACKS_PINNED_CPUS",
            "hugepages": "TARGET_LACKS_HUGEPAGES",
            "network-filter": "TARGET_LACKS_NETWORK_FILTER",
        }
        assert "4001-4002" in found["cpu-pins"][1]
        assert f"{16 << 20} KiB" in found["hugepages"][1]
        assert "own-rules" in found["network-filter"][1]
        with pytest.raises(DroverError) as refused:
            Move(fleet["a"], fleet["b"], guest.uuid).prepare()
        assert refused.value.reason is Reason.TARGET_LACKS_PINNED_CPUS
    with network_filter(fleet["b"]):
        assert "network-filter" not in failed_on_b(fleet, guest)


def test_memory_bound_to_a_node_that_is_not_there(fleet: TwoHosts) -> None:
    guest = guest_on_a(fleet, head="<numatune><memory mode='strict' nodeset='0,7'/></numatune>")
    reason, message = failed_on_b(fleet, guest)["numa"]
    assert reason == "TARGET_LACKS_NUMA_NODE"
    assert "node 7; here are 0" in message


def test_a_firmware_image_that_only_the_source_has(fleet: TwoHosts) -> None:
    loader = f"<loader readonly='yes' type='pflash'>{LOADER}</loader>"
    guest = guest_on_a(fleet, head=ACPI, os_=loader)
    assert failed_on_b(fleet, guest) == {}
    b = fleet["b"].host
    b.run("mount", "-t", "tmpfs", "tmpfs", "/usr/share/OVMF")
    try:
        reason, message = failed_on_b(fleet, guest)["loader"]
    finally:
        b.run("umount", "/usr/share/OVMF")
    assert reason == "TARGET_LACKS_FIRMWARE"
    assert LOADER in message


def test_a_file_of_the_target_is_no_firmware_image(fleet: TwoHosts) -> None:
    """The path is named by another host, and what lies there would be shown to the guest."""
    guest = guest_on_a(fleet, os_="<loader readonly='yes' type='rom'>/etc/hostname</loader>")
    reason, message = failed_on_b(fleet, guest)["loader"]
    assert reason == "TARGET_LACKS_FIRMWARE"
    assert "/etc/hostname is none of the firmware images" in message


def test_another_firmware_image_than_was_announced_is_not_built(fleet: TwoHosts) -> None:
    """The definition is changed after the target has judged it."""
    loader = f"<loader readonly='yes' type='pflash'>{LOADER}</loader>"
    guest = guest_on_a(fleet, head=ACPI, os_=loader)
    move = Move(fleet["a"], fleet["b"], guest.uuid)
    move.prepare()
    xml = fleet["a"].host.virsh("dumpxml", "--inactive", guest.uuid)
    file = fleet["a"].host.path("/run/other.xml")
    file.write_text(xml.replace(LOADER, "/etc/hostname"))
    fleet["a"].host.virsh("define", "/run/other.xml")
    file.unlink()
    move.stop(Mode.MODE_GRACEFUL)
    move.park()
    move.copy()
    with pytest.raises(DroverError) as refused:
        move.build()
    assert refused.value.reason is Reason.BUILD_FAILED
    assert "its firmware image is /etc/hostname" in refused.value.message
    move.undo()
