"""Links on which one connection carries little, through a relay with a real delay."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.links import ADDRESS, Link, Shape
from tests.diskmover import tool
from tests.diskmover.conftest import Certs
from tests.diskmover.tool import Running, Serve

MIB = 1 << 20
SIZE = 24 * MIB
# A receiver's window for one connection: 64 KiB, so 4 carry little in 50 ms.
SMALL_WINDOW = ("sysctl", "-qw", "net.ipv4.tcp_rmem=4096 65536 65536")


@pytest.fixture
def far() -> Iterator[Link]:
    with Link(Shape("far", 200, 50)) as link:
        tool.check(*link.command("b", *SMALL_WINDOW))
        yield link


def _connections(link: Link, certs: Certs, tmp_path: Path, *options: str) -> list[int]:
    """Copy over a link; the numbers of connections that it had."""
    source = tool.noise(tmp_path / "source", SIZE)
    root = tmp_path / "received"
    root.mkdir()
    serve = Serve(root, certs.options("b"), f"{ADDRESS['b']}:7443", link.command("b"))
    job = Running(
        source, "--to", serve.address, "--name", "disk", "--json", *options,
        *certs.options("a"), within=link.command("a"),
    )  # fmt: skip
    ended = job.ended()
    assert ended.code == 0, ended.err
    assert tool.same(source, root / "disk")
    assert serve.stop() == 0
    progress = [line["progress"] for line in ended.lines if "progress" in line]
    return [one["connections"] for one in progress]


def test_over_a_distance_connections_are_added(far: Link, certs: Certs, tmp_path: Path) -> None:
    assert max(_connections(far, certs, tmp_path)) > 4


def test_a_number_that_is_given_stays(far: Link, certs: Certs, tmp_path: Path) -> None:
    assert max(_connections(far, certs, tmp_path, "--connections", "8")) == 8


def test_near_by_a_few_are_enough(certs: Certs, tmp_path: Path) -> None:
    with Link(Shape("near", 100)) as link:
        assert max(_connections(link, certs, tmp_path)) == 4


def test_a_copy_outlives_its_connections(certs: Certs, tmp_path: Path) -> None:
    with Link(Shape("cut", 100, 10, cut_seconds=0.7)) as link:
        _connections(link, certs, tmp_path)
        count = link.command("a", "nstat", "-asz", "TcpEstabResets")
        assert int(subprocess.check_output(count).split()[-2]) >= 4
