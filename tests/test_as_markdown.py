"""The comparison as Markdown: whole tables, nothing from outside that is markup."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.errors import Bug
from loadgen.gates import judge, read_bounds
from loadgen.types import Caveat, Study
from reports.as_markdown import render
from tests.studies import blank_study, compared, single

change = msgspec.structs.replace


def test_the_comparison_has_a_row_a_load_and_a_row_a_category_and_load() -> None:
    text = render(compared())
    rows = [line for line in text.split("\n") if line.startswith("| ")]
    assert len([r for r in rows if r.startswith("| c=")]) == 2
    assert len([r for r in rows if r.startswith("| coding |")]) == 2
    assert "| c=8 | – | 0.83× \\[0.78, 0.88\\] | 0.84× \\[0.78, 0.89\\] (steady) |" in text
    assert "- Nothing else differs." in text
    assert "1 of 22 (from token 12 on, median) at c=8" in text
    assert text.startswith("ngram k = 3 against no speculation, one repeat (no verdict): user")


def test_bounds_and_caveats_are_shown() -> None:
    study = compared()
    assert study.comparison is not None
    caveat = Caveat(code="x", message="m_1 <b>", advice="do.")
    bounds = judge(study.comparison, read_bounds(["speedup_user<1.1@c=8"]))
    study = replace(study, comparison=change(study.comparison, caveats=(caveat,)), judged=bounds)
    text = render(study)
    assert "| speedup\\_user&lt;1.1@c=8 | c=8 | 0.834 | crossed |" in text
    assert "- x: m\\_1 &lt;b&gt; do." in text


def named(text: str) -> Study:
    study = compared()
    assert study.comparison is not None
    loads = tuple(
        change(row, categories=tuple(change(c, category=text) for c in row.categories))
        for row in study.comparison.loads
    )
    return replace(study, comparison=change(study.comparison, loads=loads, differences=(text,)))


LINES = len(render(named("coding")).split("\n"))


@given(st.text(max_size=60))
def test_a_name_never_ends_a_cell_or_a_line(text: str) -> None:
    """Every table row has as many cells as its head, whatever a category is called."""
    width = 0
    lines = render(named(text)).split("\n")
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("| "):
            cells = line.replace("\\\\", "").replace("\\|", "").count("|")
            width = width if before.startswith("| ") else cells
            assert cells == width
    assert len(lines) == LINES


def test_nothing_measured_shows_dashes() -> None:
    text = render(blank_study())
    assert "None" not in text
    assert "| c=1 | – | – | – | – | – | – | – | – | – | – |" in text


def test_without_a_comparison_it_is_our_bug() -> None:
    with pytest.raises(Bug):
        render(single())
