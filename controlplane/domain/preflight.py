"""What a host's preflight report means for a move."""

from __future__ import annotations

from controlplane.common.errors import DroverError, Violation
from controlplane.common.reasons import Reason
from hostd.v1 import preflight_pb2

_FAIL = preflight_pb2.PreflightCheck.OUTCOME_FAIL
_WARN = preflight_pb2.PreflightCheck.OUTCOME_WARN


def failed_checks(report: preflight_pb2.PreflightReport, subject: str) -> DroverError | None:
    """The refusal that a report stands for.

    Args:
        report: What the host answered.
        subject: Resource that was checked, as "hosts/b".

    Returns:
        An error with the reason of the first failed check and every failed
        check as a violation; None when all passed or only warned.
    """
    failed = [check for check in report.checks if check.outcome == _FAIL]
    if not failed:
        return None
    first = failed[0]
    return DroverError(
        Reason.__members__.get(first.reason, Reason.INSTANCE_IMMOVABLE),
        f"{subject}: {_sentence(first)}",
        subject=subject,
        metadata={"check": first.check, "failed": ",".join(check.check for check in failed)},
        violations=[Violation(subject, _sentence(check), check.reason) for check in failed],
    )


def warnings_of(report: preflight_pb2.PreflightReport, subject: str) -> list[str]:
    """What a person should know though nothing forbids the move, as "hosts/b: ..."."""
    return [f"{subject}: {_sentence(check)}" for check in report.checks if check.outcome == _WARN]


def _sentence(check: preflight_pb2.PreflightCheck) -> str:
    message = check.message.rstrip()
    if message and not message.endswith("."):
        message += "."
    return f"{message} {check.fix}".strip() if check.fix else message
