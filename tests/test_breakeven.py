"""The map: rows, cells and crossings by table and by law; its pages at three widths."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from loadgen.breakeven import break_even, crossings
from loadgen.errors import Bug, UserError
from loadgen.types import (
    BreakEven,
    CategoryComparison,
    ClosedLoop,
    Interval,
    Load,
    LoadComparison,
    Mark,
    Speedup,
    Study,
)
from loadgen.written import load_order
from reports import as_json, as_markdown, breakeven
from tests.studies import blank_study, compared, golden

change = msgspec.structs.replace
T = "95 % Student t over 3 interleaved repeats"


def cell(ratio: float, reach: float = 1.05) -> Speedup:
    low, high = ratio / reach, ratio * reach
    mark: Mark = "pays" if low > 1 else "costs" if high < 1 else "no difference"
    limits = Interval(low=low, high=high, kind=T)
    return Speedup(ratio=ratio, pairs=66, interval=limits, repeats=3, mark=mark)


def ladder(*concurrencies: int) -> tuple[ClosedLoop, ...]:
    return tuple(ClosedLoop(concurrency=c) for c in concurrencies)


def size(load: Load) -> int:
    return int(load_order(load)[1])


def crossed(loads: Sequence[int], ratios: Sequence[float | None]) -> list[tuple[int, int, float]]:
    cells = [None if r is None else cell(r) for r in ratios]
    found = crossings(ladder(*loads), cells)
    return [(size(c.low), size(c.high), c.at) for c in found]


@pytest.mark.parametrize(
    ("loads", "ratios", "expected"),
    [
        ([32, 64], [1.25, 0.8], [(32, 64, math.sqrt(32 * 64))]),
        ([1, 8, 64], [2.0, 2.0**0.5, 2.0**-0.5], [(8, 64, 8 * 8**0.5)]),
        ([1, 8, 64], [1.3, 1.2, 1.1], []),
        ([1, 8, 64], [0.9, 0.8, 0.7], []),
        ([1, 8, 64], [1.0, 1.0, 1.0], []),
        ([1, 8], [1.2, 1.0], [(1, 8, 8.0)]),
        ([1, 4, 16], [0.5, 2.0, 0.5], [(1, 4, 2.0), (4, 16, 8.0)]),
        ([1, 8, 64], [1.25, None, 0.8], [(1, 64, 8.0)]),
        ([8], [1.2], []),
    ],
)
def test_crossings(
    loads: list[int], ratios: list[float | None], expected: list[tuple[int, int, float]]
) -> None:
    found = crossed(loads, ratios)
    assert [(low, high) for low, high, _ in found] == [(low, high) for low, high, _ in expected]
    assert [at for _, _, at in found] == pytest.approx([at for _, _, at in expected])


@given(st.lists(st.floats(0.1, 10.0).filter(lambda r: abs(r - 1) > 1e-6), min_size=2, max_size=9))
def test_a_crossing_lies_in_its_bracket_and_swapping_the_sides_moves_none(
    ratios: list[float],
) -> None:
    loads = [2**n for n in range(len(ratios))]
    found = crossed(loads, ratios)
    assert len(found) == sum((a > 1) != (b > 1) for a, b in itertools.pairwise(ratios))
    assert all(low <= at <= high for low, high, at in found)
    swapped = crossed(loads, [1 / r for r in ratios])
    assert [at for _, _, at in swapped] == pytest.approx([at for _, _, at in found])


USER = {
    "coding": (1.62, 1.58, 1.31, 1.12, 0.91),
    "multilingual": (0.96, 0.94, 0.88, 0.79, 0.66),
    "writing": (1.21, 1.18, 1.01, 0.93, 0.81),
    "zero-shot | <b>": (1.44, 1.41, 1.33, 1.22, 1.07),
}
LOADS = ladder(1, 8, 32, 64, 256)


def swept(*, repeats: int = 3) -> Study:
    """Five loads of which user speed crosses between 32 and 64, throughput earlier."""
    study = compared()
    assert study.comparison is not None
    (model, _) = study.comparison.loads
    rows = []
    for at, load in enumerate(LOADS):
        rows.append(
            change(
                model,
                load=load,
                speedup_user=cell((1.4, 1.35, 1.08, 0.94, 0.8)[at]),
                speedup_throughput=cell((1.38, 1.3, 0.97, 0.9, 0.75)[at]),
                repeats=tuple(change(model.repeats[0], repeat=n) for n in range(repeats)),
                categories=tuple(
                    CategoryComparison(
                        category=name, speedup_user=cell(r[at]), acceptance=None, steps=None
                    )
                    for name, r in USER.items()
                ),
            )
        )
    comparison = change(study.comparison, loads=tuple(reversed(rows)))
    return replace(study, comparison=comparison, break_even=break_even(comparison))


def the_map(study: Study) -> BreakEven:
    assert study.break_even is not None
    return study.break_even


def test_rows_are_the_categories_then_all_prompts_and_loads_are_sorted() -> None:
    found = the_map(swept())
    assert found.loads == LOADS
    assert [(row.name, row.figure) for row in found.rows] == [
        *((name, "speedup_user") for name in USER),
        ("all", "speedup_user"),
        ("all", "speedup_throughput"),
    ]
    marks = [c.mark for c in found.rows[2].cells if c is not None]
    assert marks == ["pays", "pays", "no difference", "costs", "costs"]
    (fall,) = found.rows[4].crossings
    assert (size(fall.low), size(fall.high), fall.falls) == (32, 64, True)


def bucketed(row: LoadComparison) -> LoadComparison:
    names = ("16k", "2k", "128k", "low")
    groups = [
        CategoryComparison(category=n, speedup_user=cell(1.1), acceptance=None, steps=None)
        for n in names
    ]
    return change(row, isl_buckets=tuple(groups))


def test_isl_buckets_are_in_the_order_of_their_length() -> None:
    comparison = compared().comparison
    assert comparison is not None
    loads = tuple(bucketed(row) for row in comparison.loads)
    found = break_even(change(comparison, loads=loads), "isl_bucket")
    assert [row.name for row in found.rows] == ["2k", "16k", "128k", "low", "all", "all"]
    with pytest.raises(UserError, match="no prompt of these runs has an entropy tier"):
        break_even(comparison, "tier")


@pytest.mark.parametrize("width", [80, 100, 160])
def test_golden(width: int) -> None:
    """DRAFTLOAD_GOLDEN=1 stores what is rendered now."""
    text = breakeven.render(replace(swept(), width=width))
    assert text == golden(f"breakeven-{width}", text)


def test_the_sentence_names_where_all_prompts_cross() -> None:
    said = " ".join(breakeven.render(swept()).split("\n\n")[0].split())
    assert said == (
        "ngram k = 3 against no speculation, 3 repeats: user speed falls through 1.0 between 32 "
        "and 64 (≈ 47); output throughput falls through 1.0 between 8 and 32 (≈ 28); of 4 "
        "categories 2 go through 1.0, 1 stays below 1.0 and 1 stays above 1.0."
    )


def test_without_three_repeats_every_cell_is_a_question_mark() -> None:
    study = compared()
    assert study.comparison is not None
    rows = [change(r, why_no_verdict="1 of the 3 that are needed") for r in study.comparison.loads]
    comparison = change(study.comparison, loads=tuple(rows))
    page = breakeven.render(
        replace(study, comparison=comparison, break_even=break_even(comparison))
    )
    assert len(re.findall(r"\d× \?", page)) == 2 * 13
    assert not re.search(r"\d× [+=−]", page)
    assert "? no verdict (1 of the 3 that are needed)" in " ".join(page.split())
    assert "one repeat (no verdict)" in page


def test_every_crossing_is_bracketed_in_markdown_and_json() -> None:
    text = as_markdown.render(swept())
    assert "| all: user speed | 1.40× \\[1.33, 1.47\\] pays |" in text
    assert "| between 32 and 64 (≈ 47) |" in text
    assert "no, below 1.0" in text
    json = as_json.render(swept())
    assert '"break_even"' in json
    assert '"falls": true' in json


def test_nothing_measured_shows_dashes() -> None:
    study = blank_study()
    assert study.comparison is not None
    study = replace(study, break_even=break_even(study.comparison))
    for page in (breakeven.render(study), as_markdown.render(study)):
        assert "None" not in page
        assert "user speed was not measured" in page


def test_without_a_map_it_is_our_bug() -> None:
    with pytest.raises(Bug):
        breakeven.render(compared())


@given(width=st.integers(60, 220), text=st.text(min_size=1, max_size=90))
def test_no_line_is_wider_than_the_page(width: int, text: str) -> None:
    study = swept()
    rows = tuple(change(row, name=text) for row in the_map(study).rows)
    page = breakeven.render(
        replace(study, width=width, break_even=change(the_map(study), rows=rows))
    )
    assert max(cell_len(line) for line in page.split("\n")) <= width
    assert all(c.isprintable() or c == "\n" for c in page)
