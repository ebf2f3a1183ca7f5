"""The metrics page of a run or sweep while it goes on: an observer, not a report.

All metrics of draftload's pages stand here, in FAMILIES, for the monitor's page too. Counters of
decode tokens, decode steps, drafts and accepted tokens grow by whole requests, and only by requests
whose figures are known, so that over any window
    AL = rate(decode tokens) ÷ rate(decode steps)
    AL where drafted = 1 + rate(accepted tokens) ÷ rate(drafts)
Each figure has one source, the one that the report takes: drafts from the requests' own figures,
else the growth of the server's counters; steps from those figures, else the server's count (where
it counts tokens and requests as well), else chunks. Where a request failed its counters are left
out. What the report would not print (chunks that are no steps) is not on the page. Histograms have
vLLM's bounds: one query overlays client and server. The page holds the load under way, or the
last; warm-up is not on it. Sums are kept by hand; the text is built at each ClientSample. Must not:
raise, wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from loadgen import __version__
from loadgen.acceptance import CHUNKS, COUNTERS, PER_REQUEST, ChunkSums, drafts_of, of_request
from loadgen.metrics import METRICS, REQUEST_BOUNDS_S, TOKEN_BOUNDS_S, TTFT_BOUNDS_S, figure
from loadgen.summarize import counter_growth
from loadgen.types import (
    Broke,
    Cancelled,
    Caveat,
    ClientSample,
    Completed,
    Engine,
    Load,
    Observer,
    Phase,
    PhaseRecord,
    Plan,
    Record,
    Refused,
    RequestRecord,
    RunInfo,
    ServerInfo,
    Snapshot,
    SpecCounters,
    TimedOut,
)
from loadgen.written import load_label
from reports import page as laid
from reports.exposition import Family, Labels, Page, joined

MOST_CATEGORIES = 100
"""So that a page stays below 5,000 series."""
MOST_POSITIONS = 64
MOST_CHARACTERS = 200
"""Of a label that a server or a data set says."""
LATE_S = 10.0
"""A page that is read every second, in 5 s at most, is gone when it was not read for so long."""


def _counter(name: str, about: str) -> Family:
    return Family(name=f"draftload_{name}_total", kind="counter", help=about)


def _gauge(name: str, about: str) -> Family:
    return Family(name=f"draftload_{name}", kind="gauge", help=about)


def _histogram(name: str, about: str, buckets: tuple[float, ...]) -> Family:
    return Family(name=f"draftload_{name}_seconds", kind="histogram", help=about, buckets=buckets)


REQUESTS = _counter("requests", "Requests that ended, by outcome.")
OUTPUT_TOKENS = _counter("output_tokens", "Output tokens of completed requests.")
PROMPT_TOKENS = _counter("prompt_tokens", "Input tokens of completed requests.")
DECODE_TOKENS = _counter(
    "decode_tokens", "Output tokens less the prefill's, where decode steps are known."
)
DECODE_STEPS = _counter(
    "decode_steps", "Decode steps: target passes of a request after its prefill."
)
DRAFTS = _counter("drafts", "Decode steps that had a draft.")
DRAFT_TOKENS = _counter("draft_tokens", "Tokens drafted.")
ACCEPTED = _counter("accepted_tokens", "Draft tokens accepted.")
ACCEPTED_AT = _counter(
    "accepted_tokens_at_position", "Drafts whose token at this position, from 1, was accepted."
)
STREAMED = _counter("streamed_tokens", "Output tokens as they came, of all streams.")
CPU_SECONDS = _counter(
    "client_cpu_seconds", "User and system time of the client process since it began."
)
TTFT_SECONDS = _histogram("ttft", "First chunk that carries a token less sent.", TTFT_BOUNDS_S)
CHUNK_GAP = _histogram("chunk_gap", "Time between token-carrying chunks.", TOKEN_BOUNDS_S)
TPOT = _histogram("tpot", "Time per output token after the first chunk.", TOKEN_BOUNDS_S)
DURATION = _histogram("request_duration", "Finish chunk less sent.", REQUEST_BOUNDS_S)
SEND_DELAY = _histogram(
    "send_delay", "Open loop: sent less when it should have left.", TTFT_BOUNDS_S
)
IN_FLIGHT = _gauge("requests_in_flight", "Requests in flight at the client.")
TARGET = _gauge("requests_in_flight_target", "Requests that a closed loop holds in flight.")
CPU_RATIO = _gauge("client_cpu_ratio", "Cores that the client used since the last sample.")
LAG = _gauge(
    "client_loop_lag_seconds", "How late the client's loop was at most since the last sample."
)
SCRAPE_UP = _gauge("scrape_up", "Whether the server's metrics page was read when last tried.")
RUNNING = _gauge("server_requests_running", "Requests that the server runs, as its page says.")
WAITING = _gauge("server_requests_waiting", "Requests that wait at the server, as its page says.")
KV_USE = _gauge("server_kv_cache_usage_ratio", "Share of the KV cache in use, as its page says.")
RUN_INFO = _gauge("run_info", "Always 1: what is measured, with which versions.")
RUN_ENDED = _gauge("run_ended", "Whether the run is over: 1 from its end on, with --linger.")
SERIES = _gauge("series", "Series on this page.")
# The monitor's own.
ACCEPTANCE_LENGTH = _gauge(
    "server_acceptance_length",
    "Acceptance length that the server shows itself, over its own window.",
)
SCRAPES = _counter("scrapes", "Scrapes of a server, by how they ended.")
RESTARTS = _counter("server_restarts", "Times that a server's counters went back.")
SCRAPE_DURATION = _gauge("scrape_duration_seconds", "How long the last scrape took.")
LAST_SCRAPE = _gauge("last_scrape_timestamp_seconds", "Unix time of the last scrape that worked.")
MONITOR_BYTES = _gauge("monitor_resident_bytes", "Resident memory of the monitor.")

HISTOGRAMS = (
    (TTFT_SECONDS, "ttft_s"),
    (CHUNK_GAP, "chunk_gap_s"),
    (TPOT, "tpot_s"),
    (DURATION, "e2el_s"),
    (SEND_DELAY, "send_delay_s"),
)
"""And the row of METRICS that each is of."""
STEPS = (DECODE_TOKENS, DECODE_STEPS)
SPECULATED = (*STEPS, DRAFTS, DRAFT_TOKENS, ACCEPTED, ACCEPTED_AT)
FAMILIES = (
    REQUESTS, OUTPUT_TOKENS, PROMPT_TOKENS, *SPECULATED, STREAMED, CPU_SECONDS,
    *(family for family, _ in HISTOGRAMS), IN_FLIGHT, TARGET, CPU_RATIO, LAG, SCRAPE_UP, RUNNING,
    WAITING, KV_USE, RUN_INFO, RUN_ENDED, SERIES, ACCEPTANCE_LENGTH, SCRAPES, RESTARTS,
    SCRAPE_DURATION, LAST_SCRAPE, MONITOR_BYTES,
)  # fmt: skip
OUTCOMES = {Completed: "completed", Refused: "refused", Broke: "broke", TimedOut: "timed_out",
            Cancelled: "cancelled"}  # fmt: skip

_METRICS = {metric.name: metric for metric in METRICS}


# ── the run ──────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Seen:
    """Of the load under way: what decides which sources speak. Of the requests that completed,
    `decoded` had a step, `figured` told figures of their own, `drafted` drafts among them, `told`
    steps. `grown`, and the most `tokens` after prefills in it: by category, "" for all."""

    chunks: ChunkSums = field(default_factory=ChunkSums)
    depth: int | None = None
    failed: int = 0
    decoded: int = 0
    figured: int = 0
    drafted: int = 0
    told: int = 0
    grown: dict[str, SpecCounters] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    start: Snapshot | None = None
    shot: Snapshot | None = None
    sample: ClientSample | None = None


class Exporter:
    """One page for a run, or for all cells of a sweep one after the other.

    `show` gets the text whenever it was built anew. Give each run to `watch`.
    """

    def __init__(self, engines: Mapping[str, Engine], show: Callable[[bytes], None]) -> None:
        self._engines = engines
        self._show = show
        self._page = Page(FAMILIES)
        self._counted = Page(SPECULATED)
        figure(_METRICS["chunk_gap_s"], ())  # imports numpy: now, and not in a phase

    @contextmanager
    def watch(self, plan: Plan, info: RunInfo) -> Iterator[Observer]:
        """The observer of a run. What stood of the one before is gone; its own stays."""
        self._server = info.server
        self._engine = self._engines.get(info.server.engine, self._engines["openai"])
        self._phases = {phase.name: phase for phase in plan.phases if phase.measured}
        self._categories = tuple(dict.fromkeys(label(p.category) for p in plan.prompts))
        self._run = run_labels(info.run_id, info.scenario.name, info.server)
        self._stamped = 0
        self._under_way: tuple[Load, int] | None = None
        # Of the server's page, over all loads: its failure is told once a run.
        self._up: bool | None = None
        self._read_at_s: float | None = None
        self._enter(next(iter(self._phases.values())))
        self._build()
        try:
            yield self._see
        finally:
            self._idle()
            self._page.set(RUN_ENDED, self._labels, 1)
            self._build()

    def _enter(self, phase: Phase) -> None:
        """A load begins: its labels, and the page without what stood of the one before."""
        page = self._page
        self._phase, self._seen = phase, _Seen(depth=self._server.draft_depth)
        self._labels = {**self._run, "concurrency": load_words(phase.load)}
        self._before = self._stamped
        page.clear()
        self._counted.clear()
        page.set(RUN_INFO, {**self._labels, **info_labels(self._server)}, 1)
        page.set(RUN_ENDED, self._labels, 0)
        if self._up is not None:
            page.set(SCRAPE_UP, self._labels, self._up)
        # From zero on: an increase from nothing to the first failure would not be seen.
        for category in self._categories:
            by = {**self._labels, "category": page.bounded("category", category, MOST_CATEGORIES)}
            page.add(OUTPUT_TOKENS, by, 0)
            for outcome in OUTCOMES.values():
                page.add(REQUESTS, {**by, "outcome": outcome}, 0)

    def _is_measured(self, name: str) -> bool:
        """Whether a record is of a measured phase, which may have begun with it. The phases of one
        load, a category each, share the page."""
        phase = self._phases.get(name)
        if phase is None:
            return False
        under_way = (phase.load, phase.repeat)
        if under_way != self._under_way:
            self._under_way = under_way
            self._enter(phase)
        elif phase is not self._phase:
            self._phase = phase
            self._seen.start = self._seen.shot = self._seen.sample = None
        return True

    def _see(self, record: Record) -> None:
        match record:
            case RequestRecord():
                if self._is_measured(record.phase):
                    self._request(record)
                self._stamped += 0 if record.chunk_tokens is None else record.osl_tokens
            case ClientSample() if self._is_measured(record.phase):
                self._client(record)
                self._build()
            case Snapshot():
                self._read_at_s = record.at_s
                self._stands(up=True)
                if self._is_measured(record.phase):
                    self._scraped(record)
            case PhaseRecord(measured=True):
                self._idle()
                self._build()
            case Caveat(code="metrics-page"):
                self._scrape_failed()
            case _:
                pass

    def _request(self, record: RequestRecord) -> None:
        seen = self._seen
        add_request(self._page, self._labels, record, self._engine, self._server)
        if not isinstance(record.outcome, Completed):
            seen.failed += 1
            return
        seen.chunks.add(record)
        seen.decoded += record.osl_tokens > 1  # one token: there is nothing to tell
        figures = drafts_of(record, self._server.state)
        if record.spec is None or figures is None:
            return
        seen.figured += 1
        seen.drafted += figures.drafts is not None or figures.accepted_tokens is not None
        seen.told += record.spec.steps is not None and record.step_tokens is None
        if self._server.draft_depth is None and record.spec.draft_depth is not None:
            seen.depth = max(seen.depth or 0, record.spec.draft_depth)

    def _client(self, sample: ClientSample) -> None:
        page, labels, last = self._page, self._labels, self._seen.sample
        self._seen.sample = sample
        page.set(IN_FLIGHT, labels, sample.in_flight)
        if sample.target is not None:
            page.set(TARGET, labels, sample.target)
        page.set(LAG, labels, sample.loop_lag_s)
        if sample.tokens > self._before:  # where no chunk tells its tokens: none, and no zero
            page.set(STREAMED, labels, sample.tokens - self._before)
        page.set(CPU_SECONDS, labels, sample.cpu_s)
        if last is not None and sample.at_s > last.at_s:
            page.set(CPU_RATIO, labels, (sample.cpu_s - last.cpu_s) / (sample.at_s - last.at_s))
        read_at_s = self._read_at_s if self._engine.tick_prefixes else None
        if read_at_s is not None and sample.at_s - read_at_s > LATE_S:
            self._scrape_failed()

    def _idle(self) -> None:
        """A phase is over: nothing is in flight, and what was of a moment is gone."""
        self._page.set(IN_FLIGHT, self._labels, 0)
        self._page.clear(TARGET, CPU_RATIO, LAG)

    def _scraped(self, shot: Snapshot) -> None:
        page, labels, seen = self._page, self._labels, self._seen
        load = self._engine.load(shot.samples)
        for family, value in (
            (RUNNING, load.running),
            (WAITING, load.waiting),
            (KV_USE, load.kv_cache_use),
        ):
            if value is not None:
                page.set(family, labels, value)
        before, seen.shot = seen.shot, shot
        if shot.edge == "start":
            seen.start = shot
        elif seen.start is not None and not (seen.figured and seen.drafted):
            grown = growth(seen.start, before or shot, shot, self._engine)
            category = self._phase.category or ""
            seen.grown.pop(category, None)
            if grown is None:
                seen.start = None  # a restart, or another's page: nothing of this phase is told
            else:
                seen.grown[category] = grown
                # The two counters that it is the difference of may not move at one instant.
                decoded = decoded_tokens(grown) or 0
                seen.tokens[category] = max(seen.tokens.get(category, 0), decoded)

    def _stands(self, *, up: bool) -> None:
        self._up = up
        self._page.set(SCRAPE_UP, self._labels, up)

    def _scrape_failed(self) -> None:
        self._stands(up=False)
        self._page.clear(RUNNING, WAITING, KV_USE)

    def _build(self) -> None:
        seen, page, counted = self._seen, self._page, self._counted
        counted.clear()
        if seen.decoded and not seen.failed and self._server.state != "off":
            for category, grown in seen.grown.items():
                shown = category and page.bounded("category", label(category), MOST_CATEGORIES)
                by = {**self._labels, "category": shown, "source": COUNTERS}
                if not seen.drafted:
                    add_drafts(counted, by, grown)
                if grown.steps and not seen.figured and decoded_tokens(grown) is not None:
                    counted.add(DECODE_STEPS, by, grown.steps)
                    counted.add(DECODE_TOKENS, by, seen.tokens[category])
        hidden = not_shown(seen.chunks, self._engine, seen.depth, told=bool(seen.told))
        if counted.rows(DECODE_STEPS):
            hidden += STEPS
        page.hide(*hidden)
        page.set(SERIES, self._labels, 0)
        page.set(SERIES, self._labels, len(page) + len(counted))
        self._show(joined((page, counted)))


def growth(start: Snapshot, last: Snapshot, now: Snapshot, engine: Engine) -> SpecCounters | None:
    """What the server's counters grew by since a phase began, as the report has it at its end.

    None: they are not one server's, or went back, since the start or since the `last` page.
    """
    if now.edge == "tick":  # holds only what is sampled in a phase
        kept = {k: v for k, v in start.samples.items() if k.startswith(engine.tick_prefixes)}
        start = msgspec.structs.replace(start, samples=kept)
        now = msgspec.structs.replace(now, edge="end")
    last = msgspec.structs.replace(last, edge="tick")
    return counter_growth((start, last, now), engine)[0]


def decoded_tokens(grown: SpecCounters) -> int | None:
    """Tokens after the prefills as the server counts them, to go with its own steps. None where it
    does not: while requests are under way those that completed here are of another window."""
    if grown.generated_tokens is None or grown.requests is None:
        return None
    return max(grown.generated_tokens - grown.requests, 0)


# ── labels ───────────────────────────────────────────────────────────────────────────────────────


def label(text: str) -> str:
    """What a server or a data set says, as a label: short, and harmless in a terminal."""
    return laid.clean(text[:MOST_CHARACTERS])


def run_labels(run_id: str, scenario: str, server: ServerInfo) -> dict[str, str]:
    """What all series of a run have in common, but for the load."""
    return {
        "run_id": run_id,
        "scenario": label(scenario),
        "engine": server.engine,
        "model": label(server.model),
        "spec": spec_label(server),
    }


def info_labels(server: ServerInfo) -> dict[str, str]:
    """What RUN_INFO tells besides."""
    return {
        "version": __version__,
        "engine_version": label(server.version or ""),
        "simulated": str(server.simulated).lower(),
    }


def spec_label(server: ServerInfo) -> str:
    """'eagle3 k = 3', 'none', 'unknown': as the server reports it, else as it was started."""
    if server.state == "off":
        return "none"
    if server.spec_reported is not None:
        server = msgspec.structs.replace(server, config=None)
    said = laid.speculation(server)
    return "unknown" if said == laid.UNKNOWN else label(said)


def load_words(load: Load) -> str:
    """'8', of an open loop '4/s'."""
    return load_label(load).partition("=")[2]


# ── counting ─────────────────────────────────────────────────────────────────────────────────────


def add_request(
    page: Page, labels: Labels, record: RequestRecord, engine: Engine, server: ServerInfo
) -> None:
    """A request that ended. Only a completed one tells more than that it ended."""
    by = {**labels, "category": page.bounded("category", label(record.category), MOST_CATEGORIES)}
    page.add(REQUESTS, {**by, "outcome": OUTCOMES[type(record.outcome)]})
    if not isinstance(record.outcome, Completed):
        return
    page.add(OUTPUT_TOKENS, by, record.osl_tokens)
    if record.isl_tokens is not None:
        page.add(PROMPT_TOKENS, by, record.isl_tokens)
    for family, name in HISTOGRAMS:
        values = _METRICS[name].values(record)
        if len(values):
            page.observe(family, labels, values)
    if server.state != "off":
        _speculated(page, by, record, engine, server)


def not_shown(chunks: ChunkSums, engine: Engine, depth: int | None, *, told: bool) -> list[Family]:
    """What add_request counted and a page must not show, where chunks are no decode steps: their
    gaps, and their steps unless requests `told` theirs."""
    no_steps = bool(chunks.disproved(engine, depth))
    gaps = [CHUNK_GAP] if no_steps or engine.chunk_is_step is False else []
    return gaps + (list(STEPS) if no_steps and not told else [])


def _speculated(
    page: Page, by: Labels, record: RequestRecord, engine: Engine, server: ServerInfo
) -> None:
    """Its decode steps and drafts."""
    figures = drafts_of(record, server.state)
    by = {**by, "source": CHUNKS if figures is None else PER_REQUEST}
    tokens, steps, _ = of_request(record, engine, server.draft_depth) or (0, 0, "")
    if tokens or steps:
        page.add(DECODE_TOKENS, by, tokens)
        page.add(DECODE_STEPS, by, steps)
    if figures is not None:
        add_drafts(page, by, figures)


def add_drafts(page: Page, by: Labels, figures: SpecCounters) -> None:
    """Draft figures where they are known. By position without category: a page has its bounds."""
    for family, count in (
        (DRAFTS, figures.drafts),
        (DRAFT_TOKENS, figures.draft_tokens),
        (ACCEPTED, figures.accepted_tokens),
    ):
        if count is not None:
            page.add(family, by, count)
    without = {name: value for name, value in by.items() if name != "category"}
    for position, count in enumerate((figures.accepted_by_position or ())[:MOST_POSITIONS], 1):
        page.add(ACCEPTED_AT, {**without, "position": str(position)}, count)
