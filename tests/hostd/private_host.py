"""A real libvirtd of its own for a test session, in namespaces that a test enters.

libvirt's folders are private directories bound over the real ones, so neither the
machine's own libvirt nor another session sees the domains made here. A test runs
inside the mount namespace (`entered`): paths mean to it what they mean to libvirtd.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

IMAGES = Path("/var/lib/libvirt/images")
_PRIVATE = ("/run", "/var/lib/libvirt", "/etc/libvirt", "/var/log", "/var/cache")
_CLONE_NEWNS, _CLONE_FS = 0x00020000, 0x00000200
_QEMU_CONF = """\
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
swtpm_user = "root"
swtpm_group = "root"
"""
_libc = ctypes.CDLL(None, use_errno=True)


class PrivateHost:
    """One hypervisor."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="drover-host-"))
        for folder in (*_PRIVATE, IMAGES, "/var/log/libvirt/qemu", "/var/lib/libvirt/qemu"):
            self._outside(str(folder)).mkdir(parents=True, exist_ok=True)
        self._outside("/etc/libvirt/qemu.conf").write_text(_QEMU_CONF)
        self._outside("/etc/libvirt/libvirtd.conf").write_text(
            f'host_uuid = "{uuid.uuid4()}"\nauth_unix_rw = "none"\n'
        )
        binds = "".join(f"mount --bind {self._outside(f)} {f}\n" for f in _PRIVATE)
        self._holder = subprocess.Popen(
            ["unshare", "-m", "-n", "-u", "--propagation", "private", "sh", "-c",
             f"set -e\n{binds}ip link set lo up\nexec sleep infinity"],
            start_new_session=True,
        )  # fmt: skip
        self._daemons: list[subprocess.Popen[bytes]] = []
        comm = Path(f"/proc/{self._holder.pid}/comm")
        wait_for(lambda: comm.read_text().strip() == "sleep", "the namespaces")
        self._namespace = os.open(f"/proc/{self._holder.pid}/ns/mnt", os.O_RDONLY)
        self._launch("virtlogd", "/run/libvirt/virtlogd-sock")
        self._libvirtd = self._launch("libvirtd", "/run/libvirt/libvirt-sock")

    def _launch(self, name: str, socket: str) -> subprocess.Popen[bytes]:
        with self._outside(f"/var/log/{name}.out").open("wb") as log:
            daemon = subprocess.Popen(
                ["nsenter", "-t", str(self._holder.pid), "-m", "-n", "-u", name],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self._daemons.append(daemon)
        wait_for(self._outside(socket).exists, name)
        return daemon

    def restart_libvirtd(self) -> None:
        """Kill libvirtd with SIGKILL and start it again; guests run on."""
        self._libvirtd.kill()
        self._libvirtd.wait()
        self._outside("/run/libvirt/libvirt-sock").unlink(missing_ok=True)
        self._outside("/run/libvirtd.pid").unlink(missing_ok=True)
        self._daemons.remove(self._libvirtd)
        self._libvirtd = self._launch("libvirtd", "/run/libvirt/libvirt-sock")

    def stop_libvirtd(self) -> None:
        """Kill libvirtd with SIGKILL."""
        self._libvirtd.kill()
        self._libvirtd.wait()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let the calling thread, and what it starts, see this host's folders."""
        here = os.getcwd()
        home = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
        _check(_libc.unshare(_CLONE_FS))
        _check(_libc.setns(self._namespace, _CLONE_NEWNS))
        os.chdir(here)
        try:
            yield
        finally:
            # Threads that were started meanwhile share the folder state again.
            _check(_libc.unshare(_CLONE_FS))
            _check(_libc.setns(home, _CLONE_NEWNS))
            os.close(home)
            os.chdir(here)

    def close(self) -> None:
        """Kill everything that was started here and remove the folders."""
        for pid_file in self._outside("/run/libvirt/qemu").glob("*.pid"):
            _kill(int(pid_file.read_text()))
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()
        os.killpg(self._holder.pid, signal.SIGKILL)
        self._holder.wait()
        os.close(self._namespace)
        shutil.rmtree(self.directory)

    def _outside(self, inside: str) -> Path:
        return self.directory / inside.lstrip("/")


def wait_for(condition: Callable[[], object], what: str, timeout_seconds: float = 90.0) -> None:
    """Wait until a condition holds; TimeoutError after `timeout_seconds`."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_seconds} s")
        time.sleep(0.02)


def virsh(*arguments: str) -> str:
    """Run virsh as an operator on the host would; call it inside `entered`."""
    done = subprocess.run(
        ["virsh", "--quiet", "-c", "qemu:///system", *arguments],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise AssertionError(f"virsh {arguments}: {done.stderr}")
    return done.stdout


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
