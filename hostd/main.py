"""`drover-hostd`: run the daemon, join a fleet, check the configuration.

It exits as drover-controlplane does: USAGE when the command line or the configuration
is wrong, CANNOT_START when something else keeps it from its work.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import click
import structlog

from controlplane.common.config import ConfigError
from controlplane.common.logs import configure_logging
from hostd.config import DEFAULT_CONFIG, HostdConfig, read_config
from hostd.join import JoinError, JoinOptions
from hostd.join import join as join_fleet
from hostd.state import StateError

log = structlog.stdlib.get_logger(__name__)
USAGE = 2
CANNOT_START = 1


class WrongConfig(click.ClickException):
    """The configuration cannot be used; trying again does not help."""

    exit_code = USAGE


def read(path: Path) -> HostdConfig:
    """Read and check the configuration file.

    Raises:
        WrongConfig: It cannot be used.
    """
    try:
        return read_config(path)
    except ConfigError as error:
        raise WrongConfig(str(error)) from error


class _RootOption(click.ParamType[tuple[str, Path]]):
    name = "NAME=PATH"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Path]:
        name, separator, directory = str(value).partition("=")
        if not separator or not name or not directory.startswith("/"):
            self.fail(f"{value!r} is not NAME=/ABSOLUTE/PATH", param, ctx)
        return name, Path(directory)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    default=DEFAULT_CONFIG,
    show_default=True,
    help="Configuration file.",
)
@click.version_option(package_name="drover")
@click.pass_context
def main(ctx: click.Context, config: Path) -> None:
    """Drover's daemon on a hypervisor. Without a command it runs.

    Exits with 2 for a wrong command line or configuration, 1 when it cannot start.
    """
    ctx.obj = config
    if ctx.invoked_subcommand is None:
        ctx.invoke(run)


@main.command()
@click.pass_obj
def run(config: Path) -> None:
    """Serve until SIGTERM."""
    # Imported here so that `join` works before libvirt is installed.
    from hostd.server import serve

    loaded = read(config)
    configure_logging(loaded.log.level)
    try:
        asyncio.run(serve(loaded))
    except (ConfigError, StateError) as error:
        raise click.ClickException(str(error)) from error
    sys.exit(0)


@main.command("check-config")
@click.pass_obj
def check_config(config: Path) -> None:
    """Say whether the configuration can be used."""
    loaded = read(config)
    for name, path in (("ca", loaded.tls.ca), ("cert", loaded.tls.cert), ("key", loaded.tls.key)):
        if not path.is_file():
            raise WrongConfig(
                f"{config}: tls.{name}: {path} is missing. Run `drover-hostd join TOKEN`."
            )
    for name, directory in loaded.storage.roots.items():
        if not directory.is_dir():
            raise WrongConfig(
                f"{config}: storage.roots.{name}: {directory} is not a directory. Make it."
            )
    click.echo(f"{config}: ok, host {loaded.host} of fleet {loaded.fleet}")


@main.command()
@click.argument("token")
@click.option("--address", default="", help="HOST:PORT at which the control plane reaches us.")
@click.option("--data-address", default="", help="HOST:PORT of the data port for other hosts.")
@click.option(
    "--root",
    "roots",
    type=_RootOption(),
    multiple=True,
    help="Storage root for a new configuration file; repeatable.",
)
@click.option("--force", is_flag=True, help="Replace the identity this host has already.")
@click.pass_obj
def join(
    config: Path,
    token: str,
    address: str,
    data_address: str,
    roots: tuple[tuple[str, Path], ...],
    force: bool,
) -> None:
    """Join a fleet with the TOKEN that `drover host add` printed."""
    options = JoinOptions(config, address, data_address, roots, force)
    try:
        written = join_fleet(token, options)
    except ConfigError as error:
        raise WrongConfig(str(error)) from error
    except (JoinError, OSError) as error:
        raise click.ClickException(str(error)) from error
    for path in written:
        click.echo(f"wrote {path}")
    click.echo("joined; start the daemon with: systemctl enable --now drover-hostd")


if __name__ == "__main__":
    main()
