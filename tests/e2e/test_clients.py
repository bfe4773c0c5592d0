"""Whole moves by clients that are not ours: what the README shows, and a stock gRPC tool."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.fleet import GUEST, Fleet
from tests.lab.lab import BIN

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

README = Path(__file__).parents[2] / "README.md"


def call(fleet: Fleet, method: str, **request: Any) -> list[dict[str, Any]]:
    """Call with `buf curl`, which learns from the server what there is to call.

    Returns:
        The answers, several of a stream.
    """
    environment = fleet.lab.environment
    done = subprocess.run(
        [
            BIN / "buf", "curl", "--protocol", "grpc", "--data", json.dumps(request),
            "--cacert", environment["DROVER_CA"], "--cert", environment["DROVER_CERT"],
            "--key", environment["DROVER_KEY"],
            f"https://{environment['DROVER_SERVER']}/controlplane.v1.{method}",
        ],
        check=False, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers, decoder, text = [], json.JSONDecoder(), done.stdout.strip()
    while text:
        answer, end = decoder.raw_decode(text)
        answers.append(answer)
        text = text[end:].lstrip()
    return answers


def test_a_stock_grpc_client_drives_a_whole_move_over_reflection(fleet: Fleet) -> None:
    source, target = fleet.source, fleet.target
    fleet.forget_consoles()

    created = call(
        fleet,
        "MigrationService/CreateMigration",
        instance=f"instances/{GUEST}",
        host=f"hosts/{target.name}",
        options={"shutdownTimeout": "60s"},
    )
    name = created[0]["name"]
    states = [m["state"] for m in call(fleet, "MigrationService/WatchMigration", name=name)]
    assert states[-1] == "STATE_AWAITING_CONFIRM", states
    fleet.expect_boot(target, fleet.guest.boots + 1)

    call(fleet, "MigrationService/ConfirmMigration", name=name)
    states = [m["state"] for m in call(fleet, "MigrationService/WatchMigration", name=name)]
    assert states[-1] == "STATE_CONFIRMED", states
    assert source.state(GUEST) == ""


def test_the_python_client_of_the_readme_moves_and_confirms(fleet: Fleet, tmp_path: Path) -> None:
    """The very text, which lets the scheduler choose: between b and c, or a and c."""
    found = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(found) == 1
    assert found[0].count("\n") < 25
    script = tmp_path / "move.py"
    script.write_text(found[0])
    fleet.forget_consoles()

    done = subprocess.run(
        [sys.executable, script], check=False, capture_output=True, text=True, timeout=200,
        env={**os.environ, **fleet.lab.environment}, cwd=README.parent,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "STATE_COPYING copy" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("STATE_AWAITING_CONFIRM")
    migration = fleet.lab.drover_json("migration", "list", "--instance", GUEST)[0]
    fleet.lab.wait_for_migration(migration["name"], "CONFIRMED")
    fleet.expect_boot(fleet.source, fleet.guest.boots + 1)
