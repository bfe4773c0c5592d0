"""`drover init`: everything a new control plane needs, in one go."""

from __future__ import annotations

import json
import os
import shlex
import socket
from dataclasses import dataclass
from pathlib import Path

import click

from controlplane.cli import errors
from controlplane.cli.errors import CliError
from controlplane.common.identity import NAME_PATTERN, Identity, Role
from controlplane.security.files import PUBLIC_MODE, write_file
from controlplane.security.pki import CertificateAuthority, api_server_identity

DEFAULT_DIRECTORY = Path("/etc/drover")
DEFAULT_STATE_DIRECTORY = Path("/var/lib/drover")
API_PORT = 7440
ENROL_PORT = 7441


@dataclass(frozen=True)
class Layout:
    """Where `init` puts things.

    Attributes:
        directory: Configuration.
        state: The database.
    """

    directory: Path
    state: Path

    @property
    def pki(self) -> Path:
        """Certificates and keys."""
        return self.directory / "pki"

    @property
    def server_config(self) -> Path:
        """Configuration of the control plane."""
        return self.directory / "controlplane.toml"

    @property
    def cli_config(self) -> Path:
        """Configuration of the `drover` command."""
        return self.directory / "cli.toml"

    def all_files(self) -> list[Path]:
        """Every file that `init` writes."""
        names = ("ca", "server", "client", "admin")
        keys = [self.pki / f"{name}.{kind}" for name in names for kind in ("pem", "key")]
        return [*keys, self.server_config, self.cli_config]


@click.command("init")
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_DIRECTORY,
    show_default=True,
    help="Where configuration and certificates go.",
)
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the database goes.  [default: /var/lib/drover, or DIR/state with another --dir]",
)
@click.option("--fleet", default="main", show_default=True, help="Name of the fleet, a-z and 0-9.")
@click.option(
    "--advertise",
    multiple=True,
    metavar="HOST:PORT",
    help="Address at which users reach the API; the first one is the main one. "
    "[default: this machine's name, port 7440]",
)
@click.option(
    "--advertise-enrol",
    metavar="HOST:PORT",
    help="Address at which new hosts join.  [default: the main address, next port]",
)
@click.option("--listen", metavar="HOST:PORT", help="[default: all addresses, same port]")
@click.option("--listen-enrol", metavar="HOST:PORT", help="[default: all addresses, same port]")
def init(
    directory: Path,
    state_dir: Path | None,
    fleet: str,
    advertise: tuple[str, ...],
    advertise_enrol: str | None,
    listen: str | None,
    listen_enrol: str | None,
) -> None:
    """Make a new fleet: CA, certificates and configuration.

    Never overwrites anything.
    """
    if not NAME_PATTERN.fullmatch(fleet):
        raise click.BadParameter("1 to 63 of a-z, 0-9, '-' and '.'", param_hint="--fleet")
    directory = directory.absolute()
    state = state_dir.absolute() if state_dir else _default_state(directory)
    layout = Layout(directory, state)
    addresses = [split_address(text) for text in advertise or (f"{socket.getfqdn()}:{API_PORT}",)]
    enrol = split_address(advertise_enrol) if advertise_enrol else _next_port(addresses[0])
    listens = (
        split_address(listen) if listen else ("0.0.0.0", addresses[0][1]),  # noqa: S104
        split_address(listen_enrol) if listen_enrol else ("0.0.0.0", enrol[1]),  # noqa: S104
    )
    _refuse_existing(layout)
    try:
        layout.pki.mkdir(parents=True, exist_ok=True)
        layout.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write_pki(layout, fleet, [host for host, _ in (*addresses, enrol)])
        _write_configs(layout, fleet, addresses[0], enrol, listens)
    except OSError as error:
        raise CliError(f"{error.filename}: {error.strerror}.", exit_code=errors.FAILED) from error
    _say_next(layout, fleet)


def _default_state(directory: Path) -> Path:
    return DEFAULT_STATE_DIRECTORY if directory == DEFAULT_DIRECTORY else directory / "state"


def split_address(text: str) -> tuple[str, int]:
    """Split HOST:PORT; IPv6 addresses stand in brackets.

    Raises:
        click.BadParameter: It is not of that form.
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise click.BadParameter(f"{text!r} is not of the form HOST:PORT")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _next_port(address: tuple[str, int]) -> tuple[str, int]:
    return address[0], address[1] + 1


def _refuse_existing(layout: Layout) -> None:
    existing = [str(path) for path in layout.all_files() if path.exists()]
    if existing:
        raise CliError(
            f"{layout.directory} holds a fleet already; nothing was changed.",
            exit_code=errors.REFUSED,
            details=existing,
            advice="Choose another --dir. To start anew, remove these files by hand: without "
            "ca.key the hosts\nthat have joined would have to join again.",
        )


def _write_pki(layout: Layout, fleet: str, hosts: list[str]) -> None:
    authority = CertificateAuthority.create(fleet)
    authority.write(layout.pki / "ca.pem", layout.pki / "ca.key")
    server_names = [*hosts, "localhost", "127.0.0.1", "::1"]
    for stem, identity, names in (
        ("server", api_server_identity(fleet), server_names),
        ("client", Identity(fleet, Role.CONTROLPLANE, "conductor"), []),
        ("admin", Identity(fleet, Role.ADMIN, "admin"), []),
    ):
        pair = authority.issue(identity, names=names)
        pair.write(layout.pki / f"{stem}.pem", layout.pki / f"{stem}.key")


def _write_configs(
    layout: Layout,
    fleet: str,
    advertise: tuple[str, int],
    enrol: tuple[str, int],
    listens: tuple[tuple[str, int], tuple[str, int]],
) -> None:
    pki = layout.pki
    server = {
        "": {"fleet": fleet},
        "listen": {
            "api": join_address(*listens[0]),
            "enrol": join_address(*listens[1]),
            "advertise": join_address(*advertise),
            "advertise_enrol": join_address(*enrol),
        },
        "database": {"url": f"sqlite:///{layout.state / 'controlplane.db'}"},
        "tls": {
            "ca": str(pki / "ca.pem"),
            "ca_key": str(pki / "ca.key"),
            "cert": str(pki / "server.pem"),
            "key": str(pki / "server.key"),
            "client_cert": str(pki / "client.pem"),
            "client_key": str(pki / "client.key"),
        },
    }
    client = {
        "": {
            "server": join_address(*advertise),
            "server_name": api_server_identity(fleet).dns_name,
            "ca": str(pki / "ca.pem"),
            "cert": str(pki / "admin.pem"),
            "key": str(pki / "admin.key"),
        }
    }
    for path, about, content in (
        (layout.server_config, "The control plane of the fleet.", server),
        (layout.cli_config, "The `drover` command; a copy goes where users are.", client),
    ):
        text = f"# {about}\n{_toml(content)}"
        write_file(path, text.encode(), mode=PUBLIC_MODE)


def _toml(sections: dict[str, dict[str, str]]) -> str:
    # A JSON string is a TOML basic string as well.
    blocks = [
        "".join([f"[{section}]\n"] * bool(section))
        + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        for section, values in sections.items()
    ]
    return "\n".join(blocks)


def _say_next(layout: Layout, fleet: str) -> None:
    click.echo(
        f"Fleet {fleet} is ready in {layout.directory}. Keep {layout.pki / 'ca.key'} safe: whoever "
        "has it can be anybody.",
        err=True,
    )
    click.echo("Next:", err=True)
    standard = layout.directory == DEFAULT_DIRECTORY
    prefix = "" if standard else f"DROVER_CONFIG={_quoted(layout.cli_config)} "
    start = (
        "systemctl enable --now drover-controlplane"
        if standard and os.path.isdir("/run/systemd/system")
        else f"drover-controlplane --config {_quoted(layout.server_config)}"
    )
    click.echo(f"  {start}")
    click.echo(f"  {prefix}drover host add NAME")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
