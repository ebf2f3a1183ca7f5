"""The report of a run with speculation against its baseline: speedup by load and by category.

One repeat gives a ratio with its within-run interval and never a verdict: noise between runs is not
in that interval (DESIGN §4). Must not: compute a figure, call an outcome good or bad.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from loadgen.errors import Bug
from loadgen.types import Comparison, Load, LoadComparison, PhaseSummary, Speedup, Study, Summary
from loadgen.written import load_order
from reports import page, units
from reports.page import Column, Section, dist, wrapped

MOST_IN_SENTENCE = 3
"""With more loads the verdict names the lowest and the highest."""

Cell = Callable[[LoadComparison, PhaseSummary], str]
_RATE = units.figure


def render(study: Study) -> str:
    """The report as text, `study.width` cells wide at most; Bug: nothing was compared."""
    found, width = study.comparison, study.width
    if found is None:
        raise Bug("the comparison report was given a study without a comparison")
    runs = [*zip(("base", "spec"), study.summaries, strict=True)]
    simulated = found.base.server.simulated or found.spec.server.simulated
    troubles = [f"{name}: {said}" for name, run in runs if (said := page.trouble(run))]
    first = ("SIMULATED: " if simulated else "") + "".join(troubles) + verdict(found)
    rows = [("", load.spec) for load in found.loads]
    sections = (
        wrapped(first, width, style="bold"),
        page.header([("base", found.base), ("spec", found.spec)], width),
        loads(found.loads, width),
        what_else(found, width),
        page.acceptance_block(rows, width),
        *categories(found.loads, width),
        page.positions(rows, width),
        page.caveats([("", _of_both(study)), *runs], width),
        page.paths(study, ("base", "spec")),
    )
    return page.text_of(sections, study)


def _of_both(study: Study) -> Summary:
    """The comparison's own caveats, at the loads of the run with speculation."""
    own = study.comparison.caveats if study.comparison is not None else ()
    return msgspec.structs.replace(study.summaries[1], caveats=own)


def verdict(found: Comparison) -> str:
    """The one sentence: both speedups at each load, or at the lowest and the highest of many."""
    known = sorted({row.load for row in found.loads}, key=load_order)
    named = known if len(known) <= MOST_IN_SENTENCE else [known[0], known[-1]]
    rows = [row for row in found.loads if row.load in named]
    user = _speeds("user speed", ((r.load, r.speedup_user) for r in rows))
    output = _speeds("output throughput", ((r.load, r.speedup_throughput) for r in rows))
    more = f" (of {len(known)} loads)" if len(known) > len(named) else ""
    repeats = len({load.repeat for load in found.loads})
    alone = [s.interval for r in rows for s in (r.speedup_user, r.speedup_throughput) if s]
    kinds = page.listed(dict.fromkeys(i.kind for i in alone if i and repeats == 1))
    said = "; ".join(filter(None, (user, output))) or "no speedup could be measured"
    how = f"{repeats} repeats" if repeats > 1 else "one repeat"
    against = " against ".join(page.speculation(i.server) for i in (found.spec, found.base))
    return f"{against}, {how} (no verdict): {said}{more}{f' ({kinds})' if kinds else ''}."


def _speeds(what: str, found: Iterable[tuple[Load, Speedup | None]]) -> str:
    """'user speed 1.08× [1.02, 1.15] at concurrency 1 and …', '' where nothing is known."""
    by_load = page.grouped((load, speed) for load, speed in found if speed is not None)
    spans = page.listed(
        f"{_span(by_load[load])} at {page.load_words(load)}"
        for load in sorted(by_load, key=load_order)
    )
    return f"{what} {spans}" if spans else ""


def _span(found: Sequence[Speedup]) -> str:
    """One repeat with its interval; of several the lowest and the highest."""
    ratios = sorted(speed.ratio for speed in found)
    ends = f"{units.ratio(ratios[0])} to {units.ratio(ratios[-1])}"
    return ends if len(found) > 1 else speedup(found[0])


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
    bases = {row.throughput_basis for row in rows} - {""}
    output = f"output {bases.pop()}" if len(bases) == 1 else "output"
    drops = {"AL": 1, "AL where drafted": 7, "coverage": 8}
    columns = [
        Column("load", [page.load_label("", row.spec) for row in rows]),
        _ratios("user speed", 0, [row.speedup_user for row in rows]),
        _ratios(output, 2, [row.speedup_throughput for row in rows]),
        _both("output tok/s", 3, rows, _output),
        _both("user p50 tok/s", 4, rows, lambda r, p: _RATE(dist(p, "user_tokens_per_s").p50)),
        _both("TTFT p95 ms", 6, rows, lambda r, p: units.milliseconds(dist(p, "ttft_s").p95)),
        *page.acceptance_columns([page.best(row.spec) for row in rows], drops),
    ]
    return [*page.grid(columns, width), *_notes(rows, width)]


def _ratios(what: str, drop: int, found: Sequence[Speedup | None]) -> Column:
    return Column(f"{what}\nspec ÷ base", [*map(speedup, found)], drop, what, left=True)


def _both(what: str, drop: int, rows: Sequence[LoadComparison], cell: Cell) -> Column:
    """A figure of both runs, the arrows in line."""
    pairs = [(cell(row, row.base), cell(row, row.spec)) for row in rows]
    before, after = (max(map(len, side)) for side in zip(*pairs, strict=True))
    cells = [f"{a:>{before}} → {b:<{after}}" for a, b in pairs]
    return Column(f"{what}\nbase → spec", cells, drop, what, left=True)


def _output(row: LoadComparison, phase: PhaseSummary) -> str:
    """On the basis that the ratio has."""
    steady = row.throughput_basis == "steady"
    return _RATE(phase.throughput.steady if steady else phase.throughput.whole)


def _notes(rows: Sequence[LoadComparison], width: int) -> Section:
    """What output stands for where it is not the same at every load, and why."""
    groups = page.grouped(
        ((row.throughput_basis, _why(row)), page.load_label("", row.spec))
        for row in rows
        if row.throughput_basis
    )
    if len(groups) < 2 and not any(reason for _, reason in groups):
        return []
    said = [f"{basis} at {page.listed(at)}{why}" for (basis, why), at in groups.items()]
    return wrapped(f"Output: {'; '.join(said)}.", width, style="dim")


def _why(row: LoadComparison) -> str:
    why = row.base.throughput.why_not_steady or row.spec.throughput.why_not_steady
    return f" ({why})" if row.throughput_basis != "steady" and why else ""


def what_else(found: Comparison, width: int) -> Section:
    """What is not the same apart from speculation, and whether the answers are."""
    other = "; ".join(found.differences)
    temperature = found.spec.scenario.sampling.temperature
    differ = ", ".join(
        f"{units.count(load.outputs_differ)} of {units.count(load.outputs_compared)} at "
        f"{page.load_label('', load.spec)}"
        for load in found.loads
        if load.outputs_compared
    )
    answers = "Answers were not compared: no pair of them is known."
    if differ:
        answers = f"Answers that differ at temperature {temperature:g}: {differ}."
    elif temperature > 0:
        answers = f"Answers were not compared: they are sampled at temperature {temperature:g}."
    text = f"What else differs: {other}." if other else "Nothing else differs."
    return [*wrapped(text, width), *wrapped(answers, width)]


def categories(rows: Sequence[LoadComparison], width: int) -> list[Section]:
    """The category blocks of the lowest and of the highest load, on one scale."""
    known = sorted((r for r in rows if r.categories), key=lambda r: (load_order(r.load), r.repeat))
    blocks = []
    for row in known[:1] + known[1:][-1:]:
        of, found = row.categories, [c.acceptance or page.NOTHING for c in row.categories]
        before = [
            Column("category", [page.short(c.category) for c in of], left=True),
            Column("spec ÷ base", [speedup(c.speedup_user) for c in of], left=True),
        ]
        points = [
            (c.speedup_user.ratio, c.speedup_user.interval) if c.speedup_user else (None, None)
            for c in of
        ]
        after = page.acceptance_columns(found, {"steps": 4, "AL": 1, "AL where drafted": 5})
        speeds = [c.speedup_user.interval for c in of if c.speedup_user is not None]
        kinds = page.listed(dict.fromkeys(i.kind for i in speeds if i is not None))
        title = f"User speed by category at {page.load_label('', row.spec)}, {page.batch(row.spec)}"
        title += f" ({kinds})" if kinds else ""
        blocks.append(page.CategoryBlock(title, before, points, after, [c.steps for c in of]))
    return page.category_blocks(blocks, width, "×")
