"""Making encrypted images in spite of the clock."""

from __future__ import annotations

import subprocess

_TRIES = 50
_TOO_QUICK = "Unable to get accurate CPU usage"


def qemu_img(*words: str) -> None:
    """Run a `qemu-img` command that makes a LUKS key.

    QEMU finds out how long that should take by the CPU time of a first try, and gives up
    when that is over before the kernel's clock has ticked: then it is run again.
    """
    for _ in range(_TRIES):
        done = subprocess.run(["qemu-img", *words], capture_output=True, text=True, check=False)
        if _TOO_QUICK not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
