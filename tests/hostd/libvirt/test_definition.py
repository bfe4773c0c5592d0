"""What in a definition binds a machine to its host; libvirt's documented forms, no host."""

from __future__ import annotations

import pytest

from hostd.libvirt.definition import parse_definition


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
