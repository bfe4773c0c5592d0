"""DroverError: one exception for every error that a caller is told about.

It travels as google.rpc.Status with exactly one ErrorInfo, whose reason is a
symbol of `reasons.Reason` and whose metadata repeats the variable parts of the
message. `to_status` and `from_status` are each other's inverse as far as a
caller can see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from controlplane.common.reasons import Detail, Reason

ERROR_DOMAIN = "drover"


@dataclass(frozen=True)
class Violation:
    """One of several things that stand in the way.

    Attributes:
        subject: Resource or request field, as "hosts/b" or "page_size".
        description: One sentence.
        type: Reason symbol, for preconditions.
    """

    subject: str
    description: str
    type: str = ""


class DroverError(Exception):
    """An error with a reason from the table.

    Attributes:
        reason: Why.
        message: What happened, to what, why; the table's help is added to it.
        metadata: The variable parts of the message, by name.
        subject: Resource name or field the error is about.
        violations: Several things that stand in the way, one each.
        retry_seconds: When to ask again, for UNAVAILABLE reasons.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        subject: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
        retry_seconds: float = 1.0,
    ) -> None:
        super().__init__(f"{reason.name}: {message}")
        self.reason = reason
        self.message = message
        self.subject = subject
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_seconds = retry_seconds

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status code of the reason."""
        return self.reason.code

    @property
    def advice(self) -> str:
        """The message followed by what to do next."""
        return f"{self.message.rstrip()} {self.reason.info.help}"

    def to_status(self) -> status_pb2.Status:
        """Encode as google.rpc.Status."""
        info = error_details_pb2.ErrorInfo(
            reason=self.reason.name, domain=ERROR_DOMAIN, metadata=self.metadata
        )
        if self.subject:
            info.metadata["subject"] = self.subject
        details: list[Message] = [info, *self._detail()]
        status = status_pb2.Status(code=self.code.value[0], message=self.advice)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return status

    def _detail(self) -> list[Message]:
        violations = self.violations or (Violation(self.subject, self.message, self.reason.name),)
        match self.reason.info.detail:
            case Detail.BAD_REQUEST:
                bad = error_details_pb2.BadRequest()
                for v in violations:
                    bad.field_violations.add(field=v.subject, description=v.description)
                return [bad]
            case Detail.PRECONDITION:
                failure = error_details_pb2.PreconditionFailure()
                for v in violations:
                    failure.violations.add(
                        type=v.type or self.reason.name,
                        subject=v.subject,
                        description=v.description,
                    )
                return [failure]
            case Detail.RESOURCE:
                kind = self.subject.partition("/")[0]
                return [
                    error_details_pb2.ResourceInfo(
                        resource_type=kind, resource_name=self.subject, description=self.message
                    )
                ]
            case Detail.RETRY:
                delay = duration_pb2.Duration()
                delay.FromMilliseconds(round(self.retry_seconds * 1000))
                return [error_details_pb2.RetryInfo(retry_delay=delay)]
            case Detail.NONE:
                return []

    def to_json(self) -> dict[str, Any]:
        """Encode for storage: {reason, message, subject, metadata, violations}."""
        return {
            "reason": self.reason.name,
            "message": self.message,
            "subject": self.subject,
            "metadata": self.metadata,
            "violations": [[v.subject, v.description, v.type] for v in self.violations],
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> DroverError:
        """Decode what `to_json` stored; an unknown symbol becomes INTERNAL."""
        reason = Reason.__members__.get(str(stored.get("reason")), Reason.INTERNAL)
        return cls(
            reason,
            str(stored.get("message", "")),
            subject=str(stored.get("subject", "")),
            metadata=stored.get("metadata") or {},
            violations=[Violation(*v) for v in stored.get("violations") or ()],
        )

    @classmethod
    def from_status(cls, status: status_pb2.Status) -> DroverError | None:
        """Decode a status that Drover wrote.

        Returns:
            The error, or None when the status carries no ErrorInfo of Drover's.
        """
        info: error_details_pb2.ErrorInfo | None = None
        violations: list[Violation] = []
        retry_seconds = 1.0
        for detail in status.details:
            parsed_info = error_details_pb2.ErrorInfo()
            failure = error_details_pb2.PreconditionFailure()
            bad = error_details_pb2.BadRequest()
            retry = error_details_pb2.RetryInfo()
            if detail.Unpack(parsed_info) and parsed_info.domain == ERROR_DOMAIN:
                info = parsed_info
            elif detail.Unpack(failure):
                violations += [
                    Violation(v.subject, v.description, v.type) for v in failure.violations
                ]
            elif detail.Unpack(bad):
                violations += [Violation(v.field, v.description) for v in bad.field_violations]
            elif detail.Unpack(retry):
                retry_seconds = retry.retry_delay.ToMilliseconds() / 1000
        if info is None:
            return None
        reason = Reason.__members__.get(info.reason, Reason.INTERNAL)
        metadata = dict(info.metadata)
        subject = metadata.pop("subject", "")
        return cls(
            reason,
            status.message.removesuffix(reason.info.help).rstrip(),
            subject=subject,
            metadata=metadata,
            violations=violations,
            retry_seconds=retry_seconds,
        )


class Transient(Exception):
    """The outcome is unknown, or the other side cannot answer now: ask again until it is known.

    Attributes:
        error: What to tell whoever looks on meanwhile.
    """

    def __init__(self, error: DroverError) -> None:
        super().__init__(str(error))
        self.error = error


def status_from_json(stored: Mapping[str, Any]) -> status_pb2.Status:
    """The google.rpc.Status of an error stored with `DroverError.to_json`."""
    return DroverError.from_json(stored).to_status()
