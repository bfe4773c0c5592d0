"""What a failure of the mover means to a caller."""

from __future__ import annotations

import pytest

from controlplane.common.reasons import Reason
from diskmover import ErrorCode, MoverError
from hostd.transfer import mover_error

Code = ErrorCode


def reason_of(code: ErrorCode, *, retryable: bool) -> Reason:
    error = MoverError(code, "The words of the mover", retryable=retryable, side="receiver")
    return mover_error(error, "jobs/j").reason


@pytest.mark.parametrize("code", ErrorCode)
def test_every_failure_has_a_reason_and_those_that_pass_go_on(code: ErrorCode) -> None:
    definite = reason_of(code, retryable=False)
    assert definite in Reason
    passing = reason_of(code, retryable=True)
    expected = Reason.SESSION_REFUSED if definite is Reason.SESSION_REFUSED else None
    assert passing is (expected or Reason.COPY_INTERRUPTED)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (Code.LINK_LOST, Reason.COPY_INTERRUPTED),
        (Code.CONNECT_FAILED, Reason.COPY_INTERRUPTED),
        (Code.NO_SPACE, Reason.TARGET_LACKS_SPACE),
        (Code.DIGEST_MISMATCH, Reason.DIGEST_MISMATCH),
        (Code.PEER_IDENTITY, Reason.UNAUTHENTICATED),
        (Code.SOURCE_CHANGED, Reason.DISK_CHANGED),
        (Code.TARGET_EXISTS, Reason.TARGET_FILE_EXISTS),
    ],
)
def test_a_failure_is_told_by_its_cause(code: ErrorCode, reason: Reason) -> None:
    assert reason_of(code, retryable=False) is reason


def test_where_it_happened_is_kept() -> None:
    error = MoverError(
        Code.SOURCE_IO, "Cannot read", retryable=False, side="sender", volume_id="vda", offset=512
    )
    assert mover_error(error, "jobs/j").metadata == {
        "mover_code": "SOURCE_IO",
        "side": "sender",
        "volume_id": "vda",
        "offset": "512",
    }
