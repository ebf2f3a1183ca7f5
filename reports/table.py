"""The report of one or more runs: a verdict sentence, a row a load, acceptance, caveats, paths.

Must not: compute a figure, talk to a server; how text is laid out is page.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from loadgen.types import Distribution, OpenLoop, PhaseSummary, ServerContext, Study, Summary
from loadgen.written import load_label, load_order
from reports import page, pareto, units
from reports.page import Column, Row, Section, dist, wrapped


def render(study: Study) -> str:
    """The report as text, `study.width` cells wide at most; colours only if `study.color`."""
    width, several = study.width, len(study.summaries) > 1
    runs = [(f"[{n}]" if several else "", s) for n, s in enumerate(study.summaries, 1)]
    by_run = [[(label, p) for p in s.phases if p.measured] for label, s in runs]
    rows = [row for run in by_run for row in run]
    sections = (
        wrapped(verdict(study.summaries), width, style="bold"),
        page.header([(label, s.info) for label, s in runs], width),
        loads(rows, width, page.marks(runs, [[(run, page.load_label("", p))] for run, p in rows])),
        server(rows, width),
        plot(runs, width),
        page.acceptance_block(rows, width),
        *categories(by_run, width),
        *(page.positions(run, width) for run in by_run),
        page.answers_block(rows, width),
        page.caveats(runs, width),
        page.paths(study, [label for label, _ in runs]),
    )
    return page.text_of(sections, study)


def verdict(summaries: Sequence[Summary]) -> str:
    """The one sentence: troubles first, then acceptance and speed at the highest load."""
    said = [_sentence(summary) for summary in summaries]
    if len(said) > 1:
        said = [f"[{number}] {sentence}" for number, sentence in enumerate(said, 1)]
        return f"{len(said)} runs: {'; '.join(said)}."
    starts_low = said[0].startswith(("run ", "unfinished "))
    return f"{said[0][0].upper() if starts_low else said[0][0]}{said[0][1:]}."


def _sentence(summary: Summary) -> str:
    server, phases = summary.info.server, [p for p in summary.phases if p.measured]
    what = page.speculation(server)
    known = {"no speculation": "without speculation", page.UNKNOWN: f"({what})"}
    subject = f"{server.model} on {server.engine} {known.get(what, f'with {what}')}"
    start = ("SIMULATED: " if server.simulated else "") + page.trouble(summary) + subject
    if not phases:
        return f"{start}: nothing was measured"
    phase = max(phases, key=lambda p: (load_order(p.load), -p.repeat))
    sent, done, cancelled = (page.total(phases, k) for k in ("sent", "completed", "cancelled"))
    requests = f"{done:,} of {sent:,} requests completed"
    requests += f", {cancelled:,} cancelled" if cancelled else ""
    said = f"at {page.load_words(phase.load)}, {_acceptance(phase)}{_speed(phase)}"
    return f"{start}: {said}; {requests}"


def _acceptance(phase: PhaseSummary) -> str:
    found = page.best(phase)
    if found.state == "off":
        return ""
    why = f" ({found.why_missing})" if found.why_missing else ""
    known = page.length(found) != units.MISSING
    length = f"acceptance length {page.length_over(found, 'decode steps')}"
    return f"{length if known else f'no acceptance length{why}'}, "


def _speed(phase: PhaseSummary) -> str:
    steady, whole = phase.throughput.steady, phase.throughput.whole
    user = dist(phase, "user_tokens_per_s").p50
    output = f"{units.rate(whole)} (whole phase)" if whole is not None else ""
    output = f"{units.rate(steady)} (steady)" if steady is not None else output
    of_user = f"{units.rate(user)} a user" if user is not None else ""
    return " and ".join(filter(None, (output, of_user))) or "no speed measured"


# ── a row a load ─────────────────────────────────────────────────────────────────────────────────

Cell = Callable[[PhaseSummary], str]


def _done(phase: PhaseSummary) -> str:
    return f"{phase.requests.completed:,} of {phase.requests.sent:,}"


def _chunk_gap(phase: PhaseSummary) -> str:
    known = phase.chunk_is_step is not False
    return _MS(dist(phase, "chunk_gap_s").p50) if known else units.MISSING


def _due(phase: PhaseSummary, latency: str) -> Distribution:
    return dist(phase, f"{latency}_intended_s")


_MS, _RATE = units.milliseconds, units.figure
_DUE = "intended\nms"
OPEN = ("TTFT p50 from intended", "TTFT p95 from intended", "send delay", "E2EL from intended")
"""Columns that only an open loop has."""

FIGURES: tuple[tuple[str, str, int, Cell], ...] = (
    ("load", "load", 0, lambda p: load_label(p.load)),
    ("repeat", "repeat", 0, lambda p: str(p.repeat + 1)),
    ("requests\ndone of\nsent", "requests", 6, _done),
    ("output\nsteady\ntok/s", "steady output", 1, lambda p: _RATE(p.throughput.steady)),
    ("output\nwhole\ntok/s", "whole output", 5, lambda p: _RATE(p.throughput.whole)),
    ("user\np50\ntok/s", "user speed", 1, lambda p: _RATE(dist(p, "user_tokens_per_s").p50)),
    ("goodput\nreq/s", "goodput", 2, lambda p: _RATE(p.goodput_rps)),
    ("TTFT\np50\nms", "TTFT p50", 8, lambda p: _MS(dist(p, "ttft_s").p50)),
    ("TTFT\np95\nms", "TTFT p95", 3, lambda p: _MS(dist(p, "ttft_s").p95)),
    (f"TTFT p50\n{_DUE}", "TTFT p50 from intended", 13, lambda p: _MS(_due(p, "ttft").p50)),
    (f"TTFT p95\n{_DUE}", "TTFT p95 from intended", 2, lambda p: _MS(_due(p, "ttft").p95)),
    ("send\ndelay\np95 ms", "send delay", 10, lambda p: _MS(dist(p, "send_delay_s").p95)),
    ("TPOT\np50\nms", "TPOT", 4, lambda p: _MS(dist(p, "tpot_s").p50)),
    ("step\ntime\nms", "step time", 5, lambda p: _MS(p.step_time_s)),
    ("chunk\ngap p50\nms", "chunk gap", 14, _chunk_gap),
    ("E2EL\np50\nms", "E2EL", 15, lambda p: _MS(dist(p, "e2el_s").p50)),
    (f"E2EL p50\n{_DUE}", "E2EL from intended", 14, lambda p: _MS(_due(p, "e2el").p50)),
)
"""Head, name, drop and cell of the columns that are not acceptance, in the order of reading."""


def loads(rows: Sequence[Row], width: int, marks: Column | None = None) -> Section:
    """The table of loads and the notes that belong to it; `marks` is its last column."""
    if not rows:
        return []
    phases = [phase for _, phase in rows]
    absent = {
        "repeat": not any(p.repeat for p in phases),
        "chunk gap": all(p.chunk_is_step is False for p in phases),
        "goodput": all(p.goodput_rps is None for p in phases),
        **dict.fromkeys(OPEN, not any(isinstance(p.load, OpenLoop) for p in phases)),
    }
    figures = [f for f in FIGURES if not absent.get(f[1])]
    drops = {"AL": 2, "AL where drafted": 7, "draft coverage": 4, "acceptance rate": 13}
    in_flight = [units.whole(p.achieved_concurrency_p50) for p in phases]
    at_server = [units.whole((p.server or ServerContext()).in_flight_p50) for p in phases]
    told = {*at_server} != {units.MISSING}
    columns = [
        *([Column("run", [run for run, _ in rows], left=True)] if rows[0][0] else []),
        *(Column(head, [*map(cell, phases)], drop, name) for head, name, drop, cell in figures),
        *page.acceptance_columns([*map(page.best, phases)], drops),
        Column("in\nflight\np50", in_flight, 12, "in flight"),
        *([Column("at\nserver\np50", at_server, 11, "at server")] if told else []),
        *([marks] if marks is not None else []),
    ]
    return [*page.grid(columns, width), *_notes(rows, width)]


def _notes(rows: Sequence[Row], width: int) -> Section:
    """Why a steady figure is missing, what of a phase is none, and the steps of a step time."""
    why = page.grouped((p.throughput.why_not_steady, page.load_label(run, p)) for run, p in rows)
    notes = [f"No steady figure at {page.listed(at)}: {text}." for text, at in why.items() if text]
    around = [
        f"{units.percent(p.throughput.ramp_share)} and {units.percent(p.throughput.drain_share)} "
        f"at {page.load_label(run, p)}"
        for run, p in rows
        if p.throughput.ramp_share is not None
    ]
    if around:
        notes.append(f"Ramp and drain of the phase: {page.listed(around)}.")
    sources = dict.fromkeys(p.step_time_source for _, p in rows if p.step_time_source)
    if sources:
        notes.append(f"Steps behind the step time: {page.listed(sources)}.")
    return [line for note in notes for line in wrapped(note, width, style="dim")]


def plot(runs: Sequence[tuple[str, Summary]], width: int) -> Section:
    """A curve a run."""
    found = [(run, s.info.server, [p for p in s.phases if p.measured]) for run, s in runs]
    return pareto.plot(found, width)


def server(rows: Sequence[Row], width: int) -> Section:
    """What the server says of its queue and its memory, a row a load."""
    told = [(row, row[1].server) for row in rows if row[1].server is not None]
    if not told:
        return []
    cells: tuple[tuple[str, str, int, Callable[[ServerContext], str]], ...] = (
        ("running\np50", "running", 0, lambda s: units.whole(s.running_p50)),
        ("waiting\np50", "waiting p50", 2, lambda s: units.whole(s.waiting_p50)),
        ("waiting\nmax", "waiting", 1, lambda s: units.whole(s.waiting_max)),
        ("KV cache\nmax %", "KV cache", 3, lambda s: units.hundredths(s.kv_cache_use_max)),
        ("prefix\nhits %", "prefix hits", 5, lambda s: units.hundredths(s.prefix_hit_share)),
        ("preempted", "preemptions", 4, lambda s: units.count(s.preemptions)),
        ("queue\nmean ms", "queue time", 6, lambda s: _MS(s.queue_time_s)),
    )
    columns = [
        Column("load", [page.load_label(*row) for row, _ in told], left=True),
        *(Column(head, [cell(s) for _, s in told], drop, name) for head, name, drop, cell in cells),
    ]
    kept = [c for c in columns if {*c.cells} != {units.MISSING}]
    title = wrapped("The server's own account, one reading a second", width, style="bold")
    return [*title, *page.grid(kept, width)] if len(kept) > 1 else []


def categories(runs: Iterable[Sequence[Row]], width: int) -> list[Section]:
    """The category block of every run: of its phase with the most dialogues."""
    blocks = []
    for rows in runs:
        known = [row for row in rows if row[1].categories]
        if not known:
            continue
        run, phase = max(
            known, key=lambda r: (len(r[1].dialogues), load_order(r[1].load), -r[1].repeat)
        )
        others = " (the phase with the most dialogues)" if len(known) > 1 else ""
        title = f"{run} By category at {page.load_label('', phase)}{others}, {page.batch(phase)}"
        of, found = phase.categories, [c.acceptance or page.NOTHING for c in phase.categories]
        before = [
            Column("category", [page.short(c.category) for c in of], left=True),
            Column("requests", [units.count(c.requests) for c in of], 3, "requests"),
            Column(
                "user p50\ntok/s", [_RATE(c.user_tokens_per_s.p50) for c in of], 2, "user speed"
            ),
            *page.acceptance_columns(found, {"steps": 4, "AL": 1, "interval": 1}),
        ]
        points = [(a.acceptance_length, a.interval) for a in found]
        after = page.acceptance_columns(found, {"AL where drafted": 5})
        steps = [a.steps for a in found]
        blocks.append(page.CategoryBlock(title, before, points, after, steps))
    return page.category_blocks(blocks, width)
