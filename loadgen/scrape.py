"""GET the metrics page → Snapshot: on the idle borders of a phase, and in ticks during it.

A scrape has a session of its own and never delays a request: pages are cut to the families that
matter before they are parsed (one pass of a regular expression, about 1 ms for vLLM's 55 KB, where
the prometheus_client parser takes 20). Of a page that every read drains (Engine.drain) the running
sums stand in for the page, so that Snapshots stay cumulative, and no read is given up half way.
Must not: know what a family means: that is Engine's.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from time import perf_counter
from typing import Literal

import aiohttp

from loadgen.transport import bounded, environment_proxy, secrets_of
from loadgen.types import LOST, Caveat, Engine, Observer, ScrapeResult, Snapshot
from loadgen.written import hide

MAX_PAGE_BYTES = 8 << 20
SETTLE_POLL_S = 0.1
BEYOND = 2.0**53
"""A sample as large is no count: floats skip whole numbers from here on."""

# name{labels} value [timestamp]: Prometheus text format 0.0.4. Comments never match.
_SERIES = re.compile(
    r"^([a-zA-Z_:][a-zA-Z0-9_:]*(?:\{[^\n]*\})?)[ \t]+([^\s#]+)(?:[ \t]+-?\d+)?[ \t]*$",
    re.MULTILINE,
)


def parse_page(page: str, prefixes: tuple[str, ...] = ()) -> dict[str, float]:
    """`name{labels}` → value, without histogram buckets and `_created` twins.

    `prefixes` () keeps every family. Lines that are not series, NaN and infinities are left out.
    """
    samples = {}
    for series, text in _SERIES.findall(page):
        name = series.partition("{")[0]
        if name.endswith(("_bucket", "_created")) or not series.startswith(prefixes or ""):
            continue
        try:
            value = float(text)
        except ValueError:
            continue
        if abs(value) < BEYOND:  # not NaN either
            samples[series] = value
    return samples


class Scraper:
    """Reads one server's metrics page. `url` None: there is none, and nothing is recorded.

    `observe` gets every Snapshot, and one Caveat when the page fails; `zero` is the run's start on
    `perf_counter`. `result` and `why` tell how the last read ended.
    """

    def __init__(
        self,
        url: str | None,
        engine: Engine,
        observe: Observer,
        *,
        zero: float,
        headers: dict[str, str] | None = None,
        timeout_s: float = 5.0,
        tls: ssl.SSLContext | bool = True,
    ) -> None:
        self.url = url
        self.result: ScrapeResult = "ok"
        self.why = ""
        self._told = False
        self._reading: asyncio.Future[str | None] | None = None
        self._sums: dict[str, float] | None = None  # of a page that a read drains
        self._engine = engine
        self._observe = observe
        self._zero = zero
        self._headers = headers or {}
        self._tls = tls
        self._proxy = None if url is None else environment_proxy(url)
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def samples(self, prefixes: tuple[str, ...] = ()) -> dict[str, float] | None:
        """The page's series, or None; of a drained page the sums over all that was read of it.

        Who comes while a read is under way shares it; who leaves does not end it: what it drains
        would be lost.
        """
        if self._reading is None or self._reading.done():
            self._reading = asyncio.ensure_future(self._read())
        page = await asyncio.shield(self._reading)
        if page is None:
            return None
        if self._sums is None:
            return parse_page(page, prefixes)
        return {k: v for k, v in self._sums.items() if k.startswith(prefixes or "")}

    @property
    def drains(self) -> bool:
        """Every read of this page takes away what it tells."""
        return self._sums is not None

    def reads(self, url: str, engine: Engine) -> bool:
        """Whether it is this engine's page at this address that it reads."""
        return self.url == url and self._engine is engine

    async def end(self) -> None:
        """Give up the read that is under way, if one is."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> str | None:
        """The page's text, or None. A drained page is added to the sums; a read that failed may
        have drained it, so it is a loss."""
        if self.url is None:
            return None
        try:
            async with (
                aiohttp.ClientSession(
                    timeout=self._timeout,
                    proxy=self._proxy,
                    connector=aiohttp.TCPConnector(ssl=self._tls),
                ) as session,
                session.get(self.url, headers=self._headers) as response,
            ):
                body = await bounded(response, MAX_PAGE_BYTES + 1)
                page = body.decode("utf-8", "replace")
                drain = self._engine.drain if page.lstrip().startswith("[") else None
                why = _unusable(response, body, is_json=drain is not None)
                if not why:
                    if drain is not None:
                        self._sums = drain(page, self._sums or {})
                    self.result, self.why = "ok", ""
                    return page
                self.result = "refused" if response.status != 200 else "garbage"
        except ValueError as fault:
            self.result = "garbage"
            why = f"the metrics page was not what it should be: {fault}"
        except (aiohttp.ClientError, OSError, TimeoutError) as fault:
            self.result = "timed_out" if isinstance(fault, TimeoutError) else "unreachable"
            why = f"the metrics page failed: {type(fault).__name__} {fault}".strip()
        if self._sums is not None:
            self._sums[LOST] = self._sums.get(LOST, 0.0) + 1
        self.why = hide(why, secrets_of(self.url, self._headers))[:300]
        if not self._told:
            self._told = True
            self._observe(
                Caveat(
                    code="metrics-page",
                    message=f"{self.why}.",
                    advice="Acceptance from the server's counters needs it; what else there is, is "
                    "used. Give its address with --metrics-url.",
                )
            )
        return None

    async def border(
        self, phase: str, edge: Literal["start", "end"], *, patience_s: float = 5.0
    ) -> None:
        """A snapshot of an idle server whose counters have come to rest, waited for up to a bound.

        At rest: nothing running or waiting, and two scrapes in a row agree. Where gauges go stale
        on an idle server (Engine.settle_s), only that they agree, so long apart.
        """
        stale = self._engine.settle_s is not None
        pause = SETTLE_POLL_S if self._engine.settle_s is None else self._engine.settle_s
        before: dict[str, float] | None = None
        deadline = perf_counter() + patience_s
        while (samples := await self.samples()) is not None:
            load = self._engine.load(samples)
            busy = not stale and bool(load.running or load.waiting)
            settled = not busy and samples_agree(before, samples, self._engine)
            late = perf_counter() > deadline
            if settled or late:
                at_s = perf_counter() - self._zero
                self._observe(
                    Snapshot(at_s=at_s, phase=phase, edge=edge, samples=samples, settled=settled)
                )
                return
            before = samples
            await asyncio.sleep(pause)

    async def ticks(self, phase: str, every_s: float = 1.0) -> None:
        """Snapshots of `tick_prefixes` until cancelled."""
        prefixes = self._engine.tick_prefixes
        while self.url is not None and prefixes:
            await asyncio.sleep(every_s)
            samples = await self.samples(prefixes)
            if samples is not None:
                at_s = perf_counter() - self._zero
                self._observe(Snapshot(at_s=at_s, phase=phase, edge="tick", samples=samples))


def _unusable(response: aiohttp.ClientResponse, body: bytes, *, is_json: bool) -> str:
    """Why this answer is no metrics page; "" where it is one.

    A page ends with a line end (text format 0.0.4): without one a value may be cut in half.
    """
    if response.status != 200:
        return f"the metrics page answered HTTP {response.status}"
    if len(body) > MAX_PAGE_BYTES:
        return f"the metrics page is over {MAX_PAGE_BYTES >> 20} MiB"
    if response.content_type == "text/html":
        return "the metrics page is HTML, no metrics"
    whole = not body or is_json or body.endswith(b"\n")
    return "" if whole else "the metrics page is cut short"


def samples_agree(before: dict[str, float] | None, now: dict[str, float], engine: Engine) -> bool:
    """The engine's speculation and token counters did not move between two scrapes."""
    if before is None or engine.counters(before) != engine.counters(now):
        return False
    work = engine.work
    return work is None or all(before.get(s) == n for s, n in now.items() if s.startswith(work))
