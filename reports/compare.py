"""The report of a run with speculation against its baseline: speedup by load and by category.

One repeat gives a ratio with its within-run interval and never a verdict: noise between runs is not
in that interval (DESIGN §4). Must not: compute a figure, call an outcome good or bad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.text import Text

from loadgen.errors import Bug
from loadgen.types import Comparison, LoadComparison, Speedup, Study, Summary
from reports import units
from reports.table import (
    Column,
    Point,
    Row,
    Section,
    acceptance_lines,
    best,
    caveats,
    few_column,
    few_steps_note,
    grid,
    header,
    length,
    length_columns,
    listed,
    load_label,
    page,
    paths,
    plotted,
    positions,
    quantile,
    short,
    speculation,
    title,
    trouble,
    wrapped,
)

MOST_IN_SENTENCE = 3
"""With more loads the verdict names the lowest and the highest."""


def render(study: Study) -> str:
    """The report as text, `study.width` cells wide at most; Bug: nothing was compared."""
    found = study.comparison
    if found is None:
        raise Bug("the comparison report was given a study without a comparison")
    width = study.width
    runs = [(name, info) for name, info in (("base", found.base), ("spec", found.spec))]
    rows: list[Row] = [("", load.spec) for load in found.loads]
    return page(
        (
            wrapped(verdict(study, found), width, style="bold"),
            header(runs, width),
            loads(found.loads, width),
            what_else(found, width),
            acceptance_lines(rows, width),
            categories(found.loads, width),
            positions(rows, width),
            caveats(labelled(study), width),
            paths(study, [name for name, _ in labelled(study)]),
        ),
        study,
    )


def labelled(study: Study) -> list[tuple[str, Summary]]:
    """The study's two runs under their part in the comparison: base first."""
    return list(zip(("base", "spec"), study.summaries, strict=False))


def verdict(study: Study, found: Comparison) -> str:
    """The one sentence: troubles of either run first, then user speed at each load."""
    simulated = found.base.server.simulated or found.spec.server.simulated
    troubles = dict.fromkeys(
        f"{name}: {said}" for name, s in labelled(study) if (said := trouble(s))
    )
    repeats = len({load.repeat for load in found.loads})
    how = "one repeat (no verdict)" if repeats <= 1 else f"{repeats} repeats (no verdict)"
    against = f"{speculation(found.spec.server)} against {speculation(found.base.server)}"
    speeds, kinds = _speeds(found.loads)
    note = f" ({listed(kinds)})" if kinds else ""
    start = ("SIMULATED: " if simulated else "") + "".join(troubles)
    return f"{start}{against}, {how}: {speeds}{note}."


def _speeds(loads: Sequence[LoadComparison]) -> tuple[str, list[str]]:
    """User speed at each load in words, and what the intervals are."""
    by_load: dict[int, list[Speedup]] = {}
    for load in loads:
        if load.speedup_user is not None:
            by_load.setdefault(load.load.concurrency, []).append(load.speedup_user)
    if not by_load:
        return "no speedup could be measured", []
    named = sorted(by_load)
    if len(named) > MOST_IN_SENTENCE:
        named = [named[0], named[-1]]
    said = [f"{_several(by_load[c])} at concurrency {c}" for c in named]
    more = f" (of {len(by_load)} loads)" if len(by_load) > len(named) else ""
    kinds = dict.fromkeys(
        s.interval.kind
        for c in named
        for s in by_load[c]
        if s.interval is not None and len(by_load[c]) == 1
    )
    return f"user speed {listed(said)}{more}", list(kinds)


def _several(found: Sequence[Speedup]) -> str:
    """One repeat with its interval; of several the lowest and the highest."""
    if len(found) == 1:
        return speedup(found[0])
    ratios = sorted(s.ratio for s in found)
    return f"{units.ratio(ratios[0])} to {units.ratio(ratios[-1])}"


def speedup(found: Speedup | None) -> str:
    """'1.08× [1.02, 1.15]', or a dash."""
    if found is None:
        return units.MISSING
    around = f" {units.interval(found.interval)}" if found.interval is not None else ""
    return units.ratio(found.ratio) + around


def loads(rows: Sequence[LoadComparison], width: int) -> Section:
    """A row a load: both speedups, both runs' figures, acceptance; and the notes to it."""
    if not rows:
        return []
    bases = dict.fromkeys(row.throughput_basis for row in rows if row.throughput_basis)
    basis = f" {next(iter(bases))}" if len(bases) == 1 else ""
    user = [_pair(row, "user_tokens_per_s", "p50", units.figure) for row in rows]
    ttft = [_pair(row, "ttft_s", "p95", units.milliseconds) for row in rows]
    columns = [
        Column(head="load", cells=tuple(load_label(row.spec) for row in rows)),
        _ratios("user speed", 0, [row.speedup_user for row in rows]),
        _ratios(f"output{basis}", 2, [row.speedup_throughput for row in rows]),
        _both("output", "tok/s", 3, [_output(row) for row in rows]),
        _both("user p50", "tok/s", 4, user),
        _both("TTFT p95", "ms", 6, ttft),
    ]
    found = [best(row.spec) for row in rows]
    if any(a is not None and a.state != "off" for a in found):
        drafted = tuple(units.number(a.acceptance_length_drafted if a else None) for a in found)
        coverage = tuple(units.hundredths(a.draft_coverage if a else None) for a in found)
        columns += [
            Column(head="AL", cells=tuple(map(length, found)), drop=1),
            Column(head="AL where\ndrafted", cells=drafted, drop=7, name="AL where drafted"),
            Column(head="coverage\n%", cells=coverage, drop=8, name="coverage"),
        ]
    return [*grid(columns, width), *_notes(rows, width)]


def _ratios(what: str, drop: int, found: Sequence[Speedup | None]) -> Column:
    cells = tuple(map(speedup, found))
    return Column(head=f"{what}\nspec ÷ base", cells=cells, drop=drop, left=True, name=what)


def _both(what: str, unit: str, drop: int, pairs: Sequence[tuple[str, str]]) -> Column:
    """Two figures a row, the arrows in line."""
    before, after = (max(map(len, side)) for side in zip(*pairs, strict=True))
    cells = tuple(f"{a:>{before}} → {b:<{after}}" for a, b in pairs)
    head = f"{what} {unit}\nbase → spec"
    return Column(head=head, cells=cells, drop=drop, left=True, name=f"{what} {unit}")


def _pair(
    row: LoadComparison, metric: str, part: str, text: Callable[[float | None], str]
) -> tuple[str, str]:
    return text(quantile(row.base, metric, part)), text(quantile(row.spec, metric, part))


def _output(row: LoadComparison) -> tuple[str, str]:
    """Output tokens a second of both runs, on the basis that their ratio has."""
    if row.throughput_basis == "steady":
        before, after = row.base.throughput.steady, row.spec.throughput.steady
    else:
        before, after = row.base.throughput.whole, row.spec.throughput.whole
    return units.figure(before), units.figure(after)


def _notes(rows: Sequence[LoadComparison], width: int) -> Section:
    """What output stands for where it is not the same at every load, and why."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        why = row.base.throughput.why_not_steady or row.spec.throughput.why_not_steady
        reason = f" ({why})" if row.throughput_basis != "steady" and why else ""
        if row.throughput_basis:
            groups.setdefault((row.throughput_basis, reason), []).append(load_label(row.spec))
    said = [f"{basis} at {listed(names)}{why}" for (basis, why), names in groups.items()]
    if not said or (len(said) == 1 and not any(why for _, why in groups)):
        return []
    return wrapped(f"Output: {'; '.join(said)}.", width, style="dim")


def what_else(found: Comparison, width: int) -> Section:
    """What is not the same apart from speculation, and whether the answers are."""
    other = "; ".join(found.differences)
    lines = wrapped(f"What else differs: {other}." if other else "Nothing else differs.", width)
    temperature = found.spec.scenario.sampling.temperature
    compared = [load for load in found.loads if load.outputs_compared]
    if compared:
        said = [
            f"{units.count(load.outputs_differ)} of {units.count(load.outputs_compared)} at "
            f"{load_label(load.spec)}"
            for load in compared
        ]
        text = f"Answers that differ at temperature {temperature:g}: {', '.join(said)}."
    elif temperature > 0:
        text = f"Answers were not compared: they are sampled at temperature {temperature:g}."
    else:
        text = "Answers were not compared: no pair of them is known."
    return [*lines, *wrapped(text, width)]


def categories(rows: Sequence[LoadComparison], width: int) -> Section:
    """The category block of the lowest and of the highest load."""
    known = sorted((r for r in rows if r.categories), key=lambda r: (r.load.concurrency, r.repeat))
    if not known:
        return []
    named = known[:1] if len(known) == 1 else [known[0], known[-1]]
    section: Section = []
    for row in named:
        heading = f"User speed by category at {load_label(row.spec)}, in the mixed batch"
        section += [*([Text()] if section else []), *title(heading, width)]
        beside = [point for other in named for point in _points(other)]
        section += grid(_category_columns(row, beside, width), width, tell=False)
    return section + few_steps_note([c.steps for row in named for c in row.categories], width)


def _points(row: LoadComparison) -> list[Point]:
    speeds = [c.speedup_user for c in row.categories]
    return [(s.ratio, s.interval) if s is not None else (None, None) for s in speeds]


def _category_columns(row: LoadComparison, beside: Sequence[Point], width: int) -> list[Column]:
    speeds = [c.speedup_user for c in row.categories]
    columns = [
        Column(head="category", cells=tuple(short(c.category) for c in row.categories), left=True),
        Column(head="spec ÷ base", cells=tuple(map(speedup, speeds)), left=True),
    ]
    found = [c.acceptance for c in row.categories]
    if any(a is not None and a.state != "off" for a in found):
        columns += length_columns(found, interval=False)
    columns.append(few_column([c.steps for c in row.categories]))
    return plotted(columns, 2, _points(row), width, "×", beside)
