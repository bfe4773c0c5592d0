"""The options of a move: checked, with the defaults filled in."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from controlplane.api.fields import invalid_field
from controlplane.domain.states import ConfirmPolicy, ShutdownMode
from controlplane.v1.migration_pb2 import MigrationOptions

_LONGEST_SHUTDOWN_SECONDS = 3600
_LONGEST_WINDOW_SECONDS = 10 * 365 * 86400


def resolve_options(given: MigrationOptions, defaults: MigrationOptions) -> MigrationOptions:
    """What the caller chose, and the defaults for the rest.

    Args:
        given: From the request; anything may be left out.
        defaults: Every option set.

    Raises:
        DroverError: INVALID_FIELD.
    """
    options = MigrationOptions()
    options.CopyFrom(given)
    options.shutdown_mode = options.shutdown_mode or defaults.shutdown_mode
    if ShutdownMode.from_number(options.shutdown_mode) is None:
        raise invalid_field("options.shutdown_mode", options.shutdown_mode, "a known mode")
    if not options.HasField("shutdown_timeout"):
        options.shutdown_timeout.CopyFrom(defaults.shutdown_timeout)
    _check_seconds(
        "options.shutdown_timeout",
        options.shutdown_timeout,
        _LONGEST_SHUTDOWN_SECONDS,
        "1 s to 1 h",
    )
    _resolve_confirm(options, defaults)
    if not options.bandwidth_limit_bytes_per_second:
        options.bandwidth_limit_bytes_per_second = defaults.bandwidth_limit_bytes_per_second
    return options


def _resolve_confirm(options: MigrationOptions, defaults: MigrationOptions) -> None:
    if options.confirm_policy == MigrationOptions.CONFIRM_POLICY_UNSPECIFIED:
        options.confirm_policy = defaults.confirm_policy
        if defaults.HasField("confirm_after") and not options.HasField("confirm_after"):
            options.confirm_after.CopyFrom(defaults.confirm_after)
    elif options.confirm_policy != MigrationOptions.CONFIRM_POLICY_AFTER and options.HasField(
        "confirm_after"
    ):
        raise invalid_field(
            "options.confirm_after", "set", "left out unless confirm_policy is AFTER"
        )
    policy = ConfirmPolicy.from_number(options.confirm_policy)
    if policy is None:
        raise invalid_field("options.confirm_policy", options.confirm_policy, "a known policy")
    if policy is not ConfirmPolicy.AFTER:
        options.ClearField("confirm_after")
        return
    if not options.HasField("confirm_after"):
        raise invalid_field("options.confirm_after", "", "set for CONFIRM_POLICY_AFTER")
    _check_seconds(
        "options.confirm_after", options.confirm_after, _LONGEST_WINDOW_SECONDS, "1 s to 10 years"
    )


def _check_seconds(field: str, duration: Duration, most: int, expected: str) -> None:
    seconds = duration.seconds + duration.nanos / 1e9
    if not 1 <= seconds <= most:
        raise invalid_field(field, f"{seconds:g} s", expected)
