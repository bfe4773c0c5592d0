"""Going through the candidates of a placement, best first.

A placement keeps its reasons: a host that refuses later on stays in the list
with why, so that whoever asks afterwards sees the whole story.
"""

from __future__ import annotations

import msgspec

from controlplane.common.errors import DroverError
from controlplane.domain.model import Placement, Verdict


def next_candidate(placement: Placement) -> str | None:
    """The best host that has not refused; None when there is none left."""
    return next((verdict.host for verdict in placement.verdicts if verdict.fits), None)


def refused(placement: Placement, host: str, refusal: DroverError) -> Placement:
    """The placement after a host has refused the machine for good.

    Returns:
        A placement in which the host comes after those that fit, with the
        refusal as its reason, and the next candidate is the chosen host.
    """
    verdict = Verdict(
        host=host, fits=False, reason=refusal.reason.name, message=_one_line(refusal.message)
    )
    others = [other for other in placement.verdicts if other.host != host]
    verdicts = (
        *(other for other in others if other.fits),
        verdict,
        *(other for other in others if not other.fits),
    )
    after = msgspec.structs.replace(placement, verdicts=verdicts)
    return msgspec.structs.replace(after, chosen_host=next_candidate(after) or "")


def _one_line(text: str) -> str:
    return " ".join(text.split())
