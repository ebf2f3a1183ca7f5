"""A run under way: sums kept by hand from its records, and the lines that show them.

Figures are of the phase under way. AL is pooled over the decode steps of the requests that ended,
from per-request figures as loadgen.acceptance has them: the server's counters are known only once a
phase is over. Lines are made when they are asked for; a record costs a few additions. Must not:
draw, read a clock, keep a record.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.text import Text

from loadgen.acceptance import of_request
from loadgen.types import (
    Broke,
    Cancelled,
    ClientSample,
    Completed,
    Engine,
    Outcome,
    Phase,
    PhaseRecord,
    Plan,
    Record,
    Refused,
    RequestRecord,
    RunInfo,
    ServerLoad,
    Snapshot,
    TimedOut,
)
from reports import units
from reports.page import FEW_STEPS, clean, listed, short

RECENT_S = 2.0
"""Speed now is over so long: a single tick holds a whole number of steps and jumps."""
WINDOWS = 20
"""A sparkline has at least half as many cells, and at most these, once it has had them."""
LEVELS = "▁▂▃▄▅▆▇█"
WIDEST_BAR = 30
INDENT, FIGURE = 10, 12
MOST_MESSAGE = 200

Parts = list[tuple[str, int]]
"""Text and its rank: where a line is too long the highest goes first, 0 stays."""


@dataclass
class Trail:
    """A ratio over the time of a phase: windows of (amount, of). When there are too many, two
    neighbours become one, so that it always reaches back to the start."""

    windows: list[tuple[float, float]] = field(default_factory=list)
    _ticks: int = 0
    _each: int = 1

    def add(self, amount: float, of: float) -> None:
        """What one tick brought."""
        if self._ticks % self._each == 0:
            if len(self.windows) == WINDOWS:
                pairs = zip(self.windows[::2], self.windows[1::2], strict=True)
                self.windows = [(a + c, b + d) for (a, b), (c, d) in pairs]
                self._each *= 2
            self.windows.append((0.0, 0.0))
        before = self.windows[-1]
        self.windows[-1] = (before[0] + amount, before[1] + of)
        self._ticks += 1

    def drawn(self, low: float, high: float | None = None) -> str:
        """As a sparkline from `low` to `high`, else to the highest window; a gap is a space."""
        values = [amount / of if of else None for amount, of in self.windows]
        top = max((v for v in values if v is not None), default=low) if high is None else high
        span = max(top - low, 1e-9)
        cells = [" " if v is None else _level((v - low) / span) for v in values]
        return "".join(cells).rstrip()


def _level(share: float) -> str:
    return LEVELS[min(max(int(share * len(LEVELS)), 0), len(LEVELS) - 1)]


@dataclass
class _Sums:
    """One phase: what has been counted of it. `total` requests, None where time ends it."""

    name: str
    plan: Phase | None = None
    total: int | None = None
    ended: int = 0
    osl_tokens: int = 0
    decoded: dict[str, list[int]] = field(default_factory=dict)
    since: list[int] = field(default_factory=lambda: [0, 0])
    sources: dict[str, None] = field(default_factory=dict)
    failed: Counter[str] = field(default_factory=Counter)
    first: ClientSample | None = None
    samples: deque[ClientSample] = field(default_factory=lambda: deque(maxlen=40))
    output: Trail = field(default_factory=Trail)
    length: Trail = field(default_factory=Trail)

    @property
    def last(self) -> ClientSample | None:
        return self.samples[-1] if self.samples else None

    @property
    def elapsed_s(self) -> float | None:
        """Since its first sample, which comes half a second after its start."""
        return self.last.at_s - self.first.at_s if self.last and self.first else None

    @property
    def ends_after_s(self) -> float | None:
        duration = self.plan.duration_s if self.plan is not None else None
        return duration + self.plan.ramp_s if duration and self.plan else None

    def done(self) -> float | None:
        """What of it is done, 0…1: of its time where that ends it, else of its requests."""
        if self.ends_after_s is not None:
            return min((self.elapsed_s or 0.0) / self.ends_after_s, 1.0)
        return min(self.ended / self.total, 1.0) if self.total else None

    def left_s(self) -> float | None:
        """How long it may still take: by its time, else by tokens streamed, of which requests in
        flight have theirs too; as many a request as those that ended had."""
        elapsed = self.elapsed_s
        if elapsed is None or self.last is None or self.first is None:
            return None
        if self.ends_after_s is not None:
            return max(self.ends_after_s - elapsed, 0.0)
        if not self.total or not self.ended:
            return None
        wanted = self.total * self.osl_tokens / self.ended
        streamed = (self.last.tokens - self.first.tokens) / wanted if wanted else 0.0
        share = min(max(streamed, self.ended / self.total), 1.0)
        return elapsed * (1 - share) / share

    def speed(self, over_s: float) -> float | None:
        """Output tokens a second, all streams, over the last `over_s` seconds."""
        last = self.last
        if last is None:
            return None
        recent = [s for s in self.samples if s.at_s >= last.at_s - over_s]
        since = recent[0] if len(recent) > 1 else self.samples[max(len(self.samples) - 2, 0)]
        took = last.at_s - since.at_s
        return (last.tokens - since.tokens) / took if took > 0 else None

    def mean_speed(self) -> float | None:
        elapsed = self.elapsed_s
        if not elapsed or self.last is None or self.first is None:
            return None
        return (self.last.tokens - self.first.tokens) / elapsed

    def pooled(self) -> tuple[int, int]:
        """Tokens after the prefills, and decode steps, of the requests that ended."""
        pairs = self.decoded.values()
        return sum(t for t, _ in pairs), sum(n for _, n in pairs)


class Progress:
    """What is known of a run while it goes on. `take` every record, then ask for `lines`."""

    def __init__(
        self, plan: Plan, label: str, info: RunInfo, engines: Mapping[str, Engine]
    ) -> None:
        simulated = info.server.simulated and "simulated" not in label.lower()
        self.label = ("simulated, " if simulated else "") + clean(label)
        self._server = info.server
        self._engine = engines[info.server.engine]
        self._phases = {phase.name: phase for phase in plan.phases}
        self._totals = {phase.name: _total(phase) for phase in plan.phases}
        self._turns = {p.prompt_id: 1 + len(p.later_turns) for p in plan.prompts if p.later_turns}
        self._sums = _Sums(name="")
        self._queue: ServerLoad | None = None
        self._client: tuple[ClientSample, ClientSample] | None = None
        self._message = ""
        self.ended: list[str] = []
        self.requests = 0
        self.failed: Counter[str] = Counter()

    # ── records in ───────────────────────────────────────────────────────────────────────────────

    def take(self, record: Record) -> None:
        """Count a record."""
        if isinstance(record, RequestRecord):
            self._request(record)
        elif isinstance(record, ClientSample):
            self._sample(record)
        elif isinstance(record, Snapshot):
            if record.edge == "tick":
                self._queue = self._engine.load(record.samples)
        elif isinstance(record, PhaseRecord) and record.measured:
            self.ended.append(self._over(record))

    def _of(self, name: str) -> _Sums:
        if self._sums.name != name:
            self._sums = _Sums(name=name, plan=self._phases.get(name), total=self._totals.get(name))
            self._queue = None
        return self._sums

    def _request(self, record: RequestRecord) -> None:
        sums = self._of(record.phase)
        sums.ended += 1
        sums.osl_tokens += record.osl_tokens
        measured = sums.plan is None or sums.plan.measured
        self.requests += measured
        if not isinstance(record.outcome, Completed):
            self._failed(sums, record)
        elif self._server.state != "off":
            found = of_request(record, self._engine, self._server.draft_depth)
            if found is not None:
                tokens, steps, source = found
                pair = sums.decoded.setdefault(record.category, [0, 0])
                for row in (pair, sums.since):
                    row[0] += tokens
                    row[1] += steps
                sums.sources[source] = None

    def _failed(self, sums: _Sums, record: RequestRecord) -> None:
        kind = failure(record.outcome)
        sums.failed[kind] += 1
        self.failed[kind] += 1
        self._message = clean(getattr(record.outcome, "message", "")[:MOST_MESSAGE])
        if sums.total is not None:  # a turn that fails ends its dialogue
            turns = self._turns.get(record.prompt_id, 1) if sums.plan and sums.plan.measured else 1
            sums.total -= max(turns - record.turn - 1, 0)

    def _sample(self, sample: ClientSample) -> None:
        sums = self._of(sample.phase)
        before = sums.last
        sums.samples.append(sample)
        if before is None:
            sums.first = sample
            self._client = None
            return
        self._client = (before, sample)
        sums.output.add(sample.tokens - before.tokens, sample.at_s - before.at_s)
        sums.length.add(*sums.since)
        sums.since = [0, 0]

    # ── lines out ────────────────────────────────────────────────────────────────────────────────

    def lines(self, width: int, height: int) -> list[Text]:
        """What there is to see now, in at most `height` − 1 lines of at most `width` cells.

        The loads that ended, as many as there is room for, then the one under way. Where rows are
        few its categories go first, its failures last.
        """
        sums = self._sums
        rows = [(0, self._title(width)), (0, self._bar(sums, width))]
        said = (
            (4, "load", [[(self._flight(sums), 0)]]),
            (2, "output", self._output(sums)),
            (3, "AL", self._length(sums, width - INDENT)),
            (7, "", self._categories(sums, width)),
            (5, "server", self._server_said()),
            (6, "client", self._client_said()),
            (1, "failed", self._failures(sums)),
        )
        for rank, name, all_parts in said:
            for at, parts in enumerate(all_parts):
                head = "" if at else name
                line = Text("  " + head.ljust(INDENT - 2) + fitted(parts, width - INDENT))
                line.stylize("red" if name == "failed" else "dim", 0, INDENT)
                rows.append((rank, line))
        room = max(height - 1, 1)
        before = [
            Text(f"  {line}", style="dim") for line in self.ended[-max(room - len(rows), 0) :]
        ]
        now = [line for _, line in _most(rows, room)]
        lines = [*before, *now] if len(now) < room else now
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        return lines

    def _title(self, width: int) -> Text:
        names = list(self._phases)
        place = names.index(self._sums.name) + 1 if self._sums.name in names else 0
        of = f"phase {place} of {len(names)}" if place else ""
        parts = [(self.label, 1), (clean(self._sums.name), 0), (of, 2)]
        return Text(fitted(parts, width), style="bold")

    def _bar(self, sums: _Sums, width: int) -> Text:
        share, left = sums.done(), sums.left_s()
        size = min(WIDEST_BAR, max(width - 50, 0))
        full = round((share or 0.0) * size)
        bar = "█" * full + "░" * (size - full) if share is not None and size > 5 else ""
        elapsed = units.roughly(sums.elapsed_s) if sums.elapsed_s is not None else ""
        eta = f"ETA {units.roughly(left) if left is not None else units.MISSING}"
        eta = "its last requests end" if left == 0 else eta
        parts = [(bar, 1), (self._counted(sums), 0), (elapsed, 3), (eta if elapsed else "", 2)]
        return Text("  " + fitted(parts, width - 2))

    @staticmethod
    def _counted(sums: _Sums) -> str:
        if sums.total is None or sums.ends_after_s is not None:
            return f"{sums.ended:,} requests"
        return f"{sums.ended:,} of {sums.total:,} requests"

    @staticmethod
    def _flight(sums: _Sums) -> str:
        if sums.last is None:
            return ""
        of = "" if sums.last.target is None else f" of {sums.last.target:,}"
        return f"{sums.last.in_flight:,}{of} in flight"

    def _output(self, sums: _Sums) -> list[Parts]:
        speed = units.rate(sums.speed(RECENT_S)).ljust(FIGURE)
        return [[(speed, 0), (sums.output.drawn(0.0), 1)]]

    def _length(self, sums: _Sums, room: int) -> list[Parts]:
        tokens, steps = sums.pooled()
        if self._server.state == "off":
            return []
        if not steps:
            why = "no request ended yet" if not sums.ended else "no request told its decode steps"
            return [[(units.MISSING.ljust(FIGURE), 0), (why, 1)]]
        depth = self._server.draft_depth
        trail = sums.length.drawn(1.0, depth + 1.0 if depth else None)
        length = units.number(tokens / steps).ljust(FIGURE)
        over, source = f"over {steps:,} decode steps", self._source(sums)
        about = [[(f"{over}, {source}", 0)]]
        if cell_len(about[0][0][0]) > room:
            about = [[(over, 0)], [(source, 0)]]
        return [[(length, 0), (trail, 1)], *about]

    def _source(self, sums: _Sums) -> str:
        """What counted the steps; chunks are proven or disproved only once the phase is over."""
        unsure = any("chunks" in source for source in sums.sources)
        return f"from {listed(sums.sources)}" + (", unverified" if unsure else "")

    def _categories(self, sums: _Sums, width: int) -> list[Parts]:
        """AL by category in columns of one width; one with few steps has not settled."""
        if len(sums.decoded) < 2:
            return []
        cells = []
        for name, (tokens, steps) in sorted(sums.decoded.items()):
            settled = "" if steps >= FEW_STEPS else "~"
            cells.append((short(name), settled + (units.number(tokens / steps) if steps else "–")))
        names, figures = (max(map(cell_len, column)) for column in zip(*cells, strict=True))
        said = [n + " " * (names - cell_len(n)) + " " + f.rjust(figures) for n, f in cells]
        a_row = max((width - INDENT + 3) // (names + figures + 4), 1)
        rows = [said[at : at + a_row] for at in range(0, len(said), a_row)]
        return [[("   ".join(row), 0)] for row in rows]

    def _server_said(self) -> list[Parts]:
        told = self._queue
        if told is None:
            return []
        parts = [
            (f"{told.running:,} running" if told.running is not None else "", 0),
            (f"{told.waiting:,} waiting" if told.waiting is not None else "", 1),
            (
                "" if told.kv_cache_use is None else f"KV cache {units.percent(told.kv_cache_use)}",
                2,
            ),
        ]
        return [parts] if any(text for text, _ in parts) else []

    def _client_said(self) -> list[Parts]:
        if self._client is None:
            return []
        before, now = self._client
        busy = (now.cpu_s - before.cpu_s) / (now.at_s - before.at_s)
        late = f"loop {units.duration(now.loop_lag_s)} late at most"
        return [[(late, 0), (f"CPU {units.percent(busy)} of a core", 1)]]

    def _failures(self, sums: _Sums) -> list[Parts]:
        if not sums.failed:
            return []
        return [[(total(sums.failed), 0)], *([[(self._message, 0)]] if self._message else [])]

    # ── lines where nothing is drawn ─────────────────────────────────────────────────────────────

    def line(self, over_s: float) -> str:
        """All of it in one line; speed over the last `over_s` seconds."""
        sums = self._sums
        left, (tokens, steps) = sums.left_s(), sums.pooled()
        parts = [
            self._counted(sums),
            f"ETA {units.roughly(left)}" if left is not None else "",
            self._flight(sums),
            units.rate(sums.speed(over_s)),
            f"AL {units.number(tokens / steps)} {self._source(sums)}" if steps else "",
            *(text for parts in self._server_said() for text, _ in parts),
            *(text for parts in self._client_said() for text, _ in parts),
            *(f"failed: {text}" for ((text, _),) in self._failures(sums)[:1]),
        ]
        return f"{self.label}  {clean(sums.name)}: {', '.join(filter(None, parts))}"

    def _over(self, record: PhaseRecord) -> str:
        """One load that ended."""
        sums = self._of(record.name)
        tokens, steps = sums.pooled()
        parts = [
            f"{sums.ended:,} requests in {units.duration(record.ended_s - record.started_s)}",
            f"{units.rate(sums.mean_speed())}" if sums.mean_speed() is not None else "",
            f"AL {units.number(tokens / steps)}" if steps else "",
            f"failed: {total(sums.failed)}" if sums.failed else "",
        ]
        return f"{clean(record.name)}: {', '.join(filter(None, parts))}"

    def end(self) -> str:
        """The whole run in one line."""
        loads = f"{len(self.ended):,} load{'s' * (len(self.ended) != 1)} ended"
        failed = f", failed: {total(self.failed)}" if self.failed else ""
        return f"{self.label}: {loads}, {self.requests:,} requests{failed}"


def fitted(parts: Parts, width: int) -> str:
    """The parts that fit beside each other."""
    kept = [part for part in parts if part[0]]
    while cell_len("  ".join(text for text, _ in kept)) > width and any(rank for _, rank in kept):
        kept.remove(max(kept, key=lambda part: part[1]))
    return "  ".join(text for text, _ in kept)


def _most(rows: Sequence[tuple[int, Text]], room: int) -> list[tuple[int, Text]]:
    """The rows of least rank, first ones first, in their order."""
    kept = sorted(range(len(rows)), key=lambda n: (rows[n][0], n))[:room]
    return [rows[n] for n in sorted(kept)]


def failure(outcome: Outcome) -> str:
    """How a request failed, in a word or two."""
    match outcome:
        case Refused(status=status):
            return f"HTTP {status}"
        case Broke(reason=reason):
            return clean(reason)
        case TimedOut():
            return "timed out"
        case Cancelled():
            return "cancelled by us"
        case _:
            return ""


def total(failed: Counter[str]) -> str:
    """'3 HTTP 503, 1 truncated'."""
    return ", ".join(f"{count:,} {kind}" for kind, count in failed.most_common())


def _total(phase: Phase) -> int | None:
    """Requests of a phase, all turns; None where it ends by time or has no end."""
    if phase.duration_s is not None or not isinstance(phase.dialogues, tuple):
        return None
    if not phase.measured:
        return len(phase.dialogues)
    return sum(1 + len(dialogue.prompt.later_turns) for dialogue in phase.dialogues)
