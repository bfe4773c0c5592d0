"""The table of reasons: unique, documented, raised by the code, provoked by a test.

What the code raises and what the tests expect is read from their syntax trees, so a
symbol in a comment or a docstring counts for nothing.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane.common.reasons import Reason

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/errors.md"
TABLE = ROOT / "controlplane/common/reasons.py"
PRODUCT = ("controlplane", "hostd")
# The CLI's tests speak to a recorded server, which proves nothing about the real one.
RECORDED = ROOT / "tests/controlplane/cli"
# Tests that hand an error to the code, rather than have it made by the code, build it
# with one of these.
MAKES_AN_ERROR = {"DroverError", "fail_check", "Verdict", "Violation", "ErrorInfo"}


def parents_first(node: ast.AST, above: tuple[ast.AST, ...] = ()) -> Iterator[tuple[ast.AST, ...]]:
    """Every node with those it lies in, itself last."""
    yield (*above, node)
    for child in ast.iter_child_nodes(node):
        yield from parents_first(child, (*above, node))


def named(node: ast.AST) -> str:
    """The reason that an expression is, as `Reason.X` or as the text "X"."""
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "Reason":
        return node.attr
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return ""


def raised() -> set[str]:
    """Reasons that the product gives, rather than compares with."""
    found: set[str] = set()
    for folder in PRODUCT:
        for path in (ROOT / folder).rglob("*.py"):
            if path == TABLE or path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
                continue
            for *above, node in parents_first(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and not any(
                    isinstance(outer, ast.Compare) for outer in above
                ):
                    found.add(named(node))
    return found & set(Reason.__members__)


def provoked() -> set[str]:
    """Reasons that some test expects to be given."""
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        if path == Path(__file__) or path.parent == RECORDED:
            continue
        for *above, node in parents_first(ast.parse(path.read_text())):
            makers = (ast.unparse(outer.func) for outer in above if isinstance(outer, ast.Call))
            if not any(maker.rpartition(".")[2] in MAKES_AN_ERROR for maker in makers):
                found.add(named(node))
    return found & set(Reason.__members__)


def documented() -> list[tuple[str, ...]]:
    """The rows of the page: reason, code, what to do."""
    row = re.compile(r"^\| `([A-Z_]+)` \| `([A-Z_]+)` \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
    found = row.findall(PAGE.read_text())
    assert all(meaning.strip() for _, _, meaning, _ in found)
    return [(reason, code, help_) for reason, code, _, help_ in found]


def test_the_page_has_every_reason_once_in_the_tables_order() -> None:
    assert documented() == [(r.name, r.code.name, r.info.help) for r in Reason]


def test_the_page_tells_every_code_and_its_exit_code() -> None:
    from controlplane.cli.errors import exit_code_of

    told = re.findall(r"^\| `([A-Z_]+)` \| [^|`]+ \| (\d) \|$", PAGE.read_text(), re.MULTILINE)
    assert dict(told) == {r.code.name: str(exit_code_of(r.code)) for r in Reason}


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_a_reason_is_what_error_info_allows(reason: Reason) -> None:
    assert re.fullmatch(r"[A-Z][A-Z0-9_]+[A-Z0-9]", reason.name)
    assert len(reason.name) <= 63
    assert re.fullmatch(r"[A-Z`].*\.", reason.info.help)


def test_every_reason_is_a_value_of_its_own() -> None:
    assigned = re.findall(r"^    ([A-Z_]+) = ", TABLE.read_text(), re.MULTILINE)
    # An Enum makes two equal values one member under two names.
    assert sorted(assigned) == sorted(
        [r.name for r in Reason] + ["NONE", "BAD_REQUEST", "PRECONDITION", "RESOURCE", "RETRY"]
    )


def test_every_reason_is_raised_by_the_code() -> None:
    assert sorted(set(Reason.__members__) - raised()) == []


def test_every_reason_is_provoked_by_a_test() -> None:
    assert sorted(set(Reason.__members__) - provoked()) == []
