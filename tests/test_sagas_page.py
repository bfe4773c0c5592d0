"""docs/sagas.md lists every step of every saga, in order, in the words of the definitions."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from controlplane.saga.definition import Saga, Step
from controlplane.sagas import ALL

PAGE = Path(__file__).parents[1] / "docs/sagas.md"


def row(saga: Saga, step: Step) -> str:
    what = (inspect.getdoc(step.action) or "").partition("\n")[0]
    pivot = " (pivot)" if step.name == saga.pivot else ""
    return f"| `{step.name}`{pivot} | {step.kind.value} | {what} | {step.doc} |"


@pytest.mark.parametrize("saga", ALL, ids=lambda saga: saga.kind)
def test_the_page_has_every_step_in_order(saga: Saga) -> None:
    section = PAGE.read_text().partition(f"\n## {saga.kind}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert rows == [row(saga, step) for step in saga.steps]
