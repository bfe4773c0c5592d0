"""A disk that is dying: what `push --on-read-error zero` saves, and how it says so."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from diskmover import IncomingVolume, MoverError, OutgoingVolume, Push, Receiver, TlsFiles, show
from diskmover.cli import main
from diskmover.model import Progress, Receipt, uri_of
from tests.diskmover import stranger, tool
from tests.diskmover.conftest import Certs
from tests.diskmover.tool import Ended, Serve

MIB = 1 << 20
SIZE = 8 * MIB
# In the middle of a block: the sectors before it can be read.
GOOD = 6 * MIB + 3 * 512
LOST = [GOOD, SIZE - GOOD]
RESCUE = ["--on-read-error", "zero"]


@pytest.fixture
def dying(tmp_path: Path) -> Iterator[Path]:
    """A block device whose end gives EIO: the file behind it was cut."""
    backing = tool.noise(tmp_path / "backing", SIZE)
    made = subprocess.run(
        ["losetup", "--find", "--show", backing], check=True, capture_output=True, text=True
    )
    device = Path(made.stdout.strip())
    os.truncate(backing, GOOD)
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


def _push(serve: Serve, certs: Certs, source: Path, name: str, *options: str) -> Ended:
    base: list[str | Path] = ["push", source, "--to", serve.address, "--name", name, *options]
    return tool.run(*base, *certs.options("a"))


def test_a_disk_that_cannot_be_read_is_not_copied(serve: Serve, certs: Certs, dying: Path) -> None:
    failed = _push(serve, certs, dying, "strict", "--json")
    assert (failed.code, failed.error["code"], failed.error["side"]) == (1, "SOURCE_IO", "sender")
    assert failed.error["offset"] >= 6 * MIB
    assert not (serve.root / "strict").exists()


def test_what_is_left_is_saved_and_the_copy_is_called_degraded(
    certs: Certs, dying: Path, tmp_path: Path
) -> None:
    serve = Serve(tmp_path, certs.options("b"))
    # It does not go on from what a strict attempt has placed, but it may stand there.
    assert _push(serve, certs, dying, "saved").code == 1
    assert "error" in serve.next_line()
    saved = _push(serve, certs, dying, "saved", *RESCUE, "--json")
    assert saved.code == 3, saved.err
    assert not any("receipt" in line or "error" in line for line in saved.lines)
    receipt = next(line["degraded"] for line in saved.lines if "degraded" in line)
    assert receipt["unreadable"] == [LOST]
    assert "DEGRADED" in saved.err
    said = serve.next_line()
    assert said["degraded"] == receipt
    assert "receipt" not in said
    with (tmp_path / "saved").open("rb") as copy, (tmp_path / "backing").open("rb") as backing:
        assert copy.read(GOOD) == backing.read()
        assert copy.read() == bytes(SIZE - GOOD)
    assert receipt["digest"] == stranger.digest_of(tmp_path / "saved")
    assert serve.stop() == 0


def test_people_are_told_first_that_it_is_degraded(
    serve: Serve, certs: Certs, dying: Path, tmp_path: Path
) -> None:
    whole = tool.noise(tmp_path / "whole", 5000)
    saved = _push(serve, certs, dying, "told", *RESCUE)
    assert saved.code == 3
    first, place = saved.out.splitlines()
    assert first.startswith("told: DEGRADED, 2.0 MiB could not be read and are zeros: 8.0 MiB")
    assert place == f"  unreadable: {LOST[1]} bytes at byte {GOOD}"
    assert "cannot be read at byte" in saved.err
    assert "direct I/O" not in saved.err, "it is not the page cache that is wanted"
    # Without errors the option changes nothing, and the same again is no better.
    assert _push(serve, certs, whole, "whole", *RESCUE).code == 0
    again = _push(serve, certs, dying, "told", *RESCUE)
    assert (again.code, "was there already" in again.out) == (3, True)


def test_a_degraded_copy_is_no_answer_to_who_wants_a_whole_one(
    serve: Serve, certs: Certs, dying: Path
) -> None:
    assert _push(serve, certs, dying, "claimed", *RESCUE).code == 3
    refused = _push(serve, certs, dying, "claimed", "--json")
    assert (refused.code, refused.error["code"]) == (1, "TARGET_EXISTS")
    assert "DEGRADED" in refused.error["message"]


def test_all_files_are_sent_and_one_that_is_degraded_counts(
    serve: Serve, certs: Certs, dying: Path, tmp_path: Path
) -> None:
    whole = tool.noise(tmp_path / "after-it", 5000)
    both: list[str | Path] = ["push", dying, whole, "--to", serve.address, *RESCUE]
    assert tool.run(*both, *certs.options("a")).code == 3
    assert tool.same(whole, serve.root / "after-it")


@pytest.mark.parametrize("accept", [False, True])
def test_a_session_takes_a_degraded_copy_only_when_it_says_so(
    accept: bool, credentials: dict[str, TlsFiles], dying: Path, tmp_path: Path
) -> None:
    key = bytes(range(32))
    volume = IncomingVolume("vda", tmp_path, "target", SIZE, accept_degraded=accept)
    with Receiver("127.0.0.1:0", credentials["target"]) as receiver:
        receiver.open_session("s", key, sender=uri_of("source"), volumes=[volume], tag="t")
        push = Push(
            to=receiver.address,
            receiver=uri_of("target"),
            tls=credentials["source"],
            session_id="s",
            key=key,
            tag="t",
            volumes=[OutgoingVolume("vda", dying)],
            on_read_error="zero",
        )
        if accept:
            receipts = push.wait(60)
            assert receipts is not None
            assert receipts[0].is_degraded
            assert receipts[0].unreadable == ((LOST[0], LOST[1]),)
            assert receiver.session_status("s").receipts == tuple(receipts)
            assert push.progress().unreadable_bytes == LOST[1]
            return
        with pytest.raises(MoverError) as refused:
            push.wait(60)
        assert (refused.value.code.value, refused.value.side) == ("SOURCE_IO", "receiver")
        assert refused.value.offset == GOOD
        assert not (tmp_path / "target").exists()


def test_the_option_is_explained_and_not_for_exports(certs: Certs) -> None:
    text = " ".join(CliRunner().invoke(main, ["push", "--help"]).output.split())
    assert "--on-read-error [fail|zero]" in text
    assert "3 all are there but one is DEGRADED" in text
    nbd = ["push", "--nbd", "unix:/run/x", "--name", "x", "--to", "h", *RESCUE]
    refused = CliRunner().invoke(main, [*nbd, *certs.options("a")])
    assert refused.exit_code == 2
    assert "not with --nbd" in refused.output


def test_the_progress_line_says_so() -> None:
    known = (18 << 20, 40 << 20, 0, 5, 9 << 20, None, None, None, "source-read", 4)
    line = show.line("d", Progress(*known, unreadable_bytes=1536), 100)
    assert "DEGRADED: 1.5 KiB unreadable" in line
    assert "DEGRADED" not in show.line("d", Progress(*known), 100)


def test_a_receipt_knows_whether_it_is_degraded() -> None:
    known = ("vda", 9000, 5, 8995, 7, MIB, "00" * 32, "verbatim")
    assert not Receipt(*known).is_degraded
    assert Receipt(*known, ((512, 512), (4096, 10))).unreadable_bytes == 522


def test_machines_are_never_moved_so() -> None:
    """hostd and the control plane neither send nor take a degraded copy."""
    packages = (Path(__file__).parents[2] / name for name in ("hostd", "controlplane"))
    for module in (path for package in packages for path in package.rglob("*.py")):
        text = module.read_text()
        assert "on_read_error" not in text, module
        assert "accept_degraded" not in text, module
