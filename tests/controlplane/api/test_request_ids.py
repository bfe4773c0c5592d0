from __future__ import annotations

import asyncio
import threading
import uuid

from sqlalchemy import Connection

from controlplane.api.convert import flavor_to_proto
from controlplane.api.request_ids import Call
from controlplane.common import principal
from controlplane.common.identity import Identity
from controlplane.domain.model import FlavorSize
from controlplane.store import flavors
from controlplane.v1 import flavor_pb2, flavor_service_pb2
from tests.controlplane.api.conftest import ADMIN, Api


async def test_twins_that_work_at_the_same_time_have_one_effect_and_one_answer(api: Api) -> None:
    request = flavor_service_pb2.CreateFlavorRequest(request_id=str(uuid.uuid4()))
    several = api.database.engine.dialect.name == "postgresql"
    together = threading.Barrier(4)
    done: list[str] = []

    def work(tx: Connection, name: str) -> flavor_pb2.Flavor:
        made = flavor_to_proto(flavors.create(tx, FlavorSize(name=name, vcpus=1, memory_mib=64)))
        done.append(name)
        if several:
            # All of them have looked for an answer, and done the work, before one commits.
            together.wait(timeout=30)
        return made

    async def call(name: str) -> flavor_pb2.Flavor:
        with principal.use(Identity.parse(ADMIN)):
            twin = Call(api.services, "CreateFlavor", request)
        return await twin.run(flavor_pb2.Flavor, lambda tx: work(tx, name))

    answers = await asyncio.gather(*(call(f"twin{n}") for n in range(4)))
    kept = await api.run(lambda tx: flavors.list_page(tx, after="", limit=9))
    assert [f"flavors/{flavor.name}" for flavor in kept] == [answers[0].name]
    assert {answer.name for answer in answers} == {answers[0].name}
    assert len(done) == (4 if several else 1)
