"""The metrics page of a run or sweep while it goes on: an observer, not a report.

All metrics of draftload's pages stand here, in FAMILIES; reports/monitor_page.py takes its own from
them. Counters of decode tokens, decode steps, drafts and accepted tokens grow by whole requests,
and only by requests whose steps are known, so that over any window, within one `source`,
    AL = rate(decode tokens) ÷ rate(decode steps)
    AL where drafted = 1 + rate(accepted tokens) ÷ rate(drafts) Histograms have vLLM 0.32's bounds: one query overlays client and server.
The page holds the measured phase under way, or the last; warm-up is not on it. Sums are kept by
hand; the text is built at each ClientSample and handed to whoever serves it. Must not: raise, wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from loadgen import __version__
from loadgen.acceptance import CHUNKS, COUNTERS, PER_REQUEST, STEPS_FROM_CHUNKS, of_request
from loadgen.metrics import METRICS
from loadgen.summarize import counter_growth
from loadgen.types import (
    ClientSample,
    ClosedLoop,
    Completed,
    Engine,
    Load,
    Phase,
    Plan,
    Record,
    RequestRecord,
    RunInfo,
    ServerInfo,
    Snapshot,
    SpecCounters,
)
from loadgen.written import load_label
from reports import page as laid
from reports.exposition import Family, Labels, Page

MOST_CATEGORIES = 100
"""So that a page stays below 5,000 series."""
MOST_POSITIONS = 64
MOST_CHARACTERS = 200
"""Of a label that a server or a data set says."""

# vllm/v1/metrics/loggers.py, 0.32: seconds.
_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_PER_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
_REQUEST = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip


def _counter(name: str, about: str) -> Family:
    return Family(name=f"draftload_{name}_total", kind="counter", help=about)


def _gauge(name: str, about: str) -> Family:
    return Family(name=f"draftload_{name}", kind="gauge", help=about)


def _histogram(name: str, about: str, buckets: tuple[float, ...]) -> Family:
    return Family(name=f"draftload_{name}_seconds", kind="histogram", help=about, buckets=buckets)


REQUESTS = _counter("requests", "Requests that ended, by outcome.")
OUTPUT_TOKENS = _counter("output_tokens", "Output tokens of completed requests.")
PROMPT_TOKENS = _counter("prompt_tokens", "Input tokens of completed requests.")
DECODE_TOKENS = _counter("decode_tokens", "Tokens after the prefill's, where steps are known.")
DECODE_STEPS = _counter("decode_steps", "Target passes of a request after its prefill.")
DRAFTS = _counter("drafts", "Decode steps that had a draft.")
DRAFT_TOKENS = _counter("draft_tokens", "Tokens drafted.")
ACCEPTED = _counter("accepted_tokens", "Draft tokens accepted.")
ACCEPTED_AT = _counter(
    "accepted_tokens_at_position", "Drafts whose token at this position, from 1, was accepted."
)
STREAMED = _counter("streamed_tokens", "Output tokens as they came, of all streams.")
CPU_SECONDS = _counter("client_cpu_seconds", "User and system time of the client.")
TTFT_SECONDS = _histogram("ttft", "First chunk that carries a token less sent.", _TTFT)
CHUNK_GAP = _histogram("chunk_gap", "Time between token-carrying chunks.", _PER_TOKEN)
TPOT = _histogram("tpot", "Time per output token after the first chunk.", _PER_TOKEN)
DURATION = _histogram("request_duration", "Finish chunk less sent.", _REQUEST)
SEND_DELAY = _histogram("send_delay", "Open loop: sent less when it should have left.", _TTFT)
IN_FLIGHT = _gauge("requests_in_flight", "Requests in flight at the client.")
TARGET = _gauge("requests_in_flight_target", "Requests that a closed loop holds in flight.")
CPU_RATIO = _gauge("client_cpu_ratio", "Cores that the client used since the last sample.")
LAG = _gauge("client_loop_lag_seconds", "How late the client's loop was at most since then.")
SCRAPE_UP = _gauge("scrape_up", "Whether the server's metrics page was read when last tried.")
RUNNING = _gauge("server_requests_running", "Requests that the server runs, as its page says.")
WAITING = _gauge("server_requests_waiting", "Requests that wait at the server, as its page says.")
KV_USE = _gauge("server_kv_cache_usage_ratio", "Share of the KV cache in use, as its page says.")
RUN_INFO = _gauge("run_info", "Always 1: what is measured, with which versions.")
RUN_ENDED = _gauge("run_ended", "Whether the run is over: 1 from its end on, with --linger.")
SERIES = _gauge("series", "Series on this page.")
# The monitor's own.
ACCEPTANCE_LENGTH = _gauge(
    "acceptance_length", "Acceptance length that the server shows itself, over its own window."
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
FAMILIES = (
    REQUESTS, OUTPUT_TOKENS, PROMPT_TOKENS, DECODE_TOKENS, DECODE_STEPS, DRAFTS, DRAFT_TOKENS,
    ACCEPTED, ACCEPTED_AT, STREAMED, CPU_SECONDS, *(family for family, _ in HISTOGRAMS), IN_FLIGHT,
    TARGET, CPU_RATIO, LAG, SCRAPE_UP, RUNNING, WAITING, KV_USE, RUN_INFO, RUN_ENDED, SERIES,
    ACCEPTANCE_LENGTH, SCRAPES, RESTARTS, SCRAPE_DURATION, LAST_SCRAPE, MONITOR_BYTES,
)  # fmt: skip

_VALUES = {metric.name: metric.values for metric in METRICS}


# ── the run ──────────────────────────────────────────────────────────────────────────────────────


class Exporter:
    """One page for all cells of a sweep. `show` gets its text whenever it was built anew."""

    def __init__(self, engines: Mapping[str, Engine], show: Callable[[bytes], None]) -> None:
        self._engines = engines
        self._show = show
        self._page = Page(FAMILIES)
        self._phases: dict[str, Phase] = {}
        self._run: Labels = {}

    def begin(self, plan: Plan, info: RunInfo) -> Callable[[Record], None]:
        """The observer of a run; what stood of the one before is gone."""
        server = info.server
        self._server = server
        self._engine = self._engines.get(server.engine, self._engines["openai"])
        self._phases = {phase.name: phase for phase in plan.phases if phase.measured}
        self._run = run_labels(info.run_id, info.scenario.name, server)
        self._told = info_labels(server)
        self._enter("", None)
        self._build()
        return self._see

    def end(self) -> None:
        """The run, or the sweep, is over: the last text says so."""
        self._page.set(RUN_ENDED, self._labels, 1)
        self._build()

    def _enter(self, name: str, load: Load | None) -> None:
        """A phase begins: its labels, and the page without those of the one before."""
        self._name = name
        self._labels = {**self._run, "concurrency": "" if load is None else size_label(load)}
        self._page.clear()
        self._page.set(RUN_INFO, {**self._labels, **self._told}, 1)
        self._page.set(RUN_ENDED, self._labels, 0)
        self._first: ClientSample | None = None
        self._last: ClientSample | None = None
        self._start: Snapshot | None = None

    def _see(self, record: Record) -> None:
        if not isinstance(record, RequestRecord | ClientSample | Snapshot):
            return
        if record.phase != self._name:
            phase = self._phases.get(record.phase)
            if phase is None:
                return  # warm-up
            self._enter(phase.name, phase.load)
        if isinstance(record, RequestRecord):
            add_request(self._page, self._labels, record, self._engine, self._server)
        elif isinstance(record, ClientSample):
            self._client(record)
        else:
            self._scraped(record)

    def _client(self, sample: ClientSample) -> None:
        page, labels = self._page, self._labels
        first, last = self._first or sample, self._last
        self._first, self._last = first, sample
        page.set(IN_FLIGHT, labels, sample.in_flight)
        if sample.target is not None:
            page.set(TARGET, labels, sample.target)
        page.set(LAG, labels, sample.loop_lag_s)
        page.set(STREAMED, labels, sample.tokens - first.tokens)
        page.set(CPU_SECONDS, labels, sample.cpu_s - first.cpu_s)
        if last is not None and sample.at_s > last.at_s:
            page.set(CPU_RATIO, labels, (sample.cpu_s - last.cpu_s) / (sample.at_s - last.at_s))
        self._build()

    def _scraped(self, shot: Snapshot) -> None:
        page, labels = self._page, self._labels
        if shot.edge == "start":
            self._start = shot
        page.set(SCRAPE_UP, labels, bool(shot.samples))
        load = self._engine.load(shot.samples)
        for family, value in (
            (RUNNING, load.running),
            (WAITING, load.waiting),
            (KV_USE, load.kv_cache_use),
        ):
            if value is not None:
                page.set(family, labels, value)
        if self._start is not None and shot.edge == "end" and self._server.state != "off":
            grown, _ = counter_growth((self._start, shot), self._engine)
            if grown is not None:
                set_growth(page, labels, grown)
        self._build()

    def _build(self) -> None:
        self._page.set(SERIES, self._labels, len(self._page) + 1)
        self._show(self._page.text())


# ── labels ───────────────────────────────────────────────────────────────────────────────────────


def run_labels(run_id: str, scenario: str, server: ServerInfo) -> dict[str, str]:
    """What all series of a run have in common, but for the load."""
    return {
        "run_id": run_id,
        "scenario": scenario[:MOST_CHARACTERS],
        "engine": server.engine,
        "model": server.model[:MOST_CHARACTERS],
        "spec": spec_label(server),
    }


def info_labels(server: ServerInfo) -> dict[str, str]:
    """What RUN_INFO tells besides."""
    return {
        "version": __version__,
        "engine_version": (server.version or "")[:MOST_CHARACTERS],
        "simulated": str(server.simulated).lower(),
    }


def spec_label(server: ServerInfo) -> str:
    """'eagle3 k = 3', 'none', 'unknown'."""
    if server.state == "off":
        return "none"
    said = laid.speculation(server)
    return "unknown" if said == laid.UNKNOWN else said[:MOST_CHARACTERS]


def size_label(load: Load) -> str:
    """'8', of an open loop '4/s'."""
    return str(load.concurrency) if isinstance(load, ClosedLoop) else load_label(load)


# ── counting ─────────────────────────────────────────────────────────────────────────────────────


def add_request(
    page: Page, labels: Labels, record: RequestRecord, engine: Engine, server: ServerInfo
) -> None:
    """A request that ended. Only a completed one tells more than that it ended."""
    by = {**labels, "category": page.bounded("category", record.category, MOST_CATEGORIES)}
    outcome = record.outcome.__struct_config__.tag
    page.add(REQUESTS, {**by, "outcome": str(outcome)})
    if not isinstance(record.outcome, Completed):
        return
    page.add(OUTPUT_TOKENS, by, record.osl_tokens)
    if record.isl_tokens is not None:
        page.add(PROMPT_TOKENS, by, record.isl_tokens)
    for family, name in HISTOGRAMS:
        values = _VALUES[name](record)
        if len(values):
            page.observe(family, labels, values)
    if server.state != "off":
        _speculated(page, by, record, engine, server.draft_depth)


def _speculated(
    page: Page, by: Labels, record: RequestRecord, engine: Engine, depth: int | None
) -> None:
    """Its decode steps and drafts. Both have one source, so that coverage can be formed."""
    steps = of_request(record, engine, depth)
    alone = steps is not None and steps[2] == STEPS_FROM_CHUNKS and record.spec is None
    by = {**by, "source": CHUNKS if alone else PER_REQUEST}
    if steps is not None:
        page.add(DECODE_TOKENS, by, steps[0])
        page.add(DECODE_STEPS, by, steps[1])
    if record.spec is not None:
        _drafted(page.add, by, record.spec)


def _drafted(put: Callable[[Family, Labels, float], None], by: Labels, spec: SpecCounters) -> None:
    """Draft figures where they are known. By position without category: a page has its bounds."""
    for family, count in (
        (DRAFTS, spec.drafts),
        (DRAFT_TOKENS, spec.draft_tokens),
        (ACCEPTED, spec.accepted_tokens),
    ):
        if count is not None:
            put(family, by, count)
    without = {name: value for name, value in by.items() if name != "category"}
    for position, count in enumerate((spec.accepted_by_position or ())[:MOST_POSITIONS], 1):
        put(ACCEPTED_AT, {**without, "position": str(position)}, count)


def set_growth(page: Page, labels: Labels, grown: SpecCounters) -> None:
    """What the server's counters grew by in the phase. Its own tokens go with its own steps."""
    by = {**labels, "source": COUNTERS}
    _drafted(page.set, by, grown)
    if grown.steps is not None and None not in (grown.generated_tokens, grown.requests):
        page.set(DECODE_STEPS, by, grown.steps)
        page.set(DECODE_TOKENS, by, (grown.generated_tokens or 0) - (grown.requests or 0))
