"""Each check: one phase that trips it, and one that does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import pytest

from loadgen.checks import CHECKS, check_phase
from loadgen.types import (
    Acceptance,
    Broke,
    Cancelled,
    ClientSample,
    OpenLoop,
    PhaseData,
    Refused,
    Snapshot,
    SpecCounters,
    TimedOut,
)
from tests.records import ENGINE_THAT_TELLS, phase_data, record

CLEAN = [
    record([1, 2, 2], [0.0, 0.1, 0.2, 0.3], dialogue=f"d{i}", finish_reason="stop")
    for i in range(4)
]


def sample(at_s: float, lag_s: float, cpu_s: float, in_flight: int = 1) -> ClientSample:
    return ClientSample(
        at_s=at_s, phase="c=1", in_flight=in_flight, target=1, sent=1, chunks=1, tokens=1,
        loop_lag_s=lag_s, cpu_s=cpu_s, rss_bytes=1,
    )  # fmt: skip


def edge(settled: bool, preempted: int = 0, at: Literal["start", "end"] = "end") -> Snapshot:
    page = {"preemptions": float(preempted)}
    return Snapshot(at_s=0.0, phase="c=1", edge=at, samples=page, settled=settled)


def tick(running: int, waiting: int) -> Snapshot:
    page = {"running": float(running), "waiting": float(waiting)}
    return Snapshot(at_s=0.0, phase="c=1", edge="tick", samples=page)


def told(*snapshots: Snapshot) -> PhaseData:
    return phase_data(CLEAN, snapshots=snapshots, engine=ENGINE_THAT_TELLS)


def figures(drafts: int, accepted: int) -> Acceptance:
    return Acceptance(source="s", state="on", drafts=drafts, accepted_tokens=accepted)


def changed(**changes: Any) -> PhaseData:
    return phase_data([msgspec.structs.replace(r, **changes) for r in CLEAN])


TRIPS: dict[str, PhaseData] = {
    "request-errors": phase_data(
        [
            *CLEAN,
            msgspec.structs.replace(CLEAN[0], outcome=Refused(status=429, message="slow down")),
            msgspec.structs.replace(CLEAN[0], outcome=Broke(reason="reset", message="gone")),
            msgspec.structs.replace(CLEAN[0], outcome=TimedOut(after_s=600)),
        ]
    ),
    "client-late": phase_data(CLEAN, client=tuple(sample(i, 0.05, 0.1 * i) for i in range(5))),
    "client-saturated": phase_data(CLEAN, client=tuple(sample(i, 0, 0.9 * i) for i in range(5))),
    "foreign-traffic": phase_data(CLEAN, counters=SpecCounters(generated_tokens=21)),
    "sources-disagree": phase_data(CLEAN, acceptance=(figures(8, 8), figures(9, 10))),
    "server-queued": told(tick(8, 3), tick(8, 3)),
    "server-preempted": told(edge(True, 2, "start"), edge(True, 5)),
    "server-not-idle": phase_data(CLEAN, snapshots=(edge(False),)),
    "counters-went-back": phase_data(CLEAN, counters_missing="the counter went back from 9 to 1"),
    "counters-not-usable": phase_data(
        CLEAN, counters_missing="the label engine changed", snapshots=(edge(True),)
    ),
    "asked-to-wait": phase_data(
        [
            *CLEAN,
            msgspec.structs.replace(
                CLEAN[0], outcome=Refused(status=429, message="x", retry_after_s=3.0)
            ),
        ]
    ),
    "outputs-over-limit": changed(max_output_tokens=4),
    "outputs-cut-short": changed(max_output_tokens=6, finish_reason="length"),
    "prefix-cache": changed(cached_tokens=16, isl_tokens=32),
    "chunks-not-steps": phase_data([record([1, 9], [0, 1, 2], finish_reason="stop")] * 4),
    "token-counts-disagree": changed(usage_tokens=7),
    "outputs-capped": changed(finish_reason="length"),
    "too-few-dialogues": phase_data(CLEAN, concurrency=8),
    "load-not-reached": phase_data(CLEAN, concurrency=5),
}

QUIET = phase_data(
    CLEAN,
    client=tuple(sample(i, 0.001, 0.1 * i) for i in range(5)),
    counters=SpecCounters(generated_tokens=20),
    snapshots=(edge(True),),
)


@pytest.mark.parametrize("code", TRIPS)
def test_what_is_wrong_is_said_with_its_advice(code: str) -> None:
    found = [c for c in check_phase(TRIPS[code]) if c.code == code]
    assert len(found) == 1
    assert found[0].phase == "c=1"
    assert found[0].message.endswith((".", "slow down", "gone"))
    assert found[0].advice


def opened(sent: Sequence[float], **shape: Any) -> PhaseData:
    """Four dialogues intended a second apart."""
    made = [
        record([1, 2, 2], [s, s + 0.1, s + 0.2], dialogue=f"d{i}", finish_reason="stop",
               intended_s=float(i))
        for i, s in enumerate(sent)
    ]  # fmt: skip
    data = phase_data(made)
    load = OpenLoop(request_rate_rps=1, **shape)
    return dataclasses.replace(data, phase=msgspec.structs.replace(data.phase, load=load))


def codes(data: PhaseData) -> list[str]:
    return [c.code for c in check_phase(data)]


def test_arrivals_that_had_to_wait_are_a_load_that_was_not_reached() -> None:
    assert codes(opened([0.0, 1.0, 2.01, 3.0])) == []
    assert codes(opened([0.5, 1.5, 2.5, 3.5])) == [], "late, but as many a second"
    held = opened([0.0, 2.0, 4.0, 6.0], max_in_flight=1)
    assert codes(held) == ["load-not-reached"]
    assert "3 s and took 6 s (at most 1 in flight)" in check_phase(held)[0].message


@pytest.mark.parametrize(("in_flight", "found"), [(4, ["load-not-reached"]), (5, [])])
def test_a_phase_without_an_end_is_judged_by_its_samples(in_flight: int, found: list[str]) -> None:
    data = phase_data(CLEAN * 5, concurrency=5, client=(sample(0, 0, 0, in_flight),) * 3)
    torn = msgspec.structs.replace(data.phase, steady_from_s=None, steady_to_s=None)
    seen = codes(dataclasses.replace(data, phase=torn))
    assert [c for c in seen if c == "load-not-reached"] == found


def test_a_clean_phase_has_no_caveat() -> None:
    assert check_phase(QUIET) == ()


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
def test_only_an_answer_that_is_short_for_length_was_cut_short(changes: dict[str, Any]) -> None:
    assert "outputs-cut-short" not in [c.code for c in check_phase(changed(**changes))]


def test_what_we_cancelled_is_not_the_servers_failure() -> None:
    data = phase_data([*CLEAN, msgspec.structs.replace(CLEAN[0], outcome=Cancelled())])
    assert "request-errors" not in [c.code for c in check_phase(data)]


def test_no_token_of_a_broken_window_is_called_foreign() -> None:
    broken = msgspec.structs.replace(CLEAN[0], outcome=Cancelled())
    data = phase_data([*CLEAN, broken], counters=SpecCounters(generated_tokens=999))
    assert "foreign-traffic" not in [c.code for c in check_phase(data)]


def test_errors_name_their_number_and_the_first_message() -> None:
    (caveat,) = [c for c in check_phase(TRIPS["request-errors"]) if c.code == "request-errors"]
    assert caveat.message.startswith("3 of 7 requests failed:")
    assert "slow down" in caveat.message


@pytest.mark.parametrize(
    ("generated", "why"),
    [
        (None, "so it cannot be said why"),
        (25, "generated 5 tokens for somebody else"),
        (15, "counters miss 5 tokens of this run"),
        (20, "counts drafts in two ways"),
    ],
)
def test_why_two_sources_differ_is_said(generated: int | None, why: str) -> None:
    counters = SpecCounters(generated_tokens=generated)
    data = phase_data(CLEAN, acceptance=(figures(8, 8), figures(9, 10)), counters=counters)
    (found,) = [c for c in check_phase(data) if c.code == "sources-disagree"]
    assert "differ by +1 of 8 drafts and +2 of 8 accepted tokens" in found.message
    assert why in found.message


def test_acceptance_lengths_that_differ_are_said_with_their_steps() -> None:
    same, other = (
        Acceptance(source="s", state="on", acceptance_length=n, steps_source=f"steps of {n}")
        for n in (2.0, 2.1)
    )
    (found,) = [
        c for c in check_phase(phase_data(CLEAN, acceptance=(same, other)))
        if c.code == "sources-disagree"
    ]  # fmt: skip
    assert "2.100 with steps of 2.1 as decode steps and 2.000 with steps of 2.0" in found.message
    assert not check_phase(phase_data(CLEAN, acceptance=(same, same)))


def test_every_check_yields_nothing_on_an_empty_phase() -> None:
    empty = phase_data([])
    assert [c.code for check in CHECKS for c in check(empty)] == ["too-few-dialogues"]
