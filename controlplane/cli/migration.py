"""`drover migration`: moves under way and moves of the past."""

from __future__ import annotations

import click

from controlplane.cli import complete, describe, watch
from controlplane.cli.host import confirm_or_refuse
from controlplane.cli.migrate import print_verdicts
from controlplane.cli.names import find_migration, get_instance, host_name, short
from controlplane.cli.output import (
    Format,
    enum_word,
    output_option,
    print_data,
    print_list,
    print_one,
    print_stream_item,
    to_plain,
    visible,
)
from controlplane.cli.session import Session, new_request_id, pass_session
from controlplane.cli.units import LimitType, format_age, format_bytes, format_time
from controlplane.common.errors import DroverError
from controlplane.v1 import migration_service_pb2 as service
from controlplane.v1.migration_pb2 import Migration, MigrationEvent

_STATES = [enum_word(name, "STATE_").lower() for name in Migration.State.keys()[1:]]
_WAIT = click.option(
    "--wait/--no-wait", default=True, show_default=True, help="Follow it to the end."
)


@click.group("migration")
def migration() -> None:
    """Moves: list, watch, limit, confirm, revert, cancel.

    A move is named by its UUID, by the first four or more digits of it, or by its
    instance.
    """


@migration.command("list")
@click.option("--instance", default="", help="Only of this one.", shell_complete=complete.instances)
@click.option("--host", default="", help="Only from or to it.", shell_complete=complete.hosts)
@click.option("--state", multiple=True, type=click.Choice(_STATES), help="Only in this state.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="How many.")
@output_option
@pass_session
def list_migrations(
    session: Session, instance: str, host: str, state: tuple[str, ...], limit: int, output: Format
) -> None:
    """List moves, newest first."""
    moves: list[Migration] = []
    request = service.ListMigrationsRequest(
        instance=get_instance(session, instance).name if instance else "",
        host=host_name(host) if host else "",
        states=[Migration.State.Value(f"STATE_{word.upper()}") for word in state],
    )
    while len(moves) < limit:
        request.page_size = min(1000, limit - len(moves))
        page = session.call(session.migrations.ListMigrations, request)
        moves += page.migrations
        request.page_token = page.next_page_token
        if not page.next_page_token:
            break
    header = ("ID", "INSTANCE", "KIND", "STATE", "STEP", "FROM -> TO", "COPIED", "STARTED")
    print_list(moves, output, header, _row, empty="No moves.")


def _row(move: Migration) -> tuple[str, ...]:
    total = move.progress.total_bytes
    copied = f"{100 * move.progress.done_bytes / total:.0f} %" if total else "-"
    return (
        short(move.name),
        move.instance_display_name,
        enum_word(Migration.Kind.Name(move.kind), "KIND_").lower(),
        describe.state_word(move.state),
        move.step or "-",
        describe.route(move),
        copied,
        format_age(move.create_time),
    )


@migration.command("show", short_help="Show one move.")
@click.argument("move", shell_complete=complete.migrations)
@output_option
@pass_session
def show_migration(session: Session, move: str, output: Format) -> None:
    """Show one move: its state, the choice of the target, what was copied."""
    found = find_migration(session, move)
    print_one(found, output, _details)
    if output is Format.TABLE and found.placement.verdicts:
        click.echo()
        print_verdicts(found.placement, err=False)


def _details(move: Migration) -> list[tuple[str, str]]:
    receipts = "\n".join(describe.receipt_words(r) for r in move.receipts)
    limit = move.options.bandwidth_limit_bytes_per_second
    return [
        ("Move", short(move.name)),
        ("Instance", f"{move.instance_display_name} ({short(move.instance)})"),
        ("State", f"{describe.state_word(move.state)}: {describe.doing(move)}"),
        ("Step", f"{move.step}, attempt {move.attempt}" if move.step else ""),
        ("Route", describe.route(move)),
        ("Flavor", short(move.flavor) if move.flavor else ""),
        ("Copied", describe.copy_words(move) if move.progress.total_bytes else ""),
        ("Limit", f"{format_bytes(limit)}/s" if limit else ""),
        ("Volumes", receipts),
        ("Downtime", describe.downtime_words(move)),
        ("Trouble", describe.trouble(move)),
        ("Warnings", "\n".join(move.placement.warnings)),
        ("Cancel", "asked for" if move.cancel_requested else ""),
        (
            "Confirms itself",
            format_time(move.confirm_deadline) if move.HasField("confirm_deadline") else "",
        ),
        ("Asked for by", move.created_by),
        ("Started", format_time(move.create_time)),
        ("Changed", format_time(move.update_time)),
    ]


@migration.command("watch")
@click.argument("move", shell_complete=complete.migrations)
@click.option("--until-final", is_flag=True, help="Go on until it is confirmed or reverted.")
@output_option
@pass_session
def watch_migration(session: Session, move: str, until_final: bool, output: Format) -> None:
    """Follow a move until it rests.

    -o json prints one JSON object a change on standard output instead.
    """
    found = find_migration(session, move)
    if output is not Format.TABLE:
        for change in watch.changes(session, found.name, until_final=until_final, note=watch.say):
            print_stream_item(change, output)
        return
    ended = watch.follow(
        session,
        found,
        reached=lambda m: m.state == Migration.STATE_STUCK,
        until_final=until_final,
    )
    watch.fail_unless(
        ended,
        frozenset(
            {Migration.STATE_AWAITING_CONFIRM, Migration.STATE_CONFIRMED, Migration.STATE_REVERTED}
        ),
    )
    click.echo(visible(describe.summary(ended)))


@migration.command("confirm", short_help="Delete the source copy.")
@click.argument("move", shell_complete=complete.migrations)
@_WAIT
@output_option
@pass_session
def confirm_migration(session: Session, move: str, wait: bool, output: Format) -> None:
    """Delete the source copy; from then on only the target has the machine."""
    found = find_migration(session, move)
    started = session.call(
        session.migrations.ConfirmMigration,
        service.ConfirmMigrationRequest(name=found.name, request_id=new_request_id()),
    )
    _finish(session, started, wait, output, Migration.STATE_CONFIRMED)


@migration.command("revert", short_help="Go back to the source copy.")
@click.argument("move", shell_complete=complete.migrations)
@click.option("--yes", is_flag=True, help="Agree to lose what was written on the target.")
@_WAIT
@output_option
@pass_session
def revert_migration(session: Session, move: str, yes: bool, wait: bool, output: Format) -> None:
    """Bring the machine back to its source, as it was when it was stopped there.

    What the guest has written on the target since then is dropped.
    """
    found = find_migration(session, move)
    name, target = found.instance_display_name, short(found.target_host)
    if found.state == Migration.STATE_AWAITING_CONFIRM:
        # In any other state nothing would be lost: the request is refused.
        confirm_or_refuse(
            yes,
            f"Everything that {name} has written on {target} since it moved is dropped.\n"
            f"It comes back on {short(found.source_host)} as it was when it was stopped there.",
        )
    started = session.call(
        session.migrations.RevertMigration,
        service.RevertMigrationRequest(
            name=found.name, etag=found.etag, request_id=new_request_id()
        ),
    )
    _finish(session, started, wait, output, Migration.STATE_REVERTED)


@migration.command("cancel", short_help="End a move that has not finished.")
@click.argument("move", shell_complete=complete.migrations)
@_WAIT
@output_option
@pass_session
def cancel_migration(session: Session, move: str, wait: bool, output: Format) -> None:
    """End a move that has not finished; the guest comes back on its source."""
    found = find_migration(session, move)
    started = session.call(
        session.migrations.CancelMigration,
        service.CancelMigrationRequest(name=found.name, request_id=new_request_id()),
    )
    _finish(session, started, wait, output, Migration.STATE_CANCELLED)


@migration.command("limit", short_help="Change how fast a move may copy.")
@click.argument("move", shell_complete=complete.migrations)
@click.argument("rate", type=LimitType())
@output_option
@pass_session
def limit_migration(session: Session, move: str, rate: int, output: Format) -> None:
    """Change how many bytes a second a move may send; at once if it copies already.

    RATE is as in `drover migrate --limit`, such as 100M or 12.5Mi; "none" lifts the
    limit.
    """
    found = find_migration(session, move)
    changed = session.call(
        session.migrations.LimitMigration,
        service.LimitMigrationRequest(
            name=found.name, bandwidth_limit_bytes_per_second=rate, request_id=new_request_id()
        ),
    )
    if output is not Format.TABLE:
        print_data(to_plain(changed), output)
        return
    how = f"at most {format_bytes(rate)}/s" if rate else "as fast as it can"
    click.echo(visible(f"The move of {changed.instance_display_name} copies {how}."))


@migration.command("retry")
@click.argument("move", shell_complete=complete.migrations)
@_WAIT
@output_option
@pass_session
def retry_migration(session: Session, move: str, wait: bool, output: Format) -> None:
    """Have a stuck move try its last step again."""
    found = find_migration(session, move)
    started = session.call(
        session.migrations.RetryMigration,
        service.RetryMigrationRequest(name=found.name, request_id=new_request_id()),
    )
    rest = describe.AT_REST - {Migration.STATE_STUCK, Migration.STATE_ABANDONED}
    _finish(session, started, wait, output, *rest)


@migration.command("abandon", short_help="Give up on a stuck move.")
@click.argument("move", shell_complete=complete.migrations)
@click.option("--comment", required=True, help="Why, and what was done by hand.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_option
@pass_session
def abandon_migration(session: Session, move: str, comment: str, yes: bool, output: Format) -> None:
    """Give up on a stuck move; what is left of it is yours to clear."""
    found = find_migration(session, move)
    confirm_or_refuse(
        yes,
        f"Drover stops looking after the move of {found.instance_display_name}: files, "
        "definitions and claims it holds stay where they are.",
    )
    ended = session.call(
        session.migrations.AbandonMigration,
        service.AbandonMigrationRequest(
            name=found.name, comment=comment, request_id=new_request_id()
        ),
    )
    _finish(session, ended, False, output, Migration.STATE_ABANDONED)


def _finish(
    session: Session,
    move: Migration,
    wait: bool,
    output: Format,
    *wanted: Migration.State.ValueType,
) -> None:
    goals = frozenset(wanted)
    last = move
    if wait and move.state not in goals:
        last = watch.follow(
            session,
            move,
            # A confirm or revert that fails before it changed anything leaves the move
            # waiting as before; `move` itself is under way already.
            reached=lambda m: m.state in describe.AT_REST,
            until_final=True,
        )
    if output is not Format.TABLE:
        print_data(to_plain(last), output)
    if wait:
        watch.fail_unless(last, goals)
    if output is Format.TABLE:
        click.echo(visible(_result(last)))


def _result(move: Migration) -> str:
    if move.state in describe.AT_REST:
        return describe.summary(move)
    return (
        f"The move of {move.instance_display_name} is {describe.state_word(move.state)}: "
        f"{describe.doing(move)}."
    )


@migration.command("events")
@click.argument("move", shell_complete=complete.migrations)
@output_option
@pass_session
def list_events(session: Session, move: str, output: Format) -> None:
    """List the history of a move, oldest first."""
    found = find_migration(session, move)
    events: list[MigrationEvent] = []
    request = service.ListMigrationEventsRequest(parent=found.name, page_size=1000)
    while True:
        page = session.call(session.migrations.ListMigrationEvents, request)
        events += page.events
        request.page_token = page.next_page_token
        if not page.next_page_token:
            break
    header = ("#", "TIME", "SAGA", "STEP", "KIND", "MESSAGE")
    print_list(events, output, header, _event_row, empty="Nothing has happened yet.")


def _event_row(event: MigrationEvent) -> tuple[str, ...]:
    message = event.message
    if event.HasField("error"):
        error = DroverError.from_status(event.error)
        reason = f"{error.reason.name}: {error.message}" if error else event.error.message
        message = f"{message} {reason}".strip()
    return (
        str(event.sequence),
        format_time(event.time),
        event.saga,
        event.step or "-",
        event.kind,
        message,
    )
