"""The client's own cost and error, beside a bare aiohttp loop, on a server of known schedule.

    .venv/bin/python benchmarks/client.py --streams 512 --requests 1024 --tokens 128 --rounds 3

Builds tests/data/truthserver.c, starts it, and runs in turn, each as a process of its own:
  draftload   the whole command (`draftload run`), start-up, run file and report included
  exported    the whole command with --prometheus-port, its page scraped every second
  timed path  its runner, transport and store, with the server's own stamp read off every chunk
  bare        one aiohttp loop that stamps reads and parses nothing: the floor
Prints medians over the rounds. d: a chunk's stamp minus the server's just before its write.
CPU is user + system of the process; every figure is of this machine in this call: compare columns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import urllib.request
from array import array
from dataclasses import replace
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any

import aiohttp
import numpy as np

from loadgen.plan import make_plan
from loadgen.runner import RAMP_S, Runner
from loadgen.scrape import Scraper
from loadgen.store import Store
from loadgen.transport import Transport
from loadgen.types import Chunk, ClosedLoop, Engine, Prompt, RequestRecord, Sampling, Scenario, Stop
from servers.vllm import ENGINE
from tests.records import run_info

SOURCE = Path(__file__).parents[1] / "tests" / "data" / "truthserver.c"
TTFT_MS, ITL_MS = 200, 20
SCRAPE_S = 1.0
COMMANDS = ("draftload", "exported")
MARK = b'"system_fingerprint":"'


def prompts() -> list[list[int]]:
    return [list(range(5 + i, 37 + i)) for i in range(64)]


def delays(stamps: list[float], sent_ns: list[float]) -> dict[str, float]:
    d = (np.asarray(stamps) * 1e9 - np.asarray(sent_ns)) / 1e6
    return {"d50_ms": float(np.percentile(d, 50)), "d99_ms": float(np.percentile(d, 99))}


async def timed_path(url: str, a: argparse.Namespace) -> dict[str, float]:
    """draftload's runner and store, reading the server's stamps off the chunks."""
    sent: dict[int, list[float]] = {}
    wire = ENGINE.wires["completions"]

    def decode(payload: bytes) -> Chunk:
        at = payload.find(MARK) + len(MARK)
        chunk = wire.decode(payload)
        if chunk.token_ids and chunk.choice:
            # The truth server numbers its requests: the last digits of the id tell streams apart.
            stream = int(payload[payload.find(b'"id":"') + 6 :].split(b'"', 1)[0][-8:])
            sent.setdefault(stream, []).append(float(payload[at : payload.index(b'"', at)]))
        return chunk

    marked = replace(wire, decode=decode)
    engine: Engine = replace(ENGINE, wires={"completions": marked})
    scenario = Scenario(
        name="bench",
        loads=(ClosedLoop(concurrency=a.streams),),
        stop=Stop(requests=a.requests),
        sampling=Sampling(max_output_tokens=a.tokens),
        warmup_requests=0,
    )
    asked = [
        Prompt(prompt_id=f"p{i}", category="x", prompt_token_ids=array("I", ids))
        for i, ids in enumerate(prompts())
    ]
    records: list[RequestRecord] = []
    zero = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "run.jsonl", run_info())

        def observe(record: Any) -> None:
            store.append(record)
            if isinstance(record, RequestRecord):
                records.append(record)

        async with Transport(url, marked, zero=zero) as transport:
            scraper = Scraper(None, engine, observe, zero=zero)
            runner = Runner(
                transport,
                scraper,
                observe,
                model="truth",
                sampling=scenario.sampling,
                tokenize=None,
            )
            started = perf_counter()
            await runner.run(make_plan(scenario, asked))
            wall = perf_counter() - started
        store.close()
    # A stream's stamps and the server's are matched by first arrival: both are in order of time.
    ours = sorted((zero + r.sent_s + np.cumsum(r.chunk_gaps_us) / 1e6 for r in records),
                  key=lambda s: float(s[0]))  # fmt: skip
    theirs = sorted(sent.values(), key=lambda s: s[0])
    d = delays(np.concatenate(ours).tolist(), [x for s in theirs for x in s])
    ttft = [r.chunk_gaps_us[0] / 1e3 for r in records]
    return {
        "wall_s": wall,
        **d,
        "ttft_p50_ms": float(np.percentile(ttft, 50)),
        "ttft_p99_ms": float(np.percentile(ttft, 99)),
        "requests": len(records),
    }


async def bare(url: str, a: argparse.Namespace) -> dict[str, float]:
    """The floor: aiohttp, uvloop, no garbage collector, a stamp a read, nothing parsed live."""
    bodies = [
        json.dumps(
            {
                "model": "truth",
                "prompt": ids,
                "max_tokens": a.tokens,
                "stream": True,
                "return_token_ids": True,
            }
        ).encode()
        for ids in prompts()
    ]
    todo = iter(range(a.requests))
    reads: list[list[tuple[float, bytes]]] = []
    ttft: list[float] = []

    async def worker(session: aiohttp.ClientSession, delay: float) -> None:
        await asyncio.sleep(delay)
        for number in todo:
            kept: list[tuple[float, bytes]] = []
            started = perf_counter()
            headers = {"Content-Type": "application/json"}
            async with session.post(
                url + "/v1/completions", data=bodies[number % len(bodies)], headers=headers
            ) as response:
                while data := await response.content.readany():
                    kept.append((perf_counter(), data))
            ttft.append((kept[0][0] - started) * 1e3)
            reads.append(kept)

    gc.collect()
    gc.freeze()
    gc.disable()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=None), read_bufsize=1 << 26
    ) as session:
        started = perf_counter()
        await asyncio.gather(*(worker(session, i * RAMP_S) for i in range(a.streams)))
        wall = perf_counter() - started
    stamps, sent = [], []
    for kept in reads:
        for stamp, data in kept:
            for mark in re.findall(rb'"system_fingerprint":"(\d+)","choices":\[\{', data):
                stamps.append(stamp)
                sent.append(float(mark))
    return {
        "wall_s": wall,
        **delays(stamps, sent),
        "ttft_p50_ms": float(np.percentile(ttft, 50)),
        "ttft_p99_ms": float(np.percentile(ttft, 99)),
        "requests": len(reads),
    }


def one(kind: str, url: str, a: argparse.Namespace) -> None:
    import uvloop

    work = {"timed path": timed_path, "bare": bare}[kind]
    print(json.dumps(uvloop.run(work(url, a))))


def ask(url: str, path: str, method: str = "GET") -> str:
    request = urllib.request.Request(url + path, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read().decode())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def scraped(port: int, process: subprocess.Popen[bytes], sizes: list[int]) -> None:
    """What a Prometheus with an interval of 1 s does; the size of every page that it got."""
    while process.returncode is None:
        with contextlib.suppress(OSError):
            sizes.append(len(ask(f"http://127.0.0.1:{port}", "/metrics")))
        sleep(SCRAPE_S)


def truth(page: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", page, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def measured(kind: str, url: str, a: argparse.Namespace, folder: str) -> dict[str, float]:
    """One process of `kind`: what it said, what it cost, what the server truly sent."""
    ask(url, "/reset", "POST")
    common = [f"--streams={a.streams}", f"--requests={a.requests}", f"--tokens={a.tokens}"]
    if kind in COMMANDS:
        command = [
            sys.executable, "-m", "loadgen.cli", "run", "--url", url, "--engine", "vllm",
            "--dataset", f"{folder}/prompts.jsonl", "-c", str(a.streams),
            "--requests", str(a.requests), "--max-output-tokens", str(a.tokens),
            "--warmup", "0", "--no-preflight", "--quiet", "--format", "json", "--out", folder,
        ]  # fmt: skip
        page_port = free_port()
        command += ["--prometheus-port", str(page_port)] if kind == "exported" else []
    else:
        command = [sys.executable, __file__, "--one", kind, "--url", url, *common]
    if a.nice:
        command = ["nice", f"-n{a.nice}", *command]
    started = monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    scrapes: list[int] = []
    if kind == "exported":
        threading.Thread(target=scraped, args=(page_port, process, scrapes), daemon=True).start()
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = monotonic() - started
    if process.returncode:
        raise SystemExit(f"{kind} ended with {process.returncode}")
    page = ask(url, "/metrics")
    chunks = truth(page, "truth_chunks")
    found: dict[str, Any] = json.loads(said)
    if kind in COMMANDS:
        phase = found["phases"][0]
        ttft = phase["ttft_s"]
        found = {
            "wall_s": phase["span_s"],
            "ttft_p50_ms": ttft["p50"] * 1e3,
            "ttft_p99_ms": ttft["p99"] * 1e3,
            "requests": phase["requests"]["completed"],
        }
    found["cpu_us_a_chunk"] = (usage.ru_utime + usage.ru_stime) * 1e6 / chunks
    found["process_wall_s"] = wall
    if kind == "exported":
        found |= {"scrapes": len(scrapes), "page_kb": max(scrapes, default=0) / 1e3}
    found["peak_rss_mb"] = usage.ru_maxrss / 1024
    for quantile in ("0.5", "0.99"):
        sent_ms = truth(page, f'truth_ttft_seconds{{quantile="{quantile}"}}') * 1e3
        name = {"0.5": "p50", "0.99": "p99"}[quantile]
        found[f"ttft_{name}_error_ms"] = found.pop(f"ttft_{name}_ms") - sent_ms
    return found


ROWS = (
    ("cpu_us_a_chunk", "CPU a chunk, whole process", "µs"),
    ("d50_ms", "stamp delay d50", "ms"),
    ("d99_ms", "stamp delay d99", "ms"),
    ("ttft_p50_error_ms", "TTFT p50 − truly sent", "ms"),
    ("ttft_p99_error_ms", "TTFT p99 − truly sent", "ms"),
    ("over_ideal_s", "wall over the ideal", "s"),
    ("process_wall_s", "wall of the process", "s"),
    ("peak_rss_mb", "peak resident memory", "MB"),
    ("requests", "requests completed", ""),
    ("scrapes", "scrapes answered", ""),
    ("page_kb", "largest page", "kB"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", default="draftload,timed path,bare")
    parser.add_argument("--nice", type=int, default=0, help="such as -20, as root")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        one(a.one, a.url, a)
        return
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise SystemExit("benchmarks/client.py needs a C compiler (gcc or cc)")
    kinds = tuple(a.kinds.split(","))
    ideal = a.requests / a.streams * (TTFT_MS + ITL_MS * (a.tokens - 1)) / 1e3
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            {"id": str(i), "category": "x", "prompt_token_ids": p} for i, p in enumerate(prompts())
        ]
        Path(folder, "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        subprocess.run([compiler, "-O2", "-o", f"{folder}/truthserver", str(SOURCE)], check=True)
        port = free_port()
        schedule = [str(n) for n in (port, TTFT_MS, ITL_MS, 1)]
        prefix = ["nice", f"-n{a.nice}"] if a.nice else []
        server = subprocess.Popen([*prefix, f"{folder}/truthserver", *schedule],
                                  stderr=subprocess.PIPE)  # fmt: skip
        assert server.stderr is not None
        server.stderr.readline()
        try:
            for round_number in range(a.rounds):
                for kind in kinds:
                    got = measured(kind, f"http://127.0.0.1:{port}", a, folder)
                    got["over_ideal_s"] = got.pop("wall_s") - ideal
                    found[kind].append(got)
                    print(f"round {round_number + 1}, {kind}: {json.dumps(got)}", file=sys.stderr)
        finally:
            server.kill()
            server.wait()
    print(f"{a.streams} streams, {a.requests} requests of {a.tokens} tokens, {ITL_MS} ms apart; "
          f"ideal {ideal:.2f} s; medians of {a.rounds} interleaved rounds")  # fmt: skip
    print(f"{'':<34}" + "".join(f"{kind:>13}" for kind in kinds))
    for key, label, unit in ROWS:
        cells = []
        for kind in kinds:
            values = [f[key] for f in found[kind] if key in f]
            cells.append(f"{statistics.median(values):13.2f}" if values else f"{'–':>13}")
        print(f"{label + (f', {unit}' if unit else ''):<34}" + "".join(cells))


if __name__ == "__main__":
    main()
