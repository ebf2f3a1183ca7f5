"""The monitor's page: every server's counters and gauges in one vocabulary, and its canary's.

A watcher of loadgen/monitor.py. Each server has a part of the page, which begins anew where another
engine, model or speculation answers at its address; what counts its scrapes goes on. Figures of the
server's own counters have an empty `scenario`, those of the canary its name. A figure that a server
does not tell has no series. Must not: scrape, mix sources in one series.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from loadgen.acceptance import COUNTERS, ChunkSums
from loadgen.types import (
    Completed,
    Probed,
    Reading,
    ScrapeResult,
    ServerInfo,
    ServerLoad,
    SpecCounters,
)
from reports.exposition import Page, joined
from reports.prometheus import (
    ACCEPTANCE_LENGTH,
    DECODE_STEPS,
    DECODE_TOKENS,
    FAMILIES,
    KV_USE,
    LAST_SCRAPE,
    MONITOR_BYTES,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    REQUESTS,
    RESTARTS,
    RUN_INFO,
    RUNNING,
    SCRAPE_DURATION,
    SCRAPE_UP,
    SCRAPES,
    SERIES,
    WAITING,
    add_drafts,
    add_request,
    info_labels,
    not_shown,
    run_labels,
)

_GAUGES = (RUNNING, WAITING, KV_USE, ACCEPTANCE_LENGTH)


@dataclass
class _Part:
    """One server's part of the page: `probed` is its canary's, of which `chunks`, `depth` and
    `told` say what may be shown. `decoded` is never less than it was: the two counters that it is
    the difference of are not read at one instant."""

    page: Page = field(default_factory=lambda: Page(FAMILIES))
    probed: Page = field(default_factory=lambda: Page(FAMILIES))
    chunks: ChunkSums = field(default_factory=ChunkSums)
    depth: int | None = None
    told: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    scrapes: Counter[ScrapeResult] = field(default_factory=Counter)
    restarts: int = 0
    generated: int = 0
    requests: int = 0
    decoded: int = 0


class MonitorPage:
    """Call it with every event; `show` gets the text of the page after each."""

    def __init__(self, run_id: str, show: Callable[[bytes], None]) -> None:
        self._run_id = run_id
        self._show = show
        self._parts: dict[str, _Part] = {}
        self._us = {"run_id": run_id, "scenario": ""}
        self._own = Page(FAMILIES)
        self._own.set(SERIES, self._us, 1)

    def __call__(self, event: Reading | Probed) -> None:
        part = self._parts.setdefault(event.server, _Part())
        if isinstance(event, Reading) or not part.labels:  # a canary may know more of one server
            self._named(part, event.server, event.info)
        if isinstance(event, Probed):
            _probed(part, event)
        else:
            self._scraped(part, event)
            self._own.set(MONITOR_BYTES, self._us, event.rss_bytes)
        parts = self._parts.values()
        pages = [self._own, *(page for one in parts for page in (one.page, one.probed))]
        self._own.set(SERIES, self._us, sum(map(len, pages)))
        self._show(joined(pages))

    def _named(self, part: _Part, server: str, info: ServerInfo | None) -> None:
        """The labels of who answers there; where they change, the part begins anew."""
        who = {"run_id": self._run_id, "scenario": "", "engine": "", "model": "", "spec": ""}
        if info is not None:
            who = run_labels(self._run_id, "", info)
        labels = {**who, "concurrency": "", "server": server}
        if labels != part.labels:
            part.page.clear()
            part.probed.clear()
            part.chunks, part.depth, part.told = ChunkSums(), None, False
            part.labels = labels
            part.generated = part.requests = part.decoded = 0
        part.page.clear(RUN_INFO)
        if info is not None:
            part.page.set(RUN_INFO, labels | info_labels(info), 1)

    def _scraped(self, part: _Part, reading: Reading) -> None:
        page, labels = part.page, part.labels
        page.clear(*_GAUGES)  # what a server said before it went away is not how it stands
        part.scrapes[reading.result] += 1
        part.restarts += reading.restarted
        for result, count in part.scrapes.items():
            page.set(SCRAPES, labels | {"result": result}, count)
        page.set(SCRAPE_UP, labels, reading.result == "ok")
        page.set(RESTARTS, labels, part.restarts)
        page.set(SCRAPE_DURATION, labels, reading.duration_s)
        if reading.result == "ok":
            page.set(LAST_SCRAPE, labels, reading.at_unix_s)
        load = reading.load or ServerLoad()
        for family, value in (
            (RUNNING, load.running),
            (WAITING, load.waiting),
            (KV_USE, load.kv_cache_use),
            (ACCEPTANCE_LENGTH, reading.acceptance_gauge),
        ):
            if value is not None:
                page.set(family, labels, value)
        if reading.grown is not None:
            off = reading.info is not None and reading.info.state == "off"
            _grew(part, reading.grown, off=off)


def _probed(part: _Part, event: Probed) -> None:
    """A canary's request; of its chunks what they are proven or not disproved to be."""
    record, spec = event.record, event.record.spec
    labels = part.labels | {"scenario": event.scenario, "concurrency": "1"}
    add_request(part.probed, labels, record, event.engine, event.info)
    if isinstance(record.outcome, Completed):
        part.chunks.add(record)
        if spec is not None:
            part.told |= spec.steps is not None and record.step_tokens is None
            part.depth = max(part.depth or 0, spec.draft_depth or 0) or None
    depth = event.info.draft_depth or part.depth
    part.probed.hide(*not_shown(part.chunks, event.engine, depth, told=part.told))


def _grew(part: _Part, grown: SpecCounters, *, off: bool) -> None:
    """Counters, on by what they grew. Without speculation zeros tell of no acceptance."""
    page, labels = part.page, part.labels
    if grown.generated_tokens is not None:
        page.add(OUTPUT_TOKENS, labels, grown.generated_tokens)
        part.generated += grown.generated_tokens
    if grown.prompt_tokens is not None:
        page.add(PROMPT_TOKENS, labels, grown.prompt_tokens)
    if grown.requests is not None:
        page.add(REQUESTS, labels | {"outcome": "completed"}, grown.requests)
        part.requests += grown.requests
    if off:
        return
    labels = labels | {"source": COUNTERS}
    add_drafts(page, labels, grown)
    if grown.steps is not None and None not in (grown.generated_tokens, grown.requests):
        part.decoded = max(part.decoded, part.generated - part.requests)
        page.set(DECODE_TOKENS, labels, part.decoded)
        page.add(DECODE_STEPS, labels, grown.steps)
