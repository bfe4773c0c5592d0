from __future__ import annotations

from typing import Any

import pytest

from controlplane.common.errors import DroverError
from controlplane.common.identity import Identity, Role
from controlplane.common.reasons import Reason
from controlplane.domain import rules
from controlplane.domain.model import Flavor, Migration
from controlplane.domain.states import (
    CANCELLABLE_STATES,
    HostState,
    MigrationKind,
    MigrationState,
    PowerState,
    TaskState,
    VmState,
)
from controlplane.v1 import migration_pb2
from tests.controlplane.machines import GIB, NOW, make_domain, make_host, make_instance

ADMIN = Identity("lab", Role.ADMIN, "ada")
MEMBER = Identity("lab", Role.MEMBER, "mo", "default")


def make_move(state: MigrationState, **changes: Any) -> Migration:
    values: dict[str, Any] = {
        "id": "123e4567-e89b-42d3-a456-426614174000",
        "instance_uid": make_domain().uuid,
        "instance_name": "web1",
        "kind": MigrationKind.MIGRATION,
        "state": state,
        "step": "",
        "attempt": 0,
        "saga_id": "",
        "source_host": "a",
        "target_host": "b",
        "flavor": None,
        "options": migration_pb2.MigrationOptions(),
        "placement": migration_pb2.Placement(),
        "description": None,
        "progress": None,
        "receipts": (),
        "error": None,
        "previous_power_state": None,
        "confirm_deadline": None,
        "stop_time": None,
        "running_time": None,
        "throughput_bytes_per_second": 0,
        "cancel_requested": False,
        "created_by": "",
        "generation": 1,
        "create_time": NOW,
        "update_time": NOW,
    }
    return Migration(**(values | changes))


def make_flavor(**changes: Any) -> Flavor:
    values: dict[str, Any] = {
        "name": "big",
        "vcpus": 4,
        "memory_mib": 4096,
        "root_disk_bytes": 0,
        "generation": 1,
        "create_time": NOW,
        "update_time": NOW,
    }
    return Flavor(**(values | changes))


def refusal(call: Any, *args: Any, **kwargs: Any) -> DroverError:
    with pytest.raises(DroverError) as caught:
        call(*args, **kwargs)
    return caught.value


@pytest.mark.parametrize("power", [PowerState.RUNNING, PowerState.SHUTOFF])
def test_a_machine_that_runs_or_is_off_can_move(power: PowerState) -> None:
    rules.check_movable(make_instance(power_state=power))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"released": True}, Reason.DOMAIN_RELEASED),
        ({"migration_id": "m"}, Reason.INSTANCE_BUSY),
        ({"task_state": TaskState.RESIZE_PREP}, Reason.INSTANCE_BUSY),
        ({"lock_reason": "backup", "locked_by": "ada"}, Reason.INSTANCE_LOCKED),
        ({"conflict": "hosts/a, hosts/b"}, Reason.INSTANCE_CONFLICT),
        ({"vm_state": VmState.MISSING}, Reason.INSTANCE_MISSING),
        ({"power_state": PowerState.PAUSED}, Reason.INSTANCE_STATE),
        ({"power_state": PowerState.SUSPENDED}, Reason.INSTANCE_STATE),
        ({"power_state": PowerState.CRASHED}, Reason.INSTANCE_STATE),
        ({"power_state": PowerState.CHANGING}, Reason.INSTANCE_STATE),
        ({"power_state": PowerState.SAVED}, Reason.INSTANCE_STATE),
        ({"power_state": None}, Reason.INSTANCE_STATE),
        ({"description": make_domain(persistent=False)}, Reason.INSTANCE_IMMOVABLE),
        ({"description": make_domain(obstacles=["A GPU is attached."])}, Reason.INSTANCE_IMMOVABLE),
    ],
)
def test_a_machine_that_cannot_move_says_why(changes: dict[str, Any], reason: Reason) -> None:
    error = refusal(rules.check_movable, make_instance(**changes))
    assert error.reason is reason
    assert "web1" in error.message


def test_every_obstacle_is_a_violation() -> None:
    domain = make_domain(obstacles=["A GPU is attached.", "A share is mounted."])
    error = refusal(rules.check_movable, make_instance(domain))
    assert [v.description for v in error.violations] == [
        "A GPU is attached.",
        "A share is mounted.",
    ]


@pytest.mark.parametrize(
    ("changes", "alive", "reason"),
    [
        ({"name": "a"}, True, Reason.SAME_HOST),
        ({"state": HostState.DISABLED}, True, Reason.HOST_DISABLED),
        ({"state": HostState.GONE}, True, Reason.HOST_GONE),
        ({"state": HostState.JOINING}, True, Reason.HOST_NOT_JOINED),
        ({"last_seen": None}, True, Reason.HOST_NOT_JOINED),
        ({}, False, Reason.HOST_DEAD),
    ],
)
def test_a_target_that_will_not_do_says_why(
    changes: dict[str, Any], alive: bool, reason: Reason
) -> None:
    host = make_host(**({"name": "b"} | changes))
    assert refusal(rules.check_target, host, source="a", alive=alive).reason is reason


def test_a_disabled_source_may_be_emptied_but_a_dead_one_cannot() -> None:
    rules.check_source(make_host(state=HostState.DISABLED), alive=True)
    assert refusal(rules.check_source, make_host(), alive=False).reason is Reason.HOST_DEAD


def test_a_flavor_has_to_change_something_and_shrink_no_disk() -> None:
    instance = make_instance()
    rules.check_flavor(instance, make_flavor())
    rules.check_flavor(instance, make_flavor(vcpus=2, memory_mib=1024, root_disk_bytes=11 * GIB))
    same = make_flavor(vcpus=2, memory_mib=1024)
    assert refusal(rules.check_flavor, instance, same).reason is Reason.SAME_FLAVOR
    shrink = make_flavor(root_disk_bytes=9 * GIB)
    assert refusal(rules.check_flavor, instance, shrink).reason is Reason.DISK_SHRINK


@pytest.mark.parametrize("state", list(MigrationState))
def test_what_may_be_done_with_a_move_in_each_state(state: MigrationState) -> None:
    move = make_move(state)
    awaiting = state is MigrationState.AWAITING_CONFIRM
    for check in (rules.check_may_confirm, rules.check_may_revert):
        if awaiting:
            check(move)
        else:
            assert refusal(check, move).reason is Reason.MIGRATION_STATE
    for check in (rules.check_may_retry, rules.check_may_abandon):
        if state is MigrationState.STUCK:
            check(move)
        else:
            assert refusal(check, move).reason is Reason.MIGRATION_STATE
    undone = {MigrationState.UNWINDING, MigrationState.CANCELLED}
    if state in CANCELLABLE_STATES | undone:
        rules.check_may_cancel(move)
        assert rules.is_being_cancelled(move) == (state in undone)
    else:
        # Only then is the advice to revert good.
        expected = Reason.CANCEL_TOO_LATE if awaiting else Reason.MIGRATION_STATE
        assert refusal(rules.check_may_cancel, move).reason is expected


def test_a_lock_binds_everybody_but_its_owner_and_admins() -> None:
    locked = make_instance(lock_reason="backup", locked_by="drover://lab/operator/olga")
    rules.check_unlocked_for(locked, ADMIN)
    rules.check_may_unlock(locked, ADMIN)
    owner = Identity("lab", Role.OPERATOR, "olga")
    rules.check_unlocked_for(locked, owner)
    rules.check_may_unlock(locked, owner)
    assert refusal(rules.check_unlocked_for, locked, MEMBER).reason is Reason.INSTANCE_LOCKED
    assert refusal(rules.check_may_unlock, locked, MEMBER).reason is Reason.PERMISSION_DENIED
