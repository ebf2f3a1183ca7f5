"""Each check: one phase that trips it, and one that does not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from loadgen.checks import CHECKS, check_phase
from loadgen.types import (
    Broke,
    Cancelled,
    ClientSample,
    PhaseData,
    Refused,
    Snapshot,
    SpecCounters,
    TimedOut,
)
from tests.records import phase_data, record

CLEAN = [
    record([1, 2, 2], [0.0, 0.1, 0.2, 0.3], dialogue=f"d{i}", finish_reason="stop")
    for i in range(4)
]


def sample(at_s: float, lag_s: float, cpu_s: float) -> ClientSample:
    return ClientSample(
        at_s=at_s, phase="c=1", in_flight=1, target=1, sent=1, chunks=1, tokens=1,
        loop_lag_s=lag_s, cpu_s=cpu_s, rss_bytes=1,
    )  # fmt: skip


def edge(settled: bool) -> Snapshot:
    return Snapshot(at_s=0.0, phase="c=1", edge="end", samples={}, settled=settled)


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
}

QUIET = phase_data(
    CLEAN,
    client=tuple(sample(i, 0.001, 0.1 * i) for i in range(5)),
    counters=SpecCounters(generated_tokens=20),
    snapshots=(edge(True),),
)


@pytest.mark.parametrize("code", TRIPS)
def test_what_is_wrong_is_said_with_its_advice(code: str) -> None:
    caveats = check_phase(TRIPS[code])
    found = [c for c in caveats if c.code == code]
    assert len(found) == 1
    assert found[0].phase == "c=1"
    assert found[0].message.endswith((".", "slow down", "gone"))
    assert found[0].advice


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


def test_every_check_yields_nothing_on_an_empty_phase() -> None:
    empty = phase_data([])
    assert [c.code for check in CHECKS for c in check(empty)] == ["too-few-dialogues"]
