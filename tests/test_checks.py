"""Each check: one run file that trips it and one that does not, read as `draftload report` reads.

The files are of one server as vLLM is seen, written by the store. Every line of a pair is alike but
for what the check looks at.
"""

from __future__ import annotations

import heapq
import itertools
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest

from loadgen import checks, cli, preflight
from loadgen.measure import _reminder, padded
from loadgen.plan import make_plan
from loadgen.store import Store
from loadgen.summarize import summarize
from loadgen.tokens import LocalTokenizer
from loadgen.types import (
    Acceptance,
    Broke,
    Cancelled,
    Caveat,
    ClientSample,
    ClosedLoop,
    Dataset,
    Load,
    Message,
    OpenLoop,
    PhaseRecord,
    Prompt,
    PromptRecord,
    Record,
    Refused,
    RequestRecord,
    Run,
    RunEnd,
    RunInfo,
    Sampling,
    Scenario,
    ServerConfig,
    ServerFacts,
    ServerInfo,
    Snapshot,
    SpecConfig,
    SpecCounters,
    Summary,
    TimedOut,
)
from tests.records import ENGINE, phase_data, prompts, record, run_info

change = msgspec.structs.replace

SERVER = ServerInfo(engine="vllm", model="m", url="http://h", state="on", draft_depth=3)
ONE: Load = ClosedLoop(concurrency=1)


@dataclass(frozen=True)
class Lines:
    """A run file's lines."""

    info: RunInfo
    records: tuple[Record, ...]


def lines(
    made: Sequence[RequestRecord],
    *more: Record,
    load: Load = ONE,
    sampling: Mapping[str, Any] | None = None,
    server: Mapping[str, Any] | None = None,
    steady: tuple[float, float] | None = None,
    scenario: Mapping[str, Any] | None = None,
) -> Lines:
    """One measured phase of these requests; steady from its first sending to its last end."""
    first = min((r.sent_s for r in made), default=0.0)
    last = max((r.end_s for r in made), default=1.0)
    since, until = steady or (first, last)
    phase = PhaseRecord(
        name="c=1", load=load, repeat=0, measured=True, started_s=first, ended_s=last,
        steady_from_s=since, steady_to_s=until,
    )  # fmt: skip
    asked = Scenario(name="s", sampling=Sampling(**(sampling or {})), **(scenario or {}))
    info = run_info(server=change(SERVER, **(server or {})), scenario=asked)
    return Lines(info, (*made, *more, phase, RunEnd(at_s=last, reason="completed")))


def summary(folder: Path, run: Lines) -> Summary:
    """A run file's figures, by the way that `draftload report` goes."""
    path = folder / "run.jsonl"
    path.unlink(missing_ok=True)
    store = Store(path, run.info)
    for line in run.records:
        store.append(line)
    store.close()
    return cli._summary(path)


def read(folder: Path, run: Lines) -> list[Caveat]:
    return [*summary(folder, run).caveats]


def codes(found: Sequence[Caveat]) -> list[str]:
    return [caveat.code for caveat in found]


# ── requests, one after another ──────────────────────────────────────────────────────────────────


def asked(count: int = 4, each: Sequence[int] = (1, 2, 2), **changes: Any) -> list[RequestRecord]:
    """So many dialogues at concurrency 1, a chunk each 0.1 s, ended by the model."""
    times = [0.1 * n for n in range(len(each) + 1)]
    made = [
        record(each, [i * times[-1] + t for t in times], dialogue=f"d{i}", isl_tokens=20 + i,
               finish_reason="stop")
        for i in range(count)
    ]  # fmt: skip
    return [change(r, **changes) for r in made]


CLEAN = asked()


def asks(isl: int = 20, **changes: Any) -> list[PromptRecord]:
    """The prompts of CLEAN."""
    return [
        PromptRecord(prompt_id=f"d{i}", category="coding", isl_tokens=isl + i, **changes)
        for i in range(4)
    ]


def at_once(streams: int) -> list[RequestRecord]:
    return [change(r, sent_s=0.0, end_s=0.3) for r in asked(streams)]


def bucket(
    name: str, isl: int, each: Sequence[int], dialogues: int = 4, **changes: Any
) -> list[RequestRecord]:
    made = asked(dialogues, each, isl_bucket=name, isl_tokens=isl, **changes)
    return [change(r, dialogue_id=f"{name}{r.dialogue_id}") for r in made]


def slowing(by: float) -> list[RequestRecord]:
    """60 requests of ten tokens whose pace falls by this much, with noise."""
    dice, made, at = random.Random(1), [], 0.0
    for i in range(60):
        step = 0.1 * (1 + by * i / 60) * dice.uniform(0.9, 1.1)
        times = [at + n * step for n in range(6)]
        made.append(record([2] * 5, times, dialogue=f"d{i}", finish_reason="stop"))
        at = times[-1]
    return made


def sample(at_s: float, lag_s: float, cpu_s: float, in_flight: int = 1) -> ClientSample:
    return ClientSample(
        at_s=at_s, phase="c=1", in_flight=in_flight, target=1, sent=1, chunks=1, tokens=1,
        loop_lag_s=lag_s, cpu_s=cpu_s, rss_bytes=1,
    )  # fmt: skip


def samples(lag_s: float = 0.001, cpu: float = 0.1) -> list[ClientSample]:
    return [sample(i, lag_s, cpu * i) for i in range(5)]


# ── pages ────────────────────────────────────────────────────────────────────────────────────────

Edge = Literal["start", "end", "tick"]


def page(
    edge: Edge,
    made: float = 0,
    model: str = "m",
    settled: bool = True,
    more: Mapping[str, float] | None = None,
) -> Snapshot:
    """A page of vLLM's that counts generated tokens; `more` are its other families."""
    label = f'{{engine="0",model_name="{model}"}}'
    rows = {f"vllm:{name}{label}": value for name, value in (more or {}).items()}
    rows[f"vllm:generation_tokens_total{label}"] = made
    return Snapshot(at_s=0.1, phase="c=1", edge=edge, samples=rows, settled=settled)


def started(at: float, made: float, edge: Edge = "tick") -> Snapshot:
    shot = page(edge, made)
    return change(shot, samples=shot.samples | {"process_start_time_seconds": at})


def busy(running: int, waiting: int) -> tuple[Snapshot, Snapshot]:
    queue = {"num_requests_running": running, "num_requests_waiting": waiting}
    shot = page("tick", more=queue)
    return shot, shot


def put_back(edge: Edge, count: int) -> Snapshot:
    made = 20 if edge == "end" else 0
    return page(edge, made, more={"num_preemptions_total": count})


def told(drafts: int, accepted: int, **more: Any) -> SpecCounters:
    return SpecCounters(drafts=drafts, accepted_tokens=accepted, draft_tokens=3 * drafts, **more)


def counted(drafts: int, accepted: int) -> tuple[Snapshot, Snapshot]:
    """Edges between which so many drafts, accepted tokens and CLEAN's tokens were counted."""
    names = ("drafts", "draft_tokens", "accepted_tokens")
    grown = zip(names, (drafts, 3 * drafts, accepted), strict=True)
    end = {f"spec_decode_num_{name}_total": float(n) for name, n in grown}
    return page("start", more=dict.fromkeys(end, 0.0)), page("end", 20, more=end)


def config(method: str | None, k: int = 3, nodes: int | None = None) -> dict[str, Any]:
    spec = SpecConfig(method=method, draft_depth=k, draft_tokens=nodes) if method else None
    state = "on" if method is not None else "off"
    return {"config": ServerConfig(engine="vllm", model="m", spec=spec), "state": state}


# ── the table ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Case:
    """A check, the code of its caveat, a file that trips it and one that does not."""

    check: checks.Check
    code: str
    trips: Lines
    quiet: Lines


def every(**changes: Any) -> list[RequestRecord]:
    return [change(r, **changes) for r in CLEAN]


def lost(outcome: Any) -> RequestRecord:
    return change(CLEAN[0], outcome=outcome)


def bounded(slo: str) -> dict[str, Any]:
    return {"slo": (slo,)}


FAILED = [
    lost(Refused(status=429, message="slow down")),
    lost(Broke(reason="reset", message="gone")),
    lost(TimedOut(after_s=600)),
]
WAIT = Refused(status=429, message="x", retry_after_s=3.0)
SPEC = every(spec=told(2, 2))
LLAMA = {"top_k": 40.0, "min_p": 0.05}
FULL = every(max_output_tokens=6, finish_reason="length")

CASES = (
    Case(checks.request_errors, "request-errors", lines([*CLEAN, *FAILED]),
         lines([*CLEAN, lost(Cancelled())])),
    Case(checks.asked_to_wait, "asked-to-wait", lines([*CLEAN, lost(WAIT)]),
         lines([*CLEAN, FAILED[0]])),
    Case(checks.client_saturated, "client-late", lines(CLEAN, *samples(lag_s=0.05)),
         lines(CLEAN, *samples())),
    Case(checks.client_saturated, "client-stalled",
         lines(CLEAN, *samples(), sample(5.0, 3.0, 0.5)),
         lines(CLEAN, *samples(), sample(5.0, 0.3, 0.5))),
    Case(checks.client_saturated, "client-saturated", lines(CLEAN, *samples(cpu=0.9)),
         lines(CLEAN, *samples())),
    Case(checks.foreign_traffic, "foreign-traffic", lines(CLEAN, page("start"), page("end", 21)),
         lines(CLEAN, page("start"), page("end", 20))),
    Case(checks.unsettled, "server-not-idle",
         lines(CLEAN, page("start"), page("end", 20, settled=False)),
         lines(CLEAN, page("start"), page("tick", settled=False), page("end", 20))),
    Case(checks.several_models, "several-models",
         lines(CLEAN, page("start"), page("tick", model="other"), page("end", 20)),
         lines(CLEAN, page("start"), page("tick"), page("end", 20))),
    Case(checks.several_models, "several-models",
         lines([change(r, served_model="ab"[n % 2]) for n, r in enumerate(CLEAN)]),
         lines(every(served_model="an-alias"))),
    Case(checks.several_models, "several-servers",
         lines(CLEAN, started(5, 9, "start"), started(7, 4), started(5, 9), started(5, 29, "end")),
         lines(CLEAN, started(5, 9, "start"), started(7, 0), started(7, 9), started(7, 20, "end"))),
    Case(checks.several_models, "several-servers",
         lines(CLEAN, page("start", 5), page("tick", 90), page("tick", 9), page("tick", 95),
               page("end", 25)),
         lines(CLEAN, page("start", 5), page("tick", 9), page("tick", 16), page("end", 25))),
    Case(checks.spec_not_as_claimed, "spec-not-as-claimed",
         lines(asked(4, (1, 1, 1), spec=told(0, 0)), server=config("eagle3")),
         lines(SPEC, server=config("eagle3"))),
    Case(checks.spec_not_as_claimed, "spec-not-as-claimed", lines(SPEC, server=config(None)),
         lines(CLEAN, server=config(None))),
    Case(checks.spec_not_as_claimed, "spec-not-as-claimed",
         lines(every(spec=told(2, 2, draft_depth=5)), server=config("eagle3")),
         lines(every(spec=told(2, 2, draft_depth=3)), server=config("eagle3"))),
    # A tree's answers tell its nodes; a drafter that looks text up may find nothing.
    Case(checks.spec_not_as_claimed, "spec-not-as-claimed",
         lines(every(spec=told(2, 2, draft_depth=9)), server=config("eagle3", 5, nodes=7)),
         lines(every(spec=told(2, 2, draft_depth=7)), server=config("eagle3", 5, nodes=7))),
    Case(checks.spec_not_as_claimed, "spec-not-as-claimed",
         lines(asked(4, (1, 1, 1), spec=told(0, 0)), server=config("mtp")),
         lines(asked(4, (1, 1, 1), spec=told(0, 0)), server=config("ngram"))),
    Case(checks.sampling_mismatch, "sampling-mismatch",
         lines(CLEAN, server={"sampling_defaults": {"xtc_probability": 0.5}}),
         lines(CLEAN, sampling={"temperature": 0.0}, server={"sampling_defaults": LLAMA})),
    Case(checks.sampling_mismatch, "sampling-mismatch",
         lines(CLEAN, sampling={"temperature": 1.0}, server={"sampling_defaults": LLAMA}),
         lines(CLEAN, sampling={"temperature": 0.0}, server={"sampling_defaults": LLAMA})),
    Case(checks.sampling_mismatch, "sampling-mismatch",
         lines(CLEAN, server={"sampling_defaults": {"repeat_penalty": 1.1}}),
         lines(CLEAN)),
    Case(checks.ids_not_honoured, "ids-not-honoured", lines(CLEAN, *asks(24)),
         lines(CLEAN, *asks(20))),
    Case(checks.padded_prompts, "padded-prompts", lines(CLEAN, *asks(padded=0.4)),
         lines(CLEAN, *asks(padded=0.05))),
    Case(checks.padded_prompts, "padded-prompts", lines(asked(20, isl_tokens=1024)),
         lines([change(r, isl_tokens=1000 + i) for i, r in enumerate(asked(20))])),
    Case(checks.eos_ignored, "eos-ignored", lines(FULL, sampling={"ignore_eos": True}),
         lines(FULL, sampling={"ignore_eos": False})),
    Case(checks.sources_disagree, "sources-disagree", lines(SPEC, *counted(9, 10)),
         lines(SPEC, *counted(8, 8))),
    Case(checks.acceptance_falls_with_isl, "acceptance-falls-with-isl",
         lines([*bucket("8k", 8000, (1, 1, 1, 2)), *bucket("2k", 2000, (1, 3, 2, 3))]),
         lines([*bucket("8k", 8000, (1, 3, 1, 3)), *bucket("2k", 2000, (1, 3, 2, 3))])),
    # Other text at another length is no fall with length.
    Case(checks.acceptance_falls_with_isl, "acceptance-falls-with-isl",
         lines([*bucket("8k", 8000, (1, 1, 1, 2)), *bucket("2k", 2000, (1, 3, 2, 3))]),
         lines([*bucket("8k", 8000, (1, 1, 1, 2), category="writing"),
                *bucket("2k", 2000, (1, 3, 2, 3))])),
    Case(checks.server_queued, "server-queued", lines(CLEAN, *busy(8, 3)),
         lines(CLEAN, *busy(8, 0))),
    Case(checks.server_queued, "server-preempted",
         lines(CLEAN, put_back("start", 2), put_back("end", 5)),
         lines(CLEAN, put_back("start", 2), put_back("end", 2))),
    Case(checks.counters_not_usable, "counters-went-back",
         lines(CLEAN, page("start", 9), page("end", 1)),
         lines(CLEAN, page("start", 9), page("end", 29))),
    Case(checks.counters_not_usable, "counters-not-usable", lines(CLEAN, page("end", 29)),
         lines(CLEAN, page("start", 9), page("end", 29))),
    Case(checks.prefix_cache_hits, "prefix-cache", lines(every(cached_tokens=16)),
         lines(every(cached_tokens=0))),
    Case(checks.chunks_are_not_steps, "chunks-not-steps", lines(asked(4, (1, 9))),
         lines(asked(4, (1, 4)))),
    Case(checks.output_counts_disagree, "token-counts-disagree", lines(every(usage_tokens=7)),
         lines(every(usage_tokens=5))),
    Case(checks.outputs_over_limit, "outputs-over-limit", lines(every(max_output_tokens=4)),
         lines(every(max_output_tokens=5))),
    Case(checks.outputs_cut_short, "outputs-cut-short", lines(FULL),
         lines(every(max_output_tokens=6))),
    Case(checks.outputs_capped, "outputs-capped", lines(every(finish_reason="length")),
         lines(CLEAN)),
    Case(checks.too_few_samples, "too-few-dialogues",
         lines(asked(7), load=ClosedLoop(concurrency=2)),
         lines(asked(8), load=ClosedLoop(concurrency=2))),
    Case(checks.ramp_too_large, "ramp-too-large", lines(asked(10), steady=(0.5, 2.4)),
         lines(asked(10), steady=(0.5, 2.7))),
    Case(checks.throughput_trend, "throughput-trend", lines(slowing(0.5)), lines(slowing(0.0))),
    Case(checks.throughput_trend, "throughput-trend", lines(slowing(0.5)),
         lines(slowing(0.5), load=OpenLoop(request_rate_rps=2.0))),
    Case(checks.load_not_reached, "load-not-reached",
         lines(at_once(4) * 5, load=ClosedLoop(concurrency=22), steady=(0.0, 0.3)),
         lines(at_once(4) * 5, load=ClosedLoop(concurrency=20), steady=(0.0, 0.3))),
    Case(checks.slo_crossed, "slo-crossed", lines(CLEAN, scenario=bounded("e2el_max<=0.2s")),
         lines(CLEAN, scenario=bounded("e2el_max<=0.4s"))),
    Case(checks.slo_crossed, "slo-not-judged", lines(CLEAN, scenario=bounded("ttft_p99<=9s")),
         lines(CLEAN, scenario=bounded("ttft_max<=9s"))),
)  # fmt: skip

by_name = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.check.__name__}: {c.code}")


@by_name
def test_a_run_file_that_trips_it_and_one_that_does_not(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [c for c in read(tmp_path, case.trips) if c.code == case.code]
    assert len(found) == 1, "among all checks"
    assert (found[0].phase, found[0].message[-1]) in {("c=1", "."), ("c=1", "n")}
    assert found[0].advice.endswith(".")
    assert case.code not in codes(read(tmp_path, case.quiet))
    monkeypatch.setattr(checks, "CHECKS", (case.check,))
    assert codes(read(tmp_path, case.trips)) == [case.code], "it is this function"
    assert codes(read(tmp_path, case.quiet)) == []


def test_every_check_stands_in_the_table() -> None:
    assert {case.check for case in CASES} == set(checks.CHECKS)


def test_a_clean_run_has_no_caveat(tmp_path: Path) -> None:
    whole = lines(SPEC, *counted(8, 8), *samples(), *asks(), server=config("eagle3"))
    assert read(tmp_path, whole) == []


def test_a_phase_in_which_nothing_completed_breaks_no_check(tmp_path: Path) -> None:
    assert codes(read(tmp_path, lines([lost(Cancelled())]))) == ["too-few-dialogues"]


# ── what is known before a run starts ────────────────────────────────────────────────────────────


def reminded(remembers: bool, loads: int) -> tuple[Caveat, ...]:
    asked = Scenario(name="s", loads=tuple(ClosedLoop(concurrency=n + 1) for n in range(loads)))
    return _reminder(remembers, make_plan(asked, prompts(20)))


def local(known: bool | None) -> tuple[Caveat, ...]:
    return preflight.unchecked(preflight.Local(LocalTokenizer("m"), known))


def claimed(state: Literal["on", "off"]) -> tuple[Caveat, ...]:
    started = ServerConfig(engine="vllm", model="m", spec=SpecConfig(method="eagle3"))
    return preflight.not_as_claimed(ServerFacts(state=state), started)


@pytest.mark.parametrize(
    ("code", "trips", "quiet"),
    [
        ("tokenizer-unchecked", local(None), local(True)),
        ("spec-not-as-claimed", claimed("off"), claimed("on")),
        ("drafter-remembers", reminded(True, 2), reminded(True, 1)),
    ],
)
def test_what_preflight_says_stands_in_the_run_file(
    code: str, trips: tuple[Caveat, ...], quiet: tuple[Caveat, ...], tmp_path: Path
) -> None:
    clean = lines(CLEAN)
    for said, expected in ((trips, [code]), (quiet, [])):
        run = Lines(change(clean.info, caveats=said), clean.records)
        assert codes(read(tmp_path, run)) == expected


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("Sort these lines. " + "Answer now please.\n" * 40, 0.97),
        ("Why is the sky blue? " * 2, 0.0),
        ("Draw a line: " + "-" * 60, 0.0),
        ("x" * 400, 1.0),
        ("", 0.0),
        (" ".join(f"word{n}" for n in range(400)), 0.0),
    ],
)
def test_how_much_of_a_text_is_padding(text: str, share: float) -> None:
    asked = Prompt(prompt_id="p", category="c", messages=(Message(role="user", content=text),))
    assert padded(asked) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([*range(100), *[0] * 100], 0.5),
        ([*[0] * 100, *range(100)], 0.5),
        ([*range(60), *[7, 8, 9] * 12, 1, 2, 3, 4], 0.36),
        ([*range(100), *[0] * 15], 0.0),
        ([5], 0.0),
    ],
    ids=["right", "left", "under a template's end", "short", "one id"],
)
def test_how_much_of_ids_is_padding(ids: list[int], share: float) -> None:
    asked = Prompt(prompt_id="p", category="c", prompt_token_ids=array("I", ids))
    assert padded(asked) == pytest.approx(share, abs=0.01)


# ── what a check says, and its borders ───────────────────────────────────────────────────────────


def said(folder: Path, run: Lines, code: str) -> str:
    (found,) = [c for c in read(folder, run) if c.code == code]
    return found.message


def opened(sent: Sequence[float], **shape: Any) -> Lines:
    """Four dialogues intended a second apart."""
    made = [
        record([1, 2], [s, s + 0.1, s + 0.2], dialogue=f"d{i}", finish_reason="stop",
               intended_s=float(i))
        for i, s in enumerate(sent)
    ]  # fmt: skip
    return lines(made, load=OpenLoop(request_rate_rps=1, **shape))


def test_arrivals_that_had_to_wait_are_a_load_that_was_not_reached(tmp_path: Path) -> None:
    assert codes(read(tmp_path, opened([0.0, 1.0, 2.01, 3.0]))) == []
    late = opened([0.5, 1.5, 2.5, 3.5])
    assert codes(read(tmp_path, late)) == [], "late, but as many a second"
    held = opened([0.0, 2.0, 4.0, 6.0], max_in_flight=1)
    assert codes(read(tmp_path, held)) == ["load-not-reached"]
    assert "3 s and took 6 s (at most 1 in flight)" in said(tmp_path, held, "load-not-reached")


@pytest.mark.parametrize(("in_flight", "found"), [(4, ["load-not-reached"]), (5, [])])
def test_a_phase_without_an_end_is_judged_by_its_samples(
    in_flight: int, found: list[str], tmp_path: Path
) -> None:
    more = (sample(0, 0, 0, in_flight),) * 3
    run = lines(CLEAN * 5, *more, load=ClosedLoop(concurrency=5))
    torn = tuple(r for r in run.records if not isinstance(r, PhaseRecord))
    loads = change(run.info.scenario, loads=(ClosedLoop(concurrency=5),))
    seen = codes(read(tmp_path, Lines(change(run.info, scenario=loads), torn)))
    assert [c for c in seen if c == "load-not-reached"] == found


@pytest.mark.parametrize(
    "changes",
    [
        {"max_output_tokens": 6, "finish_reason": "stop"},
        {"max_output_tokens": 5, "finish_reason": "length"},
        {"max_output_tokens": 6, "finish_reason": "length", "usage_tokens": 6},
        {"finish_reason": "length"},
        {"max_output_tokens": 6, "finish_reason": "length", "token_count_source": None},
    ],
)
def test_only_an_answer_that_is_short_for_length_was_cut_short(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    assert "outputs-cut-short" not in codes(read(tmp_path, lines(every(**changes))))


def test_no_token_of_a_broken_window_is_called_foreign(tmp_path: Path) -> None:
    run = lines([*CLEAN, lost(Cancelled())], page("start"), page("end", 999))
    assert "foreign-traffic" not in codes(read(tmp_path, run))


def test_errors_name_their_number_and_the_first_message(tmp_path: Path) -> None:
    message = said(tmp_path, lines([*CLEAN, *FAILED]), "request-errors")
    assert message.startswith("3 of 7 requests failed:")
    assert "slow down" in message


@pytest.mark.parametrize(
    ("generated", "why"),
    [
        (None, "so it cannot be said why"),
        (25, "generated 5 tokens for somebody else"),
        (15, "counters miss 5 tokens of this run"),
        (20, "counts drafts in two ways"),
    ],
)
def test_why_two_sources_differ_is_said(generated: int | None, why: str, tmp_path: Path) -> None:
    start, end = counted(9, 10)
    family = next(row for row in end.samples if "generation_tokens" in row)
    pages = [
        change(s, samples={k: v for k, v in s.samples.items() if k != family} | own)
        for s, own in (
            (start, {} if generated is None else {family: 0.0}),
            (end, {} if generated is None else {family: float(generated)}),
        )
    ]
    found = said(tmp_path, lines(SPEC, *pages), "sources-disagree")
    assert "differ by +1 of 8 drafts and +2 of 8 accepted tokens" in found
    assert why in found


def test_acceptance_lengths_that_differ_are_said_with_their_steps() -> None:
    same, other = (
        Acceptance(source="s", state="on", acceptance_length=n, steps_source=f"steps of {n}")
        for n in (2.0, 2.1)
    )
    (made,) = summarize(Run(info=run_info(), records=CLEAN), ENGINE).phases

    def found(*acceptance: Acceptance) -> list[str]:
        data = phase_data(CLEAN, figures=change(made, acceptance=acceptance))
        return [caveat.message for caveat in checks.sources_disagree(data)]

    (message,) = found(same, other)
    assert "2.100 with steps of 2.1 as decode steps and 2.000 with steps of 2.0" in message
    assert found(same, same) == []


def test_a_mixture_of_models_is_no_restart(tmp_path: Path) -> None:
    """The counters are unusable, and why is said once."""
    run = lines(CLEAN, page("start"), page("end", 20, model="other"))
    assert codes(read(tmp_path, run)) == ["several-models"]
    assert "the metrics page counts m, other" in said(tmp_path, run, "several-models")


def test_the_ramp_is_not_said_where_there_are_too_few_dialogues_for_the_load(
    tmp_path: Path,
) -> None:
    run = lines(asked(7), load=ClosedLoop(concurrency=2), steady=(0.9, 1.2))
    assert [c for c in codes(read(tmp_path, run)) if c != "load-not-reached"] == [
        "too-few-dialogues"
    ]


def test_a_fall_with_the_input_is_by_a_quarter_from_one_bucket_to_the_next(tmp_path: Path) -> None:
    """AL 3, 2.5, 2: a third from end to end, and never a quarter at once."""
    slopes = {"1k": (1, 3, 3, 3), "2k": (1, 2, 3, 2, 3), "8k": (1, 2, 2, 2)}
    isl = {"1k": 1000, "2k": 2000, "8k": 8000}
    made = [r for name, each in slopes.items() for r in bucket(name, isl[name], each)]
    assert "acceptance-falls-with-isl" not in codes(read(tmp_path, lines(made)))
    steep = [r for r in made if r.isl_bucket != "2k"]
    message = said(tmp_path, lines(steep), "acceptance-falls-with-isl")
    assert message == "Acceptance length falls by 33% from 1k to 8k input tokens: 3.00, 2.00."


def test_intervals_that_touch_are_no_fall(tmp_path: Path) -> None:
    """Two dialogues of three steps against one of each kind: the fall is within their scatter."""
    long = [*bucket("8k", 8000, (1, 1, 1), 2), *bucket("8k+", 8000, (1, 4, 4), 1)]
    long = [change(r, isl_bucket="8k") for r in long]
    short = [*bucket("1k", 1000, (1, 4, 4), 2), *bucket("1k+", 1000, (1, 1, 2), 1)]
    short = [change(r, isl_bucket="1k") for r in short]
    found = codes(read(tmp_path, lines([*short, *long])))
    assert "acceptance-falls-with-isl" not in found


def of_length(isl: int, each: Sequence[int], folder: Path, **more: Any) -> Summary:
    """A run of --scenario throughput at one length, in one tier."""
    made = [change(r, tier="mixed", isl_tokens=isl) for r in asked(4, each)]
    run = lines(made, **({"scenario": {"dataset": Dataset(kind="throughput")}} | more))
    return summary(folder, run)


def test_acceptance_that_falls_from_run_to_run_is_told_of_the_longer_one(tmp_path: Path) -> None:
    """AL 2.67 at 1k twice, 2 at 2k: by a quarter. Other sampling or other prompts tell nothing."""
    high, low = (1, 3, 2, 3), (1, 2, 2, 2)
    short, again = (of_length(1000, high, tmp_path) for _ in range(2))
    long = of_length(2000, low, tmp_path)
    found = checks.across([long, short, again])
    assert [codes(run.caveats) for run in found] == [["acceptance-falls-with-isl"], [], []]
    assert found[0].caveats[0].message == (
        "Acceptance length falls by 25% from 1,000 to 2,000 input tokens (mixed): 2.67, 2.00."
    )
    warm = of_length(2000, low, tmp_path, sampling={"temperature": 1.0})
    other = of_length(2000, low, tmp_path, scenario={"dataset": Dataset(kind="jsonl")})
    level = of_length(2000, high, tmp_path)
    repeat = of_length(1010, low, tmp_path)
    for run in (warm, other, level, repeat):
        assert [codes(one.caveats) for one in checks.across([run, short])] == [[], []]


def test_the_report_of_several_runs_tells_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / "1k", tmp_path / "2k"]
    for folder, isl, each in zip(folders, (1000, 2000), ((1, 3, 2, 3), (1, 2, 2, 2)), strict=True):
        folder.mkdir()
        of_length(isl, each, folder)
    cli.app(["report", *map(str, folders)], standalone_mode=False)
    assert "acceptance-falls-with-isl" in capsys.readouterr().out


def test_a_trend_has_a_sign_and_its_noise(tmp_path: Path) -> None:
    assert "fell by" in said(tmp_path, lines(slowing(0.5)), "throughput-trend")
    assert "rose by" in said(tmp_path, lines(slowing(-0.5)), "throughput-trend")
    few = slowing(0.5)[:9]
    assert "throughput-trend" not in codes(read(tmp_path, lines(few))), "too few slices to tell"


def trends_found(streams: int, each: int, fall: float, phases: int = 400) -> float:
    """Share of played closed loops in which a trend is seen. Answers differ in length by half and
    in speed by 30 %; speed falls by `fall` over the phase."""
    dice = np.random.default_rng(5)
    found = 0
    for _ in range(phases):
        lengths = dice.lognormal(np.log(100) - 0.11, 0.47, streams * each)
        speeds = dice.lognormal(-0.045, 0.3, streams * each)
        free = [0.01 * n for n in range(streams)]
        begun, ended = np.zeros_like(lengths), np.zeros_like(lengths)
        for k, (length, speed) in enumerate(zip(lengths, speeds, strict=True)):
            at = heapq.heappop(free)
            begun[k] = at + 5
            ended[k] = begun[k] + length / (speed * (1 - fall * min(at / each / 100, 1)))
            heapq.heappush(free, ended[k])
        start, end = 0.01 * streams, begun[-1] - 5
        most = int((end - start) / np.median(ended - begun + 5))
        if most < checks.SLICES[0]:
            continue
        borders = np.linspace(start, end, min(most, checks.SLICES[1]) + 1)
        shares = np.clip((borders[:, None] - begun) / (ended - begun), 0, 1)
        counts = np.diff(shares @ lengths)
        found += checks.clear_trend(counts.tolist()) is not None
    return found / phases


def test_trends_are_found_and_seldom_where_there_are_none() -> None:
    """The figures that TREND_WIDER's docstring has."""
    assert trends_found(1, 12, 0.0) < 0.07
    assert trends_found(1, 30, 0.0) < 0.03
    assert trends_found(8, 30, 0.0) < 0.02
    assert 0.12 < trends_found(8, 30, 0.15) < 0.32
    assert trends_found(64, 30, 0.15, phases=100) > 0.97


def test_a_long_run_without_a_trend_has_none(tmp_path: Path) -> None:
    """Steady pace, answers of every length."""
    dice, made, ends = random.Random(2), [], [0.0] * 8
    for i in range(160):
        stream = ends.index(min(ends))
        times = list(itertools.accumulate([ends[stream], *[0.05] * dice.randrange(3, 20)]))
        made.append(record([2] * (len(times) - 1), times, dialogue=f"d{i}", finish_reason="stop"))
        ends[stream] = times[-1]
    run = lines(made, load=ClosedLoop(concurrency=8), steady=(0.0, made[-1].sent_s))
    assert read(tmp_path, run) == []
