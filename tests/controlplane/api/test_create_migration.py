from __future__ import annotations

import uuid
from typing import Any

import pytest

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.store import claims
from controlplane.v1 import (
    flavor_pb2,
    flavor_service_pb2,
    host_service_pb2,
    instance_pb2,
    instance_service_pb2,
    migration_pb2,
)
from controlplane.v1 import migration_service_pb2 as pb
from hostd.v1 import domain_pb2, host_pb2
from tests.controlplane.api.asking import (
    MEMBER,
    OPERATOR,
    UID,
    VIEWER,
    Options,
    ask,
    instance,
    nothing_changed,
    refused,
    rows,
)
from tests.controlplane.api.conftest import Api, by
from tests.controlplane.machines import GIB, make_domain


async def test_a_move_is_admitted_with_its_claim_and_saga(fleet: Api) -> None:
    move = await fleet.migrations.CreateMigration(ask(), metadata=by(OPERATOR))
    assert move.state == migration_pb2.Migration.STATE_PENDING
    assert move.kind == migration_pb2.Migration.KIND_MIGRATION
    assert (move.source_host, move.target_host) == ("hosts/a", "hosts/b")
    assert (move.instance, move.instance_display_name) == (f"instances/{UID}", "web1")
    assert move.created_by == OPERATOR
    assert [(v.host, v.fits, v.reason) for v in move.placement.verdicts] == [
        ("hosts/b", True, ""),
        ("hosts/c", True, ""),
        ("hosts/a", False, "SAME_HOST"),
    ]
    assert move.placement.estimated_bytes == 2 * GIB
    assert move.options.shutdown_mode == Options.SHUTDOWN_MODE_GRACEFUL_THEN_FORCE
    assert move.options.shutdown_timeout.seconds == 60
    assert await rows(fleet) == (1, 1, 1)
    taken = await instance(fleet)
    assert taken.migration == move.name
    assert taken.task_state == instance_pb2.Instance.TASK_STATE_RESIZE_PREP
    held = await fleet.run(lambda tx: claims.find(tx, move.name))
    assert held is not None
    assert (held.host, held.size.vcpus, held.size.memory_mib, held.size.disk_bytes) == (
        "b",
        2,
        1024,
        2 * GIB,
    )
    assert await fleet.migrations.GetMigration(pb.GetMigrationRequest(name=move.name)) == move
    events = await fleet.migrations.ListMigrationEvents(
        pb.ListMigrationEventsRequest(parent=move.name)
    )
    assert [(e.sequence, e.saga, e.kind) for e in events.events] == [(1, "move", "STATE")]
    assert "olga" in events.events[0].message


async def test_a_dry_run_tells_the_plan_and_changes_nothing(fleet: Api) -> None:
    plan = await fleet.migrations.CreateMigration(ask(validate_only=True))
    assert (plan.name, plan.target_host, plan.state) == ("", "hosts/b", 0)
    assert len(plan.placement.verdicts) == 3
    assert plan.placement.estimated_bytes == 2 * GIB
    await nothing_changed(fleet)


async def test_a_resize_asks_for_the_new_size(fleet: Api) -> None:
    flavor = flavor_pb2.Flavor(
        name="flavors/big", vcpus=4, memory_mib=4096, root_disk_bytes=20 * GIB
    )
    await fleet.flavors.CreateFlavor(flavor_service_pb2.CreateFlavorRequest(flavor=flavor))
    move = await fleet.migrations.CreateMigration(ask(flavor="flavors/big"), metadata=by(MEMBER))
    assert move.kind == migration_pb2.Migration.KIND_RESIZE
    assert move.flavor == "flavors/big"
    held: Any = await fleet.run(lambda tx: claims.find(tx, move.name))
    assert (held.size.vcpus, held.size.memory_mib) == (4, 4096)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"instance": ""}, Reason.INVALID_NAME),
        ({"instance": "web1"}, Reason.INVALID_NAME),
        ({"instance": "instances/nobody"}, Reason.INSTANCE_NOT_FOUND),
        ({"instance": f"instances/{uuid.uuid4()}"}, Reason.INSTANCE_NOT_FOUND),
        ({"host": "b"}, Reason.INVALID_NAME),
        ({"host": "hosts/zz"}, Reason.HOST_NOT_FOUND),
        ({"host": "hosts/a"}, Reason.SAME_HOST),
        ({"flavor": "big"}, Reason.INVALID_NAME),
        ({"flavor": "flavors/big"}, Reason.FLAVOR_NOT_FOUND),
        ({"options": {"shutdown_mode": 77}}, Reason.INVALID_FIELD),
        ({"options": {"shutdown_timeout": {"seconds": 0}}}, Reason.INVALID_FIELD),
        ({"options": {"shutdown_timeout": {"seconds": 3601}}}, Reason.INVALID_FIELD),
        ({"options": {"confirm_policy": 77}}, Reason.INVALID_FIELD),
        ({"options": {"confirm_policy": Options.CONFIRM_POLICY_AFTER}}, Reason.INVALID_FIELD),
        (
            {
                "options": {
                    "confirm_policy": Options.CONFIRM_POLICY_AFTER,
                    "confirm_after": {"nanos": 5},
                }
            },
            Reason.INVALID_FIELD,
        ),
        (
            {
                "options": {
                    "confirm_policy": Options.CONFIRM_POLICY_AUTO,
                    "confirm_after": {"seconds": 5},
                }
            },
            Reason.INVALID_FIELD,
        ),
    ],
)
async def test_a_bad_request_is_refused(fleet: Api, changes: Any, reason: Reason) -> None:
    assert (await refused(fleet, ask(**changes))).reason is reason
    await nothing_changed(fleet)


async def test_two_machines_of_one_name_have_to_be_told_apart(fleet: Api) -> None:
    fleet.simulated["b"].put(make_domain(uuid=str(uuid.uuid4()), interfaces=[]))
    await fleet.report()
    assert (await refused(fleet, ask())).reason is Reason.AMBIGUOUS_NAME


@pytest.mark.parametrize(
    ("caller", "changes"),
    [
        (MEMBER, {}),
        (OPERATOR, {"host": "hosts/b"}),
        (MEMBER, {"flavor": "flavors/big", "host": "hosts/b"}),
        ("drover://lab/member/stan/other", {"flavor": "flavors/big"}),
        (VIEWER, {}),
    ],
)
async def test_who_may_not_is_refused(fleet: Api, caller: str, changes: Any) -> None:
    assert (await refused(fleet, ask(**changes), caller)).reason is Reason.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("power", "reason"),
    [
        (domain_pb2.POWER_STATE_PAUSED, Reason.INSTANCE_STATE),
        (domain_pb2.POWER_STATE_SUSPENDED, Reason.INSTANCE_STATE),
        (domain_pb2.POWER_STATE_CRASHED, Reason.INSTANCE_STATE),
        (domain_pb2.POWER_STATE_CHANGING, Reason.INSTANCE_STATE),
        (domain_pb2.POWER_STATE_SAVED, Reason.INSTANCE_STATE),
    ],
)
@pytest.mark.parametrize("reported", [True, False])
async def test_a_machine_in_a_wrong_state_stays(
    fleet: Api, power: domain_pb2.PowerState.ValueType, reason: Reason, reported: bool
) -> None:
    fleet.simulated["a"].put(make_domain(power_state=power))
    if reported:
        await fleet.report()
    assert (await refused(fleet, ask())).reason is reason


async def test_a_machine_that_cannot_leave_says_what_holds_it(fleet: Api) -> None:
    fleet.simulated["a"].put(make_domain(obstacles=["The host device 0000:01:00.0 is attached."]))
    error = await refused(fleet, ask())
    assert error.reason is Reason.INSTANCE_IMMOVABLE
    assert error.violations[0].description == "The host device 0000:01:00.0 is attached."


async def test_a_failed_check_on_the_source_is_the_answer(fleet: Api) -> None:
    fleet.simulated["a"].fail_check(Reason.DISK_IN_USE, "qemu-img (4711) has web1.qcow2 open")
    error = await refused(fleet, ask())
    assert error.reason is Reason.DISK_IN_USE
    assert "4711" in error.message


async def test_a_machine_that_its_host_no_longer_has_is_missing(fleet: Api) -> None:
    fleet.simulated["a"].domains.clear()
    assert (await refused(fleet, ask())).reason is Reason.INSTANCE_MISSING


async def test_a_source_that_does_not_answer_now_is_told_as_that(fleet: Api) -> None:
    fleet.simulated["a"].refusal = DroverError(Reason.LIBVIRT_UNAVAILABLE, "No libvirt.")
    assert (await refused(fleet, ask())).reason is Reason.LIBVIRT_UNAVAILABLE


async def test_a_locked_machine_stays_whoever_asks(fleet: Api) -> None:
    await fleet.instances.LockInstance(
        instance_service_pb2.LockInstanceRequest(name="instances/web1", reason="backup"),
        metadata=by(OPERATOR),
    )
    error = await refused(fleet, ask())
    assert error.reason is Reason.INSTANCE_LOCKED
    assert OPERATOR in error.message


async def test_a_machine_reported_twice_stays(fleet: Api) -> None:
    fleet.simulated["b"].put(make_domain())
    await fleet.report()
    assert (await refused(fleet, ask())).reason is Reason.INSTANCE_CONFLICT


async def test_a_released_machine_is_not_moved(fleet: Api) -> None:
    await fleet.instances.ReleaseInstance(
        instance_service_pb2.ReleaseInstanceRequest(name="instances/web1")
    )
    assert (await refused(fleet, ask())).reason is Reason.DOMAIN_RELEASED


async def test_a_named_target_that_is_off_limits_says_why(fleet: Api) -> None:
    await fleet.hosts.DisableHost(
        host_service_pb2.DisableHostRequest(name="hosts/b", reason="new disks")
    )
    disabled = await refused(fleet, ask(host="hosts/b"))
    assert disabled.reason is Reason.HOST_DISABLED
    fleet.clock.advance(seconds=60)
    await fleet.hosts.DeclareHostGone(
        host_service_pb2.DeclareHostGoneRequest(name="hosts/c", reason="fire")
    )
    await fleet.report("a", "b")
    assert (await refused(fleet, ask(host="hosts/c"))).reason is Reason.HOST_GONE
    await fleet.hosts.AddHost(host_service_pb2.AddHostRequest(host_id="d"))
    assert (await refused(fleet, ask(host="hosts/d"))).reason is Reason.HOST_NOT_JOINED


async def test_dead_hosts_neither_give_nor_take(fleet: Api) -> None:
    fleet.clock.advance(seconds=60)
    assert (await refused(fleet, ask())).reason is Reason.HOST_DEAD
    await fleet.report("a", "c")
    dead = await refused(fleet, ask(host="hosts/b"))
    assert (dead.reason, dead.subject) == (Reason.HOST_DEAD, "hosts/b")
    move = await fleet.migrations.CreateMigration(ask())
    assert move.target_host == "hosts/c"


async def test_no_valid_host_names_every_host_with_its_reason(fleet: Api) -> None:
    fleet.simulated["b"].facts.bridges[:] = ["br9"]
    fleet.simulated["c"].facts.memory_mib = 512
    await fleet.report()
    error = await refused(fleet, ask())
    assert error.reason is Reason.NO_VALID_HOST
    assert {(v.subject, v.type) for v in error.violations} == {
        ("hosts/a", "SAME_HOST"),
        ("hosts/b", "TARGET_LACKS_BRIDGE"),
        ("hosts/c", "TARGET_LACKS_MEMORY"),
    }


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"bridges": []}, Reason.TARGET_LACKS_BRIDGE),
        ({"machine_types": ["pc"]}, Reason.TARGET_LACKS_MACHINE_TYPE),
        ({"roots": [host_pb2.StorageRoot(name="images")]}, Reason.TARGET_LACKS_SPACE),
        ({"roots": [host_pb2.StorageRoot(name="other")]}, Reason.TARGET_LACKS_ROOT),
    ],
)
async def test_a_named_target_that_lacks_something_says_what(
    fleet: Api, facts: dict[str, Any], reason: Reason
) -> None:
    found = fleet.simulated["b"].facts
    for name in facts:
        found.ClearField(name)  # type: ignore[arg-type]
    found.MergeFrom(host_pb2.HostFacts(**facts))
    await fleet.report()
    error = await refused(fleet, ask(host="hosts/b"))
    assert (error.reason, error.subject) == (reason, "hosts/b")


@pytest.mark.parametrize(
    ("neighbour", "reason"),
    [
        (make_domain(uuid=str(uuid.UUID(int=9)), interfaces=[]), Reason.TARGET_NAME_TAKEN),
        (
            make_domain("other", interfaces=make_domain().interfaces),
            Reason.TARGET_MAC_TAKEN,
        ),
    ],
)
async def test_a_target_with_a_clash_is_refused(
    fleet: Api, neighbour: domain_pb2.Domain, reason: Reason
) -> None:
    fleet.simulated["b"].put(neighbour)
    await fleet.report()
    error = await refused(fleet, ask(instance=f"instances/{UID}", host="hosts/b"))
    assert error.reason is reason


async def test_a_candidate_that_refuses_live_gives_way_to_the_next(fleet: Api) -> None:
    fleet.simulated["b"].fail_check(Reason.TARGET_LACKS_CPU_FEATURE, "avx2 is missing")
    move = await fleet.migrations.CreateMigration(ask())
    assert move.target_host == move.placement.chosen_host == "hosts/c"
    assert [(v.host, v.fits, v.reason) for v in move.placement.verdicts] == [
        ("hosts/c", True, ""),
        ("hosts/b", False, "TARGET_LACKS_CPU_FEATURE"),
        ("hosts/a", False, "SAME_HOST"),
    ]


async def test_what_the_source_and_the_chosen_host_warn_of_is_told_and_kept(fleet: Api) -> None:
    fleet.simulated["a"].warn("vda was not closed")
    fleet.simulated["b"].warn("The clock is not synchronised.")
    fleet.simulated["b"].fail_check(Reason.TARGET_LACKS_CPU_FEATURE, "avx2 is missing")
    fleet.simulated["c"].warn("It may grow too large.")
    told = ["hosts/a: vda was not closed.", "hosts/c: It may grow too large."]
    plan = await fleet.migrations.CreateMigration(ask(validate_only=True))
    assert list(plan.placement.warnings) == told
    move = await fleet.migrations.CreateMigration(ask())
    found = await fleet.migrations.GetMigration(pb.GetMigrationRequest(name=move.name))
    assert list(move.placement.warnings) == list(found.placement.warnings) == told


async def test_a_candidate_that_the_source_cannot_reach_gives_way_to_the_next(fleet: Api) -> None:
    fleet.simulated["b"].facts.data_address = "10.0.0.2:7443"
    await fleet.report()
    fleet.simulated["a"].out_of_reach = {"10.0.0.2:7443"}
    named = await refused(fleet, ask(host="hosts/b"))
    assert (named.reason, named.subject) == (Reason.TARGET_UNREACHABLE, "hosts/b")
    move = await fleet.migrations.CreateMigration(ask())
    assert [(v.host, v.reason) for v in move.placement.verdicts] == [
        ("hosts/c", ""),
        ("hosts/b", "TARGET_UNREACHABLE"),
        ("hosts/a", "SAME_HOST"),
    ]


async def test_when_all_candidates_refuse_live_the_answer_has_all_reasons(fleet: Api) -> None:
    fleet.simulated["b"].fail_check(Reason.TARGET_LACKS_CPU_FEATURE, "avx2 is missing")
    fleet.simulated["c"].refusal = DroverError(Reason.LIBVIRT_UNAVAILABLE, "No libvirt.")
    error = await refused(fleet, ask())
    assert error.reason is Reason.NO_VALID_HOST
    assert {v.type for v in error.violations} == {
        "SAME_HOST",
        "TARGET_LACKS_CPU_FEATURE",
        "LIBVIRT_UNAVAILABLE",
    }
    named = await refused(fleet, ask(host="hosts/b"))
    assert named.reason is Reason.TARGET_LACKS_CPU_FEATURE
