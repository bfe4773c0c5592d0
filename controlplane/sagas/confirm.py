"""The confirm: the source copy is deleted, and the move is over.

    AWAITING_CONFIRM
        |
      verify_target ... target   the machine is defined there with all its disks
    ==|== pivot: the first deletion =================================
      discard_source .. source   the parked copy is gone
      forget .......... both     the small records are gone
        |
    CONFIRMED

Before the pivot a failure leaves the move AWAITING_CONFIRM with the reason.
After it there is no way but forward: the copy that a way back would need is
being deleted.
"""

from __future__ import annotations

from sqlalchemy import Connection

from controlplane.common.errors import DroverError
from controlplane.domain.model import Migration
from controlplane.domain.states import MigrationState, TaskState
from controlplane.saga.definition import Saga, Step, StepContext, StepKind
from controlplane.saga.log import SagaView
from controlplane.sagas.common import MigrationParams, Move, gone
from controlplane.sagas.projection import (
    Endings,
    Phase,
    failure_of,
    labels,
    note_retry,
    project,
    settle,
)
from controlplane.store import claims, instances, migrations
from hostd.v1 import host_service_pb2 as hostd

KIND = "confirm"


async def verify_target(ctx: StepContext) -> None:
    """See with the target's own eyes that it has the machine, before anything is deleted.

    Raises:
        DroverError: The machine is not defined there, or one of its disks is missing.
    """
    move = await Move.of(ctx)
    await move.verify_whole(move.row.target_host, "The source copy was kept.")


async def discard_source(ctx: StepContext) -> None:
    """Delete the parked copy on the source; a host that is gone for good has none."""
    move = await Move.of(ctx)
    try:
        await move.on_source(
            lambda h: h.DiscardParked,
            hostd.DiscardParkedRequest(fence=move.fence),
            timeout_seconds=300.0,
        )
    except DroverError as error:
        if not gone(error):
            raise


async def forget(ctx: StepContext) -> None:
    """Have both hosts drop their small records of the move."""
    move = await Move.of(ctx)
    for forget_on in (move.forget_on_source, move.forget_on_target):
        try:
            await forget_on()
        except DroverError as error:
            if not gone(error):
                raise


STEPS = (
    Step(
        "verify_target",
        StepKind.REMOTE,
        verify_target,
        None,
        None,
        "No undo: it only looks.",
    ),
    Step(
        "discard_source",
        StepKind.REMOTE,
        discard_source,
        None,
        None,
        "No undo: a deleted copy cannot come back. This is the pivot.",
    ),
    Step(
        "forget",
        StepKind.REMOTE,
        forget,
        None,
        None,
        "No undo: it comes after the pivot.",
    ),
)

PHASES = {
    step.name: Phase(MigrationState.CONFIRMING, TaskState.RESIZE_CONFIRMING) for step in STEPS
}


def be_confirmed(tx: Connection, row: Migration, saga: SagaView) -> None:
    """The move is over: the room on the source is free, the machine is the target's."""
    claims.drop(tx, claims.migration_consumer(row.id))
    migrations.update(tx, row.id, state=MigrationState.CONFIRMED, confirm_deadline=None, error=None)
    if row.flavor is not None:
        instances.update(tx, row.instance_uid, flavor=row.flavor.name)
    settle(tx, row, instances.get(tx, row.instance_uid).power_state)


def wait_again(tx: Connection, row: Migration, saga: SagaView) -> None:
    """Nothing was deleted: the move waits as before, with the reason, and not on its own.

    The deadline is taken away, or a confirm that cannot succeed would be tried
    for ever; somebody has to look.
    """
    migrations.update(
        tx,
        row.id,
        state=MigrationState.AWAITING_CONFIRM,
        confirm_deadline=None,
        error=failure_of(saga) or row.error,
    )
    instances.update(tx, row.instance_uid, task_state=None)


SAGA = Saga(
    kind=KIND,
    version=1,
    params=MigrationParams,
    steps=STEPS,
    pivot="discard_source",
    observe=project(KIND, PHASES, Endings(done=be_confirmed, undone=wait_again)),
    retrying=note_retry,
    labels=labels,
)
