"""loadgen/bounds.py: every form of a bound by table, what is refused, and laws."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.bounds import OPERATORS, holds, parse
from loadgen.errors import UserError
from loadgen.metrics import METRICS
from loadgen.types import STATISTICS, Bound, Distribution

NAMES = (*(m.name for m in METRICS), "speedup_user", "acceptance_length", "goodput_rps")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ttft_p95<=500ms", {"metric": "ttft_s", "statistic": "p95", "value": 0.5}),
        ("ttft_s_p95<=500ms", {"metric": "ttft_s", "statistic": "p95", "value": 0.5}),
        ("ttft_s<=0.5", {"metric": "ttft_s", "value": 0.5}),
        ("ttft<=.5s", {"metric": "ttft_s", "value": 0.5}),
        (" tpot_p99 <= 40 ms ", {"metric": "tpot_s", "statistic": "p99", "value": 0.04}),
        ("tpot_mean<1e3us", {"metric": "tpot_s", "statistic": "mean", "op": "<", "value": 1e-3}),
        ("tpot_mean<900µs", {"metric": "tpot_s", "statistic": "mean", "op": "<", "value": 9e-4}),
        (
            "user_tokens_per_s_p50>=30",
            {"metric": "user_tokens_per_s", "statistic": "p50", "op": ">=", "value": 30.0},
        ),
        (
            "speedup_user<1.1@c=32",
            {"metric": "speedup_user", "op": "<", "value": 1.1, "load": "c=32"},
        ),
        (
            "goodput_rps>2.5 @ rate=0.5",
            {"metric": "goodput_rps", "op": ">", "value": 2.5, "load": "rate=0.5"},
        ),
        (
            "acceptance_length<-2%",
            {"metric": "acceptance_length", "op": "<", "value": -0.02, "relative": True},
        ),
        (
            "ttft_p95>+5%@c=8",
            {
                "metric": "ttft_s",
                "statistic": "p95",
                "op": ">",
                "value": 0.05,
                "relative": True,
                "load": "c=8",
            },
        ),
    ],
)
def test_forms(text: str, expected: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"text": text.strip(), "op": "<="}
    assert parse(text, NAMES) == Bound(**(fields | expected))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tftt_p95<=500ms", "unknown metric 'tftt'; did you mean 'ttft'?"),
        ("speed_up_user<1", "did you mean 'speedup_user'?"),
        ("itl_p95<=5ms", "unknown metric 'itl'"),
        ("ttft_p96<=500ms", "unknown metric 'ttft_p96'; did you mean 'ttft_s'?"),
        ("ttft_p95<=500", "500 of what? ttft_s is a time"),
        ("ttft_p95<=5min", "5min of what?"),
        ("user_tokens_per_s_p50>=30ms", "user_tokens_per_s is not a time and takes no unit 'ms'"),
        ("user_tokens_per_s_p50>=30tok/s", "takes no unit 'tok/s'"),
        ("ttft_p95", "is no bound. Expected METRIC OP VALUE"),
        ("ttft_p95=500ms", "is no bound"),
        ("ttft_p95<=", "is no bound"),
        ("ttft_p95<=nan", "is no bound"),
        ("ttft_p95<=1e999s", "is no bound"),
        ("ttft_p95<=500ms@32", "is no bound"),
        ("ttft_p95<=500ms@c=0", "is no bound"),
        ("", "'' is no bound"),
    ],
)
def test_refused(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text, NAMES)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_statistics_and_operators_are_those_of_the_types() -> None:
    assert set(STATISTICS) == set(Distribution.__struct_fields__) - {"n", "std"}
    for op in OPERATORS:
        assert parse(f"ttft_p95{op}500ms", NAMES).op == op


@pytest.mark.parametrize(
    ("op", "below", "at", "above"),
    [
        ("<=", True, True, False),
        ("<", True, False, False),
        (">=", False, True, True),
        (">", False, False, True),
    ],
)
def test_holds(op: str, below: bool, at: bool, above: bool) -> None:
    bound = parse(f"ttft_p95{op}500ms", NAMES)
    assert [holds(bound, v) for v in (0.4999, 0.5, 0.5001)] == [below, at, above]
    assert not holds(bound, float("nan"))


@given(st.integers(1, 10**6))
def test_units_are_one_value_exactly(ms: int) -> None:
    texts = [f"ttft_p95<={ms}ms", f"ttft_p95<={ms * 1000}us", f"ttft_p95<={ms / 1000!r}s"]
    assert {parse(text, NAMES).value for text in texts} == {ms / 1000}


@given(st.text(max_size=40))
def test_any_text_is_a_bound_or_a_user_error(text: str) -> None:
    with contextlib.suppress(UserError):
        assert parse(text, NAMES).metric in NAMES
