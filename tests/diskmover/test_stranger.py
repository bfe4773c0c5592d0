"""diskmover talks with a peer that was written from its documentation alone."""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path

import pytest

from tests.diskmover import stranger, tool
from tests.diskmover.conftest import Certs
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


@pytest.mark.parametrize("name", ["empty", "odd-size", "text", "noise", "starts-with-hole"])
def test_push_sends_to_a_stranger(name: str, certs: Certs, tmp_path: Path) -> None:
    source = tmp_path / name
    DISKS[name](source)
    tls = stranger.context(True, *certs.paths("b"), certs.ca)
    arrived: list[stranger.Arrived] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def receive() -> None:
            raw, _ = listener.accept()
            raw.settimeout(60)
            wire = stranger.Wire(tls.wrap_socket(raw, server_side=True))
            arrived.append(stranger.serve_one(wire))
            assert wire.receive() is None
            wire.close()

        thread = threading.Thread(target=receive)
        thread.start()
        address = "{}:{}".format(*listener.getsockname())
        pushed = tool.run(
            "push", source, "--to", address, "--connections", "1", "--json", *certs.options("a")
        )
        thread.join(60)
    assert pushed.receipt["digest"] == stranger.digest_of(source)
    assert arrived[0].content == source.read_bytes()


def test_tls_1_2_is_not_spoken(serve: Serve, certs: Certs) -> None:
    old = stranger.context(False, *certs.paths("a"), certs.ca)
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        stranger.dial(serve.address, old)


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
