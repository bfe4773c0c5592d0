"""The tools that go through ssh."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.job import Job, Prepare
from tests.bench.links import ADDRESS
from tests.bench.rig import Rig

# The cheapest cipher where the CPU knows AES, and the codec that keeps up with a link.
_FAST_SHELL = ("-c", "aes128-gcm@openssh.com")
FAST = ("--sparse", "--compress-choice=zstd", "--compress-level=1")
# A user who sees the link break runs it again, but not for ever.
_MOST_ATTEMPTS = 100


def rsync(*options: str, fast: bool = False) -> Prepare:
    """Rsync with these options."""

    @contextmanager
    def prepare(rig: Rig, job: Job) -> Iterator[list[str]]:
        shell = shlex.join(["ssh", *_options(rig), *(_FAST_SHELL if fast else ())])
        with _sshd(rig):
            yield ["rsync", "-r", *options, *_nova_codec(job, "--compress", fast), "-e", shell,
                   *_files(job), f"{ADDRESS['b']}:{job.directory}/"]  # fmt: skip

    return prepare


def retried(once: Prepare) -> Prepare:
    """The same command until it succeeds."""

    @contextmanager
    def prepare(rig: Rig, job: Job) -> Iterator[list[str]]:
        with once(rig, job) as command:
            loop = f"for _ in {{1..{_MOST_ATTEMPTS}}}; do {shlex.join(command)} && exit; done"
            yield ["bash", "-c", f"{loop}; exit 1"]

    return prepare


@contextmanager
def scp(rig: Rig, job: Job) -> Iterator[list[str]]:
    """Scp as Nova runs it."""
    with _sshd(rig):
        yield ["scp", "-q", "-r", *_nova_codec(job, "-C"), *_options(rig),
               *_files(job), f"{ADDRESS['b']}:{job.directory}/"]  # fmt: skip


@contextmanager
def zstd(rig: Rig, job: Job) -> Iterator[list[str]]:
    """A stream of zstd, as one types it."""
    remote = shlex.join(["ssh", *_options(rig), ADDRESS["b"]])
    streams = (
        f"zstd -q -T0 -1 -c {file} | "
        f"{remote} 'zstd -d -q -f --sparse -o {job.directory / file.name}'"
        for file in job.image.files
    )
    with _sshd(rig):
        yield ["bash", "-o", "pipefail", "-c", " && ".join(streams)]


def _nova_codec(job: Job, option: str, fast: bool = False) -> list[str]:
    """Nova compresses everything but qcow2."""
    return [option] if job.image.format == "raw" and not fast else []


def _files(job: Job) -> list[str]:
    return [str(file) for file in job.image.files]


def _options(rig: Rig) -> list[str]:
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
