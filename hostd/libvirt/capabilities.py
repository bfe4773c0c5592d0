"""What libvirt and QEMU on this host can do.

libvirt's first answer may take seconds, in which it asks every QEMU binary; what
it said is kept for a while, as long as the connection stands.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import libvirt
from lxml import etree

from hostd.libvirt.conn import LibvirtConnection
from hostd.libvirt.xml import attribute, parse, text_of

_FRESH_SECONDS = 300.0
_lock = threading.Lock()
_known: WeakKeyDictionary[LibvirtConnection, tuple[int, float, Capabilities]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Capabilities:
    """What does not change while libvirtd and QEMU stay the same.

    Attributes:
        host_uuid: libvirt's UUID of the host.
        libvirt_version: major * 1000000 + minor * 1000 + micro.
        qemu_version: In the same form.
        arch: CPU architecture of the host.
        cpu_model: CPU model by libvirt's name.
        cpus: Host CPUs.
        memory_mib: Host memory.
        virt_types: "kvm", "qemu"; what guests of the host's architecture can have.
        machine_types: Machine types of that architecture, aliases included.
        max_vcpus: Machine type -> most virtual CPUs.
        firmwares: "bios", "efi", "efi-secure".
        tpm: An emulated TPM can be had.
        loaders: Firmware images that libvirt lists.
        numa_nodes: Numbers of the host's NUMA nodes; empty when libvirt cannot tell.
        page_kib: Sizes of memory pages, the ordinary one included.
    """

    host_uuid: str
    libvirt_version: int
    qemu_version: int
    arch: str
    cpu_model: str
    cpus: int
    memory_mib: int
    virt_types: tuple[str, ...]
    machine_types: tuple[str, ...]
    max_vcpus: dict[str, int]
    firmwares: tuple[str, ...]
    tpm: bool
    loaders: tuple[str, ...]
    numa_nodes: tuple[int, ...]
    page_kib: tuple[int, ...]


def capabilities(connection: LibvirtConnection) -> Capabilities:
    """What libvirt on this host can do.

    Raises:
        DroverError: LIBVIRT_UNAVAILABLE, or what libvirt met.
    """
    with connection.get() as conn:
        with _lock:
            known = _known.get(connection)
        now = time.monotonic()
        if known is not None and known[0] == id(conn) and now - known[1] < _FRESH_SECONDS:
            return known[2]
        found = read_capabilities(conn)
        with _lock:
            _known[connection] = (id(conn), now, found)
        return found


def read_capabilities(conn: libvirt.virConnect) -> Capabilities:
    """Ask libvirt.

    Raises:
        libvirt.libvirtError: It did not answer.
    """
    caps = parse(conn.getCapabilities(), "capabilities")
    arch = text_of(caps.find("host/cpu/arch"))
    info = conn.getInfo()
    machines: dict[str, int] = {}
    virt_types: dict[str, None] = {}
    for guest in _guests(caps, arch):
        for machine in guest.iterfind(".//machine"):
            machines[text_of(machine)] = int(machine.get("maxCpus") or 0)
        virt_types |= {attribute(domain, "type"): None for domain in guest.iterfind("domain")}
    offers = [_domain_capabilities(conn, arch, virt) for virt in virt_types]
    return Capabilities(
        host_uuid=text_of(caps.find("host/uuid")),
        libvirt_version=conn.getLibVersion(),
        qemu_version=conn.getVersion(),
        arch=arch,
        cpu_model=text_of(caps.find("host/cpu/model")),
        cpus=int(info[2]),
        memory_mib=int(info[1]),
        virt_types=tuple(sorted(virt_types)),
        machine_types=tuple(sorted(machines)),
        max_vcpus=machines,
        firmwares=tuple(sorted({kind for offer in offers for kind in _firmwares(offer)})),
        tpm=any(_has_tpm(offer) for offer in offers),
        loaders=tuple(sorted({path for offer in offers for path in _values(offer, "os/loader")})),
        numa_nodes=tuple(
            int(attribute(cell, "id")) for cell in caps.iterfind("host/topology/cells/cell")
        ),
        page_kib=tuple(int(attribute(page, "size")) for page in caps.iterfind("host/cpu/pages")),
    )


def compare_cpu(
    conn: libvirt.virConnect, arch: str, machine_type: str, virt_type: str, cpu_xml: str
) -> bool | None:
    """Whether a guest CPU can be had here.

    Returns:
        True or False; None when libvirt cannot tell.

    Raises:
        libvirt.libvirtError: The connection broke.
    """
    unknown = (
        libvirt.VIR_ERR_NO_SUPPORT,
        libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
        libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
        libvirt.VIR_ERR_INVALID_ARG,
    )
    try:
        result = conn.compareHypervisorCPU(None, arch, machine_type, virt_type, cpu_xml, 0)
    except libvirt.libvirtError as error:
        if error.get_error_code() in unknown:
            return None
        raise
    if result == libvirt.VIR_CPU_COMPARE_ERROR:
        return None
    return bool(result != libvirt.VIR_CPU_COMPARE_INCOMPATIBLE)


def _guests(caps: etree._Element, arch: str) -> Iterator[etree._Element]:
    for guest in caps.iterfind("guest/arch"):
        if attribute(guest, "name") == arch:
            yield guest


def _domain_capabilities(conn: libvirt.virConnect, arch: str, virt_type: str) -> etree._Element:
    machine = "q35" if arch == "x86_64" else None
    try:
        return parse(conn.getDomainCapabilities(None, arch, machine, virt_type, 0))
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
            raise
        # A driver that cannot tell, as that of libvirt's tests: nothing beyond BIOS.
        return etree.Element("domainCapabilities")


def _firmwares(offer: etree._Element) -> Iterator[str]:
    yield "bios"
    if "efi" in _values(offer, "os/enum[@name='firmware']"):
        yield "efi"
        if "yes" in _values(offer, "os/loader/enum[@name='secure']"):
            yield "efi-secure"


def _has_tpm(offer: etree._Element) -> bool:
    return "emulator" in _values(offer, "devices/tpm/enum[@name='backendModel']")


def _values(offer: etree._Element, path: str) -> set[str]:
    return {text_of(value) for value in offer.iterfind(f"{path}/value")}
