"""The invariants that docs/architecture.md promises, each attacked on real hosts.

README.md beside this file lists all of them with the tests that attack them.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from contextlib import closing

import pytest

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.common.rpc import TlsPaths
from hostd.v1 import fence_pb2
from hostd.v1 import host_service_pb2 as hostd
from tests.e2e.fleet import GUEST, Fleet, Move
from tests.hostd.fleet import HostClient
from tests.lab.host import IMAGES, Host
from tests.lab.lab import FLEET, CommandFailed
from tests.lab.wait import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

FORGER = "forger"


def test_the_parked_copy_stays_while_the_target_lacks_a_disk(fleet: Fleet) -> None:
    """Never the only copy: what was moved is looked at before anything is deleted."""
    move = fleet.migrate()
    move.expect_moved()
    move.target.virsh("destroy", GUEST)
    disk = move.target.inside(f"{IMAGES}/{GUEST}.qcow2")
    disk.unlink()

    with pytest.raises(CommandFailed, match="DISK_MISSING"):
        move.confirm()

    move.wait_for_state("AWAITING_CONFIRM")
    move.revert()
    move.expect_back()


def test_a_machine_defined_again_on_its_source_is_told_and_its_parked_copy_stays(
    fleet: Fleet,
) -> None:
    """Never the only copy: it was put back by hand, and Drover cannot know which one counts."""
    definition = fleet.source.virsh("dumpxml", "--inactive", "--security-info", GUEST)
    move = fleet.migrate()
    move.expect_moved()
    both = ", ".join(f"hosts/{name}" for name in sorted((move.source.name, move.target.name)))
    by_hand = move.source.inside("/run/by-hand.xml")
    by_hand.write_text(definition)
    move.source.virsh("define", "/run/by-hand.xml")
    wait_for(lambda: _conflict(fleet) == both, "the conflict is shown", interval_seconds=0.3)

    with pytest.raises(CommandFailed, match="INSTANCE_CONFLICT"):
        move.confirm()

    move.source.virsh("undefine", GUEST)
    by_hand.unlink()
    wait_for(lambda: not _conflict(fleet), "the conflict is over", interval_seconds=0.3)
    move.revert()
    move.expect_back()


def _conflict(fleet: Fleet) -> str:
    return str(fleet.lab.drover_json("instance", "show", GUEST)["conflict"])


def test_a_late_message_of_an_earlier_owner_does_nothing(fleet: Fleet) -> None:
    """One owner: a replica that was paused before the guest stopped now sends what it had in mind.

    Its messages would delete both copies. Its certificate is good; its fence is old.
    """
    move = fleet.migrate()
    move.expect_moved()
    for host, request in (
        (move.target, hostd.EnsureStoppedRequest(mode=hostd.EnsureStoppedRequest.MODE_FORCE)),
        (move.target, hostd.EnsureAbsentRequest()),
        (move.source, hostd.DiscardParkedRequest()),
    ):
        request.fence.CopyFrom(_fence_of_an_earlier_owner(fleet, move))
        with closing(_client(fleet, host)) as client, pytest.raises(DroverError) as refused:
            client(request)
        assert refused.value.reason is Reason.STALE_GENERATION

    assert move.target.state(GUEST) == "running"
    move.revert()
    move.expect_back()


def _fence_of_an_earlier_owner(fleet: Fleet, move: Move) -> fence_pb2.Fence:
    migration_id = move.name.partition("/")[2]
    return fence_pb2.Fence(
        domain_uuid=fleet.guest.uuid,
        migration_id=migration_id,
        saga_id=migration_id,
        saga_seq=1,
        generation=1,
        step="late",
    )


def _client(fleet: Fleet, host: Host) -> HostClient:
    """A client with the certificate of the control plane."""
    pki = fleet.lab.pki
    tls = TlsPaths(cert=pki / "client.pem", key=pki / "client.key", ca=pki / "ca.pem")
    return HostClient(f"{host.address}:7442", host.name, tls, FLEET)


def test_a_move_that_is_refused_costs_the_guest_nothing(fleet: Fleet) -> None:
    """A failure is no outage: what can be known beforehand is, on the hosts as they are now."""
    source, target = fleet.source, fleet.target
    before = source.virsh("qemu-monitor-command", GUEST, "--hmp", "info status")
    emulator = _emulator_of(source)
    stranger = target.path(f"{IMAGES}/{GUEST}.qcow2")
    stranger.write_bytes(b"somebody else's")
    try:
        with pytest.raises(CommandFailed, match="TARGET_FILE_EXISTS"):
            fleet.lab.drover("migrate", GUEST, "--host", target.name)
    finally:
        kept = stranger.read_bytes()
        stranger.unlink()

    assert kept == b"somebody else's"
    assert _emulator_of(source) == emulator
    assert source.virsh("qemu-monitor-command", GUEST, "--hmp", "info status") == before
    assert "DROVER POWEROFF" not in source.console(GUEST)


def _emulator_of(host: Host) -> str:
    return host.path(f"/run/libvirt/qemu/{GUEST}.pid").read_text()


@pytest.fixture
def forger(fleet: Fleet) -> Iterator[Host]:
    """The host of a machine that is off and whose raw disk pretends to be a qcow2 image.

    The header, which any guest could write to its own disk, names /etc/passwd as
    the backing file: whoever believed it would read the host's files for the guest.
    """
    home = fleet.source
    home.define_guest(FORGER, format="raw", start=False)
    backing = b"/etc/passwd"
    header = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 72, len(backing), 16, 2**20, 0, 1, 2**16, 2**17, 1, 0, 0
    )
    with home.path(f"{IMAGES}/{FORGER}.raw").open("r+b") as disk:
        disk.write(header + backing)
    wait_for(lambda: fleet.lab.answers("instance", "show", FORGER), "adoption")
    yield home
    fleet.lab.drover("instance", "release", FORGER)
    for host in fleet.lab.hosts.values():
        if host.state(FORGER):
            host.remove_guest(FORGER)


def test_a_machine_arrives_as_it_was_whatever_it_wrote(fleet: Fleet, forger: Host) -> None:
    """Same machine, no guessing: the definition word for word, the disk byte for byte."""
    definition = _definition(forger)
    digest = _digest(forger)
    target = fleet.target

    fleet.lab.drover("migrate", FORGER, "--host", target.name, "--confirm", "auto")

    assert _definition(target) == definition
    assert "type='raw'" in definition
    assert _digest(target) == digest
    assert forger.state(FORGER) == ""
    assert target.state(FORGER) == "shut off"


def _definition(host: Host) -> str:
    return host.virsh("dumpxml", "--inactive", "--security-info", FORGER)


def _digest(host: Host) -> str:
    return hashlib.sha256(host.inside(f"{IMAGES}/{FORGER}.raw").read_bytes()).hexdigest()
