"""`drover-controlplane`: run the control plane, check its configuration."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import click
import structlog
from sqlalchemy.exc import SQLAlchemyError

from controlplane.common.config import ConfigError, load_config
from controlplane.common.logs import configure_logging
from controlplane.server.app import App, serve
from controlplane.server.config import ControlPlaneConfig, check
from controlplane.server.ports import PortError
from controlplane.store.engine import DatabaseInUse
from controlplane.store.upgrade import DatabaseTooNew

log = structlog.stdlib.get_logger(__name__)
DEFAULT_CONFIG = Path("/etc/drover/controlplane.toml")
USAGE = 2
CANNOT_START = 1


def read_config(path: Path) -> ControlPlaneConfig:
    """Read and check a configuration file.

    Raises:
        ConfigError: It cannot be used.
    """
    config = load_config(path, ControlPlaneConfig)
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    default=DEFAULT_CONFIG,
    show_default=True,
    help="Configuration file; `drover init` writes one.",
)
@click.pass_context
def cli(context: click.Context, /, config: Path) -> None:
    """Drover's control plane. Without a command it runs.

    Exits with 2 for a wrong command line or configuration, 1 when it cannot start.
    """
    context.obj = config
    if context.invoked_subcommand is None:
        context.invoke(run)


@cli.command("run")
@click.pass_obj
def run(path: Path) -> None:
    """Serve until SIGTERM."""
    config = read_config(path)
    configure_logging(config.log.level)
    asyncio.run(serve(App(config)))


@cli.command("check-config")
@click.pass_obj
def check_config(path: Path) -> None:
    """Say whether the configuration can be used."""
    config = read_config(path)
    click.echo(f"{path}: ok, fleet {config.fleet}, API on {config.listen.api}")


def main() -> None:
    """Run the command; exit with USAGE for a wrong configuration, else CANNOT_START."""
    try:
        cli.main(prog_name="drover-controlplane", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except ConfigError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(USAGE)
    except (PortError, DatabaseInUse, DatabaseTooNew, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(CANNOT_START)
    except SQLAlchemyError as error:
        # The exception's text can hold statements and values; its cause says enough.
        cause = getattr(error, "orig", None) or type(error).__name__
        click.echo(f"error: the database cannot be used: {cause}", err=True)
        sys.exit(CANNOT_START)
