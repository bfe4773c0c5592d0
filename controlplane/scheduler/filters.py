"""Reasons why a host cannot receive a machine.

Each filter looks at one thing and answers None, or a reason with a sentence that
holds what was found and against which limit. They run in the order of `FILTERS`,
from what an operator decided to what the machine needs, and the first refusal is
the host's verdict. From `has_reported` on a host has facts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from controlplane.common.reasons import Reason
from controlplane.domain.states import HostState
from controlplane.scheduler.request import HostView, Request
from hostd.v1 import host_pb2

Refusal = tuple[Reason, str]
Filter = Callable[[Request, HostView], Refusal | None]

_GIB = 1024**3
# Far more than a report takes on its way.
MAX_CLOCK_SKEW_SECONDS = 60


def not_source(request: Request, host: HostView) -> Refusal | None:
    """The machine is not there already."""
    if host.name == request.source:
        return Reason.SAME_HOST, "The machine is on this host already."
    return None


def requested(request: Request, host: HostView) -> Refusal | None:
    """It is the host that was asked for, if one was."""
    if request.requested_host and host.name != request.requested_host:
        return Reason.HOST_NOT_REQUESTED, f"Only hosts/{request.requested_host} was asked for."
    return None


def enabled(request: Request, host: HostView) -> Refusal | None:
    """Operators let the scheduler use it."""
    if host.state is HostState.GONE:
        return Reason.HOST_GONE, f"It was declared gone: {host.state_reason}."
    if host.state is HostState.JOINING:
        return Reason.HOST_NOT_JOINED, "It was announced and has not joined yet."
    if host.state is HostState.DISABLED:
        why = f": {host.state_reason}" if host.state_reason else ""
        return Reason.HOST_DISABLED, f"It is disabled{why}."
    return None


def has_reported(request: Request, host: HostView) -> Refusal | None:
    """Its facts are known."""
    if host.facts is None:
        return Reason.HOST_NOT_JOINED, "It has not reported yet."
    return None


def alive(request: Request, host: HostView) -> Refusal | None:
    """It answers, and its libvirt does."""
    if not host.alive:
        since = f"{host.last_seen:%Y-%m-%d %H:%M:%S} UTC" if host.last_seen else "ever"
        return Reason.HOST_DEAD, f"It has not answered since {since}."
    if not _facts(host).libvirt_connected:
        return Reason.LIBVIRT_UNAVAILABLE, "Its hostd has no connection to libvirt."
    return None


def clock(request: Request, host: HostView) -> Refusal | None:
    """Its clock agrees with the control plane's, by which certificates and deadlines go."""
    facts = _facts(host)
    if host.last_seen is None or not facts.HasField("time"):
        return None
    ahead_seconds = facts.time.seconds - host.last_seen.timestamp()
    if abs(ahead_seconds) <= MAX_CLOCK_SKEW_SECONDS:
        return None
    where = "ahead of" if ahead_seconds > 0 else "behind"
    return (
        Reason.TARGET_CLOCK_SKEW,
        f"Its clock is {abs(ahead_seconds):.0f} s {where} the control plane's; "
        f"at most {MAX_CLOCK_SKEW_SECONDS} s are allowed.",
    )


def arch(request: Request, host: HostView) -> Refusal | None:
    """Its CPUs are of the machine's architecture."""
    wanted, found = request.machine.arch, _facts(host).arch
    if wanted and found and wanted != found:
        return (
            Reason.TARGET_LACKS_VIRT_TYPE,
            f"Its CPUs are {found}; the machine needs {wanted}.",
        )
    return None


def virt_type(request: Request, host: HostView) -> Refusal | None:
    """It offers the machine's kind of virtualisation."""
    wanted = request.machine.virt_type
    return _lacks(
        Reason.TARGET_LACKS_VIRT_TYPE, "virtualisation", [wanted], _facts(host).virt_types
    )


def machine_type(request: Request, host: HostView) -> Refusal | None:
    """Its QEMU has the machine type."""
    return _lacks(
        Reason.TARGET_LACKS_MACHINE_TYPE,
        "machine type",
        [request.machine.machine_type],
        _facts(host).machine_types,
        show=False,
    )


def firmware(request: Request, host: HostView) -> Refusal | None:
    """It has the machine's firmware."""
    return _lacks(
        Reason.TARGET_LACKS_FIRMWARE,
        "firmware",
        [request.machine.firmware],
        _facts(host).firmwares,
    )


def tpm(request: Request, host: HostView) -> Refusal | None:
    """It can emulate a TPM if the machine has one."""
    if request.machine.has_tpm and not _facts(host).tpm:
        return Reason.TARGET_LACKS_TPM, "The machine has a TPM and swtpm is not installed."
    return None


def bridges(request: Request, host: HostView) -> Refusal | None:
    """It has every bridge that the machine is attached to."""
    wanted = [i.source for i in request.machine.interfaces if i.type == "bridge"]
    return _lacks(Reason.TARGET_LACKS_BRIDGE, "bridge", wanted, _facts(host).bridges)


def networks(request: Request, host: HostView) -> Refusal | None:
    """It has every libvirt network that the machine is attached to."""
    wanted = [i.source for i in request.machine.interfaces if i.type == "network"]
    return _lacks(Reason.TARGET_LACKS_NETWORK, "active network", wanted, _facts(host).networks)


def vcpus(request: Request, host: HostView) -> Refusal | None:
    """The virtual CPUs fit beside what is claimed."""
    free = host.limits.vcpus - host.claimed.vcpus
    if request.size.vcpus > free:
        return (
            Reason.TARGET_LACKS_CPUS,
            f"{free} of {host.limits.vcpus} virtual CPUs are unclaimed; "
            f"the machine needs {request.size.vcpus}.",
        )
    return None


def memory(request: Request, host: HostView) -> Refusal | None:
    """The memory fits beside what is claimed."""
    free = host.limits.memory_mib - host.claimed.memory_mib
    if request.size.memory_mib > free:
        return (
            Reason.TARGET_LACKS_MEMORY,
            f"{free} of {host.limits.memory_mib} MiB of memory are unclaimed; "
            f"the machine needs {request.size.memory_mib} MiB.",
        )
    return None


def roots(request: Request, host: HostView) -> Refusal | None:
    """It has every storage root that the machine's volumes lie in."""
    present = [root.name for root in _facts(host).roots]
    return _lacks(Reason.TARGET_LACKS_ROOT, "storage root", sorted(request.needed_by_root), present)


def space(request: Request, host: HostView) -> Refusal | None:
    """Each file system has room for its share of the disks.

    Claims do not say in which root their disk will be, so all of them count
    against each file system: a host is rather passed over than overfilled.
    """
    needed: dict[tuple[int, str], int] = {}
    available: dict[tuple[int, str], int] = {}
    names: dict[tuple[int, str], list[str]] = {}
    for root in _facts(host).roots:
        if root.name not in request.needed_by_root:
            continue
        device = (root.device_id, "" if root.device_id else root.name)
        needed[device] = needed.get(device, 0) + request.needed_by_root[root.name]
        available[device] = min(available.get(device, root.available_bytes), root.available_bytes)
        names.setdefault(device, []).append(root.name)
    for device, bytes_needed in needed.items():
        free = available[device] - host.claimed.disk_bytes
        if bytes_needed > free:
            return (
                Reason.TARGET_LACKS_SPACE,
                f"{_gib(max(0, free))} are free in storage root {', '.join(names[device])}; "
                f"the disks need {_gib(bytes_needed)}.",
            )
    return None


def collisions(request: Request, host: HostView) -> Refusal | None:
    """Nothing there bears the machine's UUID, name or a MAC address of it."""
    for neighbour in host.neighbours:
        if neighbour.uuid == request.machine.uuid:
            return (
                Reason.TARGET_UUID_TAKEN,
                f"A domain with UUID {neighbour.uuid} ({neighbour.name}) is there already.",
            )
    for neighbour in host.neighbours:
        if not neighbour.mac:
            return (
                Reason.TARGET_NAME_TAKEN,
                f"Another domain called {neighbour.name} is there ({neighbour.uuid}).",
            )
    for neighbour in host.neighbours:
        return (
            Reason.TARGET_MAC_TAKEN,
            f"The domain {neighbour.name} there has the MAC address {neighbour.mac}.",
        )
    return None


FILTERS: tuple[Filter, ...] = (
    not_source,
    requested,
    enabled,
    has_reported,
    alive,
    clock,
    arch,
    virt_type,
    machine_type,
    firmware,
    tpm,
    bridges,
    networks,
    vcpus,
    memory,
    roots,
    space,
    collisions,
)


def first_refusal(request: Request, host: HostView) -> Refusal | None:
    """Why the host cannot receive the machine; None when it can."""
    for check in FILTERS:
        refusal = check(request, host)
        if refusal is not None:
            return refusal
    return None


def _facts(host: HostView) -> host_pb2.HostFacts:
    if host.facts is None:
        raise AssertionError("has_reported comes before every filter that needs facts")
    return host.facts


def _lacks(
    reason: Reason,
    what: str,
    wanted: Iterable[str],
    present: Collection[str],
    *,
    show: bool = True,
) -> Refusal | None:
    missing = sorted({name for name in wanted if name and name not in present})
    if not missing:
        return None
    has = f"; it has {', '.join(sorted(present)) or 'none'}" if show else ""
    return reason, f"It lacks {what} {', '.join(missing)}{has}."


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:.1f} GiB" if size_bytes >= _GIB else f"{size_bytes / 2**20:.1f} MiB"
