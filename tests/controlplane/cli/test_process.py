"""The command as a process: what may happen to it and its output at any instant."""

from __future__ import annotations

import subprocess
import sys

MAIN = "from controlplane.cli.main import main; main()"
INTERRUPTED_WHILE_LOADING = """
import sys

class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == "controlplane.cli.root":
            raise KeyboardInterrupt

sys.meta_path.insert(0, CtrlC())
"""


def drover(arguments: str, *, output: str = "", before: str = "") -> tuple[int, str]:
    """Run `drover` with its output sent elsewhere; returns exit code and standard error."""
    command = f'exec "$0" -c "$1" {arguments} {output}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, before + MAIN],
        check=False, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_output_that_cannot_be_written_is_one_line() -> None:
    code, said = drover("version", output=">/dev/full")
    assert (code, said) == (1, "error: The output cannot be written: No space left on device.\n")


def test_a_closed_output_is_nobody_to_tell() -> None:
    assert drover("version", output=">&-") == (0, "")
    assert drover("nonsense", output="2>&-") == (2, "")


def test_a_reader_that_goes_away_is_no_bug() -> None:
    code, said = drover("--help", output="> >(true)")
    assert code in (0, 1)
    assert "Traceback" not in said


def test_ctrl_c_while_it_is_still_loading() -> None:
    assert drover("version", before=INTERRUPTED_WHILE_LOADING) == (130, "Interrupted.\n")
