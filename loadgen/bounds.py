"""The one parser for `--slo`, `--fail-if` and Scenario.slo: `ttft_p95<=500ms` → Bound.

    METRIC[_STATISTIC] OP NUMBER[UNIT] [@LOAD]

    ttft_p95<=500ms               of the distribution of a phase
    ttft_s<=0.5                   no statistic: of each request, or of a phase's one figure
    speedup_user<1.1@c=32         at this load only
    acceptance_length<-2%         a change in proportion to the baseline

A percent sign always means a change: a share such as acceptance_rate is written 0…1. Must not: know
where a metric's value comes from, or whether crossing the bound is good.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable

from loadgen.errors import UserError, nearest
from loadgen.types import STATISTICS, Bound

OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
DIVISORS = {"us": 1e6, "µs": 1e6, "ms": 1e3, "s": 1.0}

_SHAPE = re.compile(
    r"(?P<name>[a-z][a-z0-9_]*?)(?:_(?P<statistic>" + "|".join(STATISTICS) + r"))?"
    r"\s*(?P<op><=|>=|<|>)\s*"
    r"(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d{1,2})?)\s*(?P<unit>%|[a-zµμ/]*)"
    r"\s*(?:@\s*(?P<load>c=[1-9]\d*|rate=(?:\d+\.?\d*|\.\d+)))?",
    re.ASCII,
)


def parse(text: str, names: Iterable[str]) -> Bound:
    """One bound on a metric of `names`. UserError: no bound, an unknown metric, a wrong unit."""
    found = _SHAPE.fullmatch(text.strip())
    if found is None:
        raise UserError(
            f"'{text}' is no bound. Expected METRIC OP VALUE such as ttft_p95<=500ms, "
            "user_tokens_per_s_p50>=30 or speedup_user<1.1@c=32, where OP is <=, >=, < or > and "
            f"the metric may end in {', '.join(STATISTICS)}."
        )
    metric, unit = _metric(found["name"], text, tuple(names)), found["unit"].replace("μ", "µ")
    value = float(found["number"])
    if unit == "%":
        value /= 100
    elif in_seconds(metric):
        if unit not in DIVISORS and (unit or found["name"] != metric):
            raise UserError(
                f"'{text}': {found['number']}{unit} of what? {metric} is a time; expected a number "
                f"with us, ms or s, such as {found['number']}ms."
            )
        value /= DIVISORS[unit or "s"]
    elif unit:
        raise UserError(
            f"'{text}': {metric} is not a time and takes no unit '{unit}'. Expected a bare number, "
            "or a percentage of change such as -2%."
        )
    return Bound(
        text=text.strip(),
        metric=metric,
        statistic=found["statistic"],
        op=found["op"],
        value=value,
        relative=unit == "%",
        load=found["load"],
    )


def holds(bound: Bound, value: float) -> bool:
    """Whether `value OP bound` is true; value in base units, a share of change if `relative`."""
    return bool(OPERATORS[bound.op](value, bound.value))


def in_seconds(metric: str) -> bool:
    """By its name, as everywhere: `ttft_s`, and not `output_tokens_per_s`."""
    return metric.endswith("_s") and not metric.endswith("_per_s")


def _metric(word: str, text: str, names: tuple[str, ...]) -> str:
    """The metric that the word names, with the unit's suffix or without."""
    known = {name.removesuffix("_s"): name for name in names if in_seconds(name)}
    known |= {name: name for name in names}
    if word not in known:
        hint = nearest(word, known) or "."
        raise UserError(f"'{text}': unknown metric '{word}'{hint} Known: {', '.join(names)}.")
    return known[word]
