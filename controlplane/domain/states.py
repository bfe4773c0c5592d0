"""The states of hosts, instances and moves, in the words of the API.

A move:

    PENDING -> PREPARING -> STOPPING -> COPYING -> FINISHING -> AWAITING_CONFIRM
       |           |            |          |           |          |         |
       +-----------+------------+----------+-----------+     CONFIRMING  REVERTING
                         |                                        |         |
                     UNWINDING -> FAILED | CANCELLED          CONFIRMED  REVERTED
                         |                                        |         |
                         +----------------> STUCK <---------------+---------+
                                              | -> back (retry), or ABANDONED

Members have the names of the protos' values without their prefix; `to_proto`
and `from_proto` of each class are the only place where the two meet.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Self

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from controlplane.v1 import host_pb2, instance_pb2, migration_pb2
from hostd.v1 import domain_pb2


class ProtoEnum(StrEnum):
    """A string enum whose members mirror a proto enum."""

    @classmethod
    def _mirror(cls) -> tuple[EnumTypeWrapper, str]:
        return _MIRRORS[cls.__name__]

    @property
    def number(self) -> Any:
        """The value of the proto enum, an int whose static type differs per enum."""
        wrapper, prefix = self._mirror()
        return wrapper.Value(prefix + self.name)

    @classmethod
    def from_number(cls, number: int) -> Self | None:
        """The member for a proto value; None for the unspecified or an unknown one."""
        wrapper, prefix = cls._mirror()
        if number not in wrapper.values():
            return None
        return cls.__members__.get(wrapper.Name(number).removeprefix(prefix))


class HostState(ProtoEnum):
    """Whether the scheduler may use a host."""

    JOINING = "JOINING"
    ENABLED = "ENABLED"
    DISABLED = "DISABLED"
    GONE = "GONE"


class PowerState(ProtoEnum):
    """What libvirt says a domain is doing."""

    RUNNING = "RUNNING"
    SHUTOFF = "SHUTOFF"
    PAUSED = "PAUSED"
    SUSPENDED = "SUSPENDED"
    CRASHED = "CRASHED"
    CHANGING = "CHANGING"
    SAVED = "SAVED"


class VmState(ProtoEnum):
    """The stable state of an instance, in Nova's words."""

    ACTIVE = "ACTIVE"
    STOPPED = "STOPPED"
    PAUSED = "PAUSED"
    SUSPENDED = "SUSPENDED"
    RESIZED = "RESIZED"
    ERROR = "ERROR"
    MISSING = "MISSING"


class TaskState(ProtoEnum):
    """What is being done to an instance, in Nova's words."""

    RESIZE_PREP = "RESIZE_PREP"
    RESIZE_MIGRATING = "RESIZE_MIGRATING"
    RESIZE_MIGRATED = "RESIZE_MIGRATED"
    RESIZE_FINISH = "RESIZE_FINISH"
    RESIZE_CONFIRMING = "RESIZE_CONFIRMING"
    RESIZE_REVERTING = "RESIZE_REVERTING"


class MigrationKind(ProtoEnum):
    """Whether the size changes."""

    MIGRATION = "MIGRATION"
    RESIZE = "RESIZE"


class MigrationState(ProtoEnum):
    """Where a move stands; drawn at the top of this module."""

    PENDING = "PENDING"
    PREPARING = "PREPARING"
    PRECOPYING = "PRECOPYING"
    STOPPING = "STOPPING"
    COPYING = "COPYING"
    FINISHING = "FINISHING"
    AWAITING_CONFIRM = "AWAITING_CONFIRM"
    CONFIRMING = "CONFIRMING"
    CONFIRMED = "CONFIRMED"
    REVERTING = "REVERTING"
    REVERTED = "REVERTED"
    UNWINDING = "UNWINDING"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    STUCK = "STUCK"
    ABANDONED = "ABANDONED"


class ShutdownMode(ProtoEnum):
    """How a guest is stopped."""

    GRACEFUL = "graceful"
    GRACEFUL_THEN_FORCE = "graceful-then-force"
    FORCE = "force"


class ConfirmPolicy(ProtoEnum):
    """What happens to the source copy once the guest lives on the target."""

    MANUAL = "manual"
    AUTO = "auto"
    AFTER = "after"


_MIRRORS: dict[str, tuple[EnumTypeWrapper, str]] = {
    "HostState": (host_pb2.Host.State, "STATE_"),  # type: ignore[dict-item]
    "PowerState": (domain_pb2.PowerState, "POWER_STATE_"),  # type: ignore[dict-item]
    "VmState": (instance_pb2.Instance.VmState, "VM_STATE_"),  # type: ignore[dict-item]
    "TaskState": (instance_pb2.Instance.TaskState, "TASK_STATE_"),  # type: ignore[dict-item]
    "MigrationKind": (migration_pb2.Migration.Kind, "KIND_"),  # type: ignore[dict-item]
    "MigrationState": (migration_pb2.Migration.State, "STATE_"),  # type: ignore[dict-item]
    "ShutdownMode": (  # type: ignore[dict-item]
        migration_pb2.MigrationOptions.ShutdownMode,
        "SHUTDOWN_MODE_",
    ),
    "ConfirmPolicy": (  # type: ignore[dict-item]
        migration_pb2.MigrationOptions.ConfirmPolicy,
        "CONFIRM_POLICY_",
    ),
}

FINAL_STATES = frozenset(
    {
        MigrationState.CONFIRMED,
        MigrationState.REVERTED,
        MigrationState.FAILED,
        MigrationState.CANCELLED,
        MigrationState.ABANDONED,
    }
)
"""The move has ended for good; it holds no claim and its instance is free."""

RESTING_STATES = FINAL_STATES | {MigrationState.AWAITING_CONFIRM, MigrationState.STUCK}
"""Nothing happens until somebody, or a deadline, asks for it."""

CANCELLABLE_STATES = frozenset(
    {
        MigrationState.PENDING,
        MigrationState.PREPARING,
        MigrationState.PRECOPYING,
        MigrationState.STOPPING,
        MigrationState.COPYING,
        MigrationState.FINISHING,
    }
)
"""The move saga is on its way forward."""

BEFORE_COPIED_STATES = CANCELLABLE_STATES - {MigrationState.FINISHING}
"""Some of the disks may still have to be copied."""

PARKED_STATES = frozenset(
    {
        MigrationState.COPYING,
        MigrationState.FINISHING,
        MigrationState.AWAITING_CONFIRM,
        MigrationState.CONFIRMING,
    }
)
"""The source has parked the machine and has not been told to take it back: it defines none."""

MOVABLE_POWER_STATES = frozenset({PowerState.RUNNING, PowerState.SHUTOFF})

_VM_STATE_OF_POWER: dict[PowerState, VmState] = {
    PowerState.RUNNING: VmState.ACTIVE,
    PowerState.SHUTOFF: VmState.STOPPED,
    PowerState.PAUSED: VmState.PAUSED,
    PowerState.SUSPENDED: VmState.SUSPENDED,
    PowerState.SAVED: VmState.SUSPENDED,
    PowerState.CRASHED: VmState.ERROR,
}


def vm_state_of(power: PowerState | None) -> VmState | None:
    """The stable state of an idle instance with this power state.

    Returns:
        None while the power state is unknown or between two others; the
        stable state is then the one from before.
    """
    return None if power is None else _VM_STATE_OF_POWER.get(power)
