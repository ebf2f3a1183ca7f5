"""reports/prometheus.py: what is on the page is what the report says, and nothing else.

Pages are read by Prometheus' own parser and, where it is installed, by promtool.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loadgen.acceptance import CHUNKS, COUNTERS, PER_REQUEST
from loadgen.metrics import METRICS
from loadgen.scrape import parse_page
from loadgen.summarize import summarize
from loadgen.types import (
    Broke,
    Cancelled,
    Caveat,
    ClientSample,
    ClosedLoop,
    Engine,
    Load,
    OpenLoop,
    Outcome,
    Phase,
    PhaseRecord,
    Plan,
    Prompt,
    Record,
    Refused,
    RequestRecord,
    Run,
    RunInfo,
    Scenario,
    ServerConfig,
    Snapshot,
    SpecConfig,
    SpecCounters,
    TimedOut,
)
from reports.exposition import Page, Served
from reports.prometheus import (
    FAMILIES,
    HISTOGRAMS,
    LATE_S,
    MOST_CATEGORIES,
    MOST_POSITIONS,
    OUTCOMES,
    Exporter,
    info_labels,
    load_words,
    run_labels,
    spec_label,
)
from servers import sglang, vllm
from tests.conftest import Truth
from tests.records import ENGINE, ENGINE_THAT_TELLS, SERVER, record, run_info
from tests.test_cli import asked, draftload, environment, measured

__all__ = ["asked"]  # a fixture

ROOT = Path(__file__).parents[1]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
FAILURES: tuple[Outcome, ...] = (
    Refused(status=503, message=""),
    Broke(reason="reset", message=""),
    TimedOut(after_s=1),
    Cancelled(),
)
COUNTING = dataclasses.replace(
    ENGINE,
    chunk_is_step=False,
    metrics_path="/metrics",
    tick_prefixes=("steps", "generated", "requests"),
    counters=lambda samples: SpecCounters(
        steps=whole(samples, "steps"),
        generated_tokens=whole(samples, "generated"),
        requests=whole(samples, "requests"),
    ),
)


def whole(samples: Any, name: str) -> int | None:
    return int(samples[name]) if name in samples else None


# ── a run without a loop ─────────────────────────────────────────────────────────────────────────


def plan_of(*loads: Load, categories: Sequence[str] = ("coding", "math")) -> Plan:
    prompts = tuple(Prompt(prompt_id=c, category=c) for c in categories)
    phases = (
        Phase(name=name, load=load, repeat=0, measured=name == word, dialogues=())
        for load in loads or (ClosedLoop(concurrency=1),)
        for word in [f"c={load_words(load)}"]
        for name in (f"warm-up {word}", word)
    )
    return Plan(scenario=Scenario(name="smoke"), prompts=prompts, phases=tuple(phases))


def exported(
    *records: Record, engine: Engine = ENGINE, plan: Plan | None = None, info: RunInfo | None = None
) -> Samples:
    """The page after these records, in a run that is not over."""
    texts: list[bytes] = []
    engines = {engine.name: engine, "openai": engine}
    exporter = Exporter(engines, texts.append)
    with exporter.watch(plan or plan_of(), info or run_info()) as observe:
        for one in records:
            observe(one)
        observe(over(records))
        return read(texts[-1])


def over(records: Sequence[Record]) -> PhaseRecord:
    names = [r.phase for r in records if isinstance(r, RequestRecord | Snapshot | ClientSample)]
    name = names[-1] if names else "c=1"
    return PhaseRecord(
        name=name,
        load=ClosedLoop(concurrency=1),
        repeat=0,
        measured=not name.startswith("warm-up"),
        started_s=0,
        ended_s=99,
    )


def read(text: bytes) -> Samples:
    """Every sample. No series may stand twice."""
    found: Samples = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def total(page: Samples, name: str, **labels: str) -> float | None:
    """The sum of the series with these labels; None where there is none."""
    found = [
        v for (n, has), v in page.items() if n == f"draftload_{name}" and labels.items() <= has
    ]
    return sum(found) if found else None


def values_of(page: Samples, name: str, label: str) -> set[str]:
    return {dict(has).get(label, "") for n, has in page if n == f"draftload_{name}"}


def over_total(page: Samples, above: str, below: str) -> float | None:
    """The ratio of two counters."""
    a, b = total(page, f"{above}_total"), total(page, f"{below}_total")
    return None if a is None or b is None else a / b


def edge(name: Any, *, phase: str = "c=1", at_s: float = 0.0, **samples: Any) -> Snapshot:
    return Snapshot(at_s=at_s, phase=phase, edge=name, samples=samples)


def tick(at_s: float, *, phase: str = "c=1", **changes: Any) -> ClientSample:
    fields = {"in_flight": 3, "target": 4, "sent": 9, "chunks": 9, "tokens": 0, "loop_lag_s": 0.002}
    return ClientSample(
        at_s=at_s, phase=phase, **({"cpu_s": 1.0, "rss_bytes": 1} | fields | changes)
    )


# ── the page and the report ──────────────────────────────────────────────────────────────────────


def drafted(*accepted: int, k: int = 3, **changes: Any) -> SpecCounters:
    """A request of vLLM: one draft a step, of which `accepted` tokens were."""
    at = tuple(sum(n > j for n in accepted) for j in range(k))
    given: dict[str, Any] = {"drafts": len(accepted), "draft_tokens": k * len(accepted)}
    given |= {"accepted_tokens": sum(accepted), "accepted_by_position": at}
    return SpecCounters(**(given | changes))


def clock(chunks: Sequence[int]) -> list[float]:
    return [i / 8 for i in range(len(chunks) + 1)]


def answer(*chunks: int, **changes: Any) -> RequestRecord:
    return record(chunks, clock(chunks), **changes)


PER_REQUEST_RECORDS = (
    answer(1, 4, 2, 1, spec=drafted(3, 1, 0), isl_tokens=5),
    answer(1, 3, 3, 3, 1, category="math", spec=drafted(2, 2, 2, 0), isl_tokens=7),
    answer(1, category="math", spec=drafted(), isl_tokens=2),
)
SGLANG_RECORDS = (
    answer(
        1, 3, 2, 4, spec=SpecCounters(steps=4, accepted_tokens=6, accepted_by_position=(3, 2, 1))
    ),
    answer(1, 2, 2, category="math", spec=SpecCounters(steps=3, accepted_tokens=2)),
    answer(1, category="math"),
)
CHUNK_RECORDS = (answer(1, 4, 2, 1), answer(2, 3, 1, category="math"), answer(1))
LLAMACPP_RECORDS = (
    answer(*[1] * 6, step_tokens=array("I", [1, 3, 1, 1]), spec=drafted(2)),
    answer(*[1] * 3, step_tokens=array("I", [1, 1, 1]), spec=SpecCounters()),
)
TRTLLM_RECORDS = (
    answer(1, 4, 2, 1, spec=SpecCounters(steps=3)),
    answer(1, 3, 3, category="math", spec=SpecCounters(steps=2)),
)
BLIND = dataclasses.replace(ENGINE, chunk_is_step=False)
VLLM_PAGES = [
    Snapshot(
        at_s=at,
        phase="c=1",
        edge=name,  # type: ignore[arg-type]  # one of the three
        samples={
            f"vllm:spec_decode_num_{what}_total": float(n)
            for what, n in (("drafts", 7 + d), ("draft_tokens", 3 * d), ("accepted_tokens", a))
        },
    )
    for at, name, d, a in ((0, "start", 0, 0), (1, "tick", 2, 3), (9, "end", 5, 6))
]
COUNTED = (
    edge("start", steps=100, generated=1000, requests=10),
    *CHUNK_RECORDS,
    edge("tick", at_s=1, steps=104, generated=1008, requests=12),
    edge("end", at_s=9, steps=107, generated=1016, requests=13),
)
CASES: dict[str, tuple[Engine, Sequence[Record], str]] = {
    "vllm, figures by request": (ENGINE, PER_REQUEST_RECORDS, PER_REQUEST),
    "sglang, figures by request": (ENGINE, SGLANG_RECORDS, PER_REQUEST),
    "llama.cpp, figures by request": (BLIND, LLAMACPP_RECORDS, PER_REQUEST),
    "chunks alone": (ENGINE, CHUNK_RECORDS, CHUNKS),
    "the server's counters alone": (COUNTING, COUNTED, COUNTERS),
    "the server's steps before chunks": (
        dataclasses.replace(COUNTING, chunk_is_step=True),
        COUNTED,
        COUNTERS,
    ),
    "the server's drafts, steps from chunks": (
        vllm.ENGINE,
        (VLLM_PAGES[0], *CHUNK_RECORDS, *VLLM_PAGES[1:]),
        CHUNKS,
    ),
    "trtllm, steps by request and the server's drafts": (
        vllm.ENGINE,
        (VLLM_PAGES[0], *TRTLLM_RECORDS, *VLLM_PAGES[1:]),
        PER_REQUEST,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_acceptance_off_the_page_is_the_report_s(case: str) -> None:
    engine, records, source = CASES[case]
    page = exported(*records, engine=engine)
    run = Run(info=run_info(), records=[*records, over(records)])
    best = summarize(run, engine).phases[0].acceptance[0]
    assert best.acceptance_length is not None
    assert over_total(page, "decode_tokens", "decode_steps") == best.acceptance_length
    assert total(page, "decode_steps_total") == best.steps
    assert values_of(page, "decode_steps_total", "source") == {source}
    assert over_total(page, "drafts", "decode_steps") == best.draft_coverage
    accepted = over_total(page, "accepted_tokens", "drafts")
    length = None if accepted is None else 1 + accepted
    assert length == best.acceptance_length_drafted
    if best.draft_tokens != 0:
        assert over_total(page, "accepted_tokens", "draft_tokens") == best.acceptance_rate
    if best.joint_by_position is not None:
        of = best.drafts or best.steps or 0
        for j, share in enumerate(best.joint_by_position, 1):
            at = total(page, "accepted_tokens_at_position_total", position=str(j)) or 0
            assert at / of == share


@pytest.mark.parametrize("case", ["vllm, figures by request", "chunks alone"])
def test_acceptance_by_category_is_the_report_s(case: str) -> None:
    engine, records, _ = CASES[case]
    page = exported(*records, engine=engine)
    run = Run(info=run_info(), records=records)
    for found in summarize(run, engine).phases[0].categories:
        assert found.acceptance is not None
        tokens = total(page, "decode_tokens_total", category=found.category) or 0
        steps = total(page, "decode_steps_total", category=found.category) or 0
        assert tokens / steps == found.acceptance.acceptance_length


def test_server_counters_are_not_beside_a_request_s_own_figures() -> None:
    """Or a sum over sources would count every draft twice."""
    page = exported(VLLM_PAGES[0], *PER_REQUEST_RECORDS, *VLLM_PAGES[1:], engine=vllm.ENGINE)
    for name in ("drafts", "accepted_tokens", "decode_steps"):
        assert values_of(page, f"{name}_total", "source") == {PER_REQUEST}


@pytest.mark.parametrize("failure", FAILURES)
def test_server_counters_are_left_out_once_a_request_failed(failure: Outcome) -> None:
    failed = msgspec.structs.replace(CHUNK_RECORDS[0], outcome=failure)
    page = exported(COUNTED[0], failed, *COUNTED[1:], engine=COUNTING)
    assert total(page, "decode_steps_total") is None
    run = Run(info=run_info(), records=[COUNTED[0], failed, *COUNTED[1:], over(COUNTED)])
    assert summarize(run, COUNTING).phases[0].acceptance[0].acceptance_length is None


def test_server_counters_are_there_while_the_phase_goes_on() -> None:
    page = exported(*COUNTED[:5], engine=COUNTING)
    assert total(page, "decode_steps_total", source=COUNTERS) == 4
    assert total(page, "decode_tokens_total", source=COUNTERS) == 8 - 2


def sglang_page(name: Any, at_s: float, *counts: int, phase: str = "c=1") -> Snapshot:
    """Verify calls, tokens and requests; a tick has what SGLang's ticks have."""
    families = (sglang.VERIFIED, sglang.GENERATED, sglang.REQUESTS)
    page = "".join(f'{f}{{model_name="m"}} {n}\n' for f, n in zip(families, counts, strict=True))
    prefixes = sglang.ENGINE.tick_prefixes if name == "tick" else ()
    return edge(name, at_s=at_s, phase=phase, **parse_page(page, prefixes))


def test_sglang_s_steps_go_with_its_own_tokens_from_the_first_tick_on() -> None:
    """The client's tokens over the server's steps are of two windows while requests are on."""
    start, tick_ = sglang_page("start", 0, 100, 1000, 10), sglang_page("tick", 1, 104, 1008, 12)
    page = exported(start, CHUNK_RECORDS[0], tick_, engine=sglang.ENGINE)
    assert over_total(page, "decode_tokens", "decode_steps") == (8 - 2) / 4
    end = sglang_page("end", 9, 107, 1016, 13)
    page = exported(start, *CHUNK_RECORDS, tick_, end, engine=sglang.ENGINE)
    assert over_total(page, "decode_tokens", "decode_steps") == (16 - 3) / 7


def test_decode_tokens_never_fall_where_a_request_is_counted_before_its_tokens() -> None:
    start, tick_ = sglang_page("start", 0, 100, 1000, 10), sglang_page("tick", 1, 104, 1008, 12)
    early = sglang_page("tick", 2, 104, 1008, 13)
    page = exported(start, CHUNK_RECORDS[0], tick_, early, engine=sglang.ENGINE)
    assert total(page, "decode_tokens_total") == 8 - 2, "Prometheus would read a restart"


@pytest.mark.parametrize("missing", ["generated", "requests"])
def test_server_steps_without_its_tokens_or_requests_are_not_told(missing: str) -> None:
    records = [
        msgspec.structs.replace(r, samples={k: v for k, v in r.samples.items() if k != missing})
        if isinstance(r, Snapshot)
        else r
        for r in COUNTED
    ]
    for steps, left in ((True, {CHUNKS}), (False, set())):
        page = exported(*records, engine=dataclasses.replace(COUNTING, chunk_is_step=steps))
        assert values_of(page, "decode_steps_total", "source") == left


@pytest.mark.parametrize("back", [{"steps": 50.0}, {"steps": 105.0, "generated": 3.0}])
def test_counters_that_went_back_are_told_no_more(back: dict[str, Any]) -> None:
    again = edge("end", at_s=9, steps=200, generated=2000, requests=30)
    cut = edge("tick", at_s=2, **({"generated": 1009.0, "requests": 12.0} | back))
    page = exported(*COUNTED[:5], cut, again, engine=COUNTING)
    assert total(page, "decode_steps_total") is None


DISPROVED = {
    "one over k + 1": (answer(1, 4, 2), answer(1, 9)),
    "what accepted tokens allow": (answer(1, 4, 4, spec=drafted(1, 1, 1, 1, 1)),),
}


@pytest.mark.parametrize("why", DISPROVED)
def test_chunks_that_are_no_steps_tell_no_steps(why: str) -> None:
    records = DISPROVED[why]
    page = exported(*records)
    assert total(page, "decode_steps_total") is None
    assert total(page, "decode_tokens_total") is None
    assert total(page, "chunk_gap_seconds_count") is None
    assert total(page, "ttft_seconds_count") == len(records)
    run = Run(info=run_info(), records=records)
    assert summarize(run, ENGINE).phases[0].acceptance[0].acceptance_length is None


def test_merged_chunks_leave_steps_that_the_server_counted() -> None:
    merged = answer(1, 3, 3, spec=SpecCounters(steps=4, accepted_tokens=2))
    page = exported(merged)
    assert over_total(page, "decode_tokens", "decode_steps") == 6 / 4
    assert total(page, "chunk_gap_seconds_count") is None


def test_without_speculation_there_is_no_acceptance() -> None:
    off = run_info(server=msgspec.structs.replace(SERVER, state="off", draft_depth=None))
    page = exported(VLLM_PAGES[0], *CHUNK_RECORDS, *VLLM_PAGES[1:], engine=vllm.ENGINE, info=off)
    assert total(page, "output_tokens_total") == 15
    names = {name for name, _ in page}
    assert not [n for n in names if re.search("decode|draft(s|_tokens)_|accepted", n)]
    assert values_of(page, "run_info", "spec") == {"none"}


def test_nothing_drafted_is_zero_only_where_speculation_is_known_to_be_on() -> None:
    blank = answer(1, 1, spec=SpecCounters(), step_tokens=array("I", [1, 1]))
    assert total(exported(blank, engine=BLIND), "drafts_total") == 0
    unknown = run_info(server=msgspec.structs.replace(SERVER, state="unknown"))
    assert total(exported(blank, engine=BLIND, info=unknown), "drafts_total") is None


def test_latencies_are_those_of_the_table_of_metrics() -> None:
    late = msgspec.structs.replace(CHUNK_RECORDS[1], intended_s=-0.25)
    page = exported(CHUNK_RECORDS[0], late, msgspec.structs.replace(late, outcome=FAILURES[0]))
    rows = {metric.name: metric for metric in METRICS}
    for family, name in HISTOGRAMS:
        values = [v for r in (CHUNK_RECORDS[0], late) for v in rows[name].values(r)]
        short = family.name.removeprefix("draftload_")
        assert values
        assert total(page, f"{short}_count") == len(values)
        assert total(page, f"{short}_sum") == pytest.approx(sum(values))
        for bound in family.buckets:
            below = sum(v <= bound for v in values)
            assert total(page, f"{short}_bucket", le=repr(bound)) == below


def test_where_a_chunk_is_no_step_its_gaps_are_not_told() -> None:
    assert total(exported(*CHUNK_RECORDS), "chunk_gap_seconds_count") == 5
    assert total(exported(*CHUNK_RECORDS, engine=BLIND), "chunk_gap_seconds_count") is None


# ── what is on the page, and when ────────────────────────────────────────────────────────────────


def test_every_outcome_stands_at_zero_before_it_happens() -> None:
    before = exported(tick(1))
    assert total(before, "requests_total", category="math") == 0
    assert values_of(before, "requests_total", "outcome") == set(OUTCOMES.values())
    failed = [msgspec.structs.replace(CHUNK_RECORDS[0], outcome=one) for one in FAILURES]
    page = exported(*failed, CHUNK_RECORDS[0])
    for outcome in OUTCOMES.values():
        assert total(page, "requests_total", outcome=outcome) == 1
    assert total(page, "output_tokens_total") == CHUNK_RECORDS[0].osl_tokens
    assert total(page, "prompt_tokens_total") is None, "no length is known"
    assert total(exported(*PER_REQUEST_RECORDS), "prompt_tokens_total", category="math") == 9


def in_phase(name: str, *records: RequestRecord) -> list[RequestRecord]:
    return [msgspec.structs.replace(r, phase=name) for r in records]


def test_warm_up_is_not_exported_and_an_ended_load_stays_until_the_next_begins() -> None:
    plan = plan_of(ClosedLoop(concurrency=1), ClosedLoop(concurrency=8))
    warm = in_phase("warm-up c=1", *CHUNK_RECORDS)
    page = exported(*warm, tick(1, phase="warm-up c=1", tokens=15), plan=plan)
    assert total(page, "requests_total") == 0
    assert total(page, "streamed_tokens_total") is None
    both: list[Record] = [
        *warm,
        *CHUNK_RECORDS,
        tick(2, tokens=20),
        *in_phase("warm-up c=8", *CHUNK_RECORDS),
    ]
    page = exported(*both, plan=plan)
    assert values_of(page, "requests_total", "concurrency") == {"1"}
    assert total(page, "requests_total") == 3
    assert total(page, "streamed_tokens_total") == 20 - 15, "those of the warm-up are not its own"
    page = exported(*both, *in_phase("c=8", CHUNK_RECORDS[0]), plan=plan)
    assert {dict(labels).get("concurrency") for _, labels in page} == {"8"}
    assert total(page, "requests_total") == 1


def test_categories_that_run_apart_are_one_load() -> None:
    load = ClosedLoop(concurrency=1)
    apart = tuple(
        Phase(name=f"c=1 {c}", load=load, repeat=0, measured=True, dialogues=(), category=c)
        for c in ("coding", "math")
    )
    plan = dataclasses.replace(plan_of(), phases=apart)
    records: list[Record] = []
    for n, (phase, done) in enumerate(zip(apart, CHUNK_RECORDS, strict=False)):
        start, _, end = (COUNTED[0], None, COUNTED[-1])
        pages = [msgspec.structs.replace(s, phase=phase.name) for s in (start, end)]
        ended = msgspec.structs.replace(done, phase=phase.name, category=phase.category or "")
        records += [pages[0], ended, pages[1]]
        assert n < 2
    page = exported(*records, plan=plan, engine=COUNTING)
    assert total(page, "requests_total", outcome="completed") == 2
    for category in ("coding", "math"):
        assert total(page, "decode_steps_total", category=category, source=COUNTERS) == 7


def test_categories_of_the_server_s_counters_are_cut_and_bounded_as_those_of_requests() -> None:
    names = [f"{n}\x1b" + "x" * 500 for n in range(MOST_CATEGORIES + 2)]
    load = ClosedLoop(concurrency=1)
    apart = tuple(
        Phase(name=n, load=load, repeat=0, measured=True, dialogues=(), category=n) for n in names
    )
    plan = dataclasses.replace(plan_of(categories=names), phases=apart)
    records = [
        msgspec.structs.replace(r, phase=n, **more)
        for n in names
        for r, more in ((COUNTED[0], {}), (CHUNK_RECORDS[0], {"category": n}), (COUNTED[-1], {}))
    ]
    page = exported(*records, plan=plan, engine=COUNTING)
    told = values_of(page, "decode_steps_total", "category")
    assert told == values_of(page, "requests_total", "category")
    assert total(page, "decode_steps_total", category="others") == 2 * 7
    assert total(page, "decode_steps_total") == len(names) * 7


def test_gauges_of_the_client() -> None:
    texts: list[bytes] = []
    with Exporter({"openai": ENGINE}, texts.append).watch(plan_of(), run_info()) as observe:
        observe(tick(1, cpu_s=2.0))
        assert total(read(texts[-1]), "client_cpu_ratio") is None
        observe(tick(1.5, cpu_s=2.2))
        page = read(texts[-1])
        assert total(page, "client_cpu_ratio") == pytest.approx(0.4)
        assert total(page, "client_cpu_seconds_total") == 2.2
        assert total(page, "requests_in_flight") == 3
        assert total(page, "requests_in_flight_target") == 4
        assert total(page, "client_loop_lag_seconds") == 0.002
        assert total(page, "run_ended") == 0
        assert total(page, "series") == len(page)
    page = read(texts[-1])
    assert total(page, "run_ended") == 1
    assert total(page, "requests_in_flight") == 0, "an ended phase has nothing in flight"
    assert total(page, "requests_in_flight_target") is None


def test_the_server_s_page_that_goes_away_and_comes_back() -> None:
    engine = dataclasses.replace(ENGINE_THAT_TELLS, tick_prefixes=("r",))
    told: dict[str, Any] = {"running": 2.0, "waiting": 1.0, "kv_cache_use": 0.5}
    up = exported(edge("tick", at_s=1, **told), tick(2), engine=engine)
    assert total(up, "scrape_up") == 1
    assert total(up, "server_requests_running") == 2
    assert total(up, "server_requests_waiting") == 1
    assert total(up, "server_kv_cache_usage_ratio") == 0.5
    gone = Caveat(code="metrics-page", message="", advice="")
    late = tick(1.1 + LATE_S)
    for trouble in (gone, late):
        down = exported(edge("tick", at_s=1, **told), trouble, engine=engine)
        assert total(down, "scrape_up") == 0
        assert total(down, "server_requests_running") is None
        again = edge("tick", at_s=20, **told)
        back = exported(edge("tick", at_s=1, **told), trouble, again, tick(21), engine=engine)
        assert total(back, "scrape_up") == 1
    assert total(exported(tick(99)), "scrape_up") is None, "no page, nothing to say of it"


def test_a_server_s_page_that_stays_dead_is_down_in_the_next_load_too() -> None:
    """The caveat comes once a run."""
    engine = dataclasses.replace(ENGINE_THAT_TELLS, tick_prefixes=("r",))
    plan = plan_of(ClosedLoop(concurrency=1), ClosedLoop(concurrency=8))
    read_once = edge("tick", at_s=1, running=2.0)
    gone = Caveat(code="metrics-page", message="", advice="")
    for records in ((gone,), (read_once, gone), (read_once, tick(1.1 + LATE_S))):
        page = exported(*records, tick(40, phase="c=8"), engine=engine, plan=plan)
        assert total(page, "scrape_up", concurrency="8") == 0
    page = exported(read_once, tick(2), tick(1.1 + LATE_S, phase="c=8"), engine=engine, plan=plan)
    assert total(page, "scrape_up", concurrency="8") == 0, "it died between the loads"
    back = edge("start", at_s=39, phase="warm-up c=8", running=2.0)
    page = exported(read_once, gone, back, tick(40, phase="c=8"), engine=engine, plan=plan)
    assert total(page, "scrape_up", concurrency="8") == 1
    assert total(page, "server_requests_running") is None, "warm-up is not on the page"


def test_tokens_that_were_not_streamed_are_no_zero() -> None:
    page = exported(tick(1), tick(2))
    assert total(page, "streamed_tokens_total") is None
    assert total(exported(tick(1), tick(2, tokens=5)), "streamed_tokens_total") == 5


def test_a_sweep_s_page_is_that_of_its_last_cell() -> None:
    texts: list[bytes] = []
    exporter = Exporter({"openai": ENGINE}, texts.append)
    for run_id in ("r1", "r2"):
        with exporter.watch(plan_of(), run_info(run_id=run_id)) as observe:
            assert total(read(texts[-1]), "run_ended") == 0
            observe(CHUNK_RECORDS[0])
        page = read(texts[-1])
        assert {dict(labels)["run_id"] for _, labels in page} == {run_id}
        assert total(page, "requests_total") == 1
        assert total(page, "run_ended") == 1


def test_a_run_that_fails_has_ended_too() -> None:
    texts: list[bytes] = []
    watching = Exporter({"openai": ENGINE}, texts.append).watch(plan_of(), run_info())
    with contextlib.suppress(RuntimeError), watching:
        raise RuntimeError
    assert total(read(texts[-1]), "run_ended") == 1


# ── labels ───────────────────────────────────────────────────────────────────────────────────────

CONFIG = ServerConfig(engine="vllm", model="m", spec=SpecConfig(method="ngram", draft_depth=5))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": "off"}, "none"),
        ({"state": "unknown", "draft_depth": None}, "unknown"),
        ({"spec_reported": "eagle3"}, "eagle3 k = 3"),
        ({"spec_reported": "eagle3", "config": CONFIG}, "eagle3 k = 3"),
        ({"config": CONFIG}, "ngram k = 5"),
        ({"spec_reported": "x\x1b[2J", "draft_depth": None}, "x\\x1b[2J"),
    ],
)
def test_what_speculates(changes: dict[str, Any], said: str) -> None:
    assert spec_label(msgspec.structs.replace(SERVER, **changes)) == said


@pytest.mark.parametrize(
    ("load", "words"),
    [(ClosedLoop(concurrency=32), "32"), (OpenLoop(request_rate_rps=0.5), "0.5/s")],
)
def test_how_much_load(load: Load, words: str) -> None:
    assert load_words(load) == words


HOSTILE = 'm"\\\n\x1b[31m\x00\x85\u202e\ud800' + "x" * 5000


def test_hostile_names_are_harmless_and_can_be_read_back() -> None:
    server = msgspec.structs.replace(SERVER, model=HOSTILE, version=HOSTILE, spec_reported=HOSTILE)
    info = run_info(server=server, scenario=Scenario(name=HOSTILE))
    texts: list[bytes] = []
    plan = plan_of(categories=(HOSTILE, "coding"))
    with Exporter({"openai": ENGINE}, texts.append).watch(plan, info) as observe:
        observe(msgspec.structs.replace(PER_REQUEST_RECORDS[0], category=HOSTILE))
        observe(tick(1))
    text = texts[-1].decode()
    assert all(c.isprintable() or c == "\n" for c in text)
    assert total(read(texts[-1]), "requests_total", outcome="completed") == 1
    assert max(map(len, text.splitlines())) < 10_000
    check_metrics(texts[-1])


# ── bounds, promtool, docs ───────────────────────────────────────────────────────────────────────


def full(categories: int, k: int) -> bytes:
    """A page with every series that a run can have."""
    texts: list[bytes] = []
    names = [f"category-{n}" for n in range(categories)]
    engine = dataclasses.replace(ENGINE_THAT_TELLS, tick_prefixes=("r",))
    info = run_info(server=msgspec.structs.replace(SERVER, draft_depth=k))
    exporter = Exporter({"openai": engine}, texts.append)
    with exporter.watch(plan_of(categories=names), info) as observe:
        observe(edge("start", running=1, waiting=1, kv_cache_use=0.5))
        for name, outcome in itertools.product(names, (None, *FAILURES)):
            done = answer(1, 2, 1, category=name, isl_tokens=4, intended_s=0.0)
            if outcome is not None:
                done = msgspec.structs.replace(done, outcome=outcome)
            observe(done)
            observe(msgspec.structs.replace(done, spec=drafted(1, 0, k=k)))
        observe(tick(1))
        observe(tick(2))
        return texts[-1]


def test_a_page_stays_below_five_thousand_series() -> None:
    usual = read(full(categories=12, k=8))
    assert len(usual) < 500
    most = read(full(categories=3 * MOST_CATEGORIES, k=3 * MOST_POSITIONS))
    assert len(most) < 5000
    assert len(values_of(most, "requests_total", "category")) == MOST_CATEGORIES + 1
    assert len(values_of(most, "accepted_tokens_at_position_total", "position")) == MOST_POSITIONS
    completed = total(most, "requests_total", outcome="completed")
    assert completed == 2 * 3 * MOST_CATEGORIES, "those beyond are counted together"
    assert not [labels for _, labels in most if "prompt" in str(labels)]


def check_metrics(text: bytes) -> None:
    """promtool has nothing to say. Where it is not installed, nothing is held."""
    if shutil.which("promtool") is not None:
        done = subprocess.run(
            ["promtool", "check", "metrics"],
            input=text,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def all_families() -> Page:
    page = Page(FAMILIES)
    for family in FAMILIES:
        if family.kind == "histogram":
            page.observe(family, {"run_id": "r"}, (0.1, 1e9))
        else:
            page.set(family, {"run_id": "r"}, 1)
    return page


def test_promtool_is_silent() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("no promtool: install the package prometheus")
    check_metrics(full(categories=12, k=8))
    check_metrics(all_families().text())


def test_promtool_is_not_silent_about_a_bad_page() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("no promtool: install the package prometheus")
    with pytest.raises(AssertionError):
        check_metrics(b"# HELP a_seconds A.\n# TYPE a_seconds counter\na_seconds 1\n")


def labels_on(page: Samples) -> dict[str, set[str]]:
    """Labels of each family beside those that all have."""
    common = {*run_labels("", "", SERVER), "concurrency", "le"}
    found: dict[str, set[str]] = {}
    for name, labels in page:
        family = re.sub("_(bucket|sum|count)$", "", name)
        found.setdefault(family, set()).update(dict(labels).keys() - common)
    return found


def test_the_guide_s_table_is_what_the_code_has() -> None:
    guide = (ROOT / "docs" / "guide" / "watching.md").read_text("utf-8")
    section = guide.partition("## Metrics\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(draftload_\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \|$", section, re.M)
    assert [(name, kind, about) for name, kind, _, about in rows] == [
        (family.name, family.kind, family.help) for family in FAMILIES
    ]
    told = {name: set(re.findall(r"`(\w+)`", labels)) for name, _, labels, _ in rows}
    on_a_run = labels_on(read(full(categories=2, k=2)))
    assert {name: told[name] for name in on_a_run} == on_a_run
    assert set(info_labels(SERVER)) <= told["draftload_run_info"]


# ── a run that is scraped ────────────────────────────────────────────────────────────────────────

WAITS_S = 60.0


@contextlib.contextmanager
def running(*words: str, cwd: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, and where its page is, as it tells on stderr."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "loadgen.cli", *words, "--prometheus-port", "0"],
        cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.fullmatch(r"draftload: metrics at (http://127\.0\.0\.1:\d+/metrics)\n", line)
            assert found is not None, line
            yield process, found[1]
        finally:
            process.kill()


def scrape(url: str) -> Samples:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return read(reply.read())


def until(url: str, holds: Callable[[Samples], bool]) -> Samples:
    """The first page for which it holds."""
    end = time.monotonic() + WAITS_S
    while not holds(page := scrape(url)):
        assert time.monotonic() < end, page
    return page


def has_steps(concurrency: str, page: Samples) -> bool:
    return bool(total(page, "decode_steps_total", concurrency=concurrency))


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and what it printed; nothing went wrong on stderr."""
    out, err = process.communicate(timeout=WAITS_S)
    assert "Traceback" not in err
    assert "interrupted" not in err
    return process.returncode, out


def test_a_run_is_scraped_while_it_goes_on_and_does_not_linger_when_interrupted(
    truth: Truth, asked: Path, tmp_path: Path
) -> None:
    words = measured(truth(5, 10, 3), asked, "-c", "2", "--duration", "1h", "--linger", "1h")
    with running(*words, cwd=tmp_path) as (process, url):
        page = until(url, partial(has_steps, "2"))
        assert total(page, "run_ended") == 0
        assert over_total(page, "decode_tokens", "decode_steps") == 3.0
        assert total(page, "requests_in_flight_target") == 2
        until(url, lambda later: more(later, page, "streamed_tokens_total"))
        process.send_signal(signal.SIGINT)
        assert ended(process)[0] == 130


def more(later: Samples, page: Samples, name: str) -> bool:
    return (total(later, name) or 0) > (total(page, name) or 0)


def test_a_run_lingers_until_its_end_was_seen_and_the_page_is_what_it_reported(
    truth: Truth, asked: Path, tmp_path: Path
) -> None:
    words = measured(truth(5, 1, 3), asked, "-c", "2", "--format", "json", "--linger", "1h")
    with running(*words, cwd=tmp_path) as (process, url):
        page = until(url, lambda p: total(p, "run_ended") == 1)
        code, out = ended(process)
    assert code == 0
    report = json.loads(out)
    (phase,) = report["phases"]
    assert total(page, "requests_total", outcome="completed") == phase["requests"]["completed"]
    chunks = next(a for a in phase["acceptance"] if a["source"] == "chunks")
    assert total(page, "decode_steps_total") == chunks["steps"]
    assert values_of(page, "run_info", "run_id") == {report["run"]["run_id"]}
    assert total(page, "ttft_seconds_count") == phase["ttft_s"]["n"]


def test_ctrl_c_ends_the_wait_after_the_report_and_changes_no_exit_code(
    truth: Truth, asked: Path, tmp_path: Path
) -> None:
    words = measured(truth(5, 1, 3), asked, "--format", "json", "--quiet", "--linger", "1h")
    with running(*words, cwd=tmp_path) as (process, _):
        assert process.stderr is not None
        said = next(line for line in process.stderr if "metrics page" in line)
        assert "for 1h, or until it was scraped" in said
        process.send_signal(signal.SIGINT)
        code, out = ended(process)
    assert code == 0
    assert json.loads(out)["phases"]


def test_without_linger_and_when_nobody_scrapes_a_run_just_ends(
    truth: Truth, asked: Path, tmp_path: Path
) -> None:
    url = truth(5, 1, 3)
    for more in ((), ("--linger", "100ms")):
        with running(*measured(url, asked, "--quiet", *more), cwd=tmp_path) as (process, _):
            assert ended(process)[0] == 0


def test_a_sweep_is_one_page(truth: Truth, asked: Path, tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(
        'name = "m"\nrepeats = 1\nbaseline = false\n'
        f'[[servers]]\nname = "a"\nurl = "{truth(5, 10, 3)}"\nengine = "vllm"\n'
        f'[[scenarios]]\nscenario = "smoke"\ndataset = "{asked}"\nconcurrency = [1, 2]\n'
        "max_output_tokens = 30\n"
    )
    words = ("sweep", "m.toml", "--yes", "--quiet", "--linger", "1h")
    with running(*words, cwd=tmp_path) as (process, url):
        first = until(url, partial(has_steps, "1"))
        assert {dict(has)["concurrency"] for _, has in first} == {"1"}
        last = until(url, lambda p: total(p, "run_ended", concurrency="2") == 1)
        assert {dict(has)["concurrency"] for _, has in last} == {"2"}
        runs = [values_of(page, "run_info", "run_id") for page in (first, last)]
        assert runs[0].isdisjoint(runs[1])
        code, table = ended(process)
        assert code == 0
        assert "c=2" in table


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prometheus-port", "{taken}"], "cannot be served on 127.0.0.1:{taken}"),
        (["--prometheus-port", "70000"], "cannot be served on 127.0.0.1:70000"),
        (["--prometheus-port", "0", "--prometheus-host", "192.0.2.1"], "served on 192.0.2.1:0"),
        (["--prometheus-port", "0", "--linger", "soon"], "--linger soon is no duration"),
        (["--linger", "5s"], "Expected --prometheus-port with it"),
    ],
)
def test_a_page_that_cannot_be_is_told_before_anything_starts(
    truth: Truth, asked: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    with Served("127.0.0.1", 0) as holder:
        given = [word.format(taken=holder.port) for word in words]
        done = draftload(*measured(truth(5, 1, 3), asked, *given), cwd=tmp_path)
    assert done.returncode == 2
    assert said.format(taken=holder.port) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()
