"""Whether the XML of a machine names only what is the machine's own. Pure.

A definition, and each one that a snapshot or checkpoint embeds, comes into force on
the host that it arrives at. A disk, firmware image or device in it that the machine
does not have would hand a piece of that host to the guest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass

from lxml import etree

from hostd.libvirt.definition import parse_definition
from hostd.libvirt.firmware import is_package_file
from hostd.libvirt.xml import attribute, parse, text_of, to_text

_PLACES = ("file", "dev", "dir", "pool", "volume", "name")
_KINDS = {"domainsnapshot": "snapshot", "domaincheckpoint": "checkpoint"}


@dataclass(frozen=True)
class Own:
    """What a machine has.

    Attributes:
        paths: Its volumes.
        nvram: Its NVRAM file; empty without one.
        loader: Its firmware image; empty when libvirt chooses one.
    """

    paths: Collection[str]
    nvram: str = ""
    loader: str = ""


def foreign_in_definition(xml: str, own: Own) -> str:
    """What a definition names that is not the machine's, as a sentence; empty for nothing.

    Raises:
        XmlError: It is not a definition.
    """
    return next(_in_domain(parse(xml, "domain"), own), "")


def foreign_in_snapshot(xml: str, own: Own) -> str:
    """The same of the metadata of a snapshot or checkpoint.

    Raises:
        XmlError: It is neither.
    """
    root = parse(xml, *_KINDS)
    problem = next(_in_snapshot(root, own), "")
    return problem and f"{_KINDS[str(root.tag)]} {text_of(root.find('name'))}: {problem}"


def _in_snapshot(root: etree._Element, own: Own) -> Iterator[str]:
    yield from _strange_disks(root.iterfind("disks/disk"), own)
    memory = attribute(root.find("memory"), "file")
    if memory:
        yield f"Its memory is in {memory}."
    for name in ("domain", "inactiveDomain"):
        for embedded in root.iterfind(name):
            yield from _in_domain(embedded, own)


def _in_domain(domain: etree._Element, own: Own) -> Iterator[str]:
    yield from _strange_disks(domain.iterfind("devices/disk"), own)
    loader = text_of(domain.find("os/loader"))
    if loader and loader != own.loader:
        yield f"Its firmware image is {loader}, not {own.loader or 'the one that libvirt chooses'}."
    for nvram in domain.iterfind("os/nvram"):
        place = text_of(nvram) or attribute(nvram.find("source"), "file")
        if place and place != own.nvram:
            yield f"Its NVRAM is {place}, not {own.nvram or 'what libvirt makes'}."
        template = attribute(nvram, "template")
        if template and not is_package_file(template):
            yield f"Its NVRAM is made from {template}, which is no file of a firmware package."
    copy = deepcopy(domain)
    copy.tag = "domain"
    for obstacle in parse_definition(to_text(copy)).obstacles:
        yield obstacle.message


def _strange_disks(disks: Iterator[etree._Element], own: Own) -> Iterator[str]:
    for disk in disks:
        for source in disk.iterfind(".//source"):
            for name in _PLACES:
                place = attribute(source, name)
                if place and place not in own.paths:
                    yield f"It names {place}, which is none of the machine's disks."
