"""Fixtures: certificates made by the tool itself, and a serving process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from diskmover import Receiver, TlsFiles
from diskmover.certs import issue, open_authority
from tests.diskmover import tool
from tests.diskmover.copies import Copies
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


@pytest.fixture(scope="session")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TlsFiles]:
    """Certificates of both ends, by name."""
    folder = tmp_path_factory.mktemp("pki")
    authority = open_authority(folder)
    files = {name: issue(authority, folder, name) for name in ("source", "target")}
    return {name: TlsFiles(cert, key, folder / "ca.pem") for name, (cert, key) in files.items()}


@pytest.fixture(scope="session")
def copies(credentials: dict[str, TlsFiles]) -> Iterator[Copies]:
    """Copies to a receiver of the session's own."""
    with Receiver("127.0.0.1:0", credentials["target"], max_sessions=256) as receiver:
        yield Copies(receiver, credentials["source"])
