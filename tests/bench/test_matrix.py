"""The names in the matrix stand for something, and options choose among its cells."""

from __future__ import annotations

import pytest

from tests.bench.links import SHAPES
from tests.bench.matrix import FULL, QUICK, Cell, choose
from tests.bench.recipes import RECIPES
from tests.bench.tools import TOOLS


@pytest.mark.parametrize("cell", [*FULL, *QUICK], ids=lambda cell: f"{cell.image}, {cell.link}")
def test_the_names_in_a_cell_exist(cell: Cell) -> None:
    assert cell.images <= RECIPES.keys()
    assert cell.link in SHAPES
    assert {*cell.tools, *cell.thrice} <= TOOLS.keys()
    assert {*cell.thrice} <= {*cell.tools}


def test_an_older_copy_is_one_of_what_is_copied() -> None:
    for cell in FULL:
        if cell.older:
            known = {cell.image, RECIPES[cell.image].below}
            assert (RECIPES[cell.older].replaced_by or cell.older) in known


def test_options_choose_among_the_cells() -> None:
    cells = choose(FULL, ("os-part",), ("cut",), ("drover",))
    assert cells == [Cell("os-part", "cut", ("drover",))]


def test_what_has_no_cell_gets_one() -> None:
    assert choose(FULL, ("zeros",), ("cut",), ("drover",)) == [Cell("zeros", "cut", ("drover",))]


def test_a_tool_that_no_cell_has_chooses_nothing() -> None:
    assert choose(QUICK, (), (), ("scp (Nova)",)) == []


def test_the_headlines_are_measured_three_times() -> None:
    assert {cell.times("drover") for cell in FULL if cell.thrice} == {3}
    assert {cell.times("drover") for cell in QUICK} == {1}
