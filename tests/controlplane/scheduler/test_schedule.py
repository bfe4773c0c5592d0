from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.common.reasons import Reason
from controlplane.domain.capacity import limits_of, needed_by_root, needed_bytes
from controlplane.domain.model import Ratios, Size
from controlplane.domain.placement import no_valid_host
from controlplane.domain.states import HostState
from controlplane.scheduler.filters import FILTERS, first_refusal
from controlplane.scheduler.request import HostView, Neighbour, Request
from controlplane.scheduler.schedule import schedule
from hostd.v1 import domain_pb2, host_pb2
from tests.controlplane.machines import GIB, NOW, make_domain, make_facts, make_instance


def view(name: str = "b", facts: dict[str, Any] | None = None, **changes: Any) -> HostView:
    found = make_facts(name, **(facts or {}))
    values: dict[str, Any] = {
        "name": name,
        "facts": found,
        "limits": limits_of(found, Ratios()),
        "last_seen": NOW,
    }
    return HostView(**(values | changes))


def at(seconds: int) -> Timestamp:
    """A host's clock that is ahead of the control plane's."""
    return Timestamp(seconds=int(NOW.timestamp()) + seconds)


def ask(machine: dict[str, Any] | None = None, **changes: Any) -> Request:
    domain = make_domain(**(machine or {}))
    values: dict[str, Any] = {
        "machine": domain,
        "size": Size(
            vcpus=domain.vcpus, memory_mib=domain.memory_mib, disk_bytes=needed_bytes(domain)
        ),
        "needed_by_root": needed_by_root(domain),
        "source": "a",
    }
    return Request(**(values | changes))


NETWORK = domain_pb2.NetworkInterface(mac_address="52:54:00:00:00:09", type="network", source="lan")
SMALL_ROOT = host_pb2.StorageRoot(
    name="images", capacity_bytes=10 * GIB, available_bytes=GIB, device_id=7
)


@pytest.mark.parametrize(
    ("request_", "host", "reason", "told"),
    [
        (ask(), view("a"), Reason.SAME_HOST, "already"),
        (ask(requested_host="c"), view(), Reason.HOST_NOT_REQUESTED, "hosts/c"),
        (
            ask(),
            view(state=HostState.DISABLED, state_reason="new disks"),
            Reason.HOST_DISABLED,
            "new disks",
        ),
        (ask(), view(state=HostState.GONE, state_reason="fire"), Reason.HOST_GONE, "fire"),
        (ask(), view(state=HostState.JOINING), Reason.HOST_NOT_JOINED, "not joined"),
        (ask(), HostView(name="b"), Reason.HOST_NOT_JOINED, "not reported"),
        (ask(), view(alive=False), Reason.HOST_DEAD, "2026-01-02 03:04:05"),
        (ask(), view(facts={"libvirt_connected": False}), Reason.LIBVIRT_UNAVAILABLE, "libvirt"),
        (ask(), view(facts={"time": at(61)}), Reason.TARGET_CLOCK_SKEW, "61 s ahead of"),
        (ask(), view(facts={"time": at(-61)}), Reason.TARGET_CLOCK_SKEW, "61 s behind"),
        (ask(), view(facts={"arch": "aarch64"}), Reason.TARGET_LACKS_VIRT_TYPE, "aarch64"),
        (ask(), view(facts={"virt_types": ["qemu"]}), Reason.TARGET_LACKS_VIRT_TYPE, "kvm"),
        (
            ask(),
            view(facts={"machine_types": ["pc"]}),
            Reason.TARGET_LACKS_MACHINE_TYPE,
            "pc-q35-7.2",
        ),
        (ask({"firmware": "efi"}), view(), Reason.TARGET_LACKS_FIRMWARE, "efi"),
        (ask({"has_tpm": True}), view(), Reason.TARGET_LACKS_TPM, "swtpm"),
        (ask(), view(facts={"bridges": ["br9"]}), Reason.TARGET_LACKS_BRIDGE, "br0; it has br9"),
        (ask({"interfaces": [NETWORK]}), view(), Reason.TARGET_LACKS_NETWORK, "lan"),
        (ask(), view(claimed=Size(vcpus=31)), Reason.TARGET_LACKS_CPUS, "1 of 32 virtual CPUs"),
        (
            ask(),
            view(claimed=Size(memory_mib=16000)),
            Reason.TARGET_LACKS_MEMORY,
            "384 of 16384 MiB",
        ),
        (ask(needed_by_root={"fast": 1}), view(), Reason.TARGET_LACKS_ROOT, "fast; it has images"),
        (ask(), view(facts={"roots": [SMALL_ROOT]}), Reason.TARGET_LACKS_SPACE, "1.0 GiB are free"),
        (ask(), view(claimed=Size(disk_bytes=79 * GIB)), Reason.TARGET_LACKS_SPACE, "need 2.0 GiB"),
        (
            ask(),
            view(neighbours=(Neighbour(name="web1", uuid="u"),)),
            Reason.TARGET_NAME_TAKEN,
            "web1",
        ),
        (
            ask(),
            view(neighbours=(Neighbour(name="x", uuid=make_domain().uuid),)),
            Reason.TARGET_UUID_TAKEN,
            make_domain().uuid,
        ),
        (
            ask(),
            view(neighbours=(Neighbour(name="x", uuid="u", mac="52:54:00:00:00:01"),)),
            Reason.TARGET_MAC_TAKEN,
            "52:54:00:00:00:01",
        ),
    ],
)
def test_every_refusal_has_its_reason_and_its_numbers(
    request_: Request, host: HostView, reason: Reason, told: str
) -> None:
    placement = schedule(request_, [host])
    assert placement.chosen_host == ""
    (verdict,) = placement.verdicts
    assert not verdict.fits
    assert verdict.reason == reason.name
    assert told in verdict.message
    assert verdict.weight == 0


def test_every_filter_can_refuse() -> None:
    assert len({check.__name__ for check in FILTERS}) == len(FILTERS) == 18
    assert first_refusal(ask(), view()) is None


def test_the_roomiest_host_with_the_fewest_moves_is_first() -> None:
    placement = schedule(
        ask(),
        [
            view("a"),
            view("full", claimed=Size(memory_mib=16384)),
            view("half", claimed=Size(memory_mib=8192)),
            view("busy", moves=3),
            view("roomy"),
        ],
    )
    assert placement.chosen_host == "roomy"
    assert [v.host for v in placement.verdicts] == ["roomy", "half", "busy", "a", "full"]
    assert "15360 of 16384 MiB" in placement.verdicts[0].message
    assert placement.estimated_bytes == 2 * GIB


def test_equal_hosts_are_ordered_by_name() -> None:
    placement = schedule(ask(), [view("d"), view("c"), view("b")])
    assert [v.host for v in placement.verdicts] == ["b", "c", "d"]


def test_the_refusal_names_every_host() -> None:
    placement = schedule(ask(), [view("a"), view("b", state=HostState.DISABLED)])
    error = no_valid_host(placement, make_instance())
    assert error.reason is Reason.NO_VALID_HOST
    assert [(v.subject, v.type) for v in error.violations] == [
        ("hosts/a", "SAME_HOST"),
        ("hosts/b", "HOST_DISABLED"),
    ]
    assert "hosts/b: It is disabled." in error.message


def test_a_named_host_gives_its_own_reason() -> None:
    hosts = [view("a"), view("b", facts={"bridges": []})]
    placement = schedule(ask(requested_host="b"), hosts)
    error = no_valid_host(placement, make_instance(), "b")
    assert error.reason is Reason.TARGET_LACKS_BRIDGE
    assert [v.subject for v in error.violations] == ["hosts/b"]


def test_a_large_fleet_is_told_by_reason_and_fits_into_trailers() -> None:
    hosts = [view(f"h{n:04}", facts={"bridges": []}) for n in range(2000)]
    hosts += [view("off", state=HostState.DISABLED)]
    error = no_valid_host(schedule(ask(), hosts), make_instance())
    assert [v.type for v in error.violations] == ["TARGET_LACKS_BRIDGE", "HOST_DISABLED"]
    assert error.violations[0].description.startswith("2000 hosts, as hosts/h0000: ")
    assert error.to_status().ByteSize() < 4096


sizes = st.builds(
    Size,
    vcpus=st.integers(0, 40),
    memory_mib=st.integers(0, 20000),
    disk_bytes=st.integers(0, 120 * GIB),
)
views = st.builds(
    lambda name, state, alive, claimed, moves, bridges, neighbours: view(
        name,
        facts={"bridges": bridges},
        state=state,
        alive=alive,
        claimed=claimed,
        moves=moves,
        neighbours=neighbours,
    ),
    st.text("abcdefgh", min_size=1, max_size=2),
    st.sampled_from(list(HostState)),
    st.booleans(),
    sizes,
    st.integers(0, 5),
    st.sampled_from([["br0"], []]),
    st.sampled_from([(), (Neighbour(name="web1", uuid="u"),)]),
)
fleets = st.lists(views, max_size=6, unique_by=lambda host: host.name)


@given(fleets, st.sampled_from(["", "a", "b", "zz"]), st.randoms())
@settings(max_examples=150)
def test_no_refused_host_is_chosen_and_every_host_has_a_verdict(
    hosts: list[HostView], requested: str, random: Any
) -> None:
    request = ask(requested_host=requested)
    placement = schedule(request, hosts)
    assert sorted(v.host for v in placement.verdicts) == sorted(h.name for h in hosts)
    refused = {h.name for h in hosts if first_refusal(request, h) is not None}
    assert {v.host for v in placement.verdicts if not v.fits} == refused
    assert placement.chosen_host not in refused
    assert bool(placement.chosen_host) == (len(refused) < len(hosts))
    for verdict in placement.verdicts:
        assert verdict.message
        assert bool(verdict.reason) != verdict.fits
    weights = [v.weight for v in placement.verdicts if v.fits]
    assert weights == sorted(weights, reverse=True)
    shuffled = list(hosts)
    random.shuffle(shuffled)
    assert schedule(request, shuffled) == placement


@given(fleets, views)
def test_another_host_changes_nobodys_verdict(hosts: list[HostView], more: HostView) -> None:
    more = replace(more, name="newcomer")
    before = {v.host: v for v in schedule(ask(), hosts).verdicts}
    after = {v.host: v for v in schedule(ask(), [*hosts, more]).verdicts}
    assert before.items() <= after.items()
