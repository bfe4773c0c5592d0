"""Bring a database to the schema of this release."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy import Connection

from controlplane.store.engine import Database

_UPGRADE_LOCK = 0x64726F766572  # "drover"
_SCHEMA = Path(__file__).with_name("schema")


def alembic_config(connection: Connection) -> Config:
    """Alembic's configuration for an open connection."""
    config = Config()
    config.set_main_option("script_location", str(_SCHEMA))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


class DatabaseTooNew(Exception):
    """A later release has upgraded the database; the message says to what."""


def upgrade(database: Database) -> None:
    """Apply every change that the database lacks, in one transaction.

    Raises:
        DatabaseTooNew: The database is of a later release.
    """
    with database.transaction() as connection:
        _wait_for_other_replicas(connection)
        try:
            command.upgrade(alembic_config(connection), "head")
        except CommandError as error:
            raise DatabaseTooNew(
                f"The database is of a later release ({error}). Run that release, or restore a "
                "backup from before its upgrade."
            ) from error


def _wait_for_other_replicas(connection: Connection) -> None:
    """On PostgreSQL several may start at once; on SQLite a transaction is alone anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SET LOCAL lock_timeout = 0"))
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_UPGRADE_LOCK)))
