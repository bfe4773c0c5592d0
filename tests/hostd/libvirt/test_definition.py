"""What in a definition binds a machine to its host; libvirt's documented forms, no host."""

from __future__ import annotations

import pytest

from hostd.libvirt.definition import parse_definition
from hostd.libvirt.host_needs import parse_set


def definition(devices: str = "", os_: str = "", top: str = "") -> str:
    return (
        "<domain type='kvm'><name>web</name><uuid>11111111-1111-4111-8111-111111111111</uuid>"
        "<memory unit='MiB'>64</memory><vcpu>1</vcpu>"
        f"<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>{os_}</os>{top}"
        f"<devices>{devices}</devices></domain>"
    )


def disk(more: str, kind: str = "file", source: str = "file='/d/a.qcow2'", attrs: str = "") -> str:
    return (
        f"<disk type='{kind}' {attrs}><driver type='qcow2'/><source {source}/>"
        f"<target dev='vda'/>{more}</disk>"
    )


BOUND = {
    "PCI device": ("<hostdev mode='subsystem' type='pci'/>", "passes a device"),
    "USB device": ("<hostdev mode='subsystem' type='usb'/>", "passes a device"),
    "virtiofs": ("<filesystem type='mount'><driver type='virtiofs'/></filesystem>", "directory"),
    "shared memory": ("<shmem name='s'/>", "shares memory"),
    "sanlock lease": ("<lease><lockspace>l</lockspace></lease>", "lease"),
    "SR-IOV card": ("<interface type='hostdev'/>", "type hostdev"),
    "vDPA card": ("<interface type='vdpa'/>", "type vdpa"),
    "TPM of the host": ("<tpm><backend type='passthrough'/></tpm>", "TPM of the host"),
    "sealed TPM": (
        "<tpm><backend type='emulator'><encryption secret='s'/></backend></tpm>",
        "encrypted with a libvirt secret",
    ),
    "NVDIMM": (
        "<memory model='nvdimm'><source><path>/srv/nv</path></source></memory>",
        "memory device is /srv/nv",
    ),
    "virtio-pmem": (
        "<memory model='virtio-pmem'><source><path>/srv/pm</path></source></memory>",
        "memory device is /srv/pm",
    ),
    "pstore": ("<pstore backend='acpi-erst'><path>/srv/erst</path></pstore>", "/srv/erst"),
    "option ROM": ("<interface type='user'><rom file='/srv/x.rom'/></interface>", "/srv/x.rom"),
    "evdev": ("<input type='passthrough'><source evdev='/dev/input/event1'/></input>", "event1"),
    "serial port": ("<serial type='dev'><source path='/dev/ttyS0'/></serial>", "/dev/ttyS0"),
    "shareable disk": (disk("<shareable/>"), "shared with other machines"),
    "encrypted disk": (
        disk("<encryption format='luks'><secret type='passphrase' uuid='u'/></encryption>"),
        "needs the libvirt secret u",
    ),
    "network disk": (disk("", "network", "protocol='rbd' name='p/i'"), "of type network"),
    "NVMe disk": (disk("", "nvme", "type='pci'"), "of type nvme"),
    "SCSI LUN": (disk("", "block", "dev='/dev/sdx'", "device='lun'"), "passes SCSI commands"),
    "a disk twice": (disk("") + disk("").replace("vda", "vdb"), "same file as another"),
}


@pytest.mark.parametrize(("devices", "words"), BOUND.values(), ids=list(BOUND))
def test_a_device_that_is_a_piece_of_the_host_is_named(devices: str, words: str) -> None:
    found = parse_definition(definition(devices))
    assert any(words in obstacle.message for obstacle in found.obstacles), found.obstacles


@pytest.mark.parametrize(
    ("os_", "top", "words"),
    [
        ("<kernel>/srv/vmlinuz</kernel>", "", "boots the kernel /srv/vmlinuz"),
        ("<acpi><table type='slic'>/srv/slic</table></acpi>", "", "ACPI table is /srv/slic"),
        ("", "<sysinfo type='fwcfg'><entry name='a' file='/srv/f'/></sysinfo>", "/srv/f"),
        ("", "<launchSecurity type='sev'/>", "sealed"),
        ("<nvram type='network'/>", "", "NVRAM is not a file"),
    ],
)
def test_a_file_or_seal_of_the_host_is_named(os_: str, top: str, words: str) -> None:
    found = parse_definition(definition(os_=os_, top=top))
    assert any(words in obstacle.message for obstacle in found.obstacles), found.obstacles


def test_what_moves_with_the_machine_is_no_obstacle() -> None:
    devices = (
        disk("<serial>S</serial><iotune><total_iops_sec>9</total_iops_sec></iotune>")
        + "<memory model='dimm'><target><size unit='MiB'>64</size></target></memory>"
        + "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
        + "<interface type='user'><rom bar='off'/></interface>"
        + "<serial type='pty'/><rng model='virtio'><backend model='random'>/dev/urandom"
        + "</backend></rng><watchdog model='itco'/><vsock model='virtio'/>"
    )
    top = "<sysinfo type='smbios'><bios><entry name='vendor'>x</entry></bios></sysinfo>"
    assert parse_definition(definition(devices, top=top)).obstacles == ()


def test_what_is_taken_from_the_host_is_read() -> None:
    top = (
        "<memoryBacking><hugepages><page size='1' unit='GiB' nodeset='0'/><page size='2048'/>"
        "</hugepages></memoryBacking>"
        "<cputune><vcpupin vcpu='0' cpuset='4-7,^6'/><emulatorpin cpuset='1'/>"
        "<iothreadpin iothread='1' cpuset='9'/></cputune>"
        "<numatune><memory mode='strict' nodeset='0'/><memnode cellid='0' nodeset='2-3'/>"
        "</numatune>"
    )
    devices = (
        "<interface type='user'><filterref filter='b'/></interface>"
        "<interface type='user'><filterref filter='a'/></interface>"
        "<memory model='dimm'><source><nodemask>5</nodemask></source></memory>"
    )
    os_ = "<loader type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader>"
    needs = parse_definition(definition(devices, os_, top)).host_needs
    assert needs.loader_path == "/usr/share/OVMF/OVMF_CODE.fd"
    assert list(needs.cpus) == [1, 4, 5, 7, 9]
    assert list(needs.numa_nodes) == [0, 2, 3, 5]
    assert list(needs.hugepage_kib) == [2048, 1 << 20]
    assert list(needs.network_filters) == ["a", "b"]
    default = "<memoryBacking><hugepages/></memoryBacking>"
    assert list(parse_definition(definition(top=default)).host_needs.hugepage_kib) == [0]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", set()),
        ("0", {0}),
        ("0-3,^2, 8", {0, 1, 3, 8}),
        ("3-1", set()),
        ("x,1,-5,2-,٣", {1}),
        ("0-99999999999999", set()),
    ],
)
def test_sets_are_read_as_libvirt_writes_them(text: str, numbers: set[int]) -> None:
    assert parse_set(text) == numbers
