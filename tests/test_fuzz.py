"""Hostile input of every kind: a UserError, a ValueError where a contract says so, or a caveat.

Valid input is mutated: bits, numbers, lines and values of what real servers and users write. What
comes through is used as the command uses it, and no figure of it is NaN or infinite.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from loadgen import __version__, matrix
from loadgen.breakeven import break_even
from loadgen.cli import _changed, _engines
from loadgen.compare import compare
from loadgen.errors import ServerError, UserError
from loadgen.plan import make_plan
from loadgen.protocol import SSE, Tally, decode_openai
from loadgen.scrape import parse_page
from loadgen.store import Store, _decoded, _encoded, read, run_path
from loadgen.summarize import summarize
from loadgen.tokens import LocalTokenizer
from loadgen.types import (
    ClientSample,
    ClosedLoop,
    Engine,
    PhaseRecord,
    PromptRecord,
    Record,
    RunEnd,
    Sampling,
    Scenario,
    ServerConfig,
    Snapshot,
    SpecConfig,
    SpecCounters,
    Stop,
    Study,
    Summary,
)
from loadgen.written import read_toml
from reports import as_json, as_markdown, breakeven, table
from reports import compare as as_compare
from scenarios import prompts as sets
from servers.launch import launched
from tests.records import DATA, REQUEST, prompts, record, run_info

ENGINES = _engines()
ROOT = Path(__file__).parents[1]
FUZZ = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# ── mutations ────────────────────────────────────────────────────────────────────────────────────

NUMBERS = (b"-1", b"0", b"1", b"7", b"1.5", b"1e300", b"-1e300", b"1e999", b"NaN", b"inf", b"null",
           b"2147483647", b"4294967296", b"9007199254740993", b"9" * 30, b"9" * 5000)  # fmt: skip
TOKENS = (*NUMBERS, b"", b'""', b"[]", b"{}", b"true", b'"', b",", b"}", b"]", b"\n", b"\r", b"\0",
          b"\xff", b"\xed\xa0\x80", b'"\\ud800"', b'"\\u0000\\u001b[2J"', b"[" * 3000,
          b"2026-11-24", "\u0663\u2028".encode())  # fmt: skip
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")

Edit = tuple[str, int, bytes]
edits = st.lists(
    st.tuples(
        st.sampled_from(("flip", "insert", "delete", "number", "number", "line", "cut")),
        st.integers(0, 1 << 20),
        st.sampled_from(TOKENS),
    ),
    min_size=1,
    max_size=4,
)


def mutated(data: bytes, changes: Sequence[Edit]) -> bytes:
    """`data` after some edits, each anywhere."""
    for how, where, token in changes:
        at = where % (len(data) + 1)
        match how:
            case "flip" if data:
                at %= len(data)
                data = data[:at] + bytes([data[at] ^ (1 << where % 8)]) + data[at + 1 :]
            case "insert":
                data = data[:at] + token + data[at:]
            case "delete":
                data = data[:at] + data[at + where % 40 :]
            case "number" if found := [*NUMBER.finditer(data)]:
                one = found[where % len(found)]
                data = data[: one.start()] + token + data[one.end() :]
            case "line":
                lines = data.splitlines(keepends=True)
                lines[at % (len(lines) + 1) :] = lines[where % (len(lines) + 1) :]
                data = b"".join(lines)
            case "cut":
                data = data[: max(at, len(data) // 2)]
            case _:
                pass
    return data


VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 1 << 31, (1 << 53) + 1, 10**30, 0.5, -1e300, 1e300, "", "c=9",
    "x" * 300, "\0\x1b[2J\u202e", [], {}, [0], [1, 2, 3], [-1], [[[]]], {"kind": "closed"},
)  # fmt: skip
changed_values = st.lists(
    st.tuples(st.integers(0, 1 << 20), st.integers(0, 1 << 20), st.sampled_from(VALUES)),
    min_size=1,
    max_size=4,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    keys = range(len(value)) if isinstance(value, list) else value
    here = [(value, key) for key in keys] if isinstance(value, list | dict) else []
    return here + [deeper for container, key in here for deeper in places(container[key])]


def with_values(rows: Sequence[Any], changes: Sequence[tuple[int, int, Any]]) -> list[Any]:
    """JSON rows in which some values are other values."""
    rows = json.loads(json.dumps(list(rows)))
    for which, where, value in changes:
        found = places(rows[which % len(rows)])
        if found:
            container, key = found[where % len(found)]
            container[key] = copy.deepcopy(value)
    return list(rows)


def finite(value: Any) -> bool:
    """No NaN and no infinity anywhere in it."""
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


# ── what users write ─────────────────────────────────────────────────────────────────────────────

MATRIX = (ROOT / "servers/configs/matrices/simulator-70b.toml").read_bytes()
SCENARIO = b"""\
name = "x"
description = "d"
loads = [{ kind = "closed", concurrency = 2 }, { concurrency = 3, kind = "closed" }]
warmup_requests = 4
repeats = 1
dataset = { kind = "builtin", categories = ["coding", "qa"], limit = 2, seed = 7 }
stop = { requests = 3, duration_s = 60.0 }
[sampling]
temperature = 0.7
top_p = 0.9
seed = 3
max_output_tokens = 64
ignore_eos = false
"""
CONFIGS = [path.read_bytes() for path in sorted((ROOT / "servers" / "configs").glob("*.toml"))]
FULL = b"""\
name = "n"
port = 8000
tensor_parallel = 1
gpus = 2
executable = ["a", "b"]
extra_args = ["--x", "$(touch pwned)"]
env = { A = "b" }
"""


def used(scenario: Scenario) -> None:
    """As `draftload run` uses it, up to the first bodies."""
    asked = sets.read(scenario.dataset).prompts
    plan = make_plan(_changed(scenario, limit=1), asked, prompts(2))
    for phase in plan.phases:
        for dialogue in itertools.islice(phase.dialogues, 3):
            request = replace_prompt(dialogue.prompt.max_output_tokens)
            body = ENGINES["vllm"].wires["chat"].encode(request, "m", scenario.sampling)
            assert finite(json.loads(body))
    assert msgspec.json.decode(msgspec.json.encode(scenario), type=Scenario) == scenario


def replace_prompt(limit: int | None) -> Any:
    return msgspec.structs.replace(REQUEST, max_output_tokens=limit or 7)


@FUZZ
@given(changes=edits)
@example(changes=[("number", 9, b"nan")])
@example(changes=[("number", 6, b"10000000")])
def test_a_scenario_is_used_or_refused(tmp_path: Path, changes: list[Edit]) -> None:
    path = tmp_path / "s.toml"
    path.write_bytes(mutated(SCENARIO, changes))
    with contextlib.suppress(UserError):
        used(read_toml(path, Scenario))


@FUZZ
@given(base=st.sampled_from(CONFIGS), full=st.booleans(), changes=edits)
def test_a_server_config_is_a_command_or_refused(
    tmp_path: Path, base: bytes, full: bool, changes: list[Edit]
) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(mutated(FULL + base if full else base, changes))
    try:
        config = read_toml(path, ServerConfig)
        command = ENGINES[config.engine].command if config.engine in ENGINES else None
        argv = command(config, 8000) if command is not None else []
    except UserError:
        return
    assert all(isinstance(word, str) for word in argv)
    assert argv[len(argv) - len(config.extra_args) :] == list(config.extra_args) or not argv
    assert msgspec.json.decode(msgspec.json.encode(config), type=ServerConfig).model == config.model


@FUZZ
@given(changes=edits)
def test_a_matrix_is_named_cells_or_refused(tmp_path: Path, changes: list[Edit]) -> None:
    path = tmp_path / "m.toml"
    path.write_bytes(mutated(MATRIX, changes))
    try:
        found = matrix.read(path, sets.scenario, ENGINES, repeats=1)
    except UserError:
        return
    names = [s.name for s in found.servers]
    assert len(set(names)) == len(names)
    assert found.baseline is None or found.baseline in names
    assert all(scenario.loads for scenario in found.scenarios)


def known_options(engine: Engine, method: str) -> list[str]:
    """Names that the engine itself gives when asked for one that is not there."""
    spec = SpecConfig(method=method, draft_depth=3, draft_model="d", options={"zzzz": 1})
    for tried in (spec, msgspec.structs.replace(spec, draft_model=None)):
        try:
            started(engine, tried)
        except UserError as fault:
            if "unknown option 'zzzz'. Known: " in str(fault):
                return str(fault).rpartition("Known: ")[2].rstrip(".").split(", ")
    return []


def started(engine: Engine, spec: SpecConfig) -> None:
    config = ServerConfig(engine=engine.name, model="simulated-8b", max_running=8, spec=spec)
    assert engine.command is not None
    assert all(isinstance(word, str) for word in engine.command(config, 1))
    assert all(text.isprintable() or "\n" in text for text in engine.files(config).values())


METHODS = [(name, m) for name, engine in sorted(ENGINES.items()) for m in engine.methods]
WRITTEN = (*VALUES, datetime.date(2026, 11, 24), math.nan, math.inf, {"1": math.inf}, [[0], []])


@pytest.mark.parametrize(("name", "method"), METHODS, ids="-".join)
def test_any_value_of_an_option_is_a_command_or_refused(name: str, method: str) -> None:
    engine, allowed = ENGINES[name], 0
    known = known_options(engine, method)
    assert known
    for key, value, model in itertools.product(known, WRITTEN, (None, "d")):
        spec = SpecConfig(method=method, draft_depth=3, draft_model=model, options={key: value})
        with contextlib.suppress(UserError):
            started(engine, spec)
            allowed += 1
    assert allowed or name == "llamacpp", "what is no number is refused there"


@FUZZ
@given(noise=st.binary(max_size=300), kind=st.sampled_from((Scenario, ServerConfig)))
def test_bytes_are_no_toml_of_ours(tmp_path: Path, noise: bytes, kind: type) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(noise)
    with pytest.raises(UserError):
        read_toml(path, kind)


ROWS: list[Any] = [
    {"id": "a", "category": "coding", "prompt": "hello", "max_output_tokens": 7, "tier": "t"},
    {"question_id": 81, "category": "writing", "turns": ["one", "two"], "reference": [1, {}]},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
    {"prompt_id": 3, "category": "x", "prompt_token_ids": [1, 2, 3], "isl_bucket": "1k"},
    {"id": "s", "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
    {"task_id": "h/0", "prompt": "def f():", "entry_point": "f"},
    {"question": "2 and 2?", "answer": "4"},
]


def read_and_used(path: Path) -> None:
    try:
        asked = sets.read_file(path)
    except UserError:
        return
    assert len({p.prompt_id for p in asked}) == len(asked) > 0
    for prompt in asked:
        body = (
            ENGINES["vllm"]
            .wires["chat"]
            .encode(msgspec.structs.replace(REQUEST, messages=prompt.messages), "m", Sampling())
        )
        assert json.loads(body)
        assert (prompt.max_output_tokens or 1) >= 1
    assert make_plan(Scenario(name="x", stop=Stop(requests=3)), asked).phases


@FUZZ
@given(values=st.lists(changed_values, max_size=1), changes=st.lists(edits, max_size=1))
def test_a_dataset_is_prompts_or_refused(
    tmp_path: Path, values: list[Any], changes: list[list[Edit]]
) -> None:
    rows = with_values(ROWS, values[0]) if values else ROWS
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    path = tmp_path / "d.jsonl"
    path.write_bytes(mutated(data, changes[0]) if changes else data)
    read_and_used(path)


@FUZZ
@given(noise=st.binary(max_size=200))
def test_bytes_are_a_dataset_or_refused(tmp_path: Path, noise: bytes) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(noise)
    read_and_used(path)


# ── what servers say ─────────────────────────────────────────────────────────────────────────────

METRICS = (*sorted(DATA.glob("*-metrics-*.txt")), DATA / "trtllm-prometheus.txt")
PAGES = {path.name: path.read_text() for path in METRICS}
KINDS = {
    name: "\n".join(line for line in text.splitlines() if "_bucket" not in line)
    for name, text in PAGES.items()
}
TOLD: list[Any] = [
    {
        "/version": {"version": "0.32.0"},
        "/props": json.loads((DATA / "llamacpp-props.json").read_text()),
        "/slots": json.loads((DATA / "llamacpp-slots-busy.json").read_text()),
        "/v1/models": {"data": [{"id": "m", "tags": ["xllamacpp-1"]}]},
        "/truth": {"version": "simulated", "draft_depth": 3, "state": "on", "max_running": 8},
    }
]


@FUZZ
@given(
    page=st.sampled_from(sorted(KINDS)), changes=edits, values=st.lists(changed_values, max_size=1)
)
def test_any_page_is_figures_or_nothing(page: str, changes: list[Edit], values: list[Any]) -> None:
    samples = parse_page(mutated(KINDS[page].encode(), changes).decode("utf-8", "replace"))
    assert finite(samples)
    told = with_values(TOLD, values[0])[0] if values else TOLD[0]
    for engine in ENGINES.values():
        counted = msgspec.structs.astuple(engine.counters(samples))
        assert all(isinstance(n, int | tuple | None) for n in counted)
        assert finite(msgspec.structs.asdict(engine.load(samples)))
        facts = engine.describe(told if isinstance(told, dict) else {}, samples)
        assert facts.state in ("on", "off", "unknown")
    snapshot = Snapshot(at_s=1.0, phase="c=1", edge="tick", samples=samples)
    assert _decoded(_encoded(snapshot)) == snapshot


ITERATIONS = json.loads((DATA / "trtllm-iterations.json").read_text())[:6]


@FUZZ
@given(values=changed_values, changes=st.lists(edits, max_size=1))
def test_any_page_that_is_drained_is_sums_or_a_value_error(
    values: Any, changes: list[list[Edit]]
) -> None:
    engine = ENGINES["trtllm"]
    assert engine.drain is not None
    page = json.dumps(with_values(ITERATIONS, values)).encode()
    text = (mutated(page, changes[0]) if changes else page).decode("utf-8", "replace")
    sums: dict[str, float] = {}
    with contextlib.suppress(ValueError):
        for _ in range(2):
            sums = engine.drain(text, sums)
    assert finite(sums)
    for found in (engine.counters(sums), engine.load(sums), engine.describe({}, sums)):
        assert finite(msgspec.structs.asdict(found))


STREAMS = {path.name: path.read_bytes() for path in sorted(DATA.glob("*.sse"))}
WIRES = {
    (engine.name, api): wire.decode
    for engine in ENGINES.values()
    for api, wire in engine.wires.items()
}


def streamed(data: bytes, cuts: Sequence[int], decode: Callable[[bytes], Any]) -> None:
    """A whole stream, in pieces; then its record, as it is written and read."""
    tally = Tally(decode)
    edges = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    with contextlib.suppress(ValueError):
        for number, (a, b) in enumerate(itertools.pairwise(edges)):
            tally.feed(1.0 + number, data[a:b])
        tally.close(99.0)
    made = tally.record(REQUEST, tally.outcome(), zero=0.5, sent=1.0, ended=99.0)
    assert _decoded(_encoded(made)) == made


@FUZZ
@given(
    name=st.sampled_from(sorted(STREAMS)),
    changes=edits,
    cuts=st.lists(st.integers(0, 1 << 20), max_size=6),
    wire=st.sampled_from(sorted(WIRES)),
)
def test_any_stream_is_a_record(
    name: str, changes: list[Edit], cuts: list[int], wire: tuple[str, str]
) -> None:
    streamed(mutated(STREAMS[name], changes), cuts, WIRES[wire])


EVENTS = [
    json.loads(line[6:])
    for data in STREAMS.values()
    for line in data.splitlines()
    if line.startswith(b"data: {")
]


@FUZZ
@given(first=st.integers(0, len(EVENTS) - 1), values=changed_values)
def test_any_value_in_an_event_is_a_record(first: int, values: Any) -> None:
    events = with_values(EVENTS[first : first + 8], values)
    data = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    streamed(data, (), decode_openai)


def timed(n: int, ms: float, drafted: int, accepted: int) -> bytes:
    told = {"predicted_n": n, "predicted_ms": ms, "draft_n": drafted, "draft_n_accepted": accepted}
    choice = {"text": "a", "finish_reason": None}
    return b"data: " + json.dumps({"choices": [choice], "timings": told}).encode() + b"\n\n"


def figures(**told: Any) -> bytes:
    known = {"num_spec_steps": 1, "num_accepted_draft_tokens": 1, "num_draft_tokens": 1}
    event = {"choices": [], "metrics": {"speculative_decoding": known | told}}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


@pytest.mark.parametrize(
    "lie",
    [
        timed(1, -1.0, 0, 0),
        timed(1, 1.0, 0, 0) + timed(2, 2.0, 2_000_000_000, 5),
        timed(1, 1.0, 0, 0) + timed(2_000_000_000, 2.0, 3, 1),
        timed(1, 1.0, 9, 2_000_000_000) + timed(2, 2.0, 10, 0) + timed(3, 3.0, 12, 1),
        figures(per_step_drafted=[2_000_000_000]),
        figures(acceptance_histogram=[1] * 200_000),
        figures(num_spec_tokens=2_000_000_000),
    ],
    ids=lambda lie: lie[-60:].decode().strip(),
)
def test_a_lie_of_thousands_of_millions_costs_no_memory(lie: bytes) -> None:
    streamed(lie, (), decode_openai)


# ── run files ────────────────────────────────────────────────────────────────────────────────────


def run_lines(name: str) -> list[bytes]:
    """A run of the engine `name` at two loads, as its lines."""
    pages = [parse_page(PAGES[f"vllm-metrics-ngram-{at}.txt"]) for at in ("before", "after")]
    pages = [{k: v for k, v in p.items() if re.search("spec_|_tokens", k)} for p in pages]
    info = run_info(
        server=msgspec.structs.replace(run_info().server, engine=name),
        scenario=Scenario(name="x", loads=(ClosedLoop(concurrency=1), ClosedLoop(concurrency=2))),
        client=msgspec.structs.replace(run_info().client, draftload=__version__),
    )
    records: list[Record] = [info, PromptRecord(prompt_id="d0", category="coding", text="a")]
    stream = Tally(decode_openai)
    data = STREAMS[
        {"llamacpp": "llamacpp-ngram-timings.sse", "trtllm": "trtllm-metrics-event.sse"}.get(
            name, "vllm-ngram2.sse"
        )
    ]
    told = SpecCounters(steps=3, drafts=3, draft_tokens=9, accepted_tokens=6)
    for number, event in enumerate(data.split(b"\n\n")):
        stream.feed(1.0 + number / 100, event + b"\n\n")
    for load in (1, 2):
        zero, phase = 10.0 * load, f"c={load}"
        records += [Snapshot(at_s=zero, phase=phase, edge="start", samples=pages[0])]
        for n in range(5):
            times = [zero + n + t for t in (0.0, 0.5, 0.6, 0.7, 0.9)]
            category = ("coding", "qa")[n % 2]
            made = record([1, 4, 2, 3], times, dialogue=f"d{n}", category=category, text="héllo")
            spec = told if name == "trtllm" else None
            records.append(msgspec.structs.replace(made, phase=phase, spec=spec))
        seen = stream.record(REQUEST, stream.outcome(), zero=0.0, sent=1.0, ended=2.0)
        records += [msgspec.structs.replace(seen, phase=phase, sent_s=zero + 3, end_s=zero + 4)]
        records += [
            ClientSample(at_s=zero + n, phase=phase, in_flight=load, target=load, sent=n, chunks=n,
                         tokens=n, loop_lag_s=0.001, cpu_s=float(n), rss_bytes=1 << 20)
            for n in range(2)
        ]  # fmt: skip
        records += [
            Snapshot(at_s=zero + 8, phase=phase, edge="end", samples=pages[1]),
            PhaseRecord(name=phase, load=ClosedLoop(concurrency=load), repeat=0, measured=True,
                        started_s=zero, ended_s=zero + 8, steady_from_s=zero, steady_to_s=zero + 7),
        ]  # fmt: skip
    return [_encoded(r) for r in (*records, RunEnd(at_s=40.0, reason="completed"))]


RUNS = {name: run_lines(name) for name in ("vllm", "llamacpp", "trtllm", "openai")}


def reported(path: Path, engine: Engine, beside: Summary | None = None) -> Summary:
    """Every report of a run file, alone and beside another; all figures finite."""
    found = summarize(read(path), engine)
    assert finite(msgspec.to_builtins(found))
    study = Study(summaries=(found,), paths=("x",))
    for text in (
        table.render(study),
        as_json.render(study),
        table.render(replace(study, width=60)),
    ):
        assert text
        assert "\x1b" not in text
    for base, spec in ((beside, found), (found, beside)):
        if base is None or spec is None:
            continue
        try:
            comparison = compare(base, spec, force=True)
        except UserError:
            continue  # no load in common
        assert finite(msgspec.to_builtins(comparison))
        both = Study(summaries=(base, spec), comparison=comparison)
        assert as_compare.render(both)
        assert as_markdown.render(both)
        both = replace(both, break_even=break_even(comparison))
        assert breakeven.render(both)
        assert json.loads(as_json.render(both))
    return found


def written(path: Path, lines: Sequence[bytes]) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@functools.cache
def sound(name: str) -> Summary:
    """A run as it is: nothing is skipped."""
    with tempfile.TemporaryDirectory() as folder:
        found = reported(written(Path(folder, name), RUNS[name]), ENGINES[name])
    assert not any(c.code == "torn-lines" for c in found.caveats)
    assert len(found.phases) == 2
    return found


@FUZZ
@given(name=st.sampled_from(sorted(RUNS)), changes=edits)
def test_any_bytes_of_a_run_file_are_a_report_or_refused(
    tmp_path: Path, name: str, changes: list[Edit]
) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(mutated(b"\n".join(RUNS[name]), changes))
    with contextlib.suppress(UserError):
        reported(path, ENGINES[name], sound(name))


@settings(FUZZ, max_examples=120)
@given(name=st.sampled_from(sorted(RUNS)), values=changed_values)
def test_any_value_in_a_run_file_is_a_report_or_refused(
    tmp_path: Path, name: str, values: Any
) -> None:
    rows = with_values([json.loads(line) for line in RUNS[name]], values)
    path = written(tmp_path / "run.jsonl", [json.dumps(row).encode() for row in rows])
    with contextlib.suppress(UserError):
        reported(path, ENGINES[name], sound(name))


# ── a line of 1 GB ───────────────────────────────────────────────────────────────────────────────

GIGABYTE = """
import os, resource, sys
from pathlib import Path
from loadgen.errors import UserError
from loadgen.protocol import SSE
from loadgen.store import read
from loadgen.types import Scenario
from loadgen.written import read_toml
from scenarios.prompts import read_file

kind, path = sys.argv[1], Path(sys.argv[2])
taken = int(Path("/proc/self/statm").read_bytes().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (taken + (450 << 20),) * 2)
try:
    if kind == "toml":
        read_toml(path, Scenario)
    elif kind == "dataset":
        read_file(path)
    elif kind == "run file":
        print([getattr(record, "message", record) for record in read(path).records])
    elif kind == "stream":
        sse, piece = SSE(), path.read_bytes()
        while True:
            sse.feed(piece)
except (UserError, ValueError) as fault:
    print(fault)
"""


def sparse(path: Path, first: bytes = b"", last: bytes = b"") -> Path:
    """`first`, a line of 1 GB of NULs that takes no room on the disk, `last`."""
    with path.open("wb") as file:
        file.write(first)
        file.seek(1 << 30, 1)
        file.write(b"\n" + last)
    return path


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited by /proc here")
@pytest.mark.parametrize(
    ("kind", "first", "said"),
    [
        ("toml", b"", "over 1 MiB"),
        ("dataset", b"", "line 1: over 64 MiB"),
        ("dataset", b'{"prompt": "a"}\n', "line 2: over 64 MiB"),
        ("dataset", b"[", "a JSON array of over 768 MiB"),
        ("run file", b"", "is not a run file"),
        ("run file", RUNS["vllm"][0] + b"\n", "could not be read and was skipped: 2."),
    ],
)
def test_a_line_of_1_gb_is_refused_in_bounded_memory(
    tmp_path: Path, kind: str, first: bytes, said: str
) -> None:
    end = _encoded(RunEnd(at_s=3.0, reason="completed")) + b"\n"
    out = bounded(kind, sparse(tmp_path / "sparse", first, end))
    assert said in out
    if said.startswith("could not"):
        assert "RunEnd" in out, "what follows the line is read"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited by /proc here")
@pytest.mark.parametrize("piece", [b"x" * 65536, b"data: a\n" * 8192, b"data: a\r\n" * 8192])
def test_an_event_of_1_gb_is_refused_in_bounded_memory(tmp_path: Path, piece: bytes) -> None:
    path = tmp_path / "piece"
    path.write_bytes(piece)
    assert "an event of more than 64 MiB" in bounded("stream", path)


def bounded(kind: str, path: Path) -> str:
    """What a reader says in a process that may take 450 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", GIGABYTE, kind, str(path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# ── nothing is executed, nothing escapes ─────────────────────────────────────────────────────────

NASTY = (
    "$(touch pwned)", "`touch pwned`", "; touch pwned", "&& touch pwned", "| touch pwned", "a b",
    '"', "'", "\\", "*", "~", "$HOME", "%s{}", "\n", "-rf", "\u202e", "../../x", "",
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(n for n, e in ENGINES.items() if e.command is not None))
def test_words_of_a_config_reach_argv_unchanged(name: str) -> None:
    command = ENGINES[name].command
    assert command is not None
    model = {"simulated": "simulated-8b"}.get(name, NASTY[0])
    fields: dict[str, Any] = {"name": NASTY[1]} if name != "simulated" else {}
    config = ServerConfig(engine=name, model=model, executable=("exe", *NASTY), extra_args=NASTY,
                          max_running=8, **fields)  # fmt: skip
    argv = command(config, 1)
    assert argv[: len(NASTY) + 1] == ["exe", *NASTY]
    assert argv[-len(NASTY) :] == list(NASTY)
    assert {model, *fields.values()} <= set(argv) or name == "simulated"


async def test_a_server_gets_its_words_unchanged_and_no_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    say = f"import json, sys; open({str(tmp_path / 'argv')!r}, 'w').write(json.dumps(sys.argv[1:]))"
    engine = Engine(
        name="echo",
        wires={},
        command=lambda config, port: [sys.executable, "-c", say, *config.extra_args],
    )
    with pytest.raises(ServerError):
        async with launched(engine, ServerConfig(engine="echo", model="m", extra_args=NASTY)):
            pass
    assert json.loads((tmp_path / "argv").read_text()) == list(NASTY)
    assert [path.name for path in tmp_path.iterdir()] == ["argv"]


@pytest.mark.parametrize(
    "fields", [{"extra_args": ("a\0b",)}, {"env": {"A=": "b"}}, {"extra_args": ("x" * (1 << 20),)}]
)
async def test_words_that_no_process_takes_are_refused(fields: dict[str, Any]) -> None:
    engine = Engine(name="e", wires={}, command=lambda config, port: ["true", *config.extra_args])
    with pytest.raises(UserError, match="cannot start 'true'"):
        async with launched(engine, ServerConfig(engine="e", model="m", **fields)):
            pass


def test_code_that_a_model_ships_is_not_run(tmp_path: Path) -> None:
    """A folder whose tokenizer is a class of its own: Hugging Face's `auto_map`."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\nclass T: ...\n")
    mapped = {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(mapped))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil"} | mapped))
    with pytest.raises(UserError, match="no tokenizer at"):
        LocalTokenizer(str(tmp_path)).plain("a")
    assert not (tmp_path / "pwned").exists()


@FUZZ
@given(name=st.one_of(st.sampled_from((*NASTY, "..", "/etc/x", "x" * 500)), st.text(min_size=1)),
       cell=st.one_of(st.none(), st.sampled_from(NASTY), st.text()))  # fmt: skip
def test_no_name_leaves_the_folder_of_run_files(name: str, cell: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "runs")
        path = run_path(out, "2026-11-24T12:00:00Z", name, cell)
        Store(path, run_info()).close()
        assert path.resolve().parent == out.resolve()
        assert [p.name for p in Path(folder).iterdir()] == ["runs"]
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,200}\.jsonl", path.name)


@FUZZ
@given(text=st.lists(st.sampled_from(("data: a", "data:b", "data", ": c", "event: e", "\n", "\r",
                                      "\r\n", "\n\n", "z")), max_size=16),
       cuts=st.lists(st.integers(0, 100), max_size=8))  # fmt: skip
def test_events_are_those_of_the_standard_read_a_line_at_a_time(
    text: list[str], cuts: list[int]
) -> None:
    data = "".join(text).encode()
    expected: list[bytes] = []
    held: list[bytes] = []
    for line in [*data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"), b""]:
        if not line and held:
            expected.append(b"\n".join(held))
            held = []
        elif line.startswith(b"data:"):
            held.append(line[5:].removeprefix(b" "))
    sse = SSE()
    edges = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    found = [event for a, b in itertools.pairwise(edges) for event in sse.feed(data[a:b])]
    assert found + sse.close() == expected
