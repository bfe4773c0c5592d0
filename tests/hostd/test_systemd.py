"""The unit file: what the service may touch stays little."""

from __future__ import annotations

import shutil
import subprocess
from importlib import resources
from pathlib import Path

UNIT = Path(str(resources.files("hostd") / "systemd" / "drover-hostd.service"))
MOST_EXPOSURE = 30  # of 100, by systemd's own measure


def test_the_unit_is_well_formed_and_hardened() -> None:
    analyze = shutil.which("systemd-analyze")
    assert analyze is not None, "systemd is a Debian package that Drover's tests need"
    done = subprocess.run(
        [analyze, "security", "--offline=yes", f"--threshold={MOST_EXPOSURE}", str(UNIT)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-600:] + done.stderr
