"""An SLO read and held against figures: limits of each request, and bounds on a load.

`ttft_s<=0.5` limits each request: goodput counts those inside every limit. `ttft_p95<=500ms` bounds
a load. A request that failed counts as one that never came: its latency is infinite, its speed 0.
In an open loop latencies run from when a request should have left, where that is known (DESIGN §4).
`--slo` and Scenario.slo both come here. Must not: know a load's place among others, read a file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from loadgen.bounds import holds, in_seconds, parse
from loadgen.errors import UserError
from loadgen.metrics import METRICS
from loadgen.stats import percentile
from loadgen.types import Bound, ClosedLoop, PhaseSummary, RequestFigures

MANY = frozenset(metric.name for metric in METRICS if metric.many)


def read(texts: Sequence[str], where: str) -> tuple[tuple[Bound, ...], tuple[Bound, ...]]:
    """Bounds on a load, and limits of each request. UserError, beginning with `where`: no such."""
    found = []
    for text in texts:
        try:
            bound = parse(text, [metric.name for metric in METRICS])
        except UserError as fault:
            raise UserError(f"{where} {fault}") from None
        if bound.relative or bound.load is not None:
            raise UserError(
                f"{where} '{text}': an SLO holds at every load and over no baseline. Expected a "
                "plain bound such as ttft_p95<=500ms."
            )
        if bound.statistic is None and bound.metric in MANY:
            raise UserError(
                f"{where} '{text}': {bound.metric} has many values a request. Expected a "
                f"statistic, such as {bound.metric.removesuffix('_s')}_p99."
            )
        found.append(bound)
    return (
        tuple(bound for bound in found if bound.statistic is not None),
        tuple(bound for bound in found if bound.statistic is None),
    )


def within(one: RequestFigures, limits: Sequence[Bound], closed: bool) -> bool:
    """Whether the request completed inside every limit; a figure that is missing is outside."""
    return one.completed and all(
        (value := _value(one, limit.metric, closed)) is not None and holds(limit, value)
        for limit in limits
    )


def goodput_rps(phase: PhaseSummary, limits: Sequence[Bound]) -> float | None:
    """Completed requests inside every limit ÷ span; None where there is no limit."""
    if not limits or not phase.span_s:
        return None
    closed = isinstance(phase.load, ClosedLoop)
    return sum(within(one, limits, closed) for one in phase.each) / phase.span_s


def figure(
    bound: Bound, phases: Sequence[PhaseSummary], weights: Sequence[float] | None = None
) -> float | None:
    """The bound's figure over a load's phases; None: not measured, or of too few requests.

    `weights`: of each request of all phases in turn, None: equal. Infinite where requests that
    failed are that percentile.
    """
    if bound.metric in MANY:
        plain = len(phases) == 1 and weights is None
        of = phases[0].distributions.get(bound.metric) if plain else None
        return getattr(of, str(bound.statistic)) if of is not None else None
    requests = [one for p in phases for one in p.each]
    weights = [1.0] * len(requests) if weights is None else weights
    closed = isinstance(phases[0].load, ClosedLoop)
    failed = math.inf if in_seconds(bound.metric) else 0.0
    points = [
        (_value(one, bound.metric, closed) if one.completed else failed, weight)
        for one, weight in zip(requests, weights, strict=True)
        if weight > 0
    ]
    known = [(value, weight) for value, weight in points if value is not None]
    done = [(value, weight) for value, weight in known if math.isfinite(value)]
    if not done:
        return None
    if bound.statistic == "mean":
        return sum(v * w for v, w in done) / sum(w for _, w in done)
    share = {"min": 0.0, "max": 1.0}.get(str(bound.statistic))
    if share is None:
        share = int(str(bound.statistic)[1:]) / 100
        if weight_of(weights) * (1 - share) < 1 - 1e-9 and share > 0.5:
            return None
    return percentile(known, share)


def weight_of(weights: Sequence[float]) -> float:
    """How many requests of equal weight would tell as much (Kish's effective sample size)."""
    squares = sum(w * w for w in weights)
    return sum(weights) ** 2 / squares if squares else 0.0


def _value(one: RequestFigures, metric: str, closed: bool) -> float | None:
    value = one.values.get(metric)
    return value if closed else one.values.get(f"{metric.removesuffix('_s')}_intended_s", value)
