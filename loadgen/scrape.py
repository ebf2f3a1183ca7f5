"""GET the metrics page → Snapshot: on the idle borders of a phase, and in ticks during it.

A scrape has a session of its own and never delays a request: pages are cut to the families that
matter before they are parsed (one pass of a regular expression, about 1 ms for vLLM's 55 KB, where
the prometheus_client parser takes 20). Must not: know what a family means: that is Engine's.
"""

from __future__ import annotations

import asyncio
import re
from time import perf_counter
from typing import Literal

import aiohttp

from loadgen.transport import bounded, environment_proxy
from loadgen.types import Caveat, Engine, Observer, Snapshot

MAX_PAGE_BYTES = 8 << 20
SETTLE_POLL_S = 0.1

# name{labels} value [timestamp]: Prometheus text format 0.0.4. Comments never match.
_SERIES = re.compile(
    r"^([a-zA-Z_:][a-zA-Z0-9_:]*(?:\{[^\n]*\})?)[ \t]+([^\s#]+)(?:[ \t]+-?\d+)?[ \t]*$",
    re.MULTILINE,
)


def parse_page(page: str, prefixes: tuple[str, ...] = ()) -> dict[str, float]:
    """`name{labels}` → value, without histogram buckets and `_created` twins.

    `prefixes` () keeps every family. Lines that are not series, and NaN, are left out.
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
        if value == value:  # not NaN
            samples[series] = value
    return samples


class Scraper:
    """Reads one server's metrics page. `url` None: there is none, and nothing is recorded.

    `observe` gets every Snapshot, and one Caveat when the page fails; `zero` is the run's start on
    `perf_counter`.
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
    ) -> None:
        self.url = url
        self._told = False
        self._engine = engine
        self._observe = observe
        self._zero = zero
        self._headers = headers or {}
        self._proxy = None if url is None else environment_proxy(url)
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def page(self) -> str | None:
        """The page's text, or None."""
        if self.url is None:
            return None
        why = ""
        try:
            async with (
                aiohttp.ClientSession(timeout=self._timeout, proxy=self._proxy) as session,
                session.get(self.url, headers=self._headers) as response,
            ):
                body = await bounded(response, MAX_PAGE_BYTES)
                if response.status == 200:
                    return body.decode("utf-8", "replace")
                why = f"the metrics page answered HTTP {response.status}"
        except (aiohttp.ClientError, OSError, TimeoutError) as fault:
            why = f"the metrics page failed: {type(fault).__name__} {fault}".strip()
        if not self._told:
            self._told = True
            self._observe(
                Caveat(
                    code="metrics-page",
                    message=f"{why[:300]}.",
                    advice="Acceptance from the server's counters needs it; what else there is, is "
                    "used. Give its address with --metrics-url.",
                )
            )
        return None

    async def border(
        self, phase: str, edge: Literal["start", "end"], *, patience_s: float = 5.0
    ) -> None:
        """A snapshot of an idle server whose counters have come to rest, waited for up to a bound.

        At rest: nothing running or waiting (or, where those gauges go stale, nothing worked on),
        and two scrapes in a row agree.
        """
        before: dict[str, float] | None = None
        deadline = perf_counter() + patience_s
        while (page := await self.page()) is not None:
            samples = parse_page(page)
            load = self._engine.load(samples)
            busy = self._engine.work is None and bool(load.running or load.waiting)
            settled = not busy and samples_agree(before, samples, self._engine)
            late = perf_counter() > deadline
            if settled or late:
                at_s = perf_counter() - self._zero
                self._observe(
                    Snapshot(at_s=at_s, phase=phase, edge=edge, samples=samples, settled=settled)
                )
                return
            before = samples
            await asyncio.sleep(SETTLE_POLL_S)

    async def ticks(self, phase: str, every_s: float = 1.0) -> None:
        """Snapshots of `tick_prefixes` until cancelled."""
        prefixes = self._engine.tick_prefixes
        while self.url is not None and prefixes:
            await asyncio.sleep(every_s)
            page = await self.page()
            if page is not None:
                at_s = perf_counter() - self._zero
                samples = parse_page(page, prefixes)
                self._observe(Snapshot(at_s=at_s, phase=phase, edge="tick", samples=samples))


def samples_agree(before: dict[str, float] | None, now: dict[str, float], engine: Engine) -> bool:
    """The engine's speculation and token counters did not move between two scrapes."""
    if before is None or engine.counters(before) != engine.counters(now):
        return False
    work = engine.work
    return work is None or all(before.get(s) == n for s, n in now.items() if s.startswith(work))
