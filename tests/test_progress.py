"""reports/progress.py: what a run under way has done, and lines that fit any terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from loadgen.plan import make_plan
from loadgen.types import (
    Broke,
    Cancelled,
    ClientSample,
    ClosedLoop,
    Completed,
    Outcome,
    PhaseRecord,
    Plan,
    Record,
    Refused,
    Scenario,
    Snapshot,
    SpecCounters,
    Stop,
    TimedOut,
)
from reports.progress import LEVELS, WINDOWS, Progress, Trail, failure, fitted
from tests.records import ENGINE, ENGINE_THAT_TELLS, SERVER, prompts, record, run_info

HOSTILE = "m\x1b]8;;http://evil\x07x\x1b]8;;\x07\x1b[31m\u202e\x9b2J\r\nend"


def plan(*loads: int, requests: int = 8, duration_s: float | None = None) -> Plan:
    """Closed loops over prompts of ids, no warm-up."""
    scenario = Scenario(
        name="t",
        loads=tuple(ClosedLoop(concurrency=c) for c in loads or (1,)),
        stop=Stop(requests=None if duration_s else requests, duration_s=duration_s),
        warmup_requests=0,
    )
    return make_plan(scenario, prompts(8))


def sample(at_s: float, tokens: int = 0, **changes: Any) -> ClientSample:
    """The client at `at_s`: one of one in flight, a core's tenth, 2 ms late."""
    made = ClientSample(
        at_s=at_s, phase="c=1", in_flight=1, target=1, sent=1, chunks=1, tokens=tokens,
        loop_lag_s=0.002, cpu_s=at_s / 10, rss_bytes=1,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def watched(records: Iterable[Record], of: Plan | None = None, **server: Any) -> Progress:
    """A run of the test engine that has given these records."""
    info = run_info(server=msgspec.structs.replace(SERVER, **server))
    found = Progress(of or plan(), "test, eagle3 k = 3", info, {"test": ENGINE_THAT_TELLS})
    for one in records:
        found.take(one)
    return found


def shown(found: Progress, width: int = 80, height: int = 24) -> str:
    return "\n".join(line.plain for line in found.lines(width, height))


ANSWERS = (
    record([1, 4, 4, 2], [0.0, 0.5, 0.6, 0.7, 0.8], dialogue="p0"),
    record([1, 2, 1, 1], [0.0, 0.5, 0.6, 0.7, 0.8], dialogue="p1", category="math"),
)


def test_acceptance_is_pooled_over_steps_by_category_and_says_what_counted_them() -> None:
    text = shown(watched([sample(0.5), *ANSWERS, sample(1.0, 16)]))
    assert "  AL      2.33" in text, "14 tokens after the prefills in 6 steps"
    assert "over 6 decode steps, from token-carrying chunks, unverified" in text
    assert "coding ~3.33   math   ~1.33" in text


def test_a_category_settles_with_its_steps() -> None:
    long = record([1] + [2] * 30, [i / 10 for i in range(32)])
    text = shown(watched([sample(0.5), long, ANSWERS[1], sample(1.0)]))
    assert "coding  2.00   math   ~1.33" in text


def test_steps_that_the_server_counted_come_first() -> None:
    told = [msgspec.structs.replace(r, spec=SpecCounters(steps=5)) for r in ANSWERS]
    text = shown(watched([sample(0.5), *told, sample(1.0)]))
    assert "  AL      1.40" in text
    assert "over 10 decode steps, from decode steps counted by the server" in text
    assert "unverified" not in text


def test_a_chunk_of_more_than_k_plus_one_tokens_is_no_step() -> None:
    merged = record([1, 9], [0.0, 0.5, 0.6])
    text = shown(watched([sample(0.5), merged, sample(1.0)]))
    assert "  AL      –             no request told its decode steps" in text


def test_without_speculation_there_is_no_acceptance() -> None:
    text = shown(watched([sample(0.5), *ANSWERS, sample(1.0)], state="off"))
    assert "AL" not in text
    assert "coding" not in text


def test_speed_is_of_the_last_two_seconds_and_the_sparkline_of_all() -> None:
    tokens = (0, 100, 200, 300, 400, 400, 400, 400, 400)
    samples = [sample(0.5 * n, tokens=t) for n, t in enumerate(tokens, 1)]
    assert f"  output  0 tok/s       {LEVELS[-1] * 4}{LEVELS[0] * 4}" in shown(watched(samples))
    assert f"  output  150 tok/s     {LEVELS[-1] * 4}{LEVELS[0]}" in shown(watched(samples[:6]))


def test_requests_are_counted_with_their_turns_and_time_is_left_by_tokens() -> None:
    text = shown(watched([sample(0.5), *ANSWERS, sample(10.5, 32)]))
    assert "2 of 8 requests  10 s  ETA 10 s" in text, "half of 8 × 8 tokens in ten seconds"


def test_a_phase_that_ends_by_time_is_done_by_time() -> None:
    of = plan(duration_s=20.0)
    text = shown(watched([sample(0.5), *ANSWERS, sample(15.5, 32)], of))
    assert "2 requests  15 s  ETA 5 s" in text
    assert text.count("█") - text.count("KV") >= 22, "three quarters of thirty cells"
    late = shown(watched([sample(0.5), *ANSWERS, sample(21.5, 32)], of))
    assert "21 s  its last requests end" in late


def test_a_turn_that_fails_takes_the_later_ones_off_what_is_left() -> None:
    of = plan(requests=4)
    asked = tuple(msgspec.structs.replace(p, later_turns=("a", "b")) for p in of.prompts)
    of = make_plan(of.scenario, asked)
    lost = record([1], [0.0, 0.1], dialogue="p0", outcome=Broke(reason="reset", message="gone"))
    assert "1 of 10 requests" in shown(watched([sample(0.5), lost], of)), "12 less two turns"


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (Refused(status=503, message="full"), "HTTP 503"),
        (Broke(reason="truncated", message=""), "truncated"),
        (TimedOut(after_s=1.0), "timed out"),
        (Cancelled(), "cancelled by us"),
    ],
)
def test_failures_by_kind(outcome: Outcome, said: str) -> None:
    assert failure(outcome) == said
    lost = record([1], [0.0, 0.1], outcome=outcome)
    found = watched([sample(0.5), lost, lost, sample(1.0)])
    assert f"  failed  2 {said}" in shown(found)
    assert f"failed: 2 {said}" in found.line(10.0)
    assert found.end().endswith(f"2 requests, failed: 2 {said}")


def test_the_servers_queue_and_the_client_itself() -> None:
    tick = Snapshot(
        at_s=0.7, phase="c=1", edge="tick",
        samples={"running": 7.0, "waiting": 2.0, "kv_cache_use": 0.123},
    )  # fmt: skip
    text = shown(watched([sample(0.5), tick, sample(1.0)]))
    assert "  server  7 running  2 waiting  KV cache 12.3 %" in text
    assert "  client  loop 2.00 ms late at most  CPU 10.0 % of a core" in text
    assert "server" not in shown(watched([sample(0.5), sample(1.0)]))


def test_loads_that_ended_stay_above_as_far_as_there_is_room() -> None:
    of = plan(1, 2, 4)
    ends = [
        PhaseRecord(
            name=f"c={c}", load=ClosedLoop(concurrency=c), repeat=0, measured=True,
            started_s=0.0, ended_s=2.0,
        )
        for c in (1, 2)
    ]  # fmt: skip
    first: list[Record] = [sample(0.5), *ANSWERS, sample(1.5, 16), ends[0]]
    second: list[Record] = [sample(2.5, 16, phase="c=2"), sample(3.5, 36, phase="c=2"), ends[1]]
    found = watched([*first, *second, sample(4.0, 36, phase="c=4")], of)
    assert shown(found).splitlines()[:3] == [
        "  c=1: 2 requests in 2.00 s, 16.0 tok/s, AL 2.33",
        "  c=2: 0 requests in 2.00 s, 20.0 tok/s",
        "test, eagle3 k = 3  c=4  phase 3 of 3",
    ]
    rows = len(found.lines(80, 24))
    assert "c=1:" not in shown(found, height=rows)
    assert "  c=2:" in shown(found, height=rows)
    assert found.end() == "test, eagle3 k = 3: 2 loads ended, 2 requests"


def test_a_plain_line_has_it_all() -> None:
    line = watched([sample(0.5), *ANSWERS, sample(10.5, 32)]).line(10.0)
    assert line == (
        "test, eagle3 k = 3  c=1: 2 of 8 requests, ETA 10 s, 1 of 1 in flight, 3.20 tok/s, "
        "AL 2.33 from token-carrying chunks, unverified, loop 2.00 ms late at most, CPU 10.0 % of "
        "a core"
    )


def test_a_simulated_server_says_so() -> None:
    assert shown(watched([sample(0.5)], simulated=True)).startswith("simulated, test, eagle3")


def hostile() -> Progress:
    """Terminal control in every text that comes from outside."""
    info = run_info()
    found = Progress(plan(), HOSTILE, info, {"test": ENGINE})
    refused = Refused(status=500, message=HOSTILE)
    for one in (
        sample(0.5),
        record([1, 2], [0.0, 0.5, 0.6], category=HOSTILE),
        ANSWERS[0],
        record([1], [0.0, 0.5], category=HOSTILE, outcome=refused),
        record([1], [0.0, 0.5], outcome=Broke(reason=HOSTILE, message=HOSTILE)),
        sample(1.0),
    ):
        found.take(one)
    return found


@pytest.mark.parametrize("width", [40, 80, 160])
def test_control_characters_are_spelled_out(width: int) -> None:
    found = hostile()
    for line in (*shown(found, width).split("\n"), found.line(10.0), found.end()):
        assert line.isprintable()
    assert "\\x1b]8;;http://evil\\x07" in shown(found, 200)


@given(st.integers(10, 200), st.integers(1, 40))
def test_no_line_is_wider_than_the_terminal_nor_more_than_fit(width: int, height: int) -> None:
    lines = hostile().lines(width, height)
    assert max(cell_len(line.plain) for line in lines) <= width
    assert len(lines) <= max(height - 1, 1)


def test_in_few_rows_failures_stay_and_categories_go() -> None:
    lost = record([1], [0.0, 0.1], outcome=Refused(status=503, message="full"))
    found = watched([sample(0.5), *ANSWERS, lost, sample(1.0, 16)])
    whole = shown(found).splitlines()
    assert len(whole) == 10
    assert "coding" not in shown(found, height=10)
    few = shown(found, height=7).splitlines()
    assert [line.split()[0] for line in few[2:]] == ["output", "AL", "failed", "full"]


def test_a_narrow_terminal_has_the_source_in_a_line_of_its_own() -> None:
    text = shown(watched([sample(0.5), *ANSWERS, sample(1.0, 16)]), 50)
    assert "over 6 decode steps\n          from token-carrying chunks, unverified\n" in text


def test_what_the_server_does_not_tell_is_left_out() -> None:
    tick = Snapshot(at_s=0.7, phase="c=1", edge="tick", samples={"running": 7.0})
    assert "  server  7 running\n" in shown(watched([sample(0.5), tick, sample(1.0)]))


def test_a_narrow_line_loses_what_matters_least() -> None:
    parts = [("bar", 1), ("counted", 0), ("elapsed", 3), ("", 2)]
    assert [fitted(parts, width) for width in (22, 21, 13, 2)] == [
        "bar  counted  elapsed",
        "bar  counted  elapsed",
        "bar  counted",
        "counted",
    ]
    assert fitted(parts, 20) == "bar  counted"


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=200))
def test_a_trail_keeps_all_that_it_was_given_in_few_cells(ticks: list[tuple[int, int]]) -> None:
    trail = Trail()
    for amount, of in ticks:
        trail.add(amount, of)
    assert len(trail.windows) <= WINDOWS
    assert len(trail.windows) >= min(len(ticks), WINDOWS // 2)
    assert [sum(column) for column in zip(*trail.windows, strict=True)] == [
        sum(column) for column in zip(*ticks, strict=True)
    ]


def test_a_trail_is_drawn_between_its_bounds_with_its_gaps() -> None:
    trail = Trail(windows=[(1.0, 1.0), (0.0, 0.0), (5.0, 2.0), (9.0, 1.0)])
    assert trail.drawn(1.0, 4.0) == f"{LEVELS[0]} {LEVELS[4]}{LEVELS[-1]}"
    assert Trail().drawn(0.0) == ""


def test_completed_requests_are_no_failures() -> None:
    assert failure(Completed()) == ""
    assert "failed" not in shown(watched([sample(0.5), *ANSWERS]))


def test_an_engine_without_a_load_has_no_row() -> None:
    bare = replace(ENGINE, chunk_is_step=False)
    found = Progress(plan(), "x", run_info(), {"test": bare})
    for one in (sample(0.5), *ANSWERS, Snapshot(at_s=1.0, phase="c=1", edge="tick", samples={})):
        found.take(one)
    assert "server" not in shown(found)
    assert "no request told its decode steps" in shown(found)
