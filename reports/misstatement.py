"""The report of a random control against real text: by how much it misstates, and why.

A control never becomes a headline: the sentence is about the error. Must not: compute a figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loadgen.errors import Bug
from loadgen.types import Misstated, Misstatement, PhaseSummary, Speedup, Study
from reports import page, units
from reports.compare import speedup
from reports.page import Column, Section, dist, wrapped

NOTABLE = 0.05
"""Below this share nothing is called a misstatement."""
Cell = Callable[[Misstated, PhaseSummary], str]


def render(study: Study) -> str:
    """The report as text, `study.width` cells wide at most; Bug: nothing was compared."""
    found, width = study.misstatement, study.width
    if found is None:
        raise Bug("the misstatement report was given a study without a misstatement")
    labels = ("random", "real")
    runs = [*zip(labels, study.summaries, strict=True)]
    simulated = "SIMULATED: " if found.random.server.simulated else ""
    troubles = "".join(f"{name}: {said}" for name, run in runs if (said := page.trouble(run)))
    rows = [("", load.random) for load in found.loads]
    other = "; ".join(found.differences)
    sections = (
        wrapped(simulated + troubles + verdict(found), width, style="bold"),
        page.header([("random", found.random), ("real", found.real)], width),
        table(found.loads, width),
        made_of(found.loads, width),
        causes(found.loads, width),
        wrapped(f"What else differs: {other}." if other else "Nothing else differs.", width),
        page.answers_block(rows, width),
        page.caveats(runs, width),
        page.paths(study, labels),
    )
    return page.text_of(sections, study)


def verdict(found: Misstatement) -> str:
    """'Random input overstates output throughput by 23 % [12, 35] at concurrency 8 and …'."""
    said = [
        f"{_by(load.throughput, 'output throughput')} and {_by(load.acceptance, 'AL')}"
        f" at {page.load_words(load.load)}"
        if load.acceptance is not None
        else f"{_by(load.throughput, 'output throughput')} at {page.load_words(load.load)}"
        for load in found.loads
    ]
    ratios = [r for load in found.loads for r in (load.throughput, load.acceptance) if r]
    kinds = page.listed(dict.fromkeys(r.interval.kind for r in ratios if r.interval is not None))
    noise = "noise between the two runs is not in it" if kinds else "one run each"
    return f"Random input {'; '.join(said)} ({page.joined((kinds, noise))})."


def _by(found: Speedup | None, what: str) -> str:
    if found is None:
        return f"cannot be set against real input in {what}"
    around = f" {units.interval(found.interval)}" if found.interval is not None else ""
    share = units.percent(abs(found.ratio - 1))
    if abs(found.ratio - 1) < NOTABLE:
        return f"has {what} right within {share} ({units.ratio(found.ratio)}{around})"
    verb = "overstates" if found.ratio > 1 else "understates"
    return f"{verb} {what} by {share} ({units.ratio(found.ratio)}{around})"


def table(rows: Sequence[Misstated], width: int) -> Section:
    """A row a load: the figures of both runs and their ratios."""
    if not rows:
        return []
    off = all(page.best(p).state == "off" for row in rows for p in (row.random, row.real))
    lengths = [
        Column("AL\nrandom ÷ real", [speedup(row.acceptance) for row in rows], left=True),
        _both("AL", 1, rows, lambda _, p: page.length(page.best(p))),
    ]
    columns = [
        Column("load", [page.load_label("", row.real) for row in rows]),
        Column("output\nrandom ÷ real", [speedup(row.throughput) for row in rows], left=True),
        _both("output tok/s", 2, rows, lambda r, p: units.figure(_output(r, p))),
        *([] if off else lengths),
        _both("OSL p50", 3, rows, lambda _, p: units.whole(dist(p, "osl_tokens").p50)),
    ]
    return page.grid(columns, width)


def made_of(rows: Sequence[Misstated], width: int) -> Section:
    """The ratio of output as factors, or why it is not split."""
    names = list(dict.fromkeys(f.name for row in rows for f in row.factors))
    split = [row for row in rows if row.factors]
    section: Section = []
    if split:
        columns = [
            Column("load", [page.load_label("", row.real) for row in split]),
            Column(
                "output", [units.ratio(r.throughput.ratio if r.throughput else None) for r in split]
            ),
            *(Column(name, [_factor(row, name) for row in split], 0, name) for name in names),
        ]
        section += wrapped("What the ratio of output is made of", width, style="bold")
        section += page.grid(columns, width)
        section += wrapped(
            "The factors multiply to the ratio, put in from left to right; outside decoding is "
            "mostly TTFT, the rest ramp, drain and uneven streams.",
            width,
            style="dim",
        )
    why = page.grouped((row.not_split, page.load_label("", row.real)) for row in rows)
    for text, at in why.items():
        section += wrapped(f"Not split at {page.listed(at)}: {text}.", width) if text else []
    return section


def _output(row: Misstated, phase: PhaseSummary) -> float | None:
    steady = row.basis == "steady"
    return phase.throughput.steady if steady else phase.throughput.whole


def _both(what: str, drop: int, rows: Sequence[Misstated], cell: Cell) -> Column:
    cells = [f"{cell(row, row.random)} → {cell(row, row.real)}" for row in rows]
    return Column(f"{what}\nrandom → real", cells, drop, what, left=True)


def _factor(row: Misstated, name: str) -> str:
    return units.ratio(next((f.ratio for f in row.factors if f.name == name), None))


def causes(rows: Sequence[Misstated], width: int) -> Section:
    """What times without speculation say of experts: nothing drafted then explains them."""
    section: Section = []
    for row in rows:
        at = page.load_label("", row.real)
        took = (
            f"Without speculation and at equal output lengths a token took "
            f"{speedup(row.time_per_token)} as long on random input at {at}, and what is outside "
            f"decoding {speedup(row.time_outside_decoding)}"
        )
        text = {
            "unequal_lengths": f"Whether random input is routed to other experts cannot be told at "
            f"{at}: output lengths differ. Run both with --ignore-eos.",
            "signs": f"{took}. That is consistent with other experts being routed to in a mixture "
            "of experts, with caches, or with noise between the two runs; it proves none of these.",
            "no_signs": f"{took}: no sign of other experts being routed to.",
            None: "",
        }[row.routing]
        section += wrapped(text, width) if text else []
    return section
