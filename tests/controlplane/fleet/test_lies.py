"""A host that reports nonsense harms itself only."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.domain.states import HostState
from controlplane.fleet.reports import apply_report
from controlplane.store import hosts, instances
from controlplane.store.engine import Database
from controlplane.store.types import utc_now
from hostd.v1 import domain_pb2, host_pb2
from tests.controlplane.machines import make_domain, make_facts

NONSENSE: dict[str, dict[str, Any]] = {
    "memory that no sum holds": {"memory_mib": 2**62},
    "more memory than a column": {"memory_mib": 2**64 - 1},
    "more CPUs than a column": {"vcpus": 2**32 - 1},
    "more disk than a column": {"disk_size_bytes": 2**64 - 1},
    "no name": {"name": ""},
    "a name that acts on a terminal": {"name": "web\x1b[2J"},
    "a name that a database cannot hold": {"name": "a\0b"},
    "a name that is too long": {"name": "x" * 300},
    "no UUID": {"uuid": ""},
    "a UUID that is none": {"uuid": "x" * 36},
    "another spelling of a UUID": {"uuid": make_domain().uuid.upper()},
}


def nonsense(changes: dict[str, Any]) -> list[domain_pb2.Domain]:
    """Three of them, so that sums overflow as well."""
    domains = [make_domain(f"bad{n}") for n in range(3)]
    for domain in domains:
        for field, value in changes.items():
            setattr(domain, field, value)
    return domains


@pytest.mark.parametrize("what", NONSENSE)
async def test_nonsense_is_left_out_and_the_rest_taken_over(database: Database, what: str) -> None:
    good, other = make_domain("good"), make_domain("other")

    def report(tx: Any) -> None:
        for name in ("a", "b"):
            hosts.create(tx, name, adopt_domains=True)
            hosts.update(tx, name, state=HostState.ENABLED)
        lies = [good, *nonsense(NONSENSE[what])]
        for name, domains in (("a", lies), ("b", [other])):
            inventory = host_pb2.Inventory(facts=make_facts(name), domains=domains)
            apply_report(
                tx, name, inventory, asked=utc_now(), now=utc_now(), missing_after_seconds=20
            )

    await database.run(report)
    usages = await database.run(hosts.usages)
    assert {name: usage.instances for name, usage in usages.items()} == {"a": 1, "b": 1}
    known = await database.run(lambda tx: instances.list_page(tx, limit=10))
    assert [instance.name for instance in known] == ["good", "other"]
    assert (await database.run(lambda tx: hosts.get(tx, "a"))).last_seen is not None
