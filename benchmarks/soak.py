"""Ten minutes at 512 streams with 2 % faults: is memory flat, is every request accounted for?

    .venv/bin/python -m benchmarks.soak --seconds 600 --streams 512

A server in a process of its own streams to all of them and injects faults at random, by kind, and
counts what it did. The client is draftload's own runner, transport and store. Afterwards the run
file's outcomes must be the server's counts, kind by kind; no task, socket or descriptor may be
left; and resident memory after the first fifth is printed as a curve, with its growth.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loadgen.plan import make_plan
from loadgen.runner import Runner
from loadgen.scrape import Scraper
from loadgen.store import Store, read
from loadgen.transport import Transport
from loadgen.types import (
    Broke,
    ClientSample,
    ClosedLoop,
    Completed,
    Refused,
    RequestRecord,
    Sampling,
    Scenario,
    Stop,
    TimedOut,
)
from servers.vllm import ENGINE
from tests.records import prompts, run_info

CHUNKS, EVERY_S, TIMEOUT_S = 20, 0.1, 6.0
FAULT_SHARE = 0.02
KINDS = ("drop", "cut", "malformed", "error", "500", "429", "stall")

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


# ── the server ───────────────────────────────────────────────────────────────────────────────────


def _frame(payload: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(payload), payload)


def _event(finish: str) -> bytes:
    choice = f'{{"text":" a b","token_ids":[5,6],"finish_reason":{finish}}}'
    return _frame(f'data: {{"choices":[{choice}]}}\n\n'.encode())


CHUNK = _event("null")
LAST = _event('"length"') + _frame(b"data: [DONE]\n\n") + b"0\r\n\r\n"
BAD = {
    "malformed": _frame(b"data: {oops\n\n") + LAST,
    "error": _frame(b'data: {"error":{"message":"injected"}}\n\n') + LAST,
}
STATUS = {"500": b"500 Internal Server Error", "429": b"429 Too Many Requests"}


class Faulty(asyncio.Protocol):
    """One connection. `shared` is the server's: counts, streams under way, and its dice."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.shared.streams.pop(self, None)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, end, rest = self.buffer.partition(b"\r\n\r\n")
        if not end:
            return
        if head.startswith(b"GET"):
            body = json.dumps(self.shared.counts).encode()
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
            self.transport.write(body)
            self.buffer = b""
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        if len(rest) >= length:
            self.buffer = b""
            self.answer()

    def answer(self) -> None:
        shared = self.shared
        shared.counts["requests"] += 1
        kind = "good"
        if shared.dice.random() < FAULT_SHARE:
            kind = shared.dice.choice(KINDS)
        shared.counts[kind] += 1
        if kind == "drop":
            self.transport.abort()
        elif kind in STATUS:
            self.transport.write(b"HTTP/1.1 %s\r\nContent-Length: 0\r\n\r\n" % STATUS[kind])
        else:
            self.transport.write(HEAD)
            at = CHUNKS if kind == "good" else shared.dice.randrange(1, CHUNKS)
            shared.streams[self] = (at, kind)


class Shared:
    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.counts = dict.fromkeys(("requests", "good", *KINDS), 0)
        self.streams: dict[Faulty, tuple[int, str]] = {}

    async def tick(self) -> None:
        """One chunk to every stream, as a batch step does; then its end, or its fault."""
        while True:
            await asyncio.sleep(EVERY_S)
            for stream, (left, kind) in list(self.streams.items()):
                if left > 1:
                    stream.transport.write(CHUNK)
                    self.streams[stream] = (left - 1, kind)
                    continue
                del self.streams[stream]
                if kind == "good":
                    stream.transport.write(LAST)
                elif kind == "cut":
                    stream.transport.close()
                elif kind != "stall":
                    stream.transport.write(BAD[kind])


async def serve(seed: int) -> None:
    shared = Shared(seed)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Faulty(shared), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await shared.tick()


@contextlib.contextmanager
def faulty_server(seed: int = 1) -> Iterator[str]:
    """Its URL; GET gives its counts."""
    words = [sys.executable, "-m", "benchmarks.soak", "--serve", str(seed)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# ── the client, and what must hold ───────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Soaked:
    """`injected` and `seen` by kind; `memory` as (seconds, bytes) every half second."""

    injected: dict[str, int]
    seen: dict[str, int]
    memory: tuple[tuple[float, int], ...]
    tasks_left: int
    descriptors_left: int
    tokens_lost: int

    @property
    def growth_bytes(self) -> float:
        """Median of the last fifth less that of the second fifth, which follows the warm-up."""
        fifth = max(len(self.memory) // 5, 1)
        sizes = [size for _, size in self.memory]
        return statistics.median(sizes[-fifth:]) - statistics.median(sizes[fifth : 2 * fifth])


def kind_of(record: RequestRecord) -> str:
    """The server's word for what became of a request; "?" where it injects no such thing."""
    match record.outcome:
        case Completed():
            return "good"
        case Refused(status=status):
            return str(status)
        case TimedOut():
            return "stall"
        case Broke(reason=reason):
            named = {"truncated": "cut", "server_error": "error", "reset": "drop"}
            return named.get(reason, "drop" if reason == "disconnected" else reason)
    return "?"


async def soak(url: str, streams: int, seconds: float, folder: Path) -> Soaked:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # descriptors are no files
    scenario = Scenario(
        name="soak",
        loads=(ClosedLoop(concurrency=streams),),
        stop=Stop(duration_s=seconds),
        sampling=Sampling(max_output_tokens=2 * CHUNKS),
        warmup_requests=0,
    )
    store = Store(folder / "run.jsonl", run_info(scenario=scenario))
    wire = ENGINE.wires["completions"]
    async with Transport(url, wire, timeout_s=TIMEOUT_S) as transport:
        runner = Runner(
            transport,
            Scraper(None, ENGINE, store.append, zero=transport.zero),
            store.append,
            model="soak",
            sampling=scenario.sampling,
            tokenize=None,
            grace_s=2 * TIMEOUT_S,
        )
        assert await runner.run(make_plan(scenario, prompts(64))) == "completed"
    store.close()
    with urllib.request.urlopen(url) as page:  # noqa: ASYNC210  # ours, and nothing runs now
        injected: dict[str, int] = json.load(page)
    seen: collections.Counter[str] = collections.Counter()
    memory, lost = [], 0
    for record in read(store.path).records:
        if isinstance(record, RequestRecord):
            seen[kind_of(record)] += 1
            seen["drop"] += record.resent
            seen["requests"] += 1 + record.resent
            lost += kind_of(record) == "good" and record.osl_tokens != 2 * CHUNKS
        elif isinstance(record, ClientSample):
            memory.append((record.at_s, record.rss_bytes))
    return Soaked(
        injected=injected,
        seen={kind: seen[kind] for kind in (*injected, *(set(seen) - set(injected)))},
        memory=tuple(memory),
        tasks_left=len(asyncio.all_tasks()) - 1,
        descriptors_left=len(os.listdir("/proc/self/fd")) - before,  # noqa: PTH208
        tokens_lost=lost,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.serve is not None:
        asyncio.run(serve(a.serve))
        return
    with tempfile.TemporaryDirectory() as folder, faulty_server() as url:
        found = asyncio.run(soak(url, a.streams, a.seconds, Path(folder)))
    print(f"{'kind':<12}{'injected':>12}{'seen':>12}")
    for kind, count in found.seen.items():
        print(f"{kind:<12}{found.injected.get(kind, 0):>12,}{count:>12,}")
    shown = -15.0
    for at_s, size in found.memory:
        if at_s >= shown + 15:
            shown = at_s
            print(f"{at_s:8.0f} s{size / 2**20:10.1f} MiB")
    print(f"growth after the first fifth: {found.growth_bytes / 2**20:+.2f} MiB")
    print(f"tasks left {found.tasks_left}, descriptors left {found.descriptors_left}, "
          f"good answers with a wrong length {found.tokens_lost}")  # fmt: skip
    if found.injected != found.seen or found.tasks_left or found.descriptors_left:
        raise SystemExit("the counts differ, or something is left behind")


if __name__ == "__main__":
    main()
