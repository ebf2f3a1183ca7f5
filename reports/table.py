"""The report of one or more runs: a verdict sentence, a row a load, acceptance, caveats, paths.

The upper half lays text out (also for the other text reports): whatever comes from outside is made
harmless in `clean`, prose wraps between figures and never inside one, and a table that is too wide
loses its least important columns and says which. Must not: compute a figure, talk to a server, read
the environment: the same study gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import StringIO

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

from loadgen.types import (
    Acceptance,
    Interval,
    PhaseSummary,
    RequestCounts,
    RunInfo,
    Sampling,
    Scenario,
    ServerInfo,
    Study,
    Summary,
)
from reports import units
from reports.units import MISSING

Section = list[Text]
"""Lines that belong together; a page has a blank line between sections."""

FEW_STEPS = 30
"""A category with fewer decode steps is marked: its interval is wide and may mislead."""

WIDEST_NAME = 24
PROSE = 110
"""Longer lines of prose are hard to follow, however wide the page is."""

# ── layout ───────────────────────────────────────────────────────────────────────────────────────


def clean(text: str) -> str:
    """Text from outside, harmless in a terminal: one line, control characters spelled out."""
    return "".join(
        c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode()
        for c in text
    )


_WHOLE = re.compile(
    r"\[[^\[\]]{1,30}\]|\d (?:ms|µs|s|%|tok/s|tokens?|steps?)(?!\w)|\d+ of \d|k = \d|at c=\d"
)


def wrapped(text: str, width: int, first: str = "", rest: str = "", style: str = "") -> Section:
    """`text` in lines of at most `width` cells, `first` and `rest` before them.

    A figure and its unit, and an interval, stay on one line.
    """
    text = _WHOLE.sub(lambda found: found[0].replace(" ", "\0"), clean(text))
    width = min(width, PROSE)
    lines, line, empty = [], first, True
    for word in (w.replace("\0", " ") for w in text.split(" ") if w):
        if not empty and cell_len(line) + 1 + cell_len(word) > width:
            lines.append(line)
            line, empty = rest, True
        room = max(width - cell_len(line), 8)
        *full, word = chop_cells(word, room) if empty and cell_len(word) > room else [word]
        for part in full:
            lines.append(line + part)
            line = rest
        line, empty = line + ("" if empty else " ") + word, False
    return [Text(part, style=style) for part in (*lines, line)]


def title(text: str, width: int) -> Section:
    """The heading of a section."""
    return wrapped(text, width, style="bold")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table. `drop` 0 stays; the highest goes first when the page is narrow."""

    head: str
    cells: tuple[str, ...]
    drop: int = 0
    left: bool = False
    name: str = ""

    def texts(self) -> tuple[str, tuple[str, ...]]:
        """Head and cells padded to one width: to the left, or with decimal points in line."""
        heads = [clean(part) for part in self.head.split("\n")]
        cells = tuple(map(clean, self.cells))
        if not self.left:
            tails = [len(c) - c.find(".") if _BARE.fullmatch(c) and "." in c else 0 for c in cells]
            cells = tuple(
                c + " " * (max(tails) - tail) for c, tail in zip(cells, tails, strict=True)
            )
        width = max(map(cell_len, (*heads, *cells)))

        def padded(text: str) -> str:
            space = " " * (width - cell_len(text))
            return text + space if self.left else space + text

        return "\n".join(map(padded, heads)), tuple(map(padded, cells))

    def __len__(self) -> int:
        return cell_len(self.texts()[0].split("\n")[0])


_BARE = re.compile(r"[\d,.]+|–")


def span(columns: Sequence[Column]) -> int:
    """How many cells the columns take side by side."""
    return sum(map(len, columns)) + 2 * (len(columns) - 1)


def fitted(columns: Sequence[Column], width: int) -> tuple[list[Column], list[str]]:
    """The columns that fit into `width` cells, and the names of those that had to go.

    A column in which nothing was measured goes before any other.
    """
    kept = list(columns)
    while span(kept) > width and any(c.drop for c in kept):
        kept.remove(
            max((c for c in kept if c.drop), key=lambda c: (set(c.cells) == {MISSING}, c.drop))
        )
    return kept, [c.name or c.head.replace("\n", " ") for c in columns if c not in kept]


def grid(columns: Sequence[Column], width: int, *, tell: bool = True) -> Section:
    """A table of the columns that fit; `tell` names the others in a note below it."""
    kept, dropped = fitted(columns, width)
    heads, cells = zip(*(column.texts() for column in kept), strict=True)
    height = max(head.count("\n") + 1 for head in heads)
    above = [_risen(head, height) for head in heads]
    section = [Text("  ".join(line), style="dim") for line in zip(*above, strict=True)]
    section.append(Text("─" * span(kept), style="dim"))
    section += [Text("  ".join(line)) for line in zip(*cells, strict=True)]
    for line in section:
        line.truncate(width, overflow="ellipsis")
    note = f"Not shown at {width} columns: {', '.join(dropped)}." if dropped and tell else ""
    return section + (wrapped(note, width, style="dim") if note else [])


def _risen(head: str, height: int) -> list[str]:
    """The lines of a head, blank ones above it: heads stand on the rule."""
    lines = head.split("\n")
    return [" " * cell_len(lines[0])] * (height - len(lines)) + lines


def page(sections: Iterable[Section], study: Study) -> str:
    """The sections that hold something, a blank line between them."""
    out = StringIO()
    console = Console(
        file=out,
        width=study.width,
        height=25,  # with a height given, rich asks neither terminal nor environment
        force_terminal=study.color,
        no_color=not study.color,
        color_system="standard" if study.color else None,
        legacy_windows=False,
        force_jupyter=False,
        highlight=False,
        emoji=False,
        markup=False,
    )
    for number, section in enumerate(s for s in sections if s):
        if number:
            console.print()
        for line in section:
            console.print(line, soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").split("\n")) + "\n"


def short(name: str) -> str:
    """A name that a table can hold."""
    name = clean(name)
    return name if cell_len(name) <= WIDEST_NAME else chop_cells(name, WIDEST_NAME - 1)[0] + "…"


def listed(words: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


def bar(share: float | None, width: int = 16) -> str:
    """A share 0…1 as a horizontal bar, to an eighth of a cell."""
    eighths = round(min(max(share or 0.0, 0.0), 1.0) * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


Point = tuple[float | None, Interval | None]


@dataclass(frozen=True)
class Scale:
    """Where a value stands in `width` cells from `low` to `high`; 1 is always on it."""

    low: float
    high: float
    width: int

    def cell(self, value: float) -> int:
        share = (value - self.low) / (self.high - self.low)
        return min(max(round(share * (self.width - 1)), 0), self.width - 1)

    def head(self, unit: str) -> str:
        """The ends, and 1 where it does not touch them."""
        left, right = (f"{units.number(end)}{unit}" for end in (self.low, self.high))
        line = f"{left}{right:>{self.width - len(left)}}"
        at, one = self.cell(1.0), f"1{unit}"
        room = line[max(at - 1, 0) : at + len(one) + 1]
        return line[:at] + one + line[at + len(one) :] if not room.strip() else line

    def row(self, value: float | None, around: Interval | None) -> str:
        """The value with its interval, a dotted line at 1; arrows where the interval goes on."""
        line = [" "] * self.width
        one = self.cell(1.0)
        line[one] = "┊"
        if around is not None:
            for at in range(self.cell(around.low), self.cell(around.high) + 1):
                line[at] = "┼" if at == one else "─"
            line[0] = "◂" if around.low < self.low else line[0]
            line[-1] = "▸" if around.high > self.high else line[-1]
        if value is not None:
            line[self.cell(value)] = "●"
        return "".join(line)


def scale(points: Sequence[Point], width: int) -> Scale:
    """Spans the values, and their intervals up to twice as far from 1 as any value."""
    values = [value for value, _ in points if value is not None] or [1.0]
    ends = [end for _, i in points if i is not None for end in (i.low, i.high)]
    reach = 2 * max(abs(value - 1) for value in values) or 0.5
    low = max(min(*values, *ends, 1.0), 1 - reach)
    return Scale(low, max(min(max(*values, *ends, 1.0), 1 + reach), low + 0.1), width)


def plotted(
    columns: list[Column],
    at: int,
    points: Sequence[Point],
    width: int,
    unit: str = "",
    beside: Sequence[Point] = (),
) -> list[Column]:
    """The columns with whiskers as column `at`, where the page has room for them.

    `beside` are points of other tables that share the scale.
    """
    room = min(width - span(columns) - 2, 31)
    if room < 15 or all(interval is None for _, interval in points):
        return columns
    drawn = scale([*points, *beside], room)
    rows = tuple(drawn.row(value, around) for value, around in points)
    plot = Column(head=drawn.head(unit), cells=rows, left=True)
    return [*columns[:at], plot, *columns[at:]]


# ── words for what was run ───────────────────────────────────────────────────────────────────────


def load_label(phase: PhaseSummary) -> str:
    """'c=8', as the flag -c has it; later repeats say so."""
    again = f" repeat {phase.repeat + 1}" if phase.repeat else ""
    return f"c={phase.load.concurrency}{again}"


UNKNOWN = "speculation unknown"


def speculation(server: ServerInfo) -> str:
    """'ngram k = 3', 'no speculation', or that it is not known."""
    if server.state == "off":
        return "no speculation"
    spec = server.config.spec if server.config is not None else None
    depth = spec.draft_depth or spec.draft_tokens if spec is not None else None
    depth = depth or server.draft_depth
    name = spec.method if spec is not None else server.spec_reported
    if name is None and server.state == "unknown":
        return UNKNOWN
    return (name or "speculation") + (f" k = {depth}" if depth else "")


def subject(server: ServerInfo) -> str:
    """'smollm2 on llamacpp with ngram k = 3'."""
    what = speculation(server)
    if server.state == "off":
        what = "without speculation"
    elif what != UNKNOWN:
        what = f"with {what}"
    else:
        what = f"({what})"
    return f"{server.model} on {server.engine} {what}"


def trouble(summary: Summary) -> str:
    """What a reader must know before any figure: '' for a clean run, else '…; '."""
    counts = total(p.requests for p in summary.phases)
    said = []
    if summary.end is None:
        said.append("unfinished run, its end was not recorded")
    elif summary.end != "completed":
        said.append(f"run {summary.end}")
    kinds = ((counts.refused, "refused"), (counts.broke, "broke"), (counts.timed_out, "timed out"))
    failed = [f"{count:,} {kind}" for count, kind in kinds if count]
    if failed:
        sum_ = counts.refused + counts.broke + counts.timed_out
        said.append(f"{sum_:,} of {counts.sent:,} requests failed ({listed(failed)})")
    return "".join(f"{part}; " for part in said)


def total(counts: Iterable[RequestCounts]) -> RequestCounts:
    """The sum over phases."""
    every = tuple(counts)
    names = RequestCounts.__struct_fields__
    return RequestCounts(**{name: sum(getattr(c, name) for c in every) for name in names})


def measured(summary: Summary) -> list[PhaseSummary]:
    """The phases that count, in the order in which they ran."""
    return [phase for phase in summary.phases if phase.measured]


def best(phase: PhaseSummary) -> Acceptance | None:
    """The first source, or None."""
    return phase.acceptance[0] if phase.acceptance else None


def quantile(phase: PhaseSummary, name: str, part: str) -> float | None:
    """One figure of a distribution; None where it is absent."""
    distribution = phase.distributions.get(name)
    value: float | None = getattr(distribution, part) if distribution is not None else None
    return value


def length(acceptance: Acceptance | None) -> str:
    """Acceptance length as a cell: '1.51', or its range, or a dash."""
    if acceptance is None:
        return MISSING
    if acceptance.acceptance_length is None:
        return units.interval(acceptance.interval)
    return units.number(acceptance.acceptance_length)


def length_between(acceptance: Acceptance | None) -> str:
    """Acceptance length with its interval: '1.51 [1.40, 1.63]'."""
    text = length(acceptance)
    if acceptance is None or acceptance.acceptance_length is None or acceptance.interval is None:
        return text
    return f"{text} {units.interval(acceptance.interval)}"


# ── verdict and header ───────────────────────────────────────────────────────────────────────────


def verdict(summaries: Sequence[Summary]) -> str:
    """The one sentence: troubles first, then acceptance and speed at the highest load."""
    several = len(summaries) > 1
    parts = [
        (f"[{number}] " if several else "") + _sentence(summary)
        for number, summary in enumerate(summaries, 1)
    ]
    text = (f"{len(summaries)} runs: " if several else "") + "; ".join(parts) + "."
    return text[0].upper() + text[1:] if text.startswith(("run ", "unfinished ")) else text


def _sentence(summary: Summary) -> str:
    server = summary.info.server
    start = ("SIMULATED: " if server.simulated else "") + trouble(summary) + subject(server)
    phases = measured(summary)
    if not phases:
        return f"{start}: nothing was measured"
    phase = max(phases, key=lambda p: (p.load.concurrency, -p.repeat))
    said = [text for text in (_acceptance_words(best(phase)), _speed_words(phase)) if text]
    counts = total(p.requests for p in phases)
    done = f"{counts.completed:,} of {counts.sent:,} requests completed"
    cancelled = f", {counts.cancelled:,} cancelled" if counts.cancelled else ""
    return f"{start}: at concurrency {phase.load.concurrency}, {', '.join(said)}; {done}{cancelled}"


def _acceptance_words(acceptance: Acceptance | None) -> str:
    if acceptance is None or acceptance.state == "off":
        return ""
    if acceptance.acceptance_length is None and acceptance.interval is None:
        why = acceptance.why_missing
        return "no acceptance length" + (f" ({why})" if why else "")
    steps = acceptance.steps
    over = f" over {units.count(steps)} decode steps" if steps is not None else ""
    return f"acceptance length {length_between(acceptance)}{over}"


def _speed_words(phase: PhaseSummary) -> str:
    steady, whole = phase.throughput.steady, phase.throughput.whole
    user = quantile(phase, "user_tokens_per_s", "p50")
    said = []
    if steady is not None or whole is not None:
        basis = "steady" if steady is not None else "whole phase"
        said.append(f"{units.rate(steady if steady is not None else whole)} ({basis})")
    if user is not None:
        said.append(f"{units.rate(user)} a user")
    return " and ".join(said) or "no speed measured"


def facts(info: RunInfo) -> dict[str, str]:
    """The header of a run: what, on what, how asked, from where."""
    server, client, scenario = info.server, info.client, info.scenario
    engine = [f"{server.engine} {server.version or 'version unknown'}"]
    if server.max_running is not None:
        engine.append(f"at most {units.count(server.max_running)} running")
    if server.max_model_len is not None:
        engine.append(f"context {units.count(server.max_model_len)}")
    if server.api == "chat":
        engine.append("chat API: the server templates the prompts")
    reported = f" (reported: {server.spec_reported})" if server.spec_reported else ""
    loads = listed([f"c={load.concurrency}" for load in scenario.loads])
    return {
        "model": server.model,
        "engine": ("SIMULATED, there is no model: " if server.simulated else "")
        + ", ".join(engine),
        "speculation": speculation(server) + reported,
        "scenario": f"{scenario.name} at {loads}{_stop(scenario)}",
        "sampling": _sampling(scenario.sampling),
        "client": f"draftload {client.draftload}, Python {client.python}, aiohttp "
        f"{client.aiohttp}, {client.loop}, {client.cores} cores, {client.machine}",
        "started": info.started_at,
    }


def _stop(scenario: Scenario) -> str:
    stop, again = scenario.stop, scenario.repeats
    requests = f", {units.count(stop.requests)} dialogues a load" if stop.requests else ""
    time = f", {units.duration(stop.duration_s)} a load" if stop.duration_s else ""
    return requests + time + (f", {again} repeats" if again > 1 else "")


def _sampling(sampling: Sampling) -> str:
    seed = f", seed {sampling.seed}" if sampling.seed is not None else ""
    end = ", EOS ignored" if sampling.ignore_eos else ""
    return (
        f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}{seed}, at most "
        f"{units.count(sampling.max_output_tokens)} output tokens{end}"
    )


def header(runs: Sequence[tuple[str, RunInfo]], width: int) -> Section:
    """Facts that all runs share once, others a line a run, under the run's label."""
    every = [(label, facts(info)) for label, info in runs]
    rows: list[tuple[str, str]] = []
    for key in every[0][1]:
        if len({known[key] for _, known in every}) == 1:
            rows.append((key, every[0][1][key]))
        else:
            rows += [(f"{key} {label}", known[key]) for label, known in every]
    indent = max(cell_len(key) for key, _ in rows) + 2
    section: Section = []
    for key, value in rows:
        lines = wrapped(value, width, key.ljust(indent), " " * indent)
        for line in lines:
            line.stylize("dim", 0, indent)
        section += lines
    return section


# ── a row a load ─────────────────────────────────────────────────────────────────────────────────

Row = tuple[str, PhaseSummary]
"""A run's label ('' where there is one run) and one of its phases."""


def rows_of(study: Study) -> list[Row]:
    """Every measured phase of every run."""
    several = len(study.summaries) > 1
    return [
        (f"[{number}]" if several else "", phase)
        for number, summary in enumerate(study.summaries, 1)
        for phase in measured(summary)
    ]


def _name(row: Row) -> str:
    return f"{row[0]} {load_label(row[1])}".strip()


def loads(rows: Sequence[Row], width: int) -> Section:
    """The table of loads and the notes that belong to it."""
    if not rows:
        return []
    return [*grid(load_columns(rows), width), *_load_notes(rows, width)]


def load_columns(rows: Sequence[Row]) -> list[Column]:
    """All columns, in the order of reading; `drop` says in which order they go."""
    phases = [phase for _, phase in rows]
    columns: list[Column] = []

    def add(head: str, name: str, drop: int, cell: Callable[[PhaseSummary], str]) -> None:
        columns.append(Column(head=head, name=name, drop=drop, cells=tuple(map(cell, phases))))

    def dist(metric: str, part: str, text: Callable[[float | None], str]) -> Callable[..., str]:
        return lambda p: text(quantile(p, metric, part))

    ms, rate = units.milliseconds, units.figure
    if any(label for label, _ in rows):
        columns.append(Column(head="run", cells=tuple(label for label, _ in rows), left=True))
    add("load", "load", 0, lambda p: f"c={p.load.concurrency}")
    if any(p.repeat for p in phases):
        add("repeat", "repeat", 0, lambda p: str(p.repeat + 1))
    add("requests\ndone of\nsent", "requests", 3, _done)
    add("output\nsteady\ntok/s", "steady output", 1, lambda p: rate(p.throughput.steady))
    add("output\nwhole\ntok/s", "whole output", 9, lambda p: rate(p.throughput.whole))
    add("user\np50\ntok/s", "user speed", 1, dist("user_tokens_per_s", "p50", rate))
    add("TTFT\np50\nms", "TTFT p50", 4, dist("ttft_s", "p50", ms))
    add("TTFT\np95\nms", "TTFT p95", 5, dist("ttft_s", "p95", ms))
    add("TPOT\np50\nms", "TPOT", 8, dist("tpot_s", "p50", ms))
    add("step\ntime\nms", "step time", 10, lambda p: ms(p.step_time_s))
    if any(p.chunk_is_step is not False for p in phases):
        add("chunk\ngap p50\nms", "chunk gap", 14, _chunk_gap)
    add("E2EL\np50\nms", "E2EL", 15, dist("e2el_s", "p50", ms))
    if any(a.state != "off" for p in phases for a in p.acceptance):
        add("AL", "AL", 2, lambda p: length(best(p)))
        add("AL where\ndrafted", "AL where drafted", 6, _of_best("acceptance_length_drafted"))
        share = units.hundredths
        add("draft\ncoverage\n%", "coverage", 7, _of_best("draft_coverage", share))
        add("accept.\nrate\n%", "acceptance rate", 13, _of_best("acceptance_rate", share))
    add("in\nflight\np50", "in flight", 12, lambda p: units.whole(p.achieved_concurrency_p50))
    return columns


def _done(phase: PhaseSummary) -> str:
    return f"{phase.requests.completed:,} of {phase.requests.sent:,}"


def _chunk_gap(phase: PhaseSummary) -> str:
    if phase.chunk_is_step is False:
        return MISSING
    return units.milliseconds(quantile(phase, "chunk_gap_s", "p50"))


def _of_best(
    field: str, text: Callable[[float | None], str] = units.number
) -> Callable[[PhaseSummary], str]:
    def cell(phase: PhaseSummary) -> str:
        acceptance = best(phase)
        return text(getattr(acceptance, field)) if acceptance is not None else MISSING

    return cell


def _load_notes(rows: Sequence[Row], width: int) -> Section:
    """Why a steady figure is missing, and what a step time was divided by."""
    why: dict[str, list[str]] = {}
    for row in rows:
        throughput = row[1].throughput
        if throughput.steady is None and throughput.why_not_steady:
            why.setdefault(throughput.why_not_steady, []).append(_name(row))
    notes = [f"No steady figure at {listed(names)}: {reason}." for reason, names in why.items()]
    sources = dict.fromkeys(p.step_time_source for _, p in rows if p.step_time_source)
    if sources:
        notes.append(f"Steps behind the step time: {listed(list(sources))}.")
    return [line for note in notes for line in wrapped(note, width, style="dim")]


# ── acceptance ───────────────────────────────────────────────────────────────────────────────────


def acceptance_lines(rows: Sequence[Row], width: int) -> Section:
    """Every source, best first: what it is, and under it its acceptance length at every load."""
    groups: dict[str, list[tuple[Row, Acceptance]]] = {}
    for row in rows:
        for acceptance in row[1].acceptance:
            if acceptance.state != "off":
                groups.setdefault(acceptance.source, []).append((row, acceptance))
    section: Section = []
    for number, (source, members) in enumerate(groups.items()):
        first = "AL" if number == 0 else "AL, second source"
        found = ["pooled over steps", f"from {source}"] if source != "none" else ["not measured"]
        about = [f"{first}: {found[0]}", *found[1:], *_about(a for _, a in members)]
        section += wrapped(", ".join(about), width, rest="  ")
        indent = max(cell_len(_name(row)) for row, _ in members) + 2
        for row, acceptance in members:
            name = "  " + _name(row).ljust(indent)
            section += wrapped(_length_words(acceptance), width, name, " " * len(name))
    return section + _by_dialogue(rows, width)


def _about(members: Iterable[Acceptance]) -> list[str]:
    """Where one source's steps come from, and what its intervals are."""
    found = [a for a in members if length(a) != MISSING]
    steps = dict.fromkeys(a.steps_source for a in found if a.steps_source)
    kinds = dict.fromkeys(a.interval.kind for a in found if a.interval is not None)
    about = [f"steps from {listed(list(steps))}"] if steps else []
    if found and not steps:
        about = ["the number of steps is not known"]
    if any(a.unverified for a in found):
        about.append("chunks taken for steps: unverified")
    return [*about, *([f"intervals: {listed(list(kinds))}"] if kinds else [])]


def _length_words(acceptance: Acceptance) -> str:
    if length(acceptance) == MISSING:
        return MISSING + (f" ({acceptance.why_missing})" if acceptance.why_missing else "")
    text = length_between(acceptance)
    if acceptance.steps is not None:
        text += f" over {units.count(acceptance.steps)} steps"
    parts = []
    if acceptance.acceptance_length_drafted is not None:
        parts.append(f"where drafted {units.number(acceptance.acceptance_length_drafted)}")
    if acceptance.draft_coverage is not None:
        parts.append(f"coverage {units.percent(acceptance.draft_coverage)}")
    if acceptance.overrun_tokens:
        parts.append(f"{units.count(acceptance.overrun_tokens)} tokens drafted past the end")
    return "; ".join([text, ", ".join(parts)]) if parts else text


def _by_dialogue(rows: Sequence[Row], width: int) -> Section:
    said = [
        f"{units.number(a.acceptance_length_by_dialogue)} at {_name(row)}"
        for row in rows
        if (a := best(row[1])) is not None and a.acceptance_length_by_dialogue is not None
    ]
    if not said:
        return []
    what = "AL by dialogue: mean over dialogues, each turn's prefill a step of 1 (SPEED-Bench's)"
    return wrapped(f"{what}: {', '.join(said)}", width, rest="  ")


def categories(study: Study) -> Section:
    """The category block of every run: of its phase with the most dialogues."""
    section: Section = []
    several = len(study.summaries) > 1
    for number, summary in enumerate(study.summaries, 1):
        phases = [p for p in measured(summary) if p.categories]
        if not phases:
            continue
        phase = max(
            phases,
            key=lambda p: (len(p.dialogues), p.requests.completed, p.load.concurrency, -p.repeat),
        )
        others = " (the phase with the most dialogues)" if len(phases) > 1 else ""
        run = f"[{number}] " if several else ""
        text = f"{run}By category at {load_label(phase)}{others}, in the mixed batch"
        section += [*([Text()] if section else []), *title(text, study.width)]
        section += grid(_category_columns(phase, study.width), study.width, tell=False)
        section += few_steps_note(
            [c.acceptance.steps for c in phase.categories if c.acceptance], study.width
        )
    return section


def _category_columns(phase: PhaseSummary, width: int) -> list[Column]:
    rows = phase.categories
    found = [c.acceptance for c in rows]
    columns = [
        Column(head="category", cells=tuple(short(c.category) for c in rows), left=True),
        Column(head="requests", cells=tuple(units.count(c.requests) for c in rows), drop=3),
        Column(
            head="user p50\ntok/s",
            cells=tuple(units.figure(c.user_tokens_per_s.p50) for c in rows),
            drop=2,
        ),
    ]
    if all(a is None or a.state == "off" for a in found):
        return columns
    columns += length_columns(found)
    points = [(a.acceptance_length, a.interval) if a else (None, None) for a in found]
    few = few_column([a.steps if a else None for a in found])
    return plotted([*columns, few], 6, points, width)


def length_columns(found: Sequence[Acceptance | None], *, interval: bool = True) -> list[Column]:
    """Steps, AL (with its interval if wanted) and AL where drafted: a row a category."""
    drafted = tuple(units.number(a.acceptance_length_drafted if a else None) for a in found)
    steps = tuple(units.count(a.steps if a else None) for a in found)
    between = tuple(units.interval(a.interval if a else None) for a in found)
    return [
        Column(head="steps", cells=steps, drop=4),
        Column(head="AL", cells=tuple(map(length, found)), drop=1),
        *([Column(head="interval", cells=between, drop=1)] if interval else []),
        Column(head="AL where\ndrafted", cells=drafted, drop=5),
    ]


def few_column(steps: Sequence[int | None]) -> Column:
    """The mark of a category with too few decode steps."""
    few = tuple("few steps" if s is not None and s < FEW_STEPS else "" for s in steps)
    return Column(head="", cells=few, drop=1, left=True)


def few_steps_note(steps: Sequence[int | None], width: int) -> Section:
    """What the mark means, where it stands."""
    if not any(s is not None and s < FEW_STEPS for s in steps):
        return []
    return wrapped(
        f"Few steps: under {FEW_STEPS} decode steps, too few for a verdict.", width, style="dim"
    )


def positions(rows: Sequence[Row], width: int) -> Section:
    """Joint and conditional acceptance by draft position, of one run's phase with most steps."""
    found = [
        (row, a) for row in rows for a in row[1].acceptance[:1] if a.joint_by_position is not None
    ] or [(row, a) for row in rows for a in row[1].acceptance if a.joint_by_position is not None]
    if not found:
        return []
    row, acceptance = max(found, key=lambda pair: (pair[1].steps or 0, pair[0][1].load.concurrency))
    joint = acceptance.joint_by_position or ()
    conditional = acceptance.conditional_by_position or (None,) * len(joint)
    last = max((j for j, share in enumerate(joint, 1) if share > 0), default=1)
    exact = "" if acceptance.positions_exact else "; not drafted counts as rejected"
    text = f"Acceptance by draft position at {_name(row)}, from {acceptance.source}{exact}"
    columns = [
        Column(head="position", cells=tuple(str(j) for j in range(1, last + 1))),
        Column(head="joint\n%", cells=tuple(map(units.hundredths, joint[:last]))),
        Column(head="", cells=tuple(map(bar, joint[:last])), left=True, drop=1),
        Column(head="conditional\n%", cells=tuple(map(units.hundredths, conditional[:last]))),
        Column(head="", cells=tuple(map(bar, conditional[:last])), left=True, drop=1),
    ]
    rest = f"Nothing was accepted at positions {last + 1} to {len(joint)}."
    tail = wrapped(rest, width, style="dim") if last < len(joint) else []
    return [*title(text, width), *grid(columns, width, tell=False), *tail]


# ── caveats and paths ────────────────────────────────────────────────────────────────────────────


def caveats(runs: Sequence[tuple[str, Summary]], width: int) -> Section:
    """Each caveat once, with the runs and loads it is about; its advice under it."""
    groups: dict[tuple[str, str], dict[str, Places]] = {}
    for run, summary in runs:
        names = {phase.name: load_label(phase) for phase in summary.phases}
        for caveat in summary.caveats:
            messages = groups.setdefault((caveat.code, caveat.advice), {})
            loads = messages.setdefault(caveat.message, {}).setdefault(run, [])
            if caveat.phase is not None:
                loads.append(names.get(caveat.phase, caveat.phase))
    if not groups:
        return []
    section = title("Caveats", width)
    for (code, advice), messages in groups.items():
        for message, places in messages.items():
            start = f"{code}{_places(places)}: {message}"
            section += wrapped(start, width, "  ", "    ", style="yellow")
        section += wrapped(f"→ {advice}", width, "    ", "      ")
    return section


Places = dict[str, list[str]]
"""Run label → the loads that a caveat is about; none: the whole run."""


def _places(places: Places) -> str:
    if len({tuple(loads) for loads in places.values()}) == 1:
        loads = list(dict.fromkeys(next(iter(places.values()))))
        said = [" at ".join(filter(None, (listed(list(places)), listed(loads))))]
    else:
        said = [f"{run} at {listed(loads)}" if loads else run for run, loads in places.items()]
    return f" ({', '.join(said)})" if any(said) else ""


def paths(study: Study, labels: Sequence[str]) -> Section:
    """Where the figures come from: `labels` are those of the runs."""
    section: Section = []
    for path, label in zip(study.paths, labels, strict=False):
        start = f"run file {label} " if label else "run file "
        section += wrapped(path, study.width, start, "  ", style="dim")
    return section


def render(study: Study) -> str:
    """The report as text, `study.width` cells wide at most; colours only if `study.color`."""
    width, rows = study.width, rows_of(study)
    several = len(study.summaries) > 1
    labelled = [(f"[{n}]" if several else "", s) for n, s in enumerate(study.summaries, 1)]
    return page(
        (
            wrapped(verdict(study.summaries), width, style="bold"),
            header([(label, s.info) for label, s in labelled], width),
            loads(rows, width),
            acceptance_lines(rows, width),
            categories(study),
            *(positions([r for r in rows if r[0] == label], width) for label, _ in labelled),
            caveats(labelled, width),
            paths(study, [label for label, _ in labelled]),
        ),
        study,
    )
