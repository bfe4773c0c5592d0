"""What a domain's definition says, as far as Drover decides by it. Pure.

The definition itself is never regenerated from this: it travels as text and is
changed in place (`hostd.libvirt.transform`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lxml import etree

from controlplane.common.reasons import Reason
from hostd.disks.chain import Obstacle
from hostd.libvirt.host_needs import read_host_needs
from hostd.libvirt.xml import attribute, parse, text_of, to_text
from hostd.v1 import domain_pb2

_UNITS = {
    "b": 1, "bytes": 1,
    "kb": 10**3, "k": 2**10, "kib": 2**10,
    "mb": 10**6, "m": 2**20, "mib": 2**20,
    "gb": 10**9, "g": 2**30, "gib": 2**30,
    "tb": 10**12, "t": 2**40, "tib": 2**40,
}  # fmt: skip
_MIB = 2**20
NVRAM_DIRECTORY = Path("/var/lib/libvirt/qemu/nvram")
# Devices that are a piece of the host, or need a helper that only the host has.
_HOST_DEVICES = {
    "hostdev": "passes a device of the host through",
    "filesystem": "shares a directory of the host",
    "shmem": "shares memory with other guests",
    "lease": "holds a lease of the host's lock space",
}
# Files of the host, beside its disks, that the guest sees: where, and the attribute or
# element that names the file.
_HOST_FILES = (
    ("devices/memory", "source/path", "memory device"),
    ("devices/pstore", "path", "pstore device"),
    ("os/acpi", "table", "ACPI table"),
    ("sysinfo/entry", "@file", "firmware configuration entry"),
    ("devices/*/rom", "@file", "option ROM"),
)
_HOST_INTERFACES = ("hostdev", "vhostuser", "vdpa", "internal", "client", "server", "mcast", "udp")
_HOST_CHARACTER_DEVICES = ("dev", "pipe")
_PAST_THE_PAGE_CACHE = ("none", "directsync")
_VOLUME_ID = re.compile(r"[A-Za-z0-9_-]{1,32}")


@dataclass(frozen=True)
class Source:
    """Where a disk lies.

    Attributes:
        kind: libvirt's disk type: "file", "block", "volume", ...
        path: File or device; empty for the other kinds.
        pool: Storage pool, for "volume".
        volume: Volume in the pool, for "volume".
    """

    kind: str
    path: str = ""
    pool: str = ""
    volume: str = ""


@dataclass(frozen=True)
class Disk:
    """A disk with a medium in it.

    Attributes:
        target: Target device, as "vda".
        device: "disk", "cdrom", "floppy" or "lun".
        source: Where it lies.
        format: As given; empty when not given.
        read_only: As given, and always for a CD-ROM.
        shareable: Other machines may write to it at the same time.
        secret: UUID or usage of the libvirt secret it needs; empty without.
        direct_io: QEMU is to go past the page cache.
        logical_block_bytes: A block as the guest is told; 0 when not given.
    """

    target: str
    device: str
    source: Source
    format: str
    read_only: bool
    shareable: bool
    secret: str
    direct_io: bool
    logical_block_bytes: int

    @property
    def kind(self) -> domain_pb2.VolumeKind.ValueType:
        """DISK for what belongs to the machine, MEDIUM for what it only reads."""
        medium = self.read_only or self.device == "cdrom"
        return domain_pb2.VOLUME_KIND_MEDIUM if medium else domain_pb2.VOLUME_KIND_DISK


@dataclass(frozen=True)
class Definition:
    """A domain's definition.

    Attributes:
        uuid: libvirt UUID.
        name: libvirt name.
        vcpus: Virtual CPUs it starts with at most.
        memory_mib: Its memory, rounded up.
        virt_type: "kvm", "qemu", ...
        arch: As "x86_64".
        machine_type: As "pc-q35-7.2".
        emulator: Path of the QEMU binary; empty when not given.
        cpu_mode: See hostd.v1.Domain.
        cpu_xml: The <cpu> element; empty without.
        firmware: "bios", "efi" or "efi-secure".
        nvram: Path of its NVRAM file; empty without.
        has_tpm: It has an emulated TPM.
        disks: Its disks with a medium, in order.
        interfaces: Its network cards, in order.
        has_secrets: A password is in the definition.
        host_needs: What it takes from its host by number, size or name.
        obstacles: What makes it immovable, whatever the disks hold.
    """

    uuid: str
    name: str
    vcpus: int
    memory_mib: int
    virt_type: str
    arch: str
    machine_type: str
    emulator: str
    cpu_mode: str
    cpu_xml: str
    firmware: str
    nvram: str
    has_tpm: bool
    disks: tuple[Disk, ...]
    interfaces: tuple[domain_pb2.NetworkInterface, ...]
    has_secrets: bool
    host_needs: domain_pb2.HostNeeds
    obstacles: tuple[Obstacle, ...]


def parse_definition(xml: str) -> Definition:
    """Read a definition.

    Args:
        xml: As `virsh dumpxml --inactive` prints; with --security-info,
            `has_secrets` is exact.

    Raises:
        XmlError: It is not a domain definition.
    """
    root = parse(xml, "domain")
    type_ = root.find("os/type")
    cpu = root.find("cpu")
    return Definition(
        uuid=text_of(root.find("uuid")).lower(),
        name=text_of(root.find("name")),
        vcpus=_number(text_of(root.find("vcpu"))) or 1,
        memory_mib=memory_mib(root.find("memory")),
        virt_type=attribute(root, "type"),
        arch=attribute(type_, "arch"),
        machine_type=attribute(type_, "machine"),
        emulator=text_of(root.find("devices/emulator")),
        cpu_mode=attribute(cpu, "mode") or ("custom" if cpu is not None and len(cpu) else ""),
        cpu_xml="" if cpu is None else to_text(cpu),
        firmware=_firmware(root),
        nvram=_nvram(root),
        has_tpm=any(True for _ in root.iterfind("devices/tpm/backend[@type='emulator']")),
        disks=tuple(_disks(root)),
        interfaces=tuple(_interfaces(root)),
        has_secrets=any("passwd" in element.attrib for element in root.iterfind(".//*[@passwd]")),
        host_needs=read_host_needs(root),
        obstacles=tuple(_obstacles(root)),
    )


def memory_mib(element: etree._Element | None) -> int:
    """Memory of a <memory> element in MiB, rounded up."""
    unit = _UNITS.get(attribute(element, "unit").lower() or "kib", 2**10)
    return -(-_number(text_of(element)) * unit // _MIB)


def disk_source(element: etree._Element) -> Source | None:
    """Where a <disk> or <backingStore> lies; None when it has no source."""
    kind = attribute(element, "type")
    source = element.find("source")
    if source is None:
        return None
    if kind == "volume":
        return Source(kind, pool=attribute(source, "pool"), volume=attribute(source, "volume"))
    path = attribute(source, {"file": "file", "block": "dev", "dir": "dir"}.get(kind, "file"))
    if kind in ("file", "block", "dir") and not path:
        return None
    return Source(kind, path=path)


def _disks(root: etree._Element) -> Iterator[Disk]:
    for element in root.iterfind("devices/disk"):
        source = disk_source(element)
        if source is None:
            continue
        secret = element.find(".//secret")
        device = attribute(element, "device") or "disk"
        yield Disk(
            target=attribute(element.find("target"), "dev"),
            device=device,
            source=source,
            format=attribute(element.find("driver"), "type"),
            read_only=element.find("readonly") is not None or device == "cdrom",
            shareable=element.find("shareable") is not None,
            secret=attribute(secret, "uuid") or attribute(secret, "usage"),
            direct_io=attribute(element.find("driver"), "cache") in _PAST_THE_PAGE_CACHE,
            logical_block_bytes=_number(attribute(element.find("blockio"), "logical_block_size")),
        )


def _interfaces(root: etree._Element) -> Iterator[domain_pb2.NetworkInterface]:
    for element in root.iterfind("devices/interface"):
        source = element.find("source")
        named = (attribute(source, key) for key in ("bridge", "network", "dev", "name"))
        yield domain_pb2.NetworkInterface(
            mac_address=attribute(element.find("mac"), "address").lower(),
            type=attribute(element, "type"),
            source=next((value for value in named if value), ""),
        )


def _firmware(root: etree._Element) -> str:
    loader = root.find("os/loader")
    efi = attribute(root.find("os"), "firmware") == "efi" or attribute(loader, "type") == "pflash"
    if not efi:
        return "bios"
    secure = attribute(loader, "secure") == "yes" or any(
        attribute(feature, "name") == "secure-boot" and attribute(feature, "enabled") == "yes"
        for feature in root.iterfind("os/firmware/feature")
    )
    return "efi-secure" if secure else "efi"


def default_nvram_path(name: str, suffix: str = ".fd") -> str:
    """Where libvirt keeps the NVRAM of a domain unless the definition says otherwise."""
    return str(NVRAM_DIRECTORY / f"{name}_VARS{suffix}")


def _nvram(root: etree._Element) -> str:
    given = text_of(root.find("os/nvram")) or attribute(root.find("os/nvram/source"), "file")
    if given or attribute(root.find("os"), "firmware") != "efi":
        return given
    # Left to libvirt, which (up to 9.1) chooses anew at each start and writes it nowhere.
    stateless = attribute(root.find("os/loader"), "stateless") == "yes"
    return "" if stateless else default_nvram_path(text_of(root.find("name")))


def _obstacles(root: etree._Element) -> Iterator[Obstacle]:
    if attribute(root, "type") not in ("kvm", "qemu"):
        yield _immovable(f"Its domain type is {attribute(root, 'type')!r}, not kvm or qemu.")
    for name, what in _HOST_DEVICES.items():
        if root.find(f"devices/{name}") is not None:
            yield _immovable(f"It {what} (<{name}>).")
    yield from _device_obstacles(root)
    if root.find("launchSecurity") is not None:
        yield _immovable("Its memory is sealed to this host's CPU (<launchSecurity>).")
    for name in ("kernel", "initrd", "dtb"):
        path = text_of(root.find(f"os/{name}"))
        if path:
            yield _immovable(f"It boots the {name} {path}, a file of the host.")
    if attribute(root.find("os/nvram"), "type") not in ("", "file"):
        yield _immovable("Its NVRAM is not a file.")
    yield from _host_files(root)
    yield from _disk_obstacles(root)


def _host_files(root: etree._Element) -> Iterator[Obstacle]:
    for place, name, what in _HOST_FILES:
        for element in root.iterfind(place):
            path = (
                attribute(element, name[1:])
                if name.startswith("@")
                else text_of(element.find(name))
            )
            if path:
                yield _immovable(f"Its {what} is {path}, a file of the host that would stay here.")


def _device_obstacles(root: etree._Element) -> Iterator[Obstacle]:
    for interface in root.iterfind("devices/interface"):
        kind = attribute(interface, "type")
        if kind in _HOST_INTERFACES:
            yield _immovable(f"It has a network interface of type {kind}, bound to this host.")
    for tpm in root.iterfind("devices/tpm/backend"):
        if attribute(tpm, "type") != "emulator":
            yield _immovable("It uses the TPM of the host or one outside it.")
        elif tpm.find("source") is not None:
            yield _immovable("Its TPM state lies at a place of its own.")
        elif tpm.find("encryption") is not None:
            yield _immovable("Its TPM state is encrypted with a libvirt secret of this host.")
    for element in root.iterfind("devices/input[@type='passthrough']"):
        yield _immovable(f"It uses the input device {attribute(element.find('source'), 'evdev')}.")
    for name in ("serial", "parallel", "console", "channel"):
        for element in root.iterfind(f"devices/{name}"):
            if attribute(element, "type") in _HOST_CHARACTER_DEVICES:
                path = attribute(element.find("source"), "path")
                yield _immovable(f"Its <{name}> is the host's device {path}.")
                break


def _disk_obstacles(root: etree._Element) -> Iterator[Obstacle]:
    targets: set[str] = set()
    sources: set[Source] = set()
    for disk in _disks(root):
        if disk.source in sources:
            yield _immovable(f"Disk {disk.target} is the same file as another of its disks.")
        sources.add(disk.source)
        if not _VOLUME_ID.fullmatch(disk.target) or disk.target in targets:
            yield _immovable(f"The disk target {disk.target!r} is malformed or there twice.")
        targets.add(disk.target)
        if disk.source.kind not in ("file", "block", "volume"):
            yield _immovable(
                f"Disk {disk.target} is of type {disk.source.kind}; only files can be moved."
            )
        if disk.device == "lun":
            yield _immovable(f"Disk {disk.target} passes SCSI commands to a device of the host.")
        if disk.shareable:
            yield _immovable(f"Disk {disk.target} is shared with other machines.")
        if disk.secret:
            yield _immovable(
                f"Disk {disk.target} needs the libvirt secret {disk.secret}, which stays here."
            )


def _immovable(message: str) -> Obstacle:
    return Obstacle(Reason.INSTANCE_IMMOVABLE, message)


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0
