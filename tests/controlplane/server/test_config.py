"""controlplane.toml: what is refused, and where it says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from controlplane.cli.root import cli as drover
from controlplane.common.config import ConfigError
from controlplane.common.identity import Identity, Role
from controlplane.server.config import Defaults
from controlplane.server.main import read_config
from controlplane.v1.migration_pb2 import MigrationOptions


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = CliRunner().invoke(drover, ["init", "--dir", str(tmp_path), "--fleet", "lab"])
    assert made.exit_code == 0, made.stderr
    return tmp_path / "controlplane.toml"


def add(path: Path, text: str) -> None:
    path.write_text(f"{path.read_text()}\n{text}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[saga]\nleese_seconds = 30", "leese_seconds"),
        ("[saga]\nlease_seconds = 1", "saga.lease_seconds"),
        ('[defaults]\nshutdown_mode = "axe"', "axe"),
        ('[defaults]\nconfirm_policy = "after"', "confirm_after_seconds"),
        ("[defaults]\nconfirm_after_seconds = 60.0", "confirm_after_seconds"),
        ("[inventory]\ninterval_seconds = 15.0", "dead_after_seconds"),
        ('[security.identities]\n"spiffe://x" = "king/eve"', "king"),
        ('[security.identities]\n"spiffe://x" = "host/a"', "cannot be given by a map"),
        ("[scheduler]\ncpu_allocation_ratio = 0.0", "cpu_allocation_ratio"),
    ],
)
def test_wrong_values_are_refused_with_their_place(path: Path, text: str, message: str) -> None:
    add(path, text)

    with pytest.raises(ConfigError, match=message) as caught:
        read_config(path)

    assert str(path) in str(caught.value)


def test_missing_key_file_is_named(path: Path) -> None:
    key = path.parent / "pki" / "server.key"
    key.unlink()

    with pytest.raises(ConfigError, match=r"\[tls\] key"):
        read_config(path)


def test_addresses_have_a_port(path: Path) -> None:
    path.write_text(path.read_text().replace('"0.0.0.0:7440"', '"0.0.0.0"'))

    with pytest.raises(ConfigError, match="api"):
        read_config(path)


def test_environment_wins(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROVER_LISTEN__API", "127.0.0.1:0")
    monkeypatch.setenv("DROVER_INVENTORY__INTERVAL_SECONDS", "0.5")

    config = read_config(path)

    assert config.listen.api == "127.0.0.1:0"
    assert config.inventory.interval_seconds == 0.5


def test_identities_of_an_outside_authority(path: Path) -> None:
    add(path, '[security.identities]\n"spiffe://x/eve" = "member/eve/web"')

    assert read_config(path).identities() == {
        "spiffe://x/eve": Identity("lab", Role.MEMBER, "eve", "web")
    }


def test_defaults_become_the_options_of_a_move() -> None:
    options = Defaults(
        shutdown_mode="graceful", confirm_policy="after", confirm_after_seconds=90.5
    ).options()

    assert options.shutdown_mode == MigrationOptions.SHUTDOWN_MODE_GRACEFUL
    assert options.shutdown_timeout.seconds == 60
    assert options.confirm_policy == MigrationOptions.CONFIRM_POLICY_AFTER
    assert options.confirm_after.ToMilliseconds() == 90_500


def test_whole_numbers_do_for_seconds(path: Path) -> None:
    add(path, "[saga]\nlease_seconds = 6\n\n[inventory]\ndead_after_seconds = 12")

    config = read_config(path)

    assert (config.saga.lease_seconds, config.inventory.dead_after_seconds) == (6.0, 12.0)
