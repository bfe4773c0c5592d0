"""The decision: every host gets a verdict, the best comes first."""

from __future__ import annotations

from collections.abc import Iterable

from controlplane.domain.model import Placement, Verdict
from controlplane.scheduler.filters import first_refusal
from controlplane.scheduler.request import HostView, Request
from controlplane.scheduler.weighers import free_disk, weigh


def schedule(request: Request, hosts: Iterable[HostView]) -> Placement:
    """Choose a host.

    The same question about the same hosts has the same answer: equal weights
    are ordered by name.

    Args:
        request: The machine that looks for a host.
        hosts: Every host there is, its own included.

    Returns:
        A verdict for every host, those that fit best first, then the refused
        ones by name; `chosen_host` is empty when none fits.
    """
    verdicts = sorted(
        (_verdict(request, host) for host in hosts),
        key=lambda verdict: (not verdict.fits, -verdict.weight, verdict.host),
    )
    chosen = verdicts[0].host if verdicts and verdicts[0].fits else ""
    return Placement(
        chosen_host=chosen, verdicts=tuple(verdicts), estimated_bytes=request.size.disk_bytes
    )


def _verdict(request: Request, host: HostView) -> Verdict:
    refusal = first_refusal(request, host)
    if refusal is not None:
        reason, message = refusal
        return Verdict(host=host.name, fits=False, reason=reason.name, message=message)
    free_mib = host.limits.memory_mib - host.claimed.memory_mib - request.size.memory_mib
    return Verdict(
        host=host.name,
        fits=True,
        message=(
            f"It would keep {free_mib} of {host.limits.memory_mib} MiB of memory and "
            f"{free_disk(request, host):.0%} of its disk free; {host.moves} moves under way."
        ),
        weight=round(weigh(request, host), 6),
    )
