"""What people write on the command line of the tool, and what it becomes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from diskmover.model import NbdExport

PORT = 7443
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_BINARY = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LARGEST_PORT = 65_535
_TOO_MUCH = 1 << 60  # bytes, or bytes a second


class Rate(click.ParamType[int]):
    """Bytes a second: 20M is 20,000,000, 20Mi is 20 MiB; as `drover` reads it."""

    name = "rate"
    _FORM = re.compile(r"(\d+)([KMG]?)(I?)B?(?:/S)?")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse "20M" and the like."""
        if isinstance(value, int):
            return value
        form = self._FORM.fullmatch(str(value).strip().upper())
        if form is None:
            self.fail(f"{value!r} is not a {self.name} such as 20M or 20Mi", param, ctx)
        units = _BINARY if form[3] else _DECIMAL
        rate = int(form[1]) * units[form[2]]
        if not 0 < rate < _TOO_MUCH:
            self.fail(f"{value!r} is not a {self.name} such as 20M or 20Mi", param, ctx)
        return rate


class Size(Rate):
    """Bytes: 20M is 20,000,000, 20Mi is 20 MiB."""

    name = "size"
    _FORM = re.compile(r"(\d+)([KMG]?)(I?)B?")


class Address(click.ParamType[str]):
    """HOST:PORT; an IPv6 address stands in brackets, and the port may be left out."""

    name = "address"
    _FORM = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[^][:/@\s]+)(?::(\d{1,5}))?")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Parse "two", "two:7443" and the like."""
        form = self._FORM.fullmatch(str(value))
        if form is None or int(form[2] or PORT) > _LARGEST_PORT:
            self.fail(f"{value!r} is not HOST or HOST:PORT", param, ctx)
        return f"{form[1]}:{form[2] or PORT}"


class Device(click.ParamType[tuple[str, Path]]):
    """A name for senders, and the block device behind it."""

    name = "device"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Path]:
        """Parse "NAME=PATH"; links such as /dev/VG/LV are followed."""
        if isinstance(value, tuple):
            return value
        name, given, path = str(value).partition("=")
        if not name or not given or not Path(path).is_block_device():
            self.fail(f"{value!r} is not NAME=PATH of a block device", param, ctx)
        return name, Path(path).resolve()


class Export(click.ParamType[NbdExport]):
    """An NBD export: unix:PATH or tcp:HOST:PORT, and :NAME where it has one."""

    name = "export"
    _FORM = re.compile(r"(unix:[^:]+|tcp:(?:\[[^]]+\]|[^:]+):\d+)(?::(.*))?", re.DOTALL)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> NbdExport:
        """Parse "unix:/run/web1.sock:vda" and the like."""
        if isinstance(value, NbdExport):
            return value
        form = self._FORM.fullmatch(str(value))
        if form is None:
            self.fail(f"{value!r} is neither unix:PATH[:NAME] nor tcp:HOST:PORT[:NAME]", param, ctx)
        return NbdExport(form[1], form[2] or "")
