"""What speaks for a host that fits. Each weigher gives 0 to 1, more is better.

A weight depends on the host alone, never on which others there are, so that it
can be compared between two decisions.
"""

from __future__ import annotations

from collections.abc import Callable

from controlplane.scheduler.request import HostView, Request

Weigher = Callable[[Request, HostView], float]


def free_memory(request: Request, host: HostView) -> float:
    """Share of the memory that stays unclaimed."""
    return _share(
        host.limits.memory_mib - host.claimed.memory_mib - request.size.memory_mib,
        host.limits.memory_mib,
    )


def free_disk(request: Request, host: HostView) -> float:
    """Share of the capacity of the machine's storage roots that stays free."""
    if host.facts is None:
        return 0.0
    roots = [root for root in host.facts.roots if root.name in request.needed_by_root]
    capacity = sum(root.capacity_bytes for root in roots)
    available = sum(root.available_bytes for root in roots)
    return _share(available - host.claimed.disk_bytes - request.size.disk_bytes, capacity)


def few_moves(request: Request, host: HostView) -> float:
    """1 for a host without moves; each one under way shares its disks and network."""
    return 1.0 / (1 + host.moves)


WEIGHERS: tuple[tuple[Weigher, float], ...] = (
    (free_memory, 1.0),
    (free_disk, 1.0),
    (few_moves, 1.0),
)


def weigh(request: Request, host: HostView) -> float:
    """Sum of the weighers, each times its multiplier."""
    return sum(multiplier * weigher(request, host) for weigher, multiplier in WEIGHERS)


def _share(part: int, whole: int) -> float:
    return min(1.0, max(0.0, part / whole)) if whole > 0 else 0.0
