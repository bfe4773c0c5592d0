"""Short names on the command line: `web1`, `b`, a UUID or the start of one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from controlplane.cli import errors
from controlplane.cli.errors import CliError
from controlplane.cli.session import Session
from controlplane.common.reasons import Reason
from controlplane.v1 import (
    instance_pb2,
    instance_service_pb2,
    migration_pb2,
    migration_service_pb2,
)

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_UUID_START = re.compile(r"[0-9a-f][0-9a-f-]{3,35}")
_PAGE_SIZE = 1000


def short(resource: str) -> str:
    """The last part of a resource name; "-" for an empty one."""
    return resource.rpartition("/")[2] or "-"


def host_name(name: str) -> str:
    """Resource name of a host."""
    return _full("hosts", name)


def instance_name(name: str) -> str:
    """Resource name of an instance."""
    return _full("instances", name)


def flavor_name(name: str) -> str:
    """Resource name of a flavor."""
    return _full("flavors", name)


def _full(collection: str, name: str) -> str:
    head, slash, tail = name.rpartition("/")
    if slash and (head != collection or not tail):
        raise CliError(
            f"{name!r} does not name one of the {collection}.",
            exit_code=errors.USAGE,
            advice=f"Give the short name, or {collection}/NAME.",
        )
    return f"{collection}/{tail}"


@contextmanager
def candidates_shown(session: Session, name: str) -> Iterator[None]:
    """Add the instances that a name can mean to the error for an ambiguous one."""
    try:
        yield
    except CliError as error:
        if error.reason is not Reason.AMBIGUOUS_NAME:
            raise
        bearers = [i for i in all_instances(session) if i.display_name == short(name)]
        raise CliError(
            error.message,
            exit_code=error.exit_code,
            details=[f"{i.uid}  {i.display_name} on {short(i.host)}" for i in bearers]
            or error.details,
            advice=error.advice,
            reason=error.reason,
        ) from error


def get_instance(session: Session, name: str) -> instance_pb2.Instance:
    """Read an instance by display name or UUID.

    Raises:
        CliError: There is none, or more than one bears the name.
    """
    with candidates_shown(session, name):
        return session.call(
            session.instances.GetInstance,
            instance_service_pb2.GetInstanceRequest(name=instance_name(name)),
        )


def all_instances(session: Session, *, host: str = "") -> Iterator[instance_pb2.Instance]:
    """Every instance, page by page."""
    token = ""
    while True:
        page = session.call(
            session.instances.ListInstances,
            instance_service_pb2.ListInstancesRequest(
                page_size=_PAGE_SIZE, page_token=token, host=host
            ),
        )
        yield from page.instances
        token = page.next_page_token
        if not token:
            return


def find_migration(session: Session, name: str) -> migration_pb2.Migration:
    """Read a move by UUID, by the start of one, or by its instance.

    An instance stands for its live move; when it has none, for its newest one.

    Raises:
        CliError: Nothing or more than one thing is meant.
    """
    bare = name.removeprefix("migrations/")
    if _UUID.fullmatch(bare):
        return _get_migration(session, f"migrations/{bare}")
    found = {m.name: m for m in _of_instance(session, bare)}
    if _UUID_START.fullmatch(bare):
        started = _newest(session, instance="")
        found |= {m.name: m for m in started if short(m.name).startswith(bare)}
    if len(found) == 1:
        # A list leaves a part out.
        return _get_migration(session, next(iter(found)))
    if found:
        raise CliError(
            f"{name!r} can mean more than one move.",
            exit_code=errors.USAGE,
            details=[
                f"{short(m.name)}  {m.instance_display_name} "
                f"{short(m.source_host)} to {short(m.target_host)}"
                for m in found.values()
            ],
            advice="Give the whole UUID of the one that is meant.",
        )
    raise CliError(
        f"No move is named {name!r}, and no instance of that name has one.",
        exit_code=errors.NOT_FOUND,
        advice=Reason.MIGRATION_NOT_FOUND.info.help,
    )


def _of_instance(session: Session, name: str) -> list[migration_pb2.Migration]:
    try:
        instance = get_instance(session, name)
    except CliError as error:
        if error.reason in (Reason.INSTANCE_NOT_FOUND, Reason.INVALID_NAME):
            return []
        raise
    if instance.migration:
        return [_get_migration(session, instance.migration)]
    return _newest(session, instance=instance.name)[:1]


def _get_migration(session: Session, name: str) -> migration_pb2.Migration:
    return session.call(
        session.migrations.GetMigration, migration_service_pb2.GetMigrationRequest(name=name)
    )


def _newest(session: Session, *, instance: str) -> list[migration_pb2.Migration]:
    page = session.call(
        session.migrations.ListMigrations,
        migration_service_pb2.ListMigrationsRequest(
            page_size=1 if instance else _PAGE_SIZE, instance=instance
        ),
    )
    return list(page.migrations)
