"""Images of which a copy alone is no disk: they are sent as they are, and it is said."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskmover.not_whole import NAME_LENGTH, Lack, lacks
from tests.diskmover import qemu, tool
from tests.diskmover.conftest import Certs
from tests.diskmover.tool import Serve

MIB = 1 << 20
HEADER_BYTES = 104
DIRTY, CORRUPT, DATA_FILE = 1, 2, 4


def header(
    version: int = 3, *, name: bytes = b"", at: int = HEADER_BYTES, size: int | None = None,
    features: int = 0,
) -> bytes:  # fmt: skip
    """The start of a qcow2, as far as it is looked at, and a backing name behind it."""
    length = len(name) if size is None else size
    start = struct.pack(">4sIQI", b"QFI\xfb", version, at if length else 0, length)
    return (start.ljust(72, b"\0") + struct.pack(">Q", features)).ljust(HEADER_BYTES, b"\0") + name


def image(tmp_path: Path, content: bytes, name: str = "web1.qcow2") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def codes(path: Path, *beside: Path) -> list[str]:
    return [lack.code for lack in lacks(path, [path, *beside])]


def only(path: Path) -> Lack:
    (lack,) = lacks(path, [path])
    return lack


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (0, []),
        (DIRTY, ["NOT_CLOSED"]),
        (CORRUPT, ["CORRUPT"]),
        (DATA_FILE, ["DATA_FILE"]),
        (DIRTY | CORRUPT | DATA_FILE, ["DATA_FILE", "NOT_CLOSED", "CORRUPT"]),
        (1 << 3 | 1 << 63, []),
    ],
)
def test_each_mark_is_seen_by_itself(tmp_path: Path, features: int, expected: list[str]) -> None:
    assert codes(image(tmp_path, header(features=features))) == expected


def test_version_2_has_a_backing_file_and_no_marks(tmp_path: Path) -> None:
    old = header(2, name=b"base", at=72, features=0)[:72] + b"base"
    assert 'backing file "base"' in only(image(tmp_path, old)).message
    # What follows its 72 bytes is no field of it.
    assert codes(image(tmp_path, header(2, features=DIRTY))) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"QFI\xfb",
        b"QFI\xfa" + header(features=DIRTY)[4:],
        header(1, name=b"base"),
        header(4, name=b"base", features=DIRTY),
        header(features=DIRTY)[: HEADER_BYTES - 1],
        header(2, name=b"base")[:71],
        bytes(5000),
    ],
)
def test_what_is_no_such_image_has_no_note(tmp_path: Path, content: bytes) -> None:
    assert codes(image(tmp_path, content)) == []


@pytest.mark.parametrize(
    ("given_name", "shown"),
    [
        (b"base.qcow2", '"base.qcow2"'),
        (b"a\x1b[2Jb\nc\0", '"a?[2Jb?c?"'),
        ("x\u202ey".encode(), '"x?y"'),
        (b"\xff", '"\ufffd"'),
        (b"n" * 1023, f'"...{"n" * (NAME_LENGTH - 3)}"'),
    ],
)
def test_a_name_cannot_act_on_a_terminal_and_is_short(
    tmp_path: Path, given_name: bytes, shown: str
) -> None:
    lack = only(image(tmp_path, header(name=given_name)))
    assert lack.code == "BACKING_FILE"
    assert f"backing file {shown}," in lack.message


@pytest.mark.parametrize(
    "content",
    [
        header(name=b"n" * 1024),
        header(name=b"base", size=900),
        header(at=2**64 - 1, size=4),
        header(at=2**63 - 1, size=4),
        header(at=3 * MIB, size=4),
        header(at=HEADER_BYTES, size=2**32 - 1),
    ],
)
def test_a_name_that_cannot_be_is_not_read(tmp_path: Path, content: bytes) -> None:
    lack = only(image(tmp_path, content))
    assert "backing file whose name cannot be read," in lack.message


def test_a_name_of_no_length_is_none(tmp_path: Path) -> None:
    assert codes(image(tmp_path, header(at=HEADER_BYTES, size=0))) == []


def test_a_backing_file_that_is_sent_too_is_not_missing(tmp_path: Path) -> None:
    base = image(tmp_path, b"base", "base.raw")
    link = tmp_path / "link.raw"
    link.symlink_to(base)
    for name in (b"base.raw", b"./base.raw", os.fsencode(base), b"../%s/base.raw"):
        named = name.replace(b"%s", os.fsencode(tmp_path.name))
        over = image(tmp_path, header(name=named))
        assert codes(over) == ["BACKING_FILE"]
        assert codes(over, base) == []
    over = image(tmp_path, header(name=b"link.raw"))
    assert codes(over, link) == []
    # An image is not the base of itself, and another file of that name is another file.
    (tmp_path / "else").mkdir()
    assert codes(over, image(tmp_path / "else", b"other", "link.raw")) == ["BACKING_FILE"]
    assert codes(image(tmp_path, header(name=b"web1.qcow2"))) == ["BACKING_FILE"]


def test_a_relative_name_counts_from_the_image_and_not_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = image(tmp_path, b"base", "base.raw")
    image(tmp_path, header(name=b"base.raw"))
    monkeypatch.chdir(tmp_path)
    assert codes(Path("web1.qcow2"), Path("base.raw")) == []
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert codes(Path("../web1.qcow2"), Path("../base.raw")) == []
    assert codes(Path("../web1.qcow2"), base) == []


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for name in ("pipe", "socket", "", "absent"):
            assert codes(tmp_path / name) == []


@given(content=st.binary(max_size=300))
def test_any_bytes_are_told_in_printable_words(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = image(tmp_path_factory.mktemp("any"), header()[:8] + content)
    for lack in lacks(path, [path]):
        assert lack.message.isprintable()
        assert len(lack.message) < 300


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """A qcow2 over another, as qemu-img makes it."""
    qemu.create(tmp_path / "base.qcow2", MIB)
    return qemu.create(
        tmp_path / "over.qcow2", MIB, "-b", str(tmp_path / "base.qcow2"), "-F", "qcow2"
    )


def test_an_overlay_alone_is_sent_as_it_is_and_noted(
    serve: Serve, certs: Certs, overlay: Path
) -> None:
    base: list[str | Path] = ["push", overlay, "--to", serve.address, *certs.options("a")]
    told = tool.run(*base, "--name", "alone")
    assert told.code == 0
    assert told.err.startswith("diskmover: NOTE: alone looks like a qcow2 over the backing file")
    assert told.out.startswith("alone: "), "the note is no part of what is done"
    assert tool.same(overlay, serve.root / "alone")
    pushed = tool.run(*base, "--name", "alone-json", "--json")
    assert pushed.receipt["volume_id"] == "alone-json"
    first = pushed.lines[0]
    assert (first["file"], first["note"]["code"]) == ("alone-json", "BACKING_FILE")
    assert "base.qcow2" in first["note"]["message"]


def test_a_chain_that_is_sent_as_a_whole_has_no_note(
    serve: Serve, certs: Certs, overlay: Path
) -> None:
    files = [overlay, overlay.parent / "base.qcow2"]
    pushed = tool.run("push", *files, "--to", serve.address, "--json", *certs.options("a"))
    assert pushed.code == 0
    assert pushed.err == ""
    assert not any("note" in line for line in pushed.lines)


def test_images_that_qemu_made_or_left_behind_are_noted(tmp_path: Path) -> None:
    data = f"data_file={tmp_path / 'data.raw'}"
    assert codes(qemu.create(tmp_path / "outside", MIB, "-o", data)) == ["DATA_FILE"]
    left = qemu.create(tmp_path / "left", MIB, "-o", "lazy_refcounts=on")
    assert codes(left) == []
    qemu.run("sh", "-c", f"qemu-io -f qcow2 -c 'write 0 64k' -c abort {left}; true")
    assert codes(left) == ["NOT_CLOSED"]
