"""The log of a saga, folded into its status.

Of one step:

    (nothing) -- STARTED --> running -- SUCCEEDED --> done ----+
                                |                               |
                                +------ FAILED ----> failed --+ |
                                |                             | |
                                +-----------------------------+-+-- UNDO_STARTED --> undoing
                                                                                       |
                                              undone <-- UNDO_FINISHED ----------------+
                                              undo failed <-- UNDO_FAILED -------------+

An operator's RETRIED makes failed steps and failed undos "to be retried":

    to be retried -- STARTED --> running          to be retried -- UNDO_STARTED --> undoing

Of the saga, events without a step: UNWINDING, STUCK, RETRIED, DONE, UNDONE,
ABANDONED.

    RUNNING --> DONE        RUNNING --> UNWINDING --> UNDONE
    RUNNING | UNWINDING --> STUCK --> (retry) the one before | (abandon) ABANDONED

A sequence of events that these pictures do not show is a bug or a damaged
database; folding it raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any


class EventKind(StrEnum):
    """What an event says."""

    STARTED = "STARTED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    UNDO_STARTED = "UNDO_STARTED"
    UNDO_FINISHED = "UNDO_FINISHED"
    UNDO_FAILED = "UNDO_FAILED"
    UNWINDING = "UNWINDING"
    STUCK = "STUCK"
    RETRIED = "RETRIED"
    DONE = "DONE"
    UNDONE = "UNDONE"
    ABANDONED = "ABANDONED"


class SagaState(StrEnum):
    """Where a saga stands."""

    RUNNING = "RUNNING"
    UNWINDING = "UNWINDING"
    STUCK = "STUCK"
    DONE = "DONE"
    UNDONE = "UNDONE"
    ABANDONED = "ABANDONED"


LIVE_STATES = (SagaState.RUNNING, SagaState.UNWINDING, SagaState.STUCK)
"""A subject has at most one saga in these."""

CLAIMABLE_STATES = (SagaState.RUNNING, SagaState.UNWINDING)
"""A runner has something to do in these."""


class StepStatus(StrEnum):
    """Where a step stands."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    UNDOING = "undoing"
    UNDONE = "undone"
    UNDO_FAILED = "undo failed"
    TO_RETRY = "to be retried"


@dataclass(frozen=True)
class Event:
    """One line of the log.

    Attributes:
        seq: Position, from 1.
        kind: What it says.
        step: The step it is about; empty for the saga as a whole.
        generation: Generation under which it was written.
        attempt: How often the step had been tried by then.
        output: Output of the step, for SUCCEEDED.
        error: Why, for FAILED, UNDO_FAILED, STUCK and ABANDONED.
        time: When.
    """

    seq: int
    kind: EventKind
    step: str = ""
    generation: int = 0
    attempt: int = 0
    output: Any = None
    error: Mapping[str, Any] | None = None
    time: datetime | None = None


@dataclass(frozen=True)
class SagaView:
    """A saga as read from the store, with its log."""

    id: str
    seq: int
    subject: str
    kind: str
    version: int
    params: Any
    state: SagaState
    generation: int
    owner: str
    attempt: int
    cancel_requested: bool
    error: Mapping[str, Any] | None
    create_time: datetime
    update_time: datetime
    events: tuple[Event, ...] = ()


class IllegalTransition(Exception):
    """The log holds a sequence of events that cannot be."""


@dataclass
class SagaStatus:
    """The log, folded.

    Attributes:
        steps: Status of every step that was started, in order of first start.
        outputs: Output of every step that has succeeded.
        state: State of the saga.
        failure: The error that turned the saga, None while it goes forward or
            when a cancel did.
        obstacle: The error that the saga got stuck on, or will: of a failed undo,
            or of a step that failed past the pivot.
    """

    steps: dict[str, StepStatus] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    state: SagaState = SagaState.RUNNING
    failure: Mapping[str, Any] | None = None
    obstacle: Mapping[str, Any] | None = None
    _before_stuck: SagaState = SagaState.RUNNING


_STEP_TRANSITIONS: Mapping[tuple[StepStatus | None, EventKind], StepStatus] = {
    (None, EventKind.STARTED): StepStatus.RUNNING,
    (StepStatus.TO_RETRY, EventKind.STARTED): StepStatus.RUNNING,
    (StepStatus.RUNNING, EventKind.SUCCEEDED): StepStatus.DONE,
    (StepStatus.RUNNING, EventKind.FAILED): StepStatus.FAILED,
    (StepStatus.RUNNING, EventKind.UNDO_STARTED): StepStatus.UNDOING,
    (StepStatus.DONE, EventKind.UNDO_STARTED): StepStatus.UNDOING,
    (StepStatus.FAILED, EventKind.UNDO_STARTED): StepStatus.UNDOING,
    (StepStatus.TO_RETRY, EventKind.UNDO_STARTED): StepStatus.UNDOING,
    (StepStatus.UNDOING, EventKind.UNDO_FINISHED): StepStatus.UNDONE,
    (StepStatus.UNDOING, EventKind.UNDO_FAILED): StepStatus.UNDO_FAILED,
}

_FORWARD = frozenset({EventKind.STARTED, EventKind.SUCCEEDED, EventKind.FAILED})

_SAGA_TRANSITIONS: Mapping[tuple[SagaState, EventKind], SagaState] = {
    (SagaState.RUNNING, EventKind.UNWINDING): SagaState.UNWINDING,
    (SagaState.RUNNING, EventKind.DONE): SagaState.DONE,
    (SagaState.RUNNING, EventKind.STUCK): SagaState.STUCK,
    (SagaState.UNWINDING, EventKind.STUCK): SagaState.STUCK,
    (SagaState.UNWINDING, EventKind.UNDONE): SagaState.UNDONE,
    (SagaState.STUCK, EventKind.ABANDONED): SagaState.ABANDONED,
}


def fold(events: Iterable[Event]) -> SagaStatus:
    """Fold a log into a status.

    Raises:
        IllegalTransition: The events cannot have happened in this order.
    """
    status = SagaStatus()
    for event in events:
        apply(status, event)
    return status


def apply(status: SagaStatus, event: Event) -> None:
    """Take one more event into a status.

    Raises:
        IllegalTransition: The event cannot follow.
    """
    if event.step:
        _apply_to_step(status, event)
    else:
        _apply_to_saga(status, event)


def _apply_to_step(status: SagaStatus, event: Event) -> None:
    forward = event.kind in _FORWARD
    expected = SagaState.RUNNING if forward else SagaState.UNWINDING
    after = _STEP_TRANSITIONS.get((status.steps.get(event.step), event.kind))
    if after is None or status.state is not expected:
        raise IllegalTransition(
            f"event {event.seq}: {event.kind} of step {event.step!r}, which is "
            f"{status.steps.get(event.step, 'not started')} in a saga that is {status.state}"
        )
    status.steps[event.step] = after
    if event.kind is EventKind.SUCCEEDED:
        status.outputs[event.step] = event.output
    elif event.kind is EventKind.FAILED:
        status.failure = status.obstacle = event.error
    elif event.kind is EventKind.UNDO_FAILED:
        status.obstacle = event.error
    elif event.kind is EventKind.STARTED:
        status.failure = status.obstacle = None


def _apply_to_saga(status: SagaStatus, event: Event) -> None:
    if event.kind is EventKind.RETRIED and status.state is SagaState.STUCK:
        status.state = status._before_stuck
        for step, step_status in status.steps.items():
            if step_status in (StepStatus.FAILED, StepStatus.UNDO_FAILED):
                status.steps[step] = StepStatus.TO_RETRY
        return
    after = _SAGA_TRANSITIONS.get((status.state, event.kind))
    if after is None:
        raise IllegalTransition(f"event {event.seq}: {event.kind} of a saga that is {status.state}")
    if after is SagaState.STUCK:
        status._before_stuck = status.state
    status.state = after
