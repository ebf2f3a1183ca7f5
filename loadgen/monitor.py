"""Watches deployed servers for as long as it is left to: scrapes, growth of counters, a canary.

Every server has a loop of its own, so that one that hangs delays nobody. What a page says is mapped
by its Engine to one vocabulary and told as growth since the last scrape that worked: a counter that
went back was restarted and counts from zero, as Prometheus has it; one that goes back again and
again is several servers behind one URL, and not counted. All that is kept of a server is its last
counters and which scrapes saw a restart, so memory is flat, and the collector of cyclic garbage
stays on. A server that is away, speaks nonsense or comes back as another is a Reading that says so,
never an end. Must not: keep a history, show or export anything (watchers do), end by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from time import perf_counter
from typing import Any

import msgspec

from loadgen import preflight
from loadgen.errors import DraftloadError, UserError
from loadgen.measure import Attach
from loadgen.protocol import without_folder
from loadgen.runner import Tokenize, rss_bytes
from loadgen.scrape import Scraper
from loadgen.types import (
    Dialogue,
    Engine,
    Probed,
    Prompt,
    Reading,
    Request,
    Scenario,
    ScrapeResult,
    ServerInfo,
    ServerLoad,
    SpecCounters,
)

IDENTIFY_TIMEOUT_S = 30.0
PROBE_TIMEOUT_S = 60.0
PROBE_OUTPUT_TOKENS = 64
"""A probe's, unless another limit is asked for: enough steps for a figure, and light."""
STARTED = "process_start_time_seconds"
"""Of prometheus_client's own families, where a server has them (vLLM in one process)."""
RECENT, MANY, STEADY = 10, 3, 100
"""MANY restarts in the RECENT scrapes are several servers; none in STEADY, it is one after all."""
SEVERAL = "several servers behind one URL: give each replica its own --url"

Event = Reading | Probed
Watcher = Callable[[Event], None]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A light probe: of `prompts` one every `every_s`, of every category in turn, one at a time."""

    scenario: Scenario
    prompts: tuple[Prompt, ...]
    every_s: float


async def monitor(
    servers: Mapping[str, Attach],
    engines: Mapping[str, Engine],
    watchers: Sequence[Watcher],
    stop: asyncio.Event,
    say: Say,
    *,
    every_s: float,
    canary: Canary | None = None,
) -> None:
    """Scrapes and probes the servers (URL → how to reach it) until `stop`; watchers get the events.

    A watcher that raises is dropped, and `say` tells. UserError: a URL or an engine that cannot be.
    """
    watched = watchable(servers, engines)
    if canary is not None and not canary.prompts:
        raise UserError(f"--probe {canary.scenario.name} has no prompt to send.")

    def tell(line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a full disk, a closed stderr
            say(line)

    observe = _fan_out(watchers, tell)
    loops = [_scraping(one, every_s, observe, tell) for one in watched]
    if canary is not None:
        loops += [_probing(one, canary, observe, tell) for one in watched]
    tasks = [asyncio.create_task(loop) for loop in loops]
    stopped = asyncio.create_task(stop.wait())
    try:
        ended, _ = await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()  # a loop ends by a bug alone
    finally:
        for task in (*tasks, stopped):
            task.cancel()
        await asyncio.gather(*tasks, stopped, return_exceptions=True)
        for one in watched:
            await one.end()


def watchable(servers: Mapping[str, Attach], engines: Mapping[str, Engine]) -> tuple[Server, ...]:
    """The servers, checked as far as that goes before they are asked. UserError: see `monitor`."""
    watched: dict[str, Server] = {}
    for url, attach in servers.items():
        preflight.engine_of(engines, attach.engine)
        one = Server(url, attach, engines)
        if one.name in watched:
            raise UserError(
                f"{one.name} was given twice, and its figures would be counted twice. Expected "
                "every server once."
            )
        watched[one.name] = one
    return tuple(watched.values())


def _fan_out(watchers: Sequence[Watcher], say: Say) -> Watcher:
    alive = list(watchers)

    def observe(event: Event) -> None:
        for watcher in tuple(alive):
            try:
                watcher(event)
            except Exception as fault:
                alive.remove(watcher)
                name = type(watcher).__name__
                say(f"{name} failed and shows nothing any more: {fault!r}. The others go on.")

    return observe


async def _scraping(server: Server, every_s: float, observe: Watcher, say: Say) -> None:
    beats, warned, told = _Beats(every_s), False, False
    while True:
        observe(await server.read())
        if server.several and not told:
            told = True
            say(
                f"WARNING: the counters of {server.name} go back and forth: {SEVERAL}. Nothing "
                "more is counted of it."
            )
        if server.drains and not warned:
            warned = True
            say(
                f"WARNING: every read of {server.name}'s metrics page empties it, and this monitor "
                "reads it: no other reader may (a benchmark, another monitor, Dynamo), or both "
                "lose figures. Expected its Prometheus page: start TensorRT-LLM with "
                "return_perf_metrics: true, which mounts /prometheus/metrics."
            )
        await beats.next()


class _Beats:
    """Instants `every_s` apart. A turn that took longer costs the instants it missed, no more."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._due = perf_counter()

    async def next(self) -> None:
        now = perf_counter()
        self._due = max(self._due + self._every_s, now)
        await asyncio.sleep(self._due - now)


# ── scraping ─────────────────────────────────────────────────────────────────────────────────────


class _Failed(Exception):
    """A scrape that told nothing."""

    def __init__(self, result: ScrapeResult, why: str) -> None:
        super().__init__(why)
        self.result: ScrapeResult = result
        self.why = " ".join(why.split())[:300]


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What a page said. `identity` is who said it, and `version` which, where that is known."""

    counters: SpecCounters
    load: ServerLoad
    acceptance_gauge: float | None
    started: float | None
    identity: tuple[str, str]
    version: str | None


class Server:
    """One server, what was found there (`target`) and what its page said last.

    Whether it is still the same server is asked again when it was away, when its page is not what
    it was, and when its counters went back.
    """

    def __init__(self, url: str, attach: Attach, engines: Mapping[str, Engine]) -> None:
        self.url = preflight.checked_url(url, attach.headers)
        self.name = preflight.without_secrets(self.url).partition("://")[2]
        self.attach = attach
        self.target: preflight.Target | None = None
        self.found = asyncio.Event()
        self._engines = engines
        self.several = False  # servers that answer in turn: their counters tell no growth
        self._sure = False  # that `target` is what answers
        self._there = False  # that its page is where `_scraper` reads
        self._recent: deque[bool] = deque(maxlen=STEADY)  # whether it was restarted, by scrape
        self._asked = False  # again, once it drafted, whether speculation is on
        self._scraper: Scraper | None = None
        self._before: _Seen | None = None

    @property
    def drains(self) -> bool:
        """Every read of its page takes away what it tells."""
        return self._scraper is not None and self._scraper.drains

    async def read(self) -> Reading:
        """One scrape, whatever comes of it."""
        began, wall = perf_counter(), time.time()
        try:
            found = await self._read()
        except _Failed as fault:
            found = {"result": fault.result, "why": fault.why}
        except Exception as fault:  # a page can have any shape, and none may end the monitor
            self._sure = False
            found = {"result": "garbage", "why": f"what it says makes no sense: {fault!r}"[:300]}
        return Reading(
            server=self.name,
            at_unix_s=wall,
            duration_s=perf_counter() - began,
            rss_bytes=rss_bytes(),
            info=None if self.target is None else _public(self.target.info),
            **found,
        )

    async def end(self) -> None:
        """Leave nothing under way."""
        if self._scraper is not None:
            await self._scraper.end()

    async def _read(self) -> dict[str, Any]:
        """What a scrape that worked puts into a Reading."""
        target = self.target
        if target is None or not self._there:
            target = await self._identify()
        samples = await self._samples()
        before, now = self._before, _seen(target, samples)
        if not self._sure or restarted(before, now):
            target = await self._identify(anew=restarted(before, now))
            now = _seen(target, samples)
        again = before is not None and restarted(before, now)
        self._is_several(again)
        self._asked &= not again
        since = before.counters if before is not None else now.counters
        if again and (not self.drains or went_back(since, now.counters)):
            since = SpecCounters()  # but sums over what was drained are ours, and go on
        grown = growth(since, now.counters)
        if target.info.state == "unknown" and (grown.drafts or grown.steps) and not self._asked:
            self._asked, self._sure = True, False  # an idle server may not tell; now it may
        self._before = replace(now, counters=kept(since, now.counters))
        return {
            "result": "ok",
            "why": "" if _tells(now) else f"its page has no figure known of {target.engine.name}",
            "grown": None if self.several else grown,
            "load": now.load,
            "acceptance_gauge": now.acceptance_gauge,
            "restarted": again and not self.several,
        }

    def _is_several(self, again: bool) -> None:
        """Whether restarts recur as no server's do; over once there was none for long."""
        self._recent.append(again)
        if sum(list(self._recent)[-RECENT:]) >= MANY:
            self.several = True
        elif len(self._recent) == STEADY and not any(self._recent):
            self.several = False

    async def _samples(self) -> dict[str, float]:
        scraper = self._scraper
        assert scraper is not None
        samples = await scraper.samples()
        if samples is None:
            self._sure = False
            if scraper.result in ("refused", "garbage"):
                self._there = False  # what answers there may have its page elsewhere
            raise _Failed(scraper.result, scraper.why)
        if not samples and not scraper.drains:
            self._sure = self._there = False
            raise _Failed("garbage", "the metrics page has no metric")
        return samples

    async def _identify(self, *, anew: bool = False) -> preflight.Target:
        """Who answers there, and a Scraper of its page: the one that is, if it is the same page.

        What the same server told once and does not tell now stays, unless it began `anew`: a page
        of its own that failed is no other version, and speculates no other way.
        """
        attach, known = self.attach, self.target
        try:
            async with asyncio.timeout(IDENTIFY_TIMEOUT_S):
                target = await preflight.identify(
                    self.url,
                    self._engines,
                    engine=attach.engine,
                    model=attach.model,
                    api=attach.api,
                    metrics_url=attach.metrics_url,
                    headers=attach.headers,
                    tls=attach.tls,
                    any_model=True,
                    scraper=self._scraper,
                )
        except TimeoutError:
            raise _Failed("unidentified", f"no answer in {IDENTIFY_TIMEOUT_S:g} s") from None
        except DraftloadError as fault:
            raise _Failed("unidentified", str(fault)) from None
        same = known is not None and _who(known.info) == _who(target.info)
        if target.metrics_url is None:
            self._there = False
            self.target = known if same else target
            self.found.set()
            why = " ".join(c.message for c in target.caveats if c.code == "no-metrics-page")
            raise _Failed("refused", why or f"engine {target.engine.name} has no metrics page")
        if self._scraper is None or not self._scraper.reads(target.metrics_url, target.engine):
            self._scraper = target.scraper(lambda record: None, 0.0)
        if known is not None and same and not anew:
            target = replace(target, info=_filled(target.info, known.info))
        self.target, self._sure, self._there = target, True, True
        self.found.set()
        return target


def _who(info: ServerInfo) -> tuple[str, str]:
    return info.engine, info.model


def _filled(now: ServerInfo, before: ServerInfo) -> ServerInfo:
    """`now`, with what the same server told before where it does not tell it now."""
    names = ["version"]
    if now.state == "unknown":
        now = msgspec.structs.replace(now, state=before.state)
    if now.state != "off":
        names += ["spec_reported", "draft_depth"]
    told = {name: getattr(before, name) for name in names if getattr(now, name) is None}
    return msgspec.structs.replace(now, **told)


def _public(info: ServerInfo) -> ServerInfo:
    """As watchers may show it: llama.cpp names a model by its file, wherever that lies."""
    return msgspec.structs.replace(info, model=without_folder(info.model))


def _seen(target: preflight.Target, samples: Mapping[str, float]) -> _Seen:
    engine, info = target.engine, target.info
    counters = engine.counters(samples)
    if any(n < 0 for n in _counts(counters)):
        raise _Failed("garbage", "the metrics page has a counter below zero")
    return _Seen(
        counters=counters,
        load=engine.load(samples),
        acceptance_gauge=engine.acceptance_gauge(samples),
        started=samples.get(STARTED),
        identity=_who(info),
        version=info.version,
    )


def _tells(seen: _Seen) -> bool:
    return seen.counters != SpecCounters() or seen.load != ServerLoad()


# ── counters ─────────────────────────────────────────────────────────────────────────────────────

_SINGLE = (
    *("steps", "drafts", "draft_tokens", "accepted_tokens"),
    *("generated_tokens", "prompt_tokens", "requests"),
)
_LISTS = ("accepted_by_position", "drafted_by_position")


def _counts(counters: SpecCounters) -> Iterator[int]:
    yield from (n for name in _SINGLE if (n := getattr(counters, name)) is not None)
    for name in _LISTS:
        yield from getattr(counters, name) or ()


def growth(before: SpecCounters, now: SpecCounters) -> SpecCounters:
    """`now` less `before`, where what was not there before was zero; None where it is not now."""

    def less(name: str) -> int | None:
        count = getattr(now, name)
        return None if count is None else count - (getattr(before, name) or 0)

    def lists(name: str) -> tuple[int, ...] | None:
        counts = getattr(now, name)
        if counts is None:
            return None
        then = getattr(before, name) or ()
        return tuple(a - b for a, b in zip_longest(counts, then, fillvalue=0))

    grown: dict[str, Any] = {name: less(name) for name in _SINGLE}
    return SpecCounters(**grown | {name: lists(name) for name in _LISTS})


def went_back(before: SpecCounters, now: SpecCounters) -> bool:
    """A counter is lower than it was. One that is not there any more tells nothing yet."""
    return any(n < 0 for n in _counts(growth(before, now)))


def kept(before: SpecCounters, now: SpecCounters) -> SpecCounters:
    """`now`, with what was there before for what is missing now."""
    names = [name for name in (*_SINGLE, *_LISTS) if getattr(now, name) is None]
    return msgspec.structs.replace(now, **{name: getattr(before, name) for name in names})


def restarted(before: _Seen | None, now: _Seen) -> bool:
    """Another server, or the same begun anew: by who it is, when it began, or its counters."""
    if before is None:
        return False
    began = None not in (before.started, now.started) and before.started != now.started
    newer = None not in (before.version, now.version) and before.version != now.version
    other = before.identity != now.identity
    return began or newer or other or went_back(before.counters, now.counters)


# ── the canary ───────────────────────────────────────────────────────────────────────────────────


async def _probing(server: Server, canary: Canary, observe: Watcher, say: Say) -> None:
    """One request, and the next when it is due: never two at once."""
    await server.found.wait()
    beats, prober, said = _Beats(canary.every_s), _Prober(server, canary), ""
    for prompt in itertools.cycle(in_rotation(canary.prompts)):
        why = ""
        try:
            observe(await prober.ask(prompt))
        except DraftloadError as fault:
            why = str(fault)
        except Exception as fault:  # as above
            why = repr(fault)
        if why and why != said:
            say(f"{server.name} was not probed: {why}")
        said = why
        await beats.next()


def in_rotation(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """The first prompt of every category, then the second of each that has one, and so on."""
    by_category: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    rows = zip_longest(*by_category.values())
    return tuple(prompt for row in rows for prompt in row if prompt is not None)


class _Prober:
    """Sends to what was found at a server; found anew, it is asked anew what it honours."""

    def __init__(self, server: Server, canary: Canary) -> None:
        self._server = server
        self._canary = canary
        self._zero = perf_counter()
        self._found: preflight.Target | None = None
        self._asked: preflight.Target | None = None
        self._tokenize: Tokenize | None = None
        self._count = 0

    async def ask(self, prompt: Prompt) -> Probed:
        """One request as it ended. DraftloadError: none was sent."""
        found = self._server.target
        assert found is not None, "it was found once"
        if self._asked is None or self._found is not found:
            self._asked = None
            self._asked = await self._prepared(found)
            self._found = found
        target, canary = self._asked, self._canary
        ids = prompt.prompt_token_ids
        if ids is None and self._tokenize is not None:
            ids = await self._tokenize(prompt.messages)
            prompt = msgspec.structs.replace(prompt, prompt_token_ids=ids)
        preflight.fitting((prompt,), target.info, canary.scenario.sampling.max_output_tokens)
        self._count += 1
        request = Request(
            request_id=f"probe/{self._count}",
            phase="probe",
            dialogue=Dialogue(dialogue_id=f"probe/{self._count}", prompt=prompt),
            turn=0,
            max_output_tokens=canary.scenario.sampling.max_output_tokens,
            prompt_token_ids=ids,
            messages=prompt.messages,
            template_args=canary.scenario.templating.args,
        )
        body = target.wire.encode(request, target.info.model, canary.scenario.sampling)
        async with target.transport(
            timeout_s=PROBE_TIMEOUT_S, keep_text=False, zero=self._zero
        ) as transport:
            record, _ = await transport.stream(request, body)
        return Probed(
            server=self._server.name,
            info=_public(target.info),
            engine=target.engine,
            scenario=canary.scenario.name,
            record=record,
        )

    async def _prepared(self, found: preflight.Target) -> preflight.Target:
        """What it honours, and what makes its token ids."""
        attach, canary, self._tokenize = self._server.attach, self._canary, None
        templating = canary.scenario.templating
        if attach.api == "chat":
            return await preflight.probe(found, None, templating.args)
        if all(prompt.prompt_token_ids is not None for prompt in canary.prompts):
            return await preflight.probe(found, preflight.probe_ids(canary.prompts))
        self._tokenize = await preflight.tokenizer(
            found,
            attach.tokenizer,
            templating,
            cache=attach.token_cache,
            check=not attach.any_tokenizer,
        )
        (asked,) = await preflight.tokenized((preflight.PROBED,), self._tokenize)
        return await preflight.probe(found, asked.prompt_token_ids, templating.args)
