"""A move in the database of the API's tests, brought into the state that a test needs."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.domain.model import Migration
from controlplane.domain.states import MigrationState, VmState
from controlplane.saga.log import EventKind, SagaState, SagaView
from controlplane.store import instances, migrations, sql_saga
from controlplane.store.saga_tables import sagas
from controlplane.store.sql_saga import SqlSagaStore
from controlplane.v1 import migration_pb2
from tests.controlplane.api.conftest import SAGAS, Api
from tests.controlplane.machines import make_domain

MEMBER = "drover://lab/member/mo/default"
STRANGER = "drover://lab/member/stan/other"
UID = make_domain().uuid
State = migration_pb2.Migration


async def the_move(api: Api) -> Migration:
    return await api.run(lambda tx: migrations.list_page(tx, limit=1)[0])


async def name_of(api: Api) -> str:
    return f"migrations/{(await the_move(api)).id}"


async def change(api: Api, **changes: Any) -> Migration:
    move = await the_move(api)
    return await api.run(lambda tx: migrations.update(tx, move.id, **changes))


async def finish_move(api: Api) -> None:
    """Bring rows and hosts to where the move saga leaves them: on b, awaiting confirm."""
    move = await the_move(api)
    api.simulated["b"].put(api.simulated["a"].domains.pop(UID))

    def work(tx: Connection) -> None:
        end_saga(tx, move)
        migrations.update(tx, move.id, state=MigrationState.AWAITING_CONFIRM)
        instances.update(tx, UID, host="b", vm_state=VmState.RESIZED, task_state=None)

    await api.run(work)


def end_saga(tx: Connection, move: Migration) -> None:
    tx.execute(sagas.update().where(sagas.c.id == move.saga_id).values(state=SagaState.DONE.value))


async def get_stuck(api: Api) -> None:
    """Have the undo of the first remote step fail for good, as the kernel writes it down."""
    move = await the_move(api)
    store = SqlSagaStore()
    failure = DroverError(Reason.HOST_GONE, "Host b is gone.").to_json()

    def work(tx: Connection) -> None:
        (lease,) = store.claim(tx, "test", [("move", SAGAS.move.version)], 30.0, 1)
        first = SAGAS.move.steps[1].name
        store.append(tx, lease, EventKind.STARTED, step=SAGAS.move.steps[0].name)
        store.append(tx, lease, EventKind.SUCCEEDED, step=SAGAS.move.steps[0].name)
        store.append(tx, lease, EventKind.STARTED, step=first)
        store.append(tx, lease, EventKind.FAILED, step=first, error=failure)
        store.append(tx, lease, EventKind.UNWINDING, state=SagaState.UNWINDING)
        store.append(tx, lease, EventKind.UNDO_STARTED, step=first)
        store.append(tx, lease, EventKind.UNDO_FAILED, step=first, error=failure)
        store.append(tx, lease, EventKind.STUCK, state=SagaState.STUCK, error=failure)
        migrations.update(tx, move.id, state=MigrationState.STUCK, error=failure)

    await api.run(work)


async def saga_of(api: Api) -> SagaView:
    move = await the_move(api)
    return await api.run(lambda tx: sql_saga.get(tx, move.saga_id))
