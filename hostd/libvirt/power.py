"""Power of a domain: what it is, and changing it.

Errors are DroverError. "Does nothing when ..." lets a caller repeat a call whose
answer it lost.
"""

from __future__ import annotations

import time

import libvirt
import structlog

from controlplane.common.reasons import Reason
from hostd.libvirt.errors import is_connection_trouble, translated
from hostd.v1 import domain_pb2

log = structlog.stdlib.get_logger(__name__)

_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: domain_pb2.POWER_STATE_RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: domain_pb2.POWER_STATE_RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: domain_pb2.POWER_STATE_PAUSED,
    libvirt.VIR_DOMAIN_SHUTDOWN: domain_pb2.POWER_STATE_CHANGING,
    libvirt.VIR_DOMAIN_SHUTOFF: domain_pb2.POWER_STATE_SHUTOFF,
    libvirt.VIR_DOMAIN_CRASHED: domain_pb2.POWER_STATE_CRASHED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: domain_pb2.POWER_STATE_SUSPENDED,
}
# A paused domain whose pause ends by itself.
_PASSING_PAUSES = frozenset(
    {
        libvirt.VIR_DOMAIN_PAUSED_MIGRATION,
        libvirt.VIR_DOMAIN_PAUSED_SAVE,
        libvirt.VIR_DOMAIN_PAUSED_DUMP,
        libvirt.VIR_DOMAIN_PAUSED_FROM_SNAPSHOT,
        libvirt.VIR_DOMAIN_PAUSED_SHUTTING_DOWN,
        libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT,
        libvirt.VIR_DOMAIN_PAUSED_STARTING_UP,
    }
)
_AGENT_SECONDS = 3
# An answer of QEMU takes milliseconds; one that is out for this long does not come.
HUNG_AFTER_MILLISECONDS = 5000


def power_state(dom: libvirt.virDomain) -> domain_pb2.PowerState.ValueType:
    """What the domain does.

    Raises:
        DroverError: DOMAIN_NOT_FOUND, LIBVIRT_UNAVAILABLE.
    """
    with translated(_subject(dom)):
        state, reason = dom.state(0)
        if state == libvirt.VIR_DOMAIN_SHUTOFF and dom.hasManagedSaveImage(0):
            return domain_pb2.POWER_STATE_SAVED
    if state == libvirt.VIR_DOMAIN_PAUSED and reason in _PASSING_PAUSES:
        return domain_pb2.POWER_STATE_CHANGING
    return _STATES.get(state, domain_pb2.POWER_STATE_CHANGING)


def is_hung(dom: libvirt.virDomain) -> bool:
    """True when the domain's QEMU has not answered libvirt for seconds.

    A further question would wait behind the open one, possibly for ever; this one
    asks libvirt only.

    Raises:
        DroverError: DOMAIN_NOT_FOUND, LIBVIRT_UNAVAILABLE.
    """
    with translated(_subject(dom)):
        try:
            state, _, milliseconds = dom.controlInfo(0)
        except libvirt.libvirtError as error:
            if is_connection_trouble(error) or dom.isActive():
                raise
            return False
    return bool(
        state == libvirt.VIR_DOMAIN_CONTROL_ERROR
        or (state == libvirt.VIR_DOMAIN_CONTROL_OCCUPIED and milliseconds > HUNG_AFTER_MILLISECONDS)
    )


def went_off_by_itself(dom: libvirt.virDomain) -> bool:
    """True when the domain is off because the guest shut itself down.

    False when it was powered off, crashed or failed, and after a restart of
    libvirtd, which does not remember why.
    """
    with translated(_subject(dom)):
        state, reason = dom.state(0)
    return bool(
        state == libvirt.VIR_DOMAIN_SHUTOFF and reason == libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN
    )


def request_shutdown(dom: libvirt.virDomain) -> None:
    """Press the ACPI power button; does nothing when the domain is off or hung.

    May wait for as long as QEMU does not answer.

    Raises:
        DroverError: LIBVIRT_UNAVAILABLE, INSTANCE_STATE, or what libvirt met.
    """
    if is_hung(dom):
        log.warning("QEMU does not answer; the power button was not pressed")
        return
    with translated(_subject(dom), Reason.INSTANCE_STATE):
        try:
            dom.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
        except libvirt.libvirtError as error:
            if is_connection_trouble(error) or dom.isActive():
                raise


def force_off(dom: libvirt.virDomain) -> None:
    """Pull the plug; does nothing when the domain is off.

    QEMU is asked to end first, so that it can flush what the guest believes
    written; only a QEMU that does not, or hangs, is killed.

    Raises:
        DroverError: LIBVIRT_UNAVAILABLE, INSTANCE_STATE, or what libvirt met.
    """
    ways = (0,) if is_hung(dom) else (libvirt.VIR_DOMAIN_DESTROY_GRACEFUL, 0)
    with translated(_subject(dom), Reason.INSTANCE_STATE):
        for flags in ways:
            try:
                dom.destroyFlags(flags)
                return
            except libvirt.libvirtError as error:
                if is_connection_trouble(error):
                    raise
                if not dom.isActive():
                    return
                if flags == 0:
                    raise
                log.warning("QEMU does not end when asked; killing it", error=str(error))


def start(dom: libvirt.virDomain) -> None:
    """Power the domain on; does nothing when it is on.

    Raises:
        DroverError: START_FAILED with QEMU's or libvirt's own words,
            LIBVIRT_UNAVAILABLE.
    """
    with translated(_subject(dom), Reason.START_FAILED):
        try:
            dom.createWithFlags(0)
        except libvirt.libvirtError as error:
            if is_connection_trouble(error) or not dom.isActive():
                raise


def sync_time(dom: libvirt.virDomain) -> bool:
    """Give the guest the host's time through its agent; best effort.

    Waits a few seconds at most.

    Returns:
        True when an agent answered and took the time.

    Raises:
        DroverError: LIBVIRT_UNAVAILABLE.
    """
    try:
        dom.agentSetResponseTimeout(_AGENT_SECONDS, 0)
        seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        dom.setTime({"seconds": seconds, "nseconds": nanoseconds}, 0)
    except libvirt.libvirtError as error:
        if is_connection_trouble(error):
            with translated(_subject(dom)):
                raise
        log.debug("the guest's clock was not set", domain=dom.UUIDString(), error=str(error))
        return False
    return True


def _subject(dom: libvirt.virDomain) -> str:
    return f"domains/{dom.UUIDString()}"
