"""Machines with small disks and no system: for moves of what is off."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from tests.hostd.fleet import FAST, Guest, HostdHost, TwoHosts
from tests.lab.host import IMAGES


def make_image(host: HostdHost, name: str, *, format_: str = "qcow2", backing: str = "") -> None:
    """Make a disk image of 1 MiB below the storage root, an overlay if `backing` is given."""
    path = f"{IMAGES}/{name}"
    chain = ["-b", backing, "-F", "raw"] if backing else []
    host.host.run("mkdir", "-p", path.rpartition("/")[0])
    host.host.run("qemu-img", "create", "-q", "-f", format_, *chain, path, "1M")
    host.host.run("qemu-io", "-f", format_, "-c", "write -q -P 7 0 64k", path)


def disk(name: str, target: str = "vda", *, format_: str = "qcow2", more: str = "") -> str:
    """A <disk> of an image below the storage root."""
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='{format_}'/>"
        f"<source file='{IMAGES}/{name}'/><target dev='{target}' bus='virtio'/>{more}</disk>"
    )


def cdrom(name: str, target: str = "sda") -> str:
    """A CD-ROM with an image below the storage root in it."""
    return (
        "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>"
        f"<source file='{IMAGES}/{name}'/><target dev='{target}' bus='sata'/><readonly/></disk>"
    )


def define_xml(host: HostdHost, guest: Guest, xml: str) -> Guest:
    """Define a machine from its whole definition."""
    file = host.host.path(f"/run/{guest.name}.xml")
    file.write_text(xml, "utf-8")
    host.host.virsh("define", f"/run/{guest.name}.xml")
    file.unlink()
    return guest


def define(host: HostdHost, name: str, devices: str, *, head: str = "", os_: str = "") -> Guest:
    """Define a machine that is off; `head` and `os_` add to the domain and its <os>."""
    guest = Guest(name, str(uuid.uuid4()))
    return define_xml(
        host,
        guest,
        f"<domain type='qemu'><name>{name}</name><uuid>{guest.uuid}</uuid>"
        f"<memory unit='MiB'>32</memory><vcpu>1</vcpu>{head}"
        f"<os><type arch='x86_64' machine='q35'>hvm</type>{os_}</os><devices>{devices}</devices>"
        "</domain>",
    )


@contextmanager
def emptied(fleet: TwoHosts) -> Iterator[None]:
    """Afterwards no domain and no file below the storage roots is left."""
    yield
    fleet.revive()
    for each in fleet.hosts.values():
        for domain_uuid in each.host.virsh("list", "--all", "--uuid").split():
            each.host.virsh("destroy", domain_uuid, check=False)
            each.host.virsh("undefine", domain_uuid, "--nvram", "--snapshots-metadata")
        for root in (IMAGES, FAST):
            each.host.run("find", root, "-mindepth", "1", "-delete")
