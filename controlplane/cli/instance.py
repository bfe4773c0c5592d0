"""`drover instance`: the virtual machines of the fleet."""

from __future__ import annotations

import click

from controlplane.cli import complete
from controlplane.cli.names import all_instances, get_instance, host_name, short
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
from controlplane.cli.units import format_bytes, format_time
from controlplane.v1 import instance_service_pb2 as service
from controlplane.v1.instance_pb2 import Instance
from hostd.v1.domain_pb2 import PowerState

_MIB = 1 << 20


@click.group("instance")
def instance() -> None:
    """Virtual machines: list, adopt, release, lock."""


@instance.command("list")
@click.option("--host", default="", help="Only those on this host.", shell_complete=complete.hosts)
@output_option
@pass_session
def list_instances(session: Session, host: str, output: Format) -> None:
    """List the instances that Drover looks after."""
    found = list(all_instances(session, host=host_name(host) if host else ""))
    header = ("NAME", "HOST", "STATE", "TASK", "POWER", "VCPUS", "MEMORY", "DISK", "UUID")
    empty = "No instances. Domains on joined hosts become instances by themselves."
    print_list(found, output, header, _row, empty=empty)


def _row(instance: Instance) -> tuple[str, ...]:
    return (
        instance.display_name,
        short(instance.host),
        _vm_state(instance) + (" (conflict)" if instance.conflict else ""),
        _task_state(instance),
        enum_word(PowerState.Name(instance.power_state), "POWER_STATE_").lower(),
        str(instance.vcpus),
        format_bytes(instance.memory_mib * _MIB),
        format_bytes(instance.disk_size_bytes),
        instance.uid,
    )


def _vm_state(instance: Instance) -> str:
    return enum_word(Instance.VmState.Name(instance.vm_state), "VM_STATE_")


def _task_state(instance: Instance) -> str:
    return enum_word(Instance.TaskState.Name(instance.task_state), "TASK_STATE_").lower()


@instance.command("show")
@click.argument("name", shell_complete=complete.instances)
@output_option
@pass_session
def show_instance(session: Session, name: str, output: Format) -> None:
    """Show one instance."""
    print_one(get_instance(session, name), output, _details)


def _details(instance: Instance) -> list[tuple[str, str]]:
    task = _task_state(instance)
    power = enum_word(PowerState.Name(instance.power_state), "POWER_STATE_").lower()
    volumes = "\n".join(
        f"{v.volume_id}: {v.path} ({v.format}, {format_bytes(v.size_bytes)}, "
        f"{format_bytes(v.allocated_bytes)} allocated)"
        for v in instance.volumes
    )
    locked = f"by {instance.locked_by}: {instance.lock_reason}" if instance.locked_by else ""
    return [
        ("Instance", instance.display_name),
        ("UUID", instance.uid),
        ("Host", short(instance.host)),
        ("State", _vm_state(instance) + (f" ({task})" if task != "-" else "") + f", power {power}"),
        ("Project", instance.project),
        (
            "Size",
            f"{instance.vcpus} vCPUs, {format_bytes(instance.memory_mib * _MIB)} memory"
            + (f", flavor {short(instance.flavor)}" if instance.flavor else ""),
        ),
        ("Volumes", volumes),
        (
            "Interfaces",
            "\n".join(f"{n.mac_address} {n.type} {n.source}" for n in instance.interfaces),
        ),
        ("Move", short(instance.migration) if instance.migration else ""),
        ("Locked", locked),
        ("Conflict", f"reported by {instance.conflict}" if instance.conflict else ""),
        ("Cannot move", "\n".join(instance.obstacles)),
        ("Adopted", format_time(instance.create_time)),
    ]


@instance.command("adopt")
@click.argument("uuid")
@click.option(
    "--host", default="", help="Host that has it, if several do.", shell_complete=complete.hosts
)
@output_option
@pass_session
def adopt_instance(session: Session, uuid: str, host: str, output: Format) -> None:
    """Take a domain under Drover's care, by its libvirt UUID.

    Only needed for domains that were released before, or whose host does not
    adopt by itself.
    """
    adopted = session.call(
        session.instances.AdoptInstance,
        service.AdoptInstanceRequest(
            uid=uuid, host=host_name(host) if host else "", request_id=new_request_id()
        ),
    )
    _say(adopted, output, f"{adopted.display_name} on {short(adopted.host)} is adopted.")


@instance.command("release")
@click.argument("name", shell_complete=complete.instances)
@pass_session
def release_instance(session: Session, name: str) -> None:
    """Forget an instance; a normal libvirt domain stays behind."""
    found = get_instance(session, name)
    session.call(
        session.instances.ReleaseInstance,
        service.ReleaseInstanceRequest(name=found.name, request_id=new_request_id()),
    )
    sentence = (
        f"{found.display_name} is released: it stays on {short(found.host)} as a plain libvirt "
        f"domain.\nTake it back with: drover instance adopt {found.uid}"
    )
    click.echo(visible(sentence))


@instance.command("lock")
@click.argument("name", shell_complete=complete.instances)
@click.option("--reason", required=True, help="Why; shown to those who try to move it.")
@output_option
@pass_session
def lock_instance(session: Session, name: str, reason: str, output: Format) -> None:
    """Keep an instance from moving."""
    found = get_instance(session, name)
    locked = session.call(
        session.instances.LockInstance,
        service.LockInstanceRequest(name=found.name, reason=reason, request_id=new_request_id()),
    )
    _say(locked, output, f"{locked.display_name} is locked: it does not move until unlocked.")


@instance.command("unlock")
@click.argument("name", shell_complete=complete.instances)
@output_option
@pass_session
def unlock_instance(session: Session, name: str, output: Format) -> None:
    """Let a locked instance move again."""
    found = get_instance(session, name)
    unlocked = session.call(
        session.instances.UnlockInstance,
        service.UnlockInstanceRequest(name=found.name, request_id=new_request_id()),
    )
    _say(unlocked, output, f"{unlocked.display_name} is unlocked: it may move.")


def _say(instance: Instance, output: Format, sentence: str) -> None:
    if output is not Format.TABLE:
        print_data(to_plain(instance), output)
    else:
        click.echo(visible(sentence))
