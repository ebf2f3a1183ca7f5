"""Distributions and seeded bootstrap intervals. numpy, imported when first needed.

Percentiles interpolate linearly and are given only where the sample can carry them: q needs
1/(1 − q) values. Intervals are of 95 % over dialogues: a dialogue, not a request or a step, is what
was drawn independently. From ten dialogues on a percentile bootstrap; below, where resampling would
only mirror the sample, a jackknife of the logarithm with Student's t, which is wide because little
is known. Must not: know what a figure means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from loadgen.types import Distribution, Interval

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Statistic = Callable[[Floats], Floats]

SEED = 20260
RESAMPLES = 1000
MOST_BLOCKS = 400
"""More dialogues than this are summed into so many random blocks before they are resampled."""

FEWEST = 3
"""Two dialogues, or repeats, that happen to agree would look certain."""

ENOUGH = 10
"""From this many dialogues on the bootstrap; below, the jackknife."""

TELLS_NOTHING = 10.0
"""An interval that reaches further than this factor either way is not given."""

_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)
"""Student's t at 97.5 % for 1 … 8 degrees of freedom."""


def distribution(values: Sequence[float] | Floats) -> Distribution:
    """Mean, std (ddof 1) and percentiles; all None where n = 0."""
    import numpy as np

    data = np.asarray(values, dtype=np.float64)
    n = int(data.size)
    if n == 0:
        return Distribution(n=0)
    p50, p90, p95, p99 = (float(p) for p in np.percentile(data, (50, 90, 95, 99)))
    return Distribution(
        n=n,
        mean=float(data.mean()),
        std=float(data.std(ddof=1)) if n > 1 else None,
        min=float(data.min()),
        p50=p50,
        p90=p90 if n >= 10 else None,
        p95=p95 if n >= 20 else None,
        p99=p99 if n >= 100 else None,
        max=float(data.max()),
    )


def interval(
    columns: Sequence[Sequence[float]], statistic: Statistic, *, what: str = "", seed: int = SEED
) -> Interval | None:
    """95 % interval of statistic(column sums) over rows drawn independently.

    `columns`: m sequences of one value a dialogue. `statistic` maps sums of shape (m, n) to (n,)
    positive figures. `what` goes into the interval's kind. None below `FEWEST` rows, where
    the statistic is not finite, or where the interval would say nothing.
    """
    import numpy as np

    table = np.asarray(columns, dtype=np.float64)
    rows = table.shape[1] if table.ndim == 2 else 0
    if rows < FEWEST:
        return None
    with np.errstate(all="ignore"):
        few = rows < ENOUGH
        limits = _jackknife(table, statistic) if few else _bootstrap(table, statistic, seed)
    if limits is None:
        return None
    method = "jackknife (Student t)" if few else "bootstrap"
    return Interval(low=limits[0], high=limits[1], kind=f"95 % {what}{method} over dialogues")


def pooled(
    groups: Sequence[Sequence[Sequence[float]]], statistic: Statistic, *, what: str = ""
) -> list[Interval | None]:
    """95 % intervals of small groups that are taken to scatter alike, about their logarithms.

    A group of two dialogues hardly tells its own spread; all groups together do: their spread about
    each group's own figure is pooled, as in an analysis of variance, and a group of n gets
    σ ÷ √n with Student's t for Σ(n − 1) degrees of freedom. None where nothing tells a spread.
    """
    import numpy as np

    squares, freedom = 0.0, 0
    centres: list[tuple[float, int]] = []
    with np.errstate(all="ignore"):
        for columns in groups:
            table = np.asarray(columns, dtype=np.float64)
            rows, whole = table.shape[1], table.sum(axis=1, keepdims=True)
            centres.append((float(np.log(statistic(whole))[0]), rows))
            if rows > 1:
                without = np.log(statistic(whole - table))
                squares += float((((rows - 1) * (without.mean() - without)) ** 2).sum())
                freedom += rows - 1
    if freedom < FEWEST or not np.isfinite(squares):
        return [None] * len(groups)
    spread = t_975(freedom) * float(np.sqrt(squares / freedom))
    kind = f"95 % {what}spread of dialogues pooled over the categories"
    return [
        Interval(low=float(np.exp(c - reach)), high=float(np.exp(c + reach)), kind=kind)
        if np.isfinite(c) and (reach := spread / n**0.5) <= np.log(TELLS_NOTHING)
        else None
        for c, n in centres
    ]


def over_repeats(ratios: Sequence[float], *, what: str = "") -> Interval | None:
    """95 % interval of the geometric mean of figures measured once a repeat: Student's t of their
    logarithms. None below three repeats, or where a figure is not positive and finite."""
    import numpy as np

    if len(ratios) < FEWEST or not all(0 < ratio < np.inf for ratio in ratios):
        return None
    logs = np.log(np.asarray(ratios, dtype=np.float64))
    centre, spread = float(logs.mean()), float(logs.std(ddof=1))
    if (logs == logs[0]).all():
        centre, spread = float(logs[0]), 0.0  # not the rounding of their mean
    reach = t_975(len(ratios) - 1) * spread / len(ratios) ** 0.5
    return Interval(
        low=float(np.exp(centre - reach)),
        high=float(np.exp(min(centre + reach, 700.0))),
        kind=f"95 % Student t over {len(ratios)} {what}repeats",
    )


def trend(values: Sequence[float]) -> Interval | None:
    """95 % interval of the change from the first of evenly spaced values to the last, along their
    least-squares line and as a share of their mean; values that scatter independently. None of
    fewer than `FEWEST` values, or where their mean is not positive."""
    import numpy as np

    data = np.asarray(values, dtype=np.float64)
    n = int(data.size)
    if n < FEWEST or not data.mean() > 0:
        return None
    at = np.arange(n) - (n - 1) / 2
    slope = float((at * data).sum() / (at**2).sum())
    rest = data - data.mean() - slope * at
    error = float(np.sqrt((rest**2).sum() / (n - 2) / (at**2).sum()))
    span, mean = n - 1, float(data.mean())
    middle, reach = slope * span / mean, t_975(n - 2) * error * span / mean
    kind = f"95 % Student t about a line through {n} values"
    return Interval(low=middle - reach, high=middle + reach, kind=kind)


def t_975(freedom: int) -> float:
    """Student's t at 97.5 %: the table, then its expansion about the normal (error < 0.001;
    Abramowitz & Stegun 26.7.5)."""
    if freedom <= len(_T_975):
        return _T_975[freedom - 1]
    z = 1.959964
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return z + (z**3 + z) / (4 * freedom) + second + third


def _bootstrap(table: Floats, statistic: Statistic, seed: int) -> tuple[float, float] | None:
    import numpy as np

    rng = np.random.default_rng(seed)
    if table.shape[1] > MOST_BLOCKS:
        order = rng.permutation(table.shape[1])
        blocks = np.array_split(order, MOST_BLOCKS)
        table = np.stack([table[:, block].sum(axis=1) for block in blocks], axis=1)
    rows = table.shape[1]
    weights = rng.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    drawn = statistic(table @ weights.T.astype(np.float64))
    drawn = drawn[np.isfinite(drawn)]
    if drawn.size < RESAMPLES * 0.9:
        return None
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)


def _jackknife(table: Floats, statistic: Statistic) -> tuple[float, float] | None:
    """exp(ln θ ± t · se), se from leaving out one row at a time; None where it says nothing."""
    import numpy as np

    rows = table.shape[1]
    whole = table.sum(axis=1, keepdims=True)
    centre = np.log(statistic(whole))[0]
    without = np.log(statistic(whole - table))
    error = np.sqrt((rows - 1) / rows * ((without - without.mean()) ** 2).sum())
    reach = t_975(rows - 1) * error
    if not np.isfinite(centre) or not reach <= np.log(TELLS_NOTHING):
        return None
    return float(np.exp(centre - reach)), float(np.exp(centre + reach))


def wilson(hits: int, n: int) -> Interval | None:
    """95 % score interval of a share (Wilson 1927); None of nothing."""
    if n < 1:
        return None
    z2 = 1.959964**2
    centre, spread = hits + z2 / 2, (z2 * (hits * (n - hits) / n + z2 / 4)) ** 0.5
    low, high = ((centre + side * spread) / (n + z2) for side in (-1, 1))
    share = hits / n  # rounding may not leave it outside at 0 and at 1
    return Interval(
        low=max(min(low, share), 0.0), high=min(max(high, share), 1.0), kind="95 % Wilson"
    )


def ratio(sums: Any) -> Any:
    """Σ of the first column ÷ Σ of the second."""
    return sums[0] / sums[1]


def ratio_of_ratios(sums: Any) -> Any:
    """(Σ0 ÷ Σ1) ÷ (Σ2 ÷ Σ3)."""
    return (sums[0] / sums[1]) / (sums[2] / sums[3])


def percentile(points: Sequence[tuple[float, float]], share: float) -> float:
    """The value below which `share` of the weight lies, of (value, weight) pairs, weights above 0.

    Linear between values; with equal weights it is the usual percentile (`distribution`). Infinite
    where an infinite value has a part in it.
    """
    import numpy as np

    values, weights = np.array(sorted(points), dtype=np.float64).T
    before = np.cumsum(weights) - weights
    if values.size == 1:
        return float(values[0])
    at = share * before[-1]
    right = int(np.searchsorted(before, at))
    if before[right] == at:
        return float(values[right])
    left = right - 1
    if not np.isfinite(values[right]):
        return float(values[right])
    part = (at - before[left]) / (before[right] - before[left])
    return float(values[left] + part * (values[right] - values[left]))
