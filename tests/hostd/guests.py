"""Small guests on a private host: definitions and disks for the tests of hostd."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.hostd.private_host import IMAGES, virsh

KIB, MIB = 1024, 1024**2


def make_disk(
    path: Path, format_: str = "qcow2", size: int = MIB, backing: tuple[str, str] | None = None
) -> Path:
    """Make a disk image with some random content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chain = ["-b", backing[0], "-F", backing[1]] if backing else []
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", format_, *chain, str(path), str(size)], check=True
    )
    io = ["qemu-io", "-f", format_, "-c", f"write -P {os.urandom(1)[0]} 0 64k", str(path)]
    subprocess.run(io, check=True, capture_output=True)
    return path


def disk_xml(target: str, path: Path | str, format_: str = "qcow2", more: str = "") -> str:
    """A <disk> of a file."""
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='{format_}'/>"
        f"<source file='{path}'/><target dev='{target}' bus='virtio'/>"
        f"<serial>SER-{target}</serial>{more}</disk>"
    )


@dataclass
class Guest:
    """A defined guest."""

    name: str
    disks: Sequence[Path] = ()
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))

    def xml(self, devices: str = "", os_: str = "", head: str = "") -> str:
        """Its definition."""
        return (
            f"<domain type='qemu'><name>{self.name}</name><uuid>{self.uuid}</uuid>"
            f"<metadata><app:note xmlns:app='urn:example:note'>keep me</app:note></metadata>"
            f"<memory unit='MiB'>64</memory><vcpu>1</vcpu>{head}"
            f"<os{' firmware=' + repr('efi') if os_ else ''}>"
            f"<type arch='x86_64' machine='q35'>hvm</type>{os_}</os>"
            "<features><acpi/></features><on_crash>destroy</on_crash>"
            f"<devices>{devices}<graphics type='vnc' passwd='s3cret'/></devices></domain>"
        )

    def define(self, xml: str) -> Guest:
        """Define it as an operator would."""
        file = IMAGES.parent / f"{self.uuid}.xml"
        file.write_text(xml)
        virsh("define", str(file))
        file.unlink()
        return self


def guest_with_disks(name: str, count: int = 1, devices: str = "", os_: str = "") -> Guest:
    """Define a guest with qcow2 disks in the images directory."""
    paths = [make_disk(IMAGES / name / f"{name}-{n}.qcow2") for n in range(count)]
    disks = "".join(disk_xml(f"vd{chr(97 + n)}", path) for n, path in enumerate(paths))
    guest = Guest(name, paths)
    return guest.define(guest.xml(disks + devices, os_))


def destroy(guest: Guest) -> None:
    """Remove a guest from libvirt; does nothing when it is gone."""
    for command in (("destroy", guest.uuid),
                    ("undefine", guest.uuid, "--nvram", "--snapshots-metadata")):  # fmt: skip
        subprocess.run(
            ["virsh", "-q", "-c", "qemu:///system", *command], check=False, capture_output=True
        )
