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
from loadgen.types import (
    Comparison,
    Interval,
    LoadComparison,
    Mark,
    OutputDifference,
    RequestCounts,
    Speedup,
    Study,
)
from reports.compare import render
from tests.studies import blank_study, category_comparison, compared, golden, single, with_summary

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


def repeated(load: LoadComparison, verdict: Any, mark: Mark) -> LoadComparison:
    """The load over three interleaved repeats."""
    limits = Interval(low=1.02, high=1.15, kind="95 % Student t over 3 interleaved repeats")
    found = Speedup(ratio=1.08, pairs=66, interval=limits, repeats=3, mark=mark)
    return change(
        load,
        speedup_user=found,
        repeats=tuple(change(load.repeats[0], repeat=n) for n in range(3)),
        verdict=verdict,
    )


def test_three_interleaved_repeats_have_a_verdict() -> None:
    first, last = comparison(compared()).loads
    study = changed(
        compared(), loads=(repeated(first, "pays", "pays"), repeated(last, "costs", "costs"))
    )
    assert sentence(study).startswith(
        "ngram k = 3 against no speculation, 3 repeats; pays at c=1, costs at c=8: user speed 1.08×"
    )
    row = next(line for line in render(study).split("\n") if line.startswith(" c=8 "))
    assert "costs" in row


def test_repeats_without_a_verdict_say_why() -> None:
    load = repeated(comparison(compared()).loads[1], None, "?")
    study = changed(compared(), loads=(change(load, why_no_verdict="they did not take turns"),))
    assert sentence(study).startswith(
        "ngram k = 3 against no speculation, 3 repeats (no verdict): user"
    )
    assert "No verdict at c=8: they did not take turns." in render(study)


@pytest.mark.parametrize(
    ("queue", "said"),
    [
        ((0.5, 2.0), "a request waited 500 ms at the server in base and 2.00 s in spec"),
        ((None, None), "which the server does not tell"),
    ],
)
def test_speedups_that_disagree_are_given_with_the_queue(queue: Any, said: str) -> None:
    load = repeated(comparison(compared()).loads[1], "disagree", "pays")
    page = render(changed(compared(), loads=(change(load, queue_s=queue),)))
    assert "user speed and output throughput disagree at c=8" in " ".join(page.split())
    assert said in " ".join(page.split())


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


def test_answers_that_differ_stand_beside_batch_noise() -> None:
    said = " ".join(render(compared()).split())
    assert (
        "at temperature 0: 0 of 22 at c=1, 1 of 22 (from token 12 on, median) at c=8; base" in said
    )
    assert "base against base (batch noise): –, no prompt was answered twice." in said
    noise = OutputDifference(compared=44, differ=2, first_p50=30.0)
    length = Speedup(ratio=0.98, pairs=22)
    loads = tuple(
        change(load, noise=noise, output_length=length) for load in comparison(compared()).loads
    )
    said = " ".join(render(changed(compared(), loads=loads)).split())
    assert "(batch noise): 2 of 44 (from token 31 on, median) at c=1 and c=8." in said
    assert "Output length spec ÷ base: 0.98× at c=1 and c=8." in said


def test_answers_are_compared_at_temperature_0_only() -> None:
    study = compared()
    loads = tuple(change(load, outputs=None) for load in comparison(study).loads)
    assert "not compared: no pair" in render(changed(study, loads=loads))
    spec = comparison(study).spec
    warm = change(spec.scenario, sampling=change(spec.scenario.sampling, temperature=0.8))
    page = render(changed(study, loads=loads, spec=change(spec, scenario=warm)))
    assert "not compared: they are sampled at temperature 0.8." in page


def test_tiers_and_isl_buckets_have_blocks_of_their_own() -> None:
    load = comparison(compared()).loads[1]
    one = change(load.categories[0], category="16k")
    page = render(changed(compared(), loads=(change(load, isl_buckets=(one,)),)))
    assert "User speed by ISL bucket at c=8, in the mixed batch" in page
    assert "Figures by ISL bucket at c=8, in the mixed batch" in page
    assert "by tier" not in page


def test_few_steps_show_their_interval_and_are_marked() -> None:
    page = render(compared(80))
    rows = [line for line in page.split("\n") if line.startswith("qa ") and "few steps" in line]
    assert [(row.split()[3][:5], row.split()[-4:]) for row in rows] == [
        ("1.70]", ["24", "1.33", "few", "steps"]),
        ("1.31]", ["24", "1.33", "few", "steps"]),
    ]
    assert "Few steps: under 30 decode steps, too few for a verdict." in page
    assert page.count("User speed by category at") == 2


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
    assert set(row.split()[1:]) == {"–"}


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


def test_many_run_files_of_a_side_are_named_by_the_first_and_the_last() -> None:
    study = compared()
    found = comparison(study)
    more = change(found, base_runs=("a", "b", "c", "d"), spec_runs=("e",))
    names = [f"runs/{name}.jsonl" for name in "abcde"]
    said = render(replace(study, comparison=more, paths=tuple(names)))
    assert "run files base runs/: 4, from a.jsonl to d.jsonl\n" in said
    assert "run file spec runs/e.jsonl" in said
    apart = (names[0], *(f"other/{name}.jsonl" for name in "bcd"), names[4])
    assert "run file base other/d.jsonl" in render(replace(study, comparison=more, paths=apart))
