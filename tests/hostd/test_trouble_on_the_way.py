"""Copies that must not happen, or break: the receiver believes nobody, and the guest is back."""

from __future__ import annotations

import secrets

import pytest

from controlplane.common.errors import DroverError
from controlplane.common.identity import host_identity
from controlplane.common.reasons import Reason
from hostd.v1 import host_service_pb2 as pb
from hostd.v1 import job_pb2
from tests.hostd.fleet import Guest, Move, TwoHosts
from tests.hostd.unchanged import both_unchanged
from tests.lab.wait import wait_for
from tests.support.pki import FLEET

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

STRANGER = "99999999-0000-4000-8000-000000000000"


class Copy:
    """One attempt to send a parked machine, with whatever the test gets wrong.

    Args:
        move: A move whose machine is parked.
    """

    def __init__(self, move: Move) -> None:
        self.move = move
        self.key = secrets.token_bytes(32)
        self.data_address = ""

    def open(self, *, sender: str = "", key: bytes = b"") -> None:
        opened = self.move.call(
            self.move.target,
            pb.OpenReceiveRequest(
                session_key=key or self.key,
                sender_identity=host_identity(FLEET, sender or self.move.source.name).uri,
                volumes=self.move.volumes,
            ),
        )
        self.data_address = opened.data_address

    def send(self, job: str, *, key: bytes = b"", receiver: str = "", to: str = "") -> job_pb2.Job:
        """Send and wait for the end."""
        request = pb.StartCopyRequest(
            fence=self.move.fence("StartCopy"),
            job_id=f"{self.move.id}/{job}",
            session_key=key or self.key,
            data_address=to or self.data_address,
            receiver_identity=host_identity(FLEET, receiver or self.move.target.name).uri,
            volume_ids=[volume.volume_id for volume in self.move.volumes],
        )
        client = self.move.source.client
        client(request)

        def ended() -> job_pb2.Job | None:
            found: job_pb2.Job = client(pb.GetJobRequest(job_id=request.job_id))
            return None if found.state == job_pb2.Job.STATE_RUNNING else found

        return wait_for(ended, "copy ended", timeout_seconds=120)


def failure(job: job_pb2.Job) -> DroverError:
    """Why a copy failed."""
    assert job.state in (job_pb2.Job.STATE_FAILED, job_pb2.Job.STATE_INTERRUPTED)
    error = DroverError.from_status(job.error)
    assert error is not None
    assert error.message
    return error


def mover_code(job: job_pb2.Job) -> str:
    """Why the receiver refused the session."""
    error = failure(job)
    assert error.reason is Reason.SESSION_REFUSED
    return error.metadata["mover_code"]


@pytest.fixture
def parked(fleet: TwoHosts, still_guest: Guest) -> Move:
    """A move whose machine is parked on `a` and prepared for on `b`."""
    move = Move(fleet["a"], fleet["b"], still_guest.uuid)
    move.prepare()
    move.stop()
    move.park()
    return move


def undone(fleet: TwoHosts, move: Move, name: str) -> None:
    """The machine is defined on `a` again, and `b` has nothing of it."""
    move.undo()
    assert fleet["a"].host.state(name) == "shut off"
    assert [file for file in fleet["b"].images() if name in file] == []
    assert fleet["b"].inventory().parked == fleet["a"].inventory().parked == []


def test_a_session_key_is_good_once_and_only_the_right_one(
    fleet: TwoHosts, still_guest: Guest, parked: Move
) -> None:
    copy = Copy(parked)
    copy.open()
    with both_unchanged(fleet):
        wrong = copy.send("wrong", key=secrets.token_bytes(32))
        assert mover_code(wrong) == "SESSION_KEY_WRONG"
    assert copy.send("right").state == job_pb2.Job.STATE_SUCCEEDED
    with both_unchanged(fleet):
        assert mover_code(copy.send("replayed")) == "SESSION_KEY_REPLAYED"
        # Not even when the session is opened with it once more.
        copy.open(key=secrets.token_bytes(32))
        copy.open()
        assert mover_code(copy.send("replayed-later")) == "SESSION_KEY_REPLAYED"
    undone(fleet, parked, still_guest.name)


def test_a_session_that_was_never_opened_is_refused(
    fleet: TwoHosts, still_guest: Guest, parked: Move
) -> None:
    copy = Copy(parked)
    with both_unchanged(fleet):
        job = copy.send("unopened", to=f"{fleet['b'].host.address}:7443")
        assert mover_code(job) == "SESSION_UNKNOWN"
    undone(fleet, parked, still_guest.name)


def test_another_hosts_certificate_sends_nothing(
    fleet: TwoHosts, still_guest: Guest, parked: Move
) -> None:
    copy = Copy(parked)
    copy.open(sender="c")
    with both_unchanged(fleet):
        assert failure(copy.send("as-a")).reason is Reason.UNAUTHENTICATED
    undone(fleet, parked, still_guest.name)


def test_another_host_than_the_target_receives_nothing(
    fleet: TwoHosts, still_guest: Guest, parked: Move
) -> None:
    copy = Copy(parked)
    copy.open()
    with both_unchanged(fleet):
        assert failure(copy.send("to-c", receiver="c")).reason is Reason.UNAUTHENTICATED
    undone(fleet, parked, still_guest.name)


def test_a_machine_is_not_built_from_other_bytes_than_were_sent(
    fleet: TwoHosts, still_guest: Guest, parked: Move
) -> None:
    parked.copy()
    parked.digests[0].digest = "0" * 64
    with both_unchanged(fleet):
        with pytest.raises(DroverError) as refused:
            parked.build()
        assert refused.value.reason is Reason.DIGEST_MISMATCH
        assert "vda" in refused.value.message
        with pytest.raises(DroverError) as unowned:
            parked.call(fleet["b"], pb.EnsureStartedRequest())
        assert unowned.value.reason is Reason.INSTANCE_NOT_OWNED
    undone(fleet, parked, still_guest.name)


def test_volumes_that_were_not_announced_are_not_taken(
    fleet: TwoHosts, still_guest: Guest, parked: Move
) -> None:
    parked.volumes[0].volume_id = "vdz"
    with both_unchanged(fleet):
        with pytest.raises(DroverError) as refused:
            Copy(parked).open()
        assert refused.value.reason is Reason.INVALID_FIELD
    undone(fleet, parked, still_guest.name)


def test_a_host_of_another_fleet_is_no_sender(
    fleet: TwoHosts, still_guest: Guest, parked: Move
) -> None:
    for sender in ("drover://other/host/a", f"drover://{FLEET}/admin/ada", "a", ""):
        request = pb.OpenReceiveRequest(
            session_key=secrets.token_bytes(32), sender_identity=sender, volumes=parked.volumes
        )
        with both_unchanged(fleet), pytest.raises(DroverError) as refused:
            parked.call(fleet["b"], request)
        assert refused.value.reason is Reason.INVALID_FIELD
    undone(fleet, parked, still_guest.name)


def test_another_moves_copy_is_neither_slowed_nor_cancelled(
    fleet: TwoHosts, still_guest: Guest, parked: Move
) -> None:
    """A fence speaks for the machine that it names, not for whatever job is asked for."""
    a = fleet["a"]
    parked.limit_bytes_per_second = 64 << 10
    job_id = parked.start_copy().job_id
    strangers = (Move(a, fleet["b"], STRANGER), Move(a, fleet["b"], still_guest.uuid, saga_seq=2))
    for stranger in strangers:
        for request in (
            pb.SetCopyLimitRequest(job_id=job_id, limit_bytes_per_second=1),
            pb.CancelJobRequest(job_id=job_id),
        ):
            with pytest.raises(DroverError) as refused:
                stranger.call(a, request)
            assert refused.value.reason is Reason.INVALID_FIELD
            assert refused.value.subject == "job_id"
            assert parked.id in refused.value.message
    assert parked.job().state == job_pb2.Job.STATE_RUNNING
    # One that has ended is not changed either.
    parked.saga_seq, parked.limit_bytes_per_second = 3, 0
    parked.call(a, pb.SetCopyLimitRequest(job_id=job_id, limit_bytes_per_second=0))
    ended = parked.copy()
    with pytest.raises(DroverError):
        Move(a, fleet["b"], STRANGER).call(a, pb.CancelJobRequest(job_id=job_id))
    assert parked.job() == ended
    undone(fleet, parked, still_guest.name)


def test_a_port_that_a_firewall_closes_is_found_out_before_anything_is_stopped(
    fleet: TwoHosts,
) -> None:
    a, b = fleet["a"], fleet["b"]
    address = b.inventory().facts.data_address
    ask = pb.CheckReachRequest(data_address=address)
    (check,) = a.client(ask).checks
    assert check.outcome == check.OUTCOME_PASS
    rule = ("INPUT", "-p", "tcp", "--dport", "7443", "-j", "REJECT")
    b.host.run("iptables", "-A", *rule)
    try:
        (check,) = a.client(ask).checks
    finally:
        b.host.run("iptables", "-D", *rule)
    assert (check.outcome, check.reason) == (check.OUTCOME_FAIL, Reason.TARGET_UNREACHABLE.name)
    assert f"a cannot connect to the data port {address}: Connection refused." in check.message
    assert check.fix


@pytest.mark.parametrize("address", ["", "b", "b:", ":7443", "b:x", "b:70000", "::1:7443", "b:\n1"])
def test_what_is_no_address_is_not_connected_to(fleet: TwoHosts, address: str) -> None:
    with pytest.raises(DroverError) as refused:
        fleet["a"].client(pb.CheckReachRequest(data_address=address))
    assert refused.value.reason is Reason.INVALID_FIELD
