"""Joining a fleet, against a real enrolment server over TLS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from click.testing import CliRunner, Result
from cryptography import x509

from controlplane.common.errors import DroverError
from controlplane.common.identity import Identity, Role
from controlplane.common.reasons import Reason
from controlplane.common.rpc import ErrorInterceptor
from controlplane.security.pki import certificate_identity
from controlplane.security.tokens import JoinToken
from controlplane.v1 import host_service_pb2, host_service_pb2_grpc
from hostd.config import read_config
from hostd.main import main
from tests.support.pki import FLEET, TestPki


@dataclass
class Enrolment(host_service_pb2_grpc.EnrollmentServiceServicer):
    """Signs for the one secret it knows, once; `as_host` makes it lie."""

    pki: TestPki
    secret: str = "s3cret"
    as_host: str = ""
    address: str = ""
    used: list[str] = field(default_factory=list)

    async def JoinHost(  # noqa: N802
        self, request: host_service_pb2.JoinHostRequest, context: Any
    ) -> host_service_pb2.JoinHostResponse:
        if request.secret != self.secret or self.used:
            raise DroverError(Reason.JOIN_TOKEN_INVALID, "The token was used already.")
        self.used.append(request.address)
        certificate = self.pki.authority.sign_host_csr(
            request.csr_pem, fleet=self.pki.fleet, host=self.as_host or request.host_id
        )
        return host_service_pb2.JoinHostResponse(
            certificate_pem=certificate,
            ca_pem=self.pki.authority.certificate_pem,
            fleet=self.pki.fleet,
        )

    def token(self, pki: TestPki | None = None) -> str:
        trusted = pki or self.pki
        return JoinToken(
            v=1,
            server=self.address,
            server_name=Identity(FLEET, Role.CONTROLPLANE, "api").dns_name,
            fleet=FLEET,
            host="c",
            secret=self.secret,
            ca_pem=trusted.authority.certificate_pem.decode(),
        ).encode()


@pytest.fixture
async def enrolment(tmp_path: Path) -> AsyncIterator[Enrolment]:
    pki = TestPki(tmp_path / "pki")
    paths = pki.controlplane("api")
    server = grpc.aio.server(interceptors=(ErrorInterceptor(),))
    servicer = Enrolment(pki)
    host_service_pb2_grpc.add_EnrollmentServiceServicer_to_server(servicer, server)
    credentials = grpc.ssl_server_credentials([(paths.key.read_bytes(), paths.cert.read_bytes())])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    servicer.address = f"127.0.0.1:{port}"
    await server.start()
    yield servicer
    await server.stop(0)


async def run_join(tmp_path: Path, *arguments: str) -> Result:
    config = tmp_path / "etc" / "hostd.toml"
    return await asyncio.to_thread(
        CliRunner().invoke, main, ["--config", str(config), "join", *arguments]
    )


async def test_join_writes_identity_and_configuration(tmp_path: Path, enrolment: Enrolment) -> None:
    result = await run_join(
        tmp_path, enrolment.token(), "--root", f"images={tmp_path}/images", "--root", "fast=/srv/x"
    )
    assert result.exit_code == 0, result.output
    config = read_config(tmp_path / "etc" / "hostd.toml")
    assert config.identity == Identity(FLEET, Role.HOST, "c")
    assert config.storage.roots == {"images": tmp_path / "images", "fast": Path("/srv/x")}
    assert config.listen.advertise_control == "127.0.0.1:7442"
    assert enrolment.used == ["127.0.0.1:7442"]
    assert config.tls.key.stat().st_mode & 0o777 == 0o600
    certificate = x509.load_pem_x509_certificate(config.tls.cert.read_bytes())
    assert certificate_identity(certificate) == config.identity
    assert enrolment.secret not in "".join(
        path.read_text() for path in (tmp_path / "etc").rglob("*") if path.is_file()
    )


async def test_join_keeps_an_existing_configuration_and_its_addresses(
    tmp_path: Path, enrolment: Enrolment
) -> None:
    config = tmp_path / "etc" / "hostd.toml"
    config.parent.mkdir()
    text = (
        f'fleet="{FLEET}"\nhost="c"\n[listen]\ncontrol="127.0.0.1:9442"\n'
        f'[tls]\nca="{tmp_path}/x/ca"\ncert="{tmp_path}/x/cert"\nkey="{tmp_path}/x/key"\n'
        '[storage.roots]\nimages="/srv/i"\n'
    )
    config.write_text(text)
    result = await run_join(tmp_path, enrolment.token())
    assert result.exit_code == 0, result.output
    assert config.read_text() == text
    assert (tmp_path / "x" / "cert").is_file()
    assert enrolment.used == ["127.0.0.1:9442"]


async def test_an_identity_is_replaced_only_by_force(tmp_path: Path, enrolment: Enrolment) -> None:
    assert (await run_join(tmp_path, enrolment.token())).exit_code == 0
    cert = tmp_path / "etc" / "pki" / "host.pem"
    before = cert.read_bytes()
    enrolment.used.clear()
    refused = await run_join(tmp_path, enrolment.token())
    assert refused.exit_code == 1
    assert "--force" in refused.output
    assert enrolment.used == []
    assert cert.read_bytes() == before
    assert (await run_join(tmp_path, enrolment.token(), "--force")).exit_code == 0
    assert cert.read_bytes() != before


async def test_a_replayed_token_says_what_to_do(tmp_path: Path, enrolment: Enrolment) -> None:
    enrolment.used.append("somebody")
    result = await run_join(tmp_path, enrolment.token())
    assert result.exit_code == 1
    assert "drover host add" in result.output
    assert not (tmp_path / "etc").exists()


async def test_a_server_of_another_authority_is_not_told_the_secret(
    tmp_path: Path, enrolment: Enrolment
) -> None:
    stranger = TestPki(tmp_path / "other")
    result = await run_join(tmp_path, enrolment.token(stranger))
    assert result.exit_code == 1
    assert "did not answer the join" in result.output
    assert enrolment.used == []


async def test_a_certificate_for_another_host_is_refused(
    tmp_path: Path, enrolment: Enrolment
) -> None:
    enrolment.as_host = "b"
    result = await run_join(tmp_path, enrolment.token())
    assert result.exit_code == 1
    assert "not for drover://lab/host/c" in result.output
    assert not (tmp_path / "etc" / "pki").exists()


async def test_a_token_for_another_host_does_not_touch_the_configuration(
    tmp_path: Path, enrolment: Enrolment
) -> None:
    config = tmp_path / "etc" / "hostd.toml"
    config.parent.mkdir()
    config.write_text('fleet="lab"\nhost="b"\n[storage.roots]\nimages="/srv/i"\n')
    result = await run_join(tmp_path, enrolment.token())
    assert result.exit_code == 1
    assert "'b'" in result.output
    assert enrolment.used == []


@pytest.mark.parametrize("word", ["", "????", "e30", "bm90IGpzb24"])
async def test_damaged_tokens(tmp_path: Path, word: str) -> None:
    result = await run_join(tmp_path, "--", word)
    assert result.exit_code == 1
    assert "damaged" in result.output
