"""Fixtures: certificates made by the tool itself, and a serving process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.diskmover import tool
from tests.diskmover.tool import Serve


class Certs:
    """The directory that `diskmover certs` made, with an "a", a "b" and a "c"."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        made = tool.run("certs", directory, "a", "b", "c")
        assert made.code == 0, made.err

    @property
    def ca(self) -> Path:
        """The authority's certificate."""
        return self.directory / "ca.pem"

    def paths(self, name: str) -> tuple[Path, Path]:
        """Certificate and key."""
        return self.directory / f"{name}.pem", self.directory / f"{name}.key"

    def options(self, name: str) -> list[str]:
        """The options that make somebody of this name."""
        cert, key = self.paths(name)
        return ["--cert", str(cert), "--key", str(key), "--ca", str(self.ca)]


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Certs:
    """Certificates of one fleet."""
    return Certs(tmp_path_factory.mktemp("certs"))


@pytest.fixture(scope="session")
def foreign_certs(tmp_path_factory: pytest.TempPathFactory) -> Certs:
    """Certificates of another fleet."""
    return Certs(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="module")
def serve(certs: Certs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """A receiver for the module; every test uses names of its own."""
    running = Serve(tmp_path_factory.mktemp("received"), certs.options("b"))
    yield running
    assert running.stop() == 0
