"""Worlds for the matrix: a move, a confirm and a revert over the model of hosts."""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from sqlalchemy import Connection

from controlplane.domain.model import Migration, Size
from controlplane.domain.states import HostState, MigrationState, PowerState, TaskState, VmState
from controlplane.sagas import CONFIRM, MOVE, REVERT, MigrationParams, MoveResources
from controlplane.store import claims, hosts, instances, migrations, sql_saga
from controlplane.store.saga_tables import sagas
from controlplane.store.types import utc_now
from controlplane.v1 import migration_pb2
from hostd.v1 import domain_pb2, job_pb2
from tests.controlplane.machines import make_domain, make_facts
from tests.controlplane.sagas.model import ModelFleet


class MoveWorld:
    """A machine on host a whose move to host b has been admitted; host c is the alternate.

    Args:
        running: Whether the guest ran.
    """

    saga = MOVE

    def __init__(self, *, running: bool = True) -> None:
        power = domain_pb2.POWER_STATE_RUNNING if running else domain_pb2.POWER_STATE_SHUTOFF
        uid = str(uuid.uuid4())
        self.running = running
        self.domain = make_domain(uuid=uid, name=f"vm-{uid[:8]}", power_state=power)
        self.fleet = ModelFleet(self.domain, "a", "b", "c")
        self.fleet.settle_on("a", running=running)
        self.resources = MoveResources(fleet="lab", hosts=self.fleet, poll_seconds=0.01)
        self.migration_id = ""

    def begin(self, tx: Connection) -> str:
        """What CreateMigration's transaction does."""
        for name in ("a", "b", "c"):
            if hosts.find(tx, name) is None:
                hosts.create(tx, name, adopt_domains=True)
                hosts.update(tx, name, state=HostState.ENABLED)
                hosts.record_report(tx, name, make_facts(name), utc_now())
        vm_state = VmState.ACTIVE if self.running else VmState.STOPPED
        instance = instances.create(
            tx, host="a", domain=self.domain, vm_state=vm_state, project="default"
        )
        claims.put(tx, claims.instance_consumer(instance.uid), "a", instance.size)
        move = migrations.create(
            tx,
            instance=instance,
            target_host="b",
            flavor=None,
            options=migration_pb2.MigrationOptions(
                shutdown_mode=migration_pb2.MigrationOptions.SHUTDOWN_MODE_GRACEFUL_THEN_FORCE
            ),
            placement=migration_pb2.Placement(
                chosen_host="hosts/b",
                verdicts=[
                    migration_pb2.HostVerdict(host="hosts/b", fits=True, weight=2),
                    migration_pb2.HostVerdict(host="hosts/c", fits=True, weight=1),
                    migration_pb2.HostVerdict(host="hosts/a", reason="SAME_HOST"),
                ],
            ),
            created_by="drover://lab/admin/test",
            description=self.domain,
        )
        self.migration_id = move.id
        claims.put(tx, claims.migration_consumer(move.id), "b", instance.size)
        instances.update(tx, instance.uid, migration_id=move.id, task_state=TaskState.RESIZE_PREP)
        return self.start(tx, MOVE)

    def start(self, tx: Connection, saga: object) -> str:
        """Create a saga for the move."""
        saga_id = sql_saga.create(
            tx,
            saga,  # type: ignore[arg-type]
            f"instances/{self.domain.uuid}",
            MigrationParams(self.migration_id),
        )
        migrations.update(tx, self.migration_id, saga_id=saga_id)
        return saga_id

    def row(self, tx: Connection) -> Migration:
        """The move as stored."""
        return migrations.get(tx, self.migration_id)

    def check_done(self, tx: Connection) -> None:
        """The machine is on b and waits; a has the parked copy."""
        self.check_rests_on_target(tx)

    def check_undone(self, tx: Connection) -> None:
        """The machine is on a as it was, and nothing else is anywhere."""
        self.check_is_back(tx, MigrationState.FAILED, MigrationState.CANCELLED)

    def check_rests_on_target(self, tx: Connection, target: str = "b") -> None:
        """AWAITING_CONFIRM in every respect."""
        row, instance = self.row(tx), instances.get(tx, self.domain.uuid)
        assert row.state is MigrationState.AWAITING_CONFIRM
        assert (row.target_host, instance.host) == (target, target)
        assert (instance.vm_state, instance.task_state) == (VmState.RESIZED, None)
        assert instance.migration_id == row.id
        assert self.fleet.owner == [target]
        assert self.fleet.runs_on == ([target] if self.running else [])
        assert self.fleet.hosts["a"].parked
        self.check_claims(tx, instance_on=target, move_on="a")

    def check_is_back(self, tx: Connection, *states: MigrationState) -> None:
        """On a, running as before, with nothing left over."""
        row, instance = self.row(tx), instances.get(tx, self.domain.uuid)
        assert row.state in states
        assert instance.host == "a"
        self.check_is_free(tx)
        assert self.fleet.owner == ["a"]
        assert self.fleet.runs_on == (["a"] if self.running else [])
        self.check_claims(tx, instance_on="a", move_on="")

    def check_is_free(self, tx: Connection) -> None:
        """The machine has no task and no move, and no host has traces of one."""
        instance = instances.get(tx, self.domain.uuid)
        assert (instance.task_state, instance.migration_id) == (None, "")
        assert instance.vm_state is (VmState.ACTIVE if self.running else VmState.STOPPED)
        left = {h.name: h.traces for h in self.fleet.hosts.values() if h.traces}
        assert left == {}

    def check_claims(self, tx: Connection, *, instance_on: str, move_on: str) -> None:
        """Who holds room where."""
        own = claims.find(tx, claims.instance_consumer(self.domain.uuid))
        other = claims.find(tx, claims.migration_consumer(self.migration_id))
        size = Size(vcpus=self.domain.vcpus, memory_mib=self.domain.memory_mib)
        assert own is not None
        assert (own.host, own.size) == (instance_on, size)
        assert (other.host if other else "") == move_on


class MovedWorld(MoveWorld):
    """The same machine after its move, waiting; the base of confirm and revert."""

    def begin(self, tx: Connection) -> str:
        """Put everything where a finished move leaves it."""
        super().begin(tx)
        saga_id = migrations.get(tx, self.migration_id).saga_id
        _end(tx, saga_id)
        a, b = self.fleet.hosts["a"], self.fleet.hosts["b"]
        a.defined = a.running = False
        a.parked, a.ran_before_stop = True, self.running
        b.defined = b.prepared = b.received = b.ever_built = True
        b.running = self.running
        size = Size(vcpus=self.domain.vcpus, memory_mib=self.domain.memory_mib)
        claims.put(tx, claims.instance_consumer(self.domain.uuid), "b", size)
        claims.put(tx, claims.migration_consumer(self.migration_id), "a", size)
        instances.update(tx, self.domain.uuid, host="b", vm_state=VmState.RESIZED, task_state=None)
        migrations.update(
            tx,
            self.migration_id,
            state=MigrationState.AWAITING_CONFIRM,
            previous_power_state=PowerState.RUNNING if self.running else PowerState.SHUTOFF,
            receipts=[_receipt("vda"), _receipt("baggage")],
        )
        return self.start(tx, self.saga)

    def check_undone(self, tx: Connection) -> None:
        """As before: waiting."""
        self.check_rests_on_target(tx)


class ConfirmWorld(MovedWorld):
    """A confirm has been asked for."""

    saga = CONFIRM

    def check_done(self, tx: Connection) -> None:
        """Only b has the machine, and nothing of the move is left."""
        row, instance = self.row(tx), instances.get(tx, self.domain.uuid)
        assert row.state is MigrationState.CONFIRMED
        assert instance.host == "b"
        self.check_is_free(tx)
        assert not self.fleet.hosts["a"].disk
        assert self.fleet.runs_on == (["b"] if self.running else [])
        self.check_claims(tx, instance_on="b", move_on="")


class RevertWorld(MovedWorld):
    """A revert has been asked for."""

    saga = REVERT

    def check_done(self, tx: Connection) -> None:
        """The machine is back on a."""
        self.check_is_back(tx, MigrationState.REVERTED)


def _receipt(volume_id: str) -> job_pb2.VolumeReceipt:
    return job_pb2.VolumeReceipt(volume_id=volume_id, digest="ab", size_bytes=10)


def _end(tx: Connection, saga_id: str) -> None:
    tx.execute(sa.update(sagas).where(sagas.c.id == saga_id).values(state="DONE"))
