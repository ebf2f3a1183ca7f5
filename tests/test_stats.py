"""Distributions and bootstrap intervals: seeded, covering, absent where the sample is too small."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.stats import (
    _T_975,
    MOST_BLOCKS,
    distribution,
    interval,
    over_repeats,
    percentile,
    pooled,
    ratio,
    ratio_of_ratios,
    t_975,
)

FLOATS = st.floats(0.001, 1e6)


def test_an_empty_sample_is_none_everywhere() -> None:
    empty = distribution(())
    assert empty.n == 0
    assert (empty.mean, empty.std, empty.p50, empty.max) == (None, None, None, None)


@given(st.lists(FLOATS, min_size=1, max_size=150))
def test_order_of_a_distribution(values: list[float]) -> None:
    d = distribution(values)
    marks = [m for m in (d.min, d.p50, d.p90, d.p95, d.p99, d.max) if m is not None]
    assert marks == sorted(marks)
    assert d.n == len(values)
    assert (d.p99 is None) == (len(values) < 100)
    assert (d.std is None) == (len(values) == 1)


def test_the_same_sample_gives_the_same_interval() -> None:
    rng = np.random.default_rng(1)
    columns = rng.uniform(1, 4, (2, 40)).tolist()
    assert interval(columns, ratio) == interval(columns, ratio)


@pytest.mark.parametrize("rows", [3, 4, 9, 30, 3 * MOST_BLOCKS])
def test_the_interval_covers_the_truth(rows: int) -> None:
    """Steps of mean length 2: at 95 %, 40 experiments miss more than six times in 1 in 30,000."""
    rng = np.random.default_rng(7)
    missed = 0
    for _ in range(40):
        steps = rng.integers(10, 60, rows)
        tokens = rng.binomial(steps * 3, 1 / 3) + steps
        limits = interval([tokens.tolist(), steps.tolist()], ratio)
        assert limits is not None
        missed += not limits.low <= 2.0 <= limits.high
    assert missed <= 6


def test_pairing_takes_out_what_the_runs_share() -> None:
    rng = np.random.default_rng(3)
    base = rng.uniform(1, 100, 50)
    time = rng.uniform(1, 2, 50)
    columns = [(base * 1.2).tolist(), time.tolist(), base.tolist(), time.tolist()]
    limits = interval(columns, ratio_of_ratios)
    assert limits is not None
    assert (limits.low, limits.high) == pytest.approx((1.2, 1.2))
    assert limits.kind == "95 % bootstrap over dialogues"


def test_few_dialogues_are_wide_not_missing() -> None:
    three = interval([[20.0, 25.0, 30.0], [10.0, 10.0, 10.0]], ratio)
    assert three is not None
    assert three.low < 2.0
    assert three.high > 3.0
    assert three.kind == "95 % jackknife (Student t) over dialogues"


def test_an_interval_that_says_nothing_is_not_given() -> None:
    assert interval([[1.0, 100.0, 9.0], [10.0, 10.0, 10.0]], ratio) is None
    assert interval([[1.0, 1.0], [1.0, 1.0]], ratio) is None, "two that agree are not certain"


def test_one_dialogue_or_nothing_finite_give_none() -> None:
    assert interval([[1.0], [2.0]], ratio) is None
    assert interval([], ratio) is None
    for rows in (5, 20):
        assert interval([[1.0] * rows, [0.0] * rows], ratio) is None


def test_small_groups_share_their_spread() -> None:
    """Eleven groups of two: at 95 %, 20 experiments of 11 intervals miss about 11 times."""
    rng = np.random.default_rng(11)
    missed = 0
    for _ in range(20):
        groups = []
        for _ in range(11):
            steps = rng.integers(30, 60, 2)
            tokens = rng.binomial(steps * 3, 1 / 3) + steps
            groups.append([tokens.tolist(), steps.tolist()])
        found = pooled(groups, ratio)
        assert all(i is not None for i in found)
        missed += sum(not i.low <= 2.0 <= i.high for i in found if i is not None)
    assert missed <= 25
    assert missed >= 1, "intervals that never miss are too wide"


def test_one_group_of_two_tells_no_spread() -> None:
    assert pooled([[[20.0, 30.0], [10.0, 10.0]]], ratio) == [None]
    assert pooled([], ratio) == []


@pytest.mark.parametrize(
    ("freedom", "known"),
    [(1, 12.706), (2, 4.303), (8, 2.306), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_students_t_is_that_of_the_tables(freedom: int, known: float) -> None:
    assert t_975(freedom) == pytest.approx(known, abs=0.001)
    assert len(_T_975) == 8


def test_repeats_that_agree_leave_no_spread_and_two_tell_none() -> None:
    found = over_repeats([1.1, 1.1, 1.1])
    assert found is not None
    assert found.low == found.high == pytest.approx(1.1)
    assert over_repeats([1.1, 1.1]) is None
    assert over_repeats([1.1, 1.1, 0.0]) is None


def test_an_interval_over_repeats_by_hand() -> None:
    """Logarithms 0.1, 0.2, 0.3: mean 0.2, std 0.1, reach 4.303 × 0.1 ÷ √3."""
    found = over_repeats(np.exp([0.1, 0.2, 0.3]).tolist(), what="interleaved ")
    assert found is not None
    assert np.log([found.low, found.high]) == pytest.approx(
        [0.2 - 0.24843, 0.2 + 0.24843], abs=1e-5
    )
    assert found.kind == "95 % Student t over 3 interleaved repeats"


@given(st.lists(FLOATS, min_size=1, max_size=150), st.floats(0, 1))
def test_equal_weights_give_the_usual_percentile(values: list[float], share: float) -> None:
    found = percentile([(value, 0.3) for value in values], share)
    assert found == pytest.approx(float(np.percentile(values, share * 100)))


def test_weights_move_a_percentile() -> None:
    assert percentile([(1.0, 8.0), (2.0, 1.0), (3.0, 1.0)], 0.5) < 2
    assert percentile([(1.0, 1.0), (2.0, 1.0), (3.0, 8.0)], 0.9) > 2
    assert percentile([(1.0, 1.0), (np.inf, 1.0)], 0.5) == np.inf
    assert percentile([(1.0, 1.0), (2.0, 1.0), (np.inf, 1.0)], 0.5) == 2
