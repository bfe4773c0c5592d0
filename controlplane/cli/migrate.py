"""`drover migrate`: move or resize a machine and follow the move."""

from __future__ import annotations

import uuid

import click

from controlplane.cli import complete, describe, errors, watch
from controlplane.cli.errors import CliError
from controlplane.cli.names import (
    candidates_shown,
    flavor_name,
    host_name,
    instance_name,
    short,
)
from controlplane.cli.output import (
    Format,
    output_option,
    print_data,
    print_table,
    to_plain,
    visible,
)
from controlplane.cli.session import Session, new_request_id, pass_session
from controlplane.cli.units import DurationType, RateType, parse_duration
from controlplane.v1 import migration_service_pb2 as service
from controlplane.v1.migration_pb2 import Migration, MigrationOptions, Placement

_SHUTDOWN_MODES = {
    "graceful": MigrationOptions.SHUTDOWN_MODE_GRACEFUL,
    "graceful-then-force": MigrationOptions.SHUTDOWN_MODE_GRACEFUL_THEN_FORCE,
    "force": MigrationOptions.SHUTDOWN_MODE_FORCE,
}
_PLAN_TIMEOUT_SECONDS = 120.0

ConfirmChoice = tuple[MigrationOptions.ConfirmPolicy.ValueType, float]


class ConfirmType(click.ParamType[ConfirmChoice]):
    """`manual`, `auto`, or a duration after which the source copy is deleted."""

    name = "manual|auto|AFTER"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> ConfirmChoice:
        """Parse into policy and seconds."""
        if value == "manual":
            return MigrationOptions.CONFIRM_POLICY_MANUAL, 0
        if value == "auto":
            return MigrationOptions.CONFIRM_POLICY_AUTO, 0
        seconds = parse_duration(str(value))
        if seconds is None:
            self.fail(f"{value!r} is neither manual nor auto nor a duration such as 30m")
        return MigrationOptions.CONFIRM_POLICY_AFTER, seconds


@click.command("migrate")
@click.argument("instance", shell_complete=complete.instances)
@click.option(
    "--host",
    metavar="HOST",
    default="",
    help="Target; chosen if left out.",
    shell_complete=complete.hosts,
)
@click.option(
    "--flavor",
    metavar="FLAVOR",
    default="",
    help="New size: makes it a resize.",
    shell_complete=complete.flavors,
)
@click.option("--dry-run", is_flag=True, help="Only say what would happen, host by host.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Follow the move.")
@click.option(
    "--confirm",
    type=ConfirmType(),
    help="When the source copy is deleted: by hand, at once, or e.g. 30m later.",
)
@click.option(
    "--shutdown", type=click.Choice(sorted(_SHUTDOWN_MODES)), help="How the guest is stopped."
)
@click.option(
    "--shutdown-timeout", type=DurationType(), help="How long it may take to stop, e.g. 90s."
)
@click.option("--limit", type=RateType(), default=0, help="Most bytes per second: 100M, 50Mi.")
@click.option("--request-id", type=click.UUID, help="Makes the command repeatable.")
@output_option
@pass_session
def migrate(
    session: Session,
    instance: str,
    host: str,
    flavor: str,
    dry_run: bool,
    wait: bool,
    confirm: ConfirmChoice | None,
    shutdown: str | None,
    shutdown_timeout: float | None,
    limit: int,
    request_id: uuid.UUID | None,
    output: Format,
) -> None:
    """Move INSTANCE to another host, or resize it.

    INSTANCE is a name or a UUID. The guest is shut down, its disks are copied and
    verified, and it starts on the target; the copy on the source is kept until
    the move is confirmed. Left out, choices take the fleet's defaults.

    With --wait (the default) the exit code is 0 once the guest is on the target,
    and 1 when the move failed and was undone. Ctrl-C stops watching, not the move.
    """
    request = service.CreateMigrationRequest(
        instance=instance_name(instance),
        host=host_name(host) if host else "",
        flavor=flavor_name(flavor) if flavor else "",
        options=_options(confirm, shutdown, shutdown_timeout, limit),
        validate_only=dry_run,
        request_id=str(request_id or new_request_id()),
    )
    move = _create(session, request)
    if dry_run:
        _print_plan(move, output)
        return
    ident = short(move.name)
    watch.say(f"Move {ident} of {move.instance_display_name}, from {short(move.source_host)}.")
    print_verdicts(move.placement, err=True)
    _print_warnings(move.placement, err=True)
    if not wait:
        _print_created(move, output)
        return
    _wait(session, move, output)


def _options(
    confirm: ConfirmChoice | None,
    shutdown: str | None,
    shutdown_timeout_seconds: float | None,
    limit: int,
) -> MigrationOptions:
    options = MigrationOptions(bandwidth_limit_bytes_per_second=limit)
    if confirm is not None:
        options.confirm_policy, after_seconds = confirm
        if options.confirm_policy == MigrationOptions.CONFIRM_POLICY_AFTER:
            options.confirm_after.FromMilliseconds(round(after_seconds * 1000))
    if shutdown is not None:
        options.shutdown_mode = _SHUTDOWN_MODES[shutdown]
    if shutdown_timeout_seconds is not None:
        options.shutdown_timeout.FromMilliseconds(round(shutdown_timeout_seconds * 1000))
    return options


def _create(session: Session, request: service.CreateMigrationRequest) -> Migration:
    try:
        with candidates_shown(session, request.instance):
            return session.call(
                session.migrations.CreateMigration, request, timeout_seconds=_PLAN_TIMEOUT_SECONDS
            )
    except KeyboardInterrupt:
        raise CliError(
            "Interrupted before the control plane answered.",
            exit_code=errors.INTERRUPTED,
            advice=""
            if request.validate_only
            else "The move may have been admitted. See `drover migration list`; the same command "
            f"with\n--request-id {request.request_id} does not start it twice.",
        ) from None


def _wait(session: Session, move: Migration, output: Format) -> None:
    auto = move.options.confirm_policy == MigrationOptions.CONFIRM_POLICY_AUTO
    goal = Migration.STATE_CONFIRMED if auto else Migration.STATE_AWAITING_CONFIRM
    ended = watch.follow(
        session,
        move,
        reached=lambda m: m.state in (goal, Migration.STATE_STUCK) or _confirm_failed(m),
        until_final=auto,
    )
    if output is not Format.TABLE:
        print_data(to_plain(ended), output)
    watch.fail_unless(ended, frozenset({goal, Migration.STATE_CONFIRMED}))
    if output is Format.TABLE:
        click.echo(visible(describe.summary(ended)))


def _confirm_failed(move: Migration) -> bool:
    # It waits again, with the reason: nobody confirms it by itself any more.
    return move.state == Migration.STATE_AWAITING_CONFIRM and move.HasField("error")


def _print_created(move: Migration, output: Format) -> None:
    if output is not Format.TABLE:
        print_data(to_plain(move), output)
        return
    click.echo(short(move.name))
    watch.say(f"Follow it with: drover migration watch {short(move.name)}")


def _print_plan(move: Migration, output: Format) -> None:
    if output is not Format.TABLE:
        print_data(to_plain(move), output)
        return
    print_verdicts(move.placement, err=False)
    _print_warnings(move.placement, err=False)
    watch.say(f"Dry run: nothing was changed. {move.instance_display_name} can move.")


def print_verdicts(placement: Placement, *, err: bool) -> None:
    """Print what the scheduler thinks of each host, and its choice."""
    if placement.verdicts:
        rows = [describe.verdict_row(v, placement.chosen_host) for v in placement.verdicts]
        print_table(("HOST", "VERDICT", "WEIGHT", "WHY"), rows, err=err)
    why = describe.why_chosen(placement)
    if why:
        click.echo(visible(why), err=err)


def _print_warnings(placement: Placement, *, err: bool) -> None:
    for warning in placement.warnings:
        click.echo(visible(describe.warning_line(warning)), err=err)
