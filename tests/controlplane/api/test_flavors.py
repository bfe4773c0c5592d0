from __future__ import annotations

import uuid
from typing import Any

import pytest

from controlplane.common.reasons import Reason
from controlplane.v1 import flavor_pb2
from controlplane.v1 import flavor_service_pb2 as pb
from tests.controlplane.api.conftest import Api, by, refusal


def create(name: str = "small", *, request_id: str = "", **changes: Any) -> pb.CreateFlavorRequest:
    values: dict[str, Any] = {"name": f"flavors/{name}", "vcpus": 1, "memory_mib": 512}
    return pb.CreateFlavorRequest(
        flavor=flavor_pb2.Flavor(**(values | changes)), request_id=request_id
    )


async def test_flavors_are_made_read_listed_and_deleted(api: Api) -> None:
    made = await api.flavors.CreateFlavor(create("small", root_disk_bytes=5))
    assert (made.name, made.vcpus, made.memory_mib, made.root_disk_bytes) == (
        "flavors/small",
        1,
        512,
        5,
    )
    assert await api.flavors.GetFlavor(pb.GetFlavorRequest(name="flavors/small")) == made
    await api.flavors.CreateFlavor(create("big"))
    page = await api.flavors.ListFlavors(pb.ListFlavorsRequest(page_size=1))
    assert [flavor.name for flavor in page.flavors] == ["flavors/big"]
    rest = await api.flavors.ListFlavors(pb.ListFlavorsRequest(page_token=page.next_page_token))
    assert [flavor.name for flavor in rest.flavors] == ["flavors/small"]
    stale = await refusal(
        api.flavors.DeleteFlavor(pb.DeleteFlavorRequest(name="flavors/small", etag="g7"))
    )
    assert stale.reason is Reason.ETAG_MISMATCH
    await api.flavors.DeleteFlavor(pb.DeleteFlavorRequest(name="flavors/small", etag=made.etag))
    for call in (
        api.flavors.GetFlavor(pb.GetFlavorRequest(name="flavors/small")),
        api.flavors.DeleteFlavor(pb.DeleteFlavorRequest(name="flavors/small")),
    ):
        assert (await refusal(call)).reason is Reason.FLAVOR_NOT_FOUND


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "Small"}, Reason.INVALID_NAME),
        ({"name": "1st"}, Reason.INVALID_NAME),
        ({"vcpus": 0}, Reason.INVALID_FIELD),
        ({"vcpus": 1025}, Reason.INVALID_FIELD),
        ({"memory_mib": 15}, Reason.INVALID_FIELD),
        ({"memory_mib": 2**63}, Reason.INVALID_FIELD),
        ({"root_disk_bytes": 2**63}, Reason.INVALID_FIELD),
    ],
)
async def test_a_bad_flavor_is_refused(api: Api, changes: dict[str, Any], reason: Reason) -> None:
    assert (await refusal(api.flavors.CreateFlavor(create(**changes)))).reason is reason
    assert not (await api.flavors.ListFlavors(pb.ListFlavorsRequest())).flavors


async def test_a_name_is_taken_once(api: Api) -> None:
    await api.flavors.CreateFlavor(create())
    error = await refusal(api.flavors.CreateFlavor(create(vcpus=2)))
    assert (error.reason, error.subject) == (Reason.ALREADY_EXISTS, "flavors/small")


async def test_a_repeated_call_has_one_effect_and_the_first_answer(api: Api) -> None:
    request_id = str(uuid.uuid4())
    first = await api.flavors.CreateFlavor(create(request_id=request_id))
    await api.flavors.DeleteFlavor(pb.DeleteFlavorRequest(name="flavors/small"))
    assert await api.flavors.CreateFlavor(create(request_id=request_id.upper())) == first
    assert not (await api.flavors.ListFlavors(pb.ListFlavorsRequest())).flavors
    reused = await refusal(api.flavors.CreateFlavor(create(vcpus=2, request_id=request_id)))
    assert reused.reason is Reason.REQUEST_ID_REUSED
    other = await api.flavors.CreateFlavor(
        create(request_id=request_id, vcpus=2), metadata=by("drover://lab/admin/bob")
    )
    assert other.vcpus == 2


async def test_an_answer_is_kept_for_a_day(api: Api) -> None:
    request_id = str(uuid.uuid4())
    await api.flavors.CreateFlavor(create(request_id=request_id))
    api.clock.advance(hours=25)
    again = await refusal(api.flavors.CreateFlavor(create(request_id=request_id)))
    assert again.reason is Reason.ALREADY_EXISTS
    await api.flavors.CreateFlavor(create("other", request_id=request_id))


async def test_a_request_id_has_to_be_a_uuid(api: Api) -> None:
    error = await refusal(api.flavors.CreateFlavor(create(request_id="again")))
    assert (error.reason, error.violations[0].subject) == (Reason.INVALID_FIELD, "request_id")
