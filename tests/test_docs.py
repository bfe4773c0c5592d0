"""The documents name files that exist and link to pages that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()
)  # fmt: skip
ROOMS = ("controlplane/", "hostd/", "diskmover/", "proto/", "tests/", "docs/")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page: Path) -> None:
    named = re.findall(r"`([\w./-]+)`", page.read_text())
    files = [name for name in named if name.startswith(ROOMS)]
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_pages_named_in_the_code_exist() -> None:
    named = {
        name
        for room in ROOMS
        for source in (ROOT / room).rglob("*")
        if source.suffix in (".proto", ".py", ".rs") and "target" not in source.parts
        for name in re.findall(r"docs/[\w/-]+\.md", source.read_text())
    }
    assert "docs/sagas.md" in named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_ten_files_lead_from_the_call_to_the_bytes() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `([^`]+)` \|", text, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    assert 1 <= len(rows) <= 10
    for _, name in rows:
        assert (ROOT / name).is_file()
