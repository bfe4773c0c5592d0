"""The database under replicas that start together, are paused, or are older than it."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection

from controlplane.store import engine, hosts
from controlplane.store.engine import Database, DatabaseInUse
from controlplane.store.upgrade import DatabaseTooNew, upgrade


def test_replicas_that_start_together_upgrade_once(database_url: str) -> None:
    if database_url.startswith("sqlite"):
        with pytest.raises(DatabaseInUse):
            _open_two(database_url)
        return
    replicas = _open_two(database_url)
    together = threading.Barrier(2)

    def start(database: Database) -> None:
        together.wait(timeout=30)
        upgrade(database)

    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(start, replicas))
        with replicas[0].transaction() as tx:
            assert hosts.list_all(tx) == []
    finally:
        for replica in replicas:
            replica.close()


def _open_two(url: str) -> list[Database]:
    first = Database(url)
    try:
        return [first, Database(url)]
    except DatabaseInUse:
        first.close()
        raise


def test_a_database_of_a_later_release_is_refused_by_name(database: Database) -> None:
    with database.transaction() as tx:
        tx.execute(sa.text("UPDATE alembic_version SET version_num = 'from the future'"))
    with pytest.raises(DatabaseTooNew, match="from the future"):
        upgrade(database)


@pytest.mark.postgres
async def test_a_replica_paused_in_a_transaction_does_not_hold_the_others_up(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a row locked and says nothing more, as under SIGSTOP; its lock is taken away."""
    if database_url.startswith("sqlite"):
        return  # has no replicas
    monkeypatch.setattr(engine, "IDLE_IN_TRANSACTION_SECONDS", 1)
    paused, other = Database(database_url), Database(database_url)
    try:
        upgrade(paused)
        with paused.transaction() as tx:
            hosts.create(tx, "a", adopt_domains=True)

        def change(tx: Connection) -> None:
            hosts.update(tx, "a", address="10.0.0.1:7442")

        held = paused.engine.connect()
        change(held)
        await asyncio.wait_for(other.run(change), 9)
        with pytest.raises(sa.exc.DBAPIError):
            held.commit()
        held.invalidate()
        held.close()
    finally:
        paused.close()
        other.close()
