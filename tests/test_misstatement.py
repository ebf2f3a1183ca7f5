"""loadgen/misstatement.py and its report: factors that add up, intervals, what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.errors import Bug, UserError
from loadgen.misstatement import apart, is_control, misstatement, split
from loadgen.types import (
    Acceptance,
    AnswerFigures,
    AnswerShare,
    ClosedLoop,
    Dataset,
    DialogueFigures,
    Distribution,
    Interval,
    Misstatement,
    OpenLoop,
    PhaseSummary,
    RequestCounts,
    Scenario,
    Study,
    Summary,
    Throughput,
)
from reports import as_json, table
from reports import misstatement as report
from tests.records import SERVER, run_info
from tests.test_as_json import SCHEMA, faults

change = msgspec.structs.replace
AROUND = "95 % bootstrap over dialogues"
NONE_KNOWN = Acceptance(source="none", state="off", why_missing="speculation is off")


def phase(
    *,
    tokens: int = 100,
    length: float = 2.0,
    step_s: float = 0.02,
    ttft_s: float = 0.1,
    output: float = 400.0,
    state: str = "on",
    dialogues: int = 12,
    isl: float = 1000.0,
    **changes: Any,
) -> PhaseSummary:
    """12 dialogues of one turn, alike but for a little of their decode time."""
    steps = max(round((tokens - 1) / length), 1)
    acceptance = Acceptance(
        source="chunks",
        state="on",
        acceptance_length=(tokens - 1) / steps,
        interval=Interval(low=0.9 * length, high=1.1 * length, kind=AROUND),
        steps=steps * dialogues,
    )
    made = PhaseSummary(
        name="c=4",
        load=ClosedLoop(concurrency=4),
        repeat=0,
        measured=True,
        span_s=10.0,
        requests=RequestCounts(sent=dialogues, completed=dialogues),
        distributions={
            "isl_tokens": Distribution(n=dialogues, mean=isl, p50=isl),
            "osl_tokens": Distribution(n=dialogues, mean=tokens, p50=tokens),
        },
        throughput=Throughput(whole=output, steady=output),
        acceptance=(acceptance if state == "on" else NONE_KNOWN,),
        categories=(),
        dialogues=tuple(
            DialogueFigures(
                dialogue_id=f"d{n}",
                prompt_id=f"p{n}",
                category="c",
                repeat=0,
                turns=1,
                osl_tokens=tokens,
                decode_tokens=tokens - 1,
                decode_s=steps * step_s * (1 + 0.001 * n),
                e2el_s=ttft_s + steps * step_s * (1 + 0.001 * n),
                steps=steps,
            )
            for n in range(dialogues)
        ),
    )
    return change(made, **changes)


def summary(kind: Any, found: PhaseSummary, **server: Any) -> Summary:
    scenario = Scenario(name=kind, dataset=Dataset(kind=kind, isl_tokens=1000))
    state = "off" if found.acceptance[0].state == "off" else "on"
    info = run_info(
        run_id=kind,
        scenario=scenario,
        server=change(SERVER, **({"state": state} | server)),
        prompts_sha256=kind,
    )
    return Summary(info=info, phases=(found,), caveats=(), end="completed")


def found(random: PhaseSummary, real: PhaseSummary, **options: Any) -> Misstatement:
    return misstatement(summary("random", random), summary("throughput", real), **options)


@given(
    st.tuples(st.integers(3, 4000), st.integers(3, 4000)),
    st.tuples(st.floats(1, 8), st.floats(1, 8)),
    st.tuples(st.floats(1e-3, 1), st.floats(1e-3, 1)),
    st.tuples(st.floats(0, 10), st.floats(0, 10)),
    st.floats(0.05, 20),
    st.sampled_from(["on", "off"]),
)
def test_the_factors_multiply_to_the_ratio(
    tokens: tuple[int, int],
    length: tuple[float, float],
    step_s: tuple[float, float],
    ttft_s: tuple[float, float],
    measured: float,
    state: str,
) -> None:
    a, b = (
        phase(tokens=tokens[i], length=length[i], step_s=step_s[i], ttft_s=ttft_s[i], state=state)
        for i in range(2)
    )
    factors, why = split(a, b, measured)
    assert not why
    assert math.prod(f.ratio for f in factors) == pytest.approx(measured, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"tokens": 199}, "output length"),
        ({"length": 3.0}, "acceptance"),
        ({"step_s": 0.03}, "step time"),
        ({"ttft_s": 0.5}, "outside decoding"),
        ({}, "the rest"),
    ],
)
def test_one_cause_is_found_alone(changes: dict[str, Any], cause: str) -> None:
    """All else is equal, and throughput is what the requests' own times give."""
    base = phase()
    other = phase(**changes)

    def stream(p: PhaseSummary) -> float:
        return p.dialogues[0].osl_tokens / p.dialogues[0].e2el_s

    measured = stream(other) / stream(base) if changes else 1.3
    factors, _ = split(other, base, measured)
    off = [f.name for f in factors if abs(f.ratio - 1) > 0.01]
    assert off == [cause]


def test_where_steps_are_not_known_the_time_a_token_stands_for_them() -> None:
    bare = phase()
    bare = change(bare, dialogues=tuple(change(d, steps=None) for d in bare.dialogues))
    factors, why = split(bare, phase(), 1.2)
    assert not why
    names = [f.name for f in factors]
    assert names == ["output length", "time a token", "outside decoding", "the rest"]
    assert math.prod(f.ratio for f in factors) == pytest.approx(1.2)


def test_what_cannot_be_split_says_why() -> None:
    bare = phase()
    bare = change(bare, dialogues=tuple(change(d, decode_tokens=None) for d in bare.dialogues))
    assert split(bare, phase(), 1.2) == (
        (),
        "the tokens of a chunk are not known of one of the runs",
    )
    assert split(phase(), phase(), None)[0] == ()


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.01, 1), st.floats(0.01, 1))
def test_the_interval_of_a_ratio_mirrors_and_holds_it(
    a: float, b: float, da: float, db: float
) -> None:
    around_a = Interval(low=a * math.exp(-da), high=a * math.exp(2 * da), kind=AROUND)
    around_b = Interval(low=b * math.exp(-db), high=b * math.exp(2 * db), kind=AROUND)
    forward, back = apart(a, around_a, b, around_b), apart(b, around_b, a, around_a)
    assert forward is not None
    assert back is not None
    assert forward.low <= a / b <= forward.high
    assert forward.low == pytest.approx(1 / back.high)
    assert math.log(forward.high * b / a) == pytest.approx(math.hypot(2 * da, db))
    assert apart(a, around_a, b, None) is None


def test_a_control_set_beside_real_text() -> None:
    """The published anchors: AL 3.44 against 2.25 with k = 3."""
    random, real = phase(length=3.44, output=500.0), phase(length=2.25)
    (load,) = found(random, real).loads
    assert load.throughput is not None
    assert load.throughput.ratio == 1.25
    assert load.throughput.interval is not None
    assert load.acceptance is not None
    assert load.acceptance.ratio == pytest.approx(1.53, abs=0.03)
    by_name = {f.name: f.ratio for f in load.factors}
    assert by_name["acceptance"] > 1.3
    assert by_name["output length"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("random", "real", "server", "said"),
    [
        (phase(), phase(isl=60.0), {}, "mean prompt length: 1,000 → 60 tokens"),
        (phase(), phase(state="off"), {}, "speculation: on → off"),
        (phase(), phase(), {"draft_depth": 5}, "draft depth: 3 → 5"),
        (phase(), phase(), {"model": "other"}, "model: m → other"),
    ],
)
def test_runs_that_differ_in_more_than_text_are_refused(
    random: PhaseSummary, real: PhaseSummary, server: dict[str, Any], said: str
) -> None:
    a, b = summary("random", random), summary("throughput", real, **server)
    with pytest.raises(UserError, match="differ in more than their text") as fault:
        misstatement(a, b)
    assert said in str(fault.value)
    assert said in misstatement(a, b, force=True).differences


def test_throughput_of_an_open_loop_is_not_split() -> None:
    load = OpenLoop(request_rate_rps=2.0)
    random, real = phase(tokens=50, load=load), phase(load=load)
    (row,) = found(random, real).loads
    assert row.factors == ()
    assert "follows the arrivals" in row.not_split
    assert row.throughput is not None
    assert row.throughput.interval is None
    text = " ".join(report.render(study(random, real)).split())
    assert "rate=2/s" in text
    assert row.not_split in text


def test_two_of_a_kind_or_no_common_load_are_refused() -> None:
    control = summary("random", phase())
    assert is_control(control.info)
    with pytest.raises(UserError, match="one run on random input and one on real"):
        misstatement(control, control)
    with pytest.raises(UserError, match="no load in common"):
        found(phase(), phase(load=ClosedLoop(concurrency=9)))


# ── the report ───────────────────────────────────────────────────────────────────────────────────


def study(random: PhaseSummary, real: PhaseSummary, width: int = 100) -> Study:
    runs = (summary("random", random), summary("throughput", real))
    return Study(summaries=runs, misstatement=misstatement(*runs), width=width, paths=("a", "b"))


@pytest.mark.parametrize(
    ("random", "said"),
    [
        (phase(output=500.0), "Random input overstates output throughput by 25.0 %"),
        (phase(output=300.0), "Random input understates output throughput by 25.0 %"),
        (phase(output=404.0), "Random input has output throughput right within 1.0 %"),
        (phase(throughput=Throughput()), "cannot be set against real input in output throughput"),
    ],
)
def test_the_sentence_names_the_direction(random: PhaseSummary, said: str) -> None:
    text = " ".join(report.render(study(random, phase())).split())
    assert said in text
    assert "noise between the two runs is not in it" in text


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_no_line_is_wider_than_the_page(width: int) -> None:
    text = report.render(study(phase(length=3.44, output=500.0), phase(), width))
    assert max(map(len, text.splitlines())) <= width
    assert "What the ratio of output is made of" in text


@pytest.mark.parametrize(
    ("random", "said"),
    [
        (phase(state="off", step_s=0.03), "consistent with other experts being routed to"),
        (phase(state="off", ttft_s=0.3), "consistent with other experts being routed to"),
        (phase(state="off", step_s=0.0202), "no sign of other experts being routed to"),
        (phase(state="off", tokens=50), "output lengths differ. Run both with --ignore-eos."),
    ],
)
def test_without_speculation_times_hint_at_routing_and_no_more(
    random: PhaseSummary, said: str
) -> None:
    text = " ".join(report.render(study(random, phase(state="off"))).split())
    assert said in text
    assert ("proves none of these" in text) == ("consistent" in said)
    assert "AL random" not in text


def test_with_speculation_times_say_nothing_of_routing() -> None:
    assert "experts" not in report.render(study(phase(step_s=0.03), phase()))


def test_a_run_report_and_json_carry_the_answers() -> None:
    share = AnswerShare(
        label="trivial", count=3, interval=Interval(low=0.1, high=0.5, kind="95 % Wilson")
    )
    answers = AnswerFigures(
        answers=12,
        prompts_known=False,
        shares=(share, AnswerShare(label="none of these", count=9)),
        clustered=AnswerShare(label="alike", count=0),
        bimodality=0.85,
    )
    made = study(phase(answers=answers), phase())
    for text in (table.render(made), report.render(made)):
        assert "3 of 12" in text
        assert "[10.0, 50.0]" in text
        assert "two humps (bimodality 0.85)" in text
        assert "prompts' text is not" in text
    told = json.loads(as_json.render(made))
    assert faults(told, SCHEMA) == []
    assert told["runs"][0]["phases"][0]["answers"]["shares"][0]["count"] == 3
    assert "answers" not in told["runs"][1]["phases"][0]
    (load,) = told["misstatement"]["loads"]
    assert math.prod(load["factors"].values()) == pytest.approx(load["throughput"]["ratio"])


def test_a_study_without_a_misstatement_is_a_bug() -> None:
    with pytest.raises(Bug):
        report.render(Study(summaries=()))
