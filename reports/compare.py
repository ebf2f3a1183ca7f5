"""The report of a side with speculation against its baseline: speedup by load and by category.

Three or more interleaved repeats carry a verdict; one or two give a ratio with its within-run
interval and never one: noise between runs is not in that interval (DESIGN §4). Must not: compute a
figure, give a verdict of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from loadgen.errors import Bug
from loadgen.types import (
    Acceptance,
    CategoryComparison,
    CategorySummary,
    Comparison,
    LoadComparison,
    OutputDifference,
    PhaseSummary,
    Speedup,
    Study,
    Summary,
)
from loadgen.written import load_label, load_order
from reports import page, pareto, units
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
    noted = [("", _of_both(study)), *((name, page.any_repeat(run)) for name, run in runs)]
    at = [[(name, page.load_label("", row.spec)) for name, _ in noted] for row in found.loads]
    sections = (
        wrapped(first, width, style="bold"),
        page.header([("base", found.base), ("spec", found.spec)], width),
        loads(found.loads, width, page.marks(noted, at)),
        what_else(found, width),
        plot(found, width),
        page.acceptance_block(rows, width),
        *categories(found.loads, width),
        *figures(found.loads, width),
        page.positions(rows, width),
        page.caveats(noted, width),
        page.paths(study, labels(found)),
    )
    return page.text_of(sections, study)


def labels(found: Comparison) -> list[str]:
    """Whose each run file is, in the order of the study's paths."""
    return ["base"] * len(found.base_runs) + ["spec"] * len(found.spec_runs)


def _of_both(study: Study) -> Summary:
    """The comparison's own caveats, at the loads of the run with speculation."""
    own = study.comparison.caveats if study.comparison is not None else ()
    return msgspec.structs.replace(study.summaries[1], caveats=own)


def verdict(found: Comparison) -> str:
    """The one sentence: the verdicts, and both speedups at each load, or at the lowest and highest
    of many."""
    rows = sorted(found.loads, key=lambda row: load_order(row.load))
    few = rows if len(rows) <= MOST_IN_SENTENCE else [rows[0], rows[-1]]
    user = _speeds("user speed", [(r, r.speedup_user) for r in few])
    output = _speeds("output throughput", [(r, r.speedup_throughput) for r in few])
    more = f" (of {len(rows)} loads)" if len(rows) > len(few) else ""
    alone = [s.interval for r in few for s in (r.speedup_user, r.speedup_throughput) if s]
    kinds = page.listed(dict.fromkeys(i.kind for i in alone if i))
    said = "; ".join(filter(None, (user, output))) or "no speedup could be measured"
    against = " against ".join(page.speculation(i.server) for i in (found.spec, found.base))
    how = f"{against}, {_repeats(rows)}{_verdicts(rows)}"
    return f"{how}: {said}{more}{f' ({kinds})' if kinds else ''}."


def _repeats(rows: Sequence[LoadComparison]) -> str:
    """'one repeat (no verdict)', '3 repeats'."""
    counts = sorted({max(len(row.repeats), 1) for row in rows})
    said = f"{counts[0]} to {counts[-1]} repeats" if len(counts) > 1 else f"{counts[0]} repeats"
    said = "one repeat" if counts == [1] else said
    return said if any(row.verdict for row in rows) else f"{said} (no verdict)"


WORDS: Mapping[str, str] = {
    "pays": "pays",
    "costs": "costs",
    "no difference": "shows no difference",
    "disagree": "user speed and output throughput disagree",
}


def _verdicts(rows: Sequence[LoadComparison]) -> str:
    """'; pays at c=1 and c=8, costs at c=64', '' where no load has a verdict."""
    by = page.grouped((row.verdict, load_label(row.load)) for row in rows if row.verdict)
    said = [f"{WORDS[word]} at {page.listed(at)}" for word, at in by.items()]
    return f"; {', '.join(said)}" if said else ""


def _speeds(what: str, found: Sequence[tuple[LoadComparison, Speedup | None]]) -> str:
    """'user speed 1.08× [1.02, 1.15] at concurrency 1 and …', '' where nothing is known."""
    spans = page.listed(
        f"{speedup(speed)} at {page.load_words(row.load)}"
        for row, speed in found
        if speed is not None
    )
    return f"{what} {spans}" if spans else ""


def speedup(found: Speedup | None) -> str:
    """'1.08× [1.02, 1.15]', or a dash."""
    if found is None:
        return units.MISSING
    around = f" {units.interval(found.interval)}" if found.interval is not None else ""
    return units.ratio(found.ratio) + around


def loads(rows: Sequence[LoadComparison], width: int, marks: Column | None = None) -> Section:
    """A row a load: both speedups, both runs' figures, acceptance; and the notes to it."""
    if not rows:
        return []
    bases = {row.throughput_basis for row in rows} - {""}
    output = f"output {bases.pop()}" if len(bases) == 1 else "output"
    drops = {"AL": 1, "AL where drafted": 7, "coverage": 8}
    verdicts = [row.verdict or units.MISSING for row in rows]
    columns = [
        Column("load", [page.load_label("", row.spec) for row in rows]),
        _ratios("user speed", 0, [row.speedup_user for row in rows]),
        _ratios(output, 2, [row.speedup_throughput for row in rows]),
        *([Column("verdict", verdicts, left=True)] if any(row.verdict for row in rows) else []),
        _both("output tok/s", 3, rows, _output),
        _both("user p50 tok/s", 4, rows, lambda r, p: _RATE(dist(p, "user_tokens_per_s").p50)),
        _both("TTFT p95 ms", 5, rows, lambda r, p: units.milliseconds(dist(p, "ttft_s").p95)),
        *page.acceptance_columns([page.best(row.spec) for row in rows], drops),
        *_more(rows),
        *([marks] if marks is not None else []),
    ]
    return [*page.grid(columns, width), *_notes(rows, width), *_reasons(rows, width)]


def plot(found: Comparison, width: int) -> Section:
    """A curve a side."""
    base = [_on_basis(row, row.base) for row in found.loads]
    spec = [_on_basis(row, row.spec) for row in found.loads]
    sides = (("base", found.base.server, base), ("spec", found.spec.server, spec))
    return pareto.plot(sides, width)


def _on_basis(row: LoadComparison, phase: PhaseSummary) -> PhaseSummary:
    """With the whole phase's output alone where the ratio is of that."""
    if row.throughput_basis == "steady":
        return phase
    whole = msgspec.structs.replace(phase.throughput, steady=None)
    return msgspec.structs.replace(phase, throughput=whole)


def _more(rows: Sequence[LoadComparison]) -> list[Column]:
    """Step time, and two other ways to a speedup."""
    expected = [units.ratio(row.speedup_expected) for row in rows]
    by_dialogue = [units.ratio(row.speedup_by_dialogue) for row in rows]
    return [
        _both("step ms", 6, rows, lambda _, p: units.milliseconds(p.step_time_s)),
        Column("AL × step\nbase ÷ spec", expected, 9, "AL × step time base ÷ spec"),
        Column("Spec-Bench's\nspeedup", by_dialogue, 10, "Spec-Bench's speedup"),
    ]


def _reasons(rows: Sequence[LoadComparison], width: int) -> Section:
    """Why several repeats have no verdict, and the queue where the two speedups disagree."""
    said = [
        f"No verdict at {page.listed(at)}: {why}."
        for why, at in page.grouped(
            (r.why_no_verdict, load_label(r.load)) for r in rows if len(r.repeats) > 1
        ).items()
        if why
    ]
    apart = ((_queue(row), load_label(row.load)) for row in rows if row.verdict == "disagree")
    said += [
        f"The speedups disagree at {page.listed(at)}: {queue}."
        for queue, at in page.grouped(apart).items()
    ]
    return [line for text in said for line in wrapped(text, width, style="dim")]


def _queue(row: LoadComparison) -> str:
    """What the one speedup has and the other has not."""
    if row.queue_s == (None, None):
        return "throughput has the time in the server's queue in it, which the server does not tell"
    before, after = (units.duration(at) for at in row.queue_s)
    return f"a request waited {before} at the server in base and {after} in spec (Little's law)"


def _ratios(what: str, drop: int, found: Sequence[Speedup | None]) -> Column:
    return Column(f"{what}\nspec ÷ base", [*map(speedup, found)], drop, what, left=True)


def _both(what: str, drop: int, rows: Sequence[LoadComparison], cell: Cell) -> Column:
    return _arrows(what, drop, [(cell(row, row.base), cell(row, row.spec)) for row in rows])


def _arrows(what: str, drop: int, pairs: Sequence[tuple[str, str]]) -> Column:
    """A figure of both runs, the arrows in line."""
    before, after = (max(map(len, side)) for side in zip(*pairs, strict=True))
    none = (units.MISSING, units.MISSING)
    cells = [
        units.MISSING if pair == none else f"{pair[0]:>{before}} → {pair[1]:<{after}}"
        for pair in pairs
    ]
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
    text = f"What else differs: {other}." if other else "Nothing else differs."
    return [line for said in (text, *answers(found)) for line in wrapped(said, width)]


def answers(found: Comparison) -> list[str]:
    """Sentences: answers that differ, the same of base against base, and their lengths."""
    temperature = found.spec.scenario.sampling.temperature
    if temperature > 0:
        said = [f"Answers were not compared: they are sampled at temperature {temperature:g}."]
    elif differ := _differ(found, lambda row: row.outputs):
        noise = _differ(found, lambda row: row.noise)
        against = (
            f"base against base (batch noise): {noise}"
            if noise
            else ("base against base (batch noise): –, no prompt was answered twice")
        )
        said = [f"Answers that differ at temperature {temperature:g}: {differ}; {against}."]
    else:
        said = ["Answers were not compared: no pair of them is known."]
    lengths = _at_loads(
        (speedup(row.output_length), row) for row in found.loads if row.output_length is not None
    )
    return said + ([f"Output length spec ÷ base: {lengths}."] if lengths else [])


def _at_loads(said: Iterable[tuple[str, LoadComparison]]) -> str:
    """'0 of 22 at c=1 and c=8, 1 of 22 at c=64'."""
    groups = page.grouped((text, load_label(row.load)) for text, row in said)
    return ", ".join(f"{text} at {page.listed(at)}" for text, at in groups.items())


def _differ(found: Comparison, of: Callable[[LoadComparison], OutputDifference | None]) -> str:
    """'1 of 22 (from token 12 on, median) at c=8'."""
    known = [(said, row) for row in found.loads if (said := of(row)) is not None]
    return _at_loads((_difference(said), row) for said, row in known)


def _difference(said: OutputDifference) -> str:
    text = f"{units.count(said.differ)} of {units.count(said.compared)}"
    if said.first_p50 is None:
        return text
    return f"{text} (from {said.unit} {units.whole(said.first_p50 + 1)} on, median)"


GROUPS: Mapping[str, Callable[[LoadComparison], Sequence[CategoryComparison]]] = {
    "category": lambda row: row.categories,
    "tier": lambda row: row.tiers,
    "ISL bucket": lambda row: row.isl_buckets,
}


def categories(rows: Sequence[LoadComparison], width: int) -> list[Section]:
    """The blocks of the lowest and of the highest load, on one scale."""
    blocks = []
    for word, of in GROUPS.items():
        known = sorted((r for r in rows if of(r)), key=lambda r: load_order(r.load))
        blocks += [_block(word, row, of(row)) for row in known[:1] + known[1:][-1:]]
    return page.category_blocks(blocks, width, "×")


def _block(word: str, row: LoadComparison, of: Sequence[CategoryComparison]) -> page.CategoryBlock:
    before = [
        Column(word, [page.short(c.category) for c in of], left=True),
        Column("spec ÷ base", [speedup(c.speedup_user) for c in of], left=True),
    ]
    points = [
        (c.speedup_user.ratio, c.speedup_user.interval) if c.speedup_user else (None, None)
        for c in of
    ]
    found = [c.acceptance or page.NOTHING for c in of]
    after = page.acceptance_columns(found, {"steps": 4, "AL": 1, "AL where drafted": 5})
    speeds = [c.speedup_user.interval for c in of if c.speedup_user is not None]
    kinds = page.listed(dict.fromkeys(i.kind for i in speeds if i is not None))
    title = f"User speed by {word} at {page.load_label('', row.spec)}, {page.batch(row.spec)}"
    title += f" ({kinds})" if kinds else ""
    return page.CategoryBlock(title, before, points, after, [c.steps for c in of])


def figures(rows: Sequence[LoadComparison], width: int) -> list[Section]:
    """Both sides' figures by category, tier and ISL bucket, at the highest load."""
    sections = []
    for word, of in GROUPS.items():
        known = sorted((r for r in rows if of(r)), key=lambda r: load_order(r.load))
        pairs = [(c.base, c.spec) for c in of(known[-1])] if known else []
        both = [(b, s) for b, s in pairs if b is not None and s is not None]
        if not both:
            continue
        found = [s.acceptance or page.NOTHING for _, s in both]
        columns = [
            Column(word, [page.short(s.category) for _, s in both], left=True),
            _sides("user p50 tok/s", 1, both, lambda g: _RATE(g.user_tokens_per_s.p50)),
            _sides("TTFT p50 ms", 3, both, lambda g: units.milliseconds(g.ttft_s.p50)),
            _sides("step ms", 2, both, lambda g: units.milliseconds(g.step_time_s)),
            *page.acceptance_columns(found, {"AL": 1, "coverage": 4}),
            Column("accepted by position\njoint %", [*map(positions, found)], 5, left=True),
        ]
        last = known[-1].spec
        title = f"Figures by {word} at {page.load_label('', last)}, {page.batch(last)}"
        sections.append([*wrapped(title, width, style="bold"), *page.grid(columns, width)])
    return sections


def _sides(
    what: str,
    drop: int,
    both: Sequence[tuple[CategorySummary, CategorySummary]],
    cell: Callable[[CategorySummary], str],
) -> Column:
    return _arrows(what, drop, [(cell(b), cell(s)) for b, s in both])


def positions(found: Acceptance) -> str:
    """'84.3 70.2 58.6': accepted at position 1, 2, … ÷ drafts."""
    return " ".join(map(units.hundredths, found.joint_by_position or ())) or units.MISSING
