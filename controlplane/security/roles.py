"""The one table that says who may call what. What is not in it is denied.

Roles of people are ordered: viewer < member < operator < admin; each may do what
the ones before it may. Hosts and the control plane itself call nothing on the
API: a host answers, it never asks.

The table holds what the role alone decides. Two rules depend on the resource and
are predicates below, called by the API once it has read the resource:

- a member acts on instances of its own project only (`check_project`);
- to start a move takes operator, to a host of the caller's choice admin, and a
  resize without a chosen host takes a member of the project (`check_move`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from controlplane.common.errors import DroverError
from controlplane.common.identity import Identity, Role
from controlplane.common.reasons import Reason

_ORDER = (Role.VIEWER, Role.MEMBER, Role.OPERATOR, Role.ADMIN)


def at_least(role: Role) -> frozenset[Role]:
    """A role of people and those above it."""
    return frozenset(_ORDER[_ORDER.index(role) :])


@dataclass(frozen=True)
class Rule:
    """What the table says of a method.

    Attributes:
        roles: Who may call it; empty for the enrolment port, where no
            certificate is asked for.
        mutates: True when it can change something; such calls are audited.
        token_decides: True when a credential inside the request decides instead
            of a certificate.
    """

    roles: frozenset[Role]
    mutates: bool = False
    token_decides: bool = False


def _reads(role: Role) -> Rule:
    return Rule(at_least(role))


def _changes(role: Role) -> Rule:
    return Rule(at_least(role), mutates=True)


_V1 = "/controlplane.v1"

RULES: Mapping[str, Rule] = {
    f"{_V1}.HostService/GetHost": _reads(Role.VIEWER),
    f"{_V1}.HostService/ListHosts": _reads(Role.VIEWER),
    f"{_V1}.HostService/AddHost": _changes(Role.ADMIN),
    f"{_V1}.HostService/EnableHost": _changes(Role.ADMIN),
    f"{_V1}.HostService/DisableHost": _changes(Role.ADMIN),
    f"{_V1}.HostService/DeclareHostGone": _changes(Role.ADMIN),
    f"{_V1}.EnrollmentService/JoinHost": Rule(frozenset(), mutates=True, token_decides=True),
    f"{_V1}.InstanceService/GetInstance": _reads(Role.VIEWER),
    f"{_V1}.InstanceService/ListInstances": _reads(Role.VIEWER),
    f"{_V1}.InstanceService/AdoptInstance": _changes(Role.OPERATOR),
    f"{_V1}.InstanceService/ReleaseInstance": _changes(Role.OPERATOR),
    f"{_V1}.InstanceService/LockInstance": _changes(Role.MEMBER),
    f"{_V1}.InstanceService/UnlockInstance": _changes(Role.MEMBER),
    f"{_V1}.FlavorService/CreateFlavor": _changes(Role.ADMIN),
    f"{_V1}.FlavorService/GetFlavor": _reads(Role.VIEWER),
    f"{_V1}.FlavorService/ListFlavors": _reads(Role.VIEWER),
    f"{_V1}.FlavorService/DeleteFlavor": _changes(Role.ADMIN),
    f"{_V1}.MigrationService/CreateMigration": _changes(Role.MEMBER),
    f"{_V1}.MigrationService/GetMigration": _reads(Role.VIEWER),
    f"{_V1}.MigrationService/ListMigrations": _reads(Role.VIEWER),
    f"{_V1}.MigrationService/WatchMigration": _reads(Role.VIEWER),
    f"{_V1}.MigrationService/ConfirmMigration": _changes(Role.MEMBER),
    f"{_V1}.MigrationService/RevertMigration": _changes(Role.MEMBER),
    f"{_V1}.MigrationService/CancelMigration": _changes(Role.OPERATOR),
    f"{_V1}.MigrationService/LimitMigration": _changes(Role.OPERATOR),
    f"{_V1}.MigrationService/RetryMigration": _changes(Role.ADMIN),
    f"{_V1}.MigrationService/AbandonMigration": _changes(Role.ADMIN),
    f"{_V1}.MigrationService/ListMigrationEvents": _reads(Role.VIEWER),
    f"{_V1}.MigrationService/ListAuditEntries": _reads(Role.ADMIN),
    "/grpc.health.v1.Health/Check": _reads(Role.VIEWER),
    "/grpc.health.v1.Health/List": _reads(Role.VIEWER),
    "/grpc.health.v1.Health/Watch": _reads(Role.VIEWER),
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": _reads(Role.VIEWER),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _reads(Role.VIEWER),
}


def rule_of(method: str) -> Rule:
    """The rule of a method by its full name; nobody may call one without a rule."""
    return RULES.get(method, Rule(frozenset()))


def check_method(method: str, caller: Identity) -> None:
    """Refuse a caller whose role may not call a method.

    Raises:
        DroverError: PERMISSION_DENIED, naming the least role that may.
    """
    rule = rule_of(method)
    if caller.role in rule.roles:
        return
    least = next((role.value for role in _ORDER if role in rule.roles), "none")
    short = method.rpartition("/")[2]
    raise DroverError(
        Reason.PERMISSION_DENIED,
        f"{caller} has the role {caller.role.value}; {short} needs the role {least}."
        if least != "none"
        else f"No role may call {method}.",
        metadata={"method": method, "role": caller.role.value, "needed": least},
    )


def check_project(caller: Identity, *, project: str, action: str) -> None:
    """Refuse a member of another project.

    Args:
        caller: Who asks.
        project: Project of the instance that the call is about.
        action: What it would do, as "confirm" or "lock", for the message.

    Raises:
        DroverError: PERMISSION_DENIED.
    """
    if caller.role in at_least(Role.OPERATOR):
        return
    if caller.role is Role.MEMBER and project and caller.project == project:
        return
    raise DroverError(
        Reason.PERMISSION_DENIED,
        f"{caller} may not {action} an instance of project {project or '(none)'}; "
        "that needs a member of the project or an operator.",
        metadata={"action": action, "project": project, "needed": Role.OPERATOR.value},
    )


def check_move(caller: Identity, *, project: str, resize: bool, host_named: bool) -> None:
    """Refuse a caller who may not start such a move.

    Args:
        caller: Who asks.
        project: Project of the instance.
        resize: True when a flavor was given.
        host_named: True when the caller chose the target.

    Raises:
        DroverError: PERMISSION_DENIED.
    """
    if host_named:
        needed, action = Role.ADMIN, "move an instance to a host of its choice"
    elif resize:
        check_project(caller, project=project, action="resize")
        return
    else:
        needed, action = Role.OPERATOR, "move an instance"
    if caller.role not in at_least(needed):
        raise DroverError(
            Reason.PERMISSION_DENIED,
            f"{caller} may not {action}; that needs the role {needed.value}.",
            metadata={"action": action, "role": caller.role.value, "needed": needed.value},
        )
