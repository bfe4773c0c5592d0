"""A throw-away PostgreSQL cluster on a UNIX socket."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path

import psycopg
from psycopg import sql

IN_MEMORY = "/dev/shm"  # a file system in memory, not a predictable name


class Cluster:
    """A running cluster; `down` stops it and removes every trace.

    Made with settings that trade durability for speed: what is tested is what the
    kernel does, not what PostgreSQL does.
    """

    def __init__(self) -> None:
        binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if not binaries:
            raise RuntimeError("PostgreSQL is not installed: run `make setup`")
        self._bin = binaries[-1].parent
        self._folder = Path(tempfile.mkdtemp(prefix="drover-pg-", dir=IN_MEMORY))
        owner = pwd.getpwnam("postgres")
        os.chown(self._folder, owner.pw_uid, owner.pw_gid)
        data = self._folder / "data"
        self._as_postgres("initdb", "-D", data, "-A", "trust", "-E", "UTF8", "--no-sync")
        options = (
            f"-k {self._folder} -c listen_addresses= -c fsync=off -c full_page_writes=off "
            "-c max_connections=200"
        )
        log = self._folder / "log"
        self._as_postgres("pg_ctl", "-D", data, "-l", log, "-w", "-o", options, "start")

    def create_database(self, template: str = "template1") -> str:
        """The URL of a new database: empty, or a copy of another one."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy").format(
            sql.Identifier(name), sql.Identifier(template)
        )
        # Not by the program: a fork beside gRPC's threads can kill the child.
        with psycopg.connect(
            host=str(self._folder), user="postgres", dbname="postgres", autocommit=True
        ) as connection:
            connection.execute(statement)
        return f"postgresql+psycopg://postgres@/{name}?host={self._folder}"

    def down(self) -> None:
        """Stop the cluster and remove it."""
        self._as_postgres("pg_ctl", "-D", self._folder / "data", "-m", "immediate", "-w", "stop")
        shutil.rmtree(self._folder)

    def _as_postgres(self, program: str, *arguments: object) -> None:
        # By a program, not by `user=`: for that Python forks, and a fork beside
        # gRPC's threads can kill the child.
        become = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--"]
        command = [*become, str(self._bin / program), *map(str, arguments)]
        # Output to a file: the server inherits it and would keep a pipe open.
        with (self._folder / "commands.log").open("ab") as output:
            done = subprocess.run(
                command, check=False, cwd="/", stdout=output, stderr=output,
                stdin=subprocess.DEVNULL, env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
            )  # fmt: skip
        if done.returncode != 0:
            text = (self._folder / "commands.log").read_text()
            raise RuntimeError(f"{program}: exit {done.returncode}\n{text}")
