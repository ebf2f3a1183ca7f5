"""Arrival processes: their laws, their seed, and the ramp."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.arrivals import ARRIVALS, offsets
from loadgen.errors import UserError
from loadgen.types import OpenLoop

COUNT = 4000
rates = st.floats(0.01, 1000)
seeds = st.text(max_size=8)
burstinesses = st.floats(0.25, 16)


def load(arrivals: str, rate: float = 4.0, burstiness: float = 1.0) -> OpenLoop:
    return OpenLoop(request_rate_rps=rate, arrivals=arrivals, burstiness=burstiness)


def first(count: int, of: OpenLoop, seed: str = "s", ramp_s: float = 0.0) -> list[float]:
    return list(itertools.islice(offsets(of, seed, ramp_s), count))


@settings(max_examples=40)
@given(st.sampled_from(sorted(ARRIVALS)), rates, burstinesses, seeds)
def test_the_mean_rate_is_the_rate(arrivals: str, rate: float, shape: float, seed: str) -> None:
    shape = shape if arrivals == "gamma" else 1.0
    found = first(COUNT, load(arrivals, rate, shape), seed)
    spread = 6 / math.sqrt(COUNT * shape)  # six times the standard deviation of the mean gap
    assert found[-1] * rate / COUNT == pytest.approx(1, abs=spread)
    assert found == sorted(found)
    assert found[0] >= 0


@settings(max_examples=40)
@given(burstinesses, seeds)
def test_gaps_of_gamma_vary_by_one_over_the_root_of_burstiness(shape: float, seed: str) -> None:
    """vLLM bench serve: gamma of shape `burstiness` and scale 1 ÷ (rate × burstiness)."""
    found = first(COUNT, load("gamma", burstiness=shape), seed)
    gaps = [b - a for a, b in itertools.pairwise([0.0, *found])]
    varies = statistics.stdev(gaps) / statistics.fmean(gaps)
    assert varies == pytest.approx(1 / math.sqrt(shape), rel=0.2)


def test_gaps_of_poisson_vary_by_one_and_those_of_constant_not_at_all() -> None:
    gaps = [b - a for a, b in itertools.pairwise(first(COUNT, load("poisson")))]
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(1, abs=0.1)
    assert first(5, load("constant", 4.0)) == [0.0, 0.25, 0.5, 0.75, 1.0]


@given(st.sampled_from(sorted(ARRIVALS)), rates, seeds)
def test_a_seed_is_one_pattern_at_every_rate(arrivals: str, rate: float, seed: str) -> None:
    one = first(50, load(arrivals, rate), seed)
    assert one == first(50, load(arrivals, rate), seed)
    twice = first(50, load(arrivals, 2 * rate), seed)
    assert [2 * at for at in twice] == pytest.approx(one)


def test_other_seeds_are_other_patterns() -> None:
    assert first(3, load("poisson"), "a") != first(3, load("poisson"), "b")


@given(st.integers(1, 40))
def test_over_a_ramp_the_rate_grows_linearly(ramp_s: int) -> None:
    """Half as many begin in it as at full rate, and of these a quarter in its first half."""
    found = first(1000, load("constant", 16.0), ramp_s=ramp_s)
    full = 16 * ramp_s
    assert sum(at < ramp_s for at in found) == full // 2
    assert sum(at < ramp_s / 2 for at in found) == full // 8
    after = [at for at in found if at >= ramp_s]
    assert [b - a for a, b in itertools.pairwise(after)] == pytest.approx(
        [1 / 16] * (999 - full // 2)
    )
    assert after[0] == ramp_s


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (load("poison"), "did you mean 'poisson'"),
        (load(""), "Known: constant, poisson, gamma"),
        (load("poisson", burstiness=0.5), "only gamma"),
        (load("constant", burstiness=2), "burstiness 2 with constant"),
    ],
)
def test_what_is_no_process(of: OpenLoop, said: str) -> None:
    with pytest.raises(UserError, match=said):
        offsets(of, "s")
