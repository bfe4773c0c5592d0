"""Bring a database to the schema of this release."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection

from controlplane.store.engine import Database

_SCHEMA = Path(__file__).with_name("schema")


def alembic_config(connection: Connection) -> Config:
    """Alembic's configuration for an open connection."""
    config = Config()
    config.set_main_option("script_location", str(_SCHEMA))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def upgrade(database: Database) -> None:
    """Apply every change that the database lacks, in one transaction."""
    with database.transaction() as connection:
        command.upgrade(alembic_config(connection), "head")
