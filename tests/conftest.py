"""Fixtures for all tests: databases of both kinds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane.store.engine import Database
from controlplane.store.upgrade import upgrade
from tests.support.postgres import Cluster


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[Cluster]:
    """A PostgreSQL cluster for the session, started at its first use."""
    cluster = Cluster()
    yield cluster
    cluster.down()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database; the test runs once for each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'controlplane.db'}"
    cluster: Cluster = request.getfixturevalue("postgres_cluster")
    return cluster.create_database()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """An open database with the schema of this release."""
    opened = Database(database_url)
    upgrade(opened)
    yield opened
    opened.close()
