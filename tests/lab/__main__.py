"""`python -m tests.lab up|down|demo`: what `make lab`, `lab-down` and `demo` run."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.lab.demo import demo
from tests.lab.lab import Lab

DIRECTORY = Path(__file__).parents[2] / ".lab"


def up() -> int:
    """Start the lab with a guest on host a, and say what to try."""
    lab = Lab(DIRECTORY)
    print("starting a control plane and hosts a, b and c ...", flush=True)
    lab.up()
    print("booting guest web1 on a ...", flush=True)
    lab.hosts["a"].define_guest("web1")
    lab.hosts["a"].wait_for_console("web1", "DROVER READY")
    print(f"""
The lab runs. In a shell:

  source {DIRECTORY.name}/env

and then, for example:

  drover host list
  drover instance list
  drover migrate web1 --dry-run
  drover migrate web1
  drover migration list

Logs are in {DIRECTORY.name}/log. `make lab-down` removes every trace.""")
    return 0


def down() -> int:
    """Remove every trace of the lab."""
    lab = Lab(DIRECTORY)
    lab.down()
    left = lab.leaks()
    print("\n".join(["left over:", *left]) if left else "the lab is gone")
    return 1 if left else 0


def tell() -> int:
    """Run the demo in a lab of its own."""
    return demo(DIRECTORY.with_name(".lab-demo"))


COMMANDS = {"up": up, "down": down, "demo": tell}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python -m tests.lab {'|'.join(COMMANDS)}")
    sys.exit(COMMANDS[sys.argv[1]]())
