"""hostd.toml: what is refused, and that the message names the place."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from controlplane.common.config import ConfigError
from hostd.config import read_config
from hostd.incoming import incoming
from hostd.main import main
from hostd.records import CreatedFile
from hostd.v1 import domain_pb2

MINIMAL = """
fleet = "lab"
host = "a"
[storage.roots]
images = "/srv/images"
"""


def with_seed(seed: str) -> str:
    return MINIMAL.replace("[storage.roots]", f'[storage]\nseeds = ["{seed}"]\n[storage.roots]')


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hostd.toml"
    path.write_text(text)
    return path


def test_minimal_file_gets_safe_defaults(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, MINIMAL))
    assert config.identity.uri == "drover://lab/host/a"
    assert config.storage.roots == {"images": Path("/srv/images")}
    assert config.storage.allowed_formats == ("qcow2", "raw")
    assert config.listen.control == "0.0.0.0:7442"
    assert config.listen.data_address == "0.0.0.0:7443"
    assert config.limits.max_copies == 2
    assert config.limits.io_priority == "normal"
    assert config.limits.volume_memory_mib == 512


@pytest.mark.parametrize("said", ["", "readback = false\n", "readback = true\n"])
def test_disks_are_read_back_where_the_operator_says_so(tmp_path: Path, said: str) -> None:
    text = MINIMAL.replace("[storage.roots]", f"[storage]\n{said}[storage.roots]")
    storage = read_config(write(tmp_path, text)).storage
    file, volume = CreatedFile("vda", tmp_path, "disk"), domain_pb2.Volume(size_bytes=1)
    coming = incoming(file, volume, (), readback=storage.readback)
    assert coming.readback == ("true" in said)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('fleet = "lab"\nhost = "a"\n', "storage"),
        (MINIMAL + "typo = 1\n", "expected a path, got int - at `$.storage.roots"),
        ("surprise = 1\n" + MINIMAL, "surprise"),
        (MINIMAL.replace('"a"', '"A B"'), "host: 'A B'"),
        (MINIMAL.replace('"/srv/images"', '"images"'), "storage.roots.images"),
        (MINIMAL.replace('"/srv/images"', '"/srv/../etc"'), "storage.roots.images"),
        (MINIMAL + '[listen]\ncontrol = "7442"\n', "listen.control"),
        (MINIMAL + '[listen]\ndata = "::1:7443"\n', "listen.data"),
        (MINIMAL + "[limits]\nmax_copies = 0\n", "max_copies"),
        (MINIMAL + '[limits]\nmax_copies = "2"\n', "$.limits.max_copies"),
        (MINIMAL + '[limits]\nio_priority = "urgent"\n', "$.limits.io_priority"),
        (MINIMAL + "[limits]\nvolume_memory_mib = 0\n", "limits.volume_memory_mib"),
        (with_seed("fast/x"), "storage.seeds: 'fast/x'"),
        (with_seed("images"), "storage.seeds: 'images/'"),
        (with_seed("images/../x"), "storage.seeds: 'images/../x'"),
        (MINIMAL + '[log]\nlevel = "loud"\n', "log.level"),
        (
            MINIMAL.replace(
                "[storage.roots]", '[storage]\nallowed_formats = ["vmdk"]\n[storage.roots]'
            ),
            "allowed_formats",
        ),
        ("not toml", "hostd.toml"),
    ],
)
def test_refusals_name_the_place(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_config(write(tmp_path, text))
    assert says in str(refused.value)
    assert "hostd.toml" in str(refused.value)


def test_check_config_says_what_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + f'[tls]\nca = "{tmp_path}/ca.pem"\n')
    result = CliRunner().invoke(main, ["--config", str(path), "check-config"])
    assert result.exit_code == 2
    assert "drover-hostd join" in result.output


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--config", str(tmp_path / "none.toml")])
    assert result.exit_code == 2
    assert "no such file" in result.output
    assert "Traceback" not in result.output
