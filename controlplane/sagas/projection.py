"""What a saga's events mean for the rows that users see.

Called by the kernel in the transaction of each event, so that the log, the
state of the move, the state of the machine and the claims change together or
not at all. What a move holds goes in the transaction that ends it, whichever
way it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from controlplane.domain.model import Migration
from controlplane.domain.states import MigrationState, PowerState, TaskState, VmState, vm_state_of
from controlplane.saga.definition import Observer, Step
from controlplane.saga.log import Event, EventKind, SagaState, SagaView, fold
from controlplane.store import claims, instances, migrations


@dataclass(frozen=True)
class Phase:
    """What users see while a step is at work."""

    migration: MigrationState
    task: TaskState


@dataclass(frozen=True)
class Endings:
    """What becomes of the move when its saga ends.

    Attributes:
        done: Called when every step is done.
        undone: Called when every step is undone.
    """

    done: Callable[[Connection, Migration, SagaView], None]
    undone: Callable[[Connection, Migration, SagaView], None]


def project(kind: str, phases: Mapping[str, Phase], endings: Endings) -> Observer:
    """The observer of a saga."""

    def observe(tx: Connection, saga: SagaView, event: Event) -> None:
        row = migrations.get(tx, saga.params["migration_id"])
        migrations.add_event(
            tx, row.id, kind, event.step, _kind(event), _sentence(kind, event), event.error
        )
        match event.kind:
            case EventKind.STARTED:
                _enter(tx, row, event, phases[event.step])
            case EventKind.FAILED | EventKind.UNDO_FAILED:
                migrations.update(tx, row.id, error=event.error)
            case EventKind.UNDO_STARTED:
                migrations.update(tx, row.id, step=event.step, attempt=event.attempt)
            case EventKind.SUCCEEDED if row.error is not None:
                migrations.update(tx, row.id, error=None)
            case EventKind.UNWINDING:
                migrations.update(
                    tx,
                    row.id,
                    state=MigrationState.UNWINDING,
                    cancel_requested=saga.cancel_requested,
                )
            case EventKind.STUCK:
                migrations.update(tx, row.id, state=MigrationState.STUCK)
            case EventKind.RETRIED:
                _resume(tx, row, saga, phases)
            case EventKind.DONE:
                endings.done(tx, row, saga)
            case EventKind.UNDONE:
                endings.undone(tx, row, saga)
            case EventKind.ABANDONED:
                abandon(tx, row, event)

    return observe


def labels(saga: SagaView) -> Mapping[str, str]:
    """The fields by which log lines of a move are found."""
    return {
        "migration": saga.params["migration_id"],
        "instance": saga.subject.removeprefix("instances/"),
    }


def note_retry(
    tx: Connection, saga: SagaView, step: Step, attempt: int, error: Mapping[str, Any]
) -> None:
    """Let users see that, and why, a step is being tried again."""
    migrations.update(tx, saga.params["migration_id"], step=step.name, attempt=attempt, error=error)


def _enter(tx: Connection, row: Migration, event: Event, phase: Phase) -> None:
    migrations.update(
        tx, row.id, state=phase.migration, step=event.step, attempt=event.attempt, error=None
    )
    instances.update(tx, row.instance_uid, task_state=phase.task)


def _resume(tx: Connection, row: Migration, saga: SagaView, phases: Mapping[str, Phase]) -> None:
    unwinding = fold(saga.events).state is SagaState.UNWINDING
    state = MigrationState.UNWINDING if unwinding else phases[row.step].migration
    migrations.update(tx, row.id, state=state, error=None)


def _kind(event: Event) -> str:
    return event.kind.value if event.step else "STATE"


def _sentence(saga: str, event: Event) -> str:
    if event.error is not None and "message" in event.error:
        return str(event.error["message"])
    if event.step:
        return f"{event.step}: {event.kind.value.lower().replace('_', ' ')}"
    return f"{saga}: {event.kind.value.lower()}"


def failure_of(saga: SagaView) -> Mapping[str, Any] | None:
    """What turned the saga, whatever was in the way of its undos; None when a cancel did."""
    return fold(saga.events).failure


# --- endings -------------------------------------------------------------------


def settle(tx: Connection, row: Migration, power: PowerState | None) -> None:
    """Free the machine: no move, no task, and the stable state that its power says."""
    instance = instances.get(tx, row.instance_uid)
    instances.update(
        tx,
        instance.uid,
        vm_state=vm_state_of(power) or instance.vm_state,
        power_state=power or instance.power_state,
        task_state=None,
        migration_id="",
    )


def abandon(tx: Connection, row: Migration, event: Event) -> None:
    """An operator gave up: the claim goes, the machine needs a look."""
    claims.drop(tx, claims.migration_consumer(row.id))
    migrations.update(tx, row.id, state=MigrationState.ABANDONED, error=event.error)
    instances.update(tx, row.instance_uid, vm_state=VmState.ERROR, task_state=None, migration_id="")
