"""MigrationService: moves, their history and the audit log."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc.aio
from sqlalchemy import Connection

from controlplane.api import moves
from controlplane.api.convert import (
    audit_to_proto,
    event_to_proto,
    migration_to_listed_proto,
    migration_to_proto,
    placement_to_proto,
)
from controlplane.api.etags import expected_generation
from controlplane.api.fields import check_text, invalid_field
from controlplane.api.options import resolve_options
from controlplane.api.paging import decode_token, encode_token, invalid_token, page_limit
from controlplane.api.plan import Plan, Wish, plan_move
from controlplane.api.request_ids import Call
from controlplane.api.services import Services
from controlplane.api.watch import follow
from controlplane.common import principal
from controlplane.common.errors import DroverError
from controlplane.common.identity import Identity
from controlplane.common.reasons import Reason
from controlplane.domain import rules
from controlplane.domain.model import Migration
from controlplane.domain.names import (
    canonical_uuid,
    flavor_name,
    host_name,
    instance_name,
    parse_flavor,
    parse_host,
    parse_instance,
    parse_migration,
)
from controlplane.domain.states import MigrationKind, MigrationState
from controlplane.security import roles
from controlplane.store import audit, instances, migrations
from controlplane.v1 import migration_pb2
from controlplane.v1 import migration_service_pb2 as pb
from controlplane.v1.migration_service_pb2_grpc import MigrationServiceServicer

Context = grpc.aio.ServicerContext[Any, Any]
Steer = Callable[[Connection, Migration, Identity], Migration]

_PLAN_ATTEMPTS = 3
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class MigrationServicer(MigrationServiceServicer):
    """See proto/controlplane/v1/migration_service.proto."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def CreateMigration(
        self, request: pb.CreateMigrationRequest, context: Context
    ) -> migration_pb2.Migration:
        """Plan a move and start it, or only tell the plan."""
        wish = Wish(
            instance_key=parse_instance(request.instance, "instance"),
            flavor=parse_flavor(request.flavor, "flavor") if request.flavor else "",
            host=parse_host(request.host, "host") if request.host else "",
            options=resolve_options(request.options, self._services.defaults),
            caller=principal.current(),
        )
        call = Call(self._services, "CreateMigration", request)
        if request.validate_only:
            return _planned(await plan_move(self._services, wish))
        earlier = await call.earlier_answer(migration_pb2.Migration)
        if earlier is not None:
            return earlier
        try:
            answer = await self._plan_and_admit(call, wish)
        except DroverError as error:
            refusal = error
        else:
            self._services.nudge()
            return answer
        return await call.answer_of_twin(migration_pb2.Migration, refusal)

    async def GetMigration(
        self, request: pb.GetMigrationRequest, context: Context
    ) -> migration_pb2.Migration:
        """Return one move."""
        migration_id = parse_migration(request.name)
        return await self._services.database.run(
            lambda tx: migration_to_proto(migrations.get(tx, migration_id))
        )

    async def ListMigrations(
        self, request: pb.ListMigrationsRequest, context: Context
    ) -> pb.ListMigrationsResponse:
        """Return moves, newest first."""
        limit = page_limit(request.page_size)
        key = parse_instance(request.instance, "instance") if request.instance else ""
        host = parse_host(request.host, "host") if request.host else ""
        states = [_state(number) for number in request.states]
        query = (key, host, *sorted({state.value for state in states}))
        before = _time_key(decode_token(request.page_token, "ListMigrations", query, 2))

        def read(tx: Connection) -> list[Migration]:
            uid = key if not key or canonical_uuid(key) else instances.resolve(tx, key).uid
            return migrations.list_page(
                tx, instance_uid=uid, host=host, states=states, before=before, limit=limit + 1
            )

        page = await self._services.database.run(read)
        token = ""
        if len(page) > limit:
            last = page[limit - 1]
            micros = (last.create_time - _EPOCH) // timedelta(microseconds=1)
            token = encode_token("ListMigrations", query, (str(micros), last.id))
        return pb.ListMigrationsResponse(
            migrations=[migration_to_listed_proto(move) for move in page[:limit]],
            next_page_token=token,
        )

    async def WatchMigration(
        self, request: pb.WatchMigrationRequest, context: Context
    ) -> AsyncIterator[migration_pb2.Migration]:
        """Stream a move until it rests."""
        changes = follow(
            self._services.database,
            self._services.notifier,
            parse_migration(request.name),
            until_final=request.until_final,
        )
        shown: migration_pb2.Placement | None = None
        async for move in changes:
            answer = migration_to_proto(move)
            if answer.placement == shown:
                answer.placement.ClearField("verdicts")
            else:
                shown = migration_pb2.Placement()
                shown.CopyFrom(answer.placement)
            yield answer

    async def ConfirmMigration(
        self, request: pb.ConfirmMigrationRequest, context: Context
    ) -> migration_pb2.Migration:
        """Have the source copy deleted."""
        return await self._steer(
            "confirm",
            request,
            lambda tx, move, caller: moves.confirm(tx, self._services, move, by=caller.uri),
            etag=request.etag,
        )

    async def RevertMigration(
        self, request: pb.RevertMigrationRequest, context: Context
    ) -> migration_pb2.Migration:
        """Have the machine brought back."""
        return await self._steer(
            "revert",
            request,
            lambda tx, move, caller: moves.revert(tx, self._services, move, by=caller.uri),
            etag=request.etag,
        )

    async def CancelMigration(
        self, request: pb.CancelMigrationRequest, context: Context
    ) -> migration_pb2.Migration:
        """Have a move turn round."""
        sagas = self._services.sagas
        return await self._steer(
            "cancel",
            request,
            lambda tx, move, caller: moves.cancel(tx, sagas, move, by=caller.uri),
        )

    async def LimitMigration(
        self, request: pb.LimitMigrationRequest, context: Context
    ) -> migration_pb2.Migration:
        """Have a move copy faster or slower."""
        sagas, limit = self._services.sagas, request.bandwidth_limit_bytes_per_second
        return await self._steer(
            "limit",
            request,
            lambda tx, move, caller: moves.limit(
                tx, sagas, move, by=caller.uri, bytes_per_second=limit
            ),
        )

    async def RetryMigration(
        self, request: pb.RetryMigrationRequest, context: Context
    ) -> migration_pb2.Migration:
        """Have a stuck move try again."""
        sagas = self._services.sagas
        return await self._steer(
            "retry",
            request,
            lambda tx, move, caller: moves.retry(tx, sagas, move, by=caller.uri),
        )

    async def AbandonMigration(
        self, request: pb.AbandonMigrationRequest, context: Context
    ) -> migration_pb2.Migration:
        """Give up on a stuck move."""
        sagas = self._services.sagas
        comment = check_text("comment", request.comment, required=True)
        return await self._steer(
            "abandon",
            request,
            lambda tx, move, caller: moves.abandon(tx, sagas, move, by=caller.uri, comment=comment),
        )

    async def ListMigrationEvents(
        self, request: pb.ListMigrationEventsRequest, context: Context
    ) -> pb.ListMigrationEventsResponse:
        """Return the history of a move, oldest first."""
        limit = page_limit(request.page_size)
        migration_id = parse_migration(request.parent, "parent")
        after = _number(decode_token(request.page_token, "ListMigrationEvents", (migration_id,), 1))

        def read(tx: Connection) -> list[migration_pb2.MigrationEvent]:
            migrations.get(tx, migration_id)
            found = migrations.events(tx, migration_id, after=after or 0, limit=limit + 1)
            return [event_to_proto(event) for event in found]

        page = await self._services.database.run(read)
        token = ""
        if len(page) > limit:
            key = (str(page[limit - 1].sequence),)
            token = encode_token("ListMigrationEvents", (migration_id,), key)
        return pb.ListMigrationEventsResponse(events=page[:limit], next_page_token=token)

    async def ListAuditEntries(
        self, request: pb.ListAuditEntriesRequest, context: Context
    ) -> pb.ListAuditEntriesResponse:
        """Return who asked for what, newest first."""
        limit = page_limit(request.page_size)
        before = _number(decode_token(request.page_token, "ListAuditEntries", (), 1))
        page = await self._services.database.run(
            lambda tx: audit.list_page(tx, before=before, limit=limit + 1)
        )
        token = ""
        if len(page) > limit:
            token = encode_token("ListAuditEntries", (), (str(page[limit - 1].seq),))
        return pb.ListAuditEntriesResponse(
            entries=[audit_to_proto(entry) for entry in page[:limit]], next_page_token=token
        )

    async def _plan_and_admit(self, call: Call, wish: Wish) -> migration_pb2.Migration:
        """Plan anew when somebody else took the room in between."""
        attempt = 1
        while True:
            plan = await plan_move(self._services, wish)
            try:
                return await call.run(
                    migration_pb2.Migration,
                    lambda tx, plan=plan: migration_to_proto(  # type: ignore[misc]
                        moves.admit(tx, self._services, plan)
                    ),
                )
            except DroverError as error:
                if error.reason is not Reason.CLAIM_LOST or attempt == _PLAN_ATTEMPTS:
                    raise
            attempt += 1

    async def _steer(
        self, action: str, request: Any, steer: Steer, *, etag: str = ""
    ) -> migration_pb2.Migration:
        """Change the course of a move in one transaction."""
        migration_id = parse_migration(request.name)
        caller = principal.current()

        def work(tx: Connection) -> migration_pb2.Migration:
            move = migrations.get(tx, migration_id)
            instance = instances.get(tx, move.instance_uid)
            roles.check_project(caller, project=instance.project, action=action)
            if action in ("confirm", "revert"):
                rules.check_unlocked_for(instance, caller)
            generation = expected_generation(etag)
            if generation is not None and generation != move.generation:
                raise DroverError(
                    Reason.ETAG_MISMATCH,
                    f"{request.name} changed while it was being looked at.",
                    subject=request.name,
                    metadata={"expected": etag},
                )
            return migration_to_proto(steer(tx, move, caller))

        method = f"{action.capitalize()}Migration"
        answer = await Call(self._services, method, request).run(migration_pb2.Migration, work)
        self._services.notifier.changed(migration_id)
        self._services.nudge()
        return answer


def _planned(plan: Plan) -> migration_pb2.Migration:
    """What validate_only answers: the move without a name, because there is none."""
    kind = MigrationKind.RESIZE if plan.flavor else MigrationKind.MIGRATION
    return migration_pb2.Migration(
        instance=instance_name(plan.instance.uid),
        instance_display_name=plan.instance.name,
        kind=kind.number,
        source_host=host_name(plan.instance.host),
        target_host=host_name(plan.placement.chosen_host),
        flavor=flavor_name(plan.wish.flavor),
        options=plan.wish.options,
        placement=placement_to_proto(plan.placement),
        created_by=plan.wish.caller.uri,
    )


def _state(number: int) -> MigrationState:
    state = MigrationState.from_number(number)
    if state is None:
        raise invalid_field("states", number, "known states")
    return state


def _time_key(key: tuple[str, ...] | None) -> tuple[datetime, str] | None:
    if key is None:
        return None
    micros = _number((key[0],))
    try:
        return _EPOCH + timedelta(microseconds=micros or 0), key[1]
    except OverflowError:
        raise invalid_token("It is not a token that this service made.") from None


def _number(key: tuple[str, ...] | None) -> int | None:
    if key is None:
        return None
    if not key[0].isascii() or not key[0].isdigit() or len(key[0]) > 18:
        raise invalid_token("It is not a token that this service made.")
    return int(key[0])
