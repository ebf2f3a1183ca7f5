"""Distributions and seeded bootstrap intervals. numpy, imported when first needed.

Percentiles interpolate linearly and are given only where the sample can carry them: q needs
1/(1 − q) values. Intervals are 95 % percentile bootstraps over dialogues: a dialogue, not a request
or a step, is what was drawn independently. Must not: know what a figure means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from loadgen.types import Distribution

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Statistic = Callable[[Floats], Floats]

SEED = 20260
RESAMPLES = 1000
MOST_BLOCKS = 400
"""More dialogues than this are summed into so many random blocks before they are resampled."""

FEWEST = 5
"""Below this many dialogues no interval is given: it would mirror the sample, not the noise."""


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


def bootstrap(
    columns: Sequence[Sequence[float]], statistic: Statistic, *, seed: int = SEED
) -> tuple[float, float] | None:
    """95 % interval of statistic(column sums) over resampled rows.

    `columns`: m sequences of one value a dialogue. `statistic` maps sums of shape (m, resamples) to
    (resamples,). None below `FEWEST` rows, or where the statistic is not finite.
    """
    import numpy as np

    table = np.asarray(columns, dtype=np.float64)
    if table.shape[1] < FEWEST:
        return None
    rng = np.random.default_rng(seed)
    if table.shape[1] > MOST_BLOCKS:
        order = rng.permutation(table.shape[1])
        blocks = np.array_split(order, MOST_BLOCKS)
        table = np.stack([table[:, block].sum(axis=1) for block in blocks], axis=1)
    rows = table.shape[1]
    weights = rng.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    with np.errstate(all="ignore"):
        drawn = statistic(table @ weights.T.astype(np.float64))
    drawn = drawn[np.isfinite(drawn)]
    if drawn.size < RESAMPLES * 0.9:
        return None
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)


def ratio(sums: Any) -> Any:
    """Σ of the first column ÷ Σ of the second."""
    return sums[0] / sums[1]


def ratio_of_ratios(sums: Any) -> Any:
    """(Σ0 ÷ Σ1) ÷ (Σ2 ÷ Σ3)."""
    return (sums[0] / sums[1]) / (sums[2] / sums[3])
