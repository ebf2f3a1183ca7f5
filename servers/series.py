"""What a metrics page says of one family: its rows, their sum, its counts by draft position.

A page is `name{label="value",…}` → value, as loadgen/scrape.py parses it. Must not: know an engine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping


def rows(samples: Mapping[str, float], *families: str) -> dict[str, float]:
    """Series of exactly these families: a `_created` twin has another name."""
    return {row: value for row, value in samples.items() if row.partition("{")[0] in families}


def amount(samples: Mapping[str, float], *families: str) -> float | None:
    """The sum over rows, such as seconds; None where the page has none."""
    found = rows(samples, *families)
    return sum(found.values()) if found else None


def total(samples: Mapping[str, float], *families: str) -> int | None:
    """The sum over rows (engines, ranks, models); None where the page has none."""
    found = amount(samples, *families)
    return None if found is None else round(found)


def by_position(samples: Mapping[str, float], label: str, *families: str) -> tuple[int, ...] | None:
    """Counts by draft position, dense from `label` = 0 on, summed over rows; None where none is."""
    found: Counter[int] = Counter()
    for series, value in rows(samples, *families).items():
        if at := re.search(rf'[{{,]{label}="(\d{{1,3}})"', series):
            found[int(at[1])] += round(value)
    return tuple(found[j] for j in range(max(found) + 1)) if found else None
