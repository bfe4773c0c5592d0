"""A lab: one control plane, a few hosts, joined as an operator would join them.

The daemons are the console scripts of the virtual environment, configured by
`drover init` and `drover-hostd join`; nothing here knows their insides.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.lab.host import IMAGES, Host
from tests.lab.network import LabNetwork, run
from tests.lab.process import Daemon, kill_all
from tests.lab.wait import wait_for

BIN = Path(sys.executable).parent
CONTROL = "ctl"
FLEET = "lab"
API_PORT, ENROL_PORT, HOSTD_PORT = 7440, 7441, 7442


class CommandFailed(AssertionError):
    """A command of the lab's user failed.

    Attributes:
        exit_code: Of the command.
        output: What it printed, both streams.
    """

    def __init__(self, command: Sequence[str], exit_code: int, output: str) -> None:
        super().__init__(f"{' '.join(command)}: exit {exit_code}\n{output}")
        self.exit_code = exit_code
        self.output = output


class Lab:
    """A fleet on one machine.

    Args:
        directory: Where everything of it lies.
        hosts: Names of the hosts.
        database_url: Database of the control plane; its own SQLite file if empty.

    Attributes:
        api_port: Port of the control plane that its user talks to.
    """

    def __init__(
        self, directory: Path, hosts: Iterable[str] = ("a", "b", "c"), database_url: str = ""
    ) -> None:
        self.directory = directory.resolve()
        self.network = LabNetwork.of(self.directory)
        self.hosts = {
            name: Host(self.directory / name, self.network, name, number)
            for number, name in enumerate(hosts, start=1)
        }
        self.database_url = database_url
        self.api_port = API_PORT
        self.address = self.network.address(0)
        self.pki = self.directory / "pki"
        self.controlplane = Daemon(
            name="controlplane",
            command=self._in_control(
                BIN / "drover-controlplane", "--config", self.directory / "controlplane.toml"
            ),
            log=self.directory / "log/controlplane.log",
            ready=lambda: self.answers("host", "list"),
        )
        self.hostds = {
            name: Daemon(
                name=f"hostd@{name}",
                command=(),
                log=self.directory / f"log/hostd-{name}.log",
                ready=lambda at=host.namespace: _listens(at, HOSTD_PORT),  # type: ignore[misc]
            )
            for name, host in self.hosts.items()
        }

    # --- life ----------------------------------------------------------------

    def up(self) -> None:
        """Start everything; afterwards every host is enabled and alive."""
        self.down()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.network.up()
        self.network.plug(CONTROL, 0)
        self.init()
        self.controlplane.start()
        for host in self.hosts.values():
            host.up()
            self.join(host.name)
        for name in self.hosts:
            self.wait_for_host(name)
        self.write_environment()

    def init(self) -> None:
        """`drover init`, and the settings that make a lab brisk."""
        self.drover(
            "init", "--dir", str(self.directory), "--state-dir", str(self.directory / "state"),
            "--fleet", FLEET, "--advertise", f"{self.address}:{API_PORT}",
        )  # fmt: skip
        settings = self.directory / "controlplane.toml"
        text = settings.read_text()
        if self.database_url:
            text = _replace_line(text, "url", f'url = "{self.database_url}"')
        brisk = "\n[inventory]\ninterval_seconds = 0.5\ndead_after_seconds = 5\n"
        brisk += "\n[saga]\nlease_seconds = 6\npoll_seconds = 0.2\n"
        settings.write_text(text + brisk)

    def replica(self, number: int) -> tuple[Daemon, int]:
        """A further control plane on the same database, not started.

        Args:
            number: From 1.

        Returns:
            It, and its API port.
        """
        text = (self.directory / "controlplane.toml").read_text()
        for port in (API_PORT, ENROL_PORT):
            text = text.replace(f":{port}", f":{port + 10 * number}")
        settings = self.directory / f"controlplane-{number}.toml"
        settings.write_text(text)
        port = API_PORT + 10 * number
        daemon = Daemon(
            name=f"controlplane-{number}",
            command=self._in_control(BIN / "drover-controlplane", "--config", settings),
            log=self.directory / f"log/controlplane-{number}.log",
            ready=lambda: _listens(self.network.namespace(CONTROL), port),
        )
        return daemon, port

    def join(self, name: str) -> None:
        """`drover host add` here, `drover-hostd join` there, and the daemon started."""
        host = self.hosts[name]
        config = host.path("/etc/drover/hostd.toml")
        token = json.loads(self.drover("host", "add", name, "-o", "json"))["joinToken"]
        run(
            *host.enter(
                str(BIN / "drover-hostd"), "--config", str(config), "join", token,
                "--address", f"{host.address}:{HOSTD_PORT}",
                "--data-address", f"{host.address}:{HOSTD_PORT + 1}",
                "--root", f"images={IMAGES}",
            )
        )  # fmt: skip
        self.hostds[name].command = host.enter(
            str(BIN / "drover-hostd"), "--config", str(config), "run"
        )
        state = host.path("/var/lib/drover")
        self.hostds[name].environment = {"DROVER_STATE__DIRECTORY": str(state)}
        self.hostds[name].start()

    def wait_for_host(self, name: str) -> None:
        """Wait until the control plane has heard from a host."""
        wait_for(
            lambda: self.drover_json("host", "show", name).get("alive"),
            f"host {name} alive",
            explain=self.hostds[name].tail,
        )

    def down(self) -> None:
        """Remove every trace but the logs' folder; does nothing when there is none."""
        for namespace in self.network.namespaces():
            kill_all([int(pid) for pid in run("ip", "netns", "pids", namespace).split()])
        self.network.down()
        if self.directory.exists():
            shutil.rmtree(self.directory)

    def leaks(self) -> list[str]:
        """What there still is of the lab: nothing, after `down`."""
        left = [*self.network.namespaces(), *self.network.links()]
        left += [str(self.directory)] if self.directory.exists() else []
        needle = str(self.directory)
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = process.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if needle in command and int(process.parent.name) != os.getpid():
                left.append(f"process {process.parent.name}: {command}")
        return left

    # --- its user ------------------------------------------------------------

    @property
    def environment(self) -> Mapping[str, str]:
        """What `.lab/env` sets."""
        return {
            "DROVER_CONFIG": str(self.directory / "cli.toml"),
            "DROVER_SERVER": f"{self.address}:{self.api_port}",
            "DROVER_CA": str(self.pki / "ca.pem"),
            "DROVER_CERT": str(self.pki / "admin.pem"),
            "DROVER_KEY": str(self.pki / "admin.key"),
        }

    def write_environment(self) -> None:
        """Write `env`, to be sourced by a shell."""
        lines = [f"export {name}={value!r}" for name, value in self.environment.items()]
        lines.append(f"export PATH={str(BIN)!r}:$PATH")
        (self.directory / "env").write_text("\n".join(lines) + "\n")

    def drover(self, *arguments: str, check: bool = True, timeout_seconds: float = 240.0) -> str:
        """Run the CLI and return its standard output.

        Raises:
            CommandFailed: It exited non-zero.
        """
        command = [str(BIN / "drover"), *arguments]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=timeout_seconds,
            env={**os.environ, **self.environment}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise CommandFailed(command, done.returncode, done.stdout + done.stderr)
        return done.stdout

    def drover_json(self, *arguments: str) -> Any:
        """Run the CLI with `-o json` and return what it printed, decoded."""
        return json.loads(self.drover(*arguments, "-o", "json"))

    def answers(self, *arguments: str) -> bool:
        """True when a CLI command succeeds."""
        try:
            self.drover(*arguments, timeout_seconds=60)
        except (CommandFailed, subprocess.TimeoutExpired):
            return False
        return True

    def wait_for_migration(
        self, migration: str, *states: str, timeout_seconds: float = 120.0
    ) -> dict[str, Any]:
        """Wait until a move is in one of some states."""
        seen: dict[str, Any] = {}

        def reached() -> dict[str, Any] | None:
            try:
                seen.update(self.drover_json("migration", "show", migration))
            except CommandFailed:
                return None
            return seen if seen.get("state") in {f"STATE_{s}" for s in states} else None

        return wait_for(
            reached,
            f"{migration} {' or '.join(states)}",
            timeout_seconds=timeout_seconds,
            interval_seconds=0.2,
            explain=lambda: json.dumps(seen, indent=1) + self.controlplane.tail(),
        )

    # --- trouble -------------------------------------------------------------

    def cut(self, host: str) -> None:
        """Pull a host's cable."""
        run("ip", "link", "set", self.network.port(host), "down")

    def heal(self, host: str) -> None:
        """Plug it in again."""
        run("ip", "link", "set", self.network.port(host), "up")

    def shape(self, host: str, rate: str) -> None:
        """Limit what a host can send, as "100mbit"; an empty rate removes the limit."""
        namespace = self.hosts[host].namespace
        run("tc", "-n", namespace, "qdisc", "del", "dev", "eth0", "root", check=False)
        if rate:
            run(
                "tc", "-n", namespace, "qdisc", "add", "dev", "eth0", "root",
                "tbf", "rate", rate, "burst", "1mb", "latency", "50ms",
            )  # fmt: skip

    def bytes_received(self, host: str) -> int:
        """Bytes that have reached a host over its cable, as the kernel counts them."""
        port = self.network.port(host)
        return int(Path(f"/sys/class/net/{port}/statistics/tx_bytes").read_text())

    # --- inside --------------------------------------------------------------

    def _in_control(self, *command: str | Path) -> list[str]:
        namespace = f"/run/netns/{self.network.namespace(CONTROL)}"
        return ["nsenter", f"--net={namespace}", "--", *map(str, command)]


def _listens(namespace: str, port: int) -> bool:
    return f":{port} " in run("ip", "netns", "exec", namespace, "ss", "-Hltn")


def _replace_line(text: str, key: str, line: str) -> str:
    lines = text.splitlines()
    at = next(i for i, each in enumerate(lines) if each.startswith(f"{key} ="))
    lines[at] = line
    return "\n".join(lines) + "\n"
