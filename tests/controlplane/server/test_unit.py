"""The systemd unit: hardened, and still so after the next change."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = (
    Path(__file__).parents[3]
    / "controlplane"
    / "server"
    / "systemd"
    / "drover-controlplane.service"
)
WORST_EXPOSURE = 2.0


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_exposure_stays_low() -> None:
    report = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(UNIT)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    match = re.search(r"exposure level .*?: (\d+\.\d+)", report.stdout)

    assert match is not None, report.stdout + report.stderr
    assert float(match[1]) <= WORST_EXPOSURE
