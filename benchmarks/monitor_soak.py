"""A day of `draftload monitor`, compressed: is memory flat, is every count right over restarts?

    .venv/bin/python -m benchmarks.monitor_soak --scrapes 5760 --restart-every 100

5,760 scrapes are 24 hours at 15 s. A process of its own plays four servers, one an engine, whose
counters advance with every read of their page. One read in ten is a fault (500, garbage, a cut
page, a dropped connection, HTML, nothing), and so is one in three of the page that tells a
version; after N the server is gone for three reads and comes back with its counters at zero, at
every tenth such restart with another model. The monitor scrapes and probes as fast as it can, its
page built after each. Afterwards the growth that it told must be all that the servers counted,
restart for restart; resident memory is printed as it went.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from aiohttp import web

from loadgen.measure import Attach
from loadgen.monitor import Canary, monitor
from loadgen.types import Probed, Prompt, Reading, Sampling, Scenario
from reports.monitor_page import MonitorPage
from servers import llamacpp, openai, sglang, trtllm, vllm

ENGINES = {one.ENGINE.name: one.ENGINE for one in (vllm, sglang, trtllm, llamacpp, openai)}
DRAFTS, ACCEPTED, STEPS, REQUESTS = 100, 150, 120, 2
GENERATED = STEPS + ACCEPTED + REQUESTS
FAULTS = ("500", "garbage", "cut", "drop", "html", "empty")
FAULT_EVERY, AWAY = 10, 3
VERSION_FAULT_EVERY = 3
PROBE_EVERY_S = 0.05
MOST_GROWTH = 4 << 20
"""Bytes; the allocator's own, since objects must not grow at all."""

# ── the servers ──────────────────────────────────────────────────────────────────────────────────

FAMILIES: Mapping[str, Mapping[str, int]] = {
    "vllm": {
        "vllm:spec_decode_num_drafts_total": DRAFTS,
        "vllm:spec_decode_num_draft_tokens_total": 3 * DRAFTS,
        "vllm:spec_decode_num_accepted_tokens_total": ACCEPTED,
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="0"}': ACCEPTED,
        "vllm:generation_tokens_total": GENERATED,
        "vllm:request_success_total": REQUESTS,
    },
    "sglang": {
        "sglang:spec_verify_calls_total": STEPS,
        "sglang:generation_tokens_total": GENERATED,
        "sglang:num_requests_total": REQUESTS,
    },
    "trtllm": {
        'trtllm_speculative_config_info{spec_enabled="true",spec_num_tokens="3"}': 1,
        'trtllm_spec_decode_drafted_tokens_total{token_position="0"}': DRAFTS,
        'trtllm_spec_decode_accepted_tokens_total{token_position="0"}': ACCEPTED,
        "trtllm_generation_tokens_total": GENERATED,
    },
    "llamacpp": {
        "llamacpp:spec_decode_num_drafts_total": DRAFTS,
        "llamacpp:spec_decode_num_draft_tokens_total": 3 * DRAFTS,
        "llamacpp:spec_decode_num_accepted_tokens_total": ACCEPTED,
        "llamacpp:tokens_predicted_total": GENERATED,
    },
}
OWNERS = {"vllm": "vllm", "sglang": "sglang", "trtllm": "tensorrt_llm", "llamacpp": "llamacpp"}
EVENT = 'data: {"choices":[{"index":0,"text":" a b","token_ids":[5,6],"finish_reason":%s}]}\n\n'
USAGE = 'data: {"choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":6}}\n\n'
ANSWER = 2 * (EVENT % "null") + EVENT % '"length"' + USAGE + "data: [DONE]\n\n"


class Played:
    """One server. `turns` since it began, `counted` in all; `away`: reads that find nobody."""

    def __init__(self, engine: str, restart_every: int) -> None:
        self.engine, self.restart_every = engine, restart_every
        self.versions = self.reads = self.turns = self.counted = self.restarts = self.away = 0
        self.faults: Counter[str] = Counter()

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/version", self.version)
        app.router.add_get("/metrics", self.page)
        app.router.add_get("/prometheus/metrics", self.page)
        app.router.add_get("/truth", self.truth)
        app.router.add_post("/v1/completions", self.answer)
        return app

    async def models(self, request: web.Request) -> web.Response:
        self.gone(request)
        card = {"id": f"model-{self.restarts // 10}", "owned_by": OWNERS[self.engine]}
        return web.json_response({"data": [card]})

    async def version(self, request: web.Request) -> web.Response:
        self.gone(request)
        self.versions += 1
        if self.versions % VERSION_FAULT_EVERY == 0:
            self.faults["version"] += 1
            return web.Response(status=500)
        return web.json_response({"version": "1.0"})

    async def truth(self, _: web.Request) -> web.Response:
        told = {"counted": self.counted, "restarts": self.restarts, "faults": self.faults}
        return web.json_response({**told, "reads": self.reads})

    async def answer(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.gone(request)
        text = ANSWER % len(asked["prompt"])
        return web.Response(text=text, content_type="text/event-stream")

    def gone(self, request: web.Request) -> None:
        if self.away and request.transport is not None:
            request.transport.abort()

    async def page(self, request: web.Request) -> web.Response:
        self.reads += 1
        if self.away:
            self.away -= 1
            self.gone(request)
            if not self.away:
                self.turns = 0
                self.restarts += 1
            return web.Response()
        if self.reads % FAULT_EVERY == 0:
            return self.fault(request)
        # In the middle between faults, when what was counted was read for sure.
        if self.turns >= self.restart_every and self.reads % FAULT_EVERY == FAULT_EVERY - 2:
            self.away = AWAY
            self.gone(request)
            return web.Response()
        self.turns += 1
        self.counted += 1
        return web.Response(text=self.text())

    def text(self) -> str:
        rows = FAMILIES[self.engine].items()
        return "".join(f"{name} {value * self.turns}\n" for name, value in rows)

    def fault(self, request: web.Request) -> web.Response:
        kind = FAULTS[self.reads // FAULT_EVERY % len(FAULTS)]
        self.faults[kind] += 1
        if kind == "drop" and request.transport is not None:
            request.transport.abort()
        text = {"500": "oops\n", "garbage": "\x00\xff{{{\n" * 999, "cut": self.text()[:-4]}
        html = kind == "html"
        return web.Response(
            text="<html>" if html else text.get(kind, ""),
            status=500 if kind == "500" else 200,
            content_type="text/html" if html else "text/plain",
        )


async def serve(restart_every: int) -> None:
    ports = {}
    for engine in FAMILIES:
        runner = web.AppRunner(Played(engine, restart_every).app(), access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ports[engine] = runner.addresses[0][1]
    print(json.dumps(ports), flush=True)
    await asyncio.Event().wait()


@contextlib.contextmanager
def played_servers(restart_every: int) -> Iterator[dict[str, str]]:
    """Engine → URL, of a process that plays them all."""
    words = [sys.executable, "-m", "benchmarks.monitor_soak", "--serve", str(restart_every)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    assert process.stdout is not None
    try:
        ports = json.loads(process.stdout.readline())
        yield {engine: f"http://127.0.0.1:{port}" for engine, port in ports.items()}
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# ── the monitor, and what must hold ──────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Told:
    """Of one server: what the monitor told, and what the server counted meanwhile."""

    scrapes: int
    worked: int
    restarts: int
    restarted: int
    grown: int
    counted: int
    probes: int


@dataclass(frozen=True, kw_only=True)
class Day:
    """`memory`: (share of the scrapes, bytes), as they went; `objects`: what the collector of
    cyclic garbage knows of, after a pass, at twenty points."""

    servers: dict[str, Told]
    memory: tuple[tuple[float, int], ...]
    objects: tuple[int, ...]
    most_series: int
    tasks_left: int
    descriptors_left: int
    collects: bool

    def median_at(self, low: float, high: float) -> float:
        return statistics.median(size for share, size in self.memory if low <= share <= high)

    @property
    def growth_bytes(self) -> float:
        """Median of the last tenth less that of the tenth after the first."""
        return self.median_at(0.9, 1.0) - self.median_at(0.1, 0.2)


class _Sums:
    """Keeps sums alone: what it kept more would be the growth that is looked for."""

    def __init__(self, names: Mapping[str, str], scrapes: int, stop: asyncio.Event) -> None:
        self._names, self._wanted, self._stop = names, scrapes, stop
        self.scrapes: Counter[str] = Counter()
        self.worked: Counter[str] = Counter()
        self.restarts: Counter[str] = Counter()
        self.grown: Counter[str] = Counter()
        self.probes: Counter[str] = Counter()
        self.memory = array("d")
        self.objects = array("d")

    def __call__(self, event: Reading | Probed) -> None:
        name = self._names[event.server]
        if isinstance(event, Probed):
            self.probes[name] += 1
            return
        self.scrapes[name] += 1
        self.worked[name] += event.result == "ok"
        self.restarts[name] += event.restarted
        if event.grown is not None:
            self.grown[name] += event.grown.generated_tokens or 0
        least = min(self.scrapes[one] for one in self._names.values())
        if least * 200 // self._wanted >= len(self.memory):
            self.memory.append(event.rss_bytes)
            if len(self.memory) % 10 == 0:
                gc.collect()
                self.objects.append(len(gc.get_objects()))
        if least >= self._wanted and event.result == "ok":
            self._stop.set()


async def day(urls: Mapping[str, str], scrapes: int) -> Day:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # descriptors are no files
    names = {url.partition("://")[2]: engine for engine, url in urls.items()}
    stop = asyncio.Event()
    sums, series = _Sums(names, scrapes, stop), 0

    def show(text: bytes) -> None:
        nonlocal series
        series = max(series, text.count(b"\n") - text.count(b"\n#"))

    prompt = Prompt(prompt_id="p", category="qa", prompt_token_ids=array("I", range(8)))
    canary = Canary(
        scenario=Scenario(name="soak", sampling=Sampling(max_output_tokens=8)),
        prompts=tuple(msgspec.structs.replace(prompt, category=c) for c in ("qa", "math")),
        every_s=PROBE_EVERY_S,
    )
    await monitor(
        {url: Attach(any_tokenizer=True) for url in urls.values()},
        ENGINES,
        [sums, MonitorPage("soak", show)],
        stop,
        lambda line: None,
        every_s=0.0,
        canary=canary,
    )
    servers = {}
    for name, url in urls.items():
        with urllib.request.urlopen(f"{url}/truth") as reply:  # noqa: ASYNC210  # nothing runs now
            truth = json.load(reply)
        servers[name] = Told(
            scrapes=sums.scrapes[name],
            worked=sums.worked[name],
            restarts=sums.restarts[name],
            restarted=truth["restarts"],
            grown=sums.grown[name],
            counted=truth["counted"],
            probes=sums.probes[name],
        )
    return Day(
        servers=servers,
        memory=tuple((i / 200, int(size)) for i, size in enumerate(sums.memory)),
        objects=tuple(map(int, sums.objects)),
        most_series=series,
        tasks_left=len(asyncio.all_tasks()) - 1,
        descriptors_left=len(os.listdir("/proc/self/fd")) - before,  # noqa: PTH208
        collects=gc.isenabled(),
    )


def faults(found: Day) -> Iterator[str]:
    """What does not hold. The last reads may have been under way when it was stopped; the first
    two are who is there, and where counting begins."""
    for name, told in found.servers.items():
        missing = told.counted - 2 - told.grown / GENERATED
        if not 0 <= missing <= 3:
            yield f"{name}: {missing:g} of {told.counted} turns are not in the growth that was told"
        if not 0 <= told.restarted - told.restarts <= 1:
            yield f"{name}: {told.restarts} restarts were told, and there were {told.restarted}"
        if not told.probes:
            yield f"{name}: was not probed"
    if found.tasks_left or found.descriptors_left:
        yield f"{found.tasks_left} tasks and {found.descriptors_left} descriptors are left"
    early, late = (statistics.median(part) for part in (found.objects[2:6], found.objects[-4:]))
    if late > early * 1.02:
        yield f"objects grew from {early:,.0f} to {late:,.0f}"
    if found.growth_bytes > MOST_GROWTH:
        yield f"memory grew by {found.growth_bytes / 2**20:.1f} MiB"
    if not found.collects:
        yield "the collector of cyclic garbage is off"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--scrapes", type=int, default=5760, help="of each of the four servers")
    parser.add_argument("--restart-every", type=int, default=100)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.serve is not None:
        asyncio.run(serve(a.serve))
        return
    began = time.perf_counter()
    with played_servers(a.restart_every) as urls:
        found = asyncio.run(day(urls, a.scrapes))
    wall_s = time.perf_counter() - began
    print(f"{'server':<10}{'scrapes':>9}{'worked':>9}{'restarts':>10}{'turns':>9}{'probes':>9}")
    for name, told in found.servers.items():
        print(f"{name:<10}{told.scrapes:>9,}{told.worked:>9,}{told.restarts:>10}"
              f"{told.counted:>9,}{told.probes:>9,}")  # fmt: skip
    for at in (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 1.0):
        share, size = min(found.memory, key=lambda point: abs(point[0] - at))
        print(f"{share:8.1%}{size / 2**20:10.1f} MiB")
    print("objects " + " ".join(f"{count:,}" for count in found.objects[::3]))
    print(f"wall time {wall_s:.0f} s, growth from the second to the last tenth "
          f"{found.growth_bytes / 2**20:+.2f} MiB, most series {found.most_series}")  # fmt: skip
    if wrong := list(faults(found)):
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
