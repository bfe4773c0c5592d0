"""What the help and the manual say of the tool is what it does, and the same."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from diskmover import _core
from diskmover.cli import main

MANUAL = (Path(__file__).parents[2] / "docs" / "diskmover.md").read_text()
COMMANDS = sorted(main.commands)
commands = pytest.mark.parametrize("command", COMMANDS)


def help_of(*command: str) -> str:
    """What --help says, each paragraph as it stands."""
    result = CliRunner().invoke(main, [*command, "--help"])
    assert result.exit_code == 0
    return result.output


def options_of(command: str) -> dict[str, str]:
    """The options that --help lists, and the default of each, "required" or nothing."""
    found: dict[str, str] = {}
    context = click.Context(main.commands[command])
    for parameter in main.commands[command].params:
        record = parameter.get_help_record(context)
        if record is None or not isinstance(parameter, click.Option):
            continue
        names, text = record
        default = re.search(r"\[default: ([^;\]]+)", text)
        known = "required" if "required]" in text else default[1] if default else ""
        found |= dict.fromkeys(re.findall(r"--[a-z-]+", names), known)
    return found


def exit_codes_of(text: str) -> set[int]:
    """The exit codes that a help lists."""
    (listed,) = re.findall(r"Exit codes:(.*?)(?:\n\n|\Z)", text, re.DOTALL)
    return {int(code) for code in re.findall(r"(\d+)\s+[a-z]", listed)}


def manual_exit_codes() -> dict[int, set[str]]:
    """Each exit code of the manual, and which commands end with it."""
    rows = re.findall(r"^\| (\d+) \| ([a-z, ]+) \|", MANUAL, re.MULTILINE)
    return {int(code): set(of.split(", ")) for code, of in rows}


def test_help_tells_a_newcomer_what_to_do() -> None:
    for command in ([], ["serve"], ["push"], ["certs"], ["digest"]):
        result = CliRunner().invoke(main, [*command, "--help"])
        assert result.exit_code == 0
    text = CliRunner().invoke(main, ["--help"]).output
    assert "diskmover certs" in text
    assert "diskmover serve --root" in text
    assert "diskmover push" in text
    assert "Exit codes" in text


@commands
def test_the_manual_has_every_option_and_its_default(command: str) -> None:
    row = re.compile(r"^\| (`--[^|]+`) \| ([a-z, ]+) \|([^|]*)\|", re.MULTILINE)
    told = {
        option: default.strip()
        for options, of, default in row.findall(MANUAL)
        for option in re.findall(r"--[a-z-]+", options)
        if command in of.split(", ")
    }
    assert told == options_of(command)


@commands
def test_the_manual_has_the_exit_codes_of_the_help(command: str) -> None:
    told = {code for code, of in manual_exit_codes().items() if command in of}
    assert exit_codes_of(help_of(command)) == told


def test_the_help_of_all_has_every_exit_code() -> None:
    assert exit_codes_of(help_of()) == set(manual_exit_codes())


@commands
def test_examples_use_what_there_is(command: str) -> None:
    assert "Examples:" in help_of(command)
    known = set(options_of(command))
    for line in (MANUAL + help_of() + help_of(command)).splitlines():
        if example := re.search(rf"\bdiskmover {command} .*", line):
            assert set(re.findall(r"(?<!\S)--[a-z-]+", example[0])) <= known | {"--help"}, line


def test_every_error_is_in_the_manual_with_its_exit_code() -> None:
    told = {
        code: int(exit_code)
        for codes, exit_code in re.findall(r"^\| ((?:`[A-Z_]+`(?:, )?)+) \| (\d) \|", MANUAL, re.M)
        for code in re.findall(r"[A-Z_]+", codes)
    }
    assert told == {name: 5 if retryable else 1 for name, retryable in _core.error_codes()}
