r"""The runner: claims sagas that are due and executes what the planner says.

    due --claim--> held --plan, act, append, plan, ...--> ended
                    |  \-- Wait, Transient: release, due again later
                    \----- lease lost: drop everything, write nothing

Any number of runners work on one database. A saga is held by at most one of
them at a time; one that was paused for longer than its lease finds out at its
next write, or at its next call to a host, and does no harm.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy.exc import DBAPIError

from controlplane.common.errors import DroverError, Transient
from controlplane.common.reasons import Reason
from controlplane.saga.context import CancelledFirst, Conduct, Listener
from controlplane.saga.definition import LostLease, Saga, Step, StepFailed, StepKind, Wait, encode
from controlplane.saga.leases import Held, Leases
from controlplane.saga.log import CLAIMABLE_STATES, EventKind, SagaState
from controlplane.saga.plan import Next, Verb, past_pivot, plan
from controlplane.saga.store import Lease, SagaStore, Transactions
from controlplane.saga.testing import CrashPoints, no_crash

log = structlog.stdlib.get_logger(__name__)

_COUNT_SECONDS = 30.0
_UPGRADE = "Upgrade this replica, or run one of the version that began them until they end."

_TURNS: Mapping[Verb, tuple[EventKind, SagaState]] = {
    Verb.UNWIND: (EventKind.UNWINDING, SagaState.UNWINDING),
    Verb.GET_STUCK: (EventKind.STUCK, SagaState.STUCK),
    Verb.FINISH: (EventKind.DONE, SagaState.DONE),
    Verb.FINISH_UNDONE: (EventKind.UNDONE, SagaState.UNDONE),
}


@dataclass
class Stats:
    """What a runner has done so far; all but the last only go up.

    Attributes:
        claimed: Claims.
        released: Leases given back.
        lost_leases: Leases that somebody else took over.
        retries: Outcomes that were not known.
        stuck: Sagas that got stuck.
        finished: Sagas that ended.
        unclaimable: Live sagas of a kind or version that this runner does not
            know, when it last looked.
    """

    claimed: int = 0
    released: int = 0
    lost_leases: int = 0
    retries: int = 0
    stuck: int = 0
    finished: int = 0
    unclaimable: int = 0


@dataclass(frozen=True)
class RunnerConfig:
    """How a runner behaves.

    Attributes:
        lease_seconds: How long a claim holds without being renewed.
        poll_seconds: How often due sagas, cancels and lost leases are looked for.
        concurrency: Most sagas held at a time.
        backoff_seconds: First pause after an unknown outcome; doubled each time.
        backoff_cap_seconds: Longest pause.
    """

    lease_seconds: float = 30.0
    poll_seconds: float = 0.5
    concurrency: int = 256
    backoff_seconds: float = 0.5
    backoff_cap_seconds: float = 30.0

    def backoff(self, attempt: int) -> float:
        """Pause before the next attempt, with jitter so that many do not ask in step."""
        doubled = self.backoff_seconds * 2.0 ** min(attempt - 1, 16)
        pause = min(self.backoff_cap_seconds, doubled)
        return pause * random.uniform(0.75, 1.25)  # noqa: S311  # jitter, not a secret


class Runner:
    """Conducts sagas until stopped.

    Args:
        transactions: Runs functions in transactions.
        store: The kernel's store.
        sagas: Every definition that this runner can conduct, old versions too.
        resources: Handed to every step.
        config: How it behaves.
        crash_points: Fault injection of the tests; does nothing by default.
        tell: Told of each event after it was committed.
    """

    def __init__(
        self,
        transactions: Transactions,
        store: SagaStore,
        sagas: Sequence[Saga],
        resources: Any,
        config: RunnerConfig | None = None,
        crash_points: CrashPoints = no_crash,
        tell: Listener = lambda _: None,
    ) -> None:
        self.config = config or RunnerConfig()
        self.stats = Stats()
        self.owner = f"runner-{uuid.uuid4().hex[:12]}"
        self._transactions = transactions
        self._store = store
        self._sagas = {(saga.kind, saga.version): saga for saga in sagas}
        self._resources = resources
        self._crash = crash_points
        self._tell = tell
        self._leases = Leases(
            transactions,
            store,
            lease_seconds=self.config.lease_seconds,
            look_seconds=self.config.poll_seconds,
        )
        self._nudged = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []
        self._last_claim = 0.0
        self._last_count = -_COUNT_SECONDS

    async def start(self) -> None:
        """Begin to claim and conduct."""
        self._loops = [
            asyncio.create_task(self._claim_loop(), name="saga-claims"),
            asyncio.create_task(self._leases.keep(), name="saga-leases"),
        ]

    async def stop(self, grace_seconds: float = 10.0) -> None:
        """Stop claiming, interrupt what runs and release every lease."""
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        tasks = self._leases.tasks()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=grace_seconds)

    def nudge(self) -> None:
        """Look for due sagas now instead of at the next poll."""
        self._nudged.set()

    def healthy(self, within_seconds: float = 30.0) -> bool:
        """True when the claim loop has come round lately."""
        return time.monotonic() - self._last_claim <= within_seconds

    # --- claims and leases -----------------------------------------------------

    async def _claim_loop(self) -> None:
        while True:
            self._nudged.clear()
            try:
                await self._claim()
                self._last_claim = time.monotonic()
                await self._count_unclaimable()
            except DBAPIError as error:
                log.warning("cannot look for due sagas", error=str(error.orig))
            except Exception:
                # Without this loop nothing moves: no surprise may end it.
                log.exception("cannot look for due sagas")
            try:
                async with asyncio.timeout(self.config.poll_seconds):
                    await self._nudged.wait()
            except TimeoutError:
                pass

    async def _claim(self) -> None:
        room = self.config.concurrency - len(self._leases)
        if room <= 0:
            return
        before = time.monotonic()
        leases = await self._transactions.run(
            lambda tx: self._store.claim(
                tx, self.owner, self._sagas.keys(), self.config.lease_seconds, room
            )
        )
        for lease in leases:
            self.stats.claimed += 1
            held = Held(lease, before)
            held.task = asyncio.create_task(self._conduct(held), name=f"saga-{lease.saga_id}")
            self._leases.add(held)

    async def _count_unclaimable(self) -> None:
        if time.monotonic() - self._last_count < _COUNT_SECONDS:
            return
        count = await self._transactions.run(
            lambda tx: self._store.count_unclaimable(tx, self._sagas.keys())
        )
        self._last_count = time.monotonic()
        if count and count != self.stats.unclaimable:
            log.warning(
                "live sagas of a version that is not known here", count=count, help=_UPGRADE
            )
        self.stats.unclaimable = count

    # --- one saga ----------------------------------------------------------------

    async def _conduct(self, held: Held) -> None:
        lease = held.lease
        try:
            view = await self._transactions.run(lambda tx: self._store.read(tx, lease.saga_id))
            saga = self._sagas[view.kind, view.version]
            within = (self._transactions, self._store, self._resources, self._crash, self._tell)
            conduct = Conduct(saga, view, lease, *within)
            structlog.contextvars.bind_contextvars(
                saga=lease.saga_id, saga_kind=view.kind, **saga.labels(view)
            )
            await self._follow(conduct, held)
        except LostLease:
            self.stats.lost_leases += 1
            log.info("lease lost", saga=lease.saga_id, generation=lease.generation)
        except asyncio.CancelledError:
            await asyncio.shield(self._give_back(lease))
            raise
        except DBAPIError as error:
            log.warning("database trouble", saga=lease.saga_id, error=str(error.orig))
            await self._give_back(lease, self.config.backoff_seconds)
        except Exception:
            # A bug in the kernel or a log that cannot be: leave the saga to the
            # next claim after a pause, loudly, rather than spin on it.
            log.exception("saga cannot be conducted", saga=lease.saga_id)
            await self._give_back(lease, self.config.backoff_cap_seconds)
        finally:
            self._leases.remove(held)
            self._nudged.set()

    async def _give_back(self, lease: Lease, wake_seconds: float = 0.0) -> None:
        try:
            await self._transactions.run(lambda tx: self._store.release(tx, lease, wake_seconds))
            self.stats.released += 1
        except LostLease:
            self.stats.lost_leases += 1
        except DBAPIError:
            # It expires by itself.
            log.info("lease not given back", saga=lease.saga_id)

    async def _follow(self, conduct: Conduct, held: Held) -> None:
        while True:
            following = plan(
                conduct.saga, conduct.status, cancel_requested=conduct.cancel_requested
            )
            if following.verb is Verb.REST:
                return
            try:
                if not await self._execute(conduct, held, following):
                    return
            except CancelledFirst:
                conduct.cancel_requested = True

    async def _execute(self, conduct: Conduct, held: Held, following: Next) -> bool:
        """Do what was planned; False when the saga was released or has ended."""
        step = following.step
        match following.verb:
            case Verb.START:
                assert step is not None
                await conduct.append(
                    EventKind.STARTED,
                    step=step.name,
                    unless_cancelled=step.name == conduct.saga.pivot,
                )
            case Verb.START_UNDO:
                assert step is not None
                await conduct.append(EventKind.UNDO_STARTED, step=step.name)
            case Verb.ACT:
                assert step is not None
                return await self._act(conduct, held, step)
            case Verb.UNDO:
                assert step is not None
                return await self._undo(conduct, held, step)
            case turn:
                return await self._turn(conduct, turn)
        return True

    async def _turn(self, conduct: Conduct, verb: Verb) -> bool:
        kind, state = _TURNS[verb]
        stuck = kind is EventKind.STUCK
        await conduct.append(
            kind,
            state=state,
            error=conduct.status.obstacle if stuck else conduct.status.failure,
            unless_cancelled=kind is EventKind.DONE
            and not past_pivot(conduct.saga, conduct.status),
        )
        self.stats.stuck += stuck
        self.stats.finished += kind in (EventKind.DONE, EventKind.UNDONE)
        return state in CLAIMABLE_STATES

    async def _act(self, conduct: Conduct, held: Held, step: Step) -> bool:
        if step.kind is StepKind.DB:
            try:
                await conduct.act_in_transaction(step)
            except (DroverError, StepFailed) as error:
                await conduct.append(EventKind.FAILED, step=step.name, error=failure(error))
            return True
        return await self._effect(
            conduct, held, step, step.action, EventKind.SUCCEEDED, EventKind.FAILED
        )

    async def _undo(self, conduct: Conduct, held: Held, step: Step) -> bool:
        if step.undo is None:
            await conduct.append(EventKind.UNDO_FINISHED, step=step.name)
            return True
        if step.kind is StepKind.DB:
            try:
                await conduct.undo_in_transaction(step)
            except (DroverError, StepFailed) as error:
                await conduct.append(EventKind.UNDO_FAILED, step=step.name, error=failure(error))
            return True
        return await self._effect(
            conduct, held, step, step.undo, EventKind.UNDO_FINISHED, EventKind.UNDO_FAILED
        )

    async def _effect(
        self,
        conduct: Conduct,
        held: Held,
        step: Step,
        function: Any,
        good: EventKind,
        bad: EventKind,
    ) -> bool:
        held.cancelled = False
        held.cancellable = good is EventKind.SUCCEEDED and not past_pivot(
            conduct.saga, conduct.status
        )
        await self._crash("before-effect", conduct.view.id, step.name, good.value)
        held.effect = asyncio.create_task(function(conduct.context(step)))
        try:
            result = await held.effect
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not held.cancelled or (task is not None and task.cancelling()):
                # Not the effect alone is to end but the conducting: a stop, or a
                # lease that was lost.
                raise
            conduct.cancel_requested = True
            return True
        except LostLease:
            raise
        except (Transient, DBAPIError) as error:
            held.leaving = True
            await self._retry_later(conduct, step, error)
            return False
        except Exception as error:
            await conduct.append(bad, step=step.name, error=failure(error))
            return True
        finally:
            held.effect.cancel()
            held.effect = None
        await self._crash("after-effect", conduct.view.id, step.name, good.value)
        if isinstance(result, Wait):
            held.leaving = True
            await self._transactions.run(
                lambda tx: self._store.release(tx, conduct.lease, result.seconds)
            )
            self.stats.released += 1
            return False
        output = encode(result) if good is EventKind.SUCCEEDED and step.output else None
        await conduct.append(good, step=step.name, output=output)
        return True

    async def _retry_later(self, conduct: Conduct, step: Step, error: Exception) -> None:
        self.stats.retries += 1
        attempt = conduct.attempt
        pause = self.config.backoff(attempt)
        why = failure(error.error if isinstance(error, Transient) else error)
        host = why.get("metadata", {}).get("host")
        log.info(
            "step will be tried again",
            step=step.name,
            attempt=attempt,
            pause_seconds=round(pause, 1),
            reason=why["reason"],
            error=why["message"],
            **({"host": host} if host else {}),
        )
        await conduct.release_for_retry(step, pause, why)


def failure(error: Exception) -> dict[str, Any]:
    """What to keep of a definite failure. An unexpected one is logged here, in full."""
    if isinstance(error, DroverError):
        return error.to_json()
    if isinstance(error, StepFailed):
        return error.error
    if isinstance(error, DBAPIError):
        return {"reason": Reason.INTERNAL.name, "message": "The database cannot be reached."}
    incident = uuid.uuid4().hex[:12]
    log.error("unexpected error in a step", incident=incident, exc_info=error)
    return DroverError(
        Reason.INTERNAL,
        f"Incident {incident}: {type(error).__name__}.",
        metadata={"incident": incident},
    ).to_json()
