"""What the text reports share: how text is laid out, and the blocks that stand in each of them.

Whatever comes from outside is made harmless in `clean`; prose wraps between figures and never
inside one; a table that is too wide loses its least important columns and says which. Must not:
compute a figure, talk to a server, read the environment: the same study gives the same bytes.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import NamedTuple, TypeVar

import msgspec
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

from loadgen.answers import BIMODAL
from loadgen.types import (
    Acceptance,
    ClosedLoop,
    Distribution,
    Interval,
    Load,
    PhaseSummary,
    RunInfo,
    ServerInfo,
    Study,
    Summary,
    Templating,
)
from loadgen.written import load_label as load_name
from loadgen.written import load_order
from reports import units
from reports.units import MISSING

Section = list[Text]
"""Lines that belong together; a page has a blank line between sections."""
Row = tuple[str, PhaseSummary]
"""A run's label ('' where there is one run) and one of its phases."""
Point = tuple[float | None, Interval | None]
K = TypeVar("K")
V = TypeVar("V")

PROSE = 110
"""Longer lines of prose are hard to follow, however wide the page is."""
WIDEST_NAME = 24
FEW_VALUES = 6
MOST_RUNS = 6
MOST_FILES = 3
"""More run files of one side and folder are named by the first and the last."""
WIDEST_PLOT = 31
WIDEST_BAR = 16
FEW_STEPS = 30
"""A category with fewer decode steps is marked: its interval is wide and may mislead."""
UNKNOWN = "speculation unknown"
NOTHING = Acceptance(source="none", state="off")
"""In the place of an acceptance that is not there."""

_WHOLE = re.compile(
    r"\[[^\[\]]{1,30}\]|\d (?:ms|µs|s|%|tok/s|tokens?|steps?)(?!\w)|\d+ of \d|k = \d"
    r"|at (?:c|rate)=\d"
)
"""A figure with its unit, or an interval: a line does not break in it."""
_BARE = re.compile(r"[\d,.]+|–")

# ── text ─────────────────────────────────────────────────────────────────────────────────────────


def clean(text: str) -> str:
    """Text from outside, harmless in a terminal: one line, control characters spelled out."""
    return "".join(
        c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode()
        for c in text
    )


def wrapped(text: str, width: int, first: str = "", rest: str = "", style: str = "") -> Section:
    """`text` in lines of at most `width` cells, `first` and `rest` before them."""
    text = _WHOLE.sub(lambda found: found[0].replace(" ", "\0"), clean(text))
    width = min(width, PROSE)
    room = max(width - max(cell_len(first), cell_len(rest)), 8)
    lines, line, gap = [], first, ""
    whole = (word.replace("\0", " ") for word in text.split(" "))
    for word in (part for parts in whole for part in chop_cells(parts, room)):
        if gap and cell_len(line + gap + word) > width:
            lines.append(line)
            line, gap = rest, ""
        line, gap = line + gap + word, " "
    return [Text(part, style=style) for part in (*lines, line)]


def short(name: str) -> str:
    """A name that a table can hold."""
    name = clean(name)
    return name if cell_len(name) <= WIDEST_NAME else chop_cells(name, WIDEST_NAME - 1)[0] + "…"


def listed(words: Iterable[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    *most, last = [*words] or [""]
    return f"{', '.join(most)} and {last}" if most else last


def joined(parts: Iterable[str]) -> str:
    """The parts that say something, a comma between them."""
    return ", ".join(filter(None, parts))


def grouped(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    """What belongs to each key, keys in the order in which they first come."""
    groups: dict[K, list[V]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def text_of(sections: Iterable[Section], study: Study) -> str:
    """The sections that hold something, a blank line between them."""
    console = Console(
        color_system="standard" if study.color else None, no_color=False, force_jupyter=False
    )
    with console.capture() as out:
        for section in filter(None, sections):
            console.print(*section, "", sep="\n", soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.get().rstrip("\n").split("\n")) + "\n"


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Column:
    """One column of a table. `drop` 0 stays; the highest goes first when the page is narrow."""

    head: str
    cells: Sequence[str]
    drop: int = 0
    name: str = ""
    left: bool = False

    def lines(self, height: int = 1) -> list[str]:
        """`height` lines of head, then the cells: of one width, decimal points in line."""
        heads, cells = [clean(h) for h in self.head.split("\n")], [clean(c) for c in self.cells]
        if not self.left:
            tails = [len(c) - c.find(".") if _BARE.fullmatch(c) and "." in c else 0 for c in cells]
            cells = [c + " " * (max(tails) - tail) for c, tail in zip(cells, tails, strict=True)]
        texts = [*[""] * (height - len(heads)), *heads, *cells]
        spaces = [" " * (max(map(cell_len, texts)) - cell_len(text)) for text in texts]
        pairs = zip(texts, spaces, strict=True)
        return [text + space if self.left else space + text for text, space in pairs]


def span(columns: Iterable[Column]) -> int:
    """How many cells the columns take side by side."""
    return sum(cell_len(column.lines()[0]) + 2 for column in columns) - 2


def fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """The columns without those that must go. One in which nothing was measured goes first."""
    kept = list(columns)
    while span(kept) > width and (loose := [c for c in kept if c.drop]):
        kept.remove(max(loose, key=lambda c: ({*c.cells} == {MISSING}, c.drop)))
    return kept


def grid(columns: Sequence[Column], width: int, *, tell: bool = True) -> Section:
    """A table of the columns that fit; `tell` names the others in a note below it."""
    kept = fitting(columns, width)
    height = max(column.head.count("\n") + 1 for column in kept)
    lines = ["  ".join(row) for row in zip(*(c.lines(height) for c in kept), strict=True)]
    section = [Text(line, style="dim") for line in (*lines[:height], "─" * span(kept))]
    section += map(Text, lines[height:])
    for line in section:
        line.truncate(width, overflow="ellipsis")
    dropped = [c.name for c in columns if c not in kept]
    told = wrapped(_not_shown(dropped, width), width, style="dim") if dropped and tell else []
    return section + told


def _not_shown(names: Iterable[str], width: int) -> str:
    return f"Not shown at {width} columns: {', '.join(names)}."


def bar(share: float) -> str:
    """A share 0…1 as a horizontal bar, to an eighth of a cell."""
    eighths = round(min(max(share, 0.0), 1.0) * WIDEST_BAR * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def whiskers(points: Sequence[Point], every: Sequence[Point], width: int, unit: str) -> Column:
    """Each value with its interval, a dotted line at 1, on a scale that fits `every` point.

    Values without a unit are lengths: a bar from 1 leads up to each. The scale spans the values,
    and their intervals up to twice as far from 1 as any value; arrows show where an interval goes
    on.
    """
    values = [value for value, _ in every if value is not None] or [1.0]
    ends = [*values, *(end for _, i in every if i is not None for end in (i.low, i.high)), 1.0]
    reach = 2 * max(abs(value - 1) for value in values) or 0.5
    low = max(min(ends), 1 - reach)
    high = max(min(max(ends), 1 + reach), low + 0.1)

    def cell(value: float) -> int:
        return min(max(round((value - low) / (high - low) * (width - 1)), 0), width - 1)

    def row(value: float | None, around: Interval | None) -> str:
        line = [" "] * width
        if value is not None and not unit:
            line[one : cell(value)] = "━" * max(cell(value) - one, 0)
        if around is not None:
            for at in range(cell(around.low), cell(around.high) + 1):
                line[at] = "─"
            line[0] = "◂" if around.low < low else line[0]
            line[-1] = "▸" if around.high > high else line[-1]
        line[one] = {" ": "┊", "─": "┼", "━": "┝"}.get(line[one], line[one])
        if value is not None:
            line[cell(value)] = "●"
        return "".join(line)

    one, mark = cell(1.0), f"1{unit}"
    head = f"{units.number(low)}{unit}"
    head += f"{units.number(high)}{unit}".rjust(width - len(head))
    if not head[max(one - 1, 0) : one + len(mark) + 1].strip():
        head = head[:one] + mark + head[one + len(mark) :]
    return Column(head, [row(*point) for point in points], left=True)


# ── words for what was run ───────────────────────────────────────────────────────────────────────


def load_label(run: str, phase: PhaseSummary) -> str:
    """'[1] c=8 repeat 2', 'c=8' where there is one run and repeat: c as the flag -c has it."""
    again = f" repeat {phase.repeat + 1}" if phase.repeat else ""
    return f"{run} {load_name(phase.load)}{again}".strip()


def load_words(load: Load) -> str:
    """A load in a sentence: 'concurrency 8', 'rate=4/s'."""
    return f"concurrency {load.concurrency}" if isinstance(load, ClosedLoop) else load_name(load)


def arrivals(load: Load) -> str:
    """How the dialogues of an open loop arrive: 'gamma arrivals of burstiness 0.5, …'; else ''."""
    if isinstance(load, ClosedLoop):
        return ""
    shape = f" of burstiness {load.burstiness:g}" if load.arrivals == "gamma" else ""
    most = f" with at most {units.count(load.max_in_flight)} in flight"
    return f"{load.arrivals} arrivals{shape}{most if load.max_in_flight else ''}"


def batch(phase: PhaseSummary) -> str:
    """Beside what a category was measured."""
    return "each category alone" if phase.categories_apart else "in the mixed batch"


def speculation(server: ServerInfo) -> str:
    """'ngram k = 3', 'no speculation', or that it is not known."""
    if server.state == "off":
        return "no speculation"
    spec = server.config.spec if server.config is not None else None
    name = spec.method if spec is not None else server.spec_reported
    if name is None and server.state == "unknown":
        return UNKNOWN
    depth = spec.draft_depth or spec.draft_tokens if spec is not None else None
    depth = depth or server.draft_depth
    told = spec is None and re.search(r"\bk ?=", name or "")
    return (name or "speculation") + (f" k = {depth}" if depth and not told else "")


def trouble(summary: Summary) -> str:
    """What a reader must know before any figure: '' for a clean run, else '…; '."""
    said = f"run {summary.end}; " if summary.end else "unfinished run, its end was not recorded; "
    failed = {kind: total(summary.phases, kind) for kind in ("refused", "broke", "timed_out")}
    how = listed(f"{count:,} {kind.replace('_', ' ')}" for kind, count in failed.items() if count)
    share = f"{sum(failed.values()):,} of {total(summary.phases, 'sent'):,} requests failed"
    return ("" if summary.end == "completed" else said) + (f"{share} ({how}); " if how else "")


def total(phases: Iterable[PhaseSummary], kind: str) -> int:
    """The requests of one kind, a field of RequestCounts, in all phases."""
    return sum(getattr(phase.requests, kind) for phase in phases)


def best(phase: PhaseSummary) -> Acceptance:
    """The first source."""
    return phase.acceptance[0] if phase.acceptance else NOTHING


def dist(phase: PhaseSummary, metric: str) -> Distribution:
    """All None where it is absent."""
    return phase.distributions.get(metric, Distribution(n=0))


def length(acceptance: Acceptance) -> str:
    """Acceptance length as a cell: '1.51', or its range, or a dash."""
    if acceptance.acceptance_length is None:
        return units.interval(acceptance.interval)
    return units.number(acceptance.acceptance_length)


def length_over(acceptance: Acceptance, steps: str) -> str:
    """Acceptance length with its interval and steps: '1.51 [1.40, 1.63] over 1,027 steps'."""
    text, around = length(acceptance), units.interval(acceptance.interval)
    over = f"over {units.count(acceptance.steps)} {steps}" if acceptance.steps is not None else ""
    return " ".join(filter(None, (text, around if around not in (MISSING, text) else "", over)))


# ── header ───────────────────────────────────────────────────────────────────────────────────────


def facts(info: RunInfo) -> dict[str, str]:
    """The header of a run: what, on what, how asked, from where. '' has no row."""
    server, client, scenario = info.server, info.client, info.scenario
    asked, stop, verified = scenario.sampling, scenario.stop, server.verified
    engine = f"{server.engine} {server.version or 'version unknown'}"
    if server.simulated:
        of = engine.replace("simulated simulated", "simulated")
        engine = f"SIMULATED: no engine and no model ran; figures follow from the settings of {of}"
    label, said = speculation(server), server.spec_reported or ""
    known = {text.replace(" ", "") for text in ("", label, label.split(" k = ")[0])}
    more = f" (reported: {said})" if said.replace(" ", "") not in known else ""
    running, context = units.count(server.max_running), units.count(server.max_model_len)
    rows = {
        "model": [server.model],
        "engine": [
            engine,
            f"at most {running} running" if server.max_running is not None else "",
            f"context {context}" if server.max_model_len is not None else "",
            "chat API: the server templates the prompts" if server.api == "chat" else "",
        ],
        "verified": [verified if re.search("not verified|no one server was", verified) else ""],
        "speculation": [label + more],
        "scenario": [
            f"{scenario.name} at {listed(map(load_name, scenario.loads))}",
            listed(dict.fromkeys(filter(None, map(arrivals, scenario.loads)))),
            f"{units.count(stop.requests)} dialogues a load" if stop.requests else "",
            f"{units.duration(stop.duration_s)} a load" if stop.duration_s else "",
            f"after a ramp of {units.duration(stop.ramp_s)}" if stop.ramp_s else "",
            f"{scenario.repeats} repeats" if scenario.repeats > 1 else "",
        ],
        "sampling": [
            f"temperature {asked.temperature:g}, top-p {asked.top_p:g}",
            f"seed {asked.seed}" if asked.seed is not None else "",
            f"at most {units.count(asked.max_output_tokens)} output tokens",
            "EOS ignored" if asked.ignore_eos else "",
        ],
        "prompts": templated(scenario.templating),
        "client": [
            f"draftload {client.draftload}, Python {client.python}, aiohttp {client.aiohttp}",
            f"{client.loop}, {client.cores} cores, {client.machine}",
        ],
        "started": [info.started_at],
    }
    return {key: joined(parts) for key, parts in rows.items()}


def templated(templating: Templating) -> list[str]:
    """How conversations became prompts, where it is not the usual way."""
    given = ", ".join(
        f"{key}={msgspec.json.encode(value).decode()}" for key, value in templating.args.items()
    )
    return [
        "" if templating.apply else "raw text, no chat template",
        f"template arguments {given}" if given else "",
        "history without thinking" if templating.history == "answer" else "",
    ]


def header(runs: Sequence[tuple[str, RunInfo]], width: int) -> Section:
    """Facts that all runs share once, others a line a run, under the run's label; of many runs
    each value once, as which of them has it tells nobody anything."""
    every = [(label, facts(info)) for label, info in runs]
    rows: dict[str, str] = {}
    for key, value in every[0][1].items():
        if all(known[key] == value for _, known in every):
            rows[key] = value
        else:
            said = grouped((known[key], label) for label, known in every)
            if len(said) > FEW_VALUES:  # such as when each of many runs started
                said = {f"{next(iter(said))} … {[*said][-1]}": ["of all"]}
            if len(runs) > MOST_RUNS:
                rows[key] = "; ".join(filter(None, said))
            else:
                rows |= {f"{key} {_labels(labels)}": value for value, labels in said.items()}
    rows = {key: value for key, value in rows.items() if value}
    indent = max(map(len, rows)) + 2
    section: Section = []
    for key, value in rows.items():
        section += wrapped(value, width, key.ljust(indent), " " * indent)
    for line in section:
        line.stylize("dim", 0, indent)
    return section


def _labels(labels: Sequence[str]) -> str:
    """'base', '[2]', '[1–3, 7]': the runs that share a fact."""
    numbers = [int(found[1]) for label in labels if (found := re.fullmatch(r"\[(\d+)\]", label))]
    if len(numbers) < max(len(labels), 2):
        return " ".join(labels)
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    spans = (str(a) if a == b else f"{a}–{b}" for a, b in zip(starts, ends, strict=True))
    return f"[{', '.join(spans)}]"


# ── acceptance ───────────────────────────────────────────────────────────────────────────────────


def acceptance_block(rows: Sequence[Row], width: int) -> Section:
    """Every source, best first: what it is, and under it its acceptance length at every load."""
    sources = grouped(
        (a.source, (row, a)) for row in rows for a in row[1].acceptance if a.state != "off"
    )
    section: Section = []
    every = len(next(iter(sources.values()), ()))
    for source, members in sources.items():
        second = ", second source" if section else ""
        same = len(members) == every and all(_agrees(a, best(row[1])) for row, a in members)
        section += wrapped(_about(second, source, [a for _, a in members], same), width, rest="  ")
        indent = max(cell_len(load_label(*row)) for row, _ in members) + 2
        for row, acceptance in members if not same else ():
            name = "  " + load_label(*row).ljust(indent)
            first, *details = _said(acceptance)
            text = "; ".join(filter(None, (first, ", ".join(details))))
            section += wrapped(text, width, name, " " * len(name))
    means = [(row, best(row[1]).acceptance_length_by_dialogue) for row in rows]
    said = [f"{units.number(al)} at {load_label(*row)}" for row, al in means if al is not None]
    what = "AL by dialogue: mean over dialogues, each turn's prefill a step of 1 (SPEED-Bench's): "
    return section + (wrapped(what + ", ".join(said), width, rest="  ") if said else [])


def _about(second: str, source: str, members: Sequence[Acceptance], same: bool) -> str:
    """Where one source's figures and its steps come from, and what its intervals are."""
    if source == "none":
        return f"AL{second}: not measured"
    found = [a for a in members if length(a) != MISSING]
    doubt = "chunks taken for steps: unverified" if any(a.unverified for a in found) else ""
    if same:
        return joined((f"AL{second}, {source}: the same at every load", doubt))
    steps = listed(dict.fromkeys(a.steps_source for a in found if a.steps_source))
    steps = f"steps from {steps}" if steps else "the number of steps is not known"
    kinds = listed(dict.fromkeys(a.interval.kind for a in found if a.interval is not None))
    about = (steps if found else "", doubt, f"intervals: {kinds}" if kinds else "")
    return joined((f"AL{second}: pooled over steps", f"from {source}", *about))


def _agrees(second: Acceptance, first: Acceptance) -> bool:
    """It says what the first source says and nothing more; only the interval may differ."""
    same = (length(second), second.steps) == (length(first), first.steps)
    known = second is not first and second.acceptance_length is not None
    return known and same and {*_said(second)[1:]} <= {*_said(first)[1:]}


def _said(acceptance: Acceptance) -> list[str]:
    """What one source says at one load: length over steps, or why it is missing; then the rest."""
    if length(acceptance) == MISSING:
        return [MISSING + (f" ({acceptance.why_missing})" if acceptance.why_missing else "")]
    drafted, coverage = acceptance.acceptance_length_drafted, acceptance.draft_coverage
    lost = acceptance.overrun_tokens
    parts = (
        length_over(acceptance, "steps"),
        f"where drafted {units.number(drafted)}" if drafted is not None else "",
        f"coverage {units.percent(coverage)}" if coverage is not None else "",
        f"{units.count(lost)} tokens emitted past the end, not delivered" if lost else "",
    )
    return [*filter(None, parts)]


def answers_block(rows: Sequence[Row], width: int) -> Section:
    """What the answers to random input were, a row a label and load."""
    known = [(load_label(*row), found) for row in rows if (found := row[1].answers) is not None]
    if not known:
        return []
    shares = [(load, a.answers, s) for load, a in known for s in (*a.shares, a.clustered)]
    columns = [
        Column("load", [load for load, _, _ in shares]),
        Column("answers", [s.label for _, _, s in shares], left=True),
        Column("count", [f"{s.count:,} of {n:,}" for _, n, s in shares]),
        Column("share\n%", [units.hundredths(s.count / n) for _, n, s in shares]),
        Column("95 % Wilson\n%", [_percents(s.interval) for _, _, s in shares]),
        Column("AL", [units.number(s.acceptance_length) for _, _, s in shares], 1, "AL"),
    ]
    notes = [
        f"AL of the requests at {load} has two humps (bimodality {units.number(a.bimodality)})."
        for load, a in known
        if a.bimodality is not None and a.bimodality > BIMODAL
    ]
    if not all(a.prompts_known for _, a in known):
        notes.append("How many are echoes or latched is not known: the prompts' text is not.")
    return [
        *wrapped("Answers to random input", width, style="bold"),
        *grid(columns, width),
        *(line for note in notes for line in wrapped(note, width, style="dim")),
    ]


def _percents(limits: Interval | None) -> str:
    if limits is None:
        return MISSING
    return f"[{units.hundredths(limits.low)}, {units.hundredths(limits.high)}]"


_CELLS: Mapping[str, tuple[str, Callable[[Acceptance], str]]] = {
    "steps": ("steps", lambda a: units.count(a.steps)),
    "AL": ("AL", length),
    "interval": ("interval", lambda a: units.interval(a.interval)),
    "AL where drafted": ("AL where\ndrafted", lambda a: units.number(a.acceptance_length_drafted)),
    "coverage": ("coverage\n%", lambda a: units.hundredths(a.draft_coverage)),
    "draft coverage": ("draft\ncoverage\n%", lambda a: units.hundredths(a.draft_coverage)),
    "acceptance rate": ("accept.\nrate\n%", lambda a: units.hundredths(a.acceptance_rate)),
}
"""Name → head and cell of a column."""


def acceptance_columns(found: Sequence[Acceptance], drops: Mapping[str, int]) -> list[Column]:
    """The figures named in `drops`, a row for each of `found`; none where speculation is off."""
    if all(a.state == "off" for a in found):
        return []
    wanted = [(name, drop, *_CELLS[name]) for name, drop in drops.items()]
    return [Column(head, [*map(cell, found)], drop, name) for name, drop, head, cell in wanted]


class CategoryBlock(NamedTuple):
    """A table with a row a category: whiskers of `points` stand between `before` and `after`."""

    title: str
    before: Sequence[Column]
    points: Sequence[Point]
    after: Sequence[Column]
    steps: Sequence[int | None]


def category_blocks(blocks: Sequence[CategoryBlock], width: int, unit: str = "") -> list[Section]:
    """Whiskers of one scale where the page has room for them, a mark where steps are few."""
    every = [point for block in blocks for point in block.points]
    note = f"Few steps: under {FEW_STEPS} decode steps, too few for a verdict."
    sections, noted, lost = [], False, dict[str, None]()
    for block in blocks:
        few = ["few steps" if s is not None and s < FEW_STEPS else "" for s in block.steps]
        marks, noted = [Column("", few, 1, left=True)] if any(few) else [], noted or any(few)
        columns = [*block.before, *block.after, *marks]
        if any(around is not None for _, around in block.points):
            kept = fitting(columns, width - WIDEST_PLOT // 2 - 2)
            room = min(width - span(kept) - 2, WIDEST_PLOT)
            if room >= WIDEST_PLOT // 2:
                at = sum(column in kept for column in block.before)
                lost |= dict.fromkeys(c.name for c in columns if c not in kept)
                columns = [*kept[:at], whiskers(block.points, every, room, unit), *kept[at:]]
        title = wrapped(block.title, width, style="bold")
        sections.append([*title, *grid(columns, width, tell=False)])
    if lost:
        sections[-1] += wrapped(_not_shown(lost, width), width, style="dim")
    if noted:
        sections[-1] += wrapped(note, width, style="dim")
    return sections


def positions(rows: Sequence[Row], width: int) -> Section:
    """Joint and conditional acceptance by draft position, of the best source with most steps."""
    found = [(row, a) for row in rows for a in row[1].acceptance if a.joint_by_position]
    if not found:
        return []
    row, acceptance = max(
        found, key=lambda f: (f[1] is best(f[0][1]), f[1].steps or 0, load_order(f[0][1].load))
    )
    joint = acceptance.joint_by_position or ()
    last = max((j for j, share in enumerate(joint, 1) if share > 0), default=1)
    # It ends where nothing was accepted before, which damaged counters can have in the middle.
    conditional = (*(acceptance.conditional_by_position or ()), *[None] * last)
    exact = "" if acceptance.positions_exact else "; not drafted counts as rejected"
    text = f"Acceptance by draft position at {load_label(*row)}, from {acceptance.source}{exact}"
    columns = [Column("position", [str(j) for j in range(1, last + 1)])]
    for head, shares in (("joint\n%", joint[:last]), ("conditional\n%", conditional[:last])):
        columns.append(Column(head, [*map(units.hundredths, shares)]))
        columns.append(Column("", [bar(s or 0.0) for s in shares], drop=1, left=True))
    rest = f"Nothing was accepted at positions {last + 1} to {len(joint)}."
    tail = wrapped(rest, width, style="dim") if last < len(joint) else []
    return [*wrapped(text, width, style="bold"), *grid(columns, width, tell=False), *tail]


# ── caveats and paths ────────────────────────────────────────────────────────────────────────────


Runs = Sequence[tuple[str, Summary]]


def _said_of(runs: Runs) -> dict[tuple[str, str], list[tuple[str, tuple[str, str]]]]:
    """(code, advice) → its messages, each with the run and the load it is about ('': of all)."""
    found = []
    for run, summary in runs:
        names = {phase.name: load_label("", phase) for phase in summary.phases}
        for caveat in summary.caveats:
            at = names.get(caveat.phase or "", caveat.phase or "")
            found.append(((caveat.code, caveat.advice), (caveat.message, (run, at))))
    return grouped(found)


def _letters(runs: Runs) -> dict[tuple[str, str], str]:
    """A letter for each caveat that is about a load and not about all."""
    of_loads = (key for key, said in _said_of(runs).items() if any(at for _, (_, at) in said))
    return dict(zip(of_loads, string.ascii_lowercase, strict=False))


def marks(runs: Runs, places: Iterable[Iterable[tuple[str, str]]]) -> Column | None:
    """The letters of the caveats about each row of a table; `places`: its runs and loads."""
    letters, found = _letters(runs), _said_of(runs)
    at = [(letters[key], place) for key in letters for _, place in found[key]]
    rows = [{*row} for row in places]
    cells = ["".join(dict.fromkeys(c for c, place in at if place in row)) for row in rows]
    return Column("caveat\nmarks", cells, 2, "caveat marks") if any(cells) else None


def caveats(runs: Runs, width: int) -> Section:
    """Each caveat once, with the runs and loads it is about; its advice under it. Of many runs the
    loads alone."""
    letters = _letters(runs)
    many = len(runs) > MOST_RUNS
    found = _said_of([("", any_repeat(run)) for _, run in runs] if many else runs)
    section = wrapped("Caveats", width, style="bold") if found else []
    for (code, advice), said in found.items():
        mark = f"{letters.get((code, advice), ' ')} " if letters else ""
        indent = " " * (len(mark) + 4)
        for message, places in grouped(said).items():
            text = f"{code}{_places(places)}: {message}"
            section += wrapped(text, width, f"  {mark}", indent, style="yellow")
        section += wrapped(f"→ {advice}", width, indent, indent + "  ")
    return section


def any_repeat(run: Summary) -> Summary:
    """The run, its phases called by their load alone: most caveats hold for every repeat."""
    phases = tuple(msgspec.structs.replace(phase, repeat=0) for phase in run.phases)
    return msgspec.structs.replace(run, phases=phases)


def _places(places: Iterable[tuple[str, str]]) -> str:
    """' (base and spec at c=1)', of runs with their loads; '' is every load."""
    loads = [(listed(dict.fromkeys(filter(None, at))), run) for run, at in grouped(places).items()]
    said = [" at ".join(filter(None, (listed(runs), at))) for at, runs in grouped(loads).items()]
    return f" ({', '.join(said)})" if any(said) else ""


def paths(study: Study, labels: Iterable[str]) -> Section:
    """Where the figures come from: `labels` are those of the runs."""
    section: Section = []
    if len(study.paths) > MOST_RUNS:
        labels = ["" if label.startswith("[") else label for label in labels]
    for label, files in grouped(zip(labels, map(PurePath, study.paths), strict=False)).items():
        folders = dict.fromkeys(file.parent for file in files)
        if len(files) > MOST_FILES and len(folders) == 1:
            text = f"{files[0].parent}/: {len(files)}, from {files[0].name} to {files[-1].name}"
            section += wrapped(text, study.width, f"run files {label}".strip() + " ", "  ", "dim")
            continue
        for file in files:
            head = f"run file {label}".strip() + " "
            section += wrapped(str(file), study.width, head, "  ", "dim")
    return section
