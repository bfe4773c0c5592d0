"""The revert: the machine goes back to its source as it was when it stopped there.

    AWAITING_CONFIRM
        |
      stop_target ..... target   the guest is off
      undefine_target . target   it cannot start there; its disks stay for now
      unpark_source ... source   files and definition are back, and seen to be
      switch_back ..... db       the source owns the machine
    ==|== pivot: the guest may write to its old disks ===============
      start_source .... source   if it ran when it was moved
      remove_target ... target   the copy is gone, once the source was seen to be whole
      forget .......... both     the small records are gone
        |
    REVERTED

Until the pivot a failure puts the machine back on the target, running if it
ran, and the move is AWAITING_CONFIRM again with the reason. The target's disks
are deleted last: until the source runs, they are the newer copy.

What the guest wrote on the target is dropped; whoever asks for a revert is told.
"""

from __future__ import annotations

from sqlalchemy import Connection

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.domain.model import Migration
from controlplane.domain.states import MigrationState, TaskState
from controlplane.saga.definition import Saga, Step, StepContext, StepKind, Wait
from controlplane.saga.log import SagaView
from controlplane.sagas.common import MigrationParams, Move, gone
from controlplane.sagas.confirm import forget, wait_again
from controlplane.sagas.move import switch_owner, switch_owner_back
from controlplane.sagas.projection import Endings, Phase, labels, note_retry, project, settle
from controlplane.sagas.source import park, unpark
from controlplane.sagas.target import ensure_target_absent, target_size, undefine_on_target
from controlplane.store import claims, migrations
from hostd.v1 import host_service_pb2 as hostd

KIND = "revert"


async def stop_target(ctx: StepContext) -> Wait | None:
    """Bring the guest down on the target, gently first: volumes elsewhere may matter to it."""
    move = await Move.of(ctx)
    request = hostd.EnsureStoppedRequest(
        fence=move.fence,
        mode=hostd.EnsureStoppedRequest.MODE_GRACEFUL_THEN_FORCE,
        timeout=move.row.options.shutdown_timeout,
    )
    try:
        answer = await move.on_target(lambda h: h.EnsureStopped, request)
    except DroverError as error:
        if gone(error) or error.reason is Reason.DOMAIN_NOT_FOUND:
            return None
        raise
    return None if answer.stopped else move.poll


async def restore_target_power(ctx: StepContext) -> None:
    """Undo of `stop_target`: the guest runs on the target again if it ran there."""
    move = await Move.of(ctx)
    await move.on_target(lambda h: h.RestorePower, hostd.RestorePowerRequest(fence=move.fence))


async def define_on_target(ctx: StepContext) -> None:
    """Undo of `undefine_target`: the target has its definition again."""
    move = await Move.of(ctx)
    await move.on_target(
        lambda h: h.EnsureBuilt,
        hostd.EnsureBuiltRequest(
            fence=move.fence,
            size=target_size(move),
            digests=[
                hostd.ExpectedDigest(volume_id=receipt.volume_id, digest=receipt.digest)
                for receipt in move.row.receipts
            ],
        ),
        timeout_seconds=300.0,
    )


async def park_again(ctx: StepContext) -> None:
    """Undo of `unpark_source`: the source cannot start the machine, or does not have it."""
    try:
        await park(ctx)
    except DroverError as error:
        if not gone(error) and error.reason is not Reason.DOMAIN_NOT_FOUND:
            raise


async def start_source(ctx: StepContext) -> None:
    """Start the guest on the source if it ran there when it was moved."""
    move = await Move.of(ctx)
    await move.on_source(lambda h: h.RestorePower, hostd.RestorePowerRequest(fence=move.fence))


STEPS = (
    Step(
        "stop_target",
        StepKind.REMOTE,
        stop_target,
        restore_target_power,
        None,
        "Undone by starting the guest on the target again if it ran there.",
    ),
    Step(
        "undefine_target",
        StepKind.REMOTE,
        undefine_on_target,
        define_on_target,
        None,
        "Undone by defining the machine again from the baggage, which is kept until the end.",
    ),
    Step(
        "unpark_source",
        StepKind.REMOTE,
        unpark,
        park_again,
        None,
        "Undone by parking again: only one host may be able to start the machine. Fails when the "
        "source does not have all of it: the guest then goes on where it was.",
    ),
    Step(
        "switch_back",
        StepKind.DB,
        switch_owner_back,
        switch_owner,
        None,
        "Undone by making the target the owner again.",
    ),
    Step(
        "start_source",
        StepKind.REMOTE,
        start_source,
        None,
        None,
        "No undo: once the guest writes to its old disks they are the machine. The pivot.",
    ),
    Step(
        "remove_target",
        StepKind.REMOTE,
        ensure_target_absent,
        None,
        None,
        "No undo: it comes after the pivot.",
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

PHASES = {step.name: Phase(MigrationState.REVERTING, TaskState.RESIZE_REVERTING) for step in STEPS}


def be_reverted(tx: Connection, row: Migration, saga: SagaView) -> None:
    """The machine is back on its source and nothing of the move is held."""
    claims.drop(tx, claims.migration_consumer(row.id))
    migrations.update(tx, row.id, state=MigrationState.REVERTED, confirm_deadline=None, error=None)
    settle(tx, row, row.previous_power_state)


SAGA = Saga(
    kind=KIND,
    version=1,
    params=MigrationParams,
    steps=STEPS,
    pivot="start_source",
    observe=project(KIND, PHASES, Endings(done=be_reverted, undone=wait_again)),
    retrying=note_retry,
    labels=labels,
)
