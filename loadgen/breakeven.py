"""The break-even map of a comparison: speedup by category and load, and where it goes through 1.0.

A crossing is bracketed by two measured loads next to each other; between them it is read off a line
through the logarithms of load and of ratio, so that base and spec may be swapped. Nothing is said
beyond the measured loads. Must not: form a speedup, choose words.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

from loadgen.errors import UserError
from loadgen.types import (
    BreakEven,
    BreakEvenRow,
    CategoryComparison,
    Comparison,
    Crossing,
    Load,
    LoadComparison,
    Speedup,
)
from loadgen.written import load_order

By = Literal["category", "tier", "isl_bucket"]


def break_even(comparison: Comparison, by: By = "category") -> BreakEven:
    """The map. UserError: no prompt of the runs has such a name."""
    rows = sorted(comparison.loads, key=lambda row: load_order(row.load))
    groups = [{g.category: g.speedup_user for g in _groups_of(row, by)} for row in rows]
    names = dict.fromkeys(name for group in groups for name in group)
    if not names and by != "category":
        word = {"tier": "an entropy tier", "isl_bucket": "an ISL bucket"}[by]
        raise UserError(
            f"no prompt of these runs has {word}, so there is no row to show. Expected prompts "
            "that name it, such as SPEED-Bench's throughput split; or leave --by out."
        )
    loads = [row.load for row in rows]
    found = [(name, [group.get(name) for group in groups]) for name in sorted(names, key=_length)]
    every = [("all", [row.speedup_user for row in rows])]
    output = [row.speedup_throughput for row in rows]
    why = dict.fromkeys(row.why_no_verdict for row in rows if row.why_no_verdict)
    return BreakEven(
        by=by,
        loads=tuple(loads),
        rows=(
            *(
                BreakEvenRow(
                    name=name,
                    figure="speedup_user",
                    cells=tuple(cells),
                    crossings=crossings(loads, cells),
                )
                for name, cells in (*found, *every)
            ),
            BreakEvenRow(
                name="all",
                figure="speedup_throughput",
                cells=tuple(output),
                crossings=crossings(loads, output),
            ),
        ),
        repeats=max((len(row.repeats) for row in rows), default=0),
        why_no_verdict="; ".join(why),
    )


def _groups_of(row: LoadComparison, by: By) -> Sequence[CategoryComparison]:
    return {"category": row.categories, "tier": row.tiers, "isl_bucket": row.isl_buckets}[by]


def _length(name: str) -> tuple[float, str]:
    """ISL buckets by their number, '2k' before '16k'; other names by the alphabet."""
    number = name.lower().removesuffix("k")
    return (float(number) if number.isdecimal() else math.inf), name


def crossings(loads: Sequence[Load], cells: Sequence[Speedup | None]) -> tuple[Crossing, ...]:
    """Every place where the ratio goes through 1.0 between neighbours of one kind of load."""
    points = [
        (load, load_order(load), math.log(cell.ratio))
        for load, cell in zip(loads, cells, strict=True)
        if cell is not None and 0 < cell.ratio < math.inf
    ]
    found = []
    for (low, (kind, x), a), (high, (other, y), b) in itertools.pairwise(points):
        if kind != other or (a > 0) == (b > 0) or not 0 < x < y:
            continue
        at = x * (y / x) ** (a / (a - b))
        found.append(Crossing(low=low, high=high, at=at, falls=a > b))
    return tuple(found)
