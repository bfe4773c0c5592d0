"""Exports, bitmaps and images with the stand-alone tool."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.diskmover import qemu, tool
from tests.diskmover.conftest import Certs
from tests.diskmover.qemu import MIB
from tests.diskmover.tool import Ended, Running, Serve

SIZE = 70 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    made = qemu.create(tmp_path / "disk.qcow2", SIZE)
    qemu.write(made, "write -P 1 0 5M", "write -P 2 66M 2M")
    return made


@pytest.fixture
def serving(certs: Certs, tmp_path: Path) -> Iterator[Callable[..., Serve]]:
    """Receivers with options of their own."""
    root = tmp_path / "in"
    root.mkdir()
    with ExitStack() as running:

        def start(*options: str) -> Serve:
            serve = Serve(root, [*certs.options("b"), *options])
            running.callback(serve.stop)
            return serve

        yield start


def push(address: str, serve: Serve, certs: Certs, *options: str) -> Ended:
    """Push an export under the name "disk"."""
    job = ["--nbd", address, "--name", "disk", "--to", serve.address, "--json"]
    return tool.run("push", *job, *certs.options("a"), *options)


@pytest.mark.parametrize("by", ["bitmap", "comparing"])
def test_a_copy_is_brought_up_to_date(
    by: str, image: Path, serving: Callable[..., Serve], certs: Certs, tmp_path: Path
) -> None:
    serve = serving("--update")
    with qemu.export(image, tmp_path / "s") as address:
        first = push(address, serve, certs).receipt
    assert first["mode"] == "guest-visible"
    qemu.run("qemu-img", "bitmap", "--add", "-f", "qcow2", image, "b0")
    qemu.write(image, "write -P 7 3M 64k", "write -z 67M 64k")
    changes = ["--since", first["digest"], *(["--bitmap", "b0"] if by == "bitmap" else [])]
    with qemu.export(image, tmp_path / "s", "--bitmap=b0") as address:
        second = push(address, serve, certs, *changes).receipt
        now = tool.run("digest", "--nbd", address)
    assert now.out == f"{second['digest']}  {address}\n"
    assert second["wire_bytes"] < MIB
    qemu.compare(image, "qcow2", serve.root / "disk", "raw")


def test_without_leave_nothing_is_brought_up_to_date(
    image: Path, serving: Callable[..., Serve], certs: Certs, tmp_path: Path
) -> None:
    serve = serving()
    with qemu.export(image, tmp_path / "s") as address:
        first = push(address, serve, certs).receipt
    qemu.write(image, "write -P 7 3M 64k")
    with qemu.export(image, tmp_path / "s") as address:
        refused = push(address, serve, certs, "--since", first["digest"])
    assert (refused.code, refused.error["code"]) == (1, "TARGET_EXISTS")
    assert tool.run("digest", serve.root / "disk").out.split()[0] == first["digest"]


def test_what_arrives_becomes_an_image(
    image: Path, serving: Callable[..., Serve], certs: Certs, tmp_path: Path
) -> None:
    serve = serving("--format", "qcow2")
    with qemu.export(image, tmp_path / "s") as address:
        receipt = push(address, serve, certs).receipt
    qemu.compare(image, "qcow2", serve.root / "disk", "qcow2")
    qemu.check(serve.root / "disk")
    with qemu.export(serve.root / "disk", tmp_path / "s") as address:
        assert tool.run("digest", "--nbd", address).out.split()[0] == receipt["digest"]
    plain = tool.run(
        "push", image, "--name", "plain", "--to", serve.address, "--json", *certs.options("a")
    )
    assert (plain.code, plain.error["code"]) == (1, "SOURCE_INVALID")
    assert [path.name for path in serve.root.iterdir() if path.name[0] != "."] == ["disk"]


def test_ctrl_c_ends_a_digest_that_takes_long(image: Path, tmp_path: Path) -> None:
    socket = tmp_path / "s"
    command = ["qemu-storage-daemon", "--nbd-server", f"addr.type=unix,addr.path={socket}"]
    command += ["--object", "throttle-group,id=t,x-bps-read=524288"]
    command += ["--blockdev", f"driver=file,filename={image},node-name=f,read-only=on"]
    command += ["--blockdev", "driver=throttle,file=f,throttle-group=t,node-name=n,read-only=on"]
    command += ["--export", "type=nbd,id=e,node-name=n,name=,writable=off"]
    qemu.write(image, "write -P 3 0 70M")
    with qemu.serving(command, socket) as address:
        digest = Running("--nbd", address, command="digest")
        tool.eventually("it reads", lambda: digest.threads() > 1)
        digest.send(signal.SIGINT)
        ended = digest.ended()
    assert (ended.code, ended.out, ended.err) == (130, "", "diskmover: interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["push", "--nbd", "unix:/s", "--name", "d", "--bitmap", "b0"], "--since"),
        (["push", __file__, "--since", "ab" * 32], "go with --nbd"),
        (["push", __file__, "--bitmap", "b0", "--since", "ab" * 32], "go with --nbd"),
        (["digest"], "either a file"),
        (["digest", __file__, "--nbd", "unix:/s"], "either a file"),
    ],
)
def test_wrong_usage_is_explained(arguments: list[str], says: str, certs: Certs) -> None:
    to = ["--to", "127.0.0.1:1", *certs.options("a")] if arguments[0] == "push" else []
    refused = tool.run(*arguments, *to)
    assert refused.code == 2
    assert says in refused.err
