"""InstanceService: the machines of the fleet and who looks after them."""

from __future__ import annotations

from typing import Any

import grpc.aio
from sqlalchemy import Connection

from controlplane.api.convert import instance_to_proto
from controlplane.api.etags import expected_generation
from controlplane.api.fields import check_text
from controlplane.api.paging import decode_token, encode_token, page_limit
from controlplane.api.request_ids import Call
from controlplane.api.services import Services
from controlplane.common import principal
from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.domain import rules
from controlplane.domain.model import DEFAULT_PROJECT, Instance, Sighting
from controlplane.domain.names import (
    check_project,
    check_uuid,
    host_name,
    instance_name,
    parse_host,
    parse_instance,
)
from controlplane.domain.states import PowerState, VmState, vm_state_of
from controlplane.fleet.reports import reconcile_uuids
from controlplane.security import roles
from controlplane.store import claims, hosts, instances, sightings
from controlplane.v1 import instance_pb2
from controlplane.v1 import instance_service_pb2 as pb
from controlplane.v1.instance_service_pb2_grpc import InstanceServiceServicer

Context = grpc.aio.ServicerContext[Any, Any]


class InstanceServicer(InstanceServiceServicer):
    """See proto/controlplane/v1/instance_service.proto."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def GetInstance(
        self, request: pb.GetInstanceRequest, context: Context
    ) -> instance_pb2.Instance:
        """Return one instance."""
        key = parse_instance(request.name)
        return await self._services.database.run(
            lambda tx: instance_to_proto(instances.resolve(tx, key))
        )

    async def ListInstances(
        self, request: pb.ListInstancesRequest, context: Context
    ) -> pb.ListInstancesResponse:
        """Return instances in order of display name."""
        limit = page_limit(request.page_size)
        host = parse_host(request.host, "host") if request.host else ""
        key = decode_token(request.page_token, "ListInstances", (host,), 2) or ("", "")
        page = await self._services.database.run(
            lambda tx: instances.list_page(tx, host=host, after=(key[0], key[1]), limit=limit + 1)
        )
        shown = page[:limit]
        token = ""
        if len(page) > limit:
            token = encode_token("ListInstances", (host,), (shown[-1].name, shown[-1].uid))
        return pb.ListInstancesResponse(
            instances=[instance_to_proto(instance) for instance in shown], next_page_token=token
        )

    async def AdoptInstance(
        self, request: pb.AdoptInstanceRequest, context: Context
    ) -> instance_pb2.Instance:
        """Take a domain that a host reports under care."""
        uid = check_uuid(request.uid, "uid")
        host = parse_host(request.host, "host") if request.host else ""
        project = check_project(request.project) if request.project else ""

        def adopt(tx: Connection) -> instance_pb2.Instance:
            sighting = _reported(tx, uid, host)
            known = instances.find(tx, uid)
            if known is None:
                _create(tx, sighting, project or DEFAULT_PROJECT)
            else:
                _take_back(tx, known, sighting, project)
            reconcile_uuids(
                tx,
                {uid},
                now=self._services.clock(),
                missing_after_seconds=self._services.dead_after_seconds,
            )
            return instance_to_proto(instances.get(tx, uid))

        return await Call(self._services, "AdoptInstance", request).run(
            instance_pb2.Instance, adopt
        )

    async def ReleaseInstance(
        self, request: pb.ReleaseInstanceRequest, context: Context
    ) -> pb.ReleaseInstanceResponse:
        """Forget an instance; its domain stays as it is."""
        key = parse_instance(request.name)
        caller = principal.current()

        def release(tx: Connection) -> pb.ReleaseInstanceResponse:
            instance = instances.resolve(tx, key)
            rules.check_idle(instance)
            rules.check_unlocked_for(instance, caller)
            instances.update(
                tx,
                instance.uid,
                expected_generation=expected_generation(request.etag),
                released=True,
                lock_reason="",
                locked_by="",
                conflict="",
            )
            claims.drop(tx, claims.instance_consumer(instance.uid))
            return pb.ReleaseInstanceResponse()

        return await Call(self._services, "ReleaseInstance", request).run(
            pb.ReleaseInstanceResponse, release
        )

    async def LockInstance(
        self, request: pb.LockInstanceRequest, context: Context
    ) -> instance_pb2.Instance:
        """Keep an instance from moving."""
        key = parse_instance(request.name)
        reason = check_text("reason", request.reason, required=True)
        caller = principal.current()

        def lock(tx: Connection) -> instance_pb2.Instance:
            instance = instances.resolve(tx, key)
            roles.check_project(caller, project=instance.project, action="lock")
            if instance.locked_by != caller.uri:
                rules.check_unlocked(instance)
            locked = instances.update(tx, instance.uid, lock_reason=reason, locked_by=caller.uri)
            return instance_to_proto(locked)

        return await Call(self._services, "LockInstance", request).run(instance_pb2.Instance, lock)

    async def UnlockInstance(
        self, request: pb.UnlockInstanceRequest, context: Context
    ) -> instance_pb2.Instance:
        """Let an instance move again."""
        key = parse_instance(request.name)
        caller = principal.current()

        def unlock(tx: Connection) -> instance_pb2.Instance:
            instance = instances.resolve(tx, key)
            roles.check_project(caller, project=instance.project, action="unlock")
            rules.check_may_unlock(instance, caller)
            if instance.lock_reason:
                instance = instances.update(tx, instance.uid, lock_reason="", locked_by="")
            return instance_to_proto(instance)

        return await Call(self._services, "UnlockInstance", request).run(
            instance_pb2.Instance, unlock
        )


def _reported(tx: Connection, uid: str, host: str) -> Sighting:
    """The report to adopt from: the named host's, or the only one there is.

    Raises:
        DroverError: HOST_NOT_FOUND, DOMAIN_NOT_FOUND or AMBIGUOUS_NAME.
    """
    if host:
        hosts.get(tx, host)
    found = [
        sighting
        for sighting in sightings.of_uuids(tx, [uid]).get(uid, {}).values()
        if sighting.current and (not host or sighting.host == host)
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        where = host_name(host) if host else "any host"
        raise DroverError(
            Reason.DOMAIN_NOT_FOUND,
            f"No domain with UUID {uid} is reported by {where}.",
            subject=instance_name(uid),
            metadata={"uid": uid, "host": host},
        )
    reporting = ", ".join(host_name(sighting.host) for sighting in found)
    raise DroverError(
        Reason.AMBIGUOUS_NAME,
        f"The domain {uid} is reported by {reporting}: name the host that is meant.",
        subject="host",
        metadata={"uid": uid, "hosts": reporting},
    )


def _create(tx: Connection, sighting: Sighting, project: str) -> None:
    instance = instances.create(
        tx,
        host=sighting.host,
        domain=sighting.domain,
        vm_state=_idle_state(sighting),
        project=project,
    )
    claims.put(tx, claims.instance_consumer(instance.uid), sighting.host, instance.size)


def _take_back(tx: Connection, known: Instance, sighting: Sighting, project: str) -> None:
    """Adopt one that was released, or that was taken to another host by hand.

    Raises:
        DroverError: ALREADY_EXISTS when it is looked after on another host that
            has not lost it; INSTANCE_BUSY when a move is under way.
    """
    moved_by_hand = known.vm_state is VmState.MISSING and known.host != sighting.host
    if not known.released and not moved_by_hand:
        if known.host != sighting.host:
            raise DroverError(
                Reason.ALREADY_EXISTS,
                f"{instance_name(known.uid)} is looked after on {host_name(known.host)}.",
                subject=instance_name(known.uid),
                metadata={"host": known.host},
            )
        if project and project != known.project:
            instances.update(tx, known.uid, project=project)
        return
    rules.check_idle(known)
    values = instances.described(sighting.domain)
    values["host"] = sighting.host
    values["vm_state"] = _idle_state(sighting)
    values["released"] = False
    values["project"] = project or known.project
    adopted = instances.update(tx, known.uid, **values)
    claims.put(tx, claims.instance_consumer(known.uid), sighting.host, adopted.size)


def _idle_state(sighting: Sighting) -> VmState:
    return vm_state_of(PowerState.from_number(sighting.domain.power_state)) or VmState.ACTIVE
