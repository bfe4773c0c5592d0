"""`drover flavor`: the sizes that a resize can ask for."""

from __future__ import annotations

import click

from controlplane.cli import complete
from controlplane.cli.names import flavor_name, short
from controlplane.cli.output import Format, output_option, print_data, print_list, to_plain
from controlplane.cli.session import Session, new_request_id, pass_session
from controlplane.cli.units import SizeType, format_bytes
from controlplane.v1 import flavor_service_pb2 as service
from controlplane.v1.flavor_pb2 import Flavor

_MIB = 1 << 20


@click.group("flavor")
def flavor() -> None:
    """Sizes for a resize: list, create, delete."""


@flavor.command("list")
@output_option
@pass_session
def list_flavors(session: Session, output: Format) -> None:
    """List the flavors."""
    flavors: list[Flavor] = []
    token = ""
    while True:
        page = session.call(
            session.flavors.ListFlavors,
            service.ListFlavorsRequest(page_size=1000, page_token=token),
        )
        flavors += page.flavors
        token = page.next_page_token
        if not token:
            break
    print_list(
        flavors,
        output,
        ("NAME", "VCPUS", "MEMORY", "ROOT DISK"),
        _row,
        empty="No flavors. Make one with `drover flavor create NAME --vcpus N --memory SIZE`.",
    )


def _row(flavor: Flavor) -> tuple[str, ...]:
    disk = format_bytes(flavor.root_disk_bytes) if flavor.root_disk_bytes else "as it is"
    return short(flavor.name), str(flavor.vcpus), format_bytes(flavor.memory_mib * _MIB), disk


@flavor.command("create")
@click.argument("name")
@click.option("--vcpus", type=click.IntRange(1, 1024), required=True, help="Virtual CPUs.")
@click.option(
    "--memory",
    type=SizeType(bare_unit=_MIB),
    required=True,
    help="Guest memory: 512M, 4G (1024s); a bare number is MiB.",
)
@click.option(
    "--root-disk",
    type=SizeType(bare_unit=1 << 30),
    default=0,
    help="Smallest first disk: 20G (1024s); a bare number is GiB. Left out, the disk stays.",
)
@output_option
@pass_session
def create_flavor(
    session: Session, name: str, vcpus: int, memory: int, root_disk: int, output: Format
) -> None:
    """Add a size."""
    if memory % _MIB:
        raise click.BadParameter("has to be a whole number of MiB", param_hint="--memory")
    created = session.call(
        session.flavors.CreateFlavor,
        service.CreateFlavorRequest(
            flavor=Flavor(
                name=flavor_name(name),
                vcpus=vcpus,
                memory_mib=memory // _MIB,
                root_disk_bytes=root_disk,
            ),
            request_id=new_request_id(),
        ),
    )
    if output is not Format.TABLE:
        print_data(to_plain(created), output)
    else:
        click.echo(
            f"{short(created.name)} is created. Resize with: "
            f"drover migrate INSTANCE --flavor {short(created.name)}"
        )


@flavor.command("delete")
@click.argument("name", shell_complete=complete.flavors)
@pass_session
def delete_flavor(session: Session, name: str) -> None:
    """Remove a size; machines that have it keep it."""
    session.call(
        session.flavors.DeleteFlavor,
        service.DeleteFlavorRequest(name=flavor_name(name), request_id=new_request_id()),
    )
    click.echo(f"{short(flavor_name(name))} is deleted.")
