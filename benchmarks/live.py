"""What the live view costs: CPU of the thread that draws it, at the rate of 512 streams.

    .venv/bin/python benchmarks/live.py --streams 512 --seconds 20 --rounds 3

Feeds simulated records in real time (a request's record when it ends, two client samples and one
snapshot a second) to the live view on a pseudo-terminal that a second thread reads, and in turn to
no view at all. The table has, of each round, the share of a core that the feeding thread took with
and without it: their difference is what the view costs. No server, no stream.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import os
import pty
import statistics
import struct
import sys
import termios
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

from loadgen.plan import make_plan
from loadgen.types import (
    ClientSample,
    ClosedLoop,
    Completed,
    Observer,
    Prompt,
    Record,
    RequestRecord,
    Sampling,
    Scenario,
    Snapshot,
    SpecCounters,
    Stop,
)
from reports.live import Live
from servers.vllm import ENGINE
from tests.records import SERVER, run_info

TOKENS, STEP_S, LENGTH = 128, 0.02, 2
"""Of each answer: tokens, seconds a step, tokens a step."""
COLUMNS, ROWS = 100, 40
PHASE = "c=512"
CATEGORIES = 11


def records(streams: int, seconds: float) -> list[tuple[float, Record]]:
    """When each record comes, seconds, and what it is."""
    steps = TOKENS // LENGTH
    a_second = streams / (steps * STEP_S)
    found: list[tuple[float, Record]] = []
    for n in range(int(seconds * a_second)):
        at_s = n / a_second
        chunks = array("I", [1] + [LENGTH] * steps)
        found.append(
            (
                at_s,
                RequestRecord(
                    request_id=f"{PHASE}/{n}/0",
                    dialogue_id=str(n),
                    prompt_id=str(n % 64),
                    category=f"category {n % CATEGORIES}",
                    phase=PHASE,
                    turn=0,
                    outcome=Completed(),
                    sent_s=at_s - steps * STEP_S,
                    end_s=at_s,
                    osl_tokens=sum(chunks),
                    chunk_tokens=chunks,
                    chunk_gaps_us=array("I", [int(STEP_S * 1e6)] * len(chunks)),
                    spec=SpecCounters(drafts=steps, accepted_tokens=steps * (LENGTH - 1)),
                ),
            )
        )
    page = Path(__file__).parents[1] / "tests" / "data" / "vllm-metrics-ngram-after.txt"
    series = [line.rpartition(" ") for line in page.read_text().splitlines() if line[:1] != "#"]
    samples = {name: float(value) for name, _, value in series if name}
    for n in range(int(seconds * 2)):
        found.append((n / 2, _sample(n / 2, streams, a_second)))
        if n % 2:
            found.append((n / 2, Snapshot(at_s=n / 2, phase=PHASE, edge="tick", samples=samples)))
    return sorted(found, key=lambda pair: pair[0])


def _sample(at_s: float, streams: int, a_second: float) -> ClientSample:
    return ClientSample(
        at_s=at_s,
        phase=PHASE,
        in_flight=streams,
        target=streams,
        sent=int(at_s * a_second),
        chunks=int(at_s * streams / STEP_S),
        tokens=int(at_s * streams * LENGTH / STEP_S),
        loop_lag_s=0.003,
        cpu_s=at_s * 0.4,
        rss_bytes=1 << 26,
    )


def fed(found: list[tuple[float, Record]], observe: Observer) -> float:
    """Share of a core that this thread took to give the records at their instants."""
    began, cpu = time.perf_counter(), time.thread_time()
    for at_s, record in found:
        left = began + at_s - time.perf_counter()
        if left > 0:
            time.sleep(left)
        observe(record)
    return (time.thread_time() - cpu) / (time.perf_counter() - began)


@contextlib.contextmanager
def terminal() -> Iterator[list[int]]:
    """stderr as a terminal; the one number of the list is how many bytes it was sent."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    sent, before = [0], sys.stderr

    def read() -> None:
        with contextlib.suppress(OSError):
            while some := os.read(ours, 1 << 16):
                sent[0] += len(some)

    threading.Thread(target=read, daemon=True).start()
    with os.fdopen(theirs, "w") as sys.stderr:
        try:
            yield sent
        finally:
            sys.stderr.flush()
            sys.stderr = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    os.environ |= {"TERM": "xterm-256color"}
    found = records(a.streams, a.seconds)
    scenario = Scenario(
        name="bench",
        loads=(ClosedLoop(concurrency=a.streams),),
        stop=Stop(requests=len(found)),
        sampling=Sampling(max_output_tokens=TOKENS),
    )
    prompts = tuple(
        Prompt(prompt_id=str(n), category=f"category {n % CATEGORIES}",
               prompt_token_ids=array("I", range(n, n + 16)))
        for n in range(64)
    )  # fmt: skip
    plan = make_plan(scenario, prompts)
    rows = []
    gc.disable()  # as the runner has it inside a phase
    for _ in range(a.rounds):
        with (
            terminal() as sent,
            Live(plan, "bench", run_info(server=SERVER), {"test": ENGINE}) as v,
        ):
            rows.append((fed(found, v), fed(found, lambda record: None), sent[0] / a.seconds))
    print(
        f"{len(found):,} records in {a.seconds:g} s, terminal {COLUMNS} × {ROWS}; share of a core:"
    )
    print("with  without  difference  bytes/s drawn")
    for view, none, sent_a_second in rows:
        print(f"{view:.2%}  {none:.2%}  {view - none:.2%}  {sent_a_second:,.0f}")
    print(f"median difference {statistics.median(v - n for v, n, _ in rows):.2%}")


if __name__ == "__main__":
    main()
