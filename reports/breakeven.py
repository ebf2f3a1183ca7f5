"""The break-even map as text: speedup by category and load, and where each row goes through 1.0.

A cell is a ratio with its mark, its interval under it; loads that do not fit beside each other go
on below. Must not: compute a figure, mark a cell that the map does not mark.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from loadgen.errors import Bug
from loadgen.types import BreakEven, BreakEvenRow, Comparison, Crossing, Speedup, Study
from loadgen.written import load_label
from reports import page, units
from reports.compare import labels
from reports.page import Column, Section, wrapped

SIGNS: Mapping[str, str] = {"pays": "+", "no difference": "=", "costs": "−", "?": "?"}
FIGURES: Mapping[str, str] = {
    "speedup_user": "user speed",
    "speedup_throughput": "output throughput",
}
WORDS: Mapping[str, tuple[str, str]] = {
    "category": ("category", "categories"),
    "tier": ("tier", "tiers"),
    "isl_bucket": ("ISL bucket", "ISL buckets"),
}


def render(study: Study) -> str:
    """The map as text, `study.width` cells wide at most; Bug: there is none."""
    found, of, width = study.break_even, study.comparison, study.width
    if found is None or of is None:
        raise Bug("the break-even report was given a study without a map")
    sections = (
        wrapped(sentence(found, of), width, style="bold"),
        page.header([("base", of.base), ("spec", of.spec)], width),
        *table(found, width),
        wrapped(legend(found), width, style="dim"),
        page.paths(study, labels(of)),
    )
    return page.text_of(sections, study)


def sentence(found: BreakEven, of: Comparison) -> str:
    """The one sentence: where all prompts cross, and how many rows do."""
    simulated = "SIMULATED: " if of.base.server.simulated or of.spec.server.simulated else ""
    against = " against ".join(page.speculation(i.server) for i in (of.spec, of.base))
    whole = [f"{FIGURES[r.figure]} {_whole(r)}" for r in found.rows if r.name == "all"]
    groups = [row for row in found.rows if row.name != "all"]
    courses = Counter(_course(row) for row in groups)
    counts = page.listed(
        f"{n} {_VERBS[verb][n == 1]}{course}" for (course, verb), n in courses.most_common()
    )
    rest = f"; of {len(groups)} {WORDS[found.by][1]} {counts}" if groups else ""
    repeats = "one repeat" if found.repeats <= 1 else f"{found.repeats} repeats"
    verdict = " (no verdict)" if found.why_no_verdict else ""
    return f"{simulated}{against}, {repeats}{verdict}: {'; '.join(whole)}{rest}."


def _whole(row: BreakEvenRow) -> str:
    """'falls through 1.0 between 32 and 64 (≈ 45)', 'stays above 1.0 at every measured load'."""
    if row.crossings:
        return page.listed(
            f"{'falls' if c.falls else 'rises'} through 1.0 {bracket(c)}" for c in row.crossings
        )
    course, verb = _course(row)
    return f"stays {course} at every measured load" if verb else f"was {course}"


_VERBS: Mapping[str, tuple[str, str]] = {
    "go": ("go ", "goes "),
    "stay": ("stay ", "stays "),
    "": ("", ""),
}
"""Of several rows and of one."""


def _course(row: BreakEvenRow) -> tuple[str, str]:
    """How a row runs, and the verb to it: 'through 1.0', 'above 1.0', 'not measured'."""
    if row.crossings:
        return "through 1.0", "go"
    ratios = [cell.ratio for cell in row.cells if cell is not None]
    if not ratios:
        return "not measured", ""
    above, below = max(ratios) > 1, min(ratios) < 1
    return ("above 1.0" if above else "below 1.0" if below else "at 1.0"), "stay"


def bracket(crossing: Crossing) -> str:
    """'between 32 and 64 (≈ 45)': the two measured loads and what lies between them."""
    low, high = (load_label(load).partition("=")[2] for load in (crossing.low, crossing.high))
    return f"between {low} and {high} (≈ {units.about(crossing.at)})"


def crosses(row: BreakEvenRow) -> str:
    """The last cell of a row."""
    if not row.crossings:
        return f"no, {_course(row)[0]}"
    return ", ".join(bracket(c) + ("" if c.falls else " upwards") for c in row.crossings)


def title(row: BreakEvenRow) -> str:
    """'coding', 'all: user speed'."""
    name = page.short(row.name)
    return f"{name}: {FIGURES[row.figure]}" if row.name == "all" else name


def table(found: BreakEven, width: int) -> list[Section]:
    """Two lines a row; columns that do not fit go on in the next section."""
    names = [line for row in found.rows for line in (title(row), "")]
    first = Column(WORDS[found.by][0], names, left=True)
    rest = [
        Column(
            load_label(load),
            [line for row in found.rows for line in _cell(row.cells[at])],
            left=True,
        )
        for at, load in enumerate(found.loads)
    ]
    ends = [line for row in found.rows for line in (crosses(row), "")]
    rest.append(Column("goes through 1.0", ends, left=True))
    sections, columns = [], [first]
    for column in rest:
        if len(columns) > 1 and page.span([*columns, column]) > width:
            sections.append(page.grid(columns, width))
            columns = [first]
        columns.append(column)
    if columns[1:] == rest[-1:]:  # where the last one stands alone, a row needs one line
        columns = [replace(column, cells=column.cells[::2]) for column in columns]
    return [*sections, page.grid(columns, width)]


def _cell(cell: Speedup | None) -> tuple[str, str]:
    if cell is None:
        return units.MISSING, ""
    return f"{units.ratio(cell.ratio)} {SIGNS[cell.mark]}", units.interval(cell.interval)


def legend(found: BreakEven, *, signs: bool = True) -> str:
    """What a mark, an interval and a row stand for; `signs` where marks are not words."""
    kinds = dict.fromkeys(_kinds(found.rows))
    why = f" ({found.why_no_verdict})" if found.why_no_verdict else ""
    marks = "+ pays, = no difference shown (1 lies in the interval), − costs, ? no verdict"
    marks = marks if signs else "No difference: 1 lies in the interval; ?: no verdict"
    return (
        f"Spec ÷ base. {marks}{why}. Rows are user speed in "
        f"the mixed batch unless they say otherwise. Intervals: {page.listed(kinds) or 'none'}. "
        "Loads between measured ones are interpolated in the logarithms of load and ratio."
    )


def _kinds(rows: Sequence[BreakEvenRow]) -> list[str]:
    cells = [cell for row in rows for cell in row.cells if cell is not None]
    return [cell.interval.kind for cell in cells if cell.interval is not None]
