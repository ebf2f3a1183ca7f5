"""Two sides: ratios, intervals and verdicts, answers, groups; golden G10 and G12 by name."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.compare import compare, differing, expected_speedup, speedup_by_dialogue, speedup_user
from loadgen.errors import UserError
from loadgen.summarize import summarize
from loadgen.types import (
    Acceptance,
    ClosedLoop,
    DialogueFigures,
    Interval,
    LoadComparison,
    OpenLoop,
    OutputDifference,
    PhaseRecord,
    PhaseSummary,
    RequestCounts,
    RequestRecord,
    Run,
    RunInfo,
    Sampling,
    Scenario,
    ServerContext,
    Speedup,
    Summary,
    Throughput,
)
from tests.records import ENGINE, G2, SERVER, record, run_info

change = msgspec.structs.replace

PHASE = PhaseRecord(
    name="c=1", load=ClosedLoop(concurrency=1), repeat=0, measured=True,
    started_s=10.0, ended_s=13.2, steady_from_s=10.0, steady_to_s=13.0,
)  # fmt: skip


def summary(*records: RequestRecord | PhaseRecord, info: RunInfo | None = None) -> Summary:
    return summarize(Run(info=info or run_info(), records=records), ENGINE)


def streams(step_s: float, tokens_a_step: int, text: str = "a") -> list[RequestRecord]:
    """Ten requests of one prefill and ten steps each."""
    made = []
    for index in range(10):
        start = index * 20.0
        times = [start, start + 0.5, *(start + 0.5 + step_s * (n + 1) for n in range(10))]
        one = record([1, *[tokens_a_step] * 10], times, dialogue=f"d{index}")
        made.append(change(one, text=text))
    return made


def phase_of(records: Iterable[RequestRecord]) -> PhaseRecord:
    ends = [r.end_s for r in records]
    return change(PHASE, steady_from_s=0.0, steady_to_s=max(ends))


def pair(
    base: list[RequestRecord], spec: list[RequestRecord], info: RunInfo | None = None
) -> tuple[Summary, Summary]:
    return (
        summary(*base, phase_of(base)),
        summary(*spec, phase_of(spec), info=info or run_info(run_id="r2")),
    )


def test_twice_the_tokens_a_step_at_the_same_step_time_is_two() -> None:
    (load,) = compare(*pair(streams(0.1, 1), streams(0.1, 2))).loads
    assert load.speedup_user is not None
    assert load.speedup_user.ratio == pytest.approx(2.0)
    assert load.speedup_user.pairs == 10
    assert load.speedup_user.interval is not None
    assert (load.speedup_user.interval.low, load.speedup_user.interval.high) == pytest.approx(
        (2.0, 2.0)
    )
    assert load.speedup_throughput is not None
    assert load.throughput_basis == "steady"
    (category,) = load.categories
    assert category.speedup_user is not None
    assert category.speedup_user.ratio == pytest.approx(2.0)


def test_a_step_that_drafts_made_quicker_is_a_machine_that_changed() -> None:
    base, spec = pair(streams(0.1, 1), streams(0.05, 2))
    (caveat,) = compare(base, spec).caveats
    assert caveat.code == "machine-drifted"
    assert "50.0 ms with speculation and 100.0 ms without" in caveat.message
    assert compare(*pair(streams(0.1, 1), streams(0.1, 2))).caveats == ()


def at(*steps_ms: tuple[int, int, float]) -> Summary:
    """Phases of (concurrency, repeat, step time)."""
    (made,) = summary(*streams(0.1, 1), phase_of(streams(0.1, 1))).phases
    phases = tuple(
        change(made, name=f"c={c} r={r + 1}", load=ClosedLoop(concurrency=c), repeat=r,
               step_time_s=ms / 1e3)
        for c, r, ms in steps_ms
    )  # fmt: skip
    return change(summary(*streams(0.1, 1)), phases=phases)


@pytest.mark.parametrize(
    ("base", "spec", "said"),
    [
        (
            [(64, 0, 20.0), (64, 1, 30.0), (64, 2, 20.0)],
            [(64, 0, 28.0), (64, 1, 29.0), (64, 2, 28.0)],
            "without speculation took 20.0 and 30.0 ms",
        ),
        (
            [(64, 0, 20.0), (64, 1, 24.0)],
            [(64, 0, 28.0), (64, 1, 40.0)],
            "with speculation took 28.0 and 40.0 ms",
        ),
        (
            [(1, 0, 10.0), (8, 0, 30.0), (64, 0, 20.0)],
            [(1, 0, 11.0), (8, 0, 28.0), (64, 0, 30.0)],
            "30.0 ms at c=8 and 20.0 ms at c=64",
        ),
        ([(1, 0, 10.0), (8, 0, 9.5)], [(1, 0, 11.0), (8, 0, 11.0)], ""),
        ([(8, 0, 20.0), (8, 1, 24.0)], [(8, 0, 28.0), (8, 1, 25.0)], ""),
    ],
    ids=["a slow repeat of the base", "of the other", "a slow load", "noise by load", "noise"],
)
def test_a_base_that_ran_slow_is_told_by_its_other_repeats_and_loads(
    base: list[tuple[int, int, float]], spec: list[tuple[int, int, float]], said: str
) -> None:
    """Beside drafts, whose steps may well be slower, it would not be seen."""
    found = [c for c in compare(at(*base), at(*spec)).caveats if c.code == "machine-drifted"]
    assert len(found) == bool(said)
    assert said in "".join(c.message for c in found)


def test_identical_runs_are_no_different() -> None:
    (load,) = compare(*pair(streams(0.1, 2), streams(0.1, 2))).loads
    assert load.speedup_user is not None
    assert load.speedup_throughput is not None
    assert load.speedup_user.ratio == load.speedup_throughput.ratio == 1.0
    assert load.outputs == OutputDifference(compared=10, unit="character")


def test_outputs_that_differ_are_counted() -> None:
    (load,) = compare(
        *pair(streams(0.1, 1), [*streams(0.1, 2)[:9], *streams(0.1, 2, "b")[9:]])
    ).loads
    assert load.outputs is not None
    assert (load.outputs.compared, load.outputs.differ) == (10, 1)


def test_only_dialogues_completed_in_both_are_paired() -> None:
    (load,) = compare(*pair(streams(0.1, 1), streams(0.1, 2)[3:])).loads
    assert load.speedup_user is not None
    assert load.speedup_user.pairs == 7


@pytest.mark.parametrize(
    ("info", "what"),
    [
        (run_info(prompts_sha256="1" * 64), "prompts"),
        (run_info(scenario=Scenario(name="smoke", sampling=Sampling(temperature=1.0))), "sampling"),
        (run_info(server=change(SERVER, model="other")), "model"),
        (run_info(server=change(SERVER, api="chat")), "API"),
        (run_info(server=change(SERVER, simulated=True)), "simulated"),
    ],
)
def test_unlike_runs_are_refused_unless_forced(info: RunInfo, what: str) -> None:
    base, spec = pair(streams(0.1, 1), streams(0.1, 2), info)
    with pytest.raises(UserError, match=what):
        compare(base, spec)
    assert any(what in difference for difference in compare(base, spec, force=True).differences)


def test_the_throughput_of_an_open_loop_has_no_interval_of_a_closed_one() -> None:
    """It follows the arrivals: a ratio, paired by dialogue, says nothing of how far it may be."""
    phase = change(PHASE, name="rate=4", load=OpenLoop(request_rate_rps=4))
    cut = [change(r, phase="rate=4") for r in G2]
    run = summary(phase, *cut)
    (load,) = compare(run, run).loads
    assert load.speedup_throughput is not None
    assert (load.speedup_throughput.ratio, load.speedup_throughput.interval) == (1.0, None)
    assert load.speedup_user is not None


def test_no_load_in_common_is_refused() -> None:
    base, spec = pair(streams(0.1, 1), streams(0.1, 2))
    other = change(spec.phases[0], load=ClosedLoop(concurrency=2))
    with pytest.raises(UserError, match="no load in common"):
        compare(base, change(spec, phases=(other,)))


def test_what_else_differs_is_listed() -> None:
    server = change(SERVER, max_running=16, version="2")
    found = compare(*pair(streams(0.1, 1), streams(0.1, 2), run_info(server=server)))
    assert set(found.differences) == {"running limit: – → 16", "engine version: – → 2"}


# ── golden values of the reference ───────────────────────────────────────────────────────────────


def dialogue(tokens: int, seconds: float, name: str = "d", **changes: Any) -> DialogueFigures:
    made = DialogueFigures(
        dialogue_id=name,
        prompt_id=name.partition("#")[0],
        category="coding",
        repeat=0,
        turns=1,
        osl_tokens=tokens,
        decode_tokens=tokens,
        decode_s=seconds,
        e2el_s=seconds,
    )
    return change(made, **changes)


def test_golden_g10_spec_bench_speedup() -> None:
    """Turns (100, 2 s), (50, 1 s) and (30, 1 s): 50 and 30 tok/s, mean 40; baseline 20 and 20."""
    pairs = [(dialogue(60, 3.0), dialogue(150, 3.0)), (dialogue(20, 1.0), dialogue(30, 1.0))]
    assert speedup_by_dialogue(pairs) == pytest.approx(2.0)
    ours = speedup_user([pairs], False)
    assert ours is not None
    assert ours.ratio == pytest.approx(2.25), "pooled over tokens and time it is another figure"
    assert speedup_by_dialogue([]) is None


def test_golden_g12_speedup_from_step_times_and_al() -> None:
    assert expected_speedup(0.010, 0.016643, 2.25) == pytest.approx(1.352, abs=5e-4)
    off = change(SERVER, state="off")
    base = summary(*streams(0.010, 1), info=run_info(server=off))
    (load,) = compare(base, summary(*streams(0.016643, 2))).loads
    assert load.speedup_expected == pytest.approx(0.010 * 2 / 0.016643, rel=1e-3)
    (load,) = compare(*pair(streams(0.010, 2), streams(0.010, 3))).loads
    assert load.speedup_expected == pytest.approx(1.5), "a base that drafts has its own AL"


# ── repeats ──────────────────────────────────────────────────────────────────────────────────────

OFF = Acceptance(source="none", state="off")


def side(speeds: Sequence[float], *, start: float = 0.0, every: float = 100.0) -> Summary:
    """One run whose repeats at c=8 have these user speeds; each repeat begins `every` s on."""
    phases = []
    for repeat, speed in enumerate(speeds):
        dialogues = tuple(
            dialogue(
                100 + 10 * i, (100 + 10 * i) / speed, f"d{i}", category=("coding", "qa")[i % 2]
            )
            for i in range(12)
        )
        phases.append(
            PhaseSummary(
                name=f"c=8 r={repeat + 1}",
                load=ClosedLoop(concurrency=8),
                repeat=repeat,
                measured=True,
                span_s=10.0,
                requests=RequestCounts(sent=12, completed=12),
                distributions={},
                throughput=Throughput(whole=6 * speed, steady=8 * speed),
                acceptance=(OFF,),
                categories=(),
                dialogues=dialogues,
                started_s=start + repeat * every,
            )
        )
    return Summary(info=run_info(), phases=tuple(phases), caveats=(), end="completed")


def only(base: Summary, spec: Summary) -> LoadComparison:
    (load,) = compare(base, spec).loads
    return load


def interval_of(found: Speedup | None) -> Interval:
    assert found is not None
    assert found.interval is not None
    return found.interval


def test_three_interleaved_repeats_carry_a_verdict() -> None:
    base = side([50.0, 52.0, 51.0])
    for factor, verdict in ((1.3, "pays"), (0.7, "costs"), (1.0, "no difference")):
        spec = side([50.0 * factor, 52.5 * factor, 50.5 * factor], start=50.0)
        load = only(base, spec)
        assert load.verdict == verdict
        assert load.why_no_verdict == ""
        assert interval_of(load.speedup_user).kind == "95 % Student t over 3 interleaved repeats"
        assert load.speedup_throughput is not None
        assert load.speedup_throughput.mark == verdict


def test_identical_runs_make_no_difference() -> None:
    load = only(side([50.0, 52.0, 51.0]), side([50.0, 52.0, 51.0]))
    assert load.verdict == "no difference"
    assert interval_of(load.speedup_user) == interval_of(load.speedup_throughput)
    assert (interval_of(load.speedup_user).low, interval_of(load.speedup_user).high) == (1.0, 1.0)


def test_the_interval_over_repeats_by_hand() -> None:
    """Ratios e^0.1, e^0.2, e^0.3: mean 0.2 and reach 4.303 × 0.1 ÷ √3 of the logarithm."""
    spec = side([50.0 * math.exp(x) for x in (0.1, 0.2, 0.3)], start=50.0)
    load = only(side([50.0] * 3), spec)
    limits = interval_of(load.speedup_user)
    assert load.speedup_user is not None
    assert math.log(load.speedup_user.ratio) == pytest.approx(0.2)
    assert math.log(limits.low) == pytest.approx(0.2 - 0.24843, abs=1e-5)
    assert math.log(limits.high) == pytest.approx(0.2 + 0.24843, abs=1e-5)
    assert [r.speedup_user for r in load.repeats] == pytest.approx(
        [math.exp(x) for x in (0.1, 0.2, 0.3)]
    )


@pytest.mark.parametrize("repeats", [1, 2])
def test_fewer_repeats_have_a_within_run_interval_and_no_verdict(repeats: int) -> None:
    load = only(side([50.0] * repeats), side([80.0] * repeats, start=50.0))
    assert load.verdict is None
    assert load.why_no_verdict == f"{repeats} of the 3 interleaved repeats that a verdict needs"
    for found in (load.speedup_user, load.speedup_throughput):
        assert interval_of(found).kind.startswith("95 % within-run interval: paired ")
        assert found is not None
        assert (found.mark, found.repeats) == ("?", repeats)
        assert found.ratio == pytest.approx(1.6)


def test_repeats_in_two_blocks_carry_no_verdict() -> None:
    """All of base before all of spec: a machine that slows down would be an effect."""
    load = only(side([50.0] * 3), side([80.0] * 3, start=1000.0))
    assert load.verdict is None
    assert "did not take turns" in load.why_no_verdict
    assert interval_of(load.speedup_user).kind == "95 % Student t over 3 repeats"
    assert load.speedup_user is not None
    assert load.speedup_user.mark == "?"


def test_speedups_that_disagree_are_both_given_with_the_queue() -> None:
    base, spec = side([50.0, 52.0, 51.0]), side([75.0, 78.5, 76.0], start=50.0)
    worse = [
        change(
            p,
            throughput=Throughput(steady=0.1 * (30 + p.repeat)),
            server=ServerContext(waiting_p50=4.0),
        )
        for p in spec.phases
    ]
    load = only(base, change(spec, phases=tuple(worse)))
    assert load.verdict == "disagree"
    assert load.queue_s[0] is None
    assert load.queue_s[1] == pytest.approx(4.0 * 30.0 / 36)


def test_what_one_side_alone_measured_is_left_out_and_said() -> None:
    found = compare(side([50.0] * 3), side([80.0] * 2, start=50.0))
    assert len(found.loads[0].repeats) == 2
    assert [c.message for c in found.caveats] == [
        "Left out of every figure: c=8 repeat 3 of base only."
    ]


@given(
    base=st.lists(st.floats(1.0, 500.0), min_size=3, max_size=6),
    factors=st.lists(st.floats(0.2, 5.0), min_size=6, max_size=6),
    scale=st.floats(0.1, 10.0),
)
def test_swapping_the_sides_inverts_and_a_common_scale_cancels(
    base: list[float], factors: list[float], scale: float
) -> None:
    spec = [speed * factor for speed, factor in zip(base, factors, strict=False)]
    a, b = side(base), side(spec, start=50.0)
    there, back = only(a, b), only(b, a)
    scaled = only(side([s * scale for s in base]), side([s * scale for s in spec], start=50.0))
    for name in ("speedup_user", "speedup_throughput"):
        one, other, same = (getattr(load, name) for load in (there, back, scaled))
        assert one.ratio == pytest.approx(1 / other.ratio)
        assert one.interval.low == pytest.approx(1 / other.interval.high)
        assert (one.ratio, one.interval.low) == pytest.approx((same.ratio, same.interval.low))
    inverse = {"pays": "costs", "costs": "pays"}
    assert there.verdict is not None
    assert inverse.get(there.verdict, there.verdict) == back.verdict


def test_an_interval_over_three_repeats_covers_a_planted_tenth() -> None:
    """100 experiments: every run has 4 % of noise of its own, both sides 5 % in common a repeat."""
    rng = np.random.default_rng(8)
    covered = {"speedup_user": 0, "speedup_throughput": 0}
    for _ in range(100):
        common = np.exp(rng.normal(0.0, 0.05, 3))
        own = np.exp(rng.normal(0.0, 0.04, (2, 3)))
        base = side((50.0 * common * own[0]).tolist())
        load = only(base, side((55.0 * common * own[1]).tolist(), start=50.0))
        for name in covered:
            limits = interval_of(getattr(load, name))
            covered[name] += limits.low <= 1.1 <= limits.high
    assert min(covered.values()) >= 90, covered
    assert max(covered.values()) < 100, "intervals that never miss are too wide"


# ── groups ───────────────────────────────────────────────────────────────────────────────────────


def tagged(step_s: float, tokens: int) -> list[RequestRecord]:
    """The streams, even ones of a low tier and 2k, odd ones of a high tier and 16k."""
    return [
        change(r, tier=("low", "high")[i % 2], isl_bucket=("2k", "16k")[i % 2])
        for i, r in enumerate(streams(step_s, tokens))
    ]


def test_tiers_and_isl_buckets_have_figures_of_their_own() -> None:
    (load,) = compare(*pair(tagged(0.1, 1), tagged(0.2, 3))).loads
    assert [g.category for g in load.tiers] == ["high", "low"]
    assert [g.category for g in load.isl_buckets] == ["16k", "2k"]
    for group in (*load.tiers, *load.isl_buckets, *load.categories):
        assert group.speedup_user is not None
        assert group.speedup_user.ratio == pytest.approx(1.5)
        assert group.base is not None
        assert group.spec is not None
        assert (group.base.step_time_s, group.spec.step_time_s) == pytest.approx((0.1, 0.2))
        assert group.spec.ttft_s.p50 == pytest.approx(0.5)
        assert group.acceptance is not None
        assert group.acceptance.acceptance_length == pytest.approx(3.0)
    assert compare(*pair(streams(0.1, 1), streams(0.1, 1))).loads[0].tiers == ()


# ── answers ──────────────────────────────────────────────────────────────────────────────────────


def ids(*tokens: int) -> bytes:
    return array("I", tokens).tobytes()


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(ids(1, 2, 3), ids(1, 2, 3))], (1, 0, None, "token")),
        ([(ids(1, 2, 3), ids(1, 9, 3))], (1, 1, 1.0, "token")),
        ([(ids(1, 2, 3), ids(1, 2))], (1, 1, 2.0, "token")),
        ([(ids(256, 2), ids(512, 2))], (1, 1, 0.0, "token")),
        ([("abc", "abd"), ("abc", "xbc")], (2, 2, 1.0, "character")),
        ([("abc", "abd"), (ids(1), ids(1))], (2, 1, 2.0, "token or character")),
    ],
)
def test_first_difference(pairs: Any, expected: tuple[Any, ...]) -> None:
    found = differing(pairs)
    assert found is not None
    assert (found.compared, found.differ, found.first_p50, found.unit) == expected


def test_ids_are_never_held_against_text() -> None:
    assert differing([(ids(1), "a"), (None, "a"), ("a", None)]) is None


def test_batch_noise_is_base_against_its_own_other_repeats() -> None:
    def said(run: Summary, *texts: str) -> Summary:
        phases = [
            change(p, dialogues=tuple(change(d, output=text) for d in p.dialogues))
            for p, text in zip(run.phases, texts, strict=True)
        ]
        return change(run, phases=tuple(phases))

    base = said(side([50.0] * 3), "ab", "ab", "ac")
    load = only(base, said(side([60.0] * 3, start=50.0), "ab", "xb", "ac"))
    assert load.outputs == OutputDifference(compared=36, differ=12, first_p50=0.0, unit="character")
    assert load.noise == OutputDifference(compared=24, differ=12, first_p50=1.0, unit="character")


def test_batch_noise_of_one_repeat_is_a_prompt_that_was_answered_twice() -> None:
    base, spec = side([50.0]), side([60.0])
    twice = (dialogue(9, 1.0, "p0", output="ab"), dialogue(9, 1.0, "p0#2", output="ax"))
    again = change(base, phases=(change(base.phases[0], dialogues=twice),))
    load = only(again, change(spec, phases=(change(spec.phases[0], dialogues=twice),)))
    assert load.outputs == OutputDifference(compared=2, unit="character")
    assert load.noise == OutputDifference(compared=1, differ=1, first_p50=1.0, unit="character")
    assert only(base, spec).noise is None


def test_sampled_answers_are_not_compared() -> None:
    warm = run_info(scenario=Scenario(name="smoke", sampling=Sampling(temperature=0.7)))
    base = change(summary(*streams(0.1, 1)), info=warm)
    load = only(base, base)
    assert (load.outputs, load.noise) == (None, None)


def test_answers_that_grow_longer_show() -> None:
    base, spec = side([50.0]), side([50.0])
    longer = tuple(change(d, osl_tokens=2 * d.osl_tokens) for d in spec.phases[0].dialogues)
    load = only(base, change(spec, phases=(change(spec.phases[0], dialogues=longer),)))
    assert load.output_length is not None
    assert load.output_length.ratio == 2.0
    assert load.output_length.mark == "?", "a longer answer neither pays nor costs"
