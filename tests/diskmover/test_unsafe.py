"""Unsafe Rust is in one module, where each use says why it is sound."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

CRATE = Path(__file__).parents[2] / "diskmover"
THE_ONE = (CRATE / "src/sys.rs", CRATE / "src/sys/lines.rs")
CODE = [
    path
    for folder in ("src", "tests", "fuzz/src")
    for path in sorted((CRATE / folder).rglob("*.rs"))
    if path not in THE_ONE
]


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*", "", text)


def test_unsafe_code_is_in_one_module_only() -> None:
    assert len(CODE) > 80, "not all of the crate was looked at"
    uses = [
        f"{path.relative_to(CRATE)}: {line.strip()}"
        for path in CODE
        for line in without_comments(path.read_text()).splitlines()
        if re.search(r"\bunsafe\b|\bunsafe_\w+", line)
    ]
    assert uses == []


def test_the_compiler_refuses_it_elsewhere() -> None:
    manifest = tomllib.loads((CRATE / "Cargo.toml").read_text())
    assert manifest["lints"]["rust"]["unsafe_code"] == "deny"
    assert [path.read_text().count("#![allow(unsafe_code)]") for path in THE_ONE] == [1, 0]


@pytest.mark.parametrize("path", THE_ONE, ids=lambda path: path.name)
def test_each_use_says_why_it_is_sound(path: Path) -> None:
    lines = path.read_text().splitlines()
    used = [number for number, line in enumerate(lines) if re.search(r"\bunsafe (\{|impl)", line)]
    assert len(used) > 5
    for number in used:
        above = number - 1
        while lines[above].strip().startswith("//") and "SAFETY:" not in lines[above]:
            above -= 1
        assert "SAFETY:" in lines[above], f"{path.name}:{number + 1}: {lines[number].strip()}"
