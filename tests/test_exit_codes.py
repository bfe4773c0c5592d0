"""Both daemons end with the same codes: 2 for a wrong configuration, 1 when they cannot start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from controlplane.server.main import CANNOT_START as CONTROLPLANE_CANNOT_START
from controlplane.server.main import USAGE as CONTROLPLANE_USAGE
from hostd.main import CANNOT_START, USAGE

ROOT = Path(__file__).parents[1]
UNITS = {
    "drover-hostd": "hostd/systemd/drover-hostd.service",
    "drover-controlplane": "controlplane/server/systemd/drover-controlplane.service",
}
daemons = pytest.mark.parametrize("daemon", sorted(UNITS))


def run(daemon: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name(daemon), *arguments],
        check=False, capture_output=True, text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip


@daemons
@pytest.mark.parametrize("command", [[], ["run"], ["check-config"]], ids=["", "run", "check"])
@pytest.mark.parametrize("text", [None, "not toml", "[nobody]\nknows = 1\n"])
def test_a_configuration_that_cannot_be_used(
    daemon: str, command: list[str], text: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "daemon.toml"
    if text is not None:
        file.write_text(text)
    ended = run(daemon, "--config", str(file), *command)
    assert ended.returncode == 2
    assert str(file) in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


@daemons
def test_a_wrong_command_line(daemon: str) -> None:
    assert run(daemon, "--nonsense").returncode == 2


def test_the_codes_are_the_same_and_in_the_documents() -> None:
    assert (USAGE, CANNOT_START) == (CONTROLPLANE_USAGE, CONTROLPLANE_CANNOT_START) == (2, 1)
    text = (ROOT / "docs/operations.md").read_text()
    assert "| 2 | the command line or the configuration is wrong" in text
    assert "| 1 | it cannot start" in text


@daemons
def test_systemd_does_not_try_again_what_only_a_person_can_mend(daemon: str) -> None:
    assert "RestartPreventExitStatus=2\n" in (ROOT / UNITS[daemon]).read_text()
    assert "with 2 for a wrong" in run(daemon, "--help").stdout
