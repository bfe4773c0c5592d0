"""What a caller can send that nobody means well with: refused by name, never a bug's answer.

On both databases, because each has texts and numbers of its own that it cannot hold.
"""

from __future__ import annotations

import base64
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import pytest

from controlplane.api.paging import encode_token
from controlplane.common.reasons import Reason
from controlplane.v1 import (
    flavor_pb2,
    flavor_service_pb2,
    host_service_pb2,
    instance_service_pb2,
)
from controlplane.v1 import migration_service_pb2 as pb
from tests.controlplane.api.conftest import Api, error_of
from tests.controlplane.machines import make_domain

UID = make_domain().uuid
MOVE = str(uuid.UUID(int=7))
Call = Callable[[Api, str], Awaitable[Any]]

# Method, what its tokens are bound to, number of parts of a key, and the call.
LISTS: list[tuple[str, tuple[str, ...], int, Call]] = [
    (
        "ListHosts",
        (),
        1,
        lambda api, token: api.hosts.ListHosts(host_service_pb2.ListHostsRequest(page_token=token)),
    ),
    (
        "ListInstances",
        ("",),
        2,
        lambda api, token: api.instances.ListInstances(
            instance_service_pb2.ListInstancesRequest(page_token=token)
        ),
    ),
    (
        "ListFlavors",
        (),
        1,
        lambda api, token: api.flavors.ListFlavors(
            flavor_service_pb2.ListFlavorsRequest(page_token=token)
        ),
    ),
    (
        "ListMigrations",
        ("", ""),
        2,
        lambda api, token: api.migrations.ListMigrations(
            pb.ListMigrationsRequest(page_token=token)
        ),
    ),
    (
        "ListAuditEntries",
        (),
        1,
        lambda api, token: api.migrations.ListAuditEntries(
            pb.ListAuditEntriesRequest(page_token=token)
        ),
    ),
]
DEEP = base64.urlsafe_b64encode(b'{"x":' + b"[" * 300_000).decode()
HOSTILE = ["", "\0", "a\0b", "-1", "1e9", "9" * 18, "9" * 400, "٣", "' OR 1=1 --", "x" * 100_000]


async def reason(call: Awaitable[Any]) -> Reason | None:
    """Why a call was refused; None when it was answered."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error_of(error).reason
    return None


@pytest.mark.parametrize(("method", "query", "parts", "call"), LISTS, ids=[x[0] for x in LISTS])
async def test_a_forged_page_token_is_a_page_or_refused(
    api: Api, method: str, query: tuple[str, ...], parts: int, call: Call
) -> None:
    for key in HOSTILE:
        token = encode_token(method, query, (key,) * parts)
        assert await reason(call(api, token)) in (None, Reason.INVALID_PAGE_TOKEN), key[:20]
    for other, foreign, count, _ in LISTS:
        if other != method:
            token = encode_token(other, foreign, ("1",) * count)
            assert await reason(call(api, token)) is Reason.INVALID_PAGE_TOKEN, other
    for damaged in ("x", "!", "e30", "W10", "bnVsbA", "\0", "é", "A" * 100_000, DEEP):
        assert await reason(call(api, damaged)) is Reason.INVALID_PAGE_TOKEN, damaged[:20]


TEXTS = ["a\0b", "\x1b[2J", "line\nline", "\u202egnirts", "x" * 501]
CHANGES: list[tuple[str, Call]] = [
    (
        "disable",
        lambda api, text: api.hosts.DisableHost(
            host_service_pb2.DisableHostRequest(name="hosts/a", reason=text)
        ),
    ),
    (
        "gone",
        lambda api, text: api.hosts.DeclareHostGone(
            host_service_pb2.DeclareHostGoneRequest(name="hosts/a", reason=text)
        ),
    ),
    (
        "lock",
        lambda api, text: api.instances.LockInstance(
            instance_service_pb2.LockInstanceRequest(name=f"instances/{UID}", reason=text)
        ),
    ),
    (
        "abandon",
        lambda api, text: api.migrations.AbandonMigration(
            pb.AbandonMigrationRequest(name=f"migrations/{MOVE}", comment=text)
        ),
    ),
]


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=[name for name, _ in CHANGES])
async def test_texts_for_people_hold_nothing_that_acts_on_a_terminal(
    api: Api, name: str, change: Call
) -> None:
    await api.add_host("a")
    api.simulated["a"].put(make_domain())
    await api.report()
    for text in TEXTS:
        assert await reason(change(api, text)) is Reason.INVALID_FIELD, repr(text[:20])


@pytest.mark.parametrize(
    "name", ["\0", "a\0", "instances/\0", "hosts/a\0b", "flavors/\n", "é" * 500]
)
async def test_names_from_nowhere_are_refused_or_not_found(api: Api, name: str) -> None:
    calls: tuple[Awaitable[Any], ...] = (
        api.hosts.GetHost(host_service_pb2.GetHostRequest(name=name)),
        api.hosts.AddHost(host_service_pb2.AddHostRequest(host_id=name)),
        api.instances.GetInstance(instance_service_pb2.GetInstanceRequest(name=name)),
        api.instances.AdoptInstance(instance_service_pb2.AdoptInstanceRequest(uid=name)),
        api.migrations.GetMigration(pb.GetMigrationRequest(name=name)),
        api.migrations.CreateMigration(pb.CreateMigrationRequest(instance=name)),
        api.migrations.ListMigrations(pb.ListMigrationsRequest(instance=name)),
        api.migrations.CreateMigration(
            pb.CreateMigrationRequest(instance="instances/web1", host=name)
        ),
        api.migrations.CreateMigration(
            pb.CreateMigrationRequest(instance="instances/web1", request_id=name)
        ),
    )
    for number, call in enumerate(calls):
        assert await reason(call) in {Reason.INVALID_NAME, Reason.INVALID_FIELD}, number


async def test_sizes_that_no_machine_has_are_refused(api: Api) -> None:
    most = (1 << 63) - 1
    for sizes in (
        {"vcpus": (1 << 31) - 1, "memory_mib": 64},
        {"vcpus": 1, "memory_mib": most},
        {"vcpus": 1, "memory_mib": 64, "root_disk_bytes": most},
        {"vcpus": -1, "memory_mib": 64},
        {"vcpus": 1, "memory_mib": -1},
    ):
        flavor = flavor_pb2.Flavor(name="flavors/big")
        try:
            flavor.MergeFrom(flavor_pb2.Flavor(**sizes))  # type: ignore[arg-type]
        except ValueError:
            continue  # the field itself cannot hold it
        refused = await reason(
            api.flavors.CreateFlavor(flavor_service_pb2.CreateFlavorRequest(flavor=flavor))
        )
        assert refused is Reason.INVALID_FIELD, sizes
