"""`drover-controlplane` as a process: signals, systemd, exit codes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CODE = "from controlplane.server.main import main; main()"


async def spawn(directory: Path, *arguments: str, **environment: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CODE, "--config", str(directory / "controlplane.toml")),
        *arguments,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


class Systemd:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.setblocking(False)

    async def wait_for(self, word: str) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(60):
            while word not in (await loop.sock_recv(self._socket, 4096)).decode():
                pass

    def close(self) -> None:
        self._socket.close()


async def test_sigterm_ends_it_in_order(directory: Path, tmp_path: Path) -> None:
    systemd = Systemd(tmp_path / "notify")
    process = await spawn(directory, NOTIFY_SOCKET=systemd.path)

    await systemd.wait_for("READY=1")
    await systemd.wait_for("WATCHDOG=1")
    process.send_signal(signal.SIGTERM)
    await systemd.wait_for("STOPPING=1")
    _, err = await asyncio.wait_for(process.communicate(), 30)
    systemd.close()

    assert process.returncode == 0
    assert b"Traceback" not in err


async def test_kill_9_leaves_nothing_in_the_way(directory: Path, tmp_path: Path) -> None:
    systemd = Systemd(tmp_path / "notify")
    first = await spawn(directory, NOTIFY_SOCKET=systemd.path)
    await systemd.wait_for("READY=1")
    first.kill()
    await first.communicate()

    second = await spawn(directory, NOTIFY_SOCKET=systemd.path)
    await systemd.wait_for("READY=1")
    second.terminate()
    await asyncio.wait_for(second.communicate(), 30)
    systemd.close()

    assert second.returncode == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def handshake(port: int, pki: Path, version: ssl.TLSVersion) -> str | None:
    context = ssl.create_default_context(cafile=str(pki / "ca.pem"))
    context.load_cert_chain(pki / "admin.pem", pki / "admin.key")
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = version
    with (
        socket.create_connection(("127.0.0.1", port), timeout=60) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        return secured.version()


async def test_tls_below_1_3_is_refused_on_both_ports(directory: Path, tmp_path: Path) -> None:
    ports = (free_port(), free_port())
    systemd = Systemd(tmp_path / "notify")
    process = await spawn(
        directory,
        NOTIFY_SOCKET=systemd.path,
        DROVER_LISTEN__API=f"127.0.0.1:{ports[0]}",
        DROVER_LISTEN__ENROL=f"127.0.0.1:{ports[1]}",
    )
    await systemd.wait_for("READY=1")
    systemd.close()
    try:
        for port in ports:
            new = await asyncio.to_thread(
                handshake, port, directory / "pki", ssl.TLSVersion.TLSv1_3
            )
            assert new == "TLSv1.3"
            with pytest.raises(ssl.SSLError):
                await asyncio.to_thread(handshake, port, directory / "pki", ssl.TLSVersion.TLSv1_2)
    finally:
        process.kill()
        await process.communicate()


async def test_check_config(directory: Path) -> None:
    good = await spawn(directory, "check-config")
    out, _ = await good.communicate()
    assert good.returncode == 0
    assert b"ok, fleet lab" in out

    (directory / "pki" / "server.key").unlink()
    bad = await spawn(directory, "check-config")
    _, err = await bad.communicate()
    assert bad.returncode == 2
    assert b"server.key" in err
    assert b"Traceback" not in err


@pytest.mark.parametrize("command", [[], ["run"]])
async def test_database_that_cannot_be_opened_exits_1(directory: Path, command: list[str]) -> None:
    process = await spawn(
        directory, *command, DROVER_DATABASE__URL="sqlite:////nonexistent/place/x.db"
    )
    _, err = await asyncio.wait_for(process.communicate(), 30)

    assert process.returncode == 1
    assert b"error: " in err
    assert b"/nonexistent/place/x.db" in err
    assert b"Traceback" not in err
