"""Etags: the generation of a row, as an opaque string."""

from __future__ import annotations

_PREFIX = "g"
_NEVER = -1


def etag_of(generation: int) -> str:
    """The etag of a row."""
    return f"{_PREFIX}{generation}"


def expected_generation(etag: str) -> int | None:
    """The generation that a caller expects.

    Returns:
        None for an empty etag; a generation that no row has for one that was
        never given out, so that it fails as any other stale etag.
    """
    if not etag:
        return None
    digits = etag.removeprefix(_PREFIX)
    if not etag.startswith(_PREFIX) or not digits.isascii() or not digits.isdigit():
        return _NEVER
    return int(digits) if len(digits) < 19 else _NEVER
