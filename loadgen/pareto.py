"""Where a config stands between one user's speed and all users' tokens: the Pareto plot's points.

x is user speed, the median of a phase (1 ÷ TPOT); y is output tokens/s, steady or of the whole
phase, a GPU where GPUs are given. Between measured loads a curve is taken as straight in the
logarithms of both, as the break-even map takes its rows. Must not: draw, extrapolate.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from loadgen.types import CurveCrossing, OperatingPoint, PhaseSummary


def point(phases: Sequence[PhaseSummary], gpus: int | None) -> OperatingPoint | None:
    """One load, means over the repeats in `phases`; None where either speed is not known.

    Steady output where all of them have it, else that of the whole phase.
    """
    users = [p.distributions[_USER].p50 for p in phases if _USER in p.distributions]
    steady = [p.throughput.steady for p in phases]
    is_steady = None not in steady
    output = steady if is_steady else [p.throughput.whole for p in phases]
    x, y = (_mean(values) for values in (users, output))
    if not x or not y:
        return None
    return OperatingPoint(
        load=phases[0].load,
        user_tokens_per_s=x,
        output_tokens_per_s=y / (gpus or 1),
        steady=is_steady,
        repeats=len(phases),
    )


_USER = "user_tokens_per_s"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None and 0 < v < math.inf]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def crossings(
    first: Sequence[OperatingPoint], second: Sequence[OperatingPoint]
) -> tuple[CurveCrossing, ...]:
    """Where two curves, each in the order of its loads, go through each other."""
    found = []
    for one in itertools.pairwise(map(_logs, first)):
        for other in itertools.pairwise(map(_logs, second)):
            meeting = _meeting(*one, *other)
            if meeting is not None and meeting not in found:
                found.append(meeting)
    return tuple(found)


_XY = tuple[float, float]


def _logs(at: OperatingPoint) -> _XY:
    return math.log(at.user_tokens_per_s), math.log(at.output_tokens_per_s)


def _meeting(a: _XY, b: _XY, c: _XY, d: _XY) -> CurveCrossing | None:
    """Of the stretch a–b with c–d; parallel ones, and those that only touch in an end, have none.

    `second_above`: at a higher user speed than there, c–d has the higher output.
    """
    ab, cd, ac = _minus(b, a), _minus(d, c), _minus(c, a)
    turn = _cross(ab, cd)
    if not turn or not ab[0] or not cd[0]:
        return None
    along, beside = _cross(ac, cd) / turn, _cross(ac, ab) / turn
    if not (0 <= along <= 1 and 0 <= beside <= 1) or {along, beside} & {0.0, 1.0}:
        return None
    return CurveCrossing(
        user_tokens_per_s=math.exp(a[0] + along * ab[0]),
        output_tokens_per_s=math.exp(a[1] + along * ab[1]),
        second_above=cd[1] / cd[0] > ab[1] / ab[0],
    )


def _minus(a: _XY, b: _XY) -> _XY:
    return a[0] - b[0], a[1] - b[1]


def _cross(a: _XY, b: _XY) -> float:
    return a[0] * b[1] - a[1] * b[0]
