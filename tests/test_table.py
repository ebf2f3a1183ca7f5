"""reports/table.py: stored pages at three widths, the verdict by case, and what holds for all.

The pages under tests/data/golden-table-*.txt are to be looked at, not only compared. After a wanted
change: DRAFTLOAD_GOLDEN=1 python -m pytest tests/test_table.py tests/test_compare_report.py, then
read the difference.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from loadgen.types import (
    Acceptance,
    Caveat,
    ClosedLoop,
    Interval,
    PhaseSummary,
    RequestCounts,
    Study,
    Summary,
)
from reports.table import (
    Column,
    bar,
    clean,
    fitted,
    listed,
    render,
    scale,
    speculation,
    verdict,
    wrapped,
)
from tests.studies import (
    blank_study,
    caveats,
    compared,
    golden,
    per_request,
    phase,
    server,
    single,
    summary,
    with_summary,
)

change = msgspec.structs.replace

HOSTILE = "m\x1b]0;owned\x07\x1b[31m\u202e\x9b2J[bold]\r\nx"


@pytest.mark.parametrize("width", [80, 100, 160])
def test_golden(width: int) -> None:
    """DRAFTLOAD_GOLDEN=1 stores what is rendered now."""
    text = render(single(width))
    assert text == golden(f"table-{width}", text)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_golden_of_several_runs(width: int) -> None:
    """DRAFTLOAD_GOLDEN=1 stores what is rendered now."""
    text = render(replace(compared(width), comparison=None))
    assert text == golden(f"runs-{width}", text)


def flat(page: str) -> str:
    """The page without its line ends."""
    return " ".join(page.split())


def changed(**changes: object) -> Summary:
    """A run of one phase at concurrency 8 with `changes`."""
    return change(summary(), phases=(change(phase(8), **changes),))


def test_the_verdict_names_run_acceptance_speed_and_requests() -> None:
    assert verdict([summary()]) == (
        "smollm2-135m-instruct on llamacpp with ngram k = 3: at concurrency 8, acceptance length "
        "1.46 [1.36, 1.57] over 1,027 decode steps, 94.2 tok/s (steady) and 12.2 tok/s a user; "
        "68 of 68 requests completed."
    )


def test_without_speculation_the_verdict_gives_speed_only() -> None:
    said = verdict([summary(None)])
    assert "without speculation: at concurrency 8, 113 tok/s (steady)" in said
    assert "acceptance" not in said
    assert "AL" not in render(single(method=None))


FAILED = RequestCounts(sent=60, completed=55, refused=1, timed_out=2, cancelled=2)


@pytest.mark.parametrize(
    ("run", "start"),
    [
        (
            changed(requests=FAILED),
            "3 of 60 requests failed (1 refused and 2 timed out); smollm2-135m-instruct on",
        ),
        (change(summary(), end="interrupted"), "Run interrupted; smollm2"),
        (change(summary(), end=None), "Unfinished run, its end was not recorded; smollm2"),
        (change(summary(), end="failed: server gone"), "Run failed: server gone; smollm2"),
    ],
)
def test_troubles_come_first(run: Summary, start: str) -> None:
    assert verdict([run]).startswith(start)


def test_cancelled_requests_are_counted_and_are_no_failure() -> None:
    assert verdict([changed(requests=FAILED)]).endswith("55 of 60 requests completed, 2 cancelled.")


def test_a_simulated_server_says_so_before_anything_else() -> None:
    run = summary()
    run = change(run, info=change(run.info, server=change(server(), simulated=True)))
    page = render(with_summary(single(), run))
    assert page.startswith("SIMULATED: ")
    assert "engine       SIMULATED, there is no model: llamacpp" in page


def test_unknown_steps_show_a_range_and_missing_acceptance_its_reason() -> None:
    spread = Interval(low=1.9, high=2.1, kind="range for an overrun of 0…k·R tokens")
    ranged = Acceptance(source="server counters", state="on", interval=spread)
    page = flat(render(with_summary(single(), changed(acceptance=(ranged,)))))
    assert "at concurrency 8, acceptance length [1.90, 2.10], 94.2 tok/s" in page
    assert "the number of steps is not known, intervals: range for an overrun" in page
    lost = Acceptance(source="chunks", state="on", why_missing="chunks were merged")
    page = flat(render(with_summary(single(), changed(acceptance=(lost,)))))
    assert "at concurrency 8, no acceptance length (chunks were merged), 94.2" in page
    assert " c=8 – (chunks were merged) " in page


def test_chunks_taken_for_steps_are_called_unverified() -> None:
    doubtful = change(per_request(), source="chunks", unverified=True)
    page = flat(render(with_summary(single(), changed(acceptance=(doubtful,)))))
    assert "chunks taken for steps: unverified" in page


def test_the_chunk_gap_is_shown_only_where_a_chunk_may_be_a_step() -> None:
    assert "chunk" not in render(single(160))
    page = render(with_summary(single(160), changed(chunk_is_step=True)))
    assert "gap p50" in page


def test_warm_up_is_no_row() -> None:
    run = summary()
    warm = change(run.phases[0], measured=False, load=ClosedLoop(concurrency=77))
    page = render(with_summary(single(), change(run, phases=(warm, *run.phases))))
    assert "c=77" not in page


def test_repeats_have_their_column_and_label() -> None:
    run = change(summary(), phases=(phase(8), phase(8, repeat=1)))
    page = render(with_summary(single(160), run))
    assert "repeat" in page.split("─")[0]
    assert "  c=8 repeat 2  1.46 [1.36, 1.57]" in page


def test_positions_that_accepted_nothing_are_one_line() -> None:
    deep = change(
        per_request(),
        joint_by_position=(0.5, 0.25, 0.0, 0.0),
        conditional_by_position=(0.5, 0.5, 0.0, 0.0),
        positions_exact=True,
    )
    page = render(with_summary(single(), changed(acceptance=(deep,))))
    assert "Nothing was accepted at positions 3 to 4." in page
    assert "not drafted counts as rejected" not in page


def test_a_caveat_of_both_loads_stands_once() -> None:
    page = flat(render(single()))
    assert page.count("were cut at the output limit") == 1
    assert "outputs-capped (c=1 and c=8): 31 of 34" in page
    assert page.count("Raise --max-output-tokens") == 1


def test_messages_with_one_advice_share_it() -> None:
    two = tuple(
        Caveat(code="x", message=f"{n} of 9 broke.", advice="Mend it.", phase=f"c={n}")
        for n in (1, 8)
    )
    page = render(with_summary(single(), change(summary(), caveats=two)))
    assert "  x (c=1): 1 of 9 broke.\n  x (c=8): 8 of 9 broke.\n    → Mend it.\n" in page


def hostile(study: Study) -> Study:
    """`study` with terminal escapes in every text that comes from outside."""

    def spoil(run: Summary) -> Summary:
        phases = tuple(
            change(
                p,
                acceptance=tuple(
                    change(a, source=HOSTILE, steps_source=HOSTILE, why_missing=HOSTILE)
                    for a in p.acceptance
                ),
                categories=tuple(change(c, category=HOSTILE) for c in p.categories),
                step_time_source=HOSTILE,
            )
            for p in run.phases
        )
        spoiled = change(run.info.server, model=HOSTILE, version=HOSTILE, spec_reported=HOSTILE)
        bad = Caveat(code=HOSTILE, message=HOSTILE, advice=HOSTILE, phase=HOSTILE)
        info = change(run.info, server=spoiled, run_id=HOSTILE, started_at=HOSTILE)
        return Summary(info=info, phases=phases, caveats=(bad,), end=HOSTILE)

    return replace(study, summaries=tuple(map(spoil, study.summaries)), paths=(HOSTILE,))


def harmless(text: str) -> bool:
    """Nothing in `text` but printable characters and line ends."""
    return all(c.isprintable() or c == "\n" for c in text)


def test_control_characters_never_reach_the_page() -> None:
    page = render(hostile(single()))
    assert harmless(page)
    assert "\\x1b]0;owned\\x07" in page
    assert "[bold]" in page


def test_nothing_measured_shows_dashes_and_never_none_or_nan() -> None:
    page = render(replace(blank_study(160), comparison=None))
    assert "None" not in page
    assert "nan" not in page
    row = next(line for line in page.split("\n") if line.startswith("[1]   c=1  "))
    assert set(row.split()[5:]) == {"–"}


def test_no_phase_at_all_still_gives_a_page() -> None:
    page = render(with_summary(single(), change(summary(), phases=(), caveats=())))
    assert "nothing was measured" in page


def test_a_page_depends_on_the_study_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    study = replace(single(), color=True)
    pages = {render(study)}
    for name, value in (("TERM", "dumb"), ("NO_COLOR", "1"), ("COLUMNS", "40")):
        monkeypatch.setenv(name, value)
        pages.add(render(study))
    assert len(pages) == 1
    assert "\x1b[1m" in pages.pop()


NAMES = st.text(max_size=90)


@given(width=st.integers(60, 220), model=NAMES, category=NAMES, message=NAMES)
def test_no_line_is_wider_than_the_page(
    width: int, model: str, category: str, message: str
) -> None:
    run = summary()
    info = change(run.info, server=change(run.info.server, model=model, version=message))
    phases: list[PhaseSummary] = [
        change(p, categories=tuple(change(c, category=category) for c in p.categories))
        for p in run.phases
    ]
    extra = Caveat(code="x", message=message, advice=model, phase=category)
    run = Summary(info=info, phases=tuple(phases), caveats=(*caveats(), extra), end="completed")
    page = render(with_summary(single(width), run))
    assert max(cell_len(line) for line in page.split("\n")) <= width
    assert harmless(page)


FIGURES = st.lists(st.integers(0, 10**6).map(lambda n: f"{n:,} tok/s"), min_size=1, max_size=9)


@given(FIGURES, st.integers(20, 40))
def test_prose_never_breaks_inside_a_figure(figures: list[str], width: int) -> None:
    text = " and ".join(f"{figure} [1.40, 1.63] at k = 3" for figure in figures)
    lines = [line.plain for line in wrapped(text, width)]
    assert " ".join(lines) == text
    assert all(line.count("[") == line.count("]") for line in lines)
    assert not any(line[-1].isdigit() and not line.endswith("k = 3") for line in lines)


@given(st.text())
def test_clean_text_is_printable_and_plain_text_is_kept(text: str) -> None:
    assert clean(text).isprintable()
    if text.isprintable():
        assert clean(text) == text


def test_a_narrow_page_drops_unmeasured_columns_then_the_least_important() -> None:
    columns = [
        Column(head="load", cells=("c=1",)),
        Column(head="first", cells=("1",), drop=1),
        Column(head="empty", cells=("–",), drop=1, name="nothing"),
        Column(head="later", cells=("2",), drop=5),
    ]
    assert fitted(columns, 25)[1] == []
    assert fitted(columns, 24)[1] == ["nothing"]
    assert fitted(columns, 17)[1] == ["nothing", "later"]
    assert [c.head for c in fitted(columns, 3)[0]] == ["load"]


def test_decimal_points_stand_in_line() -> None:
    column = Column(head="ms", cells=("9.87", "1,234", "–", "22.0"))
    assert column.texts() == ("      ms", ("    9.87", "1,234   ", "    –   ", "   22.0 "))


@pytest.mark.parametrize(
    ("share", "drawn"),
    [(None, ""), (0.0, ""), (0.03125, "▎"), (0.5, "████"), (1.0, "████████"), (7.0, "████████")],
)
def test_bars(share: float | None, drawn: str) -> None:
    assert bar(share, width=8) == drawn


def test_whiskers_mark_one_and_arrows_show_what_leaves_the_scale() -> None:
    around = Interval(low=0.5, high=4.0, kind="")
    drawn = scale([(1.2, None), (0.9, around)], 19)
    assert drawn.head("×") == "0.60×    1×   1.40×"
    assert drawn.row(1.2, None) == "         ┊    ●    "
    assert drawn.row(0.9, around) == "◂──────●─┼────────▸"
    assert drawn.row(None, None) == "         ┊         "


def test_words_for_speculation() -> None:
    assert speculation(server()) == "ngram k = 3"
    assert speculation(server(None)) == "no speculation"
    bare = change(server(), config=None, spec_reported=None)
    assert speculation(bare) == "speculation k = 3"
    assert speculation(change(bare, state="unknown", draft_depth=None)) == "speculation unknown"
    assert [listed(["a", "b", "c"][:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
