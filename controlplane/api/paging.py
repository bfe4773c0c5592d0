"""Pages: sizes, and tokens that are bound to the query they continue.

A token is base64url of JSON {"q": hash of the query, "k": [key of the last
row]}. It holds no secret and no position that could shift: the next page begins
after a key, so rows that come or go in between disturb nothing.
"""

from __future__ import annotations

import base64
import hashlib

import msgspec

from controlplane.common.errors import DroverError, Violation
from controlplane.common.foreign_json import decode
from controlplane.common.reasons import Reason

DEFAULT_PAGE_SIZE = 100
LARGEST_PAGE_SIZE = 1000


class _Token(msgspec.Struct, frozen=True):
    q: str
    k: list[str]


def page_limit(page_size: int) -> int:
    """How many rows a page holds.

    Raises:
        DroverError: INVALID_FIELD for a negative size.
    """
    if page_size < 0:
        message = f"page_size is {page_size}; it has to be 0 or more."
        raise DroverError(
            Reason.INVALID_FIELD,
            message,
            subject="page_size",
            metadata={"page_size": str(page_size)},
            violations=[Violation("page_size", message)],
        )
    return min(page_size or DEFAULT_PAGE_SIZE, LARGEST_PAGE_SIZE)


def encode_token(method: str, query: tuple[str, ...], key: tuple[str, ...]) -> str:
    """The token of the page after `key`."""
    token = _Token(q=_hash(method, query), k=list(key))
    return base64.urlsafe_b64encode(msgspec.json.encode(token)).rstrip(b"=").decode()


def decode_token(
    word: str, method: str, query: tuple[str, ...], parts: int
) -> tuple[str, ...] | None:
    """The key that the next page begins after.

    Args:
        word: The token; empty for the first page.
        method: Name of the list method.
        query: Everything that selects rows, apart from the page size.
        parts: Number of parts of the key.

    Returns:
        The key; None for the first page.

    Raises:
        DroverError: INVALID_PAGE_TOKEN when it is damaged or of another query.
    """
    if not word:
        return None
    try:
        raw = base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_", validate=True)
        token = decode(raw, _Token)
    except ValueError:
        raise invalid_token("It is not a token that this service made.") from None
    if any("\0" in part for part in token.k):
        # No row has such a key, and PostgreSQL no text.
        raise invalid_token("It is not a token that this service made.")
    if len(token.k) != parts:
        raise invalid_token("It is a token of another list.")
    if token.q != _hash(method, query):
        raise invalid_token("It belongs to a query with other filters.")
    return tuple(token.k)


def invalid_token(why: str) -> DroverError:
    """The error for a token that cannot be used."""
    message = f"page_token cannot be used. {why}"
    return DroverError(
        Reason.INVALID_PAGE_TOKEN,
        message,
        subject="page_token",
        violations=[Violation("page_token", message)],
    )


def _hash(method: str, query: tuple[str, ...]) -> str:
    return hashlib.sha256(msgspec.json.encode([method, *query])).hexdigest()[:16]
