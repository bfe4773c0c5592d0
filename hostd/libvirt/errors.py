"""What a libvirt error means to a caller of Drover: the one place that decides it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import libvirt

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from hostd.disks.trouble import FULL

# The connection itself is in trouble, whatever the call was.
_CONNECTION_CODES = frozenset(
    {
        libvirt.VIR_ERR_NO_CONNECT,
        libvirt.VIR_ERR_INVALID_CONN,
        libvirt.VIR_ERR_RPC,
        libvirt.VIR_ERR_NO_SERVER,
        libvirt.VIR_ERR_AUTH_FAILED,
        libvirt.VIR_ERR_AUTH_CANCELLED,
        libvirt.VIR_ERR_AUTH_UNAVAILABLE,
    }
)
# In these domains any of the codes below says that the daemon cannot be talked to.
_CONNECTION_DOMAINS = frozenset(
    {libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE, libvirt.VIR_FROM_POLKIT}
)
_CONNECTION_DOMAIN_CODES = frozenset(
    {
        libvirt.VIR_ERR_SYSTEM_ERROR,
        libvirt.VIR_ERR_INTERNAL_ERROR,
        libvirt.VIR_ERR_OPERATION_FAILED,
        libvirt.VIR_ERR_OPERATION_INVALID,
    }
)
_REASONS = {
    libvirt.VIR_ERR_NO_DOMAIN: Reason.DOMAIN_NOT_FOUND,
    libvirt.VIR_ERR_DOM_EXIST: Reason.TARGET_NAME_TAKEN,
    libvirt.VIR_ERR_OPERATION_INVALID: Reason.INSTANCE_STATE,
    # Another call holds the domain's job lock; it lets go of it by itself.
    libvirt.VIR_ERR_OPERATION_TIMEOUT: Reason.LIBVIRT_UNAVAILABLE,
    libvirt.VIR_ERR_CONFIG_UNSUPPORTED: Reason.BUILD_FAILED,
    libvirt.VIR_ERR_XML_ERROR: Reason.BUILD_FAILED,
    libvirt.VIR_ERR_XML_DETAIL: Reason.BUILD_FAILED,
}


def is_connection_trouble(error: libvirt.libvirtError) -> bool:
    """True when the daemon could not be talked to, so the outcome is unknown."""
    code, domain = error.get_error_code(), error.get_error_domain()
    return code in _CONNECTION_CODES or (
        domain in _CONNECTION_DOMAINS and code in _CONNECTION_DOMAIN_CODES
    )


def translate(
    error: libvirt.libvirtError,
    subject: str,
    otherwise: Reason = Reason.INTERNAL,
    full: Reason | None = None,
) -> DroverError:
    """Turn a libvirt error into one with a reason.

    Args:
        error: What libvirt raised.
        subject: What it is about, as "domains/<uuid>".
        otherwise: The reason when (code, domain) has none of its own.
        full: The reason when libvirt had no room to write; `otherwise` when not given.

    Returns:
        LIBVIRT_UNAVAILABLE for connection trouble, else the reason of the table.
    """
    code, domain = error.get_error_code(), error.get_error_domain()
    text = (error.get_error_message() or str(error)).strip().rstrip(".")
    metadata = {"libvirt_code": str(code), "libvirt_domain": str(domain)}
    if is_connection_trouble(error):
        return DroverError(
            Reason.LIBVIRT_UNAVAILABLE,
            f"libvirt cannot be talked to: {text}.",
            subject=subject,
            metadata=metadata,
        )
    reason = _REASONS.get(code, otherwise) if code is not None else otherwise
    if full is not None and code == libvirt.VIR_ERR_SYSTEM_ERROR and error.get_int1() in FULL:
        reason = full
    if otherwise is not Reason.INTERNAL and reason is Reason.INSTANCE_STATE:
        # The caller knows better what an operation that is not possible now means.
        reason = otherwise
    return DroverError(reason, f"libvirt: {text}.", subject=subject, metadata=metadata)


@contextmanager
def translated(
    subject: str, otherwise: Reason = Reason.INTERNAL, full: Reason | None = None
) -> Iterator[None]:
    """Let libvirt errors leave the block as DroverError; see `translate`."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise translate(error, subject, otherwise, full) from error
