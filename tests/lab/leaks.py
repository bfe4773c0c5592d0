"""The leak scanner: what a fleet at rest holds although nothing is under way.

It believes nobody: it reads the control plane's database, each hostd's state,
the storage roots and libvirt, and compares them. A fleet at rest has no live
saga, no claim but those of its machines, no record of a move on any host, no
file that no machine uses, and each machine on exactly the host that owns it.
"""

from __future__ import annotations

import sqlite3
import tomllib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from xml.etree import ElementTree

import sqlalchemy as sa

from controlplane.domain.states import FINAL_STATES
from controlplane.saga.log import LIVE_STATES
from controlplane.store.saga_tables import sagas
from controlplane.store.tables import claims, instances, migrations
from tests.lab.host import IMAGES, Host
from tests.lab.lab import Lab

STATE = "/var/lib/drover"
# Tables of hostd.db that hold records of moves, and which of them are left over. The
# fences stay: a host must know for ever how old a call may be. A guard looks after a
# guest for two minutes after a move was given up, and goes by itself.
_RECORDS = {
    "source": "TRUE",
    "target": "TRUE",
    "created_file": "TRUE",
    "made_directory": "TRUE",
    "job": "TRUE",
    "stop": "state <> 'GUARDED'",
}


def leaks(lab: Lab) -> list[str]:
    """Everything that should not be there, one sentence each; empty when all is well."""
    owners = _owners(lab)
    found = list(_database_leaks(lab))
    for host in lab.hosts.values():
        owned = {uuid for uuid, owner in owners.items() if owner == host.name}
        found += [f"host {host.name}: {what}" for what in _host_leaks(host, owned)]
    return found


# --- control plane -------------------------------------------------------------


def database_of(lab: Lab) -> sa.Engine:
    """The control plane's database, to look at while it runs or after it died."""
    settings = tomllib.loads((lab.directory / "controlplane.toml").read_text())
    return sa.create_engine(settings["database"]["url"], poolclass=sa.NullPool)


def _owners(lab: Lab) -> dict[str, str]:
    """Owner of each machine that Drover looks after, by libvirt UUID."""
    query = sa.select(instances.c.uid, instances.c.host).where(~instances.c.released)
    with database_of(lab).connect() as db:
        rows = db.execute(query)
        return {row.uid: row.host for row in rows}


def _database_leaks(lab: Lab) -> Iterator[str]:
    with database_of(lab).connect() as db:
        for saga in db.execute(sa.select(sagas.c.kind, sagas.c.seq, sagas.c.state)):
            if saga.state in {state.value for state in LIVE_STATES}:
                yield f"{saga.kind} saga {saga.seq} is {saga.state}"
        for move in db.execute(sa.select(migrations.c.id, migrations.c.state)):
            if move.state not in FINAL_STATES:
                yield f"migration {move.id} is {move.state}"
        machines = {row.uid: row for row in db.execute(sa.select(instances))}
        for machine in machines.values():
            held = [
                f"{name} {value}"
                for name, value in (
                    ("task_state", machine.task_state),
                    ("migration_id", machine.migration_id),
                    ("conflict", machine.conflict),
                )
                if value
            ]
            if held:
                yield f"instance {machine.name} has {', '.join(held)}"
        expected = {
            f"instances/{m.uid}": (m.host, m.vcpus, m.memory_mib)
            for m in machines.values()
            if not m.released
        }
        actual = {
            c.consumer: (c.host, c.vcpus, c.memory_mib) for c in db.execute(sa.select(claims))
        }
        for consumer in expected.keys() | actual.keys():
            if expected.get(consumer) != actual.get(consumer):
                yield (
                    f"claim of {consumer} is {actual.get(consumer)} instead of"
                    f" {expected.get(consumer)}"
                )


# --- hosts ---------------------------------------------------------------------


def _host_leaks(host: Host, owned: set[str]) -> Iterator[str]:
    defined = set(host.virsh("list", "--all", "--uuid").split())
    yield from (f"domain {uuid} belongs elsewhere" for uuid in sorted(defined - owned))
    yield from (f"domain {uuid} is missing" for uuid in sorted(owned - defined))
    yield from _process_leaks(host)
    yield from _file_leaks(host, defined)
    yield from _record_leaks(host)


def _process_leaks(host: Host) -> Iterator[str]:
    running = len(host.virsh("list", "--uuid").split())
    emulators = [pid for pid in host.processes() if _command_of(pid).startswith("qemu-system")]
    if len(emulators) != running:
        yield f"{len(emulators)} emulators run for {running} running domains"


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _file_leaks(host: Host, defined: set[str]) -> Iterator[str]:
    used = {path for uuid in defined for path in _disks_of(host, uuid)}
    root = host.inside(IMAGES)
    for path in sorted(root.rglob("*")):
        name = f"{IMAGES}/{path.relative_to(root)}"
        if name not in used and path.name != "lost+found":
            yield f"{name} is used by no machine"
    moves = host.path(STATE)
    for path in sorted(moves.rglob("*")):
        if path.is_file() and path.name.partition(".")[0] != "hostd":
            yield f"{path.relative_to(moves)} is left in hostd's state"


def _disks_of(host: Host, uuid: str) -> set[str]:
    tree = ElementTree.fromstring(host.virsh("dumpxml", "--inactive", uuid))
    return {source.get("file", "") for source in tree.iterfind("./devices/disk/source")}


def _record_leaks(host: Host) -> Iterator[str]:
    path = host.path(f"{STATE}/hostd.db")
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as state:
        for table, left in _RECORDS.items():
            count = state.execute(f"SELECT count(*) FROM {table} WHERE {left}").fetchone()[0]
            if count:
                yield f"{count} records in table {table} of hostd.db"
