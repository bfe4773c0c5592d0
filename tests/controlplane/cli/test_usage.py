"""Every command of the tree: what it says of itself, and wrong usage of it.

No server is asked: usage is judged before anything is sent.
"""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner, Result

from controlplane.cli.root import cli

# What these do ends in a sentence or in a file, not in a resource.
WITHOUT_RESOURCE = {
    "version", "completion", "init", "cert issue", "cert show", "cert renew",
    "instance release", "flavor delete",
}  # fmt: skip


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if not isinstance(command, click.Group):
        yield path
        return
    for name, inner in command.commands.items():
        yield from leaves(inner, (*path, name))


def at(path: tuple[str, ...]) -> click.Command:
    found: click.Command = cli
    for name in path:
        assert isinstance(found, click.Group)
        found = found.commands[name]
    return found


def run(*arguments: str) -> Result:
    nowhere = {"DROVER_SERVER": "127.0.0.1:1", "DROVER_CONFIG": "/nonexistent"}
    return CliRunner().invoke(cli, list(arguments), env=nowhere)


LEAVES = sorted(leaves(cli))
every_command = pytest.mark.parametrize("path", LEAVES, ids=" ".join)


@every_command
def test_it_says_what_it_does(path: tuple[str, ...]) -> None:
    command = at(path)
    assert command.help
    assert command.help.split("\n\n")[0].rstrip().endswith(".")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
    helped = run(*path, "--help")
    assert helped.exit_code == 0
    assert "Usage: " in helped.stdout


@every_command
def test_an_unknown_option_is_wrong_usage(path: tuple[str, ...]) -> None:
    wrong = run(*path, "--no-such-option")
    assert wrong.exit_code == 2
    assert "No such option '--no-such-option'" in wrong.stderr
    assert wrong.stdout == ""


@every_command
def test_what_answers_with_a_resource_has_every_format(path: tuple[str, ...]) -> None:
    formats = [o.type for o in at(path).params if "-o" in o.opts]
    if " ".join(path) in WITHOUT_RESOURCE:
        assert formats == []
        return
    assert isinstance(formats[0], click.Choice)
    assert list(formats[0].choices) == ["table", "json", "yaml"]
    wrong = run(*path, "-o", "xml")
    assert wrong.exit_code == 2
    assert "'xml' is not one of 'table', 'json', 'yaml'" in wrong.stderr


@every_command
def test_a_missing_argument_is_named(path: tuple[str, ...]) -> None:
    wanted = [p for p in at(path).params if isinstance(p, click.Argument) and p.required]
    if not wanted:
        return
    missing = run(*path)
    assert missing.exit_code == 2
    assert "Missing argument" in missing.stderr


@pytest.mark.parametrize("arguments", [["nonsense"], ["host", "nonsense"], ["-o", "json"]])
def test_what_does_not_exist_is_wrong_usage(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("arguments", [["--version"], ["version"]])
def test_the_version_is_told_without_a_server(arguments: list[str]) -> None:
    told = run(*arguments)
    assert told.exit_code == 0
    assert told.stdout.startswith("drover ")
