"""Run file → Summary: counter growth, states, phases cut short, categories, pairs."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Mapping

import msgspec
import pytest

from loadgen.acceptance import COUNTERS
from loadgen.errors import UserError
from loadgen.summarize import counter_growth, summarize
from loadgen.types import (
    ClosedLoop,
    Engine,
    OpenLoop,
    PhaseRecord,
    Record,
    Run,
    RunEnd,
    RunInfo,
    Scenario,
    Snapshot,
    SpecCounters,
    Summary,
)
from servers import vllm
from tests.records import ENGINE, G2, SERVER, record, run_info


def counters(samples: Mapping[str, float]) -> SpecCounters:
    values = {name: int(value) for name, value in samples.items()}
    return SpecCounters(
        drafts=values.get("drafts"),
        accepted_tokens=values.get("accepted"),
        generated_tokens=values.get("generated"),
        accepted_by_position=(values["p0"],) if "p0" in values else None,
    )


COUNTING: Engine = dataclasses.replace(ENGINE, metrics_path="/metrics", counters=counters)


def edge(name: str, **samples: float) -> Snapshot:
    assert name in ("start", "end")
    return Snapshot(
        at_s=0.0, phase="c=1", edge="start" if name == "start" else "end", samples=samples
    )


PHASE = PhaseRecord(
    name="c=1", load=ClosedLoop(concurrency=1), repeat=0, measured=True,
    started_s=10.0, ended_s=13.2, steady_from_s=10.0, steady_to_s=13.0,
)  # fmt: skip


def summary(*records: Record, info: RunInfo | None = None, engine: Engine = ENGINE) -> Summary:
    return summarize(Run(info=info or run_info(), records=records), engine)


def test_a_killed_open_loop_keeps_its_load() -> None:
    loads = (ClosedLoop(concurrency=1), OpenLoop(request_rate_rps=0.5))
    info = run_info(scenario=Scenario(name="s", loads=loads))
    cut = [msgspec.structs.replace(r, phase="rate=0.5 r=2") for r in G2]
    (phase,) = summary(*cut, info=info).phases
    assert phase.load == loads[1]


def test_growth_between_the_borders() -> None:
    grown, why = counter_growth(
        [edge("start", drafts=5, accepted=7), edge("end", drafts=15, accepted=37, p0=9)], COUNTING
    )
    assert why == ""
    assert grown is not None
    assert (grown.drafts, grown.accepted_tokens) == (10, 30)
    assert grown.accepted_by_position == (9,), "a family that appears grew from zero"
    assert grown.generated_tokens is None, "no family, no invented zero"


@pytest.mark.parametrize(
    ("snapshots", "why"),
    [
        ([], "not read at both ends"),
        ([edge("start", drafts=5)], "not read at both ends"),
        ([edge("start", drafts=5), edge("end", drafts=4)], "went back from 5 to 4"),
    ],
)
def test_no_growth_and_why(snapshots: list[Snapshot], why: str) -> None:
    grown, missing = counter_growth(snapshots, COUNTING)
    assert grown is None
    assert why in missing


def labelled(name: str, *rows: str, **more: float) -> Snapshot:
    """An edge whose counter of drafts grows with every row of labels."""
    at = 10 if name == "start" else 20
    series = {f"vllm:spec_decode_num_drafts_total{{{row}}}": at + i for i, row in enumerate(rows)}
    return msgspec.structs.replace(edge(name), samples=series | more)


ONE = 'engine="0",model_name="m"'
TWO = 'engine="1",model_name="m"'


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ((ONE,), (ONE, 'engine="0",model_name="other"'), "counters of 2 models: m, other"),
        ((ONE,), ('engine="0",model_name="new"',), "label model_name changed in the phase: m, new"),
        ((ONE,), (ONE, TWO), "label engine changed in the phase: 1"),
        ((ONE, TWO), (ONE,), "label engine changed in the phase: 1"),
        ((ONE, TWO), (ONE, TWO), ""),
        ((), (ONE,), ""),
    ],
    ids=["two models", "another model", "a rank more", "a rank less", "two ranks", "first use"],
)
def test_counters_of_somebody_else_are_left_out(
    before: tuple[str, ...], after: tuple[str, ...], why: str
) -> None:
    pages = [labelled("start", *before), labelled("end", *after)]
    grown, missing = counter_growth(pages, vllm.ENGINE)
    assert missing.endswith(why)
    if why:
        assert grown is None
    else:
        assert grown is not None
        assert grown.drafts == sum(20 + i for i in range(len(after))) - sum(
            10 + i for i in range(len(before))
        )


def test_a_restart_is_seen_though_its_counters_are_ahead_again() -> None:
    started = "process_start_time_seconds"
    pages = [labelled("start", ONE, **{started: 1.0}), labelled("end", ONE, **{started: 2.0})]
    assert "went back to zero" in counter_growth(pages, vllm.ENGINE)[1]
    tokens = 'vllm:generation_tokens_total{engine="0",model_name="m"}'
    steps = [("start", 100.0), ("tick", 3.0), ("end", 200.0)]
    snapshots = [
        Snapshot(at_s=0, phase="c=1", edge=name, samples={tokens: value})  # type: ignore[arg-type]  # the three edges
        for name, value in steps
    ]
    assert "went back from 100 to 3" in counter_growth(snapshots, vllm.ENGINE)[1]


def test_the_next_source_is_used_and_the_report_says_why() -> None:
    """Counters of two models: acceptance comes from chunks, and both say so."""
    pages = (labelled("start", ONE), labelled("end", ONE, 'engine="0",model_name="other"'))
    found = summary(*G2, *pages, PHASE, engine=vllm.ENGINE)
    best, *others = found.phases[0].acceptance
    assert best.source == "chunks"
    assert best.acceptance_length is not None
    (counted,) = [a for a in others if a.source == "server counters"]
    assert "counters of 2 models" in counted.why_missing
    (caveat,) = [c for c in found.caveats if c.code == "several-models"]
    assert "the metrics page counts m, other" in caveat.message
    assert "counters-not-usable" not in [c.code for c in found.caveats], "it is said once"


def test_a_phase() -> None:
    found = summary(*G2, PHASE, RunEnd(at_s=14, reason="completed"))
    (phase,) = found.phases
    assert found.end == "completed"
    assert phase.requests.completed == 4
    assert phase.step_time_s == pytest.approx(2.2 / 14)
    assert [c.category for c in phase.categories] == ["coding", "roleplay"]
    assert [d.dialogue_id for d in phase.dialogues] == ["q0", "q1", "q2"]
    first = phase.dialogues[0]
    assert (first.turns, first.osl_tokens, first.decode_tokens, first.steps) == (2, 16, 14, 5)
    assert first.decode_s == pytest.approx(0.8)


def test_warm_up_is_not_in_the_figures() -> None:
    warm = msgspec.structs.replace(G2[0], phase="warm-up c=1")
    warm_phase = msgspec.structs.replace(PHASE, name="warm-up c=1", measured=False)
    found = summary(warm, *G2, warm_phase, PHASE)
    assert [p.name for p in found.phases] == ["c=1"]
    assert found.phases[0].requests.sent == 4


def test_a_run_killed_in_its_phase_still_reports() -> None:
    warm = msgspec.structs.replace(G2[0], phase="warm-up c=8")
    found = summary(warm, *G2)
    assert found.end is None
    assert [p.requests.sent for p in found.phases] == [4]


def test_a_run_that_measured_nothing_says_so() -> None:
    with pytest.raises(UserError, match="holds no measured request"):
        summary(RunEnd(at_s=1, reason="interrupted"))


def test_counters_beside_chunks() -> None:
    one = record([1, *[4] * 9, 3], [float(t) for t in range(12)])
    found = summary(
        edge("start", drafts=0, accepted=0, generated=0),
        one,
        edge("end", drafts=10, accepted=30, generated=40),
        PHASE,
        engine=COUNTING,
    )
    (phase,) = found.phases
    assert phase.acceptance[0].source == COUNTERS
    assert phase.acceptance[0].acceptance_length == 3.9
    assert phase.acceptance[0].overrun_tokens == 1
    assert "foreign-traffic" not in [c.code for c in found.caveats]


def test_a_draft_seen_settles_an_unknown_state() -> None:
    server = msgspec.structs.replace(SERVER, state="unknown", draft_depth=None)
    drafted = msgspec.structs.replace(
        G2[2], spec=SpecCounters(drafts=4, draft_tokens=12, draft_depth=3, accepted_tokens=11)
    )
    found = summary(drafted, PHASE, info=run_info(server=server))
    assert found.phases[0].acceptance[0].state == "on"
    unknown = summary(G2[2], PHASE, info=run_info(server=server))
    assert unknown.phases[0].acceptance[0].state == "unknown"


def test_the_checks_know_the_k_that_the_figures_know() -> None:
    """k is told only beside a request's figures: a chunk of more is both left out and said."""
    server = msgspec.structs.replace(SERVER, draft_depth=None)
    told = SpecCounters(drafts=2, draft_tokens=6, draft_depth=3, accepted_tokens=5)
    merged = record([1, 9], [10.0, 11.0, 12.0], spec=told)
    found = summary(merged, PHASE, info=run_info(server=server))
    assert "chunks-not-steps" in [c.code for c in found.caveats]
    assert found.phases[0].chunk_is_step is False


def test_llamacpp_like_steps_pair_with_timings() -> None:
    blind = dataclasses.replace(ENGINE, chunk_is_step=False)
    one = record([1] * 6, [0, 1, 2, 2, 2, 3, 4], step_tokens=array("I", [1, 3, 1, 1]))
    (phase,) = summary(one, PHASE, engine=blind).phases
    assert phase.step_time_s == pytest.approx(3.0 / 3)
    assert phase.dialogues[0].steps == 3
