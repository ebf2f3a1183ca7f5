"""reports/table.py and page.py: stored pages at three widths, the verdict by case, laws of layout.

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
    OpenLoop,
    PhaseSummary,
    RequestCounts,
    ServerContext,
    Stop,
    Study,
    Summary,
)
from reports.page import (
    Column,
    bar,
    clean,
    facts,
    grid,
    header,
    listed,
    speculation,
    whiskers,
    wrapped,
)
from reports.table import render, verdict
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


def opened(**changes: object) -> Summary:
    """A run at 2 and at 4 dialogues a second."""
    late = {n: phase(8).distributions["ttft_s"] for n in ("ttft_intended_s", "e2el_intended_s")}
    loads = [OpenLoop(request_rate_rps=rate, max_in_flight=64) for rate in (2, 4)]
    phases = [
        change(phase(8), name=f"rate={load.request_rate_rps:g}", load=load,
               distributions=phase(8).distributions | late, **changes)
        for load in loads
    ]  # fmt: skip
    run = summary()
    scenario = change(run.info.scenario, loads=tuple(loads), stop=Stop(duration_s=60, ramp_s=5))
    return change(run, phases=tuple(phases), info=change(run.info, scenario=scenario), caveats=())


def test_an_open_loop_has_latencies_from_the_intended_instant_and_a_closed_loop_has_not() -> None:
    page = render(with_summary(single(200), opened()))
    assert page.startswith("smollm2-135m-instruct on llamacpp with ngram k = 3: at rate=4/s, acc")
    said = flat(page)
    assert "at rate=2/s and rate=4/s, poisson arrivals with at most 64 in flight, " in said
    assert "60.0 s a load, after a ramp of 5.00 s" in said
    assert page.count("intended") == 3, "TTFT at two percentiles and E2EL"
    assert "intended" not in render(single(200))


def test_what_the_server_holds_and_what_is_not_steady_stand_at_each_load() -> None:
    around = change(phase(8).throughput, ramp_share=0.021, drain_share=0.105)
    run = opened(throughput=around, server=ServerContext(in_flight_p50=71.0))
    page = render(with_summary(single(200), run))
    rows = [line.split() for line in page.splitlines() if line.startswith("rate=")]
    assert [row[-2:] for row in rows] == [["8", "71"]] * 2, "in flight here, and at the server"
    assert "Ramp and drain of the phase: 2.1 % and 10.5 % at rate=2/s and " in flat(page)
    assert "Ramp and drain" not in render(single())


def test_a_simulated_server_says_so_before_anything_else() -> None:
    run = summary()
    fake = change(server(), simulated=True, engine="simulated", version="simulated-0.1.0")
    page = render(with_summary(single(), change(run, info=change(run.info, server=fake))))
    assert page.startswith("SIMULATED: smollm2")
    said = "SIMULATED: no engine and no model ran; figures follow from the settings of simulated-0"
    assert said in flat(page)


@pytest.mark.parametrize(
    ("verified", "shown"),
    [
        ("metrics seen on vLLM 0.32.0, launch flags not verified on a live server", True),
        ("asked of the server; no one server was verified", True),
        ("seen on llama.cpp b11549", False),
        ("", False),
    ],
)
def test_what_was_never_seen_on_a_live_server_has_a_row(verified: str, shown: bool) -> None:
    run = summary()
    info = change(run.info, server=change(server(), verified=verified))
    page = flat(render(with_summary(single(), change(run, info=info))))
    assert ("context 2,048 verified " in page) == shown
    assert not shown or f" verified {verified} speculation " in page


def second(**changes: object) -> str:
    """The acceptance block of a phase whose second source is its first with `changes`."""
    other = change(per_request(), source="server counters", interval=None, **changes)
    page = flat(render(with_summary(single(), changed(acceptance=(per_request(), other)))))
    return page[page.index("AL, second source") : page.index("AL by dialogue")]


def test_a_second_source_that_says_the_same_is_one_line() -> None:
    line = "AL, second source, server counters: the same at every load "
    assert second() == second(acceptance_length=1.4649) == line
    assert second(acceptance_length_drafted=None, draft_coverage=None) == line
    assert second(unverified=True) == f"{line[:-1]}, chunks taken for steps: unverified "


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"acceptance_length": 1.47}, "c=8 1.47 over 1,027 steps"),
        ({"steps": 1028}, "c=8 1.46 over 1,028 steps"),
        ({"draft_coverage": 0.3}, "c=8 1.46 over 1,027 steps; where drafted 3.13, coverage 30.0 %"),
        ({"overrun_tokens": 9}, "9 tokens emitted past the end, not delivered"),
        ({"acceptance_length": None, "why_missing": "no page"}, "c=8 – (no page)"),
    ],
)
def test_a_second_source_that_says_anything_else_is_listed(
    changes: dict[str, object], said: str
) -> None:
    assert "the same" not in second(**changes)
    assert said in second(**changes)


def test_a_second_source_that_is_missing_at_a_load_is_listed() -> None:
    page = flat(render(single()))
    assert "the same at every load" not in page
    assert "AL, second source: pooled over steps, from server counters" in page
    other = change(per_request(), source="server counters")
    phases = (
        change(phase(1), acceptance=(per_request(1),)),
        change(phase(8), acceptance=(per_request(), other)),
    )
    page = flat(render(with_summary(single(), change(summary(), phases=phases))))
    assert "the same at every load" not in page


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
    assert "  a x (c=1): 1 of 9 broke.\n  a x (c=8): 8 of 9 broke.\n      → Mend it.\n" in page


def test_a_load_has_the_letters_of_the_caveats_about_it() -> None:
    page = render(single())
    marks = {line.split()[0]: line.split()[-1] for line in page.split("\n") if "34 of 34" in line}
    assert marks == {"c=1": "a", "c=8": "ab"}
    assert "  a outputs-capped (c=1 and c=8): " in page
    assert "  b too-few-dialogues (c=8): " in page
    assert "\n    same-machine: " in page, "about the run, not about a load"


def test_a_run_without_caveats_at_a_load_has_no_marks() -> None:
    of_run = change(summary(), caveats=caveats()[:1])
    page = render(with_summary(single(), of_run))
    assert "marks" not in page
    assert "\n  same-machine: " in page


@pytest.mark.parametrize("width", [80, 100, 160])
def test_what_a_load_must_show_fits_at_every_width(width: int) -> None:
    page = render(single(width))
    row = next(line.split() for line in page.split("\n") if line.startswith(" c=8 "))
    wanted = ["94.2", "91.5", "12.2", "487", "82.0", "120", "1.46", "21.6", "ab"]
    assert [cell for cell in row if cell in wanted] == wanted
    assert "━●─" in page or "─●─" in page


def test_columns_of_categories_that_are_left_out_are_named() -> None:
    assert "Not shown at 80 columns: requests, steps, AL where drafted.\nFew" in render(single(80))
    assert render(single(160)).count("Not shown") == 0


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
        Column(head="first", cells=("1",), drop=1, name="first"),
        Column(head="empty", cells=("–",), drop=1, name="nothing"),
        Column(head="later", cells=("2",), drop=5, name="last"),
    ]

    def heads_and_note(width: int) -> list[str]:
        lines = [line.plain.strip() for line in grid(columns, width)]
        return [" ".join(lines[0].split()), " ".join(lines[3:])]

    assert heads_and_note(25) == ["load first empty later", ""]
    assert heads_and_note(24) == ["load first later", "Not shown at 24 columns: nothing."]
    assert heads_and_note(17)[0] == "load first"
    assert heads_and_note(10) == ["load", "Not shown at 10 columns: first, nothing, last."]
    assert len(grid(columns, 10, tell=False)) == 3


def test_decimal_points_stand_in_line() -> None:
    column = Column(head="ms", cells=("9.87", "1,234", "–", "22.0"))
    assert column.lines() == ["      ms", "    9.87", "1,234   ", "    –   ", "   22.0 "]
    assert column.lines(height=2)[:2] == ["        ", "      ms"]


@pytest.mark.parametrize(
    ("share", "drawn"),
    [(0.0, ""), (0.015625, "▎"), (0.25, "████"), (1.0, "█" * 16), (7.0, "█" * 16)],
)
def test_bars(share: float, drawn: str) -> None:
    assert bar(share) == drawn


def test_whiskers_mark_one_and_arrows_show_what_leaves_the_scale() -> None:
    points = [(1.2, None), (0.9, Interval(low=0.5, high=4.0, kind="")), (None, None)]
    assert whiskers(points, points, 19, "×").lines() == [
        "0.60×    1×   1.40×",
        "         ┊    ●    ",
        "◂──────●─┼────────▸",
        "         ┊         ",
    ]


def test_words_for_speculation() -> None:
    assert speculation(server()) == "ngram k = 3"
    assert speculation(server(None)) == "no speculation"
    bare = change(server(), config=None, spec_reported=None)
    assert speculation(bare) == "speculation k = 3"
    assert speculation(change(bare, state="unknown", draft_depth=None)) == "speculation unknown"
    told = change(bare, spec_reported="eagle3 k=3")
    assert speculation(told) == "eagle3 k=3"
    assert speculation(change(told, spec_reported="eagle3")) == "eagle3 k = 3"


@pytest.mark.parametrize(
    ("launched", "reported", "row"),
    [
        (True, "ngram_simple, n 3", "ngram k = 3 (reported: ngram_simple, n 3)"),
        (True, "ngram k=3", "ngram k = 3"),
        (True, "ngram", "ngram k = 3"),
        (True, "ngram k=33", "ngram k = 3 (reported: ngram k=33)"),
        (True, None, "ngram k = 3"),
        (False, "eagle3 k=3", "eagle3 k=3"),
        (False, "eagle3 k = 3", "eagle3 k = 3"),
        (False, "ngram_simple, n 3", "ngram_simple, n 3 k = 3"),
    ],
)
def test_what_the_server_reports_is_said_once(
    launched: bool, reported: str | None, row: str
) -> None:
    here = change(server(), spec_reported=reported)
    info = change(summary().info, server=here if launched else change(here, config=None))
    assert facts(info)["speculation"] == row


def test_lists_in_words() -> None:
    assert [listed(["a", "b", "c"][:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]


def test_of_many_runs_the_header_says_each_value_once() -> None:
    """Which of a sweep's files has a value tells nobody anything; when they began is a span."""
    one = single().summaries[0].info
    began = [f"2026-11-24T11:0{n}:00Z" for n in range(8)]
    runs = [(f"[{n}]", msgspec.structs.replace(one, started_at=at)) for n, at in enumerate(began)]
    said = [line.plain for line in header(runs, 100)]
    assert not any("[" in line for line in said)
    assert said[-1].split() == ["started", began[0], "…", began[-1]]


def test_goodput_has_a_column_where_an_slo_is_set() -> None:
    study = single()
    assert "goodput" not in render(study)
    (run,) = study.summaries
    held = tuple(msgspec.structs.replace(p, goodput_rps=3.25) for p in run.phases)
    said = render(with_summary(study, msgspec.structs.replace(run, phases=held)))
    assert "goodput" in said
    assert "3.25" in said
