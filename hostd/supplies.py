"""Looking up what this host has of the things that a definition takes by number, size or name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import libvirt

from hostd.libvirt.capabilities import Capabilities
from hostd.libvirt.firmware import loader_problem
from hostd.preflight_model import Supplies
from hostd.v1 import domain_pb2

T = TypeVar("T")
_MEMINFO = Path("/proc/meminfo")
_WHOLE_HOST = -1
# Drivers that know nothing of such things, as that of libvirt's tests.
_UNKNOWN = (
    libvirt.VIR_ERR_NO_SUPPORT,
    libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
    libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
)


def gather_supplies(
    conn: libvirt.virConnect, offer: Capabilities, needs: domain_pb2.HostNeeds
) -> Supplies:
    """Look up what a machine with these needs is judged by.

    Raises:
        libvirt.libvirtError: The connection broke.
    """
    return Supplies(
        cpus=_cpus(conn),
        numa_nodes=frozenset(offer.numa_nodes) or None,
        hugepages=_hugepages(conn, offer) if needs.hugepage_kib else None,
        default_hugepage_kib=default_hugepage_kib(_MEMINFO.read_text("ascii")),
        network_filters=_network_filters(conn) if needs.network_filters else None,
        loader_problem=loader_problem(needs.loader_path, offer.loaders),
    )


def default_hugepage_kib(meminfo: str) -> int:
    """The kernel's default size of huge pages; 0 when it has none."""
    found = re.search(r"^Hugepagesize:\s+(\d+) kB$", meminfo, flags=re.MULTILINE)
    return int(found[1]) if found else 0


def _cpus(conn: libvirt.virConnect) -> frozenset[int] | None:
    told = _if_known(lambda: conn.getCPUMap(0))
    return frozenset(number for number, online in enumerate(told[1]) if online) if told else None


def _hugepages(conn: libvirt.virConnect, offer: Capabilities) -> dict[int, int] | None:
    sizes = list(offer.page_kib)
    told = _if_known(lambda: conn.getFreePages(sizes, _WHOLE_HOST, 1)) if sizes else None
    return {int(kib): int(free) for kib, free in told[_WHOLE_HOST].items()} if told else None


def _network_filters(conn: libvirt.virConnect) -> frozenset[str] | None:
    told = _if_known(conn.listNWFilters)
    return None if told is None else frozenset(told)


def _if_known(ask: Callable[[], T]) -> T | None:
    try:
        return ask()
    except libvirt.libvirtError as error:
        if error.get_error_code() in _UNKNOWN:
            return None
        raise
