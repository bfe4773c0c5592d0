"""Calls that may be repeated: one request id, one effect, one answer.

The answer is kept in the transaction of the effect. So a repeated call finds
either both or neither, also when the first one's connection broke, when two
arrive at once, and on another replica.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from google.protobuf.message import Message
from sqlalchemy import Connection

from controlplane.api.services import Services
from controlplane.common import principal
from controlplane.common.errors import DroverError, Violation
from controlplane.common.reasons import Reason
from controlplane.domain.names import canonical_uuid
from controlplane.store import requests

KEPT_FOR = timedelta(hours=24)
A = TypeVar("A", bound=Message)


class _LostRace(Exception):
    """The same call was answered by another transaction meanwhile."""


class Call:
    """One mutating call.

    Args:
        services: Where answers are kept.
        method: Short method name, as "CreateMigration".
        request: A request with a `request_id` field.

    Raises:
        DroverError: INVALID_FIELD when the request id is not a UUID.
    """

    def __init__(self, services: Services, method: str, request: Any) -> None:
        self._services = services
        self._method = method
        self._request_id = _checked_id(request.request_id)
        self._principal = principal.current().uri
        body = type(request)()
        body.CopyFrom(request)
        body.ClearField("request_id")
        self._body_sha256 = hashlib.sha256(body.SerializeToString(deterministic=True)).hexdigest()

    async def earlier_answer(self, kind: type[A]) -> A | None:
        """The answer that this call was given before, if it was.

        Raises:
            DroverError: REQUEST_ID_REUSED when the id came with another request.
        """
        return await self._services.database.run(lambda tx: self._earlier(tx, kind))

    async def run(self, kind: type[A], work: Callable[[Connection], A]) -> A:
        """Do the work once and answer; repeat the answer when it was done before.

        Args:
            kind: Type of the answer.
            work: Does it in the given transaction and returns the answer.

        Raises:
            DroverError: REQUEST_ID_REUSED, or whatever the work raises.
        """
        try:
            return await self._services.database.run(lambda tx: self._once(tx, kind, work))
        except (_LostRace, DroverError) as error:
            refusal = error
        return await self.answer_of_twin(kind, refusal)

    async def answer_of_twin(self, kind: type[A], refusal: Exception) -> A:
        """The answer to the same call by another request, which may be why this one was refused.

        Losing to a twin can show as any refusal, such as "already moving": then
        the twin's answer is ours.

        Raises:
            Exception: The refusal, when there is no twin.
            DroverError: REQUEST_ID_REUSED.
        """
        twin = await self.earlier_answer(kind) if self._request_id else None
        if twin is None:
            raise refusal
        return twin

    def _once(self, tx: Connection, kind: type[A], work: Callable[[Connection], A]) -> A:
        earlier = self._earlier(tx, kind)
        if earlier is not None:
            return earlier
        answer = work(tx)
        if self._request_id:
            now = self._services.clock()
            kept = requests.keep(
                tx,
                self._principal,
                self._method,
                self._request_id,
                answered=requests.Answered(self._body_sha256, answer.SerializeToString()),
                now=now,
                expire_time=now + KEPT_FOR,
            )
            if not kept:
                raise _LostRace
        return answer

    def _earlier(self, tx: Connection, kind: type[A]) -> A | None:
        if not self._request_id:
            return None
        found = requests.find(
            tx, self._principal, self._method, self._request_id, self._services.clock()
        )
        if found is None:
            return None
        if found.body_sha256 != self._body_sha256:
            message = f"request_id {self._request_id} was used for another {self._method}."
            raise DroverError(
                Reason.REQUEST_ID_REUSED,
                message,
                subject="request_id",
                metadata={"request_id": self._request_id},
                violations=[Violation("request_id", message)],
            )
        return kind.FromString(found.response)


def _checked_id(request_id: str) -> str:
    if not request_id:
        return ""
    canonical = canonical_uuid(request_id)
    if canonical is None:
        message = "request_id has to be a UUID."
        raise DroverError(
            Reason.INVALID_FIELD,
            message,
            subject="request_id",
            violations=[Violation("request_id", message)],
        )
    return canonical
