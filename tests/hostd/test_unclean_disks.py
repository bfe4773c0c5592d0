"""Disks that were not closed: they move as they are, and somebody is told.

Row 37 of the nasty cases of disk movers.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from hostd.v1 import host_service_pb2 as pb
from tests.hostd.fleet import Guest, HostdHost, Mode, Move, TwoHosts
from tests.hostd.tiny import define, disk, emptied
from tests.lab.host import IMAGES
from tests.lab.wait import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

NAME = "late"
DISK = f"{IMAGES}/{NAME}.qcow2"


@pytest.fixture(autouse=True)
def nothing_left(fleet: TwoHosts) -> Iterator[None]:
    with emptied(fleet):
        yield


@pytest.fixture
def late(fleet: TwoHosts) -> Guest:
    """A machine on `a` whose reference counts are written when its disk is closed."""
    host = fleet["a"].host
    host.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", DISK, "4M")
    host.run("qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 64k", DISK)
    return define(fleet["a"], NAME, disk(f"{NAME}.qcow2"))


def crash(host: HostdHost) -> None:
    """Leave the disk as a QEMU does that dies in its work."""
    work = "-c 'write -q -P 8 1M 64k' -c abort"
    host.host.run("sh", "-c", f"ulimit -c 0; ! qemu-io -f qcow2 {work} {DISK} 2>/dev/null")


def warnings(report: Any) -> list[str]:
    return [c.message for c in report.checks if c.check == "disk-closed" and c.outcome == 2]


def source_warnings(host: HostdHost, guest: Guest) -> list[str]:
    return warnings(host.client(pb.CheckSourceRequest(domain_uuid=guest.uuid)))


def test_it_moves_as_it_is_and_a_warning_comes_with_it(fleet: TwoHosts, late: Guest) -> None:
    a, b = fleet["a"], fleet["b"]
    assert source_warnings(a, late) == [], "it was closed"
    crash(a)
    before = a.host.path(DISK).read_bytes()
    (said,) = source_warnings(a, late)
    assert f"({DISK})" in said
    assert "was not closed cleanly" in said
    move = Move(a, b, late.uuid)
    move.prepare()
    move.stop(Mode.MODE_GRACEFUL)
    (said,) = warnings(move.park().report)
    assert "was not closed cleanly" in said
    (receipt,) = (r for r in move.copy().receipts if r.volume_id == "vda")
    move.build()
    assert receipt.allocated_bytes == b.host.path(DISK).stat().st_blocks * 512
    assert b.host.path(DISK).read_bytes() == before, "the mark went, or more"
    (volume,) = b.client(pb.GetDomainRequest(domain_uuid=late.uuid)).volumes
    assert volume.unclean
    move.confirm()
    b.host.virsh("start", late.uuid)
    wait_for(lambda: b.host.state(NAME) == "running", "it runs where it went")
    b.host.virsh("destroy", late.uuid)
    b.host.run("qemu-img", "check", "-q", "-f", "qcow2", DISK)
    b.host.run("qemu-io", "-f", "qcow2", "-c", "read -q -P 8 1M 64k", DISK)


def test_a_running_machine_is_warned_of_only_when_it_did_not_end_well(
    fleet: TwoHosts, late: Guest
) -> None:
    a, b = fleet["a"], fleet["b"]
    a.host.virsh("start", late.uuid)
    backend = "/machine/peripheral/virtio-disk0/virtio-backend"
    a.host.virsh(
        "qemu-monitor-command", "--hmp", late.uuid, f'qemu-io -d {backend} "write -q 2M 64k"'
    )
    (volume,) = a.client(pb.GetDomainRequest(domain_uuid=late.uuid)).volumes
    assert volume.unclean, "as it should be while it runs"
    assert source_warnings(a, late) == []
    move = Move(a, b, late.uuid)
    move.prepare()
    os.kill(int(a.host.path(f"/run/libvirt/qemu/{NAME}.pid").read_text()), signal.SIGKILL)
    wait_for(lambda: a.host.state(NAME) == "shut off", "it is off")
    move.stop(Mode.MODE_GRACEFUL)
    (said,) = warnings(move.park().report)
    assert "was not closed cleanly" in said
    move.undo()
