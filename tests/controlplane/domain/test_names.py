from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.domain import names

UUID = "123e4567-e89b-42d3-a456-426614174000"


def test_names_are_built_and_taken_apart() -> None:
    assert names.parse_host(names.host_name("rack1.a")) == "rack1.a"
    assert names.parse_flavor(names.flavor_name("small-2")) == "small-2"
    assert names.parse_migration(names.migration_name(UUID)) == UUID
    assert names.parse_instance(names.instance_name(UUID)) == UUID
    assert names.host_name("") == names.instance_name("") == names.flavor_name("") == ""


def test_a_uuid_is_made_canonical_and_anything_else_is_a_display_name() -> None:
    assert names.parse_instance(f"instances/{UUID.upper()}") == UUID
    assert names.parse_instance("instances/Web server 1") == "Web server 1"
    assert names.canonical_uuid(UUID.replace("-", "")) is None


@pytest.mark.parametrize(
    ("parse", "name"),
    [
        (names.parse_host, ""),
        (names.parse_host, "a"),
        (names.parse_host, "hosts/"),
        (names.parse_host, "hosts/A"),
        (names.parse_host, "hosts/-a"),
        (names.parse_host, "hosts/a/b"),
        (names.parse_host, "hosts/" + "a" * 64),
        (names.parse_flavor, "flavors/1a"),
        (names.parse_flavor, "flavors/Small"),
        (names.parse_flavor, "sizes/small"),
        (names.parse_migration, "migrations/42"),
        (names.parse_migration, f"instances/{UUID}"),
        (names.parse_instance, "instances/"),
        (names.parse_instance, "instances/a/b"),
        (names.parse_instance, "instances/a\nb"),
        (names.parse_instance, "instances/" + "a" * 256),
        (names.parse_instance, "web1"),
        (names.parse_host, "hosts/a\n"),
        (names.parse_flavor, "flavors/small\n"),
        (names.parse_migration, f"migrations/{UUID}\n"),
        (names.parse_instance, "instances/web1\n"),
    ],
)
def test_malformed_names_are_refused(parse: Callable[[str], str], name: str) -> None:
    with pytest.raises(DroverError) as caught:
        parse(name)
    assert caught.value.reason is Reason.INVALID_NAME
    assert caught.value.violations[0].subject == "name"


@given(st.text(max_size=400))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for parse in (
        names.parse_host,
        names.parse_flavor,
        names.parse_migration,
        names.parse_instance,
    ):
        outcome = parsed(parse, text)
        assert outcome == "parsed" or len(outcome) < 400


def parsed(parse: Callable[[str], str], text: str) -> str:
    try:
        return "parsed" if parse(text) else "empty"
    except DroverError as error:
        return error.message if error.reason is Reason.INVALID_NAME else "x" * 1000
