"""The sender's host crashes, and a file has the time that it had before its last write.

A file system makes content durable without the time of the write (fdatasync, lazytime).
So after a crash nothing but the start of the machine tells that a file may be another.
"""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from tests.diskmover import qemu, stranger, tool
from tests.diskmover.conftest import Certs
from tests.diskmover.tool import Running, Serve, durable_bytes
from tests.support.filesystems import loop_device

MIB = 1 << 20
SIZE = 32 * MIB
BLOCK = 4096
ENOUGH = 8 * MIB
# In a mount namespace of its own, the machine has been started another time.
RESTARTED = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'


def _overwrite_unseen(device: str, content: bytes) -> None:
    """Change a block of a file of an unmounted file system, and nothing of its inode."""
    with Path(device).open("r+b") as disk:
        at = disk.read().index(content)
        disk.seek(at)
        disk.write(bytes(BLOCK))


def _after_restart(tmp_path: Path) -> list[str]:
    """A command that runs another as if the machine had been started again."""
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("8b1b5d6e-0000-4000-8000-000000000000\n")
    return ["unshare", "--mount", "sh", "-c", RESTARTED, str(boot_id)]


def test_what_was_placed_before_the_host_crashed_is_compared_not_believed(
    serve: Serve, certs: Certs, tmp_path: Path
) -> None:
    mounted = tmp_path / "fs"
    mounted.mkdir()
    source = mounted / "disk"
    job: list[str | Path] = [source, "--to", serve.address, "--json", *certs.options("a")]
    with loop_device(tmp_path / "fs.img", 64 * MIB) as device:
        tool.check("mkfs.ext4", "-q", device)
        tool.check("mount", device, str(mounted))
        try:
            tool.noise(source, SIZE)
            before = source.stat()
            placed = source.read_bytes()[5 * BLOCK : 6 * BLOCK]
            first = Running(*job, "--limit", "4M")
            tool.eventually("some is durable", lambda: durable_bytes(serve.root, "disk") >= ENOUGH)
            first.send(signal.SIGKILL)
            assert first.ended().code == -signal.SIGKILL
            tool.check("umount", str(mounted))
            _overwrite_unseen(device, placed)
            tool.check("mount", device, str(mounted))
            after = source.stat()
            assert (before.st_ino, before.st_mtime_ns, before.st_ctime_ns) == (
                after.st_ino, after.st_mtime_ns, after.st_ctime_ns
            )  # fmt: skip
            again = tool.push_when_free(*job, within=_after_restart(tmp_path))
            receipt = again.receipt
            assert tool.same(source, serve.root / "disk"), "a mix was published"
            assert receipt["digest"] == stranger.digest_of(source)
            assert receipt["wire_bytes"] <= SIZE - ENOUGH + MIB, "what is the same was sent again"
        finally:
            subprocess.run(["umount", str(mounted)], check=True)


def test_content_with_a_name_is_gone_on_from_after_a_restart(
    serve: Serve, certs: Certs, tmp_path: Path
) -> None:
    image = tool.noise(tmp_path / "image", SIZE)
    with qemu.export(image, tmp_path / "s", image_format="raw") as address:
        named: list[str | Path] = ["--nbd", address, "--content-id", "monday", "--name", "named"]
        job = [*named, "--to", serve.address, "--json", *certs.options("a")]
        first = Running(*job, "--limit", "4M")
        tool.eventually("some is durable", lambda: durable_bytes(serve.root, "named") >= ENOUGH)
        first.send(signal.SIGKILL)
        assert first.ended().code == -signal.SIGKILL
        again = tool.push_when_free(*job, "--limit", "8M", within=_after_restart(tmp_path))
    assert again.receipt["wire_bytes"] <= SIZE - ENOUGH + MIB
    resumed = [line["progress"]["resumed_bytes"] for line in again.lines if "progress" in line]
    assert resumed[-1] >= ENOUGH, "its name was not believed"
    assert tool.same(image, serve.root / "named")
