"""What arrives is what was sent, to the byte, the hole and the digest."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import diskmover
from tests.diskmover import stranger, tool
from tests.diskmover.conftest import Certs
from tests.diskmover.tool import Serve

MIB = 1 << 20


def _holes(size: int, *pieces: tuple[int, bytes]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size)
            for offset, data in pieces:
                file.seek(offset)
                file.write(data)

    return make


DISKS: dict[str, Callable[[Path], object]] = {
    "empty": _holes(0),
    "one-byte": _holes(1, (0, b"x")),
    "one-zero-byte": _holes(1),
    "odd-size": _holes(3 * MIB + 4097, (0, b"a" * 5000), (3 * MIB + 4090, b"tail!!!")),
    "all-hole": _holes(130 * MIB + 5),
    "starts-with-hole": _holes(70 * MIB, (69 * MIB + 77, b"late")),
    "ends-with-hole": _holes(70 * MIB + 1, (0, b"early")),
    "allocated-zeros": _holes(3 * MIB, (0, bytes(3 * MIB))),
    "text": _holes(2 * MIB, (0, b"all work and no play " * 90_000)),
    "scattered": _holes(66 * MIB, *((n * 3 * MIB + n * 4096, b"%d" % n * 999) for n in range(20))),
    "noise": lambda path: tool.noise(path, 5 * MIB + 13),
}


@pytest.mark.parametrize("name", DISKS)
def test_a_disk_arrives_as_it_is(name: str, serve: Serve, certs: Certs, tmp_path: Path) -> None:
    source = tmp_path / name
    DISKS[name](source)
    pushed = tool.run("push", source, "--to", serve.address, "--json", *certs.options("a"))
    receipt, target = pushed.receipt, serve.root / name
    assert tool.same(source, target)
    assert target.stat().st_size == source.stat().st_size
    data = stranger.data_bytes_of(source)
    assert (receipt["size_bytes"], receipt["data_bytes"]) == (source.stat().st_size, data)
    assert receipt["zero_bytes"] == receipt["size_bytes"] - data
    assert receipt["digest"] == stranger.digest_of(source) == diskmover.digest(target).digest
    assert target.stat().st_blocks * 512 <= data + 64 * 1024, "holes were filled"
    assert receipt["wire_bytes"] <= data + 100 * 1024, "zeros were sent"
    assert {path.suffix for path in serve.root.glob(f".{name}.dm-*")} == {".receipt"}


def test_holes_that_are_read_give_the_same(serve: Serve, certs: Certs, tmp_path: Path) -> None:
    source = tmp_path / "distrusted"
    DISKS["scattered"](source)
    pushed = tool.run(
        "push", source, "--to", serve.address, "--holes", "read", "--json", *certs.options("a")
    )
    assert pushed.receipt["digest"] == stranger.digest_of(source)
    assert tool.same(source, serve.root / "distrusted")


def test_compression_is_only_a_matter_of_the_wire(
    serve: Serve, certs: Certs, tmp_path: Path
) -> None:
    source = tmp_path / "squeezed"
    DISKS["text"](source)
    base: list[str | Path] = ["push", source, "--to", serve.address, "--json", *certs.options("a")]
    packed = tool.run(*base, "--name", "packed", "--level", "3").receipt
    plain = tool.run(*base, "--name", "plain", "--no-compress").receipt
    assert packed["digest"] == plain["digest"]
    assert packed["wire_bytes"] < plain["wire_bytes"] / 10
    assert tool.same(serve.root / "packed", serve.root / "plain")


def test_holes_of_a_file_system_without_a_good_record_are_read(
    serve: Serve, certs: Certs, tmp_path: Path
) -> None:
    image = tmp_path / "behind-fuse"
    _holes(8 * MIB, (3 * MIB, b"data"))(image)
    mounted = tmp_path / "on-fuse"
    mounted.touch()
    node = f"driver=raw,node-name=n,read-only=on,file.driver=file,file.filename={image}"
    export = f"type=fuse,id=e,node-name=n,mountpoint={mounted}"
    with subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", node, "--export", export], stderr=subprocess.PIPE
    ) as daemon:
        try:
            tool.eventually("it is mounted", lambda: mounted.stat().st_size == 8 * MIB)
            told = {}
            for holes in ("auto", "trust"):
                told[holes] = tool.run(
                    "push", mounted, "--to", serve.address, "--name", f"fuse-{holes}",
                    "--holes", holes, *certs.options("a"),
                )  # fmt: skip
                assert told[holes].code == 0, told[holes].err
                assert tool.same(image, serve.root / f"fuse-{holes}")
        finally:
            daemon.terminate()
            daemon.wait(tool.PATIENCE_SECONDS)
    assert told["auto"].err.count("FUSE, whose word about holes is not taken") == 1
    assert "holes" not in told["trust"].err
