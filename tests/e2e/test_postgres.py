"""The control plane on PostgreSQL: the same moves, and two replicas of which one dies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import Session, lab_directory
from tests.e2e.fleet import SLOWLY, Fleet
from tests.lab.lab import API_PORT
from tests.lab.process import Daemon
from tests.support.postgres import Cluster

pytestmark = [pytest.mark.lab, pytest.mark.postgres, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def postgres_session(postgres_cluster: Cluster) -> Iterator[Session]:
    """A fleet of hosts a and b on PostgreSQL."""
    fleet = Fleet(lab_directory("pg"), ("a", "b"), postgres_cluster.create_database())
    yield Session(fleet)
    fleet.down()
    assert fleet.lab.leaks() == []


@pytest.fixture
def fleet(postgres_session: Session) -> Iterator[Fleet]:
    """The fleet on PostgreSQL; nothing may be left over after a test."""
    yield from postgres_session.lend()


@pytest.fixture
def replica(fleet: Fleet) -> Iterator[Daemon]:
    """A second replica beside the first, which users talk to from now on."""
    second, port = fleet.lab.replica(1)
    second.start()
    fleet.talk_to(port)
    yield second
    second.kill()
    fleet.talk_to(API_PORT)


def test_a_move_is_confirmed_and_the_next_one_reverted(fleet: Fleet) -> None:
    first = fleet.migrate()
    first.expect_moved()
    first.confirm()

    second = fleet.migrate()
    second.expect_moved()
    second.revert()
    second.expect_back()
    assert fleet.source is first.target


def test_one_replica_killed_in_mid_copy_the_other_goes_on(fleet: Fleet, replica: Daemon) -> None:
    move = fleet.migrate(*SLOWLY)
    move.wait_for_mid_copy()
    fleet.lab.controlplane.kill()
    move.expect_moved()
    move.confirm()


def test_a_replica_frozen_in_mid_copy_wakes_late_and_does_no_harm(
    fleet: Fleet, replica: Daemon
) -> None:
    move = fleet.migrate(*SLOWLY)
    move.wait_for_mid_copy()
    with fleet.lab.controlplane.frozen():
        move.expect_moved()
        move.confirm()
    # Awake, it finds that all it held is another's. The fixture looks for harm.
    fleet.talk_to(API_PORT)
    move.wait_for_state("CONFIRMED")
    fleet.expect_boot(move.target, fleet.guest.boots)
