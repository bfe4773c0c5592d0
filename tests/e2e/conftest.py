"""One lab for all tests here; a test that spoils it makes the next one start anew."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.fleet import Fleet

ROOT = Path(__file__).parents[2]


def lab_directory(kind: str) -> Path:
    """Where this worker has its lab of a kind.

    No name begins with another's: what names a lab's folder is taken to be of that lab.
    """
    return ROOT / f".lab-e2e-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}-{kind}"


class Session:
    """The tests' fleet, started when it is first needed and after it was spoilt."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.fit = False

    def lend(self) -> Iterator[Fleet]:
        """The fleet for one test; after it, nothing may be left over."""
        if not self.fit:
            self.fleet.up()
        self.fit = False
        yield self.fleet
        self.fleet.revive()
        self.fleet.wait_until_clean()
        self.fit = True


@pytest.fixture(scope="package")
def session() -> Iterator[Session]:
    """The tests' lab; gone without a trace after the last of them.

    Not later: its daemons keep asking each other, which takes a part of a processor.
    """
    fleet = Fleet(lab_directory("fleet"))
    yield Session(fleet)
    fleet.down()
    assert fleet.lab.leaks() == []


@pytest.fixture
def fleet(session: Session) -> Iterator[Fleet]:
    """Hosts a, b and c; the guest runs on a or b."""
    yield from session.lend()
