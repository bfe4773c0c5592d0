"""Decoding JSON that somebody else wrote: one error, whatever is wrong with it."""

from __future__ import annotations

from typing import TypeVar

import msgspec

T = TypeVar("T")


def decode(data: bytes | str, kind: type[T]) -> T:
    """Decode and validate.

    Args:
        data: The text.
        kind: A msgspec struct, or any type that msgspec knows.

    Raises:
        ValueError: It is not JSON, does not fit the type, or is nested too deeply.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
