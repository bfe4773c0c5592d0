"""Names for shell completion, asked from the server; silence when it is away."""

from __future__ import annotations

from collections.abc import Iterable

import click

from controlplane.cli.names import short
from controlplane.cli.session import Session
from controlplane.v1 import (
    flavor_service_pb2,
    host_service_pb2,
    instance_service_pb2,
    migration_service_pb2,
)

_TIMEOUT_SECONDS = 2.0
_MOST = 1000


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})


def _session(ctx: click.Context) -> Session | None:
    # While completing, click parses the command line without running the group,
    # which is what makes the session; so it is made here.
    from controlplane.cli.root import session_of

    root = ctx.find_root()
    return session_of(root)


def hosts(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of hosts."""
    session = _session(ctx)
    if session is None:
        return []
    try:
        page = session.call(
            session.hosts.ListHosts,
            host_service_pb2.ListHostsRequest(page_size=_MOST),
            timeout_seconds=_TIMEOUT_SECONDS,
            patience_seconds=0,
        )
    except click.ClickException:
        return []
    return _starting((short(h.name) for h in page.hosts), incomplete)


def instances(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Display names of instances."""
    session = _session(ctx)
    if session is None:
        return []
    try:
        page = session.call(
            session.instances.ListInstances,
            instance_service_pb2.ListInstancesRequest(page_size=_MOST),
            timeout_seconds=_TIMEOUT_SECONDS,
            patience_seconds=0,
        )
    except click.ClickException:
        return []
    return _starting((i.display_name for i in page.instances), incomplete)


def flavors(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of flavors."""
    session = _session(ctx)
    if session is None:
        return []
    try:
        page = session.call(
            session.flavors.ListFlavors,
            flavor_service_pb2.ListFlavorsRequest(page_size=_MOST),
            timeout_seconds=_TIMEOUT_SECONDS,
            patience_seconds=0,
        )
    except click.ClickException:
        return []
    return _starting((short(f.name) for f in page.flavors), incomplete)


def migrations(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """UUIDs of the newest moves and names of the instances they are about."""
    session = _session(ctx)
    if session is None:
        return []
    try:
        page = session.call(
            session.migrations.ListMigrations,
            migration_service_pb2.ListMigrationsRequest(page_size=100),
            timeout_seconds=_TIMEOUT_SECONDS,
            patience_seconds=0,
        )
    except click.ClickException:
        return []
    names = [name for m in page.migrations for name in (short(m.name), m.instance_display_name)]
    return _starting(names, incomplete)
