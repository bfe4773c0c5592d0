"""Fixtures for tests of hostd against a real libvirtd."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from hostd.disks.roots import StorageRoots
from hostd.libvirt.conn import LibvirtConnection
from tests.hostd.private_host import IMAGES, PrivateHost, virsh


@pytest.fixture(scope="package")
def private_host() -> Iterator[PrivateHost]:
    """A libvirtd of these tests' own."""
    host = PrivateHost()
    yield host
    host.close()


@pytest.fixture
def on_host(private_host: PrivateHost) -> Iterator[PrivateHost]:
    """Run the test on the private host, and leave no guest behind."""
    with private_host.entered():
        yield private_host
        for domain_uuid in virsh("list", "--all", "--uuid").split():
            if virsh("domstate", domain_uuid).split()[0] != "shut":
                virsh("destroy", domain_uuid)
            if domain_uuid in virsh("list", "--all", "--uuid"):
                virsh("managedsave-remove", domain_uuid)
                virsh("undefine", domain_uuid, "--nvram", "--snapshots-metadata",
                      "--checkpoints-metadata")  # fmt: skip
        for entry in IMAGES.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@pytest.fixture
def connection(on_host: PrivateHost) -> Iterator[LibvirtConnection]:
    """A connection of ours to its libvirtd."""
    opened = LibvirtConnection("qemu:///system")
    yield opened
    opened.close()


@pytest.fixture
def conn(connection: LibvirtConnection) -> Iterator[libvirt.virConnect]:
    """The same, as libvirt has it."""
    with connection.get() as opened:
        yield opened


@pytest.fixture
def roots(on_host: PrivateHost) -> StorageRoots:
    """One storage root, where libvirt keeps images."""
    return StorageRoots({"images": IMAGES})


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """hostd's own directory."""
    return tmp_path / "state"
