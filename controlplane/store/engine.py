"""The database: one URL, two kinds, one way to use them.

SQLite (the embedded default): WAL, synchronous=FULL because a lost commit is a
lost machine, one writer thread, and a lock file so that a second control plane
does not start on the same database by mistake. PostgreSQL: a pool, READ
COMMITTED; every write of the kernel is conditional, which is all it needs.

Functions that work on the database are synchronous and take a connection;
`Database.run` runs one in a transaction on a thread of its own, so that the
event loop never waits for a disk.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
import structlog
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as SqlTimeout

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason

log = structlog.stdlib.get_logger(__name__)
T = TypeVar("T")

BUSY_TIMEOUT_MS = 10_000
POOL_SIZE = 16
# A replica that is paused in a transaction, or whose machine is cut off, must not
# keep its row locks: the others would wait behind them, all their threads, for ever.
IDLE_IN_TRANSACTION_SECONDS = 10
LOCK_SECONDS = 15
CONNECT_SECONDS = 10
UNANSWERED_MS = 20_000


class DatabaseInUse(Exception):
    """Another process has the SQLite database open."""


def out_of_reach(error: Exception) -> DroverError | None:
    """What a failure of the database is told as, when asking again can help.

    The driver's text is for the log: it can hold statements and addresses.
    """
    if not isinstance(error, (OperationalError, InterfaceError, SqlTimeout)):
        return None
    log.warning("database trouble", error=str(getattr(error, "orig", error)))
    return DroverError(
        Reason.DATABASE_UNAVAILABLE, "The control plane's database did not do what was asked."
    )


class Database:
    """An open database. Close it with `close`.

    Args:
        url: SQLAlchemy URL: "sqlite:////var/lib/drover/controlplane.db" or
            "postgresql+psycopg://...".

    Raises:
        DatabaseInUse: Another control plane runs on this SQLite file.
    """

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        self._lock: int | None = None
        if parsed.get_backend_name() == "sqlite":
            self._lock = _lock_sqlite(parsed)
            self.engine = _sqlite(parsed)
            threads = 1
        else:
            self.engine = _postgresql(parsed)
            threads = POOL_SIZE
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="database")

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One transaction, committed at the end of the block, rolled back by an exception."""
        with self.engine.begin() as connection:
            yield connection

    async def run(self, function: Callable[[Connection], T]) -> T:
        """Run a function in one transaction on a database thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._run, function)

    def _run(self, function: Callable[[Connection], T]) -> T:
        with self.engine.begin() as connection:
            return function(connection)

    def close(self) -> None:
        """Finish what runs and close every connection."""
        self._executor.shutdown(wait=True)
        self.engine.dispose()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _sqlite(url: URL) -> Engine:
    engine = sa.create_engine(
        url,
        connect_args={"check_same_thread": False, "timeout": BUSY_TIMEOUT_MS / 1000},
        pool_size=1,
        max_overflow=4,
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        # The driver's own idea of when a transaction begins is in the way of
        # BEGIN IMMEDIATE, which takes the write lock before anything is read.
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _postgresql(url: URL) -> Engine:
    settings = {
        "idle_in_transaction_session_timeout": f"{IDLE_IN_TRANSACTION_SECONDS}s",
        "lock_timeout": f"{LOCK_SECONDS}s",
    }
    connect: dict[str, Any] = {
        "connect_timeout": CONNECT_SECONDS,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 2,
        "tcp_user_timeout": UNANSWERED_MS,
        "options": " ".join(f"-c {name}={value}" for name, value in settings.items()),
    }
    return sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        # What the operator's URL says goes before what is chosen here.
        connect_args={name: value for name, value in connect.items() if name not in url.query},
        isolation_level="READ COMMITTED",
        pool_size=POOL_SIZE,
        max_overflow=0,
        pool_pre_ping=True,
    )


def _lock_sqlite(url: URL) -> int | None:
    if not url.database or url.database == ":memory:":
        return None
    path = Path(f"{url.database}.lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DatabaseInUse(
            f"{url.database} is in use by another control plane. Stop that one first, or use "
            "PostgreSQL to run several."
        ) from None
    return descriptor
