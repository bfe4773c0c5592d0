"""`drover cert`: certificates for people, and their renewal.

Works on the authority's files, on the machine that has them, and calls no server.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import click
from cryptography import x509

from controlplane.cli import errors
from controlplane.cli.errors import CliError
from controlplane.cli.init import DEFAULT_DIRECTORY
from controlplane.cli.units import DurationType
from controlplane.common.identity import Identity, Role
from controlplane.security.files import PUBLIC_MODE, write_file
from controlplane.security.pki import (
    SHORTEST_LIFETIME,
    CertificateAuthority,
    certificate_identity,
    remaining_lifetime,
)

_PEOPLE = [role.value for role in (Role.VIEWER, Role.MEMBER, Role.OPERATOR, Role.ADMIN)]
_PKI = click.option(
    "--pki",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_DIRECTORY / "pki",
    show_default=True,
    help="Directory that holds ca.pem and ca.key.",
)


def _check_lifetime(
    context: click.Context, parameter: click.Parameter, seconds: float | None
) -> float | None:
    if seconds is not None and timedelta(seconds=seconds) < SHORTEST_LIFETIME:
        raise click.BadParameter("a certificate has to be valid for at least 1 s, e.g. 30d")
    return seconds


@click.group("cert")
def cert() -> None:
    """Certificates of people: issue, show, renew (needs the CA key)."""


@cert.command("issue")
@click.argument("name")
@click.option("--role", type=click.Choice(_PEOPLE), required=True, help="What the holder may do.")
@click.option("--project", default="", help="Project of a member.")
@click.option(
    "--lifetime", type=DurationType(), callback=_check_lifetime, help="E.g. 30d.  [default: 365d]"
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    default=Path(),
    help="Where NAME.pem and NAME.key go.  [default: here]",
)
@_PKI
def issue(name: str, role: str, project: str, lifetime: float | None, out: Path, pki: Path) -> None:
    """Make a key and a certificate for a person.

    \b
    viewer    looks
    member    resizes, confirms, reverts, locks machines of one project
    operator  moves any machine, adopts, releases, cancels
    admin     everything: hosts, flavors, a target of choice, the audit log
    """  # noqa: D301 click reads the backspace characters
    authority = _load_authority(pki)
    fleet = _fleet_of(pki)
    try:
        identity = Identity.parse(Identity(fleet, Role(role), name, project).uri)
    except ValueError as error:
        raise click.UsageError(f"{error}.") from error
    pair = authority.issue(
        identity, lifetime=timedelta(seconds=lifetime) if lifetime is not None else None
    )
    certificate, key = out / f"{name}.pem", out / f"{name}.key"
    try:
        pair.write(certificate, key)
    except FileExistsError as error:
        raise CliError(
            f"{error.filename} exists; nothing was overwritten.", exit_code=errors.REFUSED
        ) from error
    click.echo(f"{certificate} and {key} let {name} in as {identity}.")


@cert.command("show")
@click.argument("certificate", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def show(certificate: Path) -> None:
    """Say whom a certificate stands for and how long it is valid."""
    try:
        loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
        identity = certificate_identity(loaded)
        days = remaining_lifetime(certificate).days
    except ValueError as error:
        raise CliError(f"{certificate}: {error}.", exit_code=errors.USAGE) from error
    click.echo(f"Identity     {identity}")
    left = f"{days} days left" if days >= 0 else "EXPIRED"
    click.echo(f"Valid until  {loaded.not_valid_after_utc:%Y-%m-%d %H:%M} UTC ({left})")


@cert.command("renew")
@click.argument("certificate", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_PKI
def renew(certificate: Path, pki: Path) -> None:
    """Prolong a certificate of this fleet; its key stays the same.

    The control plane takes a renewed server certificate at the next connection;
    its client certificate at the next start.
    """
    authority = _load_authority(pki)
    try:
        renewed = authority.renew(certificate.read_bytes())
    except ValueError as error:
        raise CliError(f"{certificate}: {error}.", exit_code=errors.REFUSED) from error
    write_file(certificate, renewed, mode=PUBLIC_MODE, replace=True)
    click.echo(f"{certificate} is valid for {remaining_lifetime(certificate).days} days more.")


def _load_authority(pki: Path) -> CertificateAuthority:
    try:
        return CertificateAuthority.load(pki / "ca.pem", pki / "ca.key")
    except OSError as error:
        raise CliError(
            f"{error.filename}: {error.strerror}.",
            exit_code=errors.USAGE,
            advice="This command works where `drover init` was run; name the directory with --pki.",
        ) from error
    except ValueError as error:
        raise CliError(f"{error}.", exit_code=errors.USAGE) from error


def _fleet_of(pki: Path) -> str:
    try:
        server = x509.load_pem_x509_certificate((pki / "server.pem").read_bytes())
        return certificate_identity(server).fleet
    except (OSError, ValueError) as error:
        raise CliError(
            f"{pki / 'server.pem'} does not say which fleet this is: {error}.",
            exit_code=errors.USAGE,
        ) from error
