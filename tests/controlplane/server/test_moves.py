"""Whole moves: the command, the control plane and two simulated hosts, TLS everywhere.

Only what happens on the hosts is simulated; tests/lab has real ones.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from structlog.testing import capture_logs

from controlplane.cli.root import cli
from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.common.rpc import TlsPaths
from controlplane.sagas import MOVE
from controlplane.server.app import App
from controlplane.server.main import read_config
from controlplane.store import migrations
from controlplane.store.engine import Database
from controlplane.store.types import utc_now
from hostd.v1 import domain_pb2
from tests.controlplane.fleet_pki import channel
from tests.controlplane.machines import make_domain
from tests.controlplane.moving_host import MovingHost, Network, joined
from tests.controlplane.server.test_app import enrol_channel
from tests.controlplane.server.test_metrics import scrape

BRISK = (
    "\n[inventory]\ninterval_seconds = 0.1\ndead_after_seconds = 5\n\n[saga]\npoll_seconds = 0.05\n"
    '\n[metrics]\nlisten = "127.0.0.1:0"\n'
)


@dataclass
class Lab:
    """A running fleet of two hosts; web1 runs on a."""

    app: App
    directory: Path
    a: MovingHost
    b: MovingHost
    uuid: str

    async def drover(self, *arguments: str) -> Result:
        environment = {
            **os.environ,
            "DROVER_CONFIG": str(self.directory / "cli.toml"),
            "DROVER_SERVER": f"127.0.0.1:{self.app.api_port}",
        }
        return await asyncio.to_thread(CliRunner().invoke, cli, list(arguments), None, environment)

    async def succeed(self, *arguments: str) -> str:
        result = await self.drover(*arguments)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    def states(self) -> tuple[str, str]:
        """Where web1 is: what each host has of it."""
        return self._state(self.a), self._state(self.b)

    def _state(self, host: MovingHost) -> str:
        if self.uuid in host.domains:
            power = host.domains[self.uuid].power_state
            return "running" if power == domain_pb2.POWER_STATE_RUNNING else "off"
        return "parked" if self.uuid in host.parked else ""

    async def wait_for_asked(self, host: MovingHost, method: str) -> None:
        async with asyncio.timeout(60):
            while method not in host.asked:  # noqa: ASYNC110 bounded
                await asyncio.sleep(0.02)

    async def usage(self) -> dict[str, tuple[int, int]]:
        """Claimed virtual CPUs and live moves of each host."""
        hosts = json.loads(await self.succeed("host", "list", "-o", "json"))
        return {h["name"]: (h["usage"].get("vcpus", 0), h["usage"].get("moves", 0)) for h in hosts}


@pytest.fixture
async def lab(directory: Path, tmp_path: Path) -> AsyncIterator[Lab]:
    settings = directory / "controlplane.toml"
    settings.write_text(settings.read_text() + BRISK)
    pki = directory / "pki"
    admin = TlsPaths(pki / "admin.pem", pki / "admin.key", pki / "ca.pem")
    network = Network()
    async with AsyncExitStack() as stack:
        stack.enter_context(capture_logs())
        app = await stack.enter_async_context(App(read_config(settings), grace_seconds=0.2))
        api = await stack.enter_async_context(channel(app.api_port, admin))
        enrol = await stack.enter_async_context(enrol_channel(app, directory))
        hosts = [MovingHost(name, network) for name in ("a", "b")]
        domain = make_domain("web1")
        hosts[0].put(domain)
        for host in hosts:
            await stack.enter_async_context(joined(host, api, enrol, tmp_path))
        made = Lab(app, directory, hosts[0], hosts[1], domain.uuid)
        async with asyncio.timeout(60):
            while (await made.drover("migrate", "web1", "--dry-run")).exit_code != 0:  # noqa: ASYNC110 bounded
                await asyncio.sleep(0.1)
        yield made


async def test_move_and_confirm(lab: Lab) -> None:
    out = await lab.succeed("migrate", "web1")
    assert "web1 moved from a to b" in out
    assert "downtime" in out
    assert lab.states() == ("parked", "running")

    out = await lab.succeed("migration", "confirm", "web1")
    assert "web1 lives on b alone" in out
    assert lab.states() == ("", "running")
    assert await lab.usage() == {"hosts/a": (0, 0), "hosts/b": (2, 0)}


async def test_what_a_move_does_is_in_the_metrics(lab: Lab) -> None:
    await lab.succeed("migrate", "web1")

    _, found = await scrape(lab.app)
    done = {
        step.name: found["drover_saga_steps_total", ("move", step.name, "done")]
        for step in MOVE.steps
    }
    assert set(done.values()) == {1}, done
    assert found["drover_migrations", ("AWAITING_CONFIRM",)] == 1
    assert found["drover_hosts", ("alive",)] == 2


async def test_a_watcher_is_told_of_every_step_at_once(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controlplane.api.watch.POLL_SECONDS", 3600.0)
    shown = await lab.drover("migrate", "web1")
    assert shown.exit_code == 0
    assert "AWAITING_CONFIRM" in shown.stderr


async def test_move_and_revert(lab: Lab) -> None:
    await lab.succeed("migrate", "web1", "--host", "b")
    out = await lab.succeed("migration", "revert", "web1", "--yes")

    assert "web1 is back on a" in out
    assert lab.states() == ("running", "")
    assert await lab.usage() == {"hosts/a": (2, 0), "hosts/b": (0, 0)}


async def test_automatic_confirm(lab: Lab) -> None:
    out = await lab.succeed("migrate", "web1", "--confirm", "auto")

    assert "web1 lives on b alone" in out
    assert lab.states() == ("", "running")


async def test_confirm_after_a_while(lab: Lab) -> None:
    out = await lab.succeed("migrate", "web1", "--confirm", "1s")
    assert "is deleted by itself at" in out

    await lab.succeed("migration", "watch", "web1", "--until-final")
    assert lab.states() == ("", "running")


async def test_resize_gives_the_new_size(lab: Lab) -> None:
    await lab.succeed("flavor", "create", "big", "--vcpus", "4", "--memory", "2G")
    await lab.succeed("migrate", "web1", "--flavor", "big")

    assert lab.b.domains[lab.uuid].vcpus == 4
    shown = json.loads(await lab.succeed("instance", "show", "web1", "-o", "json"))
    assert (shown["vcpus"], shown["memoryMib"], shown["host"]) == (4, "2048", "hosts/b")


async def test_cancel_in_mid_copy_brings_the_guest_back(lab: Lab) -> None:
    lab.a.hold_copies.set()
    ident = (await lab.succeed("migrate", "web1", "--no-wait")).strip()
    await lab.wait_for_asked(lab.a, "StartCopy")
    assert lab.states() == ("parked", "")

    out = await lab.succeed("migration", "cancel", ident)

    assert "was cancelled; web1 is on a as it was" in out
    assert lab.states() == ("running", "")
    assert await lab.usage() == {"hosts/a": (2, 0), "hosts/b": (0, 0)}


async def test_a_limit_reaches_the_copy_under_way(lab: Lab) -> None:
    lab.a.hold_copies.set()
    ident = (await lab.succeed("migrate", "web1", "--no-wait")).strip()
    await lab.wait_for_asked(lab.a, "StartCopy")

    out = await lab.succeed("migration", "limit", ident, "20M")

    assert "copies at most 19.1 MiB/s" in out
    (job,) = lab.a.jobs.values()
    async with asyncio.timeout(60):
        while job.progress.limit_bytes_per_second != 20_000_000:  # noqa: ASYNC110 bounded
            await asyncio.sleep(0.02)
    lab.a.hold_copies.clear()
    await lab.succeed("migration", "watch", ident)


async def test_failure_on_the_target_brings_the_guest_back(lab: Lab) -> None:
    lab.b.refusals["EnsureBuilt"] = DroverError(Reason.BUILD_FAILED, "libvirt says no.")

    result = await lab.drover("migrate", "web1")

    assert result.exit_code == 1
    assert "BUILD_FAILED: libvirt says no." in result.stderr
    assert "web1 is on a as it was" in result.stderr
    assert lab.states() == ("running", "")
    assert await lab.usage() == {"hosts/a": (2, 0), "hosts/b": (0, 0)}


async def test_no_valid_host_names_each_host_and_changes_nothing(lab: Lab) -> None:
    lab.b.fail_check(Reason.TARGET_LACKS_BRIDGE, "b has no bridge br0.")

    result = await lab.drover("migrate", "web1")

    assert result.exit_code == 4
    assert "TARGET_LACKS_BRIDGE" in result.stderr
    assert lab.states() == ("running", "")
    assert await lab.succeed("migration", "list", "-o", "json") == "[]\n"


async def test_second_move_of_the_same_machine_is_refused(lab: Lab) -> None:
    lab.a.hold_copies.set()
    await lab.succeed("migrate", "web1", "--no-wait")

    result = await lab.drover("migrate", "web1")

    assert result.exit_code == 4
    assert "is taken by migrations/" in result.stderr
    lab.a.hold_copies.clear()


async def test_restart_in_mid_copy_goes_on_by_itself(lab: Lab) -> None:
    """The control plane is replaced while the command watches; nothing is copied anew."""
    lab.a.hold_copies.set()
    port = lab.app.api_port
    watching = asyncio.create_task(lab.drover("migrate", "web1"))
    await lab.wait_for_asked(lab.a, "StartCopy")
    await lab.app.stop()
    settings = lab.directory / "controlplane.toml"
    settings.write_text(settings.read_text().replace("127.0.0.1:0", f"127.0.0.1:{port}", 1))
    lab.a.hold_copies.clear()
    async with App(read_config(settings), grace_seconds=0.2):
        result = await asyncio.wait_for(watching, 60)

    assert result.exit_code == 0, result.stderr
    assert "The control plane is back." in result.stderr
    assert lab.states() == ("parked", "running")
    assert lab.a.asked.count("StartCopy") == 1


async def test_a_window_that_ends_while_it_is_down_is_kept(lab: Lab) -> None:
    await lab.succeed("migrate", "web1", "--confirm", "1h")
    settings = lab.directory / "controlplane.toml"
    config = read_config(settings)
    await lab.app.stop()

    database = Database(config.database.url)
    with database.transaction() as tx:
        move = migrations.list_page(tx, limit=1)[0]
        assert move.confirm_deadline is not None
        migrations.update(tx, move.id, confirm_deadline=utc_now() - timedelta(seconds=1))
    database.close()
    assert lab.states() == ("parked", "running")

    async with App(config, grace_seconds=0.2):
        async with asyncio.timeout(60):
            while lab.states() != ("", "running"):  # noqa: ASYNC110 bounded
                await asyncio.sleep(0.05)


async def test_same_request_id_moves_once(lab: Lab) -> None:
    request = "9b2d7a44-6c1f-4b6e-8f0a-1f2e3d4c5b6a"
    first = await lab.succeed("migrate", "web1", "--no-wait", "--request-id", request)
    again = await lab.succeed("migrate", "web1", "--no-wait", "--request-id", request)
    other = await lab.drover("migrate", "web1", "--host", "b", "--request-id", request)

    assert first == again
    assert other.exit_code == 2
    assert "request id" in other.stderr
