"""The role table: complete, default deny, and as the proto comments promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from controlplane.common.errors import DroverError
from controlplane.common.identity import Identity, Role
from controlplane.common.reasons import Reason
from controlplane.security import roles
from controlplane.v1 import (
    flavor_service_pb2,
    host_service_pb2,
    instance_service_pb2,
    migration_service_pb2,
)

FILES = (
    flavor_service_pb2,
    host_service_pb2,
    instance_service_pb2,
    migration_service_pb2,
    health_pb2,
    reflection_pb2,
)
SERVICES: list[ServiceDescriptor] = [
    service for file in FILES for service in file.DESCRIPTOR.services_by_name.values()
]
METHODS = sorted(f"/{s.full_name}/{m.name}" for s in SERVICES for m in s.methods)
# grpcio-reflection compiles v1alpha only, and serves v1 too where it knows it.
EXTRA = {"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"}

PEOPLE = [Role.VIEWER, Role.MEMBER, Role.OPERATOR, Role.ADMIN]
PROTO_DIRECTORY = Path(__file__).parents[3] / "proto" / "controlplane" / "v1"


def person(role: Role, project: str = "web") -> Identity:
    return Identity("lab", role, "eve", project if role is Role.MEMBER else "")


def test_every_proto_file_with_services_is_looked_at() -> None:
    declared = {
        name
        for path in PROTO_DIRECTORY.glob("*.proto")
        for name in re.findall(r"^service (\w+)", path.read_text(), re.MULTILINE)
    }

    assert declared == {s.name for s in SERVICES if s.full_name.startswith("controlplane.v1.")}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_listed(method: str) -> None:
    assert method in roles.RULES


def test_nothing_else_is_listed() -> None:
    assert set(roles.RULES) - set(METHODS) == EXTRA


@pytest.mark.parametrize("method", [m for m in METHODS if m.startswith("/controlplane.v1.")])
def test_table_agrees_with_the_proto_comments(method: str) -> None:
    name = method.rpartition("/")[2]
    text = "\n".join(path.read_text() for path in PROTO_DIRECTORY.glob("*.proto"))
    match = re.search(rf"((?:^ *//.*\n)+) *rpc {name}\(", text, re.MULTILINE)
    assert match is not None
    comment = re.sub(r"\s*//\s*", " ", match[1])
    promised = re.search(r"Role: (\w+)", comment)
    assert promised is not None, f"{name} does not say its role"
    rule = roles.rule_of(method)

    if name == "CreateMigration":
        assert rule.roles == roles.at_least(Role.MEMBER)  # check_move decides the rest
    elif promised[1] == "none":
        assert rule.roles == frozenset()
        assert rule.token_decides
    else:
        assert rule.roles == roles.at_least(Role(promised[1]))


@pytest.mark.parametrize("role", [Role.HOST, Role.CONTROLPLANE])
def test_machines_may_call_nothing(role: Role) -> None:
    for method in roles.RULES:
        with pytest.raises(DroverError) as caught:
            roles.check_method(method, Identity("lab", role, "a"))
        assert caught.value.reason is Reason.PERMISSION_DENIED


def test_unknown_method_is_denied_to_all() -> None:
    for role in PEOPLE:
        with pytest.raises(DroverError):
            roles.check_method("/controlplane.v1.HostService/Explode", person(role))


def test_each_role_may_do_what_the_ones_before_may() -> None:
    for rule in roles.RULES.values():
        allowed = [role in rule.roles for role in PEOPLE]
        assert allowed == sorted(allowed)


def test_refusal_names_the_least_role() -> None:
    with pytest.raises(DroverError, match="needs the role operator") as caught:
        roles.check_method("/controlplane.v1.MigrationService/CancelMigration", person(Role.MEMBER))

    assert caught.value.metadata["needed"] == "operator"


@pytest.mark.parametrize(
    ("role", "resize", "host_named", "allowed"),
    [
        (Role.VIEWER, False, False, False),
        (Role.VIEWER, True, False, False),
        (Role.MEMBER, False, False, False),
        (Role.MEMBER, True, False, True),
        (Role.MEMBER, True, True, False),
        (Role.OPERATOR, False, False, True),
        (Role.OPERATOR, True, False, True),
        (Role.OPERATOR, False, True, False),
        (Role.OPERATOR, True, True, False),
        (Role.ADMIN, False, True, True),
        (Role.ADMIN, True, True, True),
        (Role.HOST, False, False, False),
    ],
)
def test_who_may_move(role: Role, resize: bool, host_named: bool, allowed: bool) -> None:
    def ask() -> None:
        roles.check_move(person(role), project="web", resize=resize, host_named=host_named)

    if allowed:
        ask()
    else:
        with pytest.raises(DroverError) as caught:
            ask()
        assert caught.value.reason is Reason.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("role", "own", "project", "allowed"),
    [
        (Role.MEMBER, "web", "web", True),
        (Role.MEMBER, "web", "db", False),
        (Role.MEMBER, "web", "", False),
        (Role.VIEWER, "", "web", False),
        (Role.OPERATOR, "", "web", True),
        (Role.ADMIN, "", "", True),
        (Role.HOST, "", "web", False),
        (Role.CONTROLPLANE, "", "web", False),
    ],
)
def test_who_may_act_on_a_project(role: Role, own: str, project: str, allowed: bool) -> None:
    def ask() -> None:
        roles.check_project(person(role, own), project=project, action="confirm")

    if allowed:
        ask()
    else:
        with pytest.raises(DroverError, match="confirm"):
            ask()
