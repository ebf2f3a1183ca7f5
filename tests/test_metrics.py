"""Figures by hand: golden G2's timing with ddof 1, and throughput, windows, concurrency."""

from __future__ import annotations

from typing import Literal

import msgspec
import pytest

from loadgen.metrics import (
    METRICS,
    achieved_concurrency,
    counts,
    distributions,
    server_context,
    span_s,
    throughput,
    tpot_s,
)
from loadgen.types import (
    Broke,
    Cancelled,
    Distribution,
    PhaseRecord,
    RequestRecord,
    ServerContext,
    Snapshot,
)
from tests.records import ENGINE_THAT_TELLS, G2, phase_data, record


def test_g2_timing() -> None:
    found = distributions(G2)
    ttft, e2el = found["ttft_s"], found["e2el_s"]
    assert (ttft.mean, ttft.min, ttft.max) == pytest.approx((0.4875, 0.2, 1.0))
    assert ttft.p50 == pytest.approx(0.375)
    assert e2el.mean == pytest.approx(1.0375)
    assert (e2el.min, e2el.max, e2el.p50) == pytest.approx((0.75, 1.4, 1.0))
    # The published std are of the population (.2724, .3170); ours has ddof 1.
    assert e2el.std == pytest.approx(0.2724 * (4 / 3) ** 0.5, abs=1e-4)
    assert ttft.std == pytest.approx(0.3170 * (4 / 3) ** 0.5, abs=1e-4)
    assert [tpot_s(r) for r in G2] == pytest.approx([0.03, 0.125, 0.4 / 15, 1 / 6])
    gaps = found["chunk_gap_s"]
    assert gaps.n == 14
    assert gaps.mean == pytest.approx(0.157142857)
    speed = found["user_tokens_per_s"]
    assert (speed.min, speed.max, speed.mean) == pytest.approx((6, 37.5, 21.2083), abs=1e-4)
    assert found["osl_tokens"].mean == 9.75


def test_g2_whole_throughput() -> None:
    data = phase_data(G2)
    assert span_s(G2) == pytest.approx(3.2)
    assert throughput(data).whole == pytest.approx(12.1875)


@pytest.mark.parametrize(("chunks", "times"), [([5], [0.0, 2.0]), ([], [0.0]), ([3], [1.0, 1.5])])
def test_below_two_chunks_there_is_no_tpot(chunks: list[int], times: list[float]) -> None:
    found = distributions([record(chunks, times)])
    assert found["tpot_s"] == Distribution(n=0)
    assert found["user_tokens_per_s"].n == 0


def test_unknown_chunk_tokens_give_no_chunk_figures() -> None:
    blind = msgspec.structs.replace(G2[0], chunk_tokens=None, token_count_source="final_usage")
    found = distributions([blind])
    assert found["tpot_s"].n == 0
    assert found["ttft_s"].n == 1
    assert throughput(phase_data([blind])).steady is None
    assert "not known" in throughput(phase_data([blind])).why_not_steady


def steady(records: list[RequestRecord], start: float, end: float) -> float | None:
    phase = PhaseRecord(
        name="c=1", load=phase_data(records).phase.load, repeat=0, measured=True,
        started_s=0.0, ended_s=100.0, steady_from_s=start, steady_to_s=end,
    )  # fmt: skip
    return throughput(phase_data(records, phase=phase)).steady


def test_steady_counts_what_is_stamped_inside() -> None:
    # One token every second from 1 to 20, in four requests of five seconds.
    made = [record([1] * 5, [5.0 * i + s for s in range(6)], dialogue=f"d{i}") for i in range(4)]
    assert steady(made, 0.0, 20.0) == pytest.approx(20 / 20), "borders belong to the window"
    assert steady(made, 5.0, 15.5) == pytest.approx(11 / 10.5)
    assert steady(made, 5.0, 14.0) is None, "shorter than two median E2EL"


def test_concurrency_is_weighted_by_time() -> None:
    made = [record([1], [float(i), i + 2.0], dialogue=f"d{i}") for i in range(10)]
    assert achieved_concurrency(phase_data(made)) == 2.0
    assert achieved_concurrency(phase_data([record([1], [0.0, 1.0])])) == 1.0


def shot(edge: Literal["start", "end", "tick"], **samples: float) -> Snapshot:
    return Snapshot(at_s=samples.pop("at_s", 0.5), phase="c=1", edge=edge, samples=samples)


def context(*snapshots: Snapshot) -> ServerContext | None:
    return server_context(phase_data([], snapshots=snapshots, engine=ENGINE_THAT_TELLS))


def test_the_servers_account_is_of_the_phase_alone() -> None:
    """Gauges by their readings inside the phase, counters by their growth over it."""
    borders = {"running": 0, "waiting": 0, "kv_cache_use": 0}
    found = context(
        shot("start", prefix_asked_tokens=100, queue_time_s=1.0, queued=10, **borders),
        shot("tick", at_s=-1, running=99, waiting=99, kv_cache_use=1.0),
        shot("tick", running=8, waiting=0, kv_cache_use=0.0),
        shot("tick", running=8, waiting=1, kv_cache_use=0.1),
        shot("tick", running=6, waiting=4, kv_cache_use=0.4),
        shot("end", prefix_hit_tokens=50, prefix_asked_tokens=300, preemptions=2,
             queue_time_s=4.0, queued=16, **borders),
    )  # fmt: skip
    assert found == ServerContext(
        in_flight_p50=9,
        running_p50=8,
        waiting_p50=1,
        waiting_max=4,
        kv_cache_use_max=0.4,
        prefix_hit_share=0.25,
        preemptions=2,
        queue_time_s=0.5,
    )


def test_a_server_that_tells_nothing_of_the_phase_has_no_account() -> None:
    assert context() is None
    assert context(shot("start"), shot("end")) is None
    assert context(shot("end", preemptions=2)) is None, "its beginning is not known"
    assert context(shot("start", preemptions=9), shot("end", preemptions=2)) is None, "restarted"


def test_what_is_not_steady_is_a_share_of_the_phase() -> None:
    made = [record([1] * 5, [5.0 * i + s for s in range(6)], dialogue=f"d{i}") for i in range(4)]
    phase = PhaseRecord(
        name="c=1", load=phase_data(made).phase.load, repeat=0, measured=True,
        started_s=0.0, ended_s=100.0, steady_from_s=2.0, steady_to_s=15.0,
    )  # fmt: skip
    found = throughput(phase_data(made, phase=phase))
    assert (found.ramp_share, found.drain_share) == pytest.approx((0.1, 0.25))
    never = msgspec.structs.replace(phase, steady_from_s=None)
    found = throughput(phase_data(made, phase=never))
    assert (found.ramp_share, found.drain_share) == (None, None)


def test_an_open_loop_is_timed_from_when_the_request_should_have_left() -> None:
    late = record([1, 2], [10.0, 10.5, 12.0], intended_s=7.0)
    found = distributions([late, G2[0]])
    means = {n: found[n].mean for n in ("send_delay_s", "ttft_intended_s", "e2el_intended_s")}
    assert means == {"send_delay_s": 3.0, "ttft_intended_s": 3.5, "e2el_intended_s": 5.0}
    assert found["send_delay_s"].n == 1, "a closed loop intends nothing"
    assert found["ttft_s"].n == 2


def test_every_request_is_counted_once() -> None:
    made = [
        *G2,
        msgspec.structs.replace(G2[0], outcome=Broke(reason="reset", message="x"), resent=1),
        msgspec.structs.replace(G2[0], outcome=Cancelled()),
    ]
    found = counts(made)
    assert found.sent == 6
    assert found.sent == (
        found.completed + found.refused + found.broke + found.timed_out + found.cancelled
    )
    assert (found.completed, found.broke, found.cancelled, found.resent) == (4, 1, 1, 1)


def test_percentiles_need_their_samples() -> None:
    few = distributions(list(G2))["ttft_s"]
    assert (few.p90, few.p95, few.p99) == (None, None, None)
    many = [record([1, 1], [0.0, 0.1 + i / 1000, 1.0], dialogue=str(i)) for i in range(100)]
    assert distributions(many)["ttft_s"].p99 == pytest.approx(0.1 + 0.09801, abs=1e-6)


def test_the_table_names_each_figure_once() -> None:
    names = [m.name for m in METRICS]
    assert len(names) == len(set(names))
