"""What comes next: a pure function of a definition, a log and the wish to cancel."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from controlplane.saga.definition import Saga, Step
from controlplane.saga.log import SagaState, SagaStatus, StepStatus


class Verb(StrEnum):
    """What a runner does next."""

    START = "start"
    """Record STARTED for the step, then act."""
    ACT = "act"
    """Run the action of a step that was started."""
    UNWIND = "unwind"
    """Turn round: record that undos run from here on."""
    START_UNDO = "start undo"
    """Record UNDO_STARTED for the step, then undo."""
    UNDO = "undo"
    """Run the undo of a step whose undo was started."""
    GET_STUCK = "get stuck"
    """Record that an operator is needed."""
    FINISH = "finish"
    """Record that all is done."""
    FINISH_UNDONE = "finish undone"
    """Record that all is undone."""
    REST = "rest"
    """Nothing: the saga has ended, or waits for an operator."""


@dataclass(frozen=True)
class Next:
    """A verb and the step it is about; None for the saga as a whole."""

    verb: Verb
    step: Step | None = None


def plan(saga: Saga, status: SagaStatus, *, cancel_requested: bool) -> Next:
    """Say what comes next.

    A cancel turns the saga at the next boundary before the pivot and is ignored
    after it. A failed step turns the saga before the pivot and gets it stuck
    after it.
    """
    match status.state:
        case SagaState.RUNNING:
            return _forward(saga, status, cancel_requested)
        case SagaState.UNWINDING:
            return _backward(saga, status)
        case _:
            return Next(Verb.REST)


def past_pivot(saga: Saga, status: SagaStatus) -> bool:
    """True once the step of no return was started."""
    return saga.pivot is not None and saga.pivot in status.steps


def _forward(saga: Saga, status: SagaStatus, cancel_requested: bool) -> Next:
    no_return = past_pivot(saga, status)
    if any(s is StepStatus.FAILED for s in status.steps.values()):
        return Next(Verb.GET_STUCK if no_return else Verb.UNWIND)
    if cancel_requested and not no_return:
        return Next(Verb.UNWIND)
    for step in saga.steps:
        match status.steps.get(step.name):
            case None | StepStatus.TO_RETRY:
                return Next(Verb.START, step)
            case StepStatus.RUNNING:
                return Next(Verb.ACT, step)
    return Next(Verb.FINISH)


def _backward(saga: Saga, status: SagaStatus) -> Next:
    for step in reversed(saga.steps):
        match status.steps.get(step.name):
            case None | StepStatus.UNDONE:
                continue
            case StepStatus.UNDOING:
                return Next(Verb.UNDO, step)
            case StepStatus.UNDO_FAILED:
                return Next(Verb.GET_STUCK, step)
            case _:
                return Next(Verb.START_UNDO, step)
    return Next(Verb.FINISH_UNDONE)
