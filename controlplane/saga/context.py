"""One saga while a runner holds it: its log as it grows, and what its steps are handed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from sqlalchemy import Connection

from controlplane.saga.definition import Saga, Step, Token, decode, encode
from controlplane.saga.log import Event, EventKind, SagaState, SagaView, apply, fold
from controlplane.saga.store import Lease, SagaStore, Transactions
from controlplane.saga.testing import CrashPoints

log = structlog.stdlib.get_logger(__name__)
T = TypeVar("T")
Listener = Callable[[SagaView], None]
"""Told of a saga after each of its events, in the process that conducts it; must not block."""


class CancelledFirst(Exception):
    """A cancel was accepted before the event that would have made it too late; nothing was written.

    Without this the caller would be told that the saga turns, and it would not.
    """


class Conduct:
    """A held saga. Every write goes through here, fenced by the lease."""

    def __init__(
        self,
        saga: Saga,
        view: SagaView,
        lease: Lease,
        transactions: Transactions,
        store: SagaStore,
        resources: Any,
        crash: CrashPoints,
        tell: Listener,
    ) -> None:
        self.saga = saga
        self.view = view
        self.lease = lease
        self.status = fold(view.events)
        self.cancel_requested = view.cancel_requested
        self.attempt = max(1, view.attempt)
        self.params = decode(view.params, saga.params)
        self.resources = resources
        self._transactions = transactions
        self._store = store
        self._crash = crash
        self._tell = tell

    def context(self, step: Step) -> Context:
        """What a step is handed."""
        return Context(self, step)

    async def append(
        self,
        kind: EventKind,
        *,
        step: str = "",
        state: SagaState | None = None,
        output: Any = None,
        error: Mapping[str, Any] | None = None,
        unless_cancelled: bool = False,
    ) -> None:
        """Write an event, with what it means for domain rows, in one transaction.

        Args:
            kind: What it says.
            step: The step it is about.
            state: What the saga's state becomes; None to leave it.
            output: Output of the step.
            error: Why.
            unless_cancelled: True for an event after which no cancel is accepted.

        Raises:
            LostLease: Another runner has claimed the saga.
            CancelledFirst: A cancel had been accepted by then.
        """

        def write(tx: Connection) -> None:
            cancelled = self._append(tx, kind, step=step, state=state, output=output, error=error)
            if unless_cancelled and cancelled:
                raise CancelledFirst(self.view.id)

        await self._crash("before-append", self.view.id, step, kind.value)
        await self._transactions.run(write)
        self._advance()
        await self._crash("after-append", self.view.id, step, kind.value)

    async def act_in_transaction(self, step: Step) -> None:
        """Run a DB action and record its success, together or not at all."""

        def write(tx: Connection) -> None:
            self._store.check_lease(tx, self.lease)
            result = step.action(tx, self.context(step))  # type: ignore[call-arg, arg-type]
            output = encode(result) if step.output else None
            self._append(tx, EventKind.SUCCEEDED, step=step.name, output=output)

        await self._crash("before-append", self.view.id, step.name, EventKind.SUCCEEDED.value)
        await self._transactions.run(write)
        self._advance()
        await self._crash("after-append", self.view.id, step.name, EventKind.SUCCEEDED.value)

    async def undo_in_transaction(self, step: Step) -> None:
        """Run a DB undo and record its success, together or not at all."""

        def write(tx: Connection) -> None:
            assert step.undo is not None
            self._store.check_lease(tx, self.lease)
            step.undo(tx, self.context(step))  # type: ignore[call-arg, arg-type]
            self._append(tx, EventKind.UNDO_FINISHED, step=step.name)

        await self._crash("before-append", self.view.id, step.name, EventKind.UNDO_FINISHED.value)
        await self._transactions.run(write)
        self._advance()
        await self._crash("after-append", self.view.id, step.name, EventKind.UNDO_FINISHED.value)

    async def release_for_retry(
        self, step: Step, pause_seconds: float, error: Mapping[str, Any]
    ) -> None:
        """Give the saga up until it is time for the next attempt."""

        def write(tx: Connection) -> None:
            self._store.release(tx, self.lease, pause_seconds, attempt=self.attempt + 1)
            if self.saga.retrying is not None:
                self.saga.retrying(tx, self.view, step, self.attempt, error)

        await self._transactions.run(write)

    async def fenced(self, function: Callable[[Connection], T]) -> T:
        """Run a function in a transaction that fails when the lease was lost."""

        def write(tx: Connection) -> T:
            self._store.check_lease(tx, self.lease)
            return function(tx)

        return await self._transactions.run(write)

    def _append(
        self,
        tx: Connection,
        kind: EventKind,
        *,
        step: str = "",
        state: SagaState | None = None,
        output: Any = None,
        error: Mapping[str, Any] | None = None,
    ) -> bool:
        appended = self._store.append(
            tx, self.lease, kind, step=step, state=state, output=output, error=error
        )
        event = appended.event
        self._pending = dataclasses.replace(
            self.view,
            state=state or self.view.state,
            attempt=event.attempt,
            cancel_requested=self.cancel_requested or appended.cancel_requested,
            events=(*self.view.events, event),
        )
        self.saga.observe(tx, self._pending, event)
        return appended.cancel_requested

    def _advance(self) -> None:
        """Take over what was written, now that it is committed."""
        self.view = self._pending
        _tell(self.view.events[-1])
        self.attempt = max(1, self.view.attempt)
        self.cancel_requested = self.view.cancel_requested
        apply(self.status, self.view.events[-1])
        self._tell(self.view)


def _tell(event: Event) -> None:
    trouble = event.error is not None
    fields: dict[str, Any] = {"step": event.step} if event.step else {}
    if event.error is not None:
        fields |= {"reason": event.error.get("reason"), "error": event.error.get("message")}
    words = event.kind.value.lower().replace("_", " ")
    (log.warning if trouble else log.info)(words, generation=event.generation, **fields)


@dataclass(frozen=True)
class Context:
    """See `controlplane.saga.definition.StepContext`."""

    conduct: Conduct
    _step: Step

    @property
    def saga_id(self) -> str:
        """UUID of the saga."""
        return self.conduct.view.id

    @property
    def subject(self) -> str:
        """What the saga is about."""
        return self.conduct.view.subject

    @property
    def params(self) -> Any:
        """The saga's parameters, decoded."""
        return self.conduct.params

    @property
    def token(self) -> Token:
        """The fence for calls to other machines."""
        return Token(self.conduct.view.seq, self.conduct.lease.generation)

    @property
    def step(self) -> str:
        """Name of the step."""
        return self._step.name

    @property
    def attempt(self) -> int:
        """How often it was tried, from 1."""
        return self.conduct.attempt

    @property
    def unwinding(self) -> bool:
        """True while undos run."""
        return self.conduct.status.state is SagaState.UNWINDING

    @property
    def cancel_requested(self) -> bool:
        """True once somebody has asked for a cancel."""
        return self.conduct.cancel_requested

    @property
    def resources(self) -> Any:
        """What the runner was built with."""
        return self.conduct.resources

    def output(self, step: str) -> Any:
        """Output of an earlier step, decoded."""
        kind = self.conduct.saga.step(step).output
        if kind is None:
            raise KeyError(f"step {step!r} has no output")
        return decode(self.conduct.status.outputs[step], kind)

    def output_or_none(self, step: str) -> Any | None:
        """Output of an earlier step, or None."""
        return self.output(step) if step in self.conduct.status.outputs else None

    async def transaction(self, function: Callable[[Connection], T]) -> T:
        """Run a function in a transaction that fails when the lease was lost."""
        return await self.conduct.fenced(function)
