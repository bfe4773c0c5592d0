"""What a copy makes of its link: connections, compression, how TCP finds the rate.

The links are real ones between two network namespaces, the far ones through a relay
with a real delay.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench.links import ADDRESS, Link, Shape
from tests.diskmover import tool
from tests.diskmover.conftest import Certs
from tests.diskmover.tool import Running, Serve

MIB = 1 << 20
SIZE = 24 * MIB
# A receiver's window for one connection: 64 KiB, so 4 carry little in 50 ms.
SMALL_WINDOW = ("sysctl", "-qw", "net.ipv4.tcp_rmem=4096 65536 65536")
TEXT_SIZE = 96 * MIB
CONGESTION = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")


@pytest.fixture
def far() -> Iterator[Link]:
    with Link(Shape("far", 200, 50)) as link:
        tool.check(*link.command("b", *SMALL_WINDOW))
        yield link


def _serve(link: Link, certs: Certs, tmp_path: Path) -> Serve:
    root = tmp_path / "received"
    root.mkdir()
    return Serve(root, certs.options("b"), f"{ADDRESS['b']}:7443", link.command("b"))


def _push(link: Link, certs: Certs, serve: Serve, source: Path, *options: str) -> Running:
    return Running(
        source, "--to", serve.address, "--name", "disk", "--json", *options,
        *certs.options("a"), within=link.command("a"),
    )  # fmt: skip


def _looks(link: Link, certs: Certs, tmp_path: Path, source: Path, *options: str) -> list[Any]:
    """Copy over a link; what was told of it on the way."""
    serve = _serve(link, certs, tmp_path)
    ended = _push(link, certs, serve, source, *options).ended()
    assert ended.code == 0, ended.err
    assert tool.same(source, serve.root / "disk")
    assert serve.stop() == 0
    return ended.lines


def _connections(link: Link, certs: Certs, tmp_path: Path, *options: str) -> list[int]:
    """Copy over a link; the numbers of connections that it had."""
    source = tool.noise(tmp_path / "source", SIZE)
    looks = _looks(link, certs, tmp_path, source, *options)
    return [look["progress"]["connections"] for look in looks if "progress" in look]


def _text(path: Path, size: int) -> Path:
    """A file of lines as a log has them, no two the same."""
    with path.open("wb") as file:
        number = 0
        while file.tell() < size:
            numbers = range(number, number := number + 10_000)
            file.writelines(
                b"%09d web1 systemd[%d]: Started session %d of user root.\n" % (n, n % 977, n * 7)
                for n in numbers
            )
        file.truncate(size)
    return path


def _congestion_control(link: Link, certs: Certs, tmp_path: Path) -> set[str]:
    """How TCP finds the rate of the sender's connections, once the receiver has let them in."""
    available = CONGESTION.read_text().split()
    assert {"bbr", "cubic"} <= set(available), (
        f"this kernel has only {available}, so nothing can be told here: modprobe tcp_bbr"
    )
    serve = _serve(link, certs, tmp_path)
    source = tool.noise(tmp_path / "source", SIZE)
    job = _push(link, certs, serve, source, "--connections", "4", "--limit", "100K")
    while json.loads(job.next_line())["progress"]["connections"] < 4:
        pass
    show = ["ss", "-tinHO", "state", "established", "dport", "=", ":7443"]
    told = subprocess.check_output(link.command("a", *show), text=True).splitlines()
    job.send(signal.SIGINT)
    assert job.ended().code == 130
    assert serve.stop() == 0
    assert len(told) == 4, told
    return {word for line in told for word in line.split() if word in available}


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


def test_far_away_tcp_measures_the_path_itself(far: Link, certs: Certs, tmp_path: Path) -> None:
    assert _congestion_control(far, certs, tmp_path) == {"bbr"}


def test_near_by_tcp_does_as_the_host_says(certs: Certs, tmp_path: Path) -> None:
    with Link(Shape("near", 100)) as link:
        assert _congestion_control(link, certs, tmp_path) == {"cubic"}


def test_what_compresses_is_compressed_for_a_slow_link(certs: Certs, tmp_path: Path) -> None:
    source = _text(tmp_path / "source", TEXT_SIZE)
    with Link(Shape("slow", 100)) as link:
        last = _looks(link, certs, tmp_path, source)[-1]
        assert link.sent_bytes() < TEXT_SIZE / 2
    assert last["receipt"]["wire_bytes"] < TEXT_SIZE / 2
