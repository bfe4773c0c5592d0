"""A target that is asked to allocate the disks of a machine before they come."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.v1 import host_service_pb2 as pb
from hostd.v1 import preflight_pb2
from tests.hostd.fleet import Guest, HostdHost, Mode, Move, TwoHosts
from tests.hostd.tiny import define, disk, emptied, make_image
from tests.hostd.unchanged import both_unchanged
from tests.lab.host import IMAGES

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

MIB = 1 << 20
NAMES = ("sparse.raw", "second.raw")
SIZE = 12 * MIB


@pytest.fixture(autouse=True)
def nothing_left(fleet: TwoHosts) -> Iterator[None]:
    with emptied(fleet):
        yield


@pytest.fixture
def sparse_guest(fleet: TwoHosts) -> Guest:
    """A machine on `a` that is off; its two raw disks of 12 MiB have 64 KiB of data each."""
    disks = []
    for name, target in zip(NAMES, ("vda", "vdb"), strict=True):
        make_image(fleet["a"], name, format_="raw")
        fleet["a"].host.run("truncate", "-s", str(SIZE), f"{IMAGES}/{name}")
        disks.append(disk(name, target, format_="raw"))
    return define(fleet["a"], "sparse", "".join(disks))


def request(fleet: TwoHosts, move: Move) -> pb.PrepareTargetRequest:
    domain = fleet["a"].client(pb.GetDomainRequest(domain_uuid=move.uuid))
    machine = preflight_pb2.IncomingMachine(domain=domain)
    return pb.PrepareTargetRequest(machine=machine, preallocate=True)


def allocated_bytes(host: HostdHost, name: str) -> int:
    return host.host.path(f"{IMAGES}/{name}").stat().st_blocks * 512


def contents(host: HostdHost) -> list[bytes]:
    return [host.host.path(f"{IMAGES}/{name}").read_bytes() for name in NAMES]


def test_the_space_is_there_before_the_copy_and_kept_by_it(
    fleet: TwoHosts, sparse_guest: Guest
) -> None:
    a, b = fleet["a"], fleet["b"]
    assert all(allocated_bytes(a, name) < MIB for name in NAMES)
    before = contents(a)
    move = Move(a, b, sparse_guest.uuid, repeat=True)
    move.identity = move.call(b, request(fleet, move)).data_identity
    assert all(allocated_bytes(b, f".{name}.dm-{move.id}.part") >= SIZE for name in NAMES)
    move.stop(Mode.MODE_GRACEFUL)
    move.park()
    receipts = {receipt.volume_id: receipt for receipt in move.copy().receipts}
    move.build()
    assert contents(b) == before
    assert receipts["vda"].allocated_bytes == allocated_bytes(b, NAMES[0])
    move.confirm()
    assert all(allocated_bytes(b, name) >= SIZE for name in NAMES)


def test_what_was_allocated_goes_with_the_move(fleet: TwoHosts, sparse_guest: Guest) -> None:
    with both_unchanged(fleet):
        move = Move(fleet["a"], fleet["b"], sparse_guest.uuid)
        move.call(fleet["b"], request(fleet, move))
        move.undo()


def test_disks_that_fit_only_while_they_are_sparse_are_refused_and_leave_nothing(
    fleet: TwoHosts, sparse_guest: Guest
) -> None:
    """There is room for all of the first of them."""
    b = fleet["b"]
    b.host.run("mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", IMAGES)
    try:
        with both_unchanged(fleet):
            move = Move(fleet["a"], b, sparse_guest.uuid)
            with pytest.raises(DroverError) as refused:
                move.call(b, request(fleet, move))
            assert refused.value.reason is Reason.TARGET_LACKS_SPACE
        move.prepare()  # as they are, they fit
        move.call(b, pb.EnsureAbsentRequest())
    finally:
        b.host.run("umount", IMAGES)
