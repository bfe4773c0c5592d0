"""A target whose storage has larger blocks than a disk needs: said before anything is copied.

Row 34 of the nasty cases of disk movers; that the real QEMU refuses what is refused
here is in tests/hostd/disks/test_direct_io.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.v1 import host_service_pb2 as pb
from hostd.v1 import preflight_pb2
from tests.hostd.fleet import Guest, HostdHost, Move, TwoHosts
from tests.hostd.tiny import define, emptied
from tests.hostd.unchanged import both_unchanged
from tests.lab.host import IMAGES
from tests.support.filesystems import loop_device

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_left(fleet: TwoHosts) -> Iterator[None]:
    with emptied(fleet):
        yield


@contextmanager
def large_blocks(host: HostdHost, directory: Path) -> Iterator[None]:
    """The storage root of a host lies on a device with blocks of 4096 bytes."""
    with loop_device(directory / "4k.img", 64 * MIB, 4096) as device:
        host.host.run("mkfs.ext4", "-q", device)
        host.host.run("mount", device, IMAGES)
        try:
            yield
        finally:
            host.host.run("umount", IMAGES)


def with_disk(host: HostdHost, size_bytes: int, cache: str, more: str = "") -> Guest:
    """A machine with a raw disk of a size."""
    host.host.run("truncate", "-s", str(size_bytes), f"{IMAGES}/odd.raw")
    return define(
        host,
        "odd",
        f"<disk type='file' device='disk'><driver name='qemu' type='raw' cache='{cache}'/>"
        f"<source file='{IMAGES}/odd.raw'/><target dev='vda' bus='virtio'/>{more}</disk>",
    )


def check_of(fleet: TwoHosts, guest: Guest) -> preflight_pb2.PreflightCheck:
    domain = fleet["a"].client(pb.GetDomainRequest(domain_uuid=guest.uuid))
    machine = preflight_pb2.IncomingMachine(domain=domain)
    report = fleet["b"].client(pb.CheckTargetRequest(machine=machine))
    (check,) = (check for check in report.checks if check.check == "direct-io")
    found: preflight_pb2.PreflightCheck = check
    return found


def test_a_raw_disk_that_ends_within_a_block_is_refused(fleet: TwoHosts, tmp_path: Path) -> None:
    guest = with_disk(fleet["a"], MIB + 512, "none")
    with large_blocks(fleet["b"], tmp_path), both_unchanged(fleet):
        check = check_of(fleet, guest)
        assert check.reason == Reason.TARGET_LACKS_SMALL_BLOCKS.name
        assert "units of 4096 bytes" in check.message
        assert check.fix.endswith(f"qemu-img resize -f raw {IMAGES}/odd.raw {MIB + 4096}")
        with pytest.raises(DroverError) as refused:
            Move(fleet["a"], fleet["b"], guest.uuid).prepare()
        assert refused.value.reason is Reason.TARGET_LACKS_SMALL_BLOCKS


@pytest.mark.parametrize(
    ("size_bytes", "cache", "more", "outcome"),
    [
        (MIB, "none", "", preflight_pb2.PreflightCheck.OUTCOME_WARN),
        (
            MIB,
            "none",
            "<blockio logical_block_size='4096' physical_block_size='4096'/>",
            preflight_pb2.PreflightCheck.OUTCOME_PASS,
        ),
        (MIB + 512, "writeback", "", preflight_pb2.PreflightCheck.OUTCOME_PASS),
    ],
    ids=["small blocks", "large blocks", "page cache"],
)
def test_one_that_only_gets_slower_is_warned_of(
    fleet: TwoHosts,
    tmp_path: Path,
    size_bytes: int,
    cache: str,
    more: str,
    outcome: preflight_pb2.PreflightCheck.Outcome.ValueType,
) -> None:
    guest = with_disk(fleet["a"], size_bytes, cache, more)
    with large_blocks(fleet["b"], tmp_path):
        assert check_of(fleet, guest).outcome == outcome
