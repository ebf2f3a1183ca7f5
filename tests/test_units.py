"""reports/units.py by table, and what holds for every float."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.types import Interval
from reports import units

ANY = st.floats(allow_nan=True, allow_infinity=True)
TEXT_OF = (
    units.figure,
    units.number,
    units.bare,
    units.duration,
    units.milliseconds,
    units.rate,
    units.hundredths,
    units.percent,
    units.ratio,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms"),
        (1.25, "1.25 s"),
        (0.1, "100 ms"),
        (0.00667, "6.67 ms"),
        (0.99949, "999 ms"),
        (0.9996, "1.00 s"),
        (0.0009996, "1.00 ms"),
        (85e-6, "85.0 µs"),
        (75.04, "75.0 s"),
        (4321.0, "4,321 s"),
        (0.0, "0 ms"),
        (None, "–"),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert units.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.4, "1,234"),
        (176.4, "176"),
        (99.96, "100"),
        (99.94, "99.9"),
        (22.04, "22.0"),
        (9.996, "10.0"),
        (2.3, "2.30"),
        (0.0123, "0.012"),
        (0.0, "0"),
        (-0.0, "0"),
        (-0.0001, "0.000"),
        (1e9, "1,000,000,000"),
        (None, "–"),
    ],
)
def test_three_significant_digits(value: float | None, text: str) -> None:
    assert units.figure(value) == text


def test_each_kind_has_its_unit() -> None:
    assert [units.amount(value) for value in (84.0, 2.5, math.inf, None)] == [
        "84",
        "2.50",
        "–",
        "–",
    ]
    assert units.rate(1234.4) == "1,234 tok/s"
    assert units.percent(0.6214) == "62.1 %"
    assert units.hundredths(1.0) == "100.0"
    assert units.number(2.449) == "2.45"
    assert units.ratio(1.1283) == "1.13×"
    assert units.milliseconds(1.25) == "1,250"
    assert units.count(12345) == "12,345"
    assert units.interval(Interval(low=1.02, high=1.254, kind="95 %")) == "[1.02, 1.25]"


def test_missing_is_a_dash() -> None:
    assert {text(None) for text in TEXT_OF} == {"–"}
    assert units.count(None) == units.interval(None) == "–"
    assert units.interval(Interval(low=math.nan, high=2.0, kind="")) == "–"


@given(ANY)
def test_no_float_prints_as_nan_inf_or_a_signed_zero(value: float) -> None:
    for text in TEXT_OF:
        assert re.fullmatch(r"–|-?[\d,]+(\.\d+)?( ms| s| µs| tok/s| %|×)?", text(value))
        assert not re.match(r"-[0.,]+\D*$", text(value))


@given(st.floats(min_value=1e-3, max_value=1e12))
def test_a_figure_is_within_half_a_unit_of_its_third_digit(value: float) -> None:
    printed = float(units.figure(value).replace(",", ""))
    assert abs(printed - value) <= max(0.00051, value * 0.00501)
