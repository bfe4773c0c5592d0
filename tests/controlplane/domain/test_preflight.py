from __future__ import annotations

from controlplane.common.reasons import Reason
from controlplane.domain.preflight import failed_checks, warnings_of
from hostd.v1.preflight_pb2 import PreflightCheck, PreflightReport


def check(name: str, outcome: PreflightCheck.Outcome.ValueType, reason: str = "") -> PreflightCheck:
    return PreflightCheck(
        check=name, outcome=outcome, reason=reason, message=f"{name} is so", fix="Mend it."
    )


def test_warnings_stop_nothing() -> None:
    report = PreflightReport(
        checks=[
            check("space", PreflightCheck.OUTCOME_PASS),
            check("time", PreflightCheck.OUTCOME_WARN),
        ]
    )
    assert failed_checks(report, "hosts/b") is None
    assert warnings_of(report, "hosts/b") == ["hosts/b: time is so. Mend it."]


def test_the_first_failure_gives_the_reason_and_all_are_told() -> None:
    report = PreflightReport(
        checks=[
            check("space", PreflightCheck.OUTCOME_FAIL, "TARGET_LACKS_SPACE"),
            check("bridge", PreflightCheck.OUTCOME_FAIL, "TARGET_LACKS_BRIDGE"),
        ]
    )
    error = failed_checks(report, "hosts/b")
    assert error is not None
    assert error.reason is Reason.TARGET_LACKS_SPACE
    assert error.message == "hosts/b: space is so. Mend it."
    assert [v.type for v in error.violations] == ["TARGET_LACKS_SPACE", "TARGET_LACKS_BRIDGE"]


def test_a_reason_from_a_newer_host_is_still_a_refusal() -> None:
    report = PreflightReport(checks=[check("new", PreflightCheck.OUTCOME_FAIL, "FROM_THE_FUTURE")])
    error = failed_checks(report, "hosts/b")
    assert error is not None
    assert error.reason is Reason.INSTANCE_IMMOVABLE
