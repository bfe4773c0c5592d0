"""What the commands print: tables for people, JSON and YAML for programs.

JSON is the standard protobuf JSON mapping, as grpcurl prints it: lowerCamelCase
names, 64-bit integers as strings, enums by name, times in RFC 3339. Fields with
default values are printed too, so that a script finds every key. Lists are JSON
arrays; a stream is one JSON object a line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, TypeVar

import click
import yaml
from google.protobuf import json_format
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table
from rich.text import Text

_UNLIMITED_WIDTH = 10_000
_STYLES = {
    "green": {"ENABLED", "ACTIVE", "RUNNING", "CONFIRMED", "yes"},
    "yellow": {"DISABLED", "JOINING", "AWAITING_CONFIRM", "STOPPING", "COPYING", "RESIZED"},
    "red": {"GONE", "ERROR", "MISSING", "FAILED", "STUCK", "ABANDONED", "no"},
}

F = TypeVar("F", bound=Callable[..., Any])


class Format(StrEnum):
    """What `-o` takes."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


def visible(text: str) -> str:
    """A text with everything spelt out that would act on a terminal.

    Names and messages come from hosts and guests; line ends are kept.
    """
    return "".join(c if c.isprintable() or c == "\n" else _spelt_out(c) for c in text)


def _spelt_out(character: str) -> str:
    return character.encode("unicode_escape").decode()


def output_option(function: F) -> F:
    """Give a command the option `-o`, as the argument `output`."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(Format, case_sensitive=False),
        default=Format.TABLE,
        show_default="table",
        help="Output format; json is the protobuf JSON mapping.",
    )(function)


def to_plain(message: Message) -> dict[str, Any]:
    """A message as plain data, by the standard protobuf JSON mapping."""
    return dict(json_format.MessageToDict(message, always_print_fields_with_no_presence=True))


def print_data(data: Any, output: Format) -> None:
    """Print plain data as JSON or YAML on standard output."""
    if output is Format.JSON:
        click.echo(json.dumps(data, indent=2))
    else:
        click.echo(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), nl=False)


def print_stream_item(message: Message, output: Format) -> None:
    """Print one message of a stream: a JSON line or a YAML document."""
    if output is Format.JSON:
        click.echo(json.dumps(to_plain(message)))
    else:
        click.echo("---")
        print_data(to_plain(message), output)


def print_list(
    messages: Sequence[Message],
    output: Format,
    header: Sequence[str],
    row: Callable[[Any], Sequence[str]],
    *,
    empty: str,
) -> None:
    """Print resources.

    Args:
        messages: The resources.
        output: How.
        header: Column titles of the table.
        row: The cells of one resource.
        empty: What to say on standard error when the table has no rows.
    """
    if output is not Format.TABLE:
        print_data([to_plain(message) for message in messages], output)
    elif messages:
        print_table(header, [row(message) for message in messages])
    else:
        click.echo(empty, err=True)


def print_one(
    message: Message, output: Format, details: Callable[[Any], Sequence[tuple[str, str]]]
) -> None:
    """Print one resource; `details` gives the lines for people, empty ones are left out."""
    if output is not Format.TABLE:
        print_data(to_plain(message), output)
        return
    pairs = [(label, text) for label, text in details(message) if text]
    width = max((len(label) for label, _ in pairs), default=0)
    for label, text in pairs:
        first, *rest = visible(text).splitlines()
        click.echo(f"{label.ljust(width)}  {first}")
        for line in rest:
            click.echo(f"{' ' * width}  {line}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, err: bool = False) -> None:
    """Print aligned columns; colours and wrapping on a terminal only."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for title in header:
        table.add_column(title, no_wrap=title not in ("MESSAGE", "WHY"), overflow="fold")
    for cells in rows:
        table.add_row(*(_styled(cell) for cell in cells))
    stream = sys.stderr if err else sys.stdout
    if stream.isatty():
        Console(file=stream, highlight=False).print(table)
        return
    console = Console(file=stream, highlight=False, no_color=True, width=_UNLIMITED_WIDTH)
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        click.echo(line.rstrip(), err=err)


def _styled(cell: str) -> Text:
    style = next((colour for colour, words in _STYLES.items() if cell in words), "")
    return Text(visible(cell), style=style)


def enum_word(name: str, prefix: str) -> str:
    """An enum value's name without its prefix; "-" for the unspecified one."""
    word = name.removeprefix(prefix)
    return "-" if word == "UNSPECIFIED" else word
