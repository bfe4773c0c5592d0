from __future__ import annotations

import pytest

from controlplane.domain import states
from controlplane.domain.states import MigrationState, PowerState, ProtoEnum, VmState, vm_state_of

ENUMS = [
    states.HostState,
    states.PowerState,
    states.VmState,
    states.TaskState,
    states.MigrationKind,
    states.MigrationState,
    states.ShutdownMode,
    states.ConfirmPolicy,
]


@pytest.mark.parametrize("enum", ENUMS)
def test_every_proto_value_has_a_member_and_back(enum: type[ProtoEnum]) -> None:
    wrapper, prefix = enum._mirror()
    named = {name.removeprefix(prefix) for name, _ in wrapper.items()} - {"UNSPECIFIED"}
    assert set(enum.__members__) == named
    for member in enum:
        assert enum.from_number(member.number) is member
    assert enum.from_number(0) is None
    assert enum.from_number(12345) is None


def test_a_move_rests_or_ends_or_goes_on() -> None:
    assert states.FINAL_STATES < states.RESTING_STATES
    assert not states.CANCELLABLE_STATES & states.RESTING_STATES
    moving = set(MigrationState) - states.RESTING_STATES - states.CANCELLABLE_STATES
    assert moving == {
        MigrationState.CONFIRMING,
        MigrationState.REVERTING,
        MigrationState.UNWINDING,
    }


def test_a_machine_between_two_states_keeps_its_stable_one() -> None:
    assert vm_state_of(PowerState.CHANGING) is None
    assert vm_state_of(None) is None
    assert vm_state_of(PowerState.SAVED) is VmState.SUSPENDED
    assert vm_state_of(PowerState.CRASHED) is VmState.ERROR
