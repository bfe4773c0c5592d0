"""diskmover talks with a peer that was written from its documentation alone."""

from __future__ import annotations

import json
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.diskmover import stranger, tool
from tests.diskmover.conftest import Certs
from tests.diskmover.strangers import sent_to_a_stranger
from tests.diskmover.test_content import DISKS
from tests.diskmover.tool import Serve


@pytest.mark.parametrize("compress", [False, True])
def test_a_stranger_sends_to_serve(
    compress: bool, serve: Serve, certs: Certs, tmp_path: Path
) -> None:
    name = f"strange-{compress}"
    source = tmp_path / name
    DISKS["odd-size"](source)
    tls = stranger.context(False, *certs.paths("c"), certs.ca)
    wire = stranger.dial(serve.address, tls)
    receipt = stranger.push(wire, source, name, compress=compress)
    wire.close()
    assert tool.same(source, serve.root / name)
    assert receipt["digest"] == stranger.digest_of(source)
    assert receipt["data_bytes"] == stranger.data_bytes_of(source)
    assert receipt["allocated_bytes"] == (serve.root / name).stat().st_blocks * 512


@pytest.mark.parametrize("name", ["empty", "odd-size", "text", "noise", "starts-with-hole"])
def test_push_sends_to_a_stranger(name: str, certs: Certs, tmp_path: Path) -> None:
    source = tmp_path / name
    DISKS[name](source)
    pushed, arrived, _ = sent_to_a_stranger(certs, source)
    assert pushed.receipt["digest"] == stranger.digest_of(source)
    assert pushed.receipt["allocated_bytes"] == stranger.ALLOCATED
    assert arrived.content == source.read_bytes()


# --- receipts, recomputed by a script that shares nothing with anybody -----------


def receipt_py(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parents[2] / "docs" / "receipt.py"
    command = [sys.executable, script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("options", [["--level", "3"], ["--no-compress"]], ids=["zstd", "raw"])
@pytest.mark.parametrize("name", ["empty", "odd-size", "text", "starts-with-hole"])
def test_a_receipt_is_recomputed_from_a_captured_stream(
    name: str, options: list[str], certs: Certs, tmp_path: Path
) -> None:
    source, capture, decoded = tmp_path / name, tmp_path / "capture", tmp_path / "decoded"
    DISKS[name](source)
    pushed, _, wire = sent_to_a_stranger(certs, source, *options)
    capture.write_bytes(wire.captured)
    told = receipt_py("--stream", capture, "--write", decoded)
    assert told.returncode == 0, told.stderr
    assert told.stdout == receipt_py(source).stdout
    assert tool.same(source, decoded)
    recomputed = json.loads(told.stdout)
    assert recomputed == {field: pushed.receipt[field] for field in recomputed}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda stream: stream[:-1], "it ends within a frame"),
        (lambda stream: stream[: len(stream) // 2], "was not sent|within a frame"),
        (lambda stream: stream[:60] + b"?" + stream[61:], "a header is damaged"),
        (lambda stream: stream.replace(b"tail", b"Tail"), "does not match its authenticator"),
    ],
)
def test_a_damaged_capture_gives_no_receipt(
    damage: Callable[[bytes], bytes], says: str, certs: Certs, tmp_path: Path
) -> None:
    source, capture = tmp_path / "disk", tmp_path / "capture"
    DISKS["odd-size"](source)
    _, _, wire = sent_to_a_stranger(certs, source, "--no-compress")
    capture.write_bytes(damage(bytes(wire.captured)))
    told = receipt_py("--stream", capture)
    assert (told.returncode, told.stdout) == (1, "")
    assert re.search(says, told.stderr), told.stderr


def test_tls_1_2_is_not_spoken(serve: Serve, certs: Certs) -> None:
    old = stranger.context(False, *certs.paths("a"), certs.ca)
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        stranger.dial(serve.address, old)


def test_a_receiver_of_tls_1_2_is_sent_nothing(certs: Certs, tmp_path: Path) -> None:
    old = stranger.context(True, *certs.paths("b"), certs.ca)
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    source = tool.noise(tmp_path / "disk", 1000)
    refused: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def receive() -> None:
            raw, _ = listener.accept()
            with raw:
                raw.settimeout(60)
                try:
                    old.wrap_socket(raw, server_side=True).close()
                except ssl.SSLError as error:
                    refused.append(str(error.reason))

        thread = threading.Thread(target=receive)
        thread.start()
        address = "{}:{}".format(*listener.getsockname())
        options = ["--connections", "1", "--json", *certs.options("a")]
        pushed = tool.run("push", source, "--to", address, *options)
        thread.join(60)
    assert refused == ["UNSUPPORTED_PROTOCOL"]
    assert (pushed.code, pushed.error["code"]) == (1, "PROTOCOL"), pushed.err


def test_nobody_is_heard_without_a_certificate(serve: Serve, certs: Certs) -> None:
    anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anonymous.check_hostname = False
    anonymous.load_verify_locations(certs.ca)
    anonymous.set_alpn_protocols(["diskmover/1"])
    wire = stranger.dial(serve.address, anonymous)
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
        stranger.push(wire, certs.ca, "anonymous", compress=False)
    wire.close()
    assert not (serve.root / "anonymous").exists()
