"""The tools that write to an NBD server at the target."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tests.bench.images import Image
from tests.bench.job import Job
from tests.bench.links import ADDRESS
from tests.bench.rig import Rig

_PORT = 10809
_SERVER = ("qemu-nbd", "--cache=none", "--aio=io_uring", "--shared=16", "--persistent")


@contextmanager
def qemu_img(rig: Rig, job: Job) -> Iterator[list[str]]:
    """Convert with many requests at once, past the page cache."""
    options = ["-n", "--target-is-zero", "-W", "-m", "16", "-t", "none", "-T", "none"]
    with _target(rig, job) as url:
        yield ["qemu-img", "convert", *options, "-f", job.image.read_as, "-O", "raw",
               str(job.image.path), url]  # fmt: skip


@contextmanager
def nbdcopy(rig: Rig, job: Job) -> Iterator[list[str]]:
    """Copy from one NBD server to the other."""
    socket = rig.directory / "source.nbd"
    socket.unlink(missing_ok=True)
    serve = [*_SERVER, "--read-only", "-f", job.image.read_as, "-k", str(socket)]
    with ExitStack() as stack:
        stack.enter_context(rig.server("a", *serve, str(job.image.path)))
        url = stack.enter_context(_target(rig, job))
        while not socket.exists():
            os.sched_yield()
        yield ["nbdcopy", "--flush", "--destination-is-zero", "--connections=8",
               f"nbd+unix:///?socket={socket}", url]  # fmt: skip


@contextmanager
def _target(rig: Rig, job: Job) -> Iterator[str]:
    """An empty image of the right size behind qemu-nbd, without page cache."""
    create = ["qemu-img", "create", "-q", "-f", job.image.read_as, str(job.target)]
    subprocess.run([*create, str(_virtual_bytes(job.image))], check=True)
    serve = [*_SERVER, "--discard=unmap", "-f", job.image.read_as, "-b", ADDRESS["b"]]
    with rig.server("b", *serve, "-p", str(_PORT), str(job.target), port=_PORT):
        yield f"nbd://{ADDRESS['b']}:{_PORT}"


def _virtual_bytes(image: Image) -> int:
    command = ["qemu-img", "info", "--output=json", "-f", image.read_as, str(image.path)]
    return int(json.loads(subprocess.check_output(command))["virtual-size"])
