"""Moves in words: pure functions from a Migration to text."""

from __future__ import annotations

from controlplane.cli.names import short
from controlplane.cli.output import enum_word
from controlplane.cli.units import format_bytes, format_seconds, format_time
from controlplane.common.errors import DroverError
from controlplane.v1.migration_pb2 import HostVerdict, Migration, Placement
from hostd.v1.job_pb2 import CopyProgress, VolumeReceipt

State = Migration.State

ENDED: frozenset[Migration.State.ValueType] = frozenset(
    {State.STATE_CONFIRMED, State.STATE_REVERTED, State.STATE_FAILED}
    | {State.STATE_CANCELLED, State.STATE_ABANDONED}
)
AT_REST = ENDED | {State.STATE_AWAITING_CONFIRM, State.STATE_STUCK}

CANCELLABLE: frozenset[Migration.State.ValueType] = frozenset(
    {State.STATE_PENDING, State.STATE_PREPARING, State.STATE_PRECOPYING, State.STATE_STOPPING}
    | {State.STATE_COPYING, State.STATE_FINISHING}
)

_DOING: dict[Migration.State.ValueType, str] = {
    State.STATE_PENDING: "choosing and claiming a target",
    State.STATE_PREPARING: "the target checks and reserves",
    State.STATE_PRECOPYING: "copying disks while the guest runs",
    State.STATE_STOPPING: "stopping the guest and parking its files",
    State.STATE_COPYING: "copying disks",
    State.STATE_FINISHING: "building and starting the guest on the target",
    State.STATE_AWAITING_CONFIRM: "moved; the source copy waits for confirm or revert",
    State.STATE_CONFIRMING: "deleting the source copy",
    State.STATE_CONFIRMED: "done",
    State.STATE_REVERTING: "going back to the source",
    State.STATE_REVERTED: "back on the source",
    State.STATE_UNWINDING: "undoing what was done",
    State.STATE_FAILED: "failed; the guest is as it was",
    State.STATE_CANCELLED: "cancelled; the guest is as it was",
    State.STATE_STUCK: "stuck; an operator has to look",
    State.STATE_ABANDONED: "abandoned by an operator",
}


def state_word(state: Migration.State.ValueType) -> str:
    """The state's name as on the command line, as "COPYING"."""
    return enum_word(State.Name(state), "STATE_")


def doing(move: Migration) -> str:
    """What is being done, in a few words."""
    return _DOING.get(move.state, state_word(move.state).lower())


def copy_words(move: Migration) -> str:
    """How far the copy has come.

    As "2.1 GiB of 5.9 GiB (36 %), 312 MiB/s, 10 s to 14 s left, limited by network";
    with ", 1.2 GiB of it by an earlier attempt" after the share when there was one.
    """
    progress = move.progress
    total = progress.total_bytes
    share = f" ({100 * progress.done_bytes / total:.0f} %)" if total else ""
    words = f"{format_bytes(progress.done_bytes)} of {format_bytes(total)}{share}"
    if progress.resumed_bytes:
        words += f", {format_bytes(progress.resumed_bytes)} of it by an earlier attempt"
    if progress.rate_bytes_per_second:
        words += f", {format_bytes(progress.rate_bytes_per_second)}/s"
    left = time_left(progress)
    words += f", {left} left" if left and progress.done_bytes < total else ""
    copying = progress.limited_by and move.state not in AT_REST
    return words + (f", {limiting(progress)}" if copying else "")


def time_left(progress: CopyProgress) -> str:
    """Time to the end as "12 s", "10 s to 2m 05s" or "10 s or more"; empty while unknown."""
    if not progress.HasField("eta_seconds"):
        return ""
    if not progress.HasField("eta_low_seconds"):
        return format_seconds(progress.eta_seconds)
    least = format_seconds(progress.eta_low_seconds)
    if not progress.HasField("eta_high_seconds"):
        return f"{least} or more"
    most = format_seconds(progress.eta_high_seconds)
    return least if least == most else f"{least} to {most}"


def limiting(progress: CopyProgress) -> str:
    """What the copy waits for, as "limited by network"."""
    if progress.limited_by == "queue":
        return "waiting for other copies of its host"
    return f"limited by {progress.limited_by}"


def trouble(move: Migration) -> str:
    """Why it failed or is being retried, one line; empty when nothing is wrong."""
    if not move.HasField("error"):
        return ""
    error = DroverError.from_status(move.error)
    return f"{error.reason.name}: {error.message}" if error else move.error.message


def route(move: Migration) -> str:
    """Where from and where to, as "a -> b"."""
    return f"{short(move.source_host)} -> {short(move.target_host)}"


def why_chosen(placement: Placement) -> str:
    """One line on the choice; empty when no host was chosen."""
    chosen = next((v for v in placement.verdicts if v.host == placement.chosen_host), None)
    if not placement.chosen_host:
        return ""
    why = f": {chosen.message}" if chosen and chosen.message else ""
    size = (
        f" About {format_bytes(placement.estimated_bytes)} have to be copied."
        if placement.estimated_bytes
        else ""
    )
    return f"Target {short(placement.chosen_host)}{why}{'' if why.endswith('.') else '.'}{size}"


def warning_line(warning: str) -> str:
    """What a person should know of a move, as a line of its own."""
    return f"Warning: {warning}"


def verdict_row(verdict: HostVerdict, chosen: str) -> tuple[str, str, str, str]:
    """Cells of the verdict table: host, verdict, weight, why."""
    if not verdict.fits:
        return short(verdict.host), "no", "", f"{verdict.reason}: {verdict.message}"
    word = "chosen" if verdict.host == chosen else "fits"
    return short(verdict.host), word, f"{verdict.weight:.2f}", verdict.message


def summary(move: Migration) -> str:
    """The result of a move at rest, with what can be done next."""
    name, source, target = (
        move.instance_display_name,
        short(move.source_host),
        short(move.target_host),
    )
    ident = short(move.name)
    match move.state:
        case State.STATE_AWAITING_CONFIRM:
            deadline = (
                f"\nThe copy on {source} is deleted by itself at "
                f"{format_time(move.confirm_deadline)} unless you revert before."
                if move.HasField("confirm_deadline")
                else f"\nThe copy on {source} is kept until you decide:"
            )
            return (
                f"{name} moved from {source} to {target}{_figures(move)}.{deadline}\n"
                f"  drover migration confirm {ident}   deletes the copy on {source}\n"
                f"  drover migration revert {ident}    goes back to {source} as it was"
            )
        case State.STATE_CONFIRMED:
            return (
                f"{name} lives on {target} alone{_figures(move)}. The copy on {source} is deleted."
            )
        case State.STATE_REVERTED:
            return f"{name} is back on {source}, as it was when it was stopped there."
        case State.STATE_FAILED | State.STATE_CANCELLED:
            how = "was cancelled" if move.state == State.STATE_CANCELLED else "failed"
            return f"The move of {name} {how}; {name} is on {source} as it was."
        case State.STATE_STUCK:
            return (
                f"The move of {name} is stuck at step {move.step or '?'}.\n"
                "Mend what the error names, then:\n"
                f"  drover migration retry {ident}     tries the step again\n"
                f"  drover migration abandon {ident} --comment WHY   gives up; the rest is yours"
            )
        case _:
            return f"The move of {name} is {state_word(move.state)}: {doing(move)}."


def receipt_words(receipt: VolumeReceipt) -> str:
    """What was placed of a volume, one line."""
    allocated = (
        f"{format_bytes(receipt.allocated_bytes)} allocated, "
        if receipt.HasField("allocated_bytes")
        else ""
    )
    return (
        f"{receipt.volume_id}: {format_bytes(receipt.size_bytes)}, {allocated}"
        f"{format_bytes(receipt.wire_bytes)} sent, digest {receipt.digest[:16]}..."
    )


def downtime_words(move: Migration) -> str:
    """How long the guest was away; empty when that is not known."""
    if not move.HasField("downtime"):
        return ""
    seconds = move.downtime.ToMilliseconds() / 1000
    return f"{seconds:.1f} s" if seconds < 60 else format_seconds(seconds)


def _figures(move: Migration) -> str:
    parts = []
    if move.HasField("downtime"):
        parts.append(f"downtime {downtime_words(move)}")
    if move.throughput_bytes_per_second:
        parts.append(f"copied at {format_bytes(move.throughput_bytes_per_second)}/s")
    return f" ({', '.join(parts)})" if parts else ""
