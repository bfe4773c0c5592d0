from __future__ import annotations

import uuid
from typing import Any

import pytest

from controlplane.common.reasons import Reason
from controlplane.store import claims, hosts, instances
from controlplane.v1 import instance_pb2
from controlplane.v1 import instance_service_pb2 as pb
from tests.controlplane.api.conftest import Api, by, refusal
from tests.controlplane.machines import make_domain

OPERATOR = "drover://lab/operator/olga"
MEMBER = "drover://lab/member/mo/default"
STRANGER = "drover://lab/member/stan/other"


async def get(api: Api, name: str = "web1") -> instance_pb2.Instance:
    return await api.instances.GetInstance(pb.GetInstanceRequest(name=f"instances/{name}"))


async def one_machine(api: Api) -> instance_pb2.Instance:
    a = await api.add_host("a")
    a.put(make_domain())
    await api.report()
    return await get(api)


async def test_a_reported_domain_becomes_an_instance(api: Api) -> None:
    instance = await one_machine(api)
    domain = make_domain()
    assert instance == await get(api, domain.uuid.upper())
    assert (instance.uid, instance.display_name, instance.host) == (domain.uuid, "web1", "hosts/a")
    assert instance.vm_state == instance_pb2.Instance.VM_STATE_ACTIVE
    assert instance.task_state == instance_pb2.Instance.TASK_STATE_UNSPECIFIED
    assert instance.project == "default"
    assert instance.volumes == domain.volumes
    assert instance.interfaces == domain.interfaces


@pytest.mark.parametrize("name", ["", "web1", "instances/", "hosts/a", "instances/a/b"])
async def test_malformed_names_are_refused(api: Api, name: str) -> None:
    error = await refusal(api.instances.GetInstance(pb.GetInstanceRequest(name=name)))
    assert error.reason is Reason.INVALID_NAME


async def test_unknown_and_ambiguous_names_are_told_apart(api: Api) -> None:
    for name in ("web1", str(uuid.uuid4())):
        request = pb.GetInstanceRequest(name=f"instances/{name}")
        error = await refusal(api.instances.GetInstance(request))
        assert error.reason is Reason.INSTANCE_NOT_FOUND
    for host in ("a", "b"):
        simulated = await api.add_host(host)
        simulated.put(make_domain(uuid=str(uuid.uuid4())))
        await api.report()
    error = await refusal(api.instances.GetInstance(pb.GetInstanceRequest(name="instances/web1")))
    assert error.reason is Reason.AMBIGUOUS_NAME
    assert "hosts/a" in error.message
    assert "hosts/b" in error.message


async def test_a_duplicate_is_shown_as_a_conflict_and_never_merged(api: Api) -> None:
    await one_machine(api)
    b = await api.add_host("b")
    b.put(make_domain())
    await api.report()
    instance = await get(api)
    assert (instance.host, instance.conflict) == ("hosts/a", "hosts/a, hosts/b")
    b.domains.clear()
    await api.report()
    assert (await get(api)).conflict == ""


async def test_a_host_can_opt_out_of_adoption(api: Api) -> None:
    a = await api.add_host("a")
    await api.run(lambda tx: hosts.update(tx, "a", adopt_domains=False))
    a.put(make_domain())
    await api.report()
    assert not (await api.instances.ListInstances(pb.ListInstancesRequest())).instances
    adopted = await api.instances.AdoptInstance(
        pb.AdoptInstanceRequest(uid=make_domain().uuid, project="shop")
    )
    assert (adopted.project, adopted.host) == ("shop", "hosts/a")
    held = await api.run(lambda tx: claims.find(tx, adopted.name))
    assert held is not None
    assert (held.host, held.size.vcpus) == ("a", 2)


async def test_a_released_machine_is_forgotten_until_adopted_again(api: Api) -> None:
    before = await one_machine(api)
    stale = await refusal(
        api.instances.ReleaseInstance(pb.ReleaseInstanceRequest(name="instances/web1", etag="g999"))
    )
    assert stale.reason is Reason.ETAG_MISMATCH
    await api.instances.ReleaseInstance(
        pb.ReleaseInstanceRequest(name="instances/web1", etag=before.etag)
    )
    await api.report()
    for key in ("web1", before.uid):
        request = pb.GetInstanceRequest(name=f"instances/{key}")
        error = await refusal(api.instances.GetInstance(request))
        assert error.reason is Reason.DOMAIN_RELEASED
    assert await api.run(lambda tx: claims.find(tx, before.name)) is None
    assert not (await api.instances.ListInstances(pb.ListInstancesRequest())).instances
    again = await api.instances.AdoptInstance(pb.AdoptInstanceRequest(uid=before.uid))
    assert (again.uid, again.host) == (before.uid, "hosts/a")
    assert await api.run(lambda tx: claims.find(tx, before.name)) is not None


async def test_adopting_needs_a_report_of_one_host(api: Api) -> None:
    uid = make_domain().uuid
    missing = await refusal(api.instances.AdoptInstance(pb.AdoptInstanceRequest(uid=uid)))
    assert missing.reason is Reason.DOMAIN_NOT_FOUND
    malformed = await refusal(api.instances.AdoptInstance(pb.AdoptInstanceRequest(uid="42")))
    assert malformed.reason is Reason.INVALID_NAME
    await one_machine(api)
    unknown = await refusal(
        api.instances.AdoptInstance(pb.AdoptInstanceRequest(uid=uid, host="hosts/zz"))
    )
    assert unknown.reason is Reason.HOST_NOT_FOUND
    b = await api.add_host("b")
    b.put(make_domain())
    await api.report()
    both = await refusal(api.instances.AdoptInstance(pb.AdoptInstanceRequest(uid=uid)))
    assert both.reason is Reason.AMBIGUOUS_NAME
    owned = await refusal(
        api.instances.AdoptInstance(pb.AdoptInstanceRequest(uid=uid, host="hosts/b"))
    )
    assert owned.reason is Reason.ALREADY_EXISTS


async def test_a_machine_taken_elsewhere_by_hand_is_found_again_by_adopting(api: Api) -> None:
    instance = await one_machine(api)
    b = await api.add_host("b")
    b.put(api.simulated["a"].domains.pop(instance.uid))
    api.clock.advance(seconds=60)
    await api.report()
    assert (await get(api)).vm_state == instance_pb2.Instance.VM_STATE_MISSING
    assert (await get(api)).host == "hosts/a"
    found = await api.instances.AdoptInstance(pb.AdoptInstanceRequest(uid=instance.uid))
    assert (found.host, found.vm_state) == ("hosts/b", instance_pb2.Instance.VM_STATE_ACTIVE)
    held = await api.run(lambda tx: claims.find(tx, instance.name))
    assert held is not None
    assert held.host == "b"


async def test_a_lock_is_its_owners(api: Api) -> None:
    await one_machine(api)
    lock = pb.LockInstanceRequest(name="instances/web1", reason="backup")
    locked = await api.instances.LockInstance(lock, metadata=by(OPERATOR))
    assert (locked.lock_reason, locked.locked_by) == ("backup", OPERATOR)
    other = await refusal(api.instances.LockInstance(lock, metadata=by(MEMBER)))
    assert other.reason is Reason.INSTANCE_LOCKED
    unlock = pb.UnlockInstanceRequest(name="instances/web1")
    denied = await refusal(api.instances.UnlockInstance(unlock, metadata=by(MEMBER)))
    assert denied.reason is Reason.PERMISSION_DENIED
    stranger = await refusal(api.instances.UnlockInstance(unlock, metadata=by(STRANGER)))
    assert stranger.reason is Reason.PERMISSION_DENIED
    free = await api.instances.UnlockInstance(unlock, metadata=by(OPERATOR))
    assert free.lock_reason == free.locked_by == ""
    empty = await refusal(
        api.instances.LockInstance(pb.LockInstanceRequest(name="instances/web1", reason=" "))
    )
    assert empty.reason is Reason.INVALID_FIELD


async def test_instances_come_in_pages_by_name_and_a_token_keeps_its_filter(api: Api) -> None:
    a, b = await api.add_host("a"), await api.add_host("b")
    for n in range(5):
        (a if n % 2 else b).put(make_domain(f"vm{n}"))
    await api.report()
    first = await api.instances.ListInstances(pb.ListInstancesRequest(page_size=3))
    rest = await api.instances.ListInstances(
        pb.ListInstancesRequest(page_size=3, page_token=first.next_page_token)
    )
    names = [i.display_name for i in (*first.instances, *rest.instances)]
    assert names == [f"vm{n}" for n in range(5)]
    assert rest.next_page_token == ""
    on_b = await api.instances.ListInstances(pb.ListInstancesRequest(host="hosts/b"))
    assert [i.display_name for i in on_b.instances] == ["vm0", "vm2", "vm4"]
    error = await refusal(
        api.instances.ListInstances(
            pb.ListInstancesRequest(host="hosts/b", page_token=first.next_page_token)
        )
    )
    assert error.reason is Reason.INVALID_PAGE_TOKEN


async def test_a_size_that_changes_on_the_host_changes_the_claim(api: Api) -> None:
    instance = await one_machine(api)
    api.simulated["a"].put(make_domain(vcpus=6))
    await api.report()
    held: Any = await api.run(lambda tx: claims.find(tx, instance.name))
    assert held.size.vcpus == (await get(api)).vcpus == 6


async def test_a_busy_machine_is_not_released(api: Api) -> None:
    instance = await one_machine(api)
    await api.run(lambda tx: instances.update(tx, instance.uid, migration_id=str(uuid.uuid4())))
    error = await refusal(
        api.instances.ReleaseInstance(pb.ReleaseInstanceRequest(name="instances/web1"))
    )
    assert error.reason is Reason.INSTANCE_BUSY
