"""Where the command finds its configuration, and what wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlplane.cli import errors
from controlplane.cli.errors import CliError
from controlplane.cli.session import CliConfig, read_config

COMPLETE = (
    'server = "cp:7440"\nserver_name = "api.x"\nca = "ca.pem"\ncert = "c.pem"\nkey = "c.key"\n'
)


def write(path: Path, text: str = COMPLETE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_files_are_looked_for_beside_the_configuration(tmp_path: Path) -> None:
    config = read_config(write(tmp_path / "cli.toml"), CliConfig(), {})

    assert config.key == tmp_path / "c.key"


def test_home_comes_before_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "controlplane.cli.session.SYSTEM_CONFIG", write(tmp_path / "etc" / "cli.toml")
    )
    home = {"HOME": str(tmp_path / "home")}
    assert read_config(None, CliConfig(), home).server == "cp:7440"

    write(
        tmp_path / "home" / ".config" / "drover" / "config.toml",
        COMPLETE.replace("cp:7440", "mine:7440"),
    )
    assert read_config(None, CliConfig(), home).server == "mine:7440"


def test_options_win_and_need_no_file(tmp_path: Path) -> None:
    given = CliConfig(server="x:1", ca=Path("/ca"), cert=Path("/c"), key=Path("/k"))

    config = read_config(None, given, {"HOME": str(tmp_path)})

    assert config == given


@pytest.mark.parametrize(("server", "name"), [("", "api.x"), ("cp:7440", "api.x"), ("other:1", "")])
def test_name_to_expect_belongs_to_the_server_of_the_file(
    tmp_path: Path, server: str, name: str
) -> None:
    config = read_config(write(tmp_path / "cli.toml"), CliConfig(server=server), {})

    assert config.server_name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('srever = "x"', "srever"),
        ("server = 5", "server"),
        ("server =", "cli.toml"),
        (COMPLETE.replace("cp:7440", "cp"), "HOST:PORT"),
    ],
)
def test_wrong_files_are_wrong_usage(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CliError, match=message) as caught:
        read_config(write(tmp_path / "cli.toml", text), CliConfig(), {})

    assert caught.value.exit_code == errors.USAGE


def test_unreadable_key_is_named(tmp_path: Path) -> None:
    from controlplane.cli.session import open_channel

    config = read_config(write(tmp_path / "cli.toml"), CliConfig(), {})

    with pytest.raises(CliError, match=r"ca\.pem: No such file") as caught:
        open_channel(config)
    assert caught.value.exit_code == errors.USAGE
