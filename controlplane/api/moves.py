"""Starting and steering moves: each function is one transaction's work.

A check of the rules, the saga, the state change and a line of history commit
together. The kernel allows one live saga per machine, and the table of moves one
live move, so two calls at once cannot both win.
"""

from __future__ import annotations

from sqlalchemy import Connection

from controlplane.api.convert import placement_to_proto
from controlplane.api.plan import Plan
from controlplane.api.services import Sagas, Services
from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.domain import rules
from controlplane.domain.capacity import limits_of
from controlplane.domain.model import Migration
from controlplane.domain.names import host_name, instance_name, migration_name
from controlplane.domain.states import HostState, MigrationState, TaskState
from controlplane.saga.definition import NotStuck, PastPivot, Saga, SubjectBusy
from controlplane.store import claims, hosts, instances, migrations, sql_saga
from controlplane.v1 import migration_pb2


def admit(tx: Connection, services: Services, plan: Plan) -> Migration:
    """Write a plan down: the move, its claim on the target, and its saga.

    Raises:
        DroverError: What another call changed since the plan was made: CLAIM_LOST,
            INSTANCE_BUSY, or any other refusal of the rules.
    """
    instance = instances.get(tx, plan.instance.uid)
    rules.check_movable(instance)
    if instance.host != plan.instance.host:
        raise DroverError(
            Reason.INSTANCE_STATE,
            f"{instance.name} is on {host_name(instance.host)} now.",
            subject=instance_name(instance.uid),
            metadata={"host": instance.host},
        )
    target = plan.placement.chosen_host
    move = migrations.create(
        tx,
        instance=instance,
        target_host=target,
        flavor=plan.flavor,
        options=plan.wish.options,
        placement=placement_to_proto(plan.placement),
        created_by=plan.wish.caller.uri,
        description=plan.domain,
    )
    consumer = claims.migration_consumer(move.id)
    facts = hosts.get(tx, target).facts
    if facts is None or not claims.try_claim(
        tx, consumer, target, plan.size, limits_of(facts, services.ratios)
    ):
        raise DroverError(
            Reason.CLAIM_LOST,
            f"{host_name(target)} was filled up or disabled by somebody else meanwhile.",
            subject=host_name(target),
            metadata={"host": target},
        )
    instances.update(
        tx,
        instance.uid,
        migration_id=move.id,
        task_state=TaskState.RESIZE_PREP,
        description=plan.domain,
    )
    return _start_saga(
        tx, services.sagas.move, move, f"asked for by {plan.wish.caller}, to {host_name(target)}"
    )


def confirm(tx: Connection, services: Services, move: Migration, *, by: str) -> Migration:
    """Have the source copy deleted.

    Raises:
        DroverError: MIGRATION_STATE, INSTANCE_BUSY, INSTANCE_CONFLICT when somebody
            has defined the machine on its source again, or HOST_DEAD: refused while
            a host does not answer, rather than begun and left waiting.
    """
    rules.check_may_confirm(move)
    rules.check_no_conflict(instances.get(tx, move.instance_uid))
    _check_ends_answer(tx, services, move)
    move = migrations.update(tx, move.id, state=MigrationState.CONFIRMING, error=None)
    instances.update(tx, move.instance_uid, task_state=TaskState.RESIZE_CONFIRMING)
    return _start_saga(tx, services.sagas.confirm, move, f"confirm asked for by {by}")


def revert(tx: Connection, services: Services, move: Migration, *, by: str) -> Migration:
    """Have the machine brought back to its source.

    The confirm deadline is dropped: should the revert fail, nobody's clock may
    delete the copy that was wanted back.

    Raises:
        DroverError: MIGRATION_STATE, INSTANCE_BUSY, HOST_DEAD, or HOST_GONE when
            the source, which has the copy to go back to, was declared gone.
    """
    rules.check_may_revert(move)
    rules.check_joined(hosts.get(tx, move.source_host))
    _check_ends_answer(tx, services, move)
    move = migrations.update(
        tx, move.id, state=MigrationState.REVERTING, error=None, confirm_deadline=None
    )
    instances.update(tx, move.instance_uid, task_state=TaskState.RESIZE_REVERTING)
    return _start_saga(tx, services.sagas.revert, move, f"revert asked for by {by}")


def cancel(tx: Connection, sagas: Sagas, move: Migration, *, by: str) -> Migration:
    """Have a move turn round.

    Raises:
        DroverError: CANCEL_TOO_LATE or MIGRATION_STATE.
    """
    rules.check_may_cancel(move)
    if rules.is_being_cancelled(move):
        return move
    try:
        sql_saga.request_cancel(tx, sagas.move, move.saga_id)
    except PastPivot:
        raise DroverError(
            Reason.CANCEL_TOO_LATE,
            f"{migration_name(move.id)} has finished its work.",
            subject=migration_name(move.id),
            metadata={"state": move.state.value},
        ) from None
    _note(tx, move, sagas.move.kind, f"cancel asked for by {by}")
    return migrations.update(tx, move.id, cancel_requested=True)


def limit(
    tx: Connection, sagas: Sagas, move: Migration, *, by: str, bytes_per_second: int
) -> Migration:
    """Change how fast a move may copy; its saga passes it on to a copy under way.

    Raises:
        DroverError: MIGRATION_STATE once all is copied.
    """
    rules.check_may_limit(move)
    options = migration_pb2.MigrationOptions()
    options.CopyFrom(move.options)
    options.bandwidth_limit_bytes_per_second = bytes_per_second
    what = f"limit of {bytes_per_second} bytes a second" if bytes_per_second else "no limit"
    _note(tx, move, sagas.move.kind, f"{what} asked for by {by}")
    return migrations.update(tx, move.id, options=options)


def retry(tx: Connection, sagas: Sagas, move: Migration, *, by: str) -> Migration:
    """Have a stuck move try its last step again.

    Raises:
        DroverError: MIGRATION_STATE.
    """
    rules.check_may_retry(move)
    saga = sagas.of_kind(sql_saga.get(tx, move.saga_id).kind)
    _note(tx, move, saga.kind, f"retry asked for by {by}")
    try:
        sql_saga.retry_stuck(tx, saga, move.saga_id)
    except NotStuck:
        raise _not_stuck(move) from None
    return migrations.get(tx, move.id)


def abandon(tx: Connection, sagas: Sagas, move: Migration, *, by: str, comment: str) -> Migration:
    """Give up on a stuck move.

    The saga's observer frees what it holds in the database. What is left on the
    hosts is the operator's; the error goes on saying what failed.

    Raises:
        DroverError: MIGRATION_STATE.
    """
    rules.check_may_abandon(move)
    saga = sagas.of_kind(sql_saga.get(tx, move.saga_id).kind)
    _note(tx, move, saga.kind, f"abandoned by {by}: {comment}")
    try:
        sql_saga.abandon(tx, saga, move.saga_id, "ABANDONED", comment)
    except NotStuck:
        raise _not_stuck(move) from None
    left = dict(move.error or DroverError(Reason.MIGRATION_STATE, "The move was stuck.").to_json())
    left["message"] = f"{left['message']} Abandoned by {by}: {comment}"
    return migrations.update(tx, move.id, error=left)


def _check_ends_answer(tx: Connection, services: Services, move: Migration) -> None:
    for name in (move.source_host, move.target_host):
        host = hosts.get(tx, name)
        if host.state is not HostState.GONE:
            alive = host.is_alive(services.clock(), services.dead_after_seconds)
            rules.check_source(host, alive=alive)


def _start_saga(tx: Connection, saga: Saga, move: Migration, why: str) -> Migration:
    subject = instance_name(move.instance_uid)
    try:
        saga_id = sql_saga.create(tx, saga, subject, {"migration_id": move.id})
    except SubjectBusy:
        raise DroverError(
            Reason.INSTANCE_BUSY,
            f"{subject} ({move.instance_name}) is being worked on.",
            subject=subject,
            metadata={"migration": move.id},
        ) from None
    _note(tx, move, saga.kind, why)
    return migrations.update(tx, move.id, saga_id=saga_id)


def _note(tx: Connection, move: Migration, saga: str, message: str) -> None:
    migrations.add_event(tx, move.id, saga, "", "STATE", message[:1].upper() + message[1:] + ".")


def _not_stuck(move: Migration) -> DroverError:
    return DroverError(
        Reason.MIGRATION_STATE,
        f"{migration_name(move.id)} is no longer stuck.",
        subject=migration_name(move.id),
        metadata={"state": move.state.value},
    )
