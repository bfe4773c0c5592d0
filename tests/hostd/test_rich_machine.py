"""I7: what a guest sees of its hardware is the same after a move, and after the way back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest

from hostd.v1 import domain_pb2
from hostd.v1 import host_service_pb2 as pb
from tests.hostd.fleet import FAST, Guest, HostdHost, Mode, Move, TwoHosts
from tests.hostd.tiny import cdrom, define_xml, disk, emptied, make_image
from tests.lab.host import IMAGES
from tests.lab.wait import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

NAME = "rich"
UUID = "7c0ffee0-0000-4000-8000-0000000000e1"
NVRAM = f"/var/lib/libvirt/qemu/nvram/{NAME}_VARS.fd"
TPM = f"/var/lib/libvirt/swtpm/{UUID}/tpm2"
# What operators and other tools put into definitions; libvirt adds addresses to it.
RICH = f"""\
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{NAME}</name>
  <uuid>{UUID}</uuid>
  <genid>43dc0cf8-809b-4adb-9bea-a9abb5f3d90e</genid>
  <title>Büro "Süd" &amp; 東京 - spaces  kept</title>
  <description>Line one
line two, with &lt;markup&gt;</description>
  <metadata>
    <a:instance xmlns:a="http://example.org/a"><a:owner uuid="1">é</a:owner></a:instance>
    <b:note xmlns:b="urn:example:b" b:kind="x"/>
  </metadata>
  <maxMemory slots='4' unit='MiB'>1024</maxMemory>
  <memory unit='MiB'>128</memory>
  <currentMemory unit='MiB'>96</currentMemory>
  <vcpu placement='static' current='1'>2</vcpu>
  <iothreads>1</iothreads>
  <sysinfo type='smbios'>
    <system><entry name='serial'>ASSET 7</entry><entry name='uuid'>{UUID}</entry></system>
  </sysinfo>
  <os firmware='efi'>
    <type arch='x86_64' machine='pc-q35-6.2'>hvm</type>
    <firmware><feature enabled='no' name='secure-boot'/></firmware>
    <bootmenu enable='yes' timeout='10'/>
    <smbios mode='sysinfo'/>
  </os>
  <features><acpi/><apic/><pae/><vmcoreinfo state='on'/></features>
  <cpu mode='custom' match='exact' check='none'>
    <model fallback='allow'>qemu64</model>
    <topology sockets='1' dies='1' cores='2' threads='1'/>
    <feature policy='disable' name='svm'/>
    <numa><cell id='0' cpus='0-1' memory='128' unit='MiB'/></numa>
  </cpu>
  <clock offset='variable' adjustment='3600' basis='utc'>
    <timer name='rtc' tickpolicy='catchup'/><timer name='hpet' present='no'/>
  </clock>
  <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>preserve</on_crash>
  <pm><suspend-to-mem enabled='no'/><suspend-to-disk enabled='no'/></pm>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none' io='native' discard='unmap' iothread='1'/>
      <source file='{IMAGES}/rich/root disk.qcow2'/>
      <target dev='vda' bus='virtio'/>
      <iotune><total_iops_sec>900</total_iops_sec></iotune>
      <serial>ROOT-0001</serial>
      <boot order='1'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{FAST}/data.raw'/>
      <target dev='sdb' bus='scsi'/>
      <serial>DATA-0002</serial>
      <wwn>5000c50015ea71aa</wwn>
      <vendor>ACME</vendor><product>ROCKET</product>
    </disk>
    {disk("golden.qcow2", "vdc", more="<readonly/><serial>RO-3</serial>")}
    {cdrom("config.iso")}
    <disk type='file' device='cdrom'><target dev='sdc' bus='sata'/><readonly/></disk>
    <controller type='scsi' model='virtio-scsi'><driver queues='2'/></controller>
    <controller type='usb' model='qemu-xhci' ports='8'/>
    <interface type='bridge'>
      <mac address='52:54:00:aa:bb:01'/><source bridge='br0'/><model type='virtio'/>
      <driver name='qemu' queues='2'/><mtu size='1400'/><link state='up'/>
      <alias name='ua-net-front'/><boot order='2'/>
    </interface>
    <interface type='bridge'>
      <mac address='52:54:00:aa:bb:02'/><source bridge='br0'/><model type='e1000e'/>
    </interface>
    <serial type='pty'><target port='0'/></serial>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <input type='tablet' bus='usb'/>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
    <graphics type='vnc' port='-1' autoport='yes' passwd='s3cret' keymap='de'/>
    <sound model='ich9'/>
    <video><model type='vga' vram='32768'/></video>
    <watchdog model='i6300esb' action='pause'/>
    <memballoon model='virtio' autodeflate='on'><stats period='10'/></memballoon>
    <rng model='virtio'><rate bytes='1024'/><backend model='random'>/dev/urandom</backend></rng>
    <panic model='isa'/>
  </devices>
  <qemu:commandline><qemu:arg value='-no-fd-bootchk'/></qemu:commandline>
</domain>
"""


@pytest.fixture(autouse=True)
def nothing_left(fleet: TwoHosts) -> Iterator[None]:
    with emptied(fleet):
        yield


def digests(host: HostdHost, *paths: str) -> dict[str, tuple[str, int, int]]:
    """Content and owner of what the definition does not hold."""
    found = {}
    for path in paths:
        for line in host.host.run("find", path, "-type", "f", "!", "-name", ".lock").splitlines():
            status = host.host.path(line).stat()
            content = hashlib.sha256(host.host.path(line).read_bytes()).hexdigest()
            found[line] = (content, status.st_uid, status.st_gid)
    return found


def hardware(host: HostdHost) -> tuple[str, bool]:
    """The definition as libvirt holds it, secrets included, and the autostart flag."""
    xml = host.host.virsh("dumpxml", "--inactive", "--security-info", UUID)
    info = host.host.virsh("dominfo", UUID)
    return xml, "enable" in info.split("Autostart:")[1].split("\n")[0]


def boot_once(host: HostdHost) -> None:
    """Let firmware and TPM write their state."""
    host.host.virsh("start", UUID)
    wait_for(lambda: digests(host, TPM), "TPM state")
    host.host.virsh("destroy", UUID)


def test_a_machine_with_a_bit_of_everything_is_the_same_there_and_back(fleet: TwoHosts) -> None:
    a, b = fleet["a"], fleet["b"]
    make_image(a, "rich/base.raw", format_="raw")
    make_image(a, "rich/root disk.qcow2", backing=f"{IMAGES}/rich/base.raw")
    make_image(a, "../fast/data.raw", format_="raw")
    make_image(a, "golden.qcow2")
    a.host.path(f"{IMAGES}/config.iso").write_bytes(b"user-data" * 512)
    guest = define_xml(a, Guest(NAME, UUID), RICH)
    a.host.virsh("autostart", UUID)
    boot_once(a)
    before, state = hardware(a), digests(a, NVRAM, TPM)
    assert before[1]
    assert len(state) == 2
    disks = digests(a, IMAGES, FAST)

    move = Move(a, b, guest.uuid)
    move.prepare()
    move.stop(Mode.MODE_GRACEFUL)
    move.park()
    left = digests(a, "/var/lib/libvirt/qemu/nvram", "/var/lib/libvirt/swtpm")
    assert [path for path in left if ".drover-parked-" not in path] == []
    assert sorted(left.values()) == sorted(state.values())
    move.copy()
    move.build()

    # Paths are the same on both hosts, so nothing at all may differ.
    assert hardware(b) == (before[0], False)
    assert digests(b, NVRAM, TPM) == state
    there = digests(b, IMAGES, FAST)
    # The mover's receipts go with the end of the move; owners are libvirt's to set.
    assert {path: found[0] for path, found in there.items() if ".dm-" not in path} == {
        path: found[0] for path, found in disks.items()
    }
    move.start()
    assert hardware(b) == before
    move.undo()

    assert hardware(a) == before
    assert digests(a, NVRAM, TPM) == state
    assert digests(a, IMAGES, FAST) == disks
    left = digests(b, IMAGES, "/var/lib/libvirt/qemu/nvram", "/var/lib/libvirt/swtpm")
    assert left == {}
    assert a.host.state(NAME) == "shut off"


def test_internal_snapshots_travel_and_can_be_reverted_to(fleet: TwoHosts) -> None:
    a, b = fleet["a"], fleet["b"]
    make_image(a, "web.qcow2")
    guest = define_xml(
        a,
        Guest("web", "7c0ffee0-0000-4000-8000-0000000000e2"),
        f"<domain type='qemu'><name>web</name><uuid>7c0ffee0-0000-4000-8000-0000000000e2</uuid>"
        "<memory unit='MiB'>32</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='q35'>hvm"
        f"</type></os><devices>{disk('web.qcow2')}</devices></domain>",
    )
    a.host.virsh("snapshot-create-as", guest.uuid, "before ünpack", "a description")
    pattern = f"{IMAGES}/web.qcow2"
    a.host.run("qemu-io", "-f", "qcow2", "-c", "write -q -P 9 0 64k", pattern)
    a.host.virsh("snapshot-create-as", guest.uuid, "after")
    before = [a.host.virsh("snapshot-dumpxml", guest.uuid, s) for s in ("before ünpack", "after")]
    move = Move(a, b, guest.uuid)
    move.prepare()
    move.stop(Mode.MODE_GRACEFUL)
    move.park()
    move.copy()
    built: domain_pb2.Domain = move.build().domain
    assert list(built.obstacles) == []
    move.call(a, pb.DiscardParkedRequest())
    move.forget()
    after = [b.host.virsh("snapshot-dumpxml", guest.uuid, s) for s in ("before ünpack", "after")]
    assert after == before
    assert b.host.virsh("snapshot-current", guest.uuid, "--name").strip() == "after"
    b.host.virsh("snapshot-revert", guest.uuid, "before ünpack")
    b.host.run("qemu-io", "-f", "qcow2", "-c", "read -q -P 7 0 64k", pattern)
