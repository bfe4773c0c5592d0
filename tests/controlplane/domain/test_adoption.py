from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from controlplane.domain.adoption import Adoption, Change, LiveMove, Policy, reconcile
from controlplane.domain.model import Instance, Sighting
from controlplane.domain.states import PowerState, VmState
from hostd.v1 import domain_pb2
from tests.controlplane.machines import NOW, make_domain, make_instance

WINDOW_SECONDS = 20.0
POLICY = Policy(frozenset({"a", "b", "c"}), NOW, WINDOW_SECONDS)
LONG_AGO = NOW - timedelta(seconds=WINDOW_SECONDS + 1)


def seen(host: str, *, current: bool = True, **changes: Any) -> Sighting:
    domain = make_domain(**changes)
    return Sighting(
        host=host,
        uuid=domain.uuid,
        domain=domain,
        last_seen=NOW if current else LONG_AGO,
        current=current,
    )


def changes(
    instance: Instance, sightings: Sequence[Sighting], move: LiveMove | None = None
) -> dict[str, Any]:
    decision = reconcile(instance, sightings, move, POLICY)
    if decision is None:
        return {}
    assert isinstance(decision, Change)
    assert decision.uid == instance.uid
    assert decision.values
    return dict(decision.values)


def test_a_domain_on_one_host_is_adopted() -> None:
    decision = reconcile(None, [seen("a")], None, POLICY)
    assert isinstance(decision, Adoption)
    assert (decision.host, decision.vm_state, decision.conflict) == ("a", VmState.ACTIVE, "")


def test_a_host_that_opted_out_keeps_its_domains() -> None:
    policy = Policy(frozenset({"b"}), NOW, WINDOW_SECONDS)
    assert reconcile(None, [seen("a")], None, policy) is None


def test_a_domain_that_a_migration_holds_is_not_adopted() -> None:
    assert reconcile(None, [seen("a", migration_id="m")], None, POLICY) is None


def test_a_duplicate_is_adopted_once_and_says_so() -> None:
    decision = reconcile(None, [seen("b"), seen("a")], None, POLICY)
    assert isinstance(decision, Adoption)
    assert (decision.host, decision.conflict) == ("a", "hosts/a, hosts/b")


def test_a_conflict_is_set_and_cleared_and_the_owner_stays() -> None:
    instance = make_instance()
    assert changes(instance, [seen("a"), seen("b")]) == {"conflict": "hosts/a, hosts/b"}
    conflicting = make_instance(conflict="hosts/a, hosts/b")
    assert changes(conflicting, [seen("a"), seen("b", current=False)]) == {"conflict": ""}


def test_a_released_instance_stays_released() -> None:
    released = make_instance(released=True)
    assert reconcile(released, [seen("a"), seen("b")], None, POLICY) is None


def test_an_absent_machine_is_missing_after_the_window_only() -> None:
    fresh = make_instance(update_time=NOW)
    assert changes(fresh, []) == {}
    stale = make_instance(update_time=LONG_AGO)
    assert changes(stale, []) == {"vm_state": VmState.MISSING}
    lately = Sighting(host="a", uuid=stale.uid, domain=make_domain(), last_seen=NOW, current=False)
    assert changes(stale, [lately]) == {}


def test_a_missing_machine_that_is_back_has_its_state_again() -> None:
    missing = make_instance(vm_state=VmState.MISSING)
    off = seen("a", power_state=domain_pb2.POWER_STATE_SHUTOFF)
    assert changes(missing, [off]) == {
        "vm_state": VmState.STOPPED,
        "power_state": PowerState.SHUTOFF,
    }


def test_a_machine_taken_elsewhere_by_hand_is_missing_and_not_followed() -> None:
    stale = make_instance(update_time=LONG_AGO)
    assert changes(stale, [seen("b")]) == {"vm_state": VmState.MISSING}


def test_reports_change_size_and_name_but_not_because_a_guest_writes() -> None:
    instance = make_instance()
    busy = make_domain()
    busy.volumes[0].allocated_bytes += 4096
    busy.volumes[0].size_bytes += 4096
    busy.disk_size_bytes += 4096
    writing = Sighting(host="a", uuid=busy.uuid, domain=busy, last_seen=NOW)
    assert changes(instance, [writing]) == {}
    bigger = changes(instance, [seen("a", vcpus=4)])
    assert bigger["vcpus"] == 4
    assert bigger["description"].vcpus == 4


def test_during_a_move_both_ends_may_report_it_and_nothing_is_touched() -> None:
    move = LiveMove("a", "b", parked=False, waiting=False)
    moving = make_instance(migration_id="m", update_time=LONG_AGO)
    off = seen("a", power_state=domain_pb2.POWER_STATE_SHUTOFF)
    assert changes(moving, [off, seen("b")], move) == {}
    assert changes(moving, [], move) == {}
    assert changes(moving, [off, seen("c")], move) == {"conflict": "hosts/a, hosts/c"}


def test_while_it_awaits_confirm_only_its_power_state_follows() -> None:
    move = LiveMove("a", "b", parked=True, waiting=True)
    resized = make_instance(host="b", migration_id="m", vm_state=VmState.RESIZED)
    off = seen("b", power_state=domain_pb2.POWER_STATE_SHUTOFF, vcpus=9)
    assert changes(resized, [off], move) == {"power_state": PowerState.SHUTOFF}


def test_a_parked_machine_that_somebody_defined_again_on_its_source_is_a_conflict() -> None:
    copying = LiveMove("a", "b", parked=True, waiting=False)
    moving = make_instance(migration_id="m")
    assert changes(moving, [seen("a")], copying) == {"conflict": "hosts/a, hosts/b"}
    waiting = LiveMove("a", "b", parked=True, waiting=True)
    resized = make_instance(host="b", migration_id="m", vm_state=VmState.RESIZED)
    assert changes(resized, [seen("a"), seen("b")], waiting) == {"conflict": "hosts/a, hosts/b"}
    again = make_instance(host="b", migration_id="m", conflict="hosts/a, hosts/b")
    assert changes(again, [seen("a", current=False), seen("b")], waiting) == {"conflict": ""}


sightings_of_one = st.lists(
    st.builds(
        lambda host, current, power, held: seen(
            host, current=current, power_state=power, migration_id=held
        ),
        st.sampled_from("abcd"),
        st.booleans(),
        st.integers(0, 7),
        st.sampled_from(["", "m", "other"]),
    ),
    max_size=4,
    unique_by=lambda sighting: sighting.host,
)
moves = st.one_of(
    st.none(),
    st.builds(LiveMove, st.just("a"), st.just("b"), st.booleans(), st.booleans()),
)


@given(sightings_of_one, moves, st.sampled_from(list(VmState)), st.booleans())
def test_a_report_never_changes_the_owner_and_settles_at_once(
    sightings: list[Sighting], move: LiveMove | None, vm_state: VmState, released: bool
) -> None:
    instance = make_instance(vm_state=vm_state, released=released, update_time=LONG_AGO)
    first = changes(instance, sightings, move)
    assert not first.keys() & {"host", "uid", "migration_id", "released", "locked_by"}
    before: dict[str, Any] = {"vm_state": vm_state, "released": released}
    settled = make_instance(**(before | {"update_time": LONG_AGO} | first))
    assert changes(settled, sightings, move) == {}
