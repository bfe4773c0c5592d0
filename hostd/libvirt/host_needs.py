"""What a definition takes from its host by number, size or name. Pure.

Nothing of it travels with the machine; a target has to have it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from lxml import etree

from hostd.libvirt.xml import attribute, text_of
from hostd.v1 import domain_pb2

# Where sets of host CPUs and of host NUMA nodes stand: element, and the attribute that
# holds the set or "" for its text.
_CPU_SETS = (
    ("vcpu", "cpuset"),
    ("cputune/vcpupin", "cpuset"),
    ("cputune/emulatorpin", "cpuset"),
    ("cputune/iothreadpin", "cpuset"),
)
_NODE_SETS = (
    ("numatune/memory", "nodeset"),
    ("numatune/memnode", "nodeset"),
    ("devices/memory/source/nodemask", ""),
)
_PART = re.compile(r"(\^?)([0-9]{1,5})(?:-([0-9]{1,5}))?")
_KIB = {"b": 1 / 1024, "bytes": 1 / 1024, "k": 1, "kib": 1, "m": 1024, "mib": 1024,
        "g": 1024**2, "gib": 1024**2}  # fmt: skip
_DEFAULT_SIZE = 0


def read_host_needs(root: etree._Element) -> domain_pb2.HostNeeds:
    """Read them from a parsed definition."""
    return domain_pb2.HostNeeds(
        loader_path=text_of(root.find("os/loader")),
        cpus=_numbers(root, _CPU_SETS),
        numa_nodes=_numbers(root, _NODE_SETS),
        hugepage_kib=sorted(set(_page_sizes(root))),
        network_filters=sorted(
            {attribute(f, "filter") for f in root.iterfind("devices/interface/filterref")} - {""}
        ),
    )


def parse_set(text: str) -> set[int]:
    """The numbers of a libvirt set, as "0-3,^2,8"; what is malformed in it counts for nothing."""
    found: set[int] = set()
    for part in text.replace(" ", "").split(","):
        match = _PART.fullmatch(part)
        if match is None:
            continue
        numbers = range(int(match[2]), int(match[3] or match[2]) + 1)
        found = found.difference(numbers) if match[1] else found.union(numbers)
    return found


def _numbers(root: etree._Element, places: Iterable[tuple[str, str]]) -> list[int]:
    found: set[int] = set()
    for path, name in places:
        for element in root.iterfind(path):
            found |= parse_set(attribute(element, name) if name else text_of(element))
    return sorted(found)


def _page_sizes(root: etree._Element) -> Iterator[int]:
    hugepages = root.find("memoryBacking/hugepages")
    if hugepages is None:
        return
    pages = hugepages.findall("page")
    if not pages:
        yield _DEFAULT_SIZE
    for page in pages:
        unit = _KIB.get(attribute(page, "unit").lower() or "kib", 1)
        size = attribute(page, "size")
        yield round(int(size) * unit) if size.isdigit() else _DEFAULT_SIZE
