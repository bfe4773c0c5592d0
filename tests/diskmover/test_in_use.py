"""Images that a QEMU has open: who can write to one keeps `push` from copying it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.diskmover import qemu, tool
from tests.diskmover.conftest import Certs
from tests.diskmover.tool import Ended, Serve


def _push(serve: Serve, certs: Certs, source: Path, *options: str) -> Ended:
    base: list[str | Path] = ["push", source, "--to", serve.address, "--json", *options]
    return tool.run(*base, *certs.options("a"))


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_an_image_that_qemu_can_write_to_is_refused_until_it_is_closed(
    serve: Serve, certs: Certs, tmp_path: Path, image_format: str
) -> None:
    image = tmp_path / f"in-use.{image_format}"
    qemu.run("qemu-img", "create", "-q", "-f", image_format, image, "4M")
    qemu.write(image, "write -P 7 0 1M", image_format=image_format)
    socket = tmp_path / "nbd"
    command = ["qemu-nbd", "--persistent", f"--socket={socket}", f"--format={image_format}"]
    with qemu.serving([*command, str(image)], socket):
        refused = _push(serve, certs, image)
        assert (refused.code, refused.error["code"]) == (5, "SOURCE_CHANGED")
        assert refused.error["retryable"] is True
        assert "stop the guest first" in refused.error["message"]
        assert not (serve.root / image.name).exists()
        forced = _push(serve, certs, image, "--force", "--name", f"forced.{image_format}")
        assert forced.receipt["size_bytes"] == image.stat().st_size
    assert _push(serve, certs, image).code == 0
    assert tool.same(image, serve.root / image.name)


def test_an_idle_qemu_io_is_noticed_too(serve: Serve, certs: Certs, tmp_path: Path) -> None:
    image = tool.noise(tmp_path / "idle.raw", 1 << 20)
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as idle:
        assert idle.stdin is not None
        assert idle.stdout is not None
        # Once it answers, it has the image open.
        idle.stdin.write(b"length\n")
        assert idle.stdout.readline()
        assert _push(serve, certs, image).error["code"] == "SOURCE_CHANGED"
        idle.stdin.write(b"quit\n")
        assert idle.wait(tool.PATIENCE_SECONDS) == 0
    assert _push(serve, certs, image).code == 0


def test_who_only_reads_an_image_is_no_user(serve: Serve, certs: Certs, tmp_path: Path) -> None:
    image = tool.noise(tmp_path / "read-only.raw", 1 << 20)
    with qemu.export(image, tmp_path / "nbd", image_format="raw"):
        assert _push(serve, certs, image).code == 0
