"""A cancel, a cut link and a full disk in the middle of a real copy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from tests.e2e.fleet import GUEST, SLOWLY, Fleet
from tests.lab.host import IMAGES, Host
from tests.lab.network import run
from tests.lab.wait import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

MIB = 2**20


def test_cancel_in_mid_copy_brings_the_guest_back(fleet: Fleet) -> None:
    move = fleet.migrate(*SLOWLY)
    move.wait_for_mid_copy()
    move.cancel()
    move.wait_for_state("CANCELLED")
    move.expect_back()


def test_a_copy_goes_on_when_a_cut_link_is_healed(fleet: Fleet) -> None:
    move = fleet.migrate(*SLOWLY)
    before = move.wait_for_mid_copy()
    fleet.lab.cut(move.target.name)
    wait_for(
        lambda: "yes" if not _alive(fleet, move.target) else None,
        "the cut is noticed",
        timeout_seconds=60,
        interval_seconds=0.5,
    )
    during = move.look()
    fleet.lab.heal(move.target.name)
    move.expect_moved()
    move.confirm()
    assert during is not None
    assert during.state == before.state


def _alive(fleet: Fleet, host: Host) -> bool:
    return bool(fleet.lab.drover_json("host", "show", host.name).get("alive"))


@pytest.fixture
def small_host(fleet: Fleet, tmp_path: Path) -> Iterator[Host]:
    """Host c with 96 MiB of room for images, in a file system of its own."""
    host = fleet.lab.hosts["c"]
    image = tmp_path / "small.img"
    with image.open("wb") as file:
        file.truncate(96 * MIB)
    run("mkfs.ext4", "-q", "-m", "0", str(image))
    host.run("mount", "-o", "loop", str(image), IMAGES)
    wait_for(lambda: _free_bytes(fleet, host) < 96 * MIB, "the small disk is reported")
    yield host
    host.run("umount", IMAGES)


def _free_bytes(fleet: Fleet, host: Host) -> int:
    found = fleet.lab.drover_json("host", "show", host.name)
    return min(int(root["availableBytes"]) for root in found["facts"]["roots"])


def test_a_target_that_fills_up_in_mid_copy_gives_the_guest_back(
    fleet: Fleet, small_host: Host
) -> None:
    move = fleet.migrate(*SLOWLY, to=small_host.name)
    move.wait_for_mid_copy()
    ballast = small_host.inside(f"{IMAGES}/ballast")
    small_host.run("sh", "-c", f"cat /dev/zero >{IMAGES}/ballast", check=False)

    failed = move.wait_for_state("FAILED")
    ballast.unlink()

    error = DroverError.from_status(failed.error)
    assert error is not None
    assert error.reason is Reason.TARGET_LACKS_SPACE
    assert "vda" in error.message
    move.expect_back()
    assert GUEST not in small_host.virsh("list", "--all", "--name")
