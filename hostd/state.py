"""hostd's durable state: one SQLite file, hostd.db.

What is written here has reached the disk when the transaction returns
(synchronous=FULL), because every effect on a machine is preceded by the record
that lets a restarted hostd finish or undo it.

The file belongs to one process; a lock file beside it makes a second hostd on
the same state refuse to start. All access is blocking and serialised by one
lock: transactions are a few statements long, and callers sit in worker threads.

A full disk must not keep a machine from being put back, so the blocks that this
takes are taken beforehand: free pages in the file, and a journal that is
overwritten (journal_mode=PERSIST), never made anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import structlog

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason

log = structlog.stdlib.get_logger(__name__)

DATABASE_NAME = "hostd.db"
LOCK_NAME = "hostd.lock"
# The low byte of an SQLite error code says what kind it is of.
_PRIMARY_CODE = 0xFF

# Each entry upgrades the schema by one version; entries are never changed once
# released, only added.
_MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE fence (
        domain_uuid  TEXT PRIMARY KEY,
        saga_seq     INTEGER NOT NULL,
        generation   INTEGER NOT NULL,
        migration_id TEXT NOT NULL,
        saga_id      TEXT NOT NULL,
        update_time  REAL NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE stop (
        migration_id         TEXT PRIMARY KEY,
        domain_uuid          TEXT NOT NULL,
        saga_id              TEXT NOT NULL,
        previous_power_state INTEGER NOT NULL,
        mode                 INTEGER NOT NULL,
        timeout_seconds      REAL NOT NULL,
        retry_seconds        REAL NOT NULL,
        deadline             REAL NOT NULL,
        state                TEXT NOT NULL,
        forced               INTEGER NOT NULL,
        error                TEXT
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE source (
        migration_id TEXT PRIMARY KEY,
        domain_uuid  TEXT NOT NULL,
        phase        TEXT NOT NULL,
        parked       TEXT NOT NULL,
        update_time  REAL NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE target (
        migration_id TEXT PRIMARY KEY,
        domain_uuid  TEXT NOT NULL,
        phase        TEXT NOT NULL,
        was_built    INTEGER NOT NULL,
        machine      TEXT NOT NULL,
        placements   TEXT NOT NULL,
        reservations TEXT NOT NULL,
        update_time  REAL NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE created_file (
        migration_id TEXT NOT NULL,
        volume_id    TEXT NOT NULL,
        root         TEXT NOT NULL,
        name         TEXT NOT NULL,
        PRIMARY KEY (migration_id, volume_id)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE job (
        job_id       TEXT PRIMARY KEY,
        migration_id TEXT NOT NULL,
        domain_uuid  TEXT NOT NULL,
        state        TEXT NOT NULL,
        snapshot     TEXT NOT NULL,
        create_time  REAL NOT NULL,
        update_time  REAL NOT NULL
    ) STRICT, WITHOUT ROWID;
    """,
    """
    CREATE TABLE made_directory (
        migration_id TEXT NOT NULL,
        root         TEXT NOT NULL,
        name         TEXT NOT NULL,
        PRIMARY KEY (migration_id, root, name)
    ) STRICT, WITHOUT ROWID;
    """,
)
SCHEMA_VERSION = len(_MIGRATIONS)
# What is written while a few machines are put back, many times over.
_ROOM_PAGES = 64


class StateError(Exception):
    """The state cannot be used; the message says why and what to do."""


class StateFile:
    """The open database.

    Args:
        directory: Where hostd.db lies; made with mode 0700 when missing.

    Raises:
        StateError: Another hostd uses it, a newer hostd wrote it, or it cannot be
            read or written.
    """

    def __init__(self, directory: Path) -> None:
        try:
            self._open(directory)
        except (OSError, sqlite3.Error) as error:
            raise StateError(
                f"The state in {directory} cannot be used: {error}."
                " See that its file system is not full and can be written to."
            ) from error

    def _open(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.directory = directory
        self._lock_descriptor = _lock_exclusively(directory / LOCK_NAME)
        self._lock = threading.RLock()
        path = directory / DATABASE_NAME
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, self._lock_descriptor)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            undo.callback(self._connection.close)
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode=PERSIST")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._upgrade(path)
            self._make_room()
            undo.pop_all()

    def _upgrade(self, path: Path) -> None:
        found = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
        if found > SCHEMA_VERSION:
            raise StateError(
                f"{path} has schema version {found}; this hostd knows {SCHEMA_VERSION}."
                " Install the newer hostd again."
            )
        for version in range(found, SCHEMA_VERSION):
            # executescript ends an open transaction, so it carries its own.
            script = f"BEGIN IMMEDIATE; {_MIGRATIONS[version]}; PRAGMA user_version={version + 1};"
            self._connection.executescript(f"{script} COMMIT;")

    def _make_room(self) -> None:
        """Take the blocks that later writes need when nothing is free."""
        pages = int(self._connection.execute("PRAGMA freelist_count").fetchone()[0])
        page_bytes = int(self._connection.execute("PRAGMA page_size").fetchone()[0])
        journal = self.directory / f"{DATABASE_NAME}-journal"
        ample = journal.exists() and journal.stat().st_size >= _ROOM_PAGES * page_bytes
        if pages >= _ROOM_PAGES and ample:
            return
        # A row to a page. Changing them all writes the pages before to the journal.
        row = f"zeroblob({page_bytes * 3 // 4})"
        try:
            with self.transaction() as tx:
                # A start that died here may have left it.
                tx.execute("DROP TABLE IF EXISTS room")
                tx.execute("CREATE TABLE room (page BLOB)")
                tx.executemany(f"INSERT INTO room VALUES ({row})", [()] * _ROOM_PAGES)  # noqa: S608
            with self.transaction() as tx:
                tx.execute(f"UPDATE room SET page={row}")  # noqa: S608
        except sqlite3.OperationalError as error:
            log.warning(
                "no room to keep for a full disk", state=str(self.directory), why=str(error)
            )
        with self.transaction() as tx:
            tx.execute("DROP TABLE IF EXISTS room")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One durable transaction; rolled back when the block raises.

        A transaction inside another one of the same thread is part of it.
        """
        with self._lock:
            if self._connection.in_transaction:
                yield self._connection
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                # SQLite may have rolled back by itself, as it does on a full disk.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def trouble(self, error: Exception) -> DroverError | None:
        """What a caller is told of an error that `transaction` let through; None for a bug.

        The transaction that met it has changed nothing.
        """
        if not isinstance(error, sqlite3.OperationalError):
            return None
        code = getattr(error, "sqlite_errorcode", 0) & _PRIMARY_CODE
        if code == sqlite3.SQLITE_FULL:
            reason, why = Reason.HOST_DISK_FULL, "its file system is full"
        elif code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            reason, why = Reason.DISK_IO_ERROR, str(error)
        else:
            return None
        message = f"hostd's state in {self.directory} cannot be used: {why}."
        return DroverError(reason, message, metadata={"path": str(self.directory)})

    def close(self) -> None:
        """Close the file and let another process have it."""
        with self._lock:
            self._connection.close()
            os.close(self._lock_descriptor)


def _lock_exclusively(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StateError(
            f"Another drover-hostd uses {path.parent}. Stop it, or give this one its own"
            " [state] directory."
        ) from None
    return descriptor


def now() -> float:
    """Wall-clock time in seconds, as the state stores it."""
    return time.time()
