"""HostService: the hypervisors of the fleet."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import grpc.aio
from sqlalchemy import Connection

from controlplane.api.convert import host_to_proto, timestamp
from controlplane.api.etags import expected_generation
from controlplane.api.fields import check_text
from controlplane.api.paging import decode_token, encode_token, page_limit
from controlplane.api.request_ids import Call
from controlplane.api.services import Enroller, Services
from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.domain import rules
from controlplane.domain.model import Host, HostUsage
from controlplane.domain.names import check_host_id, host_name, parse_host
from controlplane.domain.states import HostState, VmState
from controlplane.fleet.reports import reconcile_uuids
from controlplane.security.tokens import new_secret, secret_digest
from controlplane.store import hosts, instances, migrations, sightings, sql_saga, tokens
from controlplane.v1 import host_pb2
from controlplane.v1 import host_service_pb2 as pb
from controlplane.v1.host_service_pb2_grpc import HostServiceServicer

Context = grpc.aio.ServicerContext[Any, Any]


class HostServicer(HostServiceServicer):
    """See proto/controlplane/v1/host_service.proto."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def GetHost(self, request: pb.GetHostRequest, context: Context) -> host_pb2.Host:
        """Return one host."""
        name = parse_host(request.name)
        return await self._services.database.run(lambda tx: self._shown(tx, hosts.get(tx, name)))

    async def ListHosts(
        self, request: pb.ListHostsRequest, context: Context
    ) -> pb.ListHostsResponse:
        """Return hosts in name order."""
        limit = page_limit(request.page_size)
        after = decode_token(request.page_token, "ListHosts", (), 1) or ("",)

        def read(tx: Connection) -> tuple[list[Host], dict[str, HostUsage]]:
            page = hosts.list_page(tx, after=after[0], limit=limit + 1)
            return page, hosts.usages(tx, [host.name for host in page])

        page, usages = await self._services.database.run(read)
        more = len(page) > limit
        shown = page[:limit]
        return pb.ListHostsResponse(
            hosts=[self._proto(host, usages.get(host.name, HostUsage())) for host in shown],
            next_page_token=encode_token("ListHosts", (), (shown[-1].name,)) if more else "",
        )

    async def AddHost(self, request: pb.AddHostRequest, context: Context) -> pb.AddHostResponse:
        """Announce a host and make its join token.

        The token is in no stored answer. A repeated call makes a new one, which
        replaces the first, as long as the host has not joined.
        """
        enroller = self._enroller()
        name = check_host_id(request.host_id)
        adopt = request.adopt_domains if request.HasField("adopt_domains") else True
        secret = new_secret()
        expire_time = self._services.clock() + timedelta(seconds=self._services.join_token_seconds)

        def announce(tx: Connection) -> pb.AddHostResponse:
            host = _announced(tx, name, adopt_domains=adopt)
            return pb.AddHostResponse(
                host=self._shown(tx, host), expire_time=timestamp(expire_time)
            )

        def make_token(tx: Connection) -> bool:
            if hosts.get(tx, name).state is not HostState.JOINING:
                return False
            tokens.put(tx, secret_digest(secret), name, expire_time)
            return True

        answer = await Call(self._services, "AddHost", request).run(pb.AddHostResponse, announce)
        if await self._services.database.run(make_token):
            answer.join_token = enroller.join_token(name, secret)
            answer.expire_time.CopyFrom(timestamp(expire_time))
        return answer

    async def EnableHost(self, request: pb.EnableHostRequest, context: Context) -> host_pb2.Host:
        """Let the scheduler use a host."""
        return await self._decide(request, HostState.ENABLED, "", expected_generation(request.etag))

    async def DisableHost(self, request: pb.DisableHostRequest, context: Context) -> host_pb2.Host:
        """Keep new machines away from a host."""
        reason = check_text("reason", request.reason, required=False)
        return await self._decide(
            request, HostState.DISABLED, reason, expected_generation(request.etag)
        )

    async def DeclareHostGone(
        self, request: pb.DeclareHostGoneRequest, context: Context
    ) -> host_pb2.Host:
        """Take an operator's word that a host is off for good."""
        name = parse_host(request.name)
        reason = check_text("reason", request.reason, required=True)

        def declare(tx: Connection) -> host_pb2.Host:
            host = hosts.get(tx, name)
            if host.state is not HostState.GONE:
                rules.check_may_be_gone(host, alive=self._is_alive(host))
                host = hosts.update(tx, name, state=HostState.GONE, state_reason=reason)
                tokens.drop(tx, name)
                self._forget_reports(tx, name)
                for saga_id in migrations.live_sagas_on(tx, name):
                    # What waits for the host to answer need not wait any longer.
                    sql_saga.wake(tx, saga_id)
            return self._shown(tx, host)

        answer = await Call(self._services, "DeclareHostGone", request).run(host_pb2.Host, declare)
        self._services.nudge()
        return answer

    async def _decide(
        self,
        request: pb.EnableHostRequest | pb.DisableHostRequest,
        state: HostState,
        reason: str,
        generation: int | None,
    ) -> host_pb2.Host:
        name = parse_host(request.name)

        def decide(tx: Connection) -> host_pb2.Host:
            host = hosts.get(tx, name)
            rules.check_joined(host)
            if (host.state, host.state_reason) != (state, reason) or generation is not None:
                host = hosts.update(
                    tx, name, expected_generation=generation, state=state, state_reason=reason
                )
            return self._shown(tx, host)

        method = "EnableHost" if state is HostState.ENABLED else "DisableHost"
        return await Call(self._services, method, request).run(host_pb2.Host, decide)

    def _forget_reports(self, tx: Connection, name: str) -> None:
        now = self._services.clock()
        reported = sightings.forget_host(tx, name)
        for instance in instances.of_uids(tx, instances.uids_on(tx, name)).values():
            if not instance.released and not instance.migration_id:
                instances.update(tx, instance.uid, vm_state=VmState.MISSING)
        reconcile_uuids(
            tx, reported, now=now, missing_after_seconds=self._services.dead_after_seconds
        )

    def _enroller(self) -> Enroller:
        if self._services.enroller is None:
            raise DroverError(
                Reason.HOST_NOT_JOINED,
                "This control plane has no key of the certificate authority, so it cannot join "
                "hosts: issue the host's certificate with your own authority.",
            )
        return self._services.enroller

    def _shown(self, tx: Connection, host: Host) -> host_pb2.Host:
        return self._proto(host, hosts.usage(tx, host.name))

    def _proto(self, host: Host, usage: HostUsage) -> host_pb2.Host:
        return host_to_proto(host, usage, alive=self._is_alive(host))

    def _is_alive(self, host: Host) -> bool:
        return host.is_alive(self._services.clock(), self._services.dead_after_seconds)


def _announced(tx: Connection, name: str, *, adopt_domains: bool) -> Host:
    host = hosts.find(tx, name)
    if host is None:
        return hosts.create(tx, name, adopt_domains=adopt_domains)
    if host.state in (HostState.ENABLED, HostState.DISABLED):
        raise DroverError(
            Reason.ALREADY_EXISTS,
            f"{host_name(name)} has joined already.",
            subject=host_name(name),
        )
    moves = hosts.live_moves(tx, name)
    if moves:
        # A saga would take the new host, which is empty, for the one that it knew.
        raise DroverError(
            Reason.HOST_BUSY,
            f"{host_name(name)} is an end of {moves} moves that have not ended; "
            "a new host of that name would be taken for it.",
            subject=host_name(name),
            metadata={"host": name, "moves": str(moves)},
        )
    return hosts.update(
        tx, name, state=HostState.JOINING, state_reason="", adopt_domains=adopt_domains
    )
