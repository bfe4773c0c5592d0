"""Who is calling: the identity of the call being answered.

The server's authentication check sets it for the task of one call; everything
below the API reads it from here instead of handing it through every function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from controlplane.common.errors import DroverError
from controlplane.common.identity import Identity
from controlplane.common.reasons import Reason

_current: ContextVar[Identity | None] = ContextVar("drover_principal", default=None)


def current() -> Identity:
    """The caller.

    Raises:
        DroverError: UNAUTHENTICATED when nobody has been identified.
    """
    identity = _current.get()
    if identity is None:
        raise DroverError(Reason.UNAUTHENTICATED, "Nobody was identified for this call.")
    return identity


def current_or_none() -> Identity | None:
    """The caller, or None when nobody has been identified."""
    return _current.get()


def identify(identity: Identity) -> None:
    """Set the caller for the rest of the present task."""
    _current.set(identity)


@contextmanager
def use(identity: Identity) -> Iterator[None]:
    """Act as a caller within a block."""
    token = _current.set(identity)
    try:
        yield
    finally:
        _current.reset(token)
