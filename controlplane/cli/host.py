"""`drover host`: the hypervisors of the fleet."""

from __future__ import annotations

import sys

import click

from controlplane.cli import complete, errors
from controlplane.cli.errors import CliError
from controlplane.cli.names import host_name, short
from controlplane.cli.output import (
    Format,
    enum_word,
    output_option,
    print_data,
    print_list,
    print_one,
    to_plain,
    visible,
)
from controlplane.cli.session import Session, new_request_id, pass_session
from controlplane.cli.units import format_age, format_bytes, format_time
from controlplane.v1 import host_service_pb2 as service
from controlplane.v1.host_pb2 import Host

_MIB = 1 << 20


@click.group("host")
def host() -> None:
    """Hypervisors: list, add, enable, disable, declare gone."""


@host.command("list")
@output_option
@pass_session
def list_hosts(session: Session, output: Format) -> None:
    """List the hosts of the fleet."""
    hosts: list[Host] = []
    token = ""
    while True:
        page = session.call(
            session.hosts.ListHosts, service.ListHostsRequest(page_size=1000, page_token=token)
        )
        hosts += page.hosts
        token = page.next_page_token
        if not token:
            break
    header = ("NAME", "STATE", "ALIVE", "VCPUS", "MEMORY", "FREE DISK", "INSTANCES", "MOVES")
    empty = "No hosts yet. Add one with `drover host add NAME`."
    print_list(hosts, output, (*header, "LAST SEEN"), _row, empty=empty)


def _row(host: Host) -> tuple[str, ...]:
    usable_mib = max(0, host.facts.memory_mib - host.facts.reserved_memory_mib)
    known = host.HasField("facts")
    used = format_bytes(host.usage.memory_mib * _MIB)
    return (
        short(host.name),
        _state(host),
        "yes" if host.alive else "no",
        f"{host.usage.vcpus}/{host.facts.cpus}" if known else "-",
        f"{used} of {format_bytes(usable_mib * _MIB)}" if known else "-",
        _free_disk(host),
        str(host.usage.instances),
        str(host.usage.moves),
        format_age(host.last_seen_time),
    )


def _state(host: Host) -> str:
    return enum_word(Host.State.Name(host.state), "STATE_")


def _free_disk(host: Host) -> str:
    # Roots on one file system share its space: count each device once.
    free = {root.device_id: root.available_bytes for root in host.facts.roots}
    return format_bytes(sum(free.values())) if free else "-"


@host.command("show")
@click.argument("name", shell_complete=complete.hosts)
@output_option
@pass_session
def show_host(session: Session, name: str, output: Format) -> None:
    """Show one host with its last report."""
    found = session.call(session.hosts.GetHost, service.GetHostRequest(name=host_name(name)))
    print_one(found, output, _details)


def _details(host: Host) -> list[tuple[str, str]]:
    facts = host.facts
    pairs = [
        ("Host", short(host.name)),
        ("State", _state(host) + (f" ({host.state_reason})" if host.state_reason else "")),
        ("Alive", _liveness(host)),
        ("Trouble", host.last_error),
        ("Address", host.address),
        ("Adopts domains", "yes" if host.adopt_domains else "no"),
        ("Instances", f"{host.usage.instances}, moves at work {host.usage.moves}"),
    ]
    if not host.HasField("facts"):
        return pairs
    roots = "\n".join(
        f"{r.name}: {r.path} ({r.filesystem}), {format_bytes(r.available_bytes)} free of "
        f"{format_bytes(r.capacity_bytes)}"
        for r in facts.roots
    )
    return [
        *pairs,
        ("vCPUs promised", f"{host.usage.vcpus} on {facts.cpus} host CPUs"),
        (
            "Memory promised",
            f"{format_bytes(host.usage.memory_mib * _MIB)} of "
            f"{format_bytes(facts.memory_mib * _MIB)}, "
            f"{format_bytes(facts.reserved_memory_mib * _MIB)} kept for the host",
        ),
        ("Disk promised", format_bytes(host.usage.claimed_disk_bytes)),
        ("Storage roots", roots),
        ("CPU", f"{facts.cpu_model} ({facts.arch})"),
        ("Virtualisation", ", ".join(facts.virt_types)),
        ("Firmware", ", ".join(facts.firmwares) + (", TPM" if facts.tpm else "")),
        ("Networks", ", ".join([*facts.bridges, *facts.networks])),
        (
            "Versions",
            f"hostd {facts.hostd_version}, libvirt {_version(facts.libvirt_version)}, "
            f"QEMU {_version(facts.qemu_version)}",
        ),
        ("libvirt", "" if facts.libvirt_connected else "not connected; the facts may be old"),
        ("Data port", facts.data_address),
    ]


def _liveness(host: Host) -> str:
    if not host.HasField("last_seen_time"):
        return "no report yet"
    return f"{'yes' if host.alive else 'no'}, last seen {format_age(host.last_seen_time)}"


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


@host.command("add")
@click.argument("name")
@click.option(
    "--adopt/--no-adopt",
    default=True,
    show_default=True,
    help="Make instances of the domains found on it.",
)
@output_option
@pass_session
def add_host(session: Session, name: str, adopt: bool, output: Format) -> None:
    """Announce a host and print the command that joins it.

    The join command works once. Running this again before the host has joined
    replaces it.
    """
    answer = session.call(
        session.hosts.AddHost,
        service.AddHostRequest(
            host_id=short(host_name(name)), adopt_domains=adopt, request_id=new_request_id()
        ),
    )
    if not answer.join_token:
        raise CliError(
            f"{short(answer.host.name)} has joined meanwhile; its token is used up.",
            exit_code=errors.REFUSED,
            advice=f"See `drover host show {short(answer.host.name)}`.",
        )
    if output is not Format.TABLE:
        print_data(to_plain(answer), output)
        return
    click.echo(
        f"Run this on {short(answer.host.name)} as root, before {format_time(answer.expire_time)}; "
        "it works once:",
        err=True,
    )
    click.echo(f"drover-hostd join {answer.join_token}")


@host.command("enable")
@click.argument("name", shell_complete=complete.hosts)
@output_option
@pass_session
def enable_host(session: Session, name: str, output: Format) -> None:
    """Let the scheduler use a host."""
    changed = session.call(
        session.hosts.EnableHost,
        service.EnableHostRequest(name=host_name(name), request_id=new_request_id()),
    )
    _say_state(changed, output, "machines may move to it")


@host.command("disable")
@click.argument("name", shell_complete=complete.hosts)
@click.option("--reason", default="", help="Why, for people.")
@output_option
@pass_session
def disable_host(session: Session, name: str, reason: str, output: Format) -> None:
    """Keep moves away from a host; those on it may leave."""
    changed = session.call(
        session.hosts.DisableHost,
        service.DisableHostRequest(
            name=host_name(name), reason=reason, request_id=new_request_id()
        ),
    )
    _say_state(changed, output, "no machine moves to it; those on it stay and may leave")


@host.command("gone")
@click.argument("name", shell_complete=complete.hosts)
@click.option("--reason", required=True, help="What happened to it; kept in the audit log.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_option
@pass_session
def declare_gone(session: Session, name: str, reason: str, yes: bool, output: Format) -> None:
    """Declare that a host will never come back.

    Moves that wait for it go on without it. Be sure that it is off: a host that
    still runs its machines would run them twice. One that answers is refused.
    """
    confirm_or_refuse(
        yes,
        f"{short(name)} is given up for good: moves go on without it, and it has to join anew to "
        "be used again.\nIf it still runs machines, they may come to run twice. Switch it off "
        "first.",
    )
    changed = session.call(
        session.hosts.DeclareHostGone,
        service.DeclareHostGoneRequest(
            name=host_name(name), reason=reason, request_id=new_request_id()
        ),
    )
    _say_state(changed, output, "moves no longer wait for it")


def _say_state(host: Host, output: Format, meaning: str) -> None:
    if output is not Format.TABLE:
        print_data(to_plain(host), output)
    else:
        click.echo(f"{short(host.name)} is {_state(host).lower()}: {meaning}.")


def confirm_or_refuse(yes: bool, consequence: str) -> None:
    """Have the user agree to something that cannot be taken back.

    Args:
        yes: True when the user has agreed on the command line.
        consequence: What will happen.

    Raises:
        CliError: The user does not agree, or cannot be asked (exit code 2).
    """
    if yes:
        return
    click.echo(visible(consequence), err=True)
    if not sys.stdin.isatty():
        raise CliError(
            "Nothing was done.", exit_code=errors.USAGE, advice="Repeat with --yes to agree."
        )
    if not click.confirm("Go on?", default=False, err=True):
        raise CliError("Nothing was done.", exit_code=errors.FAILED)
