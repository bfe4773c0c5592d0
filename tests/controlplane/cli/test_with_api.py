"""The command against the real control plane: its store, rules, roles and audit log."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from controlplane.cli.root import cli
from controlplane.security.tokens import JoinToken
from controlplane.server.app import App
from controlplane.server.main import read_config


def drover(environment: dict[str, str], *arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments), env=environment)


@dataclass
class Fleet:
    """A control plane in this process and the command of its users.

    Attributes:
        directory: What `drover init` made.
        app: The control plane.
    """

    directory: Path
    app: App

    async def run(self, *arguments: str, user: str = "admin") -> Result:
        folder = self.directory if user != "admin" else self.directory / "pki"
        environment = {
            **os.environ,
            "DROVER_CONFIG": str(self.directory / "cli.toml"),
            "DROVER_CERT": str(folder / f"{user}.pem"),
            "DROVER_KEY": str(folder / f"{user}.key"),
        }
        return await asyncio.to_thread(drover, environment, *arguments)

    async def issue(self, name: str, role: str, *more: str) -> None:
        pki, out = str(self.directory / "pki"), str(self.directory)
        made = await self.run(
            "cert", "issue", name, "--role", role, "--pki", pki, "--out", out, *more
        )
        assert made.exit_code == 0, made.stderr


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    made = drover({}, "init", "--dir", str(tmp_path), "--fleet", "lab")
    assert made.exit_code == 0, made.stderr
    path = tmp_path / "controlplane.toml"
    text = path.read_text().replace('"0.0.0.0:7440"', '"127.0.0.1:0"')
    path.write_text(text.replace('"0.0.0.0:7441"', '"127.0.0.1:0"'))
    async with App(read_config(path), grace_seconds=0) as app:
        client = tmp_path / "cli.toml"
        lines = client.read_text().splitlines()
        kept = [line for line in lines if not line.startswith("server =")]
        client.write_text("\n".join([f'server = "127.0.0.1:{app.api_port}"', *kept]))
        yield Fleet(tmp_path, app)


async def test_first_steps_of_a_new_fleet(fleet: Fleet) -> None:
    added = await fleet.run("host", "add", "c")
    assert added.exit_code == 0, added.stderr
    word = added.stdout.split()[-1]
    assert JoinToken.decode(word).host == "c"

    (listed,) = json.loads((await fleet.run("host", "list", "-o", "json")).stdout)
    assert listed["name"] == "hosts/c"
    assert listed["state"] == "STATE_JOINING"
    shown = await fleet.run("host", "show", "c")
    assert "no report yet" in shown.stdout


async def test_flavors(fleet: Fleet) -> None:
    created = await fleet.run("flavor", "create", "big", "--vcpus", "4", "--memory", "2G")
    assert created.exit_code == 0, created.stderr
    again = await fleet.run("flavor", "create", "big", "--vcpus", "4", "--memory", "2G")
    assert again.exit_code == 4
    assert "2.0 GiB" in (await fleet.run("flavor", "list")).stdout
    assert (await fleet.run("flavor", "delete", "big")).exit_code == 0
    assert (await fleet.run("flavor", "delete", "big")).exit_code == 3


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("migrate", "nope"), 3),
        (("migrate", "nope", "--dry-run"), 3),
        (("migrate", "nope", "--flavor", "big"), 3),
        (("instance", "show", "nope"), 3),
        (("instance", "release", "nope"), 3),
        (("host", "show", "nope"), 3),
        (("host", "enable", "nope"), 3),
        (("host", "add", "Not A Name"), 2),
        (("migration", "show", "nope"), 3),
        (("migration", "confirm", "3f6c1a52-8a0e-4c1c-9b59-d0b7f1f7a001"), 3),
        (("migrate", "web1", "--shutdown-timeout", "2d"), 2),
    ],
)
async def test_errors_have_their_exit_codes(
    fleet: Fleet, arguments: tuple[str, ...], code: int
) -> None:
    result = await fleet.run(*arguments)

    assert result.exit_code == code, result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) >= 2  # what happened, and what to do next
    assert result.stdout == ""


async def test_roles_decide(fleet: Fleet) -> None:
    await fleet.issue("vic", "viewer")
    await fleet.issue("mia", "member", "--project", "web")
    await fleet.issue("otto", "operator")

    assert (await fleet.run("host", "list", user="vic")).exit_code == 0
    assert (await fleet.run("audit", "list", user="otto")).exit_code == 6
    assert (await fleet.run("migrate", "web1", user="vic")).exit_code == 6
    assert (await fleet.run("instance", "release", "x", user="mia")).exit_code in (3, 6)
    refused = await fleet.run("host", "add", "c", user="otto")
    assert refused.exit_code == 6
    assert "needs the role admin" in refused.stderr

    log = json.loads((await fleet.run("audit", "list", "-o", "json")).stdout)
    assert {(entry["principal"], entry["reason"]) for entry in log} == {
        ("drover://lab/viewer/vic", "PERMISSION_DENIED"),
        ("drover://lab/operator/otto", "PERMISSION_DENIED"),
    }
