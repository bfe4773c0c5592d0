"""A saga with one step of each sort, for tests of the engine itself."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from controlplane.saga.definition import Saga, Step, StepContext, StepKind, Wait
from controlplane.store import sql_saga
from tests.engine.harness import FencedRemote, ignore

TOY_METADATA = sa.MetaData()
toy_rows = sa.Table(
    "toy_rows",
    TOY_METADATA,
    sa.Column("subject", sa.String(64), primary_key=True),
    sa.Column("step", sa.String(32), primary_key=True),
)


class ToyParams(msgspec.Struct, frozen=True):
    """Parameters.

    Attributes:
        polls: How often the remote step "poll" has to be looked at.
    """

    polls: int = 2


class Polled(msgspec.Struct, frozen=True):
    """Output of "poll"."""

    looks: int


def _remote(name: str) -> Step:
    async def act(ctx: StepContext) -> None:
        ctx.resources.ensure(ctx, name)

    async def undo(ctx: StepContext) -> None:
        ctx.resources.ensure_absent(ctx, name)

    return Step(name, StepKind.REMOTE, act, undo, None, "")


def _db(name: str) -> Step:
    def act(tx: Connection, ctx: StepContext) -> None:
        tx.execute(sa.insert(toy_rows).values(subject=ctx.subject, step=name))

    def undo(tx: Connection, ctx: StepContext) -> None:
        tx.execute(
            sa.delete(toy_rows).where(toy_rows.c.subject == ctx.subject, toy_rows.c.step == name)
        )

    return Step(name, StepKind.DB, act, undo, None, "")


_looks: dict[str, int] = {}


async def _poll(ctx: StepContext) -> Polled | Wait:
    ctx.resources.ensure(ctx, "poll")
    _looks[ctx.saga_id] = _looks.get(ctx.saga_id, 0) + 1
    if _looks[ctx.saga_id] < ctx.params.polls:
        return Wait(0.01)
    return Polled(looks=_looks[ctx.saga_id])


async def _unpoll(ctx: StepContext) -> None:
    ctx.resources.ensure_absent(ctx, "poll")


STEPS = (
    _db("record"),
    _remote("prepare"),
    Step("poll", StepKind.REMOTE, _poll, _unpoll, Polled, ""),
    _db("switch"),
    _remote("start"),
)


def toy(*, pivot: str | None = None, steps: Sequence[Step] = STEPS) -> Saga:
    """The definition."""
    return Saga("toy", 1, ToyParams, tuple(steps), pivot, ignore)


class ToyWorld:
    """One subject of the toy saga."""

    def __init__(self, *, pivot: str | None = None, polls: int = 2) -> None:
        self.saga = toy(pivot=pivot)
        self.resources = FencedRemote()
        self.subject = f"toys/{uuid.uuid4()}"
        self._polls = polls

    def begin(self, tx: Connection) -> str:
        """Create the saga."""
        TOY_METADATA.create_all(tx)
        return sql_saga.create(tx, self.saga, self.subject, ToyParams(self._polls))

    def check_done(self, tx: Connection) -> None:
        """Every effect is there, once."""
        assert self.resources.present.get(self.subject) == {"prepare", "poll", "start"}
        assert self._rows(tx) == {"record", "switch"}

    def check_undone(self, tx: Connection) -> None:
        """Nothing is left."""
        assert not self.resources.present.get(self.subject)
        assert self._rows(tx) == set()

    def _rows(self, tx: Connection) -> set[str]:
        query = sa.select(toy_rows.c.step).where(toy_rows.c.subject == self.subject)
        return set(tx.execute(query).scalars())


__all__ = ["STEPS", "TOY_METADATA", "Polled", "ToyParams", "ToyWorld", "toy"]
