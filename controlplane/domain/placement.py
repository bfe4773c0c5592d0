"""The refusal that a placement without a host stands for."""

from __future__ import annotations

from collections.abc import Sequence

from controlplane.common.errors import DroverError, Violation
from controlplane.common.reasons import Reason
from controlplane.domain.model import Instance, Placement, Verdict
from controlplane.domain.names import host_name, instance_name

_SHOWN_IN_MESSAGE = 5
_SHOWN_IN_STATUS = 20  # a status travels in trailers, which clients limit to 8 KiB


def no_valid_host(
    placement: Placement, instance: Instance, requested_host: str = ""
) -> DroverError:
    """The refusal when no host of a placement fits.

    Args:
        placement: The decision.
        instance: The machine that looked for a host.
        requested_host: The host that was asked for by name; empty for any.

    Returns:
        The requested host's own reason when one was asked for; otherwise
        NO_VALID_HOST with a violation for every host, or, when they are too many
        for one status, for every reason.
    """
    counted = [v for v in placement.verdicts if not requested_host or v.host == requested_host]
    if requested_host and counted:
        only = counted[0]
        return DroverError(
            Reason.__members__.get(only.reason, Reason.NO_VALID_HOST),
            f"{instance.name} cannot go to {host_name(only.host)}: {only.message}",
            subject=host_name(only.host),
            metadata={"host": only.host},
            violations=_violations(counted),
        )
    why = " ".join(f"{host_name(v.host)}: {v.message}" for v in counted[:_SHOWN_IN_MESSAGE])
    more = len(counted) - _SHOWN_IN_MESSAGE
    return DroverError(
        Reason.NO_VALID_HOST,
        f"No host can receive {instance.name}. {why or 'There is no host.'}"
        + (f" And {more} more." if more > 0 else ""),
        subject=instance_name(instance.uid),
        metadata={"hosts": str(len(counted))},
        violations=_violations(counted),
    )


def _violations(verdicts: Sequence[Verdict]) -> list[Violation]:
    if len(verdicts) <= _SHOWN_IN_STATUS:
        return [Violation(host_name(v.host), v.message, v.reason) for v in verdicts]
    by_reason: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_reason.setdefault(verdict.reason, []).append(verdict)
    return [
        Violation(
            "hosts",
            f"{len(group)} hosts, as {host_name(group[0].host)}: {group[0].message}",
            reason,
        )
        for reason, group in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    ]
