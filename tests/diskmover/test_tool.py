"""The tool's edges: options, output, exit codes, certificates, help."""

from __future__ import annotations

import datetime
import json
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography import x509

from controlplane.cli.units import RateType
from diskmover import certs as authority
from diskmover import show
from diskmover.cli import main
from diskmover.errors import MoverError
from diskmover.model import EndedCopy, Progress
from diskmover.params import Rate
from tests.diskmover import stranger, tool
from tests.diskmover.conftest import Certs
from tests.diskmover.tool import Running, Serve


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tool.noise(tmp_path / "disk", 5000)


def test_output_for_people_says_what_happened(serve: Serve, certs: Certs, source: Path) -> None:
    pushed = tool.run(
        "push", source, "--to", serve.address, "--name", "people", *certs.options("a")
    )
    assert pushed.code == 0
    assert pushed.err == "", "progress belongs to terminals"
    pattern = (
        r"people: 4\.9 KiB, of it 4\.9 KiB data, 5\.\d KiB on the wire, \d+\.\d s, digest (\w+)"
    )
    found = re.fullmatch(pattern, pushed.out.strip())
    assert found, pushed.out
    assert found[1] == stranger.digest_of(source)
    assert tool.run("digest", source).out == f"{found[1]}  {source}\n"


def test_several_files_keep_their_names(serve: Serve, certs: Certs, tmp_path: Path) -> None:
    files = [tool.noise(tmp_path / f"several-{n}", 100 * n) for n in range(3)]
    pushed = tool.run("push", *files, "--to", serve.address, "--json", *certs.options("a"))
    assert [line["receipt"]["volume_id"] for line in pushed.lines] == [f.name for f in files]
    assert all(tool.same(file, serve.root / file.name) for file in files)


def test_json_tells_progress_while_it_runs(serve: Serve, certs: Certs, tmp_path: Path) -> None:
    source = tool.noise(tmp_path / "slow", 6 << 20)
    pushed = tool.run(
        "push", source, "--to", serve.address, "--limit", "3M", "--json", *certs.options("a")
    )
    told = [line["progress"] for line in pushed.lines if "progress" in line]
    assert told
    assert told[-1]["total_bytes"] == 6 << 20
    assert all(line["limited_by"] for line in told)
    done = [line["done_bytes"] for line in told]
    assert done == sorted(done)


def _tells_all(look: dict[str, Any]) -> bool:
    """Whether it has all connections, a rate, the time left at it, and bounds for that."""
    eta, low, high = (look[f"eta{bound}_seconds"] for bound in ("", "_low", "_high"))
    left = look["total_bytes"] - look["done_bytes"]
    return (
        look["connections"] == 3
        and look["rate_bytes_per_second"] > 0
        and None not in (eta, low, high)
        and low <= eta <= high
        and eta == pytest.approx(left / look["rate_bytes_per_second"], rel=0.1)
    )


def test_progress_has_a_rate_and_the_time_that_is_left(
    serve: Serve, certs: Certs, tmp_path: Path
) -> None:
    source = tool.noise(tmp_path / "rated", 64 << 20)
    job = Running(
        source, "--to", serve.address, "--limit", "4M", "--connections", "3", "--json",
        *certs.options("a"),
    )  # fmt: skip
    looks: list[dict[str, Any]] = []
    # The copy takes 16 seconds, and the last of these is there after two.
    while not looks or not _tells_all(looks[-1]):
        said = json.loads(job.next_line())
        assert "progress" in said, looks
        looks.append(said["progress"])
    job.send(signal.SIGINT)
    assert job.ended().code == 130
    assert all(look["wire_bytes"] >= look["done_bytes"] for look in looks), "noise"
    wire = [look["wire_bytes"] for look in looks]
    assert wire == sorted(wire)
    assert wire[-1] > 0


@pytest.mark.parametrize(
    ("who", "peer", "code", "reason"),
    [
        ("b", None, 0, None),
        ("b", "b", 0, None),
        ("b", "diskmover://b", 0, None),
        ("b", "c", 1, "PEER_IDENTITY"),
    ],
)
def test_the_receiver_can_be_demanded_by_name(
    who: str,
    peer: str | None,
    code: int,
    reason: str | None,
    serve: Serve,
    certs: Certs,
    source: Path,
) -> None:
    demand = ["--peer", peer] if peer else []
    pushed = tool.run(
        "push",
        source,
        "--to",
        serve.address,
        "--name",
        f"peer-{peer}".replace("/", ""),
        "--json",
        *demand,
        *certs.options("a"),
    )
    assert pushed.code == code
    assert (pushed.error["code"] if reason else None) == reason


def test_a_copy_for_which_there_is_no_memory_is_told_to_come_again(
    certs: Certs, source: Path, tmp_path: Path
) -> None:
    root = tmp_path / "in"
    root.mkdir()
    serve = Serve(root, certs.options("b"), options=["--volume-memory", "100"])
    try:
        pushed = tool.run("push", source, "--to", serve.address, "--json", *certs.options("a"))
    finally:
        serve.stop()
    assert (pushed.code, pushed.error["code"]) == (5, "LIMIT_EXCEEDED")
    assert "give this receiver more memory for volumes" in pushed.error["message"]
    assert list(root.iterdir()) == [], "something was touched"


def test_a_foreign_certificate_is_refused(
    serve: Serve, certs: Certs, foreign_certs: Certs, source: Path
) -> None:
    cert, key = foreign_certs.paths("a")
    identity = ["--cert", str(cert), "--key", str(key), "--ca", str(certs.ca)]
    pushed = tool.run("push", source, "--to", serve.address, "--json", *identity)
    assert (pushed.code, pushed.error["code"]) == (1, "PEER_UNTRUSTED")
    assert "of the same fleet" in pushed.err


def test_an_expired_certificate_is_refused(
    serve: Serve, certs: Certs, source: Path, tmp_path: Path
) -> None:
    ca = authority.open_authority(certs.directory)
    cert, key = authority.issue(ca, tmp_path, "old", lifetime=datetime.timedelta(days=-1))
    identity = ["--cert", str(cert), "--key", str(key), "--ca", str(certs.ca)]
    pushed = tool.run("push", source, "--to", serve.address, "--json", *identity)
    assert (pushed.code, pushed.error["code"]) == (1, "PEER_UNTRUSTED")


def test_nobody_there_is_worth_another_try(certs: Certs, source: Path) -> None:
    pushed = tool.run(
        "push", source, "--to", "127.0.0.1:1", "--retry-for", "0.2", "--json", *certs.options("a")
    )
    assert (pushed.code, pushed.error["code"]) == (5, "CONNECT_FAILED")
    assert "127.0.0.1:1" in pushed.err


def test_a_port_that_is_taken_is_told(serve: Serve, certs: Certs, tmp_path: Path) -> None:
    second = tool.run("serve", "--root", tmp_path, "--listen", serve.address, *certs.options("b"))
    assert second.code == 5
    assert f"cannot listen on {serve.address}" in second.err


def test_a_name_that_leads_out_is_refused(serve: Serve, certs: Certs, source: Path) -> None:
    base: list[str | Path] = ["push", source, "--to", serve.address, "--json", *certs.options("a")]
    for name in ("../out", "/tmp/out", "a/b", ".hidden", "x" * 161):
        pushed = tool.run(*base, "--name", name)
        assert (pushed.code, pushed.error["code"]) == (1, "INVALID_ARGUMENT"), name


def test_long_names_in_any_script_arrive(serve: Serve, certs: Certs, source: Path) -> None:
    name = "ü" * 80
    pushed = tool.run(
        "push", source, "--to", serve.address, "--name", name, "--json", *certs.options("a")
    )
    assert pushed.receipt["volume_id"] == name
    assert tool.same(source, serve.root / name)


@pytest.mark.parametrize(
    ("text", "rate"),
    [("7", 7), ("20M", 20_000_000), ("20Mi", 20 << 20), ("3kB/s", 3000), ("1GiB/s", 1 << 30)],
)
def test_rates_are_read_as_drover_reads_them(text: str, rate: int) -> None:
    assert Rate().convert(text, None, None) == rate == RateType().convert(text, None, None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["push", "--to", "h:1"], "name the files to send"),
        (["push", "{source}", "--to", "h:1", "--nbd", "unix:/run/x"], "name the files to send"),
        (["push", "--to", "h:1", "--nbd", "unix:/run/x"], "give one with --name"),
        (["push", "--to", "h:1", "--nbd", "/run/x"], "is neither unix:PATH"),
        (["push", "{source}", "--to", "h:1", "--content-id", "x"], "go with --nbd only"),
        (["push", "{source}"], "Missing option '--to'"),
        (["push", "/nonexistent", "--to", "h:1"], "does not exist"),
        (["push", "{source}", "--to", "h:1", "--limit", "fast"], "not a rate such as 20M"),
        (["push", "{source}", "--to", "h:1", "--limit", "0"], "not a rate such as 20M"),
        (["push", "{source}", "--to", "h:1", "--limit", "9" * 20], "not a rate such as 20M"),
        (["push", "{source}", "--to", "h:1", "--retry-for", "0"], "0<x<=86400"),
        (["push", "{source}", "--to", "h:1", "--connections", "65"], "1<=x<=64"),
        (["push", "{source}", "{source}", "--to", "h:1", "--name", "x"], "one file only"),
        (["push", "{source}", "--to", "h:port"], "is not HOST or HOST:PORT"),
        (["push", "{source}", "--to", "h:70000"], "is not HOST or HOST:PORT"),
        (["push", "{source}", "{source}", "--to", "h"], "two files are called 'disk'"),
        (["push", "{directory}/\udcff", "--to", "h"], "is not UTF-8"),
        (["serve"], "Missing option '--root'"),
        (["serve", "--root", ".", "--volume-memory", "much"], "not a size such as 20M"),
        (["certs", "{directory}", "a/b"], "cannot be a file name"),
        (["certs", "{directory}", "ca"], "cannot be a file name"),
        (["frobnicate"], "No such command"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], says: str, certs: Certs, source: Path, tmp_path: Path
) -> None:
    filled = [a.format(source=source, directory=tmp_path) for a in arguments]
    (tmp_path / "\udcff").touch()
    tls = certs.options("a") if "--to" in filled else []
    result = CliRunner().invoke(main, filled + tls)
    assert result.exit_code == 2, result.output
    assert says in result.output


def test_certs_makes_an_authority_once_and_keys_that_nobody_else_reads(tmp_path: Path) -> None:
    first = CliRunner().invoke(main, ["certs", str(tmp_path), "a"])
    ca = (tmp_path / "ca.pem").read_bytes()
    second = CliRunner().invoke(main, ["certs", str(tmp_path), "b"])
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert (tmp_path / "ca.pem").read_bytes() == ca
    for name in ("ca", "a", "b"):
        assert stat.S_IMODE((tmp_path / f"{name}.key").stat().st_mode) == 0o600
    cert = x509.load_pem_x509_certificate((tmp_path / "b.pem").read_bytes())
    cert.verify_directly_issued_by(x509.load_pem_x509_certificate(ca))
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["diskmover://b"]


@pytest.mark.parametrize("name", ["ü", "x" * 70])
def test_certs_says_what_cannot_be_a_name(name: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["certs", str(tmp_path), name])
    assert result.exit_code == 1
    assert f"Error: cannot make a certificate for '{name}'" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca.key", "ca.pem"]


def test_certs_says_when_a_key_has_a_password(tmp_path: Path) -> None:
    CliRunner().invoke(main, ["certs", str(tmp_path), "a"])
    key = tmp_path / "ca.key"
    subprocess.run(
        ["openssl", "ec", "-aes256", "-in", key, "-out", key, "-passout", "pass:x"],
        check=True, capture_output=True,
    )  # fmt: skip
    result = CliRunner().invoke(main, ["certs", str(tmp_path), "b"])
    assert result.exit_code == 1
    assert "Error: cannot make a certificate for 'b'" in result.output


def test_certs_never_replaces_half_an_authority(tmp_path: Path) -> None:
    CliRunner().invoke(main, ["certs", str(tmp_path), "a"])
    (tmp_path / "ca.key").unlink()
    ca = (tmp_path / "ca.pem").read_bytes()
    result = CliRunner().invoke(main, ["certs", str(tmp_path), "b"])
    assert result.exit_code == 1
    assert "ca.key" in result.output
    assert (tmp_path / "ca.pem").read_bytes() == ca


def test_credentials_that_do_not_work_are_told(certs: Certs, source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("not a certificate")
    cert, key = certs.paths("a")
    for options in (
        ["--cert", broken, "--key", key, "--ca", certs.ca],
        ["--cert", cert, "--key", broken, "--ca", certs.ca],
        ["--cert", cert, "--key", key, "--ca", broken],
        ["--cert", cert, "--key", certs.paths("b")[1], "--ca", certs.ca],
    ):
        arguments = ["push", source, "--to", "127.0.0.1:1", "--json", *options]
        result = CliRunner().invoke(main, list(map(str, arguments)))
        assert result.exit_code == 1
        assert json.loads(result.stdout)["error"]["code"] == "CREDENTIALS", result.output


# --- what a terminal shows -------------------------------------------------------


def progress(**known: Any) -> Progress:
    given: dict[str, Any] = {
        "done_bytes": 18 << 20,
        "total_bytes": 40 << 20,
        "resumed_bytes": 0,
        "wire_bytes": 5,
        "rate_bytes_per_second": 9 << 20,
        "eta_seconds": 2.4,
        "eta_low_seconds": 2.1,
        "eta_high_seconds": 3.2,
        "limited_by": "network",
        "connections": 4,
    }
    return Progress(**given | known)


def test_the_line_has_a_bar_a_range_and_the_stage_that_limits() -> None:
    assert show.line("d", progress(), 80) == (
        "d  45% [#########------------] of 40.0 MiB, 9.0 MiB/s, 2 s to 3 s left [network]"
    )


@pytest.mark.parametrize("width", [10, 40, 60, 79, 119, 300])
@pytest.mark.parametrize("name", ["d", "a-rather-long-name-of-a-disk-image.qcow2"])
def test_the_line_never_wraps(name: str, width: int) -> None:
    for told in (progress(), progress(done_bytes=0, connections=0), progress(total_bytes=0)):
        assert len(show.line(name, told, width)) <= width


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"eta_seconds": None}, ""),
        ({"eta_low_seconds": None}, "2 s"),
        ({"eta_high_seconds": None}, "2 s or more"),
        ({"eta_high_seconds": 2.2}, "2 s"),
        ({"eta_low_seconds": 59.4, "eta_high_seconds": 12_345.0}, "59 s to 3h 25m"),
    ],
)
def test_the_time_left_is_a_range(known: dict[str, Any], words: str) -> None:
    assert show.time_left(progress(**known)) == words


def test_a_terminal_gets_a_line_that_is_gone_in_the_end(
    serve: Serve, certs: Certs, tmp_path: Path
) -> None:
    source = tool.noise(tmp_path / "on-a-terminal", 6 << 20)
    shown = tool.on_terminal(
        "push", source, "--to", serve.address, "--limit", "3M", *certs.options("a"), columns=80
    )
    lines = shown.split("\r\x1b[K")
    assert len(lines) > 2
    assert all(len(line) < 80 for line in lines[:-1])
    assert any("[throttle]" in line for line in lines)
    assert any("#" in line for line in lines)
    assert lines[-1].startswith("on-a-terminal: 6.0 MiB, of it 6.0 MiB data")


def test_a_repeated_push_says_that_all_was_there(serve: Serve, certs: Certs, source: Path) -> None:
    push: list[str | Path] = ["push", source, "--to", serve.address, "--name", "repeated"]
    assert "on the wire" in tool.run(*push, *certs.options("a")).out
    assert "was there already" in tool.run(*push, *certs.options("a")).out


def test_credentials_come_from_the_environment_too(
    serve: Serve, certs: Certs, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = certs.paths("a")
    for name, path in (("CERT", cert), ("KEY", key), ("CA", certs.ca)):
        monkeypatch.setenv(f"DISKMOVER_{name}", str(path))
    pushed = tool.run("push", source, "--to", serve.address, "--name", "environment")
    assert pushed.code == 0, pushed.err


def test_what_stands_in_the_way_of_a_connection_is_told(certs: Certs, source: Path) -> None:
    for address, why in (("127.0.0.1:1", "refused"), ("no.invalid", "failed to lookup")):
        pushed = tool.run(
            "push", source, "--to", address, "--retry-for", "0.5", *certs.options("a")
        )
        assert pushed.code == 5
        assert why in pushed.err
        assert "run the same command again to go on" in pushed.err


def test_one_who_hangs_up_is_told(certs: Certs, source: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            with suppress(OSError):  # the listener is closed in the end
                while True:
                    listener.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        to = "{}:{}".format(*listener.getsockname())
        pushed = tool.run("push", source, "--to", to, "--retry-for", "1", *certs.options("a"))
        listener.shutdown(socket.SHUT_RDWR)
    assert pushed.code == 5
    assert re.search(r"within 1 s: .*(closed the connection|reset)", pushed.err), pushed.err


def test_digest_as_json_is_the_canonical_receipt(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    script = Path(__file__).parents[2] / "docs" / "receipt.py"
    recomputed = subprocess.run([sys.executable, script, source], capture_output=True, text=True)
    assert tool.run("digest", "--json", tmp_path / "link").out == recomputed.stdout


def test_an_output_that_cannot_be_written_is_told_of(source: Path) -> None:
    on_a_full_disk = ("sh", "-c", 'exec "$@" > /dev/full', "sh")
    ended = tool.run("digest", source, within=on_a_full_disk)
    assert ended.err == "diskmover: its output cannot be written: No space left on device\n"
    assert ended.code == 1


def test_serve_says_what_came_and_what_did_not(certs: Certs, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "taken").touch()
    source = tool.noise(tmp_path / "first", 5000)
    serve = Serve(tmp_path / "in", certs.options("b"))
    base: list[str | Path] = ["push", source, "--to", serve.address, *certs.options("a")]
    receipts = {name: tool.run(*base, "--json", "--name", name).receipt for name in ("x", "y")}
    said = [serve.next_line(), serve.next_line()]
    assert {line["file"]: line["receipt"] for line in said} == receipts
    assert {line["sender"] for line in said} == {"diskmover://a"}
    assert tool.run(*base, "--name", "taken").code == 1
    refused = serve.next_line()
    assert (refused["file"], refused["error"]["code"]) == ("taken", "TARGET_EXISTS")
    assert serve.stop() == 0


def test_what_a_sender_calls_its_file_does_not_act_on_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = MoverError("TARGET_EXISTS", "it is there")
    show.arrival(EndedCopy("\x1b[2Jdisk\n", "diskmover://a", (), error), as_json=False)
    assert capsys.readouterr().out == "?[2Jdisk? from diskmover://a: TARGET_EXISTS: it is there\n"


def test_a_name_of_several_lines_is_shown_in_one(serve: Serve, certs: Certs, source: Path) -> None:
    name = "a\nb\x1b[2J c ü"
    base: list[str | Path] = ["push", source, "--to", serve.address, "--name", name]
    pushed = tool.run(*base, *certs.options("a"))
    assert pushed.out.startswith("a?b?[2J c ü: 4.9 KiB")
    assert pushed.out.count("\n") == 1
    assert tool.same(source, serve.root / name)
    tool.noise(source, 5000)
    refused = tool.run(*base, *certs.options("a"))
    assert refused.code == 1
    assert refused.err.count("\n") == 1, refused.err
    assert show.line(name, progress(), 80).startswith("a?b?[2J c ü  45%")


def test_serve_tells_of_a_seed_that_is_not_there(certs: Certs, tmp_path: Path) -> None:
    # It says so before it listens: an address that is taken ends it.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = "{}:{}".format(*taken.getsockname())
        serve: list[str | Path] = [
            "serve",
            "--root",
            tmp_path,
            "--seed",
            "typo",
            "--listen",
            listen,
        ]
        ended = tool.run(*serve, *certs.options("b"))
    assert ended.code == 5
    assert f"there is no file 'typo' in {tmp_path} yet" in ended.err


def test_serve_tells_of_a_copy_that_ends_just_before_it_does(
    certs: Certs, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    serve = Serve(tmp_path / "in", certs.options("b"))
    pushed = tool.run("push", source, "--to", serve.address, "--json", *certs.options("a"))
    assert [line["receipt"] for line in serve.said_to_the_end()] == [pushed.receipt]
