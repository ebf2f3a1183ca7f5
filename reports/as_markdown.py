"""The comparison and the break-even map as Markdown, for a pull request.

The same figures and sentences as the text reports place. Whatever comes from outside is escaped, so
that it can neither end a table cell nor become markup. Must not: compute a figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loadgen.errors import Bug
from loadgen.types import (
    BreakEven,
    CategoryComparison,
    CategorySummary,
    Comparison,
    Judged,
    LoadComparison,
    PhaseSummary,
    Speedup,
    Study,
)
from loadgen.written import load_label
from reports import breakeven, page, units
from reports import compare as as_compare
from reports.page import dist

_ESCAPED = str.maketrans(
    {c: f"\\{c}" for c in "\\`*_[]|#~"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
)


def render(study: Study) -> str:
    """The report as Markdown; Bug: nothing was compared."""
    found = study.comparison
    if found is None:
        raise Bug("the Markdown report was given a study without a comparison")
    gates = _bounds(study.judged)
    if study.break_even is not None:
        parts = [_text(breakeven.sentence(study.break_even, found)), gates, _map(study.break_even)]
    else:
        simulated = found.base.server.simulated or found.spec.server.simulated
        said = ("SIMULATED: " if simulated else "") + as_compare.verdict(found)
        parts = [_text(said), gates, *_compared(found)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _text(text: str) -> str:
    return page.clean(text).translate(_ESCAPED)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    body = [[_text(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (*lines, *body))


# ── comparison ───────────────────────────────────────────────────────────────────────────────────


def _compared(found: Comparison) -> list[str]:
    other = "; ".join(found.differences)
    notes = [f"What else differs: {other}." if other else "Nothing else differs."]
    notes += as_compare.answers(found)
    notes += [f"{c.code}: {c.message} {c.advice}" for c in found.caveats]
    groups = []
    for word, of in as_compare.GROUPS.items():
        rows = [(load, group) for load in found.loads for group in of(load)]
        groups.append(_groups(word, rows) if rows else "")
    return [_loads(found.loads), "\n".join(f"- {_text(note)}" for note in notes), *groups]


def _loads(rows: Sequence[LoadComparison]) -> str:
    heads = (
        "load",
        "verdict",
        "user speed",
        "output throughput",
        "user p50 tok/s",
        "output tok/s",
        "TTFT p50 ms",
        "step ms",
        "AL",
        "coverage %",
        "accepted by position, joint %",
    )
    return _table(heads, [_load(row) for row in rows])


def _load(row: LoadComparison) -> list[str]:
    best = page.best(row.spec)
    basis = row.throughput_basis

    def user(phase: PhaseSummary) -> str:
        return units.figure(dist(phase, "user_tokens_per_s").p50)

    def output(phase: PhaseSummary) -> str:
        steady = basis == "steady"
        return units.figure(phase.throughput.steady if steady else phase.throughput.whole)

    def ttft(phase: PhaseSummary) -> str:
        return units.milliseconds(dist(phase, "ttft_s").p50)

    return [
        load_label(row.load),
        row.verdict or (f"– ({row.why_no_verdict})" if row.why_no_verdict else "–"),
        as_compare.speedup(row.speedup_user),
        as_compare.speedup(row.speedup_throughput) + (f" ({basis})" if basis else ""),
        *(_both(cell(row.base), cell(row.spec)) for cell in (user, output, ttft)),
        _both(units.milliseconds(row.base.step_time_s), units.milliseconds(row.spec.step_time_s)),
        page.length(best),
        units.hundredths(best.draft_coverage),
        as_compare.positions(best),
    ]


def _both(base: str, spec: str) -> str:
    return units.MISSING if base == spec == units.MISSING else f"{base} → {spec}"


def _groups(word: str, rows: Sequence[tuple[LoadComparison, CategoryComparison]]) -> str:
    heads = (
        word,
        "load",
        "user speed",
        "user p50 tok/s",
        "TTFT p50 ms",
        "step ms",
        "AL",
        "coverage %",
        "accepted by position, joint %",
    )
    table = _table(heads, [_group(row, group) for row, group in rows])
    summary = f"User speed by {word}, in the mixed batch"
    return f"<details><summary>{summary}</summary>\n\n{table}\n\n</details>"


def _group(row: LoadComparison, group: CategoryComparison) -> list[str]:
    found = group.acceptance or page.NOTHING

    return [
        page.short(group.category),
        load_label(row.load),
        as_compare.speedup(group.speedup_user),
        *(
            _both(_figure(group.base, of), _figure(group.spec, of))
            for of in ("user", "ttft", "step")
        ),
        page.length(found),
        units.hundredths(found.draft_coverage),
        as_compare.positions(found),
    ]


def _figure(group: CategorySummary | None, of: str) -> str:
    if group is None:
        return units.MISSING
    return {
        "user": units.figure(group.user_tokens_per_s.p50),
        "ttft": units.milliseconds(group.ttft_s.p50),
        "step": units.milliseconds(group.step_time_s),
    }[of]


# ── map, bounds ──────────────────────────────────────────────────────────────────────────────────


def _map(found: BreakEven) -> str:
    heads = [breakeven.WORDS[found.by][0], *map(load_label, found.loads), "goes through 1.0"]
    rows = [
        [breakeven.title(row), *map(_cell, row.cells), breakeven.crosses(row)] for row in found.rows
    ]
    return f"{_table(heads, rows)}\n\n{_text(breakeven.legend(found, signs=False))}"


def _cell(cell: Speedup | None) -> str:
    if cell is None:
        return units.MISSING
    return f"{as_compare.speedup(cell)} {cell.mark}"


def _bounds(judged: Sequence[Judged]) -> str:
    if not judged:
        return ""
    rows = [
        [j.bound.text, j.load, units.judged(j), "crossed" if j.crossed else "held"] for j in judged
    ]
    return _table(("fail if", "at", "found", ""), rows)
