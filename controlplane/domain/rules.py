"""What may be done in which state.

Each function returns when its rule holds and raises the DroverError that tells
the caller why it does not; none of them reads or writes anything.
"""

from __future__ import annotations

from controlplane.common.errors import DroverError, Violation
from controlplane.common.identity import Identity, Role
from controlplane.common.reasons import Reason
from controlplane.domain.capacity import root_disk
from controlplane.domain.model import Flavor, Host, Instance, Migration
from controlplane.domain.names import flavor_name, host_name, instance_name, migration_name
from controlplane.domain.states import (
    BEFORE_COPIED_STATES,
    CANCELLABLE_STATES,
    MOVABLE_POWER_STATES,
    HostState,
    MigrationState,
    PowerState,
    VmState,
)

_POWER_WORDS = {
    PowerState.PAUSED: "is paused",
    PowerState.SUSPENDED: "is suspended",
    PowerState.CRASHED: "has crashed",
    PowerState.CHANGING: "is between two states (starting, shutting down or saving)",
    PowerState.SAVED: "is off with its memory saved",
}


def check_movable(instance: Instance) -> None:
    """The instance may start a move.

    Raises:
        DroverError: DOMAIN_RELEASED, INSTANCE_BUSY, INSTANCE_LOCKED,
            INSTANCE_CONFLICT, INSTANCE_MISSING, INSTANCE_STATE or
            INSTANCE_IMMOVABLE.
    """
    subject = instance_name(instance.uid)
    shown = f"{subject} ({instance.name})"
    if instance.released:
        raise DroverError(
            Reason.DOMAIN_RELEASED, f"{shown} was released from Drover's care.", subject=subject
        )
    check_idle(instance)
    check_unlocked(instance)
    check_no_conflict(instance)
    if instance.vm_state is VmState.MISSING:
        raise DroverError(
            Reason.INSTANCE_MISSING,
            f"{shown} is no longer reported by {host_name(instance.host)}.",
            subject=subject,
            metadata={"host": instance.host},
        )
    check_power_state(instance, instance.power_state)
    check_obstacles(instance, tuple(instance.description.obstacles))


def check_idle(instance: Instance) -> None:
    """No move of the instance is under way or waits for confirm.

    Raises:
        DroverError: INSTANCE_BUSY.
    """
    if not instance.migration_id and instance.task_state is None:
        return
    subject = instance_name(instance.uid)
    task = f", task {instance.task_state.value}" if instance.task_state else ""
    move = migration_name(instance.migration_id) or "another task"
    raise DroverError(
        Reason.INSTANCE_BUSY,
        f"{subject} ({instance.name}) is taken by {move}{task}.",
        subject=subject,
        metadata={"migration": instance.migration_id},
    )


def check_no_conflict(instance: Instance) -> None:
    """No host reports the instance that should not have it.

    Raises:
        DroverError: INSTANCE_CONFLICT.
    """
    if instance.conflict:
        subject = instance_name(instance.uid)
        raise DroverError(
            Reason.INSTANCE_CONFLICT,
            f"{subject} ({instance.name}) is reported by more than one host: {instance.conflict}.",
            subject=subject,
            metadata={"hosts": instance.conflict},
        )


def check_unlocked(instance: Instance) -> None:
    """The instance is not locked.

    Raises:
        DroverError: INSTANCE_LOCKED.
    """
    if instance.lock_reason:
        subject = instance_name(instance.uid)
        raise DroverError(
            Reason.INSTANCE_LOCKED,
            f"{subject} ({instance.name}) was locked by {instance.locked_by}: "
            f"{instance.lock_reason}.",
            subject=subject,
            metadata={"locked_by": instance.locked_by, "lock_reason": instance.lock_reason},
        )


def check_unlocked_for(instance: Instance, caller: Identity) -> None:
    """The instance is not locked, or by the caller, or the caller is an admin.

    Raises:
        DroverError: INSTANCE_LOCKED.
    """
    if caller.role is not Role.ADMIN and instance.locked_by != caller.uri:
        check_unlocked(instance)


def check_may_unlock(instance: Instance, caller: Identity) -> None:
    """The caller locked the instance, or is an admin.

    Raises:
        DroverError: PERMISSION_DENIED.
    """
    if instance.lock_reason and caller.role is not Role.ADMIN and instance.locked_by != caller.uri:
        raise DroverError(
            Reason.PERMISSION_DENIED,
            f"{instance_name(instance.uid)} was locked by {instance.locked_by}; "
            "only they or an admin may unlock it.",
            subject=instance_name(instance.uid),
            metadata={"locked_by": instance.locked_by},
        )


def check_power_state(instance: Instance, power: PowerState | None) -> None:
    """A machine in this power state can move: it runs or is off.

    Raises:
        DroverError: INSTANCE_STATE.
    """
    if power in MOVABLE_POWER_STATES:
        return
    words = _POWER_WORDS.get(power, "is") if power is not None else "is in an unknown state"
    raise DroverError(
        Reason.INSTANCE_STATE,
        f"{instance_name(instance.uid)} ({instance.name}) {words}; "
        "only a machine that runs or is off can move.",
        subject=instance_name(instance.uid),
        metadata={"power_state": power.value if power is not None else ""},
    )


def check_obstacles(instance: Instance, obstacles: tuple[str, ...]) -> None:
    """Nothing about the machine keeps it where it is.

    Raises:
        DroverError: INSTANCE_IMMOVABLE, with one violation per obstacle.
    """
    if not instance.description.persistent:
        obstacles += ("the domain is transient: it has no persistent definition",)
    if not obstacles:
        return
    subject = instance_name(instance.uid)
    raise DroverError(
        Reason.INSTANCE_IMMOVABLE,
        f"{subject} ({instance.name}) cannot leave {host_name(instance.host)}: "
        f"{'; '.join(text.rstrip('.') for text in obstacles)}.",
        subject=subject,
        violations=[Violation(subject, text, Reason.INSTANCE_IMMOVABLE.name) for text in obstacles],
    )


def check_joined(host: Host) -> None:
    """Operators may decide about the host: it has joined and is not gone.

    Raises:
        DroverError: HOST_GONE or HOST_NOT_JOINED.
    """
    name = host_name(host.name)
    if host.state is HostState.GONE:
        raise DroverError(
            Reason.HOST_GONE,
            f"{name} was declared gone: {host.state_reason}.",
            subject=name,
            metadata={"host": host.name},
        )
    if host.state is HostState.JOINING:
        raise DroverError(
            Reason.HOST_NOT_JOINED,
            f"{name} was announced and has not joined yet.",
            subject=name,
            metadata={"host": host.name},
        )


def check_may_be_gone(host: Host, *, alive: bool) -> None:
    """An operator's word that the host is gone can be true: it does not answer.

    Raises:
        DroverError: HOST_ALIVE.
    """
    if alive:
        raise DroverError(
            Reason.HOST_ALIVE,
            f"{host_name(host.name)} has answered at {host.last_seen:%H:%M:%S} UTC; declared gone, "
            "the machines that it runs would be started elsewhere as well.",
            subject=host_name(host.name),
            metadata={"host": host.name},
        )


def check_source(host: Host, *, alive: bool) -> None:
    """Machines can leave the host; a disabled host may be emptied.

    Raises:
        DroverError: HOST_GONE, HOST_NOT_JOINED or HOST_DEAD.
    """
    _check_present(host, alive=alive)


def check_target(host: Host, *, source: str, alive: bool) -> None:
    """The host may receive a machine of another host.

    Raises:
        DroverError: SAME_HOST, HOST_GONE, HOST_NOT_JOINED, HOST_DISABLED or
            HOST_DEAD.
    """
    name = host_name(host.name)
    if host.name == source:
        raise DroverError(
            Reason.SAME_HOST,
            f"The machine is on {name} already.",
            subject="host",
            metadata={"host": host.name},
        )
    if host.state is HostState.DISABLED:
        why = f": {host.state_reason}" if host.state_reason else ""
        raise DroverError(
            Reason.HOST_DISABLED,
            f"{name} is disabled{why}.",
            subject=name,
            metadata={"host": host.name},
        )
    _check_present(host, alive=alive)


def _check_present(host: Host, *, alive: bool) -> None:
    check_joined(host)
    name = host_name(host.name)
    if host.last_seen is None:
        raise DroverError(
            Reason.HOST_NOT_JOINED,
            f"{name} has joined and has not reported yet.",
            subject=name,
            metadata={"host": host.name},
        )
    if not alive:
        why = f" ({host.last_error})" if host.last_error else ""
        raise DroverError(
            Reason.HOST_DEAD,
            f"{name} has not answered since {host.last_seen:%Y-%m-%d %H:%M:%S} UTC{why}.",
            subject=name,
            metadata={"host": host.name},
        )


def check_flavor(instance: Instance, flavor: Flavor) -> None:
    """The flavor changes the size of the instance and shrinks no disk.

    Raises:
        DroverError: SAME_FLAVOR or DISK_SHRINK.
    """
    name = flavor_name(flavor.name)
    disk = root_disk(instance.description)
    root_bytes = disk.virtual_size_bytes if disk is not None else 0
    if 0 < flavor.root_disk_bytes < root_bytes:
        raise DroverError(
            Reason.DISK_SHRINK,
            f"{name} has a root disk of {flavor.root_disk_bytes} bytes; "
            f"{instance.name} has one of {root_bytes} bytes, and a disk never shrinks.",
            subject="flavor",
            metadata={
                "flavor": flavor.name,
                "wanted_bytes": str(flavor.root_disk_bytes),
                "present_bytes": str(root_bytes),
            },
        )
    same_size = (flavor.vcpus, flavor.memory_mib) == (instance.vcpus, instance.memory_mib)
    if same_size and flavor.root_disk_bytes in (0, root_bytes):
        raise DroverError(
            Reason.SAME_FLAVOR,
            f"{instance.name} already has the size of {name}: "
            f"{flavor.vcpus} virtual CPUs and {flavor.memory_mib} MiB.",
            subject="flavor",
            metadata={"flavor": flavor.name},
        )


def check_may_confirm(migration: Migration) -> None:
    """The move awaits confirm.

    Raises:
        DroverError: MIGRATION_STATE.
    """
    _check_awaiting(migration, "confirmed")


def check_may_revert(migration: Migration) -> None:
    """The move awaits confirm and can still go back.

    Raises:
        DroverError: MIGRATION_STATE.
    """
    _check_awaiting(migration, "reverted")


def check_may_cancel(migration: Migration) -> None:
    """The move is on its way forward, or being undone already.

    Raises:
        DroverError: CANCEL_TOO_LATE once the guest lives on the target and can
            be reverted, MIGRATION_STATE for any other state.
    """
    if migration.state in CANCELLABLE_STATES or is_being_cancelled(migration):
        return
    waits = migration.state is MigrationState.AWAITING_CONFIRM
    reason = Reason.CANCEL_TOO_LATE if waits else Reason.MIGRATION_STATE
    raise _wrong_state(reason, migration, "cancelled")


def is_being_cancelled(migration: Migration) -> bool:
    """True when asking for a cancel again changes nothing."""
    return migration.state is MigrationState.UNWINDING or (
        migration.state is MigrationState.CANCELLED
        or (migration.cancel_requested and migration.state in CANCELLABLE_STATES)
    )


def check_may_limit(migration: Migration) -> None:
    """The move has not copied all yet.

    Raises:
        DroverError: MIGRATION_STATE.
    """
    if migration.state not in BEFORE_COPIED_STATES:
        raise _wrong_state(Reason.MIGRATION_STATE, migration, "limited")


def check_may_retry(migration: Migration) -> None:
    """The move is stuck.

    Raises:
        DroverError: MIGRATION_STATE.
    """
    if migration.state is not MigrationState.STUCK:
        raise _wrong_state(Reason.MIGRATION_STATE, migration, "retried")


def check_may_abandon(migration: Migration) -> None:
    """The move is stuck.

    Raises:
        DroverError: MIGRATION_STATE.
    """
    if migration.state is not MigrationState.STUCK:
        raise _wrong_state(Reason.MIGRATION_STATE, migration, "abandoned")


def _check_awaiting(migration: Migration, verb: str) -> None:
    if migration.state is not MigrationState.AWAITING_CONFIRM:
        raise _wrong_state(Reason.MIGRATION_STATE, migration, verb)


def _wrong_state(reason: Reason, migration: Migration, verb: str) -> DroverError:
    name = migration_name(migration.id)
    return DroverError(
        reason,
        f"{name} is {migration.state.value} and cannot be {verb}.",
        subject=name,
        metadata={"state": migration.state.value},
    )
