"""The tools: what Nova runs, the best that others do, and Drover's mover."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from diskmover import certs
from tests.bench.images import Image
from tests.bench.links import ADDRESS
from tests.bench.rig import Rig, own_tool

_NBD_PORT, _MOVER_PORT = 10809, 7443

# Sets up servers and yields the command to time, to run on side a.
Prepare = Callable[[Rig, Image, Path], AbstractContextManager[list[str]]]


@dataclass(frozen=True)
class Tool:
    """A way to copy an image.

    Attributes:
        name: As in the table.
        promises: What holds when it has ended: "tls" (or ssh) and "hash", an end
            to end check of the content.
        prepare: How it is run.
        reads_holes: It reads a hole byte by byte: hopeless on huge images.
    """

    name: str
    promises: frozenset[str]
    prepare: Prepare
    reads_holes: bool = False


def _ssh_options(rig: Rig) -> list[str]:
    options = ["BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null",
               "LogLevel=ERROR", f"IdentityFile={rig.directory}/ssh/id"]  # fmt: skip
    return [word for option in options for word in ("-o", option)]


@contextmanager
def _sshd(rig: Rig) -> Iterator[None]:
    keys = rig.directory / "ssh"
    keys.mkdir(mode=0o700, exist_ok=True)
    for name in ("id", "host"):
        if not (keys / name).exists():
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)]
            subprocess.run(command, check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it
    config = keys / "sshd_config"
    config.write_text(
        f"HostKey {keys}/host\nAuthorizedKeysFile {keys}/id.pub\nStrictModes no\n"
        f"UsePAM no\nPidFile none\nPermitRootLogin yes\nListenAddress {ADDRESS['b']}\n"
        "Subsystem sftp internal-sftp\n"
    )
    with rig.server("b", "/usr/sbin/sshd", "-D", "-e", "-f", str(config), port=22):
        yield


@contextmanager
def _rsync(rig: Rig, image: Image, target: Path) -> Iterator[list[str]]:
    """Nova compresses everything but qcow2."""
    compress = ["--compress"] if image.format == "raw" else []
    shell = " ".join(["ssh", *_ssh_options(rig)])
    with _sshd(rig):
        yield ["rsync", "-r", "--sparse", *compress, "-e", shell,
               str(image.path), f"{ADDRESS['b']}:{target}"]  # fmt: skip


@contextmanager
def _scp(rig: Rig, image: Image, target: Path) -> Iterator[list[str]]:
    compress = ["-C"] if image.format == "raw" else []
    with _sshd(rig):
        yield ["scp", "-q", "-r", *compress, *_ssh_options(rig),
               str(image.path), f"{ADDRESS['b']}:{target}"]  # fmt: skip


@contextmanager
def _zstd_ssh(rig: Rig, image: Image, target: Path) -> Iterator[list[str]]:
    remote = " ".join(["ssh", *_ssh_options(rig), ADDRESS["b"]])
    unpack = f"zstd -d -q -f --sparse -o {target}"
    with _sshd(rig):
        yield ["bash", "-o", "pipefail", "-c",
               f"zstd -q -T0 -1 -c {image.path} | {remote} '{unpack}'"]  # fmt: skip


@contextmanager
def _nbd_target(rig: Rig, image: Image, target: Path) -> Iterator[str]:
    """An empty image of the right size behind qemu-nbd, without page cache."""
    create = ["qemu-img", "create", "-q", "-f", image.format, str(target)]
    subprocess.run([*create, str(_virtual_bytes(image))], check=True)
    options = ["--cache=none", "--aio=io_uring", "--discard=unmap", "--shared=16", "--persistent"]
    command = ["qemu-nbd", *options, "-f", image.format, "-b", ADDRESS["b"]]
    with rig.server("b", *command, "-p", str(_NBD_PORT), str(target), port=_NBD_PORT):
        yield f"nbd://{ADDRESS['b']}:{_NBD_PORT}"


@contextmanager
def _qemu_img(rig: Rig, image: Image, target: Path) -> Iterator[list[str]]:
    options = ["-n", "--target-is-zero", "-W", "-m", "16", "-t", "none", "-T", "none"]
    with _nbd_target(rig, image, target) as url:
        yield ["qemu-img", "convert", *options, "-f", image.format, "-O", "raw",
               str(image.path), url]  # fmt: skip


@contextmanager
def _nbdcopy(rig: Rig, image: Image, target: Path) -> Iterator[list[str]]:
    socket = rig.directory / "source.nbd"
    socket.unlink(missing_ok=True)
    serve = ["qemu-nbd", "--read-only", "--cache=none", "--aio=io_uring", "--shared=16",
             "--persistent", "-f", image.format, "-k", str(socket), str(image.path)]  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(rig.server("a", *serve))
        url = stack.enter_context(_nbd_target(rig, image, target))
        while not socket.exists():
            os.sched_yield()
        yield ["nbdcopy", "--flush", "--destination-is-zero", "--connections=8",
               f"nbd+unix:///?socket={socket}", url]  # fmt: skip


def _mover(*options: str) -> Prepare:
    @contextmanager
    def prepare(rig: Rig, image: Image, target: Path) -> Iterator[list[str]]:
        pki = rig.directory / "pki"
        authority = certs.open_authority(pki)
        for name in "ab":
            certs.issue(authority, pki, name)

        def credentials(name: str) -> list[str]:
            return ["--cert", f"{pki}/{name}.pem", "--key", f"{pki}/{name}.key",
                    "--ca", f"{pki}/ca.pem"]  # fmt: skip

        address = f"{ADDRESS['b']}:{_MOVER_PORT}"
        serve = [own_tool("diskmover"), "serve", "--root", str(target.parent), "--listen", address]
        push = [own_tool("diskmover"), "push", "--to", address, "--name", target.name, *options]
        with rig.server("b", *serve, *credentials("b"), port=_MOVER_PORT):
            yield [*push, *credentials("a"), str(image.path)]

    return prepare


def _virtual_bytes(image: Image) -> int:
    command = ["qemu-img", "info", "--output=json", "-f", image.format, str(image.path)]
    words = subprocess.check_output(command, text=True).split('"virtual-size": ')[1]
    return int(words.split(",")[0])


_SSH = frozenset({"tls"})
_ALL = frozenset({"tls", "hash"})
TOOLS = {
    tool.name: tool
    for tool in (
        Tool("rsync (Nova)", _SSH, _rsync, reads_holes=True),
        Tool("scp (Nova)", _SSH, _scp, reads_holes=True),
        Tool("zstd | ssh", _SSH, _zstd_ssh, reads_holes=True),
        Tool("nbdcopy", frozenset(), _nbdcopy),
        Tool("qemu-img", frozenset(), _qemu_img),
        Tool("drover raw", _ALL, _mover("--no-compress")),
        Tool("drover", _ALL, _mover()),
    )
}
