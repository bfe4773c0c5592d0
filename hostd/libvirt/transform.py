"""From the source's definition to the target's. Pure: text in, text out.

Nothing is generated anew. The definition is parsed, a short list of places is
changed, and the rest is written as it was read, elements that nobody here knows
included (invariant I7). The places:

    disk sources and backing files     to where the volumes lie on the target
    <os><nvram>                        to where the NVRAM file lies on the target
    <devices><emulator>                only when the caller names another one
    <memory> <currentMemory> <maxMemory> <vcpu> <vcpus> <cpu><topology>
    <cpu><numa><cell> <cputune>        only for another size
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lxml import etree

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.libvirt.definition import disk_source, memory_mib
from hostd.libvirt.xml import XmlError, attribute, parse, text_of, to_text
from hostd.v1 import preflight_pb2

_PER_VCPU = ("vcpupin", "vcpusched")
_SOURCE_ATTRIBUTES = ("file", "dev", "dir", "pool", "volume", "mode")


def transform_domain(
    xml: str,
    volume_paths: Mapping[str, str],
    size: preflight_pb2.TargetSize | None = None,
    nvram_path: str | None = None,
    emulator: str | None = None,
) -> str:
    """Make a definition fit another host.

    Args:
        xml: The persistent definition, secrets included.
        volume_paths: volume_id -> path on the target. Disks that are not named
            keep their source.
        size: Another size, or None to keep everything.
        nvram_path: Path of the NVRAM file on the target; None to keep it.
        emulator: Path of QEMU on the target; None to keep it.

    Raises:
        DroverError: BUILD_FAILED when the XML is not a domain definition,
            INSTANCE_IMMOVABLE when it cannot take the size.
    """
    root = _parse(xml, "domain")
    _relocate(root, volume_paths, nvram_path)
    path = root.find("devices/emulator")
    if emulator is not None and path is not None:
        path.text = emulator
    if size is not None:
        _resize(root, size)
    return to_text(root)


def transform_snapshot(
    xml: str, volume_paths: Mapping[str, str], nvram_path: str | None = None
) -> str:
    """Make the metadata of a snapshot or checkpoint fit another host.

    The definitions that it embeds keep their size: reverting to a snapshot brings
    back the machine as it was then.

    Args:
        xml: A <domainsnapshot> or <domaincheckpoint>.
        volume_paths: As for `transform_domain`.
        nvram_path: As for `transform_domain`.

    Raises:
        DroverError: BUILD_FAILED when the XML is neither.
    """
    root = _parse(xml, "domainsnapshot", "domaincheckpoint")
    for name in ("domain", "inactiveDomain"):
        for embedded in root.iterfind(name):
            _relocate(embedded, volume_paths, nvram_path)
    return to_text(root)


def _parse(xml: str, *roots: str) -> etree._Element:
    try:
        return parse(xml, *roots)
    except XmlError as error:
        raise DroverError(
            Reason.BUILD_FAILED, f"The definition that came with the machine is unusable: {error}."
        ) from error


# --- places


def _relocate(
    domain: etree._Element, volume_paths: Mapping[str, str], nvram_path: str | None
) -> None:
    for disk in domain.iterfind("devices/disk"):
        volume_id = attribute(disk.find("target"), "dev")
        for element, id_ in _links(disk, volume_id):
            if id_ in volume_paths:
                _set_source(element, volume_paths[id_])
    nvram = domain.find("os/nvram")
    if nvram is not None and nvram_path is not None:
        source = nvram.find("source")
        if source is not None:
            source.set("file", nvram_path)
        else:
            nvram.text = nvram_path


def _links(disk: etree._Element, volume_id: str) -> Iterator[tuple[etree._Element, str]]:
    yield disk, volume_id
    element, depth = disk.find("backingStore"), 1
    while element is not None:
        yield element, f"{volume_id}.backing{depth}"
        element, depth = element.find("backingStore"), depth + 1


def _set_source(element: etree._Element, path: str) -> None:
    found = disk_source(element)
    source = element.find("source")
    if found is None or source is None or (found.kind == "file" and found.path == path):
        return
    element.set("type", "file")
    others = [item for item in source.attrib.items() if item[0] not in _SOURCE_ATTRIBUTES]
    source.attrib.clear()
    for name, value in [("file", path), *others]:
        source.set(name, value)


# --- size


def _resize(domain: etree._Element, size: preflight_pb2.TargetSize) -> None:
    if memory_mib(domain.find("memory")) != size.memory_mib:
        _set_memory(domain, size.memory_mib)
    vcpu = domain.find("vcpu")
    same = vcpu is not None and text_of(vcpu) == str(size.vcpus) and "current" not in vcpu.attrib
    if not same:
        _set_vcpus(domain, size.vcpus)


def _set_memory(domain: etree._Element, wanted_mib: int) -> None:
    memory = domain.find("memory")
    if memory is None:
        raise DroverError(Reason.BUILD_FAILED, "The definition has no <memory>.")
    if domain.find("devices/memory") is not None:
        raise _cannot_resize("its memory is made of memory devices")
    maximum = domain.find("maxMemory")
    elements = [memory, *domain.iterfind("currentMemory")]
    if maximum is not None and memory_mib(maximum) < wanted_mib:
        elements.append(maximum)
    for element in elements:
        element.set("unit", "MiB")
        element.text = str(wanted_mib)
    cells = domain.findall("cpu/numa/cell")
    if len(cells) > 1:
        raise _cannot_resize(f"it has {len(cells)} NUMA cells")
    for cell in cells:
        cell.set("memory", str(wanted_mib))
        cell.set("unit", "MiB")


def _set_vcpus(domain: etree._Element, vcpus: int) -> None:
    vcpu = domain.find("vcpu")
    if vcpu is None:
        vcpu = etree.Element("vcpu")
        # libvirt takes any order; this is where it writes it itself.
        memory = domain.find("memory")
        domain.insert(0 if memory is None else domain.index(memory) + 1, vcpu)
    vcpu.text = str(vcpus)
    if "current" in vcpu.attrib:
        del vcpu.attrib["current"]
    hotplug = domain.find("vcpus")
    if hotplug is not None:
        _remove(hotplug)
    cells = domain.findall("cpu/numa/cell")
    if len(cells) > 1:
        raise _cannot_resize(f"it has {len(cells)} NUMA cells")
    for cell in cells:
        cell.set("cpus", "0" if vcpus == 1 else f"0-{vcpus - 1}")
    topology = domain.find("cpu/topology")
    if topology is not None:
        _set_topology(topology, vcpus)
    for name in _PER_VCPU:
        for pin in domain.findall(f"cputune/{name}"):
            _keep_pins_below(pin, vcpus)


def _set_topology(topology: etree._Element, vcpus: int) -> None:
    """Keep threads and cores if they divide the new number, else give way from below."""
    count = {name: _count(topology, name) for name in ("dies", "clusters", "cores", "threads")}
    per_socket = count["dies"] * count["clusters"] * count["cores"] * count["threads"]
    if vcpus % per_socket == 0:
        shape = {**count, "sockets": vcpus // per_socket}
    elif vcpus % count["threads"] == 0:
        cores = vcpus // count["threads"]
        shape = {**count, "sockets": 1, "dies": 1, "clusters": 1, "cores": cores}
    else:
        shape = {"sockets": vcpus, "dies": 1, "clusters": 1, "cores": 1, "threads": 1}
    for name, value in shape.items():
        # dies and clusters are written only where they were: not every libvirt has them.
        if name in topology.attrib:
            topology.set(name, str(value))


def _count(topology: etree._Element, name: str) -> int:
    return _count_or_zero(topology.get(name, "1")) or 1


def _keep_pins_below(pin: etree._Element, vcpus: int) -> None:
    """Drop or shorten a setting of virtual CPUs that are no longer there."""
    if pin.tag == "vcpupin":
        if _count_or_zero(pin.get("vcpu", "")) >= vcpus:
            _remove(pin)
        return
    kept = sorted(_cpu_set(pin.get("vcpus", ""), below=vcpus))
    if not kept:
        _remove(pin)
    else:
        pin.set("vcpus", ",".join(str(cpu) for cpu in kept))


def _cpu_set(text: str, *, below: int) -> set[int]:
    """The CPUs that a list as "0-3,^2" names, those below a number only."""
    cpus: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.strip().lstrip("^").partition("-")
        end = min(_count_or_zero(high if dash else low) + 1, below)
        span = range(_count_or_zero(low), end)
        cpus = cpus - set(span) if part.strip().startswith("^") else cpus | set(span)
    return cpus


def _count_or_zero(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0


def _remove(element: etree._Element) -> None:
    """Remove an element and keep the white space around it."""
    parent = element.getparent()
    if parent is None:
        return
    before = element.getprevious()
    if element.tail and before is not None and not before.tail:
        before.tail = element.tail
    parent.remove(element)


def _cannot_resize(why: str) -> DroverError:
    return DroverError(
        Reason.INSTANCE_IMMOVABLE, f"The machine cannot be given another size: {why}."
    )
