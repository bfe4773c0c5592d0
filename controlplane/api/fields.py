"""Checks of single request fields."""

from __future__ import annotations

from controlplane.common.errors import DroverError, Violation
from controlplane.common.reasons import Reason

LONGEST_TEXT = 500


def invalid_field(field: str, value: object, expected: str) -> DroverError:
    """INVALID_FIELD for a value that is wrong in any state."""
    shown = str(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    message = f"{field} is {shown!r}; it has to be {expected}."
    return DroverError(
        Reason.INVALID_FIELD,
        message,
        subject=field,
        metadata={"field": field, "value": shown},
        violations=[Violation(field, message)],
    )


def check_text(field: str, value: str, *, required: bool) -> str:
    """A text for people, without surrounding blanks.

    Raises:
        DroverError: INVALID_FIELD when it is too long, missing and required, or has
            characters that would act on the terminal it is shown on.
    """
    text = value.strip()
    if len(text) > LONGEST_TEXT or not text.isprintable() or (required and not text):
        least = 1 if required else 0
        raise invalid_field(field, text, f"one line of {least} to {LONGEST_TEXT} characters")
    return text


def check_range(field: str, value: int, least: int, most: int) -> int:
    """A whole number within bounds, both included.

    Raises:
        DroverError: INVALID_FIELD.
    """
    if not least <= value <= most:
        raise invalid_field(field, value, f"{least} to {most}")
    return value


def check_address(field: str, value: str) -> str:
    """HOST:PORT, with an IPv6 host in brackets.

    Raises:
        DroverError: INVALID_FIELD.
    """
    host, separator, port = value.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    good_port = port.isascii() and port.isdigit() and 0 < int(port[:6]) <= 65535
    good_host = bool(bare) and not any(c.isspace() or c in "/@[]" for c in bare)
    bracketed = host.startswith("[") and host.endswith("]")
    if not separator or not good_port or not good_host or (":" in bare and not bracketed):
        raise invalid_field(field, value, "HOST:PORT, as in 10.0.0.2:7442")
    return value
