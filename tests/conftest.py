"""Fixtures for all tests: databases of both kinds. And the order for several workers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane.store.engine import Database
from controlplane.store.upgrade import upgrade
from tests.support.postgres import IN_MEMORY, Cluster


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let workers begin with the longest files: moves in the lab, then what needs one at all.

    Else the last of them would keep one worker busy while the others have nothing left.
    """
    if not hasattr(config, "workerinput"):
        return
    in_lab = {item.path for item in items if item.get_closest_marker("lab")}
    items.sort(key=lambda item: (item.path not in in_lab, item.path.parent.name != "e2e"))


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[Cluster]:
    """A PostgreSQL cluster for the session, started at its first use."""
    cluster = Cluster()
    yield cluster
    cluster.down()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an empty database; the test runs once for each kind.

    Files lie in memory: processes are killed here, but the power stays on, so a
    disk that waits for every commit would only make the tests slow.
    """
    if request.param == "sqlite":
        with tempfile.TemporaryDirectory(prefix="drover-", dir=IN_MEMORY) as folder:
            yield f"sqlite:///{folder}/controlplane.db"
    else:
        cluster: Cluster = request.getfixturevalue("postgres_cluster")
        yield cluster.create_database()


@pytest.fixture(scope="session")
def upgraded_sqlite() -> Iterator[Path]:
    """A SQLite file with the schema of this release, to be copied."""
    with tempfile.TemporaryDirectory(prefix="drover-", dir=IN_MEMORY) as folder:
        path = Path(folder) / "template.db"
        template = Database(f"sqlite:///{path}")
        upgrade(template)
        template.close()
        yield path


@pytest.fixture(scope="session")
def upgraded_postgresql(postgres_cluster: Cluster) -> str:
    """Name of a database with the schema of this release, to be copied."""
    url = postgres_cluster.create_database()
    template = Database(url)
    upgrade(template)
    template.close()
    return url.partition("@/")[2].partition("?")[0]


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """An open database with the schema of this release; once for each kind."""
    with tempfile.TemporaryDirectory(prefix="drover-", dir=IN_MEMORY) as folder:
        if request.param == "sqlite":
            path = Path(folder) / "controlplane.db"
            shutil.copyfile(request.getfixturevalue("upgraded_sqlite"), path)
            opened = Database(f"sqlite:///{path}")
        else:
            template: str = request.getfixturevalue("upgraded_postgresql")
            cluster: Cluster = request.getfixturevalue("postgres_cluster")
            opened = Database(cluster.create_database(template))
        yield opened
        opened.close()
