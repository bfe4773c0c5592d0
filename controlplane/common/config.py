"""Configuration files: TOML into typed, frozen structs.

Unknown keys and wrong types are refused with the file and the place in it. An
environment variable DROVER_SECTION__KEY overrides `[section] key`; its value is
read as TOML when it parses as such and as a string otherwise.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
ENV_PREFIX = "DROVER_"


class ConfigError(Exception):
    """The configuration cannot be used; the message names file and place."""


def load_config(path: Path, schema: type[T], environ: Mapping[str, str] | None = None) -> T:
    """Read a configuration file.

    Args:
        path: The TOML file.
        schema: A msgspec struct that forbids unknown fields.
        environ: Environment to take overrides from; the process's own if None.

    Raises:
        ConfigError: The file is missing, is not TOML or does not fit the schema.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Make it with the init or join command.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path}: it is nested too deeply.") from None
    _override(raw, os.environ if environ is None else environ)
    try:
        return msgspec.convert(raw, schema, strict=True, dec_hook=_decode_path)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from error


def _override(raw: dict[str, Any], environ: Mapping[str, str]) -> None:
    for variable, text in environ.items():
        section, separator, key = variable.removeprefix(ENV_PREFIX).partition("__")
        if not variable.startswith(ENV_PREFIX) or not separator:
            continue
        try:
            value: Any = tomllib.loads(f"value = {text}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            value = text
        target = raw.setdefault(section.lower(), {})
        if isinstance(target, dict):
            target[key.lower()] = value


def _decode_path(kind: type, value: Any) -> Any:
    if kind is Path:
        if isinstance(value, str):
            return Path(value)
        # msgspec turns this into a ValidationError that names the place.
        raise TypeError(f"expected a path, got {type(value).__name__}")
    raise NotImplementedError(f"no decoder for {kind}")
