"""loadgen/pareto.py and its plot: points, crossings by hand and by law, a page that can be read."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.pareto import crossings, point
from loadgen.types import ClosedLoop, OperatingPoint, PhaseSummary, ServerInfo, Throughput
from reports import pareto, table
from tests.studies import compared, phase, server, spread

change = msgspec.structs.replace


def at(x: float, y: float, concurrency: int = 1) -> OperatingPoint:
    load = ClosedLoop(concurrency=concurrency)
    return OperatingPoint(load=load, user_tokens_per_s=x, output_tokens_per_s=y)


def speeds(concurrency: int, user: float, steady: float | None, **changes: Any) -> PhaseSummary:
    """A phase of these speeds; the whole phase gives a tenth less."""
    whole = (steady or 100.0) * 0.9
    return change(
        phase(8),
        load=ClosedLoop(concurrency=concurrency),
        distributions={"user_tokens_per_s": spread(user)},
        throughput=Throughput(whole=whole, steady=steady),
        **changes,
    )


def test_a_point_is_the_mean_over_repeats_and_steady_only_where_all_are() -> None:
    both = (speeds(8, 10.0, 100.0), speeds(8, 20.0, 300.0))
    found = point(both, None)
    assert found == change(at(15.0, 200.0, 8), repeats=2)
    one = point((both[0], speeds(8, 20.0, None)), None)
    assert one == change(at(15.0, 90.0, 8), repeats=2, steady=False)
    a_gpu = point(both, 4)
    assert a_gpu is not None
    assert a_gpu.output_tokens_per_s == 50.0


def test_a_phase_without_a_speed_has_no_point() -> None:
    assert point((change(speeds(8, 10.0, 100.0), distributions={}),), None) is None
    assert point((change(speeds(8, 10.0, 100.0), throughput=Throughput()),), None) is None


def test_two_curves_cross_where_logarithms_do() -> None:
    first, second = (at(100, 100), at(10, 1000)), (at(100, 400), at(10, 250))
    (found,) = crossings(first, second)
    # log10: y = 4 − x·1 and y = 2.398 + (x − 1)·0.204
    x = (4 - math.log10(250) + math.log10(1.6)) / (1 + math.log10(1.6))
    assert found.user_tokens_per_s == pytest.approx(10**x)
    assert found.output_tokens_per_s == pytest.approx(10 ** (4 - x))
    assert found.second_above
    (mirrored,) = crossings(second, first)
    assert not mirrored.second_above


@pytest.mark.parametrize(
    "second",
    [
        (at(100, 200), at(10, 2000)),  # above, parallel
        (at(100, 100), at(10, 1000)),  # the same
        (at(100, 100), at(10, 2000)),  # they only touch
        (at(100, 200),),  # one point is no curve
        (at(1000, 10), at(200, 50)),  # beyond what was measured
        (at(50, 10), at(50, 9000)),  # user speed does not change: no side is above
    ],
)
def test_no_crossing(second: tuple[OperatingPoint, ...]) -> None:
    assert crossings((at(100, 100), at(10, 1000)), second) == ()


SPEED = st.floats(1, 1e5)
CURVE = st.lists(st.builds(at, SPEED, SPEED), max_size=5)


@given(CURVE, CURVE)
def test_a_crossing_lies_between_points_of_both(
    first: list[OperatingPoint], second: list[OperatingPoint]
) -> None:
    for found in crossings(first, second):
        for curve in (first, second):
            xs = [p.user_tokens_per_s for p in curve]
            assert min(xs) * 0.999 <= found.user_tokens_per_s <= max(xs) * 1.001


# ── the plot ─────────────────────────────────────────────────────────────────────────────────────


def drawn(*curves: list[PhaseSummary], width: int = 80, of: ServerInfo | None = None) -> str:
    named = [(f"[{n}]" if len(curves) > 1 else "", of or server(), c) for n, c in enumerate(curves)]
    return "\n".join(line.plain for line in pareto.plot(named, width))


FALLING = [speeds(1, 100.0, 100.0), speeds(8, 50.0, 400.0), speeds(64, 10.0, 640.0)]


def test_one_config_has_its_loads_in_order_of_speed() -> None:
    page = drawn(FALLING)
    rows = [line for line in page.split("\n") if "○ " in line or " ○" in line]
    assert [row.split("○")[0].count("c=") for row in rows[:3]] == [0, 0, 1]
    assert page.count("○") == 4, "three points and the legend"
    assert "c=64" in page
    assert "Output: steady" not in page


def test_one_load_is_no_plot() -> None:
    assert drawn([FALLING[0]]) == ""
    assert drawn([]) == ""


def test_a_crossing_is_marked_and_told() -> None:
    flat = [speeds(1, 100.0, 300.0), speeds(64, 10.0, 310.0)]
    page = drawn(FALLING, flat)
    assert page.count("✕") == 2
    assert "[0] and [1] cross near" in page
    assert "above that user speed [1] gives more" in " ".join(page.split())
    none = drawn(FALLING, [speeds(1, 100.0, 10.0), speeds(64, 10.0, 20.0)])
    assert "No curve crosses that of [0] between measured loads." in none


def test_output_of_the_whole_phase_is_told() -> None:
    page = drawn([FALLING[0], speeds(8, 50.0, None)])
    assert "Output: steady, but of the whole phase at c=8." in page


def test_output_is_a_gpu_where_there_are_several() -> None:
    four = change(server(), gpus=4)
    assert "Output tok/s a GPU (up)" in drawn(FALLING, of=four)
    assert "  100 ┤     " in drawn(FALLING, of=four), "400 ÷ 4 is a row with no mark at its left"
    assert "  500 ┤" in drawn(FALLING)
    assert "a GPU" not in drawn(FALLING, of=change(server(), gpus=1))


def test_more_configs_than_marks_are_counted() -> None:
    page = drawn(*[FALLING] * 10)
    assert "2 more are not drawn." in page


@given(st.floats(1e-3, 1e7), st.floats(2.0, 1e6))
def test_axes_have_three_round_figures(low: float, factor: float) -> None:
    found = pareto._ticks((low, low * factor))
    assert len(found) >= 3
    assert found == sorted(found)
    assert all(low <= tick <= low * factor for tick in found)


@given(
    st.lists(st.tuples(st.floats(0.001, 1e6), st.floats(0.001, 1e7)), min_size=2, max_size=6),
    st.integers(60, 200),
)
def test_any_speeds_can_be_drawn(pairs: list[tuple[float, float]], width: int) -> None:
    page = drawn([speeds(n, x, y) for n, (x, y) in enumerate(pairs, 1)], width=width)
    lines = page.split("\n")
    assert max(map(len, lines)) <= width
    assert page.count("○") >= 2


def test_the_table_of_several_runs_has_the_plot() -> None:
    page = table.render(replace(compared(100), comparison=None))
    assert "○ [1] (no speculation), ● [2] (ngram k = 3)" in page
