"""Bringing a guest down for a move, and up again when the move does not happen.

    (no record) --EnsureStopped--> STOPPING --off--> STOPPED
         |                            | | time is up    |
         | (it is off already)        | +----> FAILED   | RestorePower
         +------> STOPPED             |           |     |
                         RestorePower +-----------+-----+--> GUARDED --> (no record)

A stop outlives calls and restarts: its record is written before the first ACPI
request, and a task brings it to its end. The deadline is wall-clock time, so the
time in which hostd was down counts as well.

GUARDED: the guest runs again, and `hostd.guard` watches that it does not follow the
shutdown request after all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import ParamSpec, TypeVar

import structlog

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.guard import Guards
from hostd.power import CHANGING, RUNNING, SHUTOFF, Power, PowerState
from hostd.records import Records, StopRecord, StopState
from hostd.state import now
from hostd.steps import Workers
from hostd.v1 import domain_pb2, fence_pb2, host_service_pb2

log = structlog.stdlib.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

GRACEFUL = host_service_pb2.EnsureStoppedRequest.MODE_GRACEFUL
FORCE = host_service_pb2.EnsureStoppedRequest.MODE_FORCE

LONGEST_TIMEOUT_SECONDS = 86_400.0
_DEFAULT_RETRY_SECONDS = 10.0
_POLL_SECONDS = 0.5
# A stop that ends at once is answered at once.
_ANSWER_WITHIN_SECONDS = 1.5


class Stops:
    """The stops of this host. Lives on the event loop.

    Args:
        records: Where they are kept.
        power: The hypervisor.
        workers: Where blocking work runs.
    """

    def __init__(self, records: Records, power: Power, workers: Workers) -> None:
        self._records = records
        self._power = power
        self._workers = workers
        self._tasks: dict[str, asyncio.Task[None]] = {}
        # Migrations whose stop is to end.
        self._given_up: set[str] = set()
        self._guards = Guards(records, power, workers)

    def resume(self) -> None:
        """Go on with the stops that an earlier hostd left unfinished."""
        for record in self._records.unfinished_stops():
            log.info("stop goes on", migration=record.migration_id, domain=record.domain_uuid)
            if record.state is StopState.STOPPING:
                self._start_task(record)
            else:
                self._guards.resume(record)

    async def close(self) -> None:
        """Let go; the next hostd goes on."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._guards.close()

    # --- EnsureStopped

    async def ensure_stopped(
        self, request: host_service_pb2.EnsureStoppedRequest
    ) -> host_service_pb2.EnsureStoppedResponse:
        """Start a stop, or tell how far it is.

        Raises:
            DroverError: SHUTDOWN_TIMEOUT, INSTANCE_STATE, DOMAIN_NOT_FOUND,
                INVALID_FIELD, LIBVIRT_UNAVAILABLE.
        """
        fence = request.fence
        mode, timeout_seconds, retry_seconds = _terms(request)
        guarded = await self._guards.end(fence.domain_uuid)
        record = await self._blocking(self._records.stop, fence.migration_id)
        state = await self._blocking(self._power.state, fence.domain_uuid)
        if record is None or record.state is StopState.GUARDED:
            previous = RUNNING if guarded and state == SHUTOFF else state
            came_here = await self._blocking(self._records.target, fence.migration_id) is not None
            _refuse_unless_stoppable(fence, state, mode, came_here=came_here)
            record = None
        else:
            previous = record.previous_power_state
        wanted = StopRecord(
            migration_id=fence.migration_id,
            domain_uuid=fence.domain_uuid,
            saga_id=fence.saga_id,
            previous_power_state=previous,
            mode=mode,
            timeout_seconds=timeout_seconds,
            retry_seconds=retry_seconds,
            deadline=now() + timeout_seconds,
            state=StopState.STOPPING,
        )
        record = await self._continue(record, wanted, state)
        if record.error is not None:
            raise DroverError.from_json(record.error)
        return host_service_pb2.EnsureStoppedResponse(
            stopped=record.state is StopState.STOPPED,
            previous_power_state=record.previous_power_state,
            forced=record.forced,
        )

    async def _continue(
        self, record: StopRecord | None, wanted: StopRecord, state: PowerState
    ) -> StopRecord:
        if state == SHUTOFF:
            await self._give_up(wanted.migration_id)
            done = replace(
                record or wanted,
                previous_power_state=wanted.previous_power_state,
                state=StopState.STOPPED,
                error=None,
            )
            await self._blocking(self._records.put_stop, done)
            return done
        if record is not None and _same_terms(record, wanted):
            if record.state is StopState.FAILED:
                return record
            if record.state is StopState.STOPPING and record.migration_id in self._tasks:
                return await self._soon(record)
        await self._give_up(wanted.migration_id)
        if (
            record is not None
            and record.state is StopState.STOPPING
            and _same_terms(record, wanted)
        ):
            wanted = replace(wanted, deadline=record.deadline)
        await self._blocking(self._records.put_stop, wanted)
        self._start_task(wanted)
        return await self._soon(wanted)

    async def _soon(self, record: StopRecord) -> StopRecord:
        """The record once its task has had a moment to end it."""
        task = self._tasks.get(record.migration_id)
        if task is not None:
            await asyncio.wait({task}, timeout=_ANSWER_WITHIN_SECONDS)
        latest = await self._blocking(self._records.stop, record.migration_id)
        return latest or record

    def _start_task(self, record: StopRecord) -> None:
        self._given_up.discard(record.migration_id)
        task = asyncio.create_task(self._bring_down(record))
        self._tasks[record.migration_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(record.migration_id, None))

    async def _give_up(self, migration_id: str) -> None:
        """End a stop's task between two of its actions."""
        task = self._tasks.get(migration_id)
        if task is not None:
            self._given_up.add(migration_id)
            await asyncio.wait({task})
            self._given_up.discard(migration_id)

    async def _bring_down(self, record: StopRecord) -> None:
        with structlog.contextvars.bound_contextvars(
            migration=record.migration_id, domain=record.domain_uuid, step="stop"
        ):
            try:
                await self._until_off(record)
            except DroverError as error:
                log.warning("the guest was not stopped", error=str(error))
                failed = replace(record, state=StopState.FAILED, error=error.to_json())
                await self._blocking(self._records.put_stop, failed)
            except Exception:
                # The edge of a background task. The record stays STOPPING: the next
                # EnsureStopped begins the task anew.
                log.exception("the task of a stop failed unexpectedly")

    async def _until_off(self, record: StopRecord) -> None:
        """Ask, wait, and force when allowed.

        Raises:
            DroverError: SHUTDOWN_TIMEOUT, or what libvirt met.
        """
        next_request = 0.0
        pressing: asyncio.Task[None] | None = None
        while record.migration_id not in self._given_up:
            try:
                state = await self._blocking(self._power.state, record.domain_uuid)
                if state == SHUTOFF:
                    done = replace(record, state=StopState.STOPPED)
                    await self._blocking(self._records.put_stop, done)
                    log.info("the guest is off", forced=record.forced)
                    return
                if record.mode == FORCE or now() >= record.deadline:
                    record = await self._time_is_up(record)
                    continue
                if now() >= next_request and (pressing is None or pressing.done()):
                    log.info("asking the guest to shut down")
                    # Not waited for: a QEMU that hangs must not outlast the guest's time.
                    pressing = asyncio.create_task(self._press(record.domain_uuid))
                    next_request = now() + record.retry_seconds
            except DroverError as error:
                if error.reason is not Reason.LIBVIRT_UNAVAILABLE:
                    raise
                log.warning("libvirt is away; the stop waits for it")
            await asyncio.sleep(_POLL_SECONDS)

    async def _press(self, domain_uuid: str) -> None:
        try:
            await self._blocking(self._power.request_shutdown, domain_uuid)
        except DroverError as error:
            # The guest may be going off in this very moment; else it is asked again.
            log.warning("the guest could not be asked to shut down", error=str(error))

    async def _time_is_up(self, record: StopRecord) -> StopRecord:
        if record.mode == GRACEFUL:
            raise DroverError(
                Reason.SHUTDOWN_TIMEOUT,
                f"The guest {record.domain_uuid} did not shut down within"
                f" {record.timeout_seconds:g} s of ACPI requests; it runs on.",
                subject=f"domains/{record.domain_uuid}",
                metadata={"timeout_seconds": f"{record.timeout_seconds:g}"},
            )
        forced = replace(record, forced=True)
        if forced != record:
            await self._blocking(self._records.put_stop, forced)
            log.info("powering the guest off", mode=record.mode)
        await self._blocking(self._power.power_off, record.domain_uuid)
        return forced

    # --- RestorePower

    async def restore(self, fence: fence_pb2.Fence, *, may_run_here: Callable[[], None]) -> bool:
        """Start the machine again if its stop found it running.

        Args:
            fence: Whose stop.
            may_run_here: Raises DroverError when the machine must not start here.

        Returns:
            True when the power state is the one from before the stop.

        Raises:
            DroverError: START_FAILED, DOMAIN_NOT_FOUND, INSTANCE_STATE,
                LIBVIRT_UNAVAILABLE, or what `may_run_here` raises.
        """
        record = await self._blocking(self._records.stop, fence.migration_id)
        if record is None or record.state is StopState.GUARDED:
            return True
        await self._give_up(fence.migration_id)
        record = await self._blocking(self._records.stop, fence.migration_id) or record
        if record.previous_power_state == RUNNING:
            await self._blocking(may_run_here)
            await self._blocking(self._start, fence.domain_uuid)
        if record.previous_power_state == RUNNING and not record.forced:
            await self._guards.set(record)
        else:
            await self._blocking(self._records.drop_stop, fence.migration_id)
        return True

    async def forget(self, migration_id: str) -> None:
        """Drop the record of a stop; one that is guarded goes with its guard.

        Raises:
            DroverError: MIGRATION_STATE while the guest is being stopped.
        """
        record = await self._blocking(self._records.stop, migration_id)
        if record is None or record.state is StopState.GUARDED:
            return
        if record.state is StopState.STOPPING:
            raise DroverError(
                Reason.MIGRATION_STATE,
                f"Domain {record.domain_uuid} is being stopped for migration {migration_id}.",
                subject=f"migrations/{migration_id}",
            )
        await self._blocking(self._records.drop_stop, migration_id)

    def _start(self, domain_uuid: str) -> None:
        state = self._power.state(domain_uuid)
        if state == SHUTOFF:
            log.info("starting the guest again")
            self._power.start(domain_uuid)
            state = self._power.state(domain_uuid)
        if state not in (RUNNING, SHUTOFF, CHANGING):
            raise DroverError(
                Reason.INSTANCE_STATE,
                f"Domain {domain_uuid} should run again but is"
                f" {domain_pb2.PowerState.Name(state)}.",
                subject=f"domains/{domain_uuid}",
            )

    async def _blocking(self, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        return await self._workers.step(lambda: work(*arguments, **named))


def _terms(
    request: host_service_pb2.EnsureStoppedRequest,
) -> tuple[host_service_pb2.EnsureStoppedRequest.Mode.ValueType, float, float]:
    mode = request.mode or GRACEFUL
    timeout_seconds = request.timeout.ToNanoseconds() / 1e9
    if mode != FORCE and not 0 < timeout_seconds <= LONGEST_TIMEOUT_SECONDS:
        raise DroverError(
            Reason.INVALID_FIELD,
            f"timeout is {timeout_seconds:g} s; a graceful stop takes more than 0 and at most"
            f" {LONGEST_TIMEOUT_SECONDS:g} s.",
            subject="timeout",
        )
    retry_seconds = _DEFAULT_RETRY_SECONDS
    if request.HasField("retry_interval"):
        retry_seconds = request.retry_interval.ToNanoseconds() / 1e9
    if retry_seconds <= 0:
        raise DroverError(
            Reason.INVALID_FIELD, "retry_interval must be more than 0.", subject="retry_interval"
        )
    return mode, timeout_seconds, retry_seconds


def _same_terms(one: StopRecord, other: StopRecord) -> bool:
    return (one.saga_id, one.mode, one.timeout_seconds, one.retry_seconds) == (
        other.saga_id,
        other.mode,
        other.timeout_seconds,
        other.retry_seconds,
    )


def _refuse_unless_stoppable(
    fence: fence_pb2.Fence,
    state: PowerState,
    mode: host_service_pb2.EnsureStoppedRequest.Mode.ValueType,
    *,
    came_here: bool,
) -> None:
    """Refuse a state in which the machine would lose what it cannot be given back.

    What the move itself has started here may be in any state when the move is undone:
    the copy on its source is what counts.
    """
    never = (domain_pb2.POWER_STATE_SAVED, domain_pb2.POWER_STATE_UNSPECIFIED)
    if state in (RUNNING, SHUTOFF) or (mode == FORCE and came_here and state not in never):
        return
    raise DroverError(
        Reason.INSTANCE_STATE,
        f"Domain {fence.domain_uuid} is {domain_pb2.PowerState.Name(state)}; only a running or"
        " shut-off one can be stopped for a move.",
        subject=f"domains/{fence.domain_uuid}",
        metadata={"power_state": domain_pb2.PowerState.Name(state)},
    )
