"""Migration records: what a move has done to this host, written before it does it.

On the source:

                    park              discard
    (no record) -> PARKING -> PARKED -> DISCARDING -> DISCARDED
                      |          |
                      +----------+-- unpark --> UNPARKING -> (no record)

On the target:

                prepare             build             undefine
    (no record) ------> PREPARED -> BUILDING -> BUILT --------> UNDEFINED
                           |            |         |                 |
                           +------------+---------+---- remove -----+--> REMOVING -> (no record)

A phase in -ING means that the effect may have happened in part; the ensure-call
is repeated until it is whole. Only BUILT lets a machine start on a target, and
PARKING to DISCARDED keep it from starting on a source.

A record of a stop (`StopRecord`) belongs to a migration on either side; see
`hostd.stopping`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from google.protobuf import json_format

from hostd.state import StateFile, now
from hostd.v1 import domain_pb2, host_service_pb2, preflight_pb2


class SourcePhase(StrEnum):
    """Where the source half of a move stands."""

    PARKING = "PARKING"
    PARKED = "PARKED"
    UNPARKING = "UNPARKING"
    DISCARDING = "DISCARDING"
    DISCARDED = "DISCARDED"


class TargetPhase(StrEnum):
    """Where the target half of a move stands."""

    PREPARED = "PREPARED"
    BUILDING = "BUILDING"
    BUILT = "BUILT"
    UNDEFINED = "UNDEFINED"
    REMOVING = "REMOVING"


@dataclass(frozen=True)
class SourceRecord:
    """What a move did on the host it leaves.

    Attributes:
        migration_id: The move.
        domain_uuid: The machine.
        phase: Where it stands.
        parked: What EnsureParked answered; empty before PARKED.
    """

    migration_id: str
    domain_uuid: str
    phase: SourcePhase
    parked: host_service_pb2.EnsureParkedResponse = field(
        default_factory=host_service_pb2.EnsureParkedResponse
    )


@dataclass(frozen=True)
class TargetRecord:
    """What a move did on the host it goes to.

    Attributes:
        migration_id: The move.
        domain_uuid: The machine.
        phase: Where it stands.
        was_built: True once BUILT was reached: the guest may have written since,
            so the digests of the copy no longer describe the files.
        machine: What PrepareTarget was told.
        placements: volume_id -> (root, name) of the volumes that come here.
        reservations: Root name -> bytes counted against its free space.
    """

    migration_id: str
    domain_uuid: str
    phase: TargetPhase
    was_built: bool = False
    machine: preflight_pb2.IncomingMachine = field(default_factory=preflight_pb2.IncomingMachine)
    placements: dict[str, tuple[str, str]] = field(default_factory=dict)
    reservations: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CreatedFile:
    """A file that a move creates on its target.

    Attributes:
        volume_id: The volume that it is.
        root: Directory that it lies beneath.
        name: Path relative to the root.
    """

    volume_id: str
    root: Path
    name: str

    @property
    def path(self) -> Path:
        """Absolute path."""
        return self.root / self.name


class StopState(StrEnum):
    """Where a stop stands. GUARDED: the guest was started again and is looked after."""

    STOPPING = "STOPPING"
    STOPPED = "STOPPED"
    FAILED = "FAILED"
    GUARDED = "GUARDED"


@dataclass(frozen=True)
class StopRecord:
    """A stop that was asked for.

    Attributes:
        migration_id: The move.
        domain_uuid: The machine.
        saga_id: The saga that asked.
        previous_power_state: What the machine did before.
        mode: How it is brought down.
        timeout_seconds: How long the guest may take.
        retry_seconds: Time between two ACPI requests.
        deadline: Wall-clock time at which the guest's time is up; in GUARDED, at
            which the guard ends.
        state: Where the stop stands.
        forced: True when the guest was powered off.
        error: `DroverError.to_json` of the failure, in FAILED.
    """

    migration_id: str
    domain_uuid: str
    saga_id: str
    previous_power_state: domain_pb2.PowerState.ValueType
    mode: host_service_pb2.EnsureStoppedRequest.Mode.ValueType
    timeout_seconds: float
    retry_seconds: float
    deadline: float
    state: StopState
    forced: bool = False
    error: dict[str, object] | None = None


class Records:
    """The records of all moves that touch this host.

    Args:
        state: Where they are kept.
    """

    def __init__(self, state: StateFile) -> None:
        self._state = state

    # --- source

    def source(self, migration_id: str) -> SourceRecord | None:
        """The source half of a move, or None."""
        with self._state.transaction() as tx:
            row = tx.execute(
                "SELECT * FROM source WHERE migration_id=?", (migration_id,)
            ).fetchone()
        if row is None:
            return None
        return SourceRecord(
            row["migration_id"],
            row["domain_uuid"],
            SourcePhase(row["phase"]),
            json_format.Parse(row["parked"], host_service_pb2.EnsureParkedResponse()),
        )

    def put_source(self, record: SourceRecord) -> None:
        """Write the source half of a move; durable when it returns."""
        with self._state.transaction() as tx:
            tx.execute(
                "INSERT OR REPLACE INTO source VALUES (?, ?, ?, ?, ?)",
                (
                    record.migration_id,
                    record.domain_uuid,
                    record.phase.value,
                    json_format.MessageToJson(record.parked, indent=None),
                    now(),
                ),
            )

    def drop_source(self, migration_id: str) -> None:
        """Forget the source half of a move."""
        with self._state.transaction() as tx:
            tx.execute("DELETE FROM source WHERE migration_id=?", (migration_id,))

    def sources_of(self, domain_uuid: str) -> list[SourceRecord]:
        """The source halves of all moves of a machine that this host remembers."""
        with self._state.transaction() as tx:
            rows = tx.execute(
                "SELECT migration_id FROM source WHERE domain_uuid=?", (domain_uuid,)
            ).fetchall()
            found = [self.source(row["migration_id"]) for row in rows]
        return [record for record in found if record is not None]

    # --- target

    def target(self, migration_id: str) -> TargetRecord | None:
        """The target half of a move, or None."""
        with self._state.transaction() as tx:
            row = tx.execute(
                "SELECT * FROM target WHERE migration_id=?", (migration_id,)
            ).fetchone()
        if row is None:
            return None
        placements = json.loads(row["placements"])
        return TargetRecord(
            row["migration_id"],
            row["domain_uuid"],
            TargetPhase(row["phase"]),
            bool(row["was_built"]),
            json_format.Parse(row["machine"], preflight_pb2.IncomingMachine()),
            {volume_id: (root, name) for volume_id, (root, name) in placements.items()},
            json.loads(row["reservations"]),
        )

    def put_target(self, record: TargetRecord) -> None:
        """Write the target half of a move; durable when it returns."""
        with self._state.transaction() as tx:
            tx.execute(
                "INSERT OR REPLACE INTO target VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    record.migration_id,
                    record.domain_uuid,
                    record.phase.value,
                    int(record.was_built),
                    json_format.MessageToJson(record.machine, indent=None),
                    json.dumps(record.placements),
                    json.dumps(record.reservations),
                    now(),
                ),
            )

    def set_target_phase(self, record: TargetRecord, phase: TargetPhase) -> TargetRecord:
        """Move the target half to a phase; durable when it returns."""
        moved = replace(
            record, phase=phase, was_built=record.was_built or phase is TargetPhase.BUILT
        )
        self.put_target(moved)
        return moved

    def drop_target(self, migration_id: str) -> None:
        """Forget the target half of a move and the files it created."""
        with self._state.transaction() as tx:
            tx.execute("DELETE FROM created_file WHERE migration_id=?", (migration_id,))
            tx.execute("DELETE FROM target WHERE migration_id=?", (migration_id,))

    def targets(self) -> list[TargetRecord]:
        """The target halves of all moves that this host remembers."""
        with self._state.transaction() as tx:
            rows = tx.execute("SELECT migration_id FROM target ORDER BY migration_id").fetchall()
            found = [self.target(row["migration_id"]) for row in rows]
        return [record for record in found if record is not None]

    def reserved_bytes(self, *, but: str = "") -> dict[str, int]:
        """Bytes that running moves have reserved, by root name.

        Args:
            but: A migration whose own reservation does not count.
        """
        total: dict[str, int] = {}
        for record in self.targets():
            if record.migration_id == but:
                continue
            for root, size_bytes in record.reservations.items():
                total[root] = total.get(root, 0) + size_bytes
        return total

    # --- files that a move creates on its target

    def add_created_file(self, migration_id: str, file: CreatedFile) -> None:
        """Note a file before it is created; durable when it returns."""
        with self._state.transaction() as tx:
            tx.execute(
                "INSERT OR REPLACE INTO created_file VALUES (?, ?, ?, ?)",
                (migration_id, file.volume_id, str(file.root), file.name),
            )

    def created_files(self, migration_id: str) -> dict[str, CreatedFile]:
        """The files that a move may have created here, by volume id."""
        with self._state.transaction() as tx:
            rows = tx.execute(
                "SELECT * FROM created_file WHERE migration_id=? ORDER BY volume_id",
                (migration_id,),
            ).fetchall()
        return {
            row["volume_id"]: CreatedFile(row["volume_id"], Path(row["root"]), row["name"])
            for row in rows
        }

    def drop_created_file(self, migration_id: str, volume_id: str) -> None:
        """Forget a file that is gone again."""
        with self._state.transaction() as tx:
            tx.execute(
                "DELETE FROM created_file WHERE migration_id=? AND volume_id=?",
                (migration_id, volume_id),
            )

    # --- stops

    def stop(self, migration_id: str) -> StopRecord | None:
        """The stop of a move on this host, or None."""
        with self._state.transaction() as tx:
            row = tx.execute("SELECT * FROM stop WHERE migration_id=?", (migration_id,)).fetchone()
        if row is None:
            return None
        return StopRecord(
            row["migration_id"],
            row["domain_uuid"],
            row["saga_id"],
            row["previous_power_state"],
            row["mode"],
            row["timeout_seconds"],
            row["retry_seconds"],
            row["deadline"],
            StopState(row["state"]),
            bool(row["forced"]),
            json.loads(row["error"]) if row["error"] else None,
        )

    def put_stop(self, record: StopRecord) -> None:
        """Write a stop; durable when it returns."""
        with self._state.transaction() as tx:
            tx.execute(
                "INSERT OR REPLACE INTO stop VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    record.migration_id,
                    record.domain_uuid,
                    record.saga_id,
                    record.previous_power_state,
                    record.mode,
                    record.timeout_seconds,
                    record.retry_seconds,
                    record.deadline,
                    record.state.value,
                    int(record.forced),
                    json.dumps(record.error) if record.error else None,
                ),
            )

    def drop_stop(self, migration_id: str) -> None:
        """Forget a stop."""
        with self._state.transaction() as tx:
            tx.execute("DELETE FROM stop WHERE migration_id=?", (migration_id,))

    def unfinished_stops(self) -> list[StopRecord]:
        """Stops that a restarted hostd has to go on with."""
        with self._state.transaction() as tx:
            rows = tx.execute(
                "SELECT migration_id FROM stop WHERE state IN (?, ?)",
                (StopState.STOPPING.value, StopState.GUARDED.value),
            ).fetchall()
            found = [self.stop(row["migration_id"]) for row in rows]
        return [record for record in found if record is not None]
