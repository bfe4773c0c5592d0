"""Media and backing files that other machines may have too, and places that are kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.v1 import host_service_pb2 as pb
from hostd.v1 import preflight_pb2
from tests.hostd.fleet import Guest, HostdHost, Mode, Move, TwoHosts
from tests.hostd.tiny import cdrom, define, disk, emptied, make_image
from tests.lab.host import IMAGES

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def nothing_left(fleet: TwoHosts) -> Iterator[None]:
    with emptied(fleet):
        yield


def arrive(source: HostdHost, target: HostdHost, guest: Guest, saga_seq: int = 1) -> Move:
    """Move a machine that is off, up to where it is built."""
    move = Move(source, target, guest.uuid, saga_seq=saga_seq)
    move.prepare()
    move.stop(Mode.MODE_GRACEFUL)
    move.park()
    move.copy()
    move.build()
    return move


def sources(host: HostdHost, guest: Guest) -> list[str]:
    """Names below the storage root of the files that a machine has."""
    domain = host.client(pb.GetDomainRequest(domain_uuid=guest.uuid))
    assert list(domain.obstacles) == []
    return [volume.name for volume in domain.volumes]


def test_a_cd_that_both_hosts_have_is_shared_and_another_one_kept_beside(
    fleet: TwoHosts,
) -> None:
    a, b = fleet["a"], fleet["b"]
    make_image(a, "web.qcow2")
    a.host.path(f"{IMAGES}/seed.iso").write_bytes(b"seed" * 1024)
    guest = define(a, "web", disk("web.qcow2") + cdrom("seed.iso"))
    arrive(a, b, guest).confirm()
    assert sources(b, guest) == ["web.qcow2", "seed.iso"]
    # The medium stayed on its first host; on the way back it is found there.
    arrive(b, a, guest, saga_seq=3).confirm()
    assert sources(a, guest) == ["web.qcow2", "seed.iso"]
    assert a.images() == ["seed.iso", "web.qcow2"]
    b.host.path(f"{IMAGES}/seed.iso").write_bytes(b"another machine's" * 1024)
    arrive(a, b, guest, saga_seq=5).confirm()
    web, seed = sources(b, guest)
    assert web == "web.qcow2"
    assert seed.startswith("seed.iso.drover-")
    assert b.host.path(f"{IMAGES}/{seed}").read_bytes() == b"seed" * 1024
    assert b.host.path(f"{IMAGES}/seed.iso").read_bytes() == b"another machine's" * 1024


@pytest.mark.parametrize("how", ["written by another machine", "a link", "only there"])
def test_a_backing_file_is_shared_only_where_nobody_writes_to_it(fleet: TwoHosts, how: str) -> None:
    a, b = fleet["a"], fleet["b"]
    for host in (a, b):
        make_image(host, "base.raw", format_="raw")
    make_image(a, "web.qcow2", backing="base.raw")
    guest = define(a, "web", disk("web.qcow2"))
    if how == "written by another machine":
        define(b, "writer", disk("base.raw", format_="raw"))
    if how == "a link":
        base = b.host.path(f"{IMAGES}/base.raw")
        base.rename(b.host.path("/run/base.raw"))
        base.symlink_to("/run/base.raw")
    move = arrive(a, b, guest)
    web, base_name = sources(b, guest)
    assert web == "web.qcow2"
    assert (base_name == "base.raw") == (how == "only there")
    move.undo()
    assert [name for name in b.images() if "web" in name or "drover" in name] == []
    assert "base.raw" in {path.name for path in b.host.path(IMAGES).iterdir()}


def refused(move: Move) -> DroverError:
    with pytest.raises(DroverError) as caught:
        move.prepare()
    return caught.value


def test_a_parked_machine_keeps_its_name_and_its_place(fleet: TwoHosts) -> None:
    """Else it could not be put back: a revert has to work for as long as it is offered."""
    a, b = fleet["a"], fleet["b"]
    make_image(a, "web.qcow2")
    make_image(b, "web.qcow2")
    first = define(a, "web", disk("web.qcow2"))
    away = Move(a, b, first.uuid)
    away.stop(Mode.MODE_GRACEFUL)
    away.park()
    second = define(b, "web", disk("web.qcow2"))
    error = refused(Move(b, a, second.uuid))
    assert error.reason is Reason.TARGET_NAME_TAKEN
    assert away.id in error.message
    assert {violation.type for violation in error.violations} == {
        "TARGET_NAME_TAKEN",
        "TARGET_FILE_EXISTS",
    }
    away.undo()


def test_two_machines_on_their_way_do_not_get_the_same_place(fleet: TwoHosts) -> None:
    a, b = fleet["a"], fleet["b"]
    make_image(a, "one/disk.qcow2")
    one = define(a, "one", disk("one/disk.qcow2"))
    first = Move(a, b, one.uuid)
    first.prepare()
    described = a.client(pb.GetDomainRequest(domain_uuid=one.uuid))
    described.uuid, described.name = "22222222-0000-4000-8000-000000000000", "two"
    second = Move(a, b, described.uuid)
    with pytest.raises(DroverError) as caught:
        second.call(
            b,
            pb.PrepareTargetRequest(machine=preflight_pb2.IncomingMachine(domain=described)),
        )
    assert caught.value.reason is Reason.TARGET_FILE_EXISTS
    first.undo()


def test_a_parked_machine_whose_storage_is_not_mounted_is_not_called_put_back(
    fleet: TwoHosts,
) -> None:
    a, b = fleet["a"], fleet["b"]
    make_image(a, "web.qcow2")
    guest = define(a, "web", disk("web.qcow2"))
    move = Move(a, b, guest.uuid)
    move.stop(Mode.MODE_GRACEFUL)
    move.park()
    parking = a.host.path(f"{IMAGES}/.drover-parked")
    hidden = parking.rename(a.host.path("/run/unmounted"))
    for call in (pb.DiscardParkedRequest(), pb.EnsureUnparkedRequest()):
        with pytest.raises(DroverError) as lost:
            move.call(a, call)
        assert lost.value.reason is Reason.PARKED_NOT_FOUND
        assert "mounted" in lost.value.message
    hidden.rename(parking)
    move.undo()
    assert sources(a, guest) == ["web.qcow2"]
