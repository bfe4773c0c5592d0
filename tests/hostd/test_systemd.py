"""The unit file: what the service may touch stays little, and is enough for its work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from tests.lab.wait import wait_for

UNIT = Path(str(resources.files("hostd") / "systemd" / "drover-hostd.service"))
MOST_EXPOSURE = 30  # of 100, by systemd's own measure
NOBODY = 65534


def settings(name: str) -> list[str]:
    """The words of all settings of a name in the unit."""
    lines = (line.partition("=") for line in UNIT.read_text("utf-8").splitlines())
    return [word for key, _, value in lines if key == name for word in value.split()]


def analyze(*arguments: str) -> str:
    """Run systemd-analyze; fail with its words."""
    found = shutil.which("systemd-analyze")
    assert found is not None, "systemd is a Debian package that Drover's tests need"
    done = subprocess.run([found, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-600:] + done.stderr
    return done.stdout + done.stderr


def test_the_unit_is_well_formed_and_hardened(tmp_path: Path) -> None:
    analyze("security", "--offline=yes", f"--threshold={MOST_EXPOSURE}", str(UNIT))
    # The command is where the package puts it, not where these tests run.
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text("utf-8").replace("/usr/bin/drover-hostd", "/bin/true"), "utf-8")
    assert copy.name not in analyze("verify", "--man=no", str(copy))


def test_with_its_capabilities_it_sees_who_has_a_disk_open(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"x")
    tmp_path.chmod(0o755)
    kept = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in capabilities())
    script = (
        "import sys; from pathlib import Path; from hostd.disks.users import find_users;"
        "print([user.pid for user in find_users([Path(sys.argv[1])])])"
    )
    with disk.open("rb") as opened:
        # Not by `user=`: for that Python forks, beside gRPC's threads.
        become = ["setpriv", f"--reuid={NOBODY}", "--clear-groups", "--"]
        holder = subprocess.Popen([*become, "sleep", "100"], stdin=opened)
    try:
        wait_for(lambda: Path(f"/proc/{holder.pid}").stat().st_uid == NOBODY, "another's process")
        done = subprocess.run(
            ["setpriv", f"--bounding-set=-all,{kept}", "--inh-caps=-all",
             sys.executable, "-c", script, str(disk)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    finally:
        holder.kill()
        holder.wait()
    assert done.stdout.splitlines()[-1] == f"[{holder.pid}]"


def capabilities() -> list[str]:
    """What the unit leaves to the service."""
    found = settings("CapabilityBoundingSet")
    assert found
    return found


def test_with_its_system_calls_it_can_read_the_clock() -> None:
    """The kernel's word on whether the clock is synchronised comes from adjtimex."""
    groups = [word for word in settings("SystemCallFilter") if word.startswith("@")]
    allowed = {line.strip() for group in groups for line in analyze_filter(group)}
    allowed |= set(settings("SystemCallFilter"))
    assert "adjtimex" in allowed
    assert settings("ProtectClock") in ([], ["no"]), "it denies adjtimex for reading as well"
    assert "CAP_SYS_TIME" not in capabilities()


def analyze_filter(group: str) -> list[str]:
    """System calls of a group, those of groups inside it left out."""
    return analyze("syscall-filter", group).splitlines()


def test_it_starts_where_no_memory_may_be_written_and_executed() -> None:
    if settings("MemoryDenyWriteExecute") != ["yes"]:
        pytest.fail("MemoryDenyWriteExecute is worth having")
    script = (
        "import ctypes; assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0;"  # PR_SET_MDWE
        "import hostd.server, hostd.preflight_facts as facts; facts.clock_synchronised();"
        "from hostd.libvirt.conn import LibvirtConnection as C;"
        "c = C('test:///default'); c.get().__enter__(); print('ok')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=False, capture_output=True, text=True, env={**os.environ, "LANG": "C"},
    )  # fmt: skip
    assert done.stdout.endswith("ok\n"), done.stderr[-600:]
