"""What a saga is: steps, each an action with the undo that takes it back.

A step is of one of two kinds. A DB action runs inside the transaction that
records its success: it happens exactly once. A REMOTE action talks to other
machines: it may run again at any time, so it names an end state and not a
change, and so does its undo.

An action or undo that is not through yet returns `Wait`; the saga is then
released, by whoever runs it, until the time has come to look again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import msgspec
from sqlalchemy import Connection

if TYPE_CHECKING:
    from controlplane.saga.log import Event, SagaView

T = TypeVar("T")


class StepKind(StrEnum):
    """Where a step has its effect."""

    DB = "db"
    REMOTE = "remote"


@dataclass(frozen=True, order=True)
class Token:
    """The fence that travels with every call to another machine.

    Compared as a pair: generations begin anew with each saga, the sequence
    orders the sagas of one subject.

    Attributes:
        seq: Position of the saga among all sagas.
        generation: How often it has been claimed.
    """

    seq: int
    generation: int


@dataclass(frozen=True)
class Wait:
    """Not through yet: look again.

    Attributes:
        seconds: When.
    """

    seconds: float


class StepFailed(Exception):
    """A definite failure that is not a DroverError.

    Attributes:
        error: JSON to keep with the failure: {reason, message, ...}.
    """

    def __init__(self, error: Mapping[str, Any]) -> None:
        super().__init__(f"{error.get('reason')}: {error.get('message')}")
        self.error = dict(error)


class LostLease(Exception):
    """Somebody else has claimed the saga; whatever this runner does next does not count."""


class SubjectBusy(Exception):
    """The subject has a live saga already."""


class PastPivot(Exception):
    """The saga has passed its point of no return."""


class NotStuck(Exception):
    """The saga is not waiting for an operator."""


class StepContext(Protocol):
    """What an action or an undo works with."""

    @property
    def saga_id(self) -> str:
        """UUID of the saga."""
        ...

    @property
    def subject(self) -> str:
        """What the saga is about; at most one live saga has it."""
        ...

    @property
    def params(self) -> Any:
        """The saga's parameters, decoded."""
        ...

    @property
    def token(self) -> Token:
        """The fence for calls to other machines."""
        ...

    @property
    def step(self) -> str:
        """Name of the step."""
        ...

    @property
    def attempt(self) -> int:
        """How often it was tried, from 1."""
        ...

    @property
    def unwinding(self) -> bool:
        """True while undos run."""
        ...

    @property
    def cancel_requested(self) -> bool:
        """True once somebody has asked for a cancel."""
        ...

    @property
    def resources(self) -> Any:
        """What the runner was built with."""
        ...

    def output(self, step: str) -> Any:
        """Output of an earlier step, decoded.

        Raises:
            KeyError: The step has not succeeded.
        """
        ...

    def output_or_none(self, step: str) -> Any | None:
        """Output of an earlier step, or None."""
        ...

    async def transaction(self, function: Callable[[Connection], T]) -> T:
        """Run a function in a transaction that fails when the lease was lost.

        Raises:
            LostLease: Another runner has claimed the saga; nothing was written.
        """
        ...


DbAction: TypeAlias = Callable[[Connection, StepContext], Any]
RemoteAction: TypeAlias = Callable[[StepContext], Awaitable[Any]]
Observer: TypeAlias = "Callable[[Connection, SagaView, Event], None]"
RetryObserver: TypeAlias = "Callable[[Connection, SagaView, Step, int, Mapping[str, Any]], None]"


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: Verb phrase, unique in its saga, as "copy".
        kind: Where it has its effect.
        action: Brings the effect about.
        undo: Makes sure that the effect is absent, also when it never was there;
            None when there is nothing to undo.
        output: Type of what the action returns, None when it returns nothing.
        doc: Why the undo is what it is, or why there is none.
    """

    name: str
    kind: StepKind
    action: DbAction | RemoteAction
    undo: DbAction | RemoteAction | None
    output: type[Any] | None
    doc: str


@dataclass(frozen=True)
class Saga:
    """A list of steps known at import time.

    Attributes:
        kind: Name of the saga.
        version: Raised when the steps change so that stored logs no longer fit;
            the old definition stays importable until no live saga uses it.
        params: Type of the parameters.
        steps: In order.
        pivot: Name of the step from whose start on there is no way back; None
            when all of the saga can be undone.
        observe: Called in the transaction of every event, to write down in
            domain rows what the event means.
        retrying: Called when a step will be tried again because its outcome is
            not known, with the number of the attempt and the error.
        labels: What a saga is about: fields of every line that is logged while it
            is conducted, as {"migration": id}.
    """

    kind: str
    version: int
    params: type[Any]
    steps: tuple[Step, ...]
    pivot: str | None
    observe: Observer
    retrying: RetryObserver | None = None
    labels: Callable[[SagaView], Mapping[str, str]] = lambda saga: {}

    def __post_init__(self) -> None:
        names = [step.name for step in self.steps]
        if len(set(names)) != len(names):
            raise ValueError(f"saga {self.kind}: step names repeat")
        if self.pivot is not None and self.pivot not in names:
            raise ValueError(f"saga {self.kind}: no step {self.pivot!r} to pivot on")

    def index(self, step: str) -> int:
        """Position of a step.

        Raises:
            KeyError: There is no such step.
        """
        for position, candidate in enumerate(self.steps):
            if candidate.name == step:
                return position
        raise KeyError(step)

    def step(self, name: str) -> Step:
        """The step of that name.

        Raises:
            KeyError: There is no such step.
        """
        return self.steps[self.index(name)]


def encode(value: Any) -> Any:
    """A parameter or output as plain JSON."""
    return msgspec.to_builtins(value)


def decode(value: Any, kind: type[T]) -> T:
    """A parameter or output from plain JSON.

    Raises:
        msgspec.ValidationError: It does not fit the type.
    """
    return msgspec.convert(value, kind)
