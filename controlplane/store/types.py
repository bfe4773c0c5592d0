"""Column types that read the same on SQLite and PostgreSQL.

Times are whole microseconds since the epoch, so that both databases order and
compare them exactly and none of them knows of time zones. Protos are JSON with
their proto field names, so that a person can read a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar

import msgspec
import sqlalchemy as sa
from google.protobuf import json_format
from google.protobuf.message import Message
from sqlalchemy.engine import Dialect
from sqlalchemy.types import JSON, TypeDecorator

from controlplane.domain.states import ProtoEnum

M = TypeVar("M", bound=Message)
E = TypeVar("E", bound=ProtoEnum)
S = TypeVar("S", bound=msgspec.Struct)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def utc_now() -> datetime:
    """The host's clock; for times that people read, never for leases."""
    return datetime.now(UTC)


class UtcTime(TypeDecorator[datetime]):
    """An aware UTC datetime, stored as microseconds since 1970."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        """Encode."""
        return None if value is None else (value - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Decode."""
        return None if value is None else _EPOCH + timedelta(microseconds=value)


class EnumText(TypeDecorator[E], Generic[E]):
    """A member of a string enum, stored by value; "" and None both mean none."""

    impl = sa.String(32)
    cache_ok = True

    def __init__(self, enum: type[E]) -> None:
        super().__init__()
        self.enum = enum

    def process_bind_param(self, value: E | None, dialect: Dialect) -> str | None:
        """Encode."""
        return None if value is None else value.value

    def process_result_value(self, value: Any, dialect: Dialect) -> E | None:
        """Decode."""
        return self.enum(value) if value else None


class ProtoJson(TypeDecorator[M], Generic[M]):
    """A proto message."""

    impl = JSON(none_as_null=True)
    cache_ok = True

    def __init__(self, message: type[M]) -> None:
        super().__init__()
        self.message = message

    def process_bind_param(self, value: M | None, dialect: Dialect) -> Any:
        """Encode."""
        return None if value is None else proto_to_json(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> M | None:
        """Decode."""
        return None if value is None else proto_from_json(value, self.message)


class ProtoListJson(TypeDecorator[tuple[M, ...]], Generic[M]):
    """Several proto messages of one type."""

    impl = JSON
    cache_ok = True

    def __init__(self, message: type[M]) -> None:
        super().__init__()
        self.message = message

    def process_bind_param(self, value: Sequence[M] | None, dialect: Dialect) -> Any:
        """Encode."""
        return [proto_to_json(message) for message in value or ()]

    def process_result_value(self, value: Any, dialect: Dialect) -> tuple[M, ...]:
        """Decode."""
        return tuple(proto_from_json(item, self.message) for item in value or ())


class StructJson(TypeDecorator[S], Generic[S]):
    """A msgspec struct."""

    impl = JSON(none_as_null=True)
    cache_ok = True

    def __init__(self, struct: type[S]) -> None:
        super().__init__()
        self.struct = struct

    def process_bind_param(self, value: S | None, dialect: Dialect) -> Any:
        """Encode."""
        return None if value is None else msgspec.to_builtins(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> S | None:
        """Decode."""
        return None if value is None else msgspec.convert(value, self.struct)


def proto_to_json(message: Message) -> dict[str, Any]:
    """A proto as plain JSON with its proto field names."""
    return dict(json_format.MessageToDict(message, preserving_proto_field_name=True))


def proto_from_json(stored: dict[str, Any], message: type[M]) -> M:
    """The proto of `proto_to_json`; fields that are no longer known are dropped."""
    return json_format.ParseDict(stored, message(), ignore_unknown_fields=True)
