"""Configuration and tokens as people mistype them and others make them up."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from controlplane.common.config import ConfigError, load_config
from controlplane.security.tokens import JoinToken
from controlplane.server.config import ControlPlaneConfig, check
from hostd.config import read_config as read_hostd_config
from hostd.join import JoinError
from hostd.join import decode_token as decode_on_host

READERS: list[Callable[[Path], object]] = [
    lambda path: check(load_config(path, ControlPlaneConfig)),
    read_hostd_config,
]
in_a_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
values = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.datetimes(),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=5,
)
KEYS = ["fleet", "host", "listen", "tls", "storage", "libvirt", "limits", "state", "log",
        "database", "scheduler", "defaults", "security"]  # fmt: skip


def to_toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {to_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    if isinstance(value, str | bool):
        return json.dumps(value)
    if isinstance(value, float):
        return repr(value)
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def refused(path: Path) -> None:
    """Neither daemon takes it, and each says so in its own way."""
    for read in READERS:
        with pytest.raises(ConfigError, match=path.name):
            read(path)


@given(st.binary(max_size=100) | st.text(max_size=100).map(lambda text: text.encode()))
@example(b"a = " + b"[" * 10_000)
@example(b"a" + b".a" * 5_000 + b" = 1")
@example(b"fleet = '\xff'")
@example(b"fleet = 'lab\\n'")
@in_a_folder
def test_any_bytes_are_no_configuration(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("c") / "daemon.toml"
    path.write_bytes(data)
    refused(path)


@given(st.dictionaries(st.sampled_from(KEYS), values, min_size=1))
@in_a_folder
def test_known_keys_with_other_values_are_no_configuration(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, object]
) -> None:
    path = tmp_path_factory.mktemp("c") / "daemon.toml"
    lines = (f"{key} = {to_toml(value)}" for key, value in content.items())
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    refused(path)


def word(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


TOKEN = {"v": 1, "server": "10.0.0.1:7441", "server_name": "cp", "fleet": "lab", "host": "c",
         "secret": "s", "ca_pem": "p"}  # fmt: skip


@given(
    st.text(max_size=60)
    | st.binary(max_size=60).map(word)
    | st.dictionaries(st.sampled_from(sorted(TOKEN)), values).map(
        lambda changed: word(json.dumps({**TOKEN, **changed}, default=str).encode())
    )
)
@example(word(b'{"v": ' + b"[" * 100_000))
@example(word(b'{"nobody": ' + b"[" * 100_000))
@example(word(json.dumps({**TOKEN, "v": 2}).encode()))
def test_any_word_is_a_join_token_or_refused(text: str) -> None:
    try:
        token = JoinToken.decode(text)
    except ValueError:
        with pytest.raises(JoinError):
            decode_on_host(text)
    else:
        assert decode_on_host(text).host == token.host
