"""`drover init` and `drover cert`: files, modes, and no overwriting."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography import x509

from controlplane.cli.root import cli
from controlplane.cli.session import CliConfig
from controlplane.common.config import load_config
from controlplane.common.identity import Identity, Role
from controlplane.security.pki import certificate_identity
from controlplane.server.config import ControlPlaneConfig, check


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    directory = tmp_path / "drover"
    result = run(
        *("init", "--dir", str(directory), "--fleet", "lab"),
        *("--advertise", "10.0.0.1:7440", "--advertise", "cp.example:7440"),
    )
    assert result.exit_code == 0, result.stderr
    return directory


def test_both_configurations_are_usable_as_written(fleet: Path) -> None:
    server = load_config(fleet / "controlplane.toml", ControlPlaneConfig, environ={})
    check(server)
    client = load_config(fleet / "cli.toml", CliConfig, environ={})

    assert server.fleet == "lab"
    assert server.listen.advertise == client.server == "10.0.0.1:7440"
    assert server.listen.advertise_enrol == "10.0.0.1:7441"
    assert server.database.url == f"sqlite:///{fleet / 'state' / 'controlplane.db'}"
    assert client.key == fleet / "pki" / "admin.key"


def test_keys_are_private_and_server_names_complete(fleet: Path) -> None:
    for key in (fleet / "pki").glob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    server = x509.load_pem_x509_certificate((fleet / "pki" / "server.pem").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value

    assert "cp.example" in names.get_values_for_type(x509.DNSName)
    assert "10.0.0.1" in [str(ip) for ip in names.get_values_for_type(x509.IPAddress)]
    admin = x509.load_pem_x509_certificate((fleet / "pki" / "admin.pem").read_bytes())
    assert certificate_identity(admin) == Identity("lab", Role.ADMIN, "admin")


def test_output_is_the_next_two_commands(tmp_path: Path) -> None:
    result = run("init", "--dir", str(tmp_path / "d"))

    assert len(result.stdout.splitlines()) == 2
    assert f"--config {tmp_path / 'd' / 'controlplane.toml'}" in result.stdout
    assert "drover host add NAME" in result.stdout


def test_nothing_is_overwritten(fleet: Path) -> None:
    before = {path: path.read_bytes() for path in fleet.rglob("*") if path.is_file()}

    result = run("init", "--dir", str(fleet))

    assert result.exit_code == 4
    assert {path: path.read_bytes() for path in fleet.rglob("*") if path.is_file()} == before


def test_one_leftover_file_is_enough_to_refuse(tmp_path: Path) -> None:
    (tmp_path / "pki").mkdir()
    (tmp_path / "pki" / "ca.key").write_text("precious")

    result = run("init", "--dir", str(tmp_path))

    assert result.exit_code == 4
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["ca.key"]


@pytest.mark.parametrize(
    "arguments",
    [("--fleet", "Not A Name"), ("--advertise", "nowhere"), ("--advertise", "host:99999")],
)
def test_wrong_values_write_nothing(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = run("init", "--dir", str(tmp_path / "d"), *arguments)

    assert result.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_ipv6_addresses_stay_in_brackets(tmp_path: Path) -> None:
    run("init", "--dir", str(tmp_path), "--advertise", "[fd00::1]:7440")

    config = load_config(tmp_path / "controlplane.toml", ControlPlaneConfig, environ={})
    assert config.listen.advertise_enrol == "[fd00::1]:7441"


def test_certificate_of_a_person(fleet: Path, tmp_path: Path) -> None:
    pki = str(fleet / "pki")
    result = run(
        *("cert", "issue", "eve", "--role", "member", "--project", "web"),
        *("--pki", pki, "--out", str(tmp_path), "--lifetime", "30d"),
    )

    assert result.exit_code == 0, result.stderr
    issued = x509.load_pem_x509_certificate((tmp_path / "eve.pem").read_bytes())
    assert certificate_identity(issued) == Identity("lab", Role.MEMBER, "eve", "web")
    assert stat.S_IMODE((tmp_path / "eve.key").stat().st_mode) == 0o600
    shown = run("cert", "show", str(tmp_path / "eve.pem"))
    assert "drover://lab/member/eve/web" in shown.stdout
    assert "29 days left" in shown.stdout

    again = run(*("cert", "issue", "eve", "--role", "viewer", "--pki", pki, "--out", str(tmp_path)))
    assert again.exit_code == 4
    renewed = run("cert", "renew", str(tmp_path / "eve.pem"), "--pki", pki)
    assert "364 days" in renewed.stdout


@pytest.mark.parametrize("lifetime", ["0s", "0", "0.9s"])
def test_a_certificate_that_would_be_dead_is_not_made(
    fleet: Path, tmp_path: Path, lifetime: str
) -> None:
    result = run(
        *("cert", "issue", "eve", "--role", "viewer", "--pki", str(fleet / "pki")),
        *("--out", str(tmp_path), "--lifetime", lifetime),
    )

    assert result.exit_code == 2
    assert "--lifetime" in result.stderr
    assert "at least 1 s" in result.stderr
    assert not (tmp_path / "eve.key").exists()


@pytest.mark.parametrize(
    "arguments", [("--role", "member"), ("--role", "viewer", "--project", "web")]
)
def test_project_goes_with_member_only(
    fleet: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    result = run(
        *("cert", "issue", "eve", "--pki", str(fleet / "pki"), "--out", str(tmp_path)), *arguments
    )

    assert result.exit_code == 2
    assert not (tmp_path / "eve.key").exists()
