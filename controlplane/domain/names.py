"""Resource names: "hosts/{host}", "instances/{uid}", "flavors/{flavor}", "migrations/{uuid}".

Inside Drover rows hold the last part alone; these functions add and take off
the collection. Everything that is malformed is refused with INVALID_NAME.
"""

from __future__ import annotations

import re
import uuid

from controlplane.common.errors import DroverError, Violation
from controlplane.common.identity import NAME_PATTERN
from controlplane.common.reasons import Reason

_FLAVOR = re.compile(r"[a-z][a-z0-9-]{0,62}")
_PROJECT = NAME_PATTERN
_UUID_LENGTH = 36
_DISPLAY_NAME_LIMIT = 255


def host_name(host: str) -> str:
    """The resource name of a host; empty for an empty id."""
    return f"hosts/{host}" if host else ""


def instance_name(uid: str) -> str:
    """The resource name of an instance; empty for an empty id."""
    return f"instances/{uid}" if uid else ""


def flavor_name(flavor: str) -> str:
    """The resource name of a flavor; empty for an empty id."""
    return f"flavors/{flavor}" if flavor else ""


def migration_name(migration_id: str) -> str:
    """The resource name of a migration; empty for an empty id."""
    return f"migrations/{migration_id}" if migration_id else ""


def parse_host(name: str, field: str = "name") -> str:
    """The id in "hosts/{host}".

    Raises:
        DroverError: INVALID_NAME.
    """
    return check_host_id(_last_part(name, "hosts", field), field)


def check_host_id(host: str, field: str = "host_id") -> str:
    """A host id that may be given to a host.

    Raises:
        DroverError: INVALID_NAME.
    """
    if not NAME_PATTERN.fullmatch(host):
        raise _invalid(field, host, "1 to 63 of a-z, 0-9, '-' and '.', as in hosts/rack1-a")
    return host


def parse_flavor(name: str, field: str = "name") -> str:
    """The id in "flavors/{flavor}".

    Raises:
        DroverError: INVALID_NAME.
    """
    flavor = _last_part(name, "flavors", field)
    if not _FLAVOR.fullmatch(flavor):
        raise _invalid(
            field, flavor, "1 to 63 of a-z, 0-9 and '-', a letter first, as in flavors/small"
        )
    return flavor


def parse_migration(name: str, field: str = "name") -> str:
    """The id in "migrations/{uuid}".

    Raises:
        DroverError: INVALID_NAME.
    """
    return check_uuid(_last_part(name, "migrations", field), field)


def parse_instance(name: str, field: str = "name") -> str:
    """The uid or display name in "instances/{...}".

    Returns:
        The canonical uid when the last part is a UUID, else the display name.

    Raises:
        DroverError: INVALID_NAME.
    """
    last = _last_part(name, "instances", field)
    if len(last) > _DISPLAY_NAME_LIMIT or not last.isprintable() or "/" in last:
        raise _invalid(field, last, "a libvirt UUID or a domain name, as in instances/web1")
    return canonical_uuid(last) or last


def check_uuid(text: str, field: str) -> str:
    """The canonical form of a UUID.

    Raises:
        DroverError: INVALID_NAME.
    """
    canonical = canonical_uuid(text)
    if canonical is None:
        raise _invalid(field, text, "a UUID, as in 123e4567-e89b-42d3-a456-426614174000")
    return canonical


def canonical_uuid(text: str) -> str | None:
    """The lower-case hyphenated form of a UUID; None when the text is not one."""
    if len(text) != _UUID_LENGTH:
        return None
    try:
        return str(uuid.UUID(text))
    except ValueError:
        return None


def check_project(project: str, field: str = "project") -> str:
    """A project name.

    Raises:
        DroverError: INVALID_NAME.
    """
    if not _PROJECT.fullmatch(project):
        raise _invalid(field, project, "1 to 63 of a-z, 0-9, '-' and '.', as in shop")
    return project


def _last_part(name: str, collection: str, field: str) -> str:
    head, separator, last = name.partition("/")
    if head != collection or not separator or not last:
        raise _invalid(field, name, f"of the form {collection}/NAME")
    return last


def _invalid(field: str, value: str, form: str) -> DroverError:
    shown = value if len(value) <= 80 else value[:77] + "..."
    message = f"{field} is {shown!r}; it has to be {form}."
    return DroverError(
        Reason.INVALID_NAME,
        message,
        subject=field,
        metadata={"field": field, "value": shown},
        violations=[Violation(field, message)],
    )
