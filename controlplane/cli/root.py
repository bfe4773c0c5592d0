"""The `drover` command and what it is made of."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from controlplane.cli import errors
from controlplane.cli.audit import audit
from controlplane.cli.cert import cert
from controlplane.cli.flavor import flavor
from controlplane.cli.host import host
from controlplane.cli.init import init
from controlplane.cli.instance import instance
from controlplane.cli.migrate import migrate
from controlplane.cli.migration import migration
from controlplane.cli.session import CliConfig, Session, read_config

_FILE = click.Path(dir_okay=False, path_type=Path)


def session_of(context: click.Context) -> Session:
    """The session that the options of the root command describe."""
    given: dict[str, Any] = context.params
    overrides = CliConfig(
        **{name: given[name] for name in CliConfig.__struct_fields__ if given.get(name)}
    )
    return Session(lambda: read_config(given.get("config"), overrides, os.environ))


def installed_version() -> str:
    """Version of the installed package; "(source tree)" when it is not installed."""
    try:
        return metadata.version("drover")
    except metadata.PackageNotFoundError:
        return "(source tree)"


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]}, epilog=errors.EXIT_CODES_HELP
)
@click.option(
    "--config",
    type=_FILE,
    envvar="DROVER_CONFIG",
    help="Configuration file; otherwise ~/.config/drover/config.toml, then /etc/drover/cli.toml.",
)
@click.option("--server", envvar="DROVER_SERVER", help="Control plane, HOST:PORT.")
@click.option("--ca", type=_FILE, envvar="DROVER_CA", help="CA certificate of the fleet.")
@click.option("--cert", type=_FILE, envvar="DROVER_CERT", help="Your certificate.")
@click.option("--key", type=_FILE, envvar="DROVER_KEY", help="Your private key.")
@click.option(
    "--server-name",
    envvar="DROVER_SERVER_NAME",
    help="DNS name in the server's certificate, where it is not the address.",
)
@click.version_option(installed_version(), message="drover %(version)s")
@click.pass_context
def cli(context: click.Context, /, **_options: Any) -> None:
    """Move virtual machines between plain libvirt/KVM hosts.

    \b
    drover host list                where machines can go
    drover instance list            the machines
    drover migrate web1 --dry-run   would it move, and where to
    drover migrate web1             move it; the old copy is kept
    drover migration confirm web1   delete the old copy
    drover migration revert web1    or go back to it

    Every option can be given as an environment variable as well: DROVER_CONFIG,
    DROVER_SERVER, DROVER_CA, DROVER_CERT, DROVER_KEY, DROVER_SERVER_NAME.
    """  # noqa: D301 click reads the backspace characters
    context.obj = session_of(context)
    context.call_on_close(context.obj.close)


@cli.command("version")
def version() -> None:
    """Print the version."""
    click.echo(f"drover {installed_version()}")


@cli.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash: drover completion bash > /etc/bash_completion.d/drover
    zsh:  drover completion zsh > "${fpath[1]}/_drover"
    fish: drover completion fish > ~/.config/fish/completions/drover.fish
    """  # noqa: D301 click reads the backspace characters
    generator = get_completion_class(shell)
    if generator is None:
        raise AssertionError(f"click completes {shell}")
    click.echo(generator(cli, {}, "drover", "_DROVER_COMPLETE").source())


for _command in (init, cert, host, instance, flavor, migrate, migration, audit):
    cli.add_command(_command)


def run() -> int:
    """Run the command.

    Returns:
        Its exit code, one of `controlplane.cli.errors`.
    """
    try:
        code = cli.main(prog_name="drover", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return errors.INTERRUPTED
    except OSError as error:
        # Files that the user named are reported where they are read; this is the output.
        errors.CliError(f"The output cannot be written: {error.strerror}.").show()
        return errors.FAILED
    return code if isinstance(code, int) else errors.OK
