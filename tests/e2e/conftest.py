"""One lab for the whole session; a test that spoils it makes the next one start anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.fleet import Fleet

ROOT = Path(__file__).parents[2]


class Session:
    """The session's fleet, started when it is first needed and after it was spoilt."""

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


@pytest.fixture(scope="session")
def session() -> Iterator[Session]:
    """The session's lab; gone without a trace in the end."""
    fleet = Fleet(ROOT / ".lab-e2e")
    yield Session(fleet)
    fleet.down()
    assert fleet.lab.leaks() == []


@pytest.fixture
def fleet(session: Session) -> Iterator[Fleet]:
    """Hosts a, b and c; the guest runs on a or b."""
    yield from session.lend()
