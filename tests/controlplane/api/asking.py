"""Asking the API of the tests for a move of web1."""

from __future__ import annotations

from typing import Any

from controlplane.common.errors import DroverError
from controlplane.store.saga_tables import sagas
from controlplane.store.tables import claims as claims_table
from controlplane.store.tables import migrations as migrations_table
from controlplane.v1 import (
    instance_pb2,
    instance_service_pb2,
    migration_pb2,
)
from controlplane.v1 import migration_service_pb2 as pb
from tests.controlplane.api.conftest import ADMIN, Api, by, refusal
from tests.controlplane.machines import make_domain

OPERATOR = "drover://lab/operator/olga"
MEMBER = "drover://lab/member/mo/default"
VIEWER = "drover://lab/viewer/vic"
UID = make_domain().uuid
Options = migration_pb2.MigrationOptions


def ask(**changes: Any) -> pb.CreateMigrationRequest:
    return pb.CreateMigrationRequest(**({"instance": "instances/web1"} | changes))


async def instance(api: Api) -> instance_pb2.Instance:
    return await api.instances.GetInstance(
        instance_service_pb2.GetInstanceRequest(name=f"instances/{UID}")
    )


async def rows(api: Api) -> tuple[int, int, int]:
    """How many moves, sagas and claims of moves there are."""

    def count(tx: Any) -> tuple[int, int, int]:
        held = tx.execute(claims_table.select()).all()
        return (
            len(tx.execute(migrations_table.select()).all()),
            len(tx.execute(sagas.select()).all()),
            sum(row.consumer.startswith("migrations/") for row in held),
        )

    return await api.run(count)


async def nothing_changed(api: Api) -> None:
    assert await rows(api) == (0, 0, 0)
    found = await instance(api)
    assert (found.migration, found.task_state) == ("", 0)


async def refused(api: Api, request: pb.CreateMigrationRequest, caller: str = ADMIN) -> DroverError:
    """The refusal, the same for a dry run, with nothing changed by either."""
    error = await refusal(api.migrations.CreateMigration(request, metadata=by(caller)))
    dry = pb.CreateMigrationRequest()
    dry.CopyFrom(request)
    dry.validate_only = True
    told = await refusal(api.migrations.CreateMigration(dry, metadata=by(caller)))
    assert told.reason is error.reason
    assert await rows(api) == (0, 0, 0)
    return error
