"""The lab itself, as `make lab`, `make lab-down` and `make demo` run it from another checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.fleet import GUEST, Fleet
from tests.lab.guest.build import CACHE
from tests.lab.lab import Lab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout() -> Iterator[Path]:
    """Another checkout, as far as the lab is concerned; nothing of its labs stays."""
    with tempfile.TemporaryDirectory(prefix="drover-checkout-") as folder:
        other = Path(folder)
        shutil.copytree(
            ROOT / "tests", other / "tests", ignore=shutil.ignore_patterns("__pycache__")
        )
        (other / "build").mkdir()
        (other / "build/lab").symlink_to(CACHE)
        yield other
        for name in (".lab", ".lab-demo"):
            Lab(other / name).down()


def lab_command(
    checkout: Path, command: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What a target of the Makefile runs."""
    return subprocess.run(
        [sys.executable, "-m", "tests.lab", command], cwd=checkout, check=False,
        capture_output=True, text=True, timeout=240, env={**os.environ, **environment},
    )  # fmt: skip


def in_shell(checkout: Path, script: str) -> str:
    """Run a script as a user of the lab would, with `.lab/env` sourced."""
    done = subprocess.run(
        ["bash", "-euc", f"source .lab/env\n{script}"], cwd=checkout, check=False,
        capture_output=True, text=True, timeout=60, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_second_lab_lives_beside_the_first_and_goes_without_a_trace(
    fleet: Fleet, checkout: Path
) -> None:
    up = lab_command(checkout, "up")
    assert up.returncode == 0, up.stderr
    tries = re.findall(r"^  (drover .*)$", up.stdout, flags=re.MULTILINE)
    assert len(tries) == 5

    for command in tries[:3]:
        assert in_shell(checkout, command) != ""
    buf = "buf curl --protocol grpc --cacert $DROVER_CA --cert $DROVER_CERT --key $DROVER_KEY"
    listed = in_shell(
        checkout, f"{buf} https://$DROVER_SERVER/controlplane.v1.HostService/ListHosts"
    )
    assert '"hosts/c"' in listed
    assert fleet.lab.answers("instance", "show", GUEST)

    down = lab_command(checkout, "down")
    assert (down.returncode, down.stdout) == (0, "the lab is gone\n")
    assert Lab(checkout / ".lab").leaks() == []
    assert fleet.lab.answers("instance", "show", GUEST)


def test_a_demo_that_fails_says_why_and_where_its_logs_are(checkout: Path) -> None:
    demo = lab_command(checkout, "demo", DROVER_LAB_VIRT="vmware")

    assert demo.returncode == 1
    reason, where = re.findall(r"^demo: (.*)$", demo.stderr, flags=re.MULTILINE)
    assert reason.startswith("failed: ")
    assert "vmware" in demo.stderr
    logs = Path(where.removeprefix("logs are in "))
    assert {"controlplane.log", "hostd-a.log", "state.json"} <= {log.name for log in logs.iterdir()}
    assert Lab(checkout / ".lab-demo").leaks() == []
