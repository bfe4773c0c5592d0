"""`drover audit`: who asked for what."""

from __future__ import annotations

import click

from controlplane.cli.output import Format, output_option, print_list
from controlplane.cli.session import Session, pass_session
from controlplane.cli.units import format_time
from controlplane.v1 import migration_service_pb2 as service
from controlplane.v1.migration_service_pb2 import AuditEntry


@click.group("audit")
def audit() -> None:
    """The log of every request that could change something."""


@audit.command("list")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="How many.")
@output_option
@pass_session
def list_audit(session: Session, limit: int, output: Format) -> None:
    """List the newest entries, newest first."""
    entries: list[AuditEntry] = []
    token = ""
    while len(entries) < limit:
        page = session.call(
            session.migrations.ListAuditEntries,
            service.ListAuditEntriesRequest(
                page_size=min(1000, limit - len(entries)), page_token=token
            ),
        )
        entries += page.entries
        token = page.next_page_token
        if not token:
            break
    header = ("TIME", "WHO", "FROM", "WHAT", "RESOURCE", "OUTCOME")
    print_list(entries, output, header, _row, empty="The audit log is empty.")


def _row(entry: AuditEntry) -> tuple[str, ...]:
    outcome = f"{entry.outcome} ({entry.reason})" if entry.reason else entry.outcome
    return (
        format_time(entry.time),
        entry.principal or "-",
        entry.peer,
        entry.method.rpartition("/")[2],
        entry.resource or "-",
        outcome,
    )
