"""EnsureAbsent on a real target: what the move made is gone, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.v1 import host_service_pb2 as pb
from tests.hostd.fleet import HostdHost, Mode, Move, TwoHosts
from tests.hostd.tiny import define, disk, emptied, make_image
from tests.hostd.unchanged import both_unchanged
from tests.lab.host import IMAGES

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def nothing_left(fleet: TwoHosts) -> Iterator[None]:
    with emptied(fleet):
        yield


def machine_on_the_way(fleet: TwoHosts, name: str, *images: str) -> Move:
    """A machine with disks of these names, all of which have arrived on `b`."""
    for image in images:
        make_image(fleet["a"], image)
    disks = [disk(image, f"vd{chr(97 + n)}") for n, image in enumerate(images)]
    return Move(fleet["a"], fleet["b"], define(fleet["a"], name, "".join(disks)).uuid)


def arrive(move: Move) -> None:
    move.prepare()
    move.stop(Mode.MODE_GRACEFUL)
    move.park()
    move.copy()


@contextmanager
def missing(host: HostdHost) -> Iterator[None]:
    """The host's storage root is not there."""
    root = host.host.path(IMAGES)
    away = root.rename(root.with_name("away"))
    try:
        yield
    finally:
        away.rename(root)


def directories(host: HostdHost) -> list[str]:
    """Every directory below the storage root, as relative paths."""
    root = host.host.path(IMAGES)
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_dir())


def test_directories_that_the_move_made_go_and_others_stay(fleet: TwoHosts) -> None:
    a, b = fleet["a"], fleet["b"]
    b.host.path(f"{IMAGES}/here/empty").mkdir(parents=True)
    move = machine_on_the_way(fleet, "web", "made/deep/web.qcow2", "here/new/web.qcow2")
    with both_unchanged(fleet):
        arrive(move)
        assert directories(b) == ["here", "here/empty", "here/new", "made", "made/deep"]
        b.hostd.kill()
        b.hostd.start()
        move.undo()
    assert directories(a) == ["here", "here/new", "made", "made/deep"]


def test_a_directory_with_something_of_others_in_it_stays(fleet: TwoHosts) -> None:
    b = fleet["b"]
    move = machine_on_the_way(fleet, "web", "made/web.qcow2")
    arrive(move)
    b.host.path(f"{IMAGES}/made/notes.txt").write_text("somebody else's")
    move.undo()
    assert b.images() == ["made/notes.txt"]


@pytest.mark.parametrize("last", [0, 1])
def test_a_directory_that_two_moves_use_goes_with_the_last(fleet: TwoHosts, last: int) -> None:
    b = fleet["b"]
    moves = [machine_on_the_way(fleet, name, f"made/{name}.qcow2") for name in ("one", "two")]
    for move in moves:
        arrive(move)
    moves[1 - last].undo()
    assert directories(b) == ["made"]
    moves[last].undo()
    assert directories(b) == []


def test_a_machine_that_stays_keeps_its_directory(fleet: TwoHosts) -> None:
    b = fleet["b"]
    move = machine_on_the_way(fleet, "web", "made/web.qcow2")
    arrive(move)
    move.build()
    move.confirm()
    assert b.images() == ["made/web.qcow2"]
    move.call(b, pb.EnsureAbsentRequest())
    assert b.images() == ["made/web.qcow2"]


def test_a_storage_root_that_is_missing_is_told_and_what_lies_there_is_not_forgotten(
    fleet: TwoHosts,
) -> None:
    b = fleet["b"]
    move = machine_on_the_way(fleet, "web", "made/web.qcow2")
    arrive(move)
    with missing(b):
        for _ in range(2):
            with pytest.raises(DroverError) as refused:
                move.call(b, pb.EnsureAbsentRequest())
            assert refused.value.reason is Reason.TARGET_LACKS_ROOT
            assert IMAGES in refused.value.message
            assert "vda" in refused.value.message
    move.undo()
    assert directories(b) == b.images() == []


def test_a_missing_storage_root_that_nothing_was_brought_to_is_no_trouble(fleet: TwoHosts) -> None:
    b = fleet["b"]
    move = machine_on_the_way(fleet, "web", "made/web.qcow2")
    move.prepare()
    with missing(b):
        move.call(b, pb.EnsureAbsentRequest())
