"""The tools that write to an NBD server at the target."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tests.bench.images import Image
from tests.bench.job import Job, Prepare
from tests.bench.links import ADDRESS
from tests.bench.rig import Rig

_PORT = 10809
_SERVER = ("qemu-nbd", "--cache=none", "--aio=io_uring", "--shared=16", "--persistent")


def qemu_img(tls: bool = False) -> Prepare:
    """Convert with many requests at once, past the page cache."""

    @contextmanager
    def prepare(rig: Rig, job: Job) -> Iterator[list[str]]:
        options = ["-n", "--target-is-zero", "-W", "-m", "16", "-t", "none", "-T", "none"]
        target = f"driver=nbd,host={ADDRESS['b']},port={_PORT}"
        if tls:
            options += _credentials(rig, "client", ",username=bench")
            target += ",tls-creds=tls"
        with _target(rig, job, tls=tls):
            yield ["qemu-img", "convert", *options, "-f", job.image.read_as, str(job.image.path),
                   "--target-image-opts", target]  # fmt: skip

    return prepare


@contextmanager
def nbdcopy(rig: Rig, job: Job) -> Iterator[list[str]]:
    """Copy from one NBD server to the other."""
    socket = rig.directory / "source.nbd"
    socket.unlink(missing_ok=True)
    serve = [*_SERVER, "--read-only", "-f", job.image.read_as, "-k", str(socket)]
    with ExitStack() as stack:
        stack.enter_context(rig.server("a", *serve, str(job.image.path)))
        stack.enter_context(_target(rig, job))
        while not socket.exists():
            os.sched_yield()
        yield ["nbdcopy", "--flush", "--destination-is-zero", "--connections=8",
               f"nbd+unix:///?socket={socket}", f"nbd://{ADDRESS['b']}:{_PORT}"]  # fmt: skip


@contextmanager
def _target(rig: Rig, job: Job, tls: bool = False) -> Iterator[None]:
    """An empty image of the right size behind qemu-nbd, without page cache."""
    create = ["qemu-img", "create", "-q", "-f", job.image.read_as, str(job.target)]
    subprocess.run([*create, str(_virtual_bytes(job.image))], check=True)
    serve = [*_SERVER, "--discard=unmap", "-f", job.image.read_as, "-b", ADDRESS["b"]]
    if tls:
        serve += [*_credentials(rig, "server"), "--tls-creds=tls"]
    with rig.server("b", *serve, "-p", str(_PORT), str(job.target), port=_PORT):
        yield


def _credentials(rig: Rig, end: str, more: str = "") -> list[str]:
    """TLS by a shared key: the bytes of a copy cost the same as with certificates."""
    keys = rig.directory / "psk"
    keys.mkdir(mode=0o700, exist_ok=True)
    if not (keys / "keys.psk").exists():
        (keys / "keys.psk").write_text(f"bench:{secrets.token_hex(32)}\n")
    fast = "priority=NORMAL:-CHACHA20-POLY1305"  # it chooses that by itself, in software
    return ["--object", f"tls-creds-psk,id=tls,dir={keys},endpoint={end},{fast}{more}"]


def _virtual_bytes(image: Image) -> int:
    command = ["qemu-img", "info", "--output=json", "-f", image.read_as, str(image.path)]
    return int(json.loads(subprocess.check_output(command))["virtual-size"])
