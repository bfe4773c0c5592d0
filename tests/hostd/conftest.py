"""Two real hypervisors with hostds, once for all tests that need them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.hostd.fleet import Guest, TwoHosts, two_hosts
from tests.hostd.private_fixtures import conn, connection, on_host, private_host, roots, state_dir
from tests.lab.guest.build import Recipe

__all__ = ["conn", "connection", "on_host", "private_host", "roots", "state_dir"]

SMALL = Recipe(data_mib=8, free_mib=8)
DEAF = Recipe(data_mib=8, free_mib=8, command_line="drover.ignore_acpi")
_numbers = itertools.count(1)


@pytest.fixture(scope="package")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """Hosts `a` and `b`."""
    with two_hosts(tmp_path_factory.mktemp("fleet")) as hosts:
        yield hosts


def boot(fleet: TwoHosts, recipe: Recipe) -> Iterator[Guest]:
    name = f"guest{next(_numbers)}"
    uuid = fleet["a"].host.define_guest(name, recipe=recipe, memory_mib=128)
    fleet["a"].host.wait_for_console(name, "READY")
    yield Guest(name, uuid)
    fleet.revive()
    for host in fleet.hosts.values():
        host.host.remove_guest(name)
        host.host.forget_console(name)


@pytest.fixture
def guest(fleet: TwoHosts) -> Iterator[Guest]:
    """A guest that runs on `a`. It is removed wherever it went."""
    yield from boot(fleet, SMALL)


@pytest.fixture
def still_guest(fleet: TwoHosts) -> Iterator[Guest]:
    """A guest on `a` that is off, for what does not need it to run."""
    name = f"guest{next(_numbers)}"
    host = fleet["a"].host
    uuid = host.define_guest(
        name, recipe=SMALL, memory_mib=128, start=False, extra_devices="<panic model='isa'/>"
    )
    yield Guest(name, uuid)
    fleet.revive()
    for each in fleet.hosts.values():
        each.host.remove_guest(name)


@pytest.fixture
def deaf_guest(fleet: TwoHosts) -> Iterator[Guest]:
    """A guest that runs on `a` and ignores the power button."""
    yield from boot(fleet, DEAF)
