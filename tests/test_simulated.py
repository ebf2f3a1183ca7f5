"""The model behind the simulator: published figures come out, and the batch's books close."""

from __future__ import annotations

import random
from array import array
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.errors import UserError
from loadgen.types import U32
from servers.simulated import (
    DEFAULT,
    EOS,
    LATCHED,
    MODELS,
    TEXT,
    TRIVIAL,
    Answer,
    Batch,
    Settings,
    expected_steps,
    is_random,
    length,
    preset,
    told,
)


def noise_ids(count: int, seed: int = 0) -> U32:
    dice = random.Random(seed)
    return array("I", [dice.randrange(1000, 32000) for _ in range(count)])


def queued(batch: Batch, prompts: list[U32], limit: int = 30, **how: Any) -> list[Answer]:
    answers = [Answer(batch, p, limit=limit, ignore_eos=True, **how) for p in prompts]
    batch.waiting.update(dict.fromkeys(answers))
    return answers


def played(batch: Batch) -> float:
    """Until nobody waits; the time that it took."""
    now = 0.0
    while batch.waiting or batch.running:
        now += batch.plan()
        batch.finish(now)
    return now


def al(
    settings: Settings, category: str = DEFAULT, isl: int = 100, temperature: float = 0
) -> float:
    return 1 + settings.coverage * (length(settings.row(category, isl, temperature)) - 1)


# ── published figures ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "published"), [("eagle3", 1.90), ("draft_model", 1.60), ("ngram", 0.88)]
)
def test_the_speedups_of_llama_70b_at_32_streams_come_out(method: str, published: float) -> None:
    """t_ar × AL ÷ t_sd, golden G12's formula; §4.1."""
    plain, spec = (preset(m, 3, model="70b") for m in ("none", method))
    base_s = plain.step_s(32, context=32 * 500)
    step_s = spec.step_s(32, drafted=round(32 * spec.coverage), context=32 * 500)
    assert al(spec) * base_s / step_s == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize(
    ("method", "model", "category", "published"),
    [
        ("eagle3", "70b", "coding", 3.00),
        ("eagle3", "70b", "multilingual", 1.73),
        ("eagle3", "moe", "roleplay", 1.87),
        ("eagle3", "moe", DEFAULT, 2.25),
        ("ngram", "70b", "multilingual", 1.91),
        ("ngram", "moe", "coding", 1.31),
        ("mtp", "moe", "coding", 3.34),
        ("draft_model", "8b", "qa", 2.44),
        ("eagle3", "moe", TRIVIAL, 3.44),
        ("eagle3", "moe", LATCHED, 1.877),
    ],
)
def test_the_published_acceptance_comes_out(
    method: str, model: str, category: str, published: float
) -> None:
    assert al(preset(method, 3, model=model), category) == pytest.approx(published, abs=0.005)


@pytest.mark.parametrize(("isl", "left"), [(200, 1.0), (1000, 1.0), (2000, 1.59 / 1.93)])
def test_eagle3_decays_with_the_input_and_others_do_not(isl: int, left: float) -> None:
    """AL 2.93, 2.59, 1.19 at 1k, 2k, 8k (§4.2); a draft model stays."""
    eagle, draft = preset("eagle3", 3), preset("draft_model", 3)
    assert al(eagle, isl=isl) - 1 == pytest.approx(left * (al(eagle) - 1), rel=0.01)
    between = [al(eagle, isl=n) for n in (1000, 1500, 2000, 4000, 8000, 16000)]
    assert between == sorted(between, reverse=True)
    assert between[-1] == between[-2] == pytest.approx(1 + 0.19 / 1.93 * 1.45, abs=0.01)
    assert al(draft, isl=isl) == al(draft)


@pytest.mark.parametrize(("method", "kept"), [("eagle3", 1.75 / 1.9), ("draft_model", 1.15 / 1.6)])
def test_sampling_costs_acceptance(method: str, kept: float) -> None:
    settings = preset(method, 3)
    found = [al(settings, temperature=t) / al(settings) for t in (0.0, 0.5, 1.0, 2.0)]
    assert found == pytest.approx([1.0, (1 + kept) / 2, kept, kept], abs=0.005)


# ── step time ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model", ["8b", "70b"])
@pytest.mark.parametrize("method", ["eagle3", "mtp", "draft_model", "ngram"])
def test_the_gain_shrinks_with_the_load(model: str, method: str) -> None:
    plain, spec = (preset(m, 3, model=model) for m in ("none", method))
    gains = [
        al(spec) * plain.step_s(b) / spec.step_s(b, drafted=round(b * spec.coverage))
        for b in (16, 32, 64, 128, 256, 512)
    ]
    assert all(a > b - 0.03 for a, b in pairwise(gains))  # flat at first, within 0.03
    assert gains[-1] < 0.75 * gains[0]


def test_more_of_everything_takes_longer() -> None:
    for model in MODELS:
        step = preset("eagle3", 3, model=model).step_s
        one = step(8, drafted=8, context=4000, prefill=100)
        assert one < step(64, drafted=8, context=4000, prefill=100)
        assert one < step(8, drafted=8, context=400_000, prefill=100)
        assert one < step(8, drafted=8, context=4000, prefill=8000)
        assert step(8, context=4000, prefill=100) < one


def test_experts_are_read_as_tokens_hit_them() -> None:
    moe = MODELS["moe"]
    shared = moe.weights - moe.routed
    assert moe.weights_read(1) == pytest.approx(shared + moe.routed * 4 / 128)
    assert moe.weights_read(4) == pytest.approx(shared + moe.routed * 4 * 4 / 128, rel=0.1)
    assert moe.weights_read(1000) == pytest.approx(moe.weights)
    assert MODELS["70b"].weights_read(1) == MODELS["70b"].weights


def test_time_scale_multiplies_times_and_noise_is_a_factor_of_the_run() -> None:
    spans = {}
    for scale, seed in [(1.0, 0), (2.0, 0), (0.5, 0), (1.0, 1), (1.0, 0)]:
        batch = Batch(preset("eagle3", 3, time_scale=scale, seed=seed, noise=0.05))
        queued(batch, [noise_ids(20)] * 4)
        spans[scale, seed] = played(batch) / batch.factor
        assert batch.truth()["decode_s"] == pytest.approx(
            sum(r.step_s * r.decoding for r in batch.rows)
        )
    assert spans[2.0, 0] == pytest.approx(2 * spans[1.0, 0])
    assert spans[0.5, 0] == pytest.approx(spans[1.0, 0] / 2)
    factors = [Batch(preset("none", start=s, noise=0.05)).factor for s in range(200)]
    assert len(set(factors)) == 200
    assert 0.85 < min(factors) < 0.95 < 1.05 < max(factors) < 1.18
    assert Batch(preset("none", noise=0.0)).factor == 1.0


# ── the batch ────────────────────────────────────────────────────────────────────────────────────


def test_a_full_cache_preempts_and_nothing_is_lost() -> None:
    prompts = [noise_ids(40, n) for n in range(12)]
    said = {}
    for kv in (0, 300):
        batch = Batch(preset("eagle3", 3, kv_tokens=kv, max_model_len=120))
        answers = queued(batch, prompts, limit=60)
        while batch.waiting or batch.running:
            batch.plan()
            assert sum(a.held + 4 for a in batch.running) <= batch.kv_tokens
            batch.finish(0.0)
        said[kv] = [a.ids[: a.sent].tolist() for a in answers]
        figures = batch.truth()
        overall = figures["overall"]
        emitted = overall["generated_tokens"] + overall["overrun_tokens"]
        assert emitted == overall["requests"] + overall["steps"] + overall["accepted_tokens"]
        assert overall["finished"] == 12
        assert (figures["preemptions"] > 0) == (kv > 0)
        assert figures["preemptions"] == sum(a.preempted for a in answers)
    assert said[0] == said[300]


def test_a_known_prefix_is_not_computed_again() -> None:
    for cache in (True, False):
        batch = Batch(preset("none", prefix_cache=cache))
        shared = noise_ids(64)
        for tail in (0, 0, 4):
            queued(batch, [shared + noise_ids(tail, 1)], limit=2)
            played(batch)
        prefilled = [r.prefilled for r in batch.rows if r.prefilled]
        # All but the last token at most, and whole blocks of 16.
        assert prefilled == ([64, 1, 4] if cache else [64, 64, 68])
        assert batch.prefix_hits == (63 + 64 if cache else 0)


def test_a_long_prompt_is_computed_in_chunks_beside_the_others() -> None:
    batch = Batch(preset("none", prefill_budget=100))
    queued(batch, [noise_ids(10)], limit=50)
    batch.plan()
    batch.finish(0.0)
    queued(batch, [noise_ids(250)], limit=5)
    played(batch)
    assert [(r.decoding, r.prefilled) for r in batch.rows][:5] == [
        (0, 10),
        (1, 99),
        (1, 99),
        (1, 52),
        (2, 0),
    ]


@given(
    st.lists(st.floats(0.01, 0.99), min_size=1, max_size=7), st.floats(0, 1), st.integers(1, 200)
)
def test_expected_steps_keep_their_bounds(row: list[float], coverage: float, size: int) -> None:
    table = expected_steps(tuple(row), coverage, size)
    fewest = [n / (len(row) + 1) for n in range(len(table))]
    assert all(
        low - 1e-9 <= steps <= n + 1e-9
        for n, (low, steps) in enumerate(zip(fewest, table, strict=True))
    )
    assert all(a <= b + 1e-9 for a, b in pairwise(table))


def test_expected_steps_grow_by_one_each_acceptance_length() -> None:
    row = (0.7, 0.6, 0.5)
    table = expected_steps(row, 0.5, 2000)
    assert 1000 / (table[2000] - table[1000]) == pytest.approx(1 + 0.5 * (length(row) - 1))


def test_what_happens_scatters_about_what_is_expected() -> None:
    """400 answers of 60 tokens: within 3 standard errors (the seed is fixed)."""
    batch = Batch(preset("eagle3", 3, max_running=512))
    queued(batch, [array("I", [7, n]) for n in range(400)], limit=60)
    played(batch)
    figures = told(batch.tallies[DEFAULT], 3)
    found, expected = figures["acceptance_length"], figures["expected"]["acceptance_length"]
    assert abs(found - expected) < 3 * 1.2 / figures["steps"] ** 0.5
    assert expected < al(batch.settings)  # the last step of an answer is cut


# ── random tokens ────────────────────────────────────────────────────────────────────────────────


def test_random_ids_are_told_from_text() -> None:
    batch = Batch(preset("none"))
    assert is_random(noise_ids(1000)), "uniform"
    assert is_random(array("I", range(500, 700))), "in a row"
    assert not is_random(noise_ids(40)), "too short to tell"
    assert not any(is_random(array("I", known)) for known in batch.known)


def test_random_prompts_get_trivial_or_latched_answers() -> None:
    batch = Batch(preset("eagle3", 3, max_running=512))
    prompts = [noise_ids(200, n) for n in range(60)]
    answers = [Answer(batch, p, limit=2000, ignore_eos=False) for p in prompts]
    trivial = [a for a in answers if a.category == TRIVIAL]
    latched = [a for a in answers if a.category == LATCHED]
    assert len(trivial) + len(latched) == 60
    assert 15 < len(trivial) < 45
    for answer in trivial:
        text = "".join(TEXT[i] for i in answer.ids)
        assert any(word in text for word in ("clarify", "context", "help"))
        assert len(answer.ids) < 60
        assert answer.ids[-1] == EOS
    for answer in latched:
        words = [i for i in answer.ids if i != EOS]
        anchor = max(set(words[1::2]), key=words[1::2].count)
        assert anchor in answer.prompt
        assert words.count(anchor) >= max(4, len(words) // 100)
        assert len(answer.ids) > 256


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean '70b'"):
        preset("none", model="70")
    with pytest.raises(UserError, match="did you mean 'sglang'"):
        preset("none", dialect="sgl")
