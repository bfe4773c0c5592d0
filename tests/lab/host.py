"""A hypervisor of the lab: namespaces, private folders, libvirtd, guests.

A host is a network, a mount and a UTS namespace, kept by a process that sleeps.
Folders of the lab are bound over the places where libvirt keeps its things, so
that each host has its own, and one `find` shows what there is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

from tests.lab.guest.build import Recipe, build_image
from tests.lab.network import LabNetwork, run
from tests.lab.process import KEPT, Daemon, alive, kill_all
from tests.lab.wait import wait_for

PRIVATE = ("/run", "/var/lib/libvirt", "/etc/libvirt", "/var/log", "/var/cache")
IMAGES = "/var/lib/libvirt/images"
VIRT_TYPE = os.environ.get("DROVER_LAB_VIRT", "qemu")

_QEMU_CONF = """\
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
remember_owner = 0
"""
_LIBVIRTD_CONF = """\
host_uuid = "{uuid}"
auth_unix_rw = "none"
unix_sock_rw_perms = "0700"
"""


class Host:
    """One hypervisor.

    Args:
        directory: Its private folders.
        network: The lab's network.
        name: Its name, a letter or two.
        number: Its position in the lab, for its address.
    """

    def __init__(self, directory: Path, network: LabNetwork, name: str, number: int) -> None:
        self.name = name
        self.directory = directory
        self.address = network.address(number)
        self.namespace = network.namespace(name)
        self._network = network
        self._number = number
        self._pid_file = directory / "holder.pid"
        socket = directory / "run/libvirt/libvirt-sock"
        self.libvirt_uri = f"qemu+unix:///system?socket={socket}"
        self.libvirtd = self._daemon("libvirtd", ["libvirtd"], "run/libvirt/libvirt-sock")
        self._virtlogd = self._daemon("virtlogd", ["virtlogd"], "run/libvirt/virtlogd-sock")
        self._virtlockd = self._daemon("virtlockd", ["virtlockd"], "run/libvirt/virtlockd-sock")

    # --- life ----------------------------------------------------------------

    def up(self) -> None:
        """Make the namespaces and start libvirt in them."""
        for folder in (*PRIVATE, "/etc/drover", "/var/lib/drover"):
            self.path(folder).mkdir(parents=True, exist_ok=True)
        for folder in (IMAGES, "/run/lock", "/var/log/libvirt/qemu", "/var/lib/libvirt/qemu"):
            self.path(folder).mkdir(parents=True, exist_ok=True)
        self.path("/etc/libvirt/qemu.conf").write_text(_QEMU_CONF)
        host_uuid = uuid.uuid5(uuid.NAMESPACE_DNS, str(self.directory))
        self.path("/etc/libvirt/libvirtd.conf").write_text(_LIBVIRTD_CONF.format(uuid=host_uuid))
        self._network.plug(self.name, self._number)
        self._hold_namespaces()
        run("ip", "-n", self.namespace, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", self.namespace, "link", "set", "br0", "up")
        for daemon in (self._virtlogd, self._virtlockd, self.libvirtd):
            daemon.start()

    def _hold_namespaces(self) -> None:
        binds = "".join(f"mount --bind {self.path(f)} {f}\n" for f in PRIVATE)
        # /sys is mounted anew to show the interfaces of this namespace.
        script = (
            f"set -e\nmount -t sysfs sysfs /sys\n{binds}hostname {self.name}\nexec sleep infinity"
        )
        # Its output goes to a file: a pipe would be kept open as long as the host lives.
        with (self.directory / "holder.log").open("wb") as log:
            holder = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self.namespace}",
                 "unshare", "--mount", "--uts", "--propagation", "private", "sh", "-c", script],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        KEPT.append(holder)
        self._pid_file.write_text(str(holder.pid))

        def held() -> bool:
            if holder.poll() is not None:
                said = (self.directory / "holder.log").read_text(errors="replace")
                raise RuntimeError(
                    f"namespaces of host {self.name}: exit {holder.returncode}\n{said}"
                )
            return Path(f"/proc/{holder.pid}/comm").read_text().strip() == "sleep"

        wait_for(held, f"namespaces of host {self.name}")

    def down(self) -> None:
        """Kill everything in the namespaces; the network removes the namespaces."""
        kill_all(self.processes())

    def processes(self) -> list[int]:
        """Every process in the host's network namespace."""
        if self.namespace not in self._network.namespaces():
            return []
        return [int(pid) for pid in run("ip", "netns", "pids", self.namespace).split()]

    def path(self, inside: str) -> Path:
        """Where a path of the host lies as seen from outside."""
        return self.directory / inside.lstrip("/")

    def inside(self, path: str) -> Path:
        """The same path as processes of the host see it, with what is mounted there."""
        return Path(f"/proc/{self._holder()}/root") / path.lstrip("/")

    # --- processes -----------------------------------------------------------

    def enter(self, *command: str) -> list[str]:
        """A command line that runs in the host's namespaces."""
        return ["nsenter", "-t", str(self._holder()), "-m", "-u", "-n", "--", *command]

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command on the host."""
        return run(*self.enter(*command), check=check)

    def daemon(self, name: str, command: Sequence[str], ready: Path) -> Daemon:
        """A daemon on the host that is ready once a path (as seen from outside) exists."""
        return Daemon(
            name=f"{name}@{self.name}",
            command=self.enter(*command),
            log=self.directory.parent / "log" / f"{name}-{self.name}.log",
            ready=ready.exists,
        )

    def _holder(self) -> int:
        pid = int(self._pid_file.read_text())
        if not alive(pid):
            raise RuntimeError(f"host {self.name} is down")
        return pid

    def _daemon(self, name: str, command: list[str], socket: str) -> _LibvirtDaemon:
        return _LibvirtDaemon(self, name, command, self.directory / socket)

    # --- guests --------------------------------------------------------------

    def virsh(self, *arguments: str, check: bool = True) -> str:
        """Run virsh against this host's libvirtd, as an operator on it would."""
        return self.run("virsh", "--quiet", "--connect", "qemu:///system", *arguments, check=check)

    def define_guest(
        self,
        name: str,
        *,
        recipe: Recipe | None = None,
        format: str = "qcow2",
        memory_mib: int = 192,
        vcpus: int = 1,
        mac: str | None = None,
        start: bool = True,
        extra_devices: str = "",
    ) -> str:
        """Define a guest as an operator would, from a fresh copy of the image.

        Returns:
            Its libvirt UUID.
        """
        image = build_image(recipe or Recipe())
        disk = self.path(f"{IMAGES}/{name}.{format}")
        run("qemu-img", "convert", "-f", "raw", "-O", format, str(image), str(disk))
        guest_uuid = str(uuid.uuid4())
        xml = domain_xml(
            name, guest_uuid, f"{IMAGES}/{name}.{format}", format, memory_mib, vcpus,
            mac or mac_of(guest_uuid), extra_devices,
        )  # fmt: skip
        source = self.path(f"/run/{name}.xml")
        source.write_text(xml)
        self.virsh("define", f"/run/{name}.xml")
        source.unlink()
        if start:
            self.virsh("start", name)
        return guest_uuid

    def state(self, name: str) -> str:
        """What virsh says of a guest: "running", "shut off"; empty when not defined."""
        return self.virsh("domstate", name, check=False).strip()

    def console(self, name: str) -> str:
        """Everything the guest has said on this host."""
        log = self.path(f"/var/log/libvirt/console-{name}.log")
        return log.read_text(errors="replace") if log.exists() else ""

    def wait_for_console(self, name: str, pattern: str, timeout_seconds: float = 60.0) -> str:
        """Wait until the guest has said something; the text that matched."""
        found = wait_for(
            lambda: re.search(pattern, self.console(name)),
            f"guest {name} on host {self.name} saying {pattern!r}",
            timeout_seconds=timeout_seconds,
            interval_seconds=0.1,
            explain=lambda: self.console(name)[-2000:],
        )
        return found.group(0)

    def forget_console(self, name: str) -> None:
        """Empty the console log, so that what is waited for next is new."""
        log = self.path(f"/var/log/libvirt/console-{name}.log")
        if log.exists():
            os.truncate(log, 0)

    def remove_guest(self, name: str) -> None:
        """Destroy and undefine a guest and delete its disks."""
        self.virsh("destroy", name, check=False)
        self.virsh("undefine", name, "--nvram", "--snapshots-metadata", check=False)
        for disk in self.path(IMAGES).glob(f"{name}.*"):
            disk.unlink()
        shutil.rmtree(self.path(f"{IMAGES}/.drover-parked"), ignore_errors=True)


class _LibvirtDaemon(Daemon):
    """libvirtd and its helpers: the socket must be removed before a start to be waited for."""

    def __init__(self, host: Host, name: str, command: list[str], socket: Path) -> None:
        super().__init__(
            name=f"{name}@{host.name}",
            command=command,
            log=host.directory.parent / "log" / f"{name}-{host.name}.log",
            ready=socket.exists,
        )
        self._host = host
        self._plain = command
        self._socket = socket

    def start(self, timeout_seconds: float = 90.0) -> None:
        """Start it and wait for its socket."""
        self._socket.unlink(missing_ok=True)
        self.command = self._host.enter(*self._plain)
        super().start(timeout_seconds)


def mac_of(guest_uuid: str) -> str:
    """A MAC address of QEMU's range, made from a UUID."""
    digits = guest_uuid.replace("-", "")[:6]
    return f"52:54:00:{digits[0:2]}:{digits[2:4]}:{digits[4:6]}"


def domain_xml(
    name: str,
    guest_uuid: str,
    disk: str,
    format: str,
    memory_mib: int,
    vcpus: int,
    mac: str,
    extra_devices: str = "",
) -> str:
    """The definition of a guest, with what operators have in theirs."""
    return f"""\
<domain type='{VIRT_TYPE}'>
  <name>{name}</name>
  <uuid>{guest_uuid}</uuid>
  <metadata>
    <app:note xmlns:app='https://example.org/app'>left alone</app:note>
  </metadata>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>{vcpus}</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type><boot dev='hd'/></os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='{format}'/>
      <source file='{disk}'/>
      <target dev='vda' bus='virtio'/>
      <serial>{name[:12]}-0</serial>
    </disk>
    <interface type='bridge'>
      <mac address='{mac}'/>
      <source bridge='br0'/>
      <model type='virtio'/>
    </interface>
    <serial type='file'>
      <source path='/var/log/libvirt/console-{name}.log' append='on'/>
      <target type='isa-serial' port='0'/>
    </serial>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <memballoon model='virtio'/>
    {extra_devices}
  </devices>
</domain>
"""
