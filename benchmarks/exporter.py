"""What the metrics page costs the loop of a run: a run file's records, observed again.

    .venv/bin/python -m benchmarks.exporter RUN.jsonl

CPU of the thread that runs the loop, by kind of record of the measured phases, the least of several
passes. On a busy machine two runs of the whole command (benchmarks/client.py, kinds draftload and
exported) differ by more than the page costs. A scrape is answered by another thread, with bytes
that are there already: what it takes is timed by itself. Compare within one call.
"""

from __future__ import annotations

import sys
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

from loadgen.cli import _engines
from loadgen.store import read
from loadgen.types import (
    ClientSample,
    Dialogue,
    Phase,
    PhaseRecord,
    Plan,
    Prompt,
    PromptRecord,
    Record,
    RequestRecord,
    RunInfo,
    Snapshot,
)
from reports.exposition import Served
from reports.prometheus import Exporter

PASSES, SCRAPES = 7, 200


def planned(info: RunInfo, records: list[Record]) -> Plan:
    """Enough of the plan for an observer."""
    prompts = [r for r in records if isinstance(r, PromptRecord)]
    nothing: tuple[Dialogue, ...] = ()
    return Plan(
        scenario=info.scenario,
        prompts=tuple(Prompt(prompt_id=p.prompt_id, category=p.category) for p in prompts),
        phases=tuple(
            Phase(name=r.name, load=r.load, repeat=r.repeat, measured=r.measured, dialogues=nothing)
            for r in records
            if isinstance(r, PhaseRecord)
        ),
    )


def main() -> None:
    run = read(Path(sys.argv[1]))
    records = list(run.records)
    plan = planned(run.info, records)
    measured = {phase.name for phase in plan.phases if phase.measured}
    timed = RequestRecord | ClientSample | Snapshot
    records = [r for r in records if not isinstance(r, timed) or r.phase in measured]
    least: dict[str, float] = {}
    with Served("127.0.0.1", 0) as served:
        for _ in range(PASSES):
            took: dict[str, float] = defaultdict(float)
            with Exporter(_engines(), served.show).watch(plan, run.info) as observe:
                for record in records:
                    began = time.thread_time_ns()
                    observe(record)
                    took[type(record).__name__] += (time.thread_time_ns() - began) / 1e3
            least = {kind: min(us, least.get(kind, us)) for kind, us in took.items()}
        began = time.process_time_ns()
        for _ in range(SCRAPES):
            with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/metrics") as reply:
                size = len(reply.read())
        scrape_us = (time.process_time_ns() - began) / 1e3 / SCRAPES
    requests = [r for r in records if isinstance(r, RequestRecord)]
    tokens = sum(r.osl_tokens for r in requests)
    for kind, name in (
        (RequestRecord, "a request"),
        (ClientSample, "a tick"),
        (Snapshot, "a page"),
    ):
        count = sum(isinstance(r, kind) for r in records)
        if count:
            us = least[kind.__name__]
            print(f"{name:<10} {us / count:9.1f} µs   × {count:,} = {us / 1e3:.1f} ms")
    total_us = sum(least.values())
    span_s = max(r.end_s for r in requests) - min(r.sent_s for r in requests)
    print(f"a scrape   {scrape_us:9.1f} µs   {size / 1e3:.0f} kB, the client's part of it included")
    print(f"in all {total_us / tokens:.3f} µs an output token over {tokens:,} tokens, "
          f"{total_us / 1e6 / span_s:.2%} of a core over {span_s:.1f} s")  # fmt: skip


if __name__ == "__main__":
    main()
