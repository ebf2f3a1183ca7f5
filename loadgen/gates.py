"""`--fail-if` bounds held against a comparison: what a pull request must not lose.

A bound is a condition to fail on: `speedup_user<1.1@c=32` is crossed where the speedup is below
1.1. In percent it is a change of spec against base, of a speedup its distance from 1. A bound that
cannot be judged is an error: a gate that passes because a figure is missing is no gate. Must not:
read a file, form a speedup.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from loadgen.bounds import holds, parse
from loadgen.errors import UserError
from loadgen.metrics import METRICS
from loadgen.sides import named
from loadgen.types import (
    Acceptance,
    Bound,
    Comparison,
    Judged,
    LoadComparison,
    OutputDifference,
    PhaseSummary,
    Speedup,
)
from loadgen.written import load_label


def _best(of: Callable[[Acceptance], float | None]) -> Callable[[PhaseSummary], float | None]:
    return lambda phase: of(phase.acceptance[0]) if phase.acceptance else None


def _ratio(found: Speedup | None) -> float | None:
    return None if found is None else found.ratio


def _share(found: OutputDifference | None) -> float | None:
    return None if found is None else found.differ / found.compared


RATIOS: Mapping[str, Callable[[LoadComparison], float | None]] = {
    "speedup_user": lambda load: _ratio(load.speedup_user),
    "speedup_throughput": lambda load: _ratio(load.speedup_throughput),
    "output_length": lambda load: _ratio(load.output_length),
    "outputs_differ": lambda load: _share(load.outputs),
}
"""What only a comparison has; `outputs_differ` is a share 0…1."""

FIGURES: Mapping[str, Callable[[PhaseSummary], float | None]] = {
    "acceptance_length": _best(lambda a: a.acceptance_length),
    "acceptance_length_drafted": _best(lambda a: a.acceptance_length_drafted),
    "draft_coverage": _best(lambda a: a.draft_coverage),
    "acceptance_rate": _best(lambda a: a.acceptance_rate),
    "step_time_s": lambda phase: phase.step_time_s,
    "output_tokens_per_s": lambda phase: (
        phase.throughput.whole if phase.throughput.steady is None else phase.throughput.steady
    ),
}
"""What a phase has once, over all its repeats."""

DISTRIBUTIONS = tuple(metric.name for metric in METRICS)


def read_bounds(texts: Sequence[str]) -> tuple[Bound, ...]:
    """The bounds of `--fail-if`. UserError: no bound, or a statistic missing or too much."""
    bounds = tuple(parse(text, (*RATIOS, *FIGURES, *DISTRIBUTIONS)) for text in texts)
    for bound in bounds:
        name = bound.metric.removesuffix("_s") if bound.metric in DISTRIBUTIONS else bound.metric
        if (bound.metric in DISTRIBUTIONS) != (bound.statistic is not None):
            hint = f"such as {name}_p95" if bound.statistic is None else f"only {name}"
            raise UserError(
                f"--fail-if '{bound.text}': {bound.metric} is "
                f"{'a distribution' if bound.statistic is None else 'one figure'}; "
                f"expected {hint}."
            )
    return bounds


def judge(comparison: Comparison, bounds: Sequence[Bound]) -> tuple[Judged, ...]:
    """Every bound at each load that it speaks of. UserError: no such load, or no such figure."""
    judged = []
    for bound in bounds:
        labels = {load_label(row.load).removesuffix("/s"): row for row in comparison.loads}
        if bound.load is not None and bound.load not in labels:
            raise UserError(
                f"--fail-if '{bound.text}': nothing was measured at {bound.load}. Measured: "
                f"{', '.join(labels)}."
            )
        for label, row in labels.items():
            if bound.load in (None, label):
                value = _value(bound, row)
                judged.append(
                    Judged(
                        bound=bound,
                        spec=named(comparison.spec),
                        load=load_label(row.load),
                        value=value,
                        crossed=holds(bound, value),
                    )
                )
    return tuple(judged)


def _value(bound: Bound, row: LoadComparison) -> float:
    """The figure, or its change in proportion. UserError: it is not known."""
    if bound.metric in RATIOS:
        value = RATIOS[bound.metric](row)
        change = None if value is None else value - 1
        missing = "the comparison"
    else:
        before, value = _of(bound, row.base), _of(bound, row.spec)
        change = value / before - 1 if before and value is not None else None
        missing = "the run with speculation" if value is None else "the baseline"
    found = change if bound.relative else value
    if found is None:
        raise UserError(
            f"--fail-if '{bound.text}' cannot be judged at {load_label(row.load)}: {missing} has "
            f"no {bound.metric}. Expected a figure that the reports of both runs show; leave the "
            "bound out, or measure again with what it needs."
        )
    return found


def _of(bound: Bound, phase: PhaseSummary) -> float | None:
    if bound.metric in FIGURES:
        return FIGURES[bound.metric](phase)
    distribution = phase.distributions.get(bound.metric)
    value: float | None = getattr(distribution, bound.statistic or "p50", None)
    return value
