"""The main job, told as a story: a real guest moves between real hypervisors.

Everything is done through the commands that a user types, and everything that
is claimed is read off the guest's own console.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.lab.guest.build import Recipe
from tests.lab.host import Host
from tests.lab.lab import BIN, CommandFailed, Lab
from tests.lab.wait import wait_for

GUEST = "web1"


def demo(directory: Path) -> int:
    """Run the story.

    Returns:
        0 when every part of it was true.
    """
    lab = Lab(directory)
    started = time.monotonic()
    try:
        _tell(lab)
    except (Exception, KeyboardInterrupt) as error:
        kept = directory.with_name("demo-logs")
        _keep_logs(lab, kept)
        if not isinstance(error, (CommandFailed, TimeoutError, KeyboardInterrupt)):
            traceback.print_exc()
        print(f"\ndemo: failed: {error}\ndemo: logs are in {kept}", file=sys.stderr)
        return 1
    finally:
        lab.down()
    left = lab.leaks()
    if left:
        print("\ndemo: failed: left over: " + ", ".join(left), file=sys.stderr)
        return 1
    print(f"\ndemo: ok ({time.monotonic() - started:.0f} s)")
    return 0


def _tell(lab: Lab) -> None:
    source = lab.hosts["a"]
    _say("A fleet: one control plane, three hosts with a libvirtd of their own each")
    lab.up()
    _run(lab, "host", "list")

    _say(
        f"A guest that Drover has never heard of: virsh define, virsh start, on host {source.name}"
    )
    source.define_guest(GUEST, recipe=Recipe(data_mib=256, free_mib=64))
    source.wait_for_console(GUEST, "DROVER READY")
    _quote(source)

    _say("Drover has found it")
    wait_for(lambda: lab.answers("instance", "show", GUEST), "adoption", interval_seconds=0.3)
    _run(lab, "instance", "list")

    _say("Move it; the scheduler chooses, and says why")
    first = _migrate(lab, source)
    target = lab.hosts[_host_of(first["targetHost"])]
    _expect_boot(target, 2)
    _quote(target)

    _say(f"Confirm: the copy on {source.name} goes")
    parked = source.path("/var/lib/libvirt/images/.drover-parked")
    _say_detail(f"before: {_size_mib(parked)} MiB parked on {source.name}")
    _run(lab, "migration", "confirm", first["name"])
    lab.wait_for_migration(first["name"], "CONFIRMED")
    if _size_mib(parked):
        raise AssertionError(f"{parked} still holds {_size_mib(parked)} MiB")
    _say_detail(f"after: nothing parked on {source.name}")

    _say(f"Move it again, to host {source.name} by name")
    target.forget_console(GUEST)
    second = _migrate(lab, target, "--host", source.name)
    source.wait_for_console(GUEST, "DROVER BOOT n=3 (.|\n)*DROVER READY")
    _quote(source, "n=3")

    _say("Changed our mind: revert. What it wrote there since is dropped")
    _run(lab, "migration", "revert", second["name"], "--yes")
    lab.wait_for_migration(second["name"], "REVERTED")
    target.wait_for_console(GUEST, "DROVER BOOT n=3 (.|\n)*DROVER READY")
    _quote(target, "n=3")
    if source.state(GUEST):
        raise AssertionError(f"{GUEST} is still defined on {source.name}")
    _run(lab, "instance", "list")

    _say("What it cost")
    for name, move in (("first", first), ("second", second)):
        print(f"  {name} move: {_cost(move)}")


def _migrate(lab: Lab, source: Host, *options: str) -> dict[str, Any]:
    _run(lab, "migrate", GUEST, *options)
    moves = lab.drover_json("migration", "list")
    move: dict[str, Any] = _items(moves)[0]
    if source.state(GUEST):
        raise AssertionError(f"{GUEST} is still defined on {source.name}")
    return move


def _items(listing: Any) -> list[dict[str, Any]]:
    return listing if isinstance(listing, list) else listing["migrations"]


def _expect_boot(host: Host, number: int) -> None:
    host.wait_for_console(GUEST, f"DROVER BOOT n={number} ")
    host.wait_for_console(GUEST, "DROVER CHECK ok(.|\n)*DROVER READY")


def _quote(host: Host, since: str = "") -> None:
    """Show the guest's own words."""
    text = host.console(GUEST)
    text = text[text.rfind(f"DROVER BOOT {since}") :]
    for line in re.findall(r"DROVER (?:BOOT|CHECK|READY).*", text):
        print(f"  [console on {host.name}] {line.strip()}")
    if "CHECK ok" not in text:
        raise AssertionError("the guest did not find its data intact")


def _cost(move: dict[str, Any]) -> str:
    downtime = float(str(move.get("downtime", "0s")).rstrip("s"))
    rate = int(move.get("throughputBytesPerSecond", 0)) / 1e6
    size = sum(int(r["sizeBytes"]) for r in move["receipts"]) / 1e6
    wire = sum(int(r.get("wireBytes", 0)) for r in move["receipts"]) / 1e6
    return (
        f"downtime {downtime:.1f} s, {size:.0f} MB of disk in {wire:.0f} MB on the wire, "
        f"{rate:.0f} MB/s"
    )


def _run(lab: Lab, *arguments: str) -> None:
    """Run a command as a user would see it run."""
    print(f"\n  $ drover {' '.join(arguments)}", flush=True)
    command = [str(BIN / "drover"), *arguments]
    done = subprocess.run(
        command, check=False, env={**os.environ, **lab.environment}, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        raise CommandFailed(command, done.returncode, "(see above)")


def _host_of(name: str) -> str:
    return name.partition("/")[2]


def _size_mib(path: Path) -> int:
    return sum(f.stat().st_blocks * 512 for f in path.rglob("*") if f.is_file()) // 2**20


def _keep_logs(lab: Lab, into: Path) -> None:
    into.mkdir(exist_ok=True)
    for log in (lab.directory / "log").glob("*.log"):
        (into / log.name).write_bytes(log.read_bytes())
    for host in lab.hosts.values():
        for log in host.path("/var/log/libvirt").rglob("*.log"):
            (into / f"{host.name}-{log.name}").write_bytes(log.read_bytes())
    summary: dict[str, Any] = {"instances": None, "migrations": None}
    for key in summary:
        try:
            summary[key] = lab.drover_json(key.removesuffix("s"), "list")
        except (CommandFailed, subprocess.TimeoutExpired, OSError, ValueError) as error:
            summary[key] = str(error)
    (into / "state.json").write_text(json.dumps(summary, indent=1))


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _say_detail(text: str) -> None:
    print(f"  {text}", flush=True)
