"""The tools: what Nova runs, the best that others do, and Drover's mover."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diskmover import certs
from tests.bench import over_nbd, over_ssh
from tests.bench.job import Job, Prepare, Tool
from tests.bench.links import ADDRESS
from tests.bench.rig import Rig, own_tool

_PORT = 7443


def _mover(*options: str) -> Prepare:
    @contextmanager
    def prepare(rig: Rig, job: Job) -> Iterator[list[str]]:
        pki = rig.directory / "pki"
        authority = certs.open_authority(pki)
        for name in "ab":
            certs.issue(authority, pki, name)

        def credentials(name: str) -> list[str]:
            return ["--cert", f"{pki}/{name}.pem", "--key", f"{pki}/{name}.key",
                    "--ca", f"{pki}/ca.pem"]  # fmt: skip

        address = f"{ADDRESS['b']}:{_PORT}"
        serve = [own_tool("diskmover"), "serve", "--root", str(job.directory), "--listen", address]
        seeds = ["--seed", job.older.name] if job.older else []
        push = [own_tool("diskmover"), "push", "--to", address, *options, *credentials("a")]
        with rig.server("b", *serve, *seeds, *credentials("b"), port=_PORT):
            yield [*push, *map(str, job.image.files)]

    return prepare


_SSH = frozenset({"tls"})
_ALL = frozenset({"tls", "hash"})
_retried = over_ssh.retried(over_ssh.rsync("--partial", "--append-verify"))
TOOLS = {
    tool.name: tool
    for tool in (
        Tool("rsync (Nova)", _SSH, over_ssh.rsync("--sparse"), reads_holes=True, updates=True),
        Tool(
            "rsync --inplace", _SSH,
            over_ssh.rsync("--inplace", "--no-whole-file", *over_ssh.FAST, fast=True),
            reads_holes=True, updates=True,
        ),
        Tool("rsync --partial", _SSH, over_ssh.rsync("--partial"), reads_holes=True),
        Tool("rsync, retried", _SSH, _retried, reads_holes=True),
        Tool("scp (Nova)", _SSH, over_ssh.scp, reads_holes=True),
        Tool("zstd | ssh", _SSH, over_ssh.zstd, reads_holes=True),
        Tool("nbdcopy", frozenset(), over_nbd.nbdcopy),
        Tool("qemu-img", frozenset(), over_nbd.qemu_img()),
        Tool("qemu-img, TLS", frozenset({"tls"}), over_nbd.qemu_img(tls=True)),
        Tool("drover raw", _ALL, _mover("--no-compress")),
        Tool("drover", _ALL, _mover(), adapts=True),
    )
}  # fmt: skip
