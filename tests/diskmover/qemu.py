"""Images and exports of the real QEMU tools."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20
_PATIENCE_SECONDS = 60.0


def run(*command: str | Path) -> str:
    """Run a tool; its output when it succeeds."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def create(path: Path, size_bytes: int, *options: str) -> Path:
    """An empty qcow2 image."""
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, str(size_bytes))
    return path


def write(path: Path, *commands: str, image_format: str = "qcow2") -> None:
    """Let `qemu-io` do something to an image, such as "write -P 7 0 64k"."""
    arguments = [part for command in commands for part in ("-c", command)]
    done = run("qemu-io", "-f", image_format, *arguments, path)
    assert "rror" not in done, done


def compare(left: Path, left_format: str, right: Path, right_format: str) -> None:
    """Fail unless a guest sees the same on both."""
    run("qemu-img", "compare", "-q", "-f", left_format, "-F", right_format, left, right)


def check(image: Path) -> None:
    """Fail unless `qemu-img check` finds nothing at all in a qcow2 image."""
    found = json.loads(run("qemu-img", "check", "--output=json", "-f", "qcow2", image))
    bad = ("check-errors", "leaks", "corruptions")
    assert not {key: found[key] for key in bad if found.get(key)}, found


@contextmanager
def export(image: Path, path: Path, *options: str, image_format: str = "qcow2") -> Iterator[str]:
    """Export an image with `qemu-nbd`, read-only; yields its address."""
    command = ["qemu-nbd", "--persistent", "--shared=8", f"--socket={path}"]
    command += ["--read-only", f"--format={image_format}", *options, str(image)]
    with serving(command, path) as address:
        yield address


@contextmanager
def serving(command: list[str], path: Path) -> Iterator[str]:
    """Run an NBD server that listens on a socket; yields its address."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            _await_socket(server, path)
            yield f"unix:{path}"
        finally:
            server.kill()  # it only reads
            server.wait(_PATIENCE_SECONDS)
            path.unlink(missing_ok=True)


def _await_socket(server: subprocess.Popen[str], path: Path) -> None:
    """Wait until the server accepts; its socket file is there before that."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                return
        assert server.poll() is None, server.stderr.read() if server.stderr else "gone"
        assert time.monotonic() < end, f"{server.args!r} does not listen"
        time.sleep(0.01)
