"""A guest that runs is copied through libvirt's pull backup, and then what it wrote since.

diskmover stands alone here: the control plane and hostd take no part in it.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.diskmover.conftest import Certs
from tests.diskmover.tool import Running, Serve
from tests.e2e.fleet import GUEST, Fleet
from tests.lab.host import IMAGES, Host
from tests.lab.wait import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

SOCKET = "/run/backup.sock"
EXPORT = f"unix:{SOCKET}:vda"


@contextmanager
def backup(host: Host, checkpoint: str, since: str = "") -> Iterator[None]:
    """Export the guest's disk as it is now, and what changed since a checkpoint.

    Args:
        host: Where the guest runs.
        checkpoint: One to begin at this moment.
        since: The one that the export's bitmap counts from.
    """
    incremental = f"<incremental>{since}</incremental>" if since else ""
    bitmap = "exportbitmap='changed'" if since else ""
    files = {
        "backup.xml": f"""
            <domainbackup mode='pull'>{incremental}
              <server transport='unix' socket='{SOCKET}'/>
              <disks><disk name='vda' backup='yes' type='file' {bitmap}>
                <scratch file='{IMAGES}/{GUEST}.scratch'/>
              </disk></disks>
            </domainbackup>""",
        "checkpoint.xml": f"<domaincheckpoint><name>{checkpoint}</name></domaincheckpoint>",
    }
    for name, xml in files.items():
        host.path(f"/run/{name}").write_text(xml)
    host.virsh("backup-begin", GUEST, *(f"/run/{name}" for name in files))
    try:
        yield
    finally:
        host.virsh("domjobabort", GUEST)
        for name in files:
            host.path(f"/run/{name}").unlink()


@pytest.fixture
def source(fleet: Fleet) -> Iterator[Host]:
    """The guest's host; no checkpoint stays."""
    host = fleet.source
    yield host
    for checkpoint in host.virsh("checkpoint-list", GUEST, "--name", "--topological").split():
        host.virsh("checkpoint-delete", GUEST, checkpoint)


@pytest.fixture
def certs(tmp_path: Path) -> Certs:
    """Certificates of a fleet that has nothing to do with Drover's."""
    return Certs(tmp_path / "certs")


@pytest.fixture
def serve(fleet: Fleet, certs: Certs) -> Iterator[Serve]:
    """A receiver on the other host, into a folder that only it has."""
    host = fleet.target
    folder = host.path("/var/cache/copies")
    folder.mkdir()
    serve = Serve(
        Path("/var/cache/copies"), certs.options("b"), f"{host.address}:0",
        within=host.enter(), options=["--update"],
    )  # fmt: skip
    yield serve
    assert serve.stop() == 0
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def boots(disk: Path, log: Path) -> str:
    """What the guest says when it boots from a disk, which stays as it is."""
    command = ["qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-m", "192"]
    command += ["-drive", f"file={disk},format=raw,if=virtio,snapshot=on"]
    command += ["-display", "none", "-serial", f"file:{log}", "-nic", "none"]
    with subprocess.Popen(command) as qemu:
        try:
            wait_for(
                lambda: "DROVER READY" in log.read_text(errors="replace") if log.exists() else "",
                "the copy booting",
                timeout_seconds=120,
            )
        finally:
            qemu.kill()
    return log.read_text(errors="replace")


def test_a_running_guest_is_copied_and_then_only_what_it_wrote(
    fleet: Fleet, source: Host, serve: Serve, certs: Certs, tmp_path: Path
) -> None:
    copy = fleet.target.path("/var/cache/copies") / "web1.raw"

    def push(*options: str) -> dict[str, object]:
        ended = Running(
            "--nbd", EXPORT, "--name", "web1.raw", "--to", serve.address, "--json",
            *certs.options("a"), *options, within=source.enter(),
        ).ended()  # fmt: skip
        assert source.state(GUEST) == "running"
        return ended.receipt

    def compare() -> None:
        url = f"nbd+unix:///vda?socket={SOCKET}"
        source.run("qemu-img", "compare", "-f", "raw", "-F", "raw", url, str(copy))

    with backup(source, "c1"):
        first = push()
        compare()
    fleet.forget_consoles()
    source.virsh("reset", GUEST)  # the guest boots again and counts it on its disk
    fleet.expect_boot(source, fleet.guest.boots + 1)
    with backup(source, "c2", since="c1"):
        second = push("--bitmap", "changed", "--since", str(first["digest"]))
        compare()

    assert second["digest"] != first["digest"]
    assert 0 < int(str(second["wire_bytes"])) < int(str(first["wire_bytes"])) / 4
    said = boots(copy, tmp_path / "console")
    assert re.findall(r"DROVER CHECK (\w+)", said) == ["ok"]
    assert f"DROVER BOOT n={fleet.guest.boots + 1} " in said
