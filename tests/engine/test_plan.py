"""The pure parts: folding a log, planning; with generated histories."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.saga.definition import Saga
from controlplane.saga.log import (
    Event,
    EventKind,
    IllegalTransition,
    SagaState,
    SagaStatus,
    StepStatus,
    apply,
    fold,
)
from controlplane.saga.plan import Next, Verb, past_pivot, plan
from tests.engine.toy import STEPS, toy

NAMES = [step.name for step in STEPS]
LEGAL = [
    (None, EventKind.STARTED, StepStatus.RUNNING),
    (StepStatus.RUNNING, EventKind.SUCCEEDED, StepStatus.DONE),
    (StepStatus.RUNNING, EventKind.FAILED, StepStatus.FAILED),
    (StepStatus.RUNNING, EventKind.UNDO_STARTED, StepStatus.UNDOING),
    (StepStatus.DONE, EventKind.UNDO_STARTED, StepStatus.UNDOING),
    (StepStatus.FAILED, EventKind.UNDO_STARTED, StepStatus.UNDOING),
    (StepStatus.TO_RETRY, EventKind.STARTED, StepStatus.RUNNING),
    (StepStatus.TO_RETRY, EventKind.UNDO_STARTED, StepStatus.UNDOING),
    (StepStatus.UNDOING, EventKind.UNDO_FINISHED, StepStatus.UNDONE),
    (StepStatus.UNDOING, EventKind.UNDO_FAILED, StepStatus.UNDO_FAILED),
]
FORWARD = {EventKind.STARTED, EventKind.SUCCEEDED, EventKind.FAILED}
STEP_EVENTS = sorted({kind for _, kind, _ in LEGAL})


@pytest.mark.parametrize("state", list(SagaState))
@pytest.mark.parametrize("kind", STEP_EVENTS)
@pytest.mark.parametrize("before", [None, *StepStatus])
def test_every_transition_of_a_step(
    before: StepStatus | None, kind: EventKind, state: SagaState
) -> None:
    status = SagaStatus(state=state)
    if before is not None:
        status.steps["copy"] = before
    after = {(b, k): a for b, k, a in LEGAL}.get((before, kind))
    right_way = state is (SagaState.RUNNING if kind in FORWARD else SagaState.UNWINDING)
    event = Event(seq=1, kind=kind, step="copy")
    if after is not None and right_way:
        apply(status, event)
        assert status.steps["copy"] is after
    else:
        with pytest.raises(IllegalTransition):
            apply(status, event)


@pytest.mark.parametrize("state", list(SagaState))
@pytest.mark.parametrize(
    "kind",
    [
        EventKind.UNWINDING,
        EventKind.STUCK,
        EventKind.RETRIED,
        EventKind.DONE,
        EventKind.UNDONE,
        EventKind.ABANDONED,
    ],
)
def test_every_transition_of_a_saga(state: SagaState, kind: EventKind) -> None:
    legal = {
        (SagaState.RUNNING, EventKind.UNWINDING),
        (SagaState.RUNNING, EventKind.DONE),
        (SagaState.RUNNING, EventKind.STUCK),
        (SagaState.UNWINDING, EventKind.STUCK),
        (SagaState.UNWINDING, EventKind.UNDONE),
        (SagaState.STUCK, EventKind.RETRIED),
        (SagaState.STUCK, EventKind.ABANDONED),
    }
    status = SagaStatus(state=state)
    if (state, kind) in legal:
        apply(status, Event(seq=1, kind=kind))
    else:
        with pytest.raises(IllegalTransition):
            apply(status, Event(seq=1, kind=kind))


@dataclasses.dataclass
class History:
    """A saga that lives through what the generator decides."""

    saga: Saga
    status: SagaStatus = dataclasses.field(default_factory=SagaStatus)
    events: list[Event] = dataclasses.field(default_factory=list)
    cancelled: bool = False
    present: set[str] = dataclasses.field(default_factory=set)

    def write(self, kind: EventKind, step: str = "") -> None:
        """Append an event; folding it must be legal."""
        event = Event(seq=len(self.events) + 1, kind=kind, step=step)
        apply(self.status, event)
        self.events.append(event)

    def next(self) -> Next:
        """What the planner says."""
        return plan(self.saga, self.status, cancel_requested=self.cancelled)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), pivot=st.sampled_from([None, *NAMES]))
def test_any_history_ends_and_leaves_the_world_whole(
    data: st.DataObject, pivot: str | None
) -> None:
    """Whatever fails, however often, the plan leads to an end in which all or nothing is there."""
    history = History(toy(pivot=pivot))
    retries = 0
    for _ in range(200):
        if not history.cancelled and not past_pivot(history.saga, history.status):
            history.cancelled = data.draw(st.sampled_from([False] * 9 + [True]), label="cancel")
        following = history.next()
        step = following.step.name if following.step else ""
        bad = data.draw(st.sampled_from([False] * 4 + [True]), label="fails") and retries < 5
        match following.verb:
            case Verb.START:
                history.write(EventKind.STARTED, step)
            case Verb.ACT:
                half = data.draw(st.booleans(), label="half happened") if bad else True
                if half:
                    history.present.add(step)
                history.write(EventKind.FAILED if bad else EventKind.SUCCEEDED, step)
            case Verb.START_UNDO:
                history.write(EventKind.UNDO_STARTED, step)
            case Verb.UNDO:
                if not bad:
                    history.present.discard(step)
                history.write(EventKind.UNDO_FAILED if bad else EventKind.UNDO_FINISHED, step)
            case Verb.UNWIND:
                assert not past_pivot(history.saga, history.status)
                history.write(EventKind.UNWINDING)
            case Verb.GET_STUCK:
                history.write(EventKind.STUCK)
            case Verb.FINISH:
                history.write(EventKind.DONE)
            case Verb.FINISH_UNDONE:
                history.write(EventKind.UNDONE)
            case Verb.REST:
                if history.status.state is not SagaState.STUCK:
                    break
                retries += 1
                history.write(EventKind.RETRIED)
    assert history.status.state in (SagaState.DONE, SagaState.UNDONE)
    done = history.status.state is SagaState.DONE
    assert history.present == (set(NAMES) if done else set())
    if pivot is not None and any(e.step == pivot for e in history.events):
        assert done, "no way back past the pivot"
    assert fold(history.events).steps == history.status.steps


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(list(EventKind)), st.sampled_from(["", *NAMES])), max_size=12
    )
)
def test_any_garbage_is_folded_or_refused(events: list[tuple[EventKind, str]]) -> None:
    log = [Event(seq=n, kind=kind, step=step) for n, (kind, step) in enumerate(events, 1)]
    try:
        status = fold(log)
    except IllegalTransition:
        return
    plan(toy(), status, cancel_requested=False)
