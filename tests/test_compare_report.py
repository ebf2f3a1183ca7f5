"""reports/compare.py: stored pages at three widths, the sentence by case, and what holds for all.

After a wanted change: DRAFTLOAD_GOLDEN=1 python -m pytest tests/test_compare_report.py, then read
the difference.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from loadgen.errors import Bug
from loadgen.types import Comparison, RequestCounts, Speedup, Study
from reports.compare import render
from tests.studies import (
    blank_study,
    category_comparison,
    compared,
    golden,
    load_comparison,
    single,
    with_summary,
)

change = msgspec.structs.replace

HOSTILE = "m\x1b]0;owned\x07\x1b[31m\u202e\x9b2J[bold]\r\nx"


@pytest.mark.parametrize("width", [80, 100, 160])
def test_golden(width: int) -> None:
    """DRAFTLOAD_GOLDEN=1 stores what is rendered now."""
    text = render(compared(width))
    assert text == golden(f"compare-{width}", text)


def comparison(study: Study) -> Comparison:
    assert study.comparison is not None
    return study.comparison


def changed(study: Study, **changes: Any) -> Study:
    """`study` with changes to its comparison."""
    return replace(study, comparison=change(comparison(study), **changes))


def sentence(study: Study) -> str:
    """The first paragraph on one line."""
    return " ".join(render(study).split("\n\n")[0].split())


def test_one_repeat_gives_ratio_and_interval_and_no_verdict() -> None:
    assert sentence(compared()) == (
        "ngram k = 3 against no speculation, one repeat (no verdict): user speed 1.08× "
        "[1.02, 1.15] at concurrency 1 and 0.83× [0.78, 0.88] at concurrency 8; output throughput "
        "1.06× [1.00, 1.13] at concurrency 1 and 0.84× [0.78, 0.89] at concurrency 8 "
        "(95 % within-run interval: paired bootstrap over dialogues)."
    )
    assert not re.search(r"\b(pays?|costs?|faster|slower|wins?)\b", render(compared()))


def test_many_loads_are_named_by_the_lowest_and_the_highest() -> None:
    first, last = comparison(compared()).loads
    loads = [change(last, load=change(last.load, concurrency=c), spec=last.spec) for c in (2, 4, 8)]
    said = sentence(changed(compared(), loads=(first, *loads)))
    assert "at concurrency 1 and 0.83× [0.78, 0.88] at concurrency 8; output" in said
    assert "at concurrency 1 and 0.84× [0.78, 0.89] at concurrency 8 (of 4 loads)" in said


def test_repeats_are_given_as_a_span() -> None:
    again = change(
        load_comparison(8, repeat=1), speedup_user=Speedup(ratio=0.9, pairs=3, interval=None)
    )
    said = sentence(changed(compared(), loads=(load_comparison(8), again)))
    assert "2 repeats (no verdict): user speed 0.83× to 0.90× at concurrency 8; output" in said


def test_troubles_of_either_run_come_first() -> None:
    run = compared().summaries[-1]
    phases = [change(p, requests=RequestCounts(sent=9, completed=8, broke=1)) for p in run.phases]
    said = sentence(with_summary(compared(), change(run, phases=tuple(phases), end="interrupted")))
    assert said.startswith(
        "spec: run interrupted; 2 of 18 requests failed (2 broke); ngram k = 3 against"
    )


def test_a_simulated_server_says_so_before_anything_else() -> None:
    run = compared().summaries[-1]
    info = change(run.info, server=change(run.info.server, simulated=True))
    page = render(with_summary(compared(), change(run, info=info)))
    assert page.startswith("SIMULATED: ")
    assert "engine spec       SIMULATED: no engine and no model ran; figures follow from" in page


def test_what_else_differs_is_listed() -> None:
    assert "\nNothing else differs.\n" in render(compared())
    other = ("context limit: 2048 → 4096", "engine version: a → b")
    page = render(changed(compared(), differences=other))
    assert "\nWhat else differs: context limit: 2048 → 4096; engine version: a → b.\n" in page


def test_answers_are_compared_at_temperature_0_only() -> None:
    assert "at temperature 0: 0 of 22 at c=1, 1 of 22 at c=8." in render(compared())
    study = compared()
    loads = tuple(change(load, outputs_compared=0) for load in comparison(study).loads)
    assert "not compared: no pair" in render(changed(study, loads=loads))
    spec = comparison(study).spec
    warm = change(spec.scenario, sampling=change(spec.scenario.sampling, temperature=0.8))
    page = render(changed(study, loads=loads, spec=change(spec, scenario=warm)))
    assert "not compared: they are sampled at temperature 0.8." in page


def test_few_steps_show_their_interval_and_are_marked() -> None:
    page = render(compared(80))
    assert "qa             0.81× [0.52, 1.31]     24  1.33      2.95  few steps\n" in page
    assert "Few steps: under 30 decode steps, too few for a verdict." in page
    assert page.count("in the mixed batch") == 2


def test_a_basis_that_all_loads_share_stands_in_the_head() -> None:
    study = compared()
    steady = comparison(study).loads[1]
    page = render(changed(study, loads=(steady,)))
    assert "output steady" in page
    assert "Output: " not in page


def test_without_a_comparison_it_is_our_bug() -> None:
    with pytest.raises(Bug):
        render(single())


def test_nothing_measured_shows_dashes_and_never_none_or_nan() -> None:
    page = render(blank_study(160))
    assert "None" not in page
    assert "nan" not in page
    assert "no speedup could be measured" in page
    row = next(line for line in page.split("\n") if line.startswith(" c=1 "))
    assert set(row.split()[1:]) == {"–", "→"}


def hostile(study: Study, text: str) -> Study:
    """`study` with `text` in the place of every text from outside."""
    found = comparison(study)
    loads = tuple(
        change(
            load,
            throughput_basis=text,
            categories=tuple(
                change(category_comparison(1.0, c), category=text) for c in load.spec.categories
            ),
        )
        for load in found.loads
    )
    server = change(found.spec.server, model=text, version=text, spec_reported=text, config=None)
    spec = change(found.spec, server=server, run_id=text)
    return changed(replace(study, paths=(text, text)), loads=loads, spec=spec, differences=(text,))


def test_control_characters_never_reach_the_page() -> None:
    page = render(hostile(compared(), HOSTILE))
    assert all(c.isprintable() or c == "\n" for c in page)
    assert "\\x1b]0;owned\\x07" in page


@given(width=st.integers(60, 220), text=st.text(max_size=90))
def test_no_line_is_wider_than_the_page(width: int, text: str) -> None:
    page = render(hostile(compared(width), text))
    assert max(cell_len(line) for line in page.split("\n")) <= width
