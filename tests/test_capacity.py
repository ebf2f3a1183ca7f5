"""loadgen/capacity.py: borders, mixes, servers and money by hand; what is refused; laws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen import capacity as sizing
from loadgen.errors import UserError
from loadgen.stats import distribution
from loadgen.types import (
    Capacity,
    ClosedLoop,
    ConfigCapacity,
    OpenLoop,
    PhaseSummary,
    RequestCounts,
    RequestFigures,
    ServerConfig,
    ServerInfo,
    SpecConfig,
    Summary,
    Throughput,
)
from servers.simulated import BUILTIN, Batch, preset
from tests.played import as_sent, play
from tests.records import run_info

change = msgspec.structs.replace
LADDER = (1, 8, 32, 64, 128, 256)
SLO = ("ttft_p95<=500ms",)


def request(ttft: float, *, category: str = "rag", **values: float) -> RequestFigures:
    """One that completed: 100 tokens, TPOT 10 ms unless said otherwise."""
    known = {"osl_tokens": 100.0, "tpot_s": 0.01, "e2el_s": ttft + 1.0, "ttft_s": ttft} | values
    known["user_tokens_per_s"] = 1 / known["tpot_s"]
    return RequestFigures(category=category, completed=True, values=known)


FAILED = RequestFigures(category="rag", completed=False, values={})


def phase(c: int, each: Sequence[RequestFigures], **changes: Any) -> PhaseSummary:
    """A closed loop's phase in which c requests were always in flight."""
    done = [one for one in each if one.completed]
    span = sum(one.values["e2el_s"] for one in done) / c or 1.0
    made = PhaseSummary(
        name=f"c={c}",
        load=ClosedLoop(concurrency=c),
        repeat=0,
        measured=True,
        span_s=span,
        requests=RequestCounts(sent=len(each), completed=len(done)),
        distributions={"chunk_gap_s": distribution([0.01] * 100)},
        throughput=Throughput(whole=100.0 * len(done) / span),
        acceptance=(),
        categories=(),
        each=tuple(each),
    )
    return change(made, **changes)


def run(phases: Sequence[PhaseSummary], k: int = 0, *, run_id: str = "", **config: Any) -> Summary:
    spec = SpecConfig(method="eagle3", draft_depth=k) if k else None
    server = ServerInfo(
        engine="vllm",
        model="m",
        url="http://h",
        state="on" if k else "off",
        config=ServerConfig(engine="vllm", model="m", spec=spec, **config),
    )
    info = run_info(run_id=run_id or f"k{k}", server=server)
    return Summary(info=info, phases=tuple(phases), caveats=(), end="completed")


def ladder(border: float, k: int = 0, **more: Any) -> Summary:
    """TTFT is half a second at `border` users, and in proportion to them."""
    return run([phase(c, [request(0.5 * c / border)] * 40) for c in LADDER], k, **more)


def only(found: Capacity) -> ConfigCapacity:
    (config,) = found.configs
    return config


# ── the border ───────────────────────────────────────────────────────────────────────────────────


@given(st.floats(0.5, 600))
def test_a_border_lies_between_the_two_measured_loads_about_it(border: float) -> None:
    config = only(sizing.capacity([ladder(border)], SLO))
    below = [c for c in LADDER if 0.5 * c / border <= 0.5]
    above = [c for c in LADDER if 0.5 * c / border > 0.5]
    assert (config.holds and config.holds.load) == (f"c={below[-1]}" if below else None)
    assert (config.fails and config.fails.load) == (f"c={above[0]}" if above else None)
    expected = "below" if not below else "between" if above else "at least"
    assert config.border == expected


@cache
def played(method: str, c: int) -> PhaseSummary:
    """A load on the simulated 70b, in the simulator's own time."""
    settings = preset(method, model="70b", noise=0.0, max_running=512)
    rows = [msgspec.json.decode(row) for row in BUILTIN.read_bytes().splitlines()[:22]]
    prompts = [as_sent(rows[i % len(rows)]["turns"][0]) for i in range(max(40, 4 * c))]
    answers = play(Batch(settings), prompts, c, limit=48, apart_s=0.001).answers
    each = [
        request(
            a.first_at - a.asked_at,
            tpot_s=(a.last_at - a.first_at) / (a.sent - 1),
            e2el_s=a.last_at - a.asked_at,
        )
        for a in answers
        if a.sent > 1
    ]
    return phase(c, each)


@pytest.mark.parametrize("method", ["none", "eagle3"])
@pytest.mark.parametrize(
    ("slo", "metric", "rank", "sign"),
    [
        ("user_tokens_per_s_p50>=40", "user_tokens_per_s", 50, -1),
        ("ttft_p95<=300ms", "ttft_s", 95, 1),
    ],
)
def test_the_border_of_the_simulated_engine_lies_between_the_loads_named(
    method: str, slo: str, metric: str, rank: int, sign: int
) -> None:
    """The engine's own border is where the SLO stops to hold, by playing loads in between."""
    limit = {"ttft_s": 0.3, "user_tokens_per_s": 40.0}[metric]

    def inside(c: int) -> bool:
        values = [one.values[metric] for one in played(method, c).each]
        return sign * (float(np.percentile(values, rank)) - limit) <= 0

    low, high = 1, 512
    assert inside(low)
    assert not inside(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if inside(middle) else (low, middle)
    loads = (*LADDER, 512)
    config = only(sizing.capacity([run([played(method, c) for c in loads])], (slo,)))
    assert config.holds
    assert config.fails
    assert (config.border, config.holds.load) == (
        "between",
        f"c={max(c for c in loads if c <= low)}",
    )
    assert config.fails.load == f"c={min(c for c in loads if c >= high)}"


def test_the_order_of_runs_and_loads_tells_nothing() -> None:
    one = ladder(84)
    back = change(one, phases=one.phases[::-1])
    assert only(sizing.capacity([back], SLO)).loads == only(sizing.capacity([one], SLO)).loads


def test_repeats_are_pooled() -> None:
    """39 of 40 quick in one repeat, all slow in the other: p95 is slow."""
    quick = run([phase(8, [request(0.1)] * 40)], run_id="a")
    slow = run([phase(8, [request(0.9)] * 40)], run_id="b")
    config = only(sizing.capacity([quick, slow], SLO))
    assert config.runs == ("a", "b")
    assert [(load.load, load.requests) for load in config.loads] == [("c=8", 80)]
    assert config.border == "below"


def test_configs_are_told_apart_as_a_comparison_tells_them() -> None:
    """Another port is another start; another version, or more GPUs, another config."""
    a, b = ladder(84, port=1), ladder(84, port=2)
    b = change(b, info=change(b.info, run_id="b"))
    newer = change(a, info=change(a.info, run_id="new", server=change(a.info.server, version="2")))
    larger = change(a, info=change(a.info, run_id="gpus", server=change(a.info.server, gpus=2)))
    found = sizing.capacity([a, b, newer, larger], SLO)
    assert sorted(config.runs for config in found.configs) == [("gpus",), ("k0", "b"), ("new",)]


def test_every_bound_must_hold() -> None:
    slow = [request(0.1, tpot_s=0.05)] * 40
    summary = run([phase(8, [request(0.1)] * 40), phase(32, slow)])
    config = only(sizing.capacity([summary], (*SLO, "tpot_p95<=40ms", "user_tokens_per_s_p50>=30")))
    assert config.holds is not None
    assert config.fails is not None
    assert config.holds.figures == pytest.approx((0.1, 0.01, 100))
    assert config.fails.figures == pytest.approx((0.1, 0.05, 20))


def test_a_load_that_could_not_be_judged_may_still_hold() -> None:
    """5 requests tell no p95: c=1 is not known to be outside because c=8 is."""
    few = run([phase(1, [request(0.1)] * 5), phase(8, [request(2.0)] * 40)])
    config = only(sizing.capacity([few], SLO))
    assert (config.border, config.holds) == ("unknown", None)
    assert config.fails is not None
    assert config.fails.load == "c=8"


def test_a_border_that_comes_twice_is_told() -> None:
    ttfts = {8: 0.1, 32: 0.9, 64: 0.2}
    summary = run([phase(c, [request(t)] * 40) for c, t in ttfts.items()])
    found = sizing.capacity([summary], SLO)
    assert only(found).holds == only(found).loads[0]
    assert [c.code for c in found.caveats] == ["border-not-single"]
    assert "fail at c=32 and hold again at c=64" in found.caveats[0].message


def test_a_failed_request_never_got_its_token() -> None:
    """Three of 40 failed: they are the slowest 5 %."""
    summary = run([phase(8, [request(0.1)] * 40), phase(32, [*[request(0.1)] * 37, *[FAILED] * 3])])
    slo = ("ttft_p95<=500ms", "user_tokens_per_s_min>=1", "ttft_mean<=1s")
    config = only(sizing.capacity([summary], slo))
    assert config.fails is not None
    assert config.fails.figures == pytest.approx((math.inf, 0.0, 0.1))


def test_too_few_requests_for_a_percentile_are_no_verdict() -> None:
    some = run([phase(8, [request(0.1)] * 40), phase(32, [request(0.1)] * 19)])
    found = sizing.capacity([some], SLO)
    assert [load.inside for load in only(found).loads] == [True, None]
    assert only(found).border == "at least"
    assert "too few requests or no figure for ttft_p95<=500ms" in found.caveats[0].message
    with pytest.raises(UserError, match="no run tells whether ttft_p99<=500ms holds"):
        sizing.capacity([some], ("ttft_p99<=500ms",))


def test_a_figure_that_no_run_has_is_refused() -> None:
    bare = RequestFigures(category="rag", completed=True, values={"osl_tokens": 9, "e2el_s": 1})
    with pytest.raises(UserError, match="no figure for tpot_p95<=40ms"):
        sizing.capacity([run([phase(8, [bare] * 40)])], ("tpot_p95<=40ms",))


# ── servers, GPUs, money ─────────────────────────────────────────────────────────────────────────


def test_what_a_rate_takes_by_hand() -> None:
    """64 users, E2EL 1.25 s: 51.2 requests/s, 5,120 tokens/s; used to 80 %: 40.96 requests/s."""
    summary = run([phase(64, [request(0.25)] * 40)], tensor_parallel=4)
    config = only(sizing.capacity([summary], SLO, rps=100, gpu_price_per_h=2.5))
    assert config.holds is not None
    assert config.holds.requests_per_s == pytest.approx(51.2)
    assert config.holds.output_tokens_per_s == pytest.approx(5120)
    assert (config.gpus, config.servers, config.gpus_needed) == (4, 3, 12)
    assert config.users_per_gpu == 16
    assert config.requests_per_s_per_gpu == pytest.approx(12.8)
    assert config.cost_per_million == pytest.approx(2.5 * 4 / (5120 * 0.8 * 3600) * 1e6)
    full = only(sizing.capacity([summary], SLO, rps=51.2, headroom=0))
    assert full.servers == 1
    assert full.cost_per_million is None


def test_steady_rates_are_taken_where_every_phase_has_them() -> None:
    steady = phase(64, [request(0.25)] * 40, throughput=Throughput(whole=5120, steady=6144))
    config = only(sizing.capacity([run([steady])], SLO))
    assert config.holds is not None
    assert config.holds.requests_per_s == pytest.approx(51.2 * 1.2)
    assert config.holds.basis == "steady"


def test_configs_are_ranked_by_what_a_gpu_carries() -> None:
    """k = 3 carries more a server, k = 1 more a GPU; the last carries nothing."""
    runs = [ladder(100, 3, tensor_parallel=4), ladder(70, 1), ladder(0.1, 5)]
    found = sizing.capacity(runs, SLO)
    assert [c.runs for c in found.configs] == [("k1",), ("k3",), ("k5",)]
    assert [c.users_per_gpu for c in found.configs] == [64, 16, None]


def test_gpus_not_told_are_none_and_said() -> None:
    attached = ladder(84)
    server = change(attached.info.server, config=None, gpus=None)
    attached = change(attached, info=change(attached.info, server=server))
    found = sizing.capacity([attached, ladder(84, 3)], SLO, rps=50, gpu_price_per_h=2)
    bare = next(c for c in found.configs if c.gpus is None)
    assert (bare.gpus_needed, bare.cost_per_million) == (None, None)
    assert bare.servers is not None
    assert "gpus-unknown" in [c.code for c in found.caveats]


def test_goodput_counts_what_is_inside_every_limit() -> None:
    """Of 40, ten are slow to begin and four, one of them among the ten, slow to go on."""
    each = [
        request(0.4 if i < 10 else 0.1, tpot_s=0.05 if 9 <= i < 13 else 0.01) for i in range(40)
    ]
    config = only(sizing.capacity([run([phase(8, each)])], (*SLO, "ttft_s<=0.3", "tpot<=40ms")))
    assert config.holds is not None
    assert config.holds.requests_per_s is not None
    assert config.holds.goodput_rps == pytest.approx(config.holds.requests_per_s * 27 / 40)
    assert only(sizing.capacity([run([phase(8, each)])], SLO)).loads[0].goodput_rps is None


def opened(rate: float, late_s: float) -> PhaseSummary:
    """An open loop whose requests left late: 0.1 s to the first token from then."""
    one = request(0.1, ttft_intended_s=0.1 + late_s, e2el_intended_s=1.1 + late_s)
    load = OpenLoop(request_rate_rps=rate)
    return change(phase(8, [one] * 40), name=f"rate={rate:g}", load=load)


def test_an_open_loop_is_held_to_when_requests_should_have_left() -> None:
    """Both loads look alike from the instant of sending; at 8 a second they left a second late."""
    slo = (*SLO, "e2el_p50<=1.5s", "tpot_p95<=40ms", "ttft_s<=0.3")
    config = only(sizing.capacity([run([opened(2, 0.0), opened(8, 1.0)])], slo))
    assert config.border == "between"
    inside, outside = config.holds, config.fails
    assert inside is not None
    assert outside is not None
    assert (inside.load, outside.load) == ("rate=2", "rate=8")
    assert inside.figures == pytest.approx((0.1, 1.1, 0.01))
    assert outside.figures == pytest.approx((1.1, 2.1, 0.01))
    assert (inside.users, outside.users) == (None, None)
    assert inside.goodput_rps == pytest.approx(inside.requests_per_s)
    assert outside.goodput_rps == 0.0, "the limit of a request is from there too"


def test_closed_and_open_loops_of_one_server_are_ranked_apart() -> None:
    both = run([phase(8, [request(0.1)] * 40), opened(2, 0.0)])
    found = sizing.capacity([both], SLO)
    assert [[load.load for load in c.loads] for c in found.configs] == [["c=8"], ["rate=2"]]


# ── the mix ──────────────────────────────────────────────────────────────────────────────────────


def test_a_mix_by_hand() -> None:
    """Measured half and half: rag 2 s and 100 tokens, coding 1 s and 300. Wanted 80 to 20."""
    rag = [request(0.3, category="rag", e2el_s=2.0)] * 50
    coding = [request(0.1, category="coding", e2el_s=1.0, osl_tokens=300.0)] * 50
    found = sizing.capacity(
        [run([phase(30, rag + coding)])],
        ("ttft_mean<=1s", "ttft_p50<=1s"),
        mix={"rag": 0.8, "coding": 0.2},
    )
    (load,) = only(found).loads
    assert load.requests_per_s == pytest.approx(30 / 1.8)  # Little: users ÷ mean E2EL
    assert load.output_tokens_per_s == pytest.approx(30 / 1.8 * 140)
    assert load.figures == pytest.approx((0.26, 0.3))
    assert load.weight_of == pytest.approx(1 / (0.8**2 / 50 + 0.2**2 / 50))
    assert load.error == 0.0
    assert "mix-recombined" in [c.code for c in found.caveats]


def test_the_error_of_a_mix_is_that_of_its_categories() -> None:
    times = [1.0, 3.0] * 20
    each = [request(0.1, category="rag", e2el_s=t) for t in times]
    each += [request(0.1, category="coding", e2el_s=1.0)] * 40
    found = sizing.capacity([run([phase(8, each)])], SLO, mix={"rag": 0.5, "coding": 0.5})
    spread = sum((t - 2) ** 2 for t in times) / 39
    assert only(found).loads[0].error == pytest.approx(1.96 * 0.5 * (spread / 40) ** 0.5 / 1.5)


@given(st.lists(st.floats(0.01, 2.0), min_size=40, max_size=80), st.integers(1, 39))
def test_the_mix_that_was_measured_changes_nothing(ttfts: list[float], rag: int) -> None:
    each = [request(t, category="rag" if i < rag else "coding") for i, t in enumerate(ttfts)]
    mix = {"rag": rag / len(each), "coding": 1 - rag / len(each)}
    summary = [run([phase(8, each)])]
    slo = ("ttft_p95<=500ms", "ttft_mean<=1s", "ttft_max<=3s")
    plain, mixed = (only(sizing.capacity(summary, slo, mix=m)).loads[0] for m in (None, mix))
    assert mixed.figures == pytest.approx(plain.figures)
    assert mixed.requests_per_s == pytest.approx(plain.requests_per_s)
    assert mixed.output_tokens_per_s == pytest.approx(plain.output_tokens_per_s)
    assert mixed.weight_of == pytest.approx(len(each))


def test_a_cell_never_measured_is_left_out_and_told() -> None:
    both = [request(0.1), request(0.1, category="coding")] * 30
    summary = run([phase(8, both), phase(32, [request(0.1)] * 60)])
    found = sizing.capacity([summary], SLO, mix={"rag": 0.5, "coding": 0.5})
    assert [load.inside for load in only(found).loads] == [True, None]
    assert only(found).border == "at least"
    said = {c.code: c.message for c in found.caveats}
    assert "c=32 of k0 was left out: no completed request of coding" in said["load-not-judged"]


def test_parts_of_the_traffic_may_come_from_runs_of_their_own() -> None:
    rag = run([phase(8, [request(0.4)] * 40)], run_id="rag")
    coding = run([phase(8, [request(0.1, category="coding")] * 40)], run_id="coding")
    mix = {"rag": 0.02, "coding": 0.98}
    config = only(sizing.capacity([rag, coding], ("ttft_p95<=200ms",), mix=mix))
    assert config.border == "at least"
    assert config.loads[0].requests_per_s == pytest.approx(8 / (0.02 * 1.4 + 0.98 * 1.1))


def test_few_requests_of_a_category_are_told() -> None:
    each = [request(0.1)] * 60 + [request(0.1, category="coding")] * 5
    found = sizing.capacity([run([phase(8, each)])], SLO, mix={"rag": 0.9, "coding": 0.1})
    said = {c.code: c.message for c in found.caveats}
    assert said["mix-of-few"].endswith("5 of coding.")


# ── bad input ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("slo", "options", "said"),
    [
        (("tftt_p95<=500ms",), {}, "unknown metric 'tftt'; did you mean 'ttft'?"),
        (("ttft_s<=0.5",), {}, "no --slo bounds a load"),
        ((), {}, "no --slo bounds a load"),
        (("ttft_p95<=500ms@c=8",), {}, "an SLO holds at every load"),
        (("ttft_p95<=5%",), {}, "over no baseline"),
        (("chunk_gap<=20ms",), {}, "chunk_gap_s has many values a request"),
        (SLO, {"rps": 0.0}, "--rps 0 makes no sense"),
        (SLO, {"rps": math.nan}, "--rps nan makes no sense"),
        (SLO, {"gpu_price_per_h": -1.0}, "--gpu-price -1 makes no sense"),
        (SLO, {"headroom": 1.0}, "--headroom 1 makes no sense"),
        (SLO, {"mix": {"rag": 0.5}}, "the shares sum to 0.5. Expected 1"),
        (SLO, {"mix": {"rga": 1.0}}, "no run has a request of category 'rga'; did you mean 'rag'?"),
    ],
)
def test_refused(slo: Sequence[str], options: Mapping[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        sizing.capacity([ladder(84)], slo, **options)
    assert said in str(caught.value)


def test_a_mix_as_written() -> None:
    assert sizing.mix_of("rag=0.6, coding=.3,multilingual=1e-1") == {
        "rag": 0.6,
        "coding": 0.3,
        "multilingual": 0.1,
    }


@pytest.mark.parametrize(
    "text", ["", "rag", "rag=x", "rag=0", "rag=-1", "=1", "a=.5,a=.5", "a=nan"]
)
def test_what_is_no_mix(text: str) -> None:
    with pytest.raises(UserError, match="is no share"):
        sizing.mix_of(text)


def test_a_speed_bounded_at_its_best_is_told() -> None:
    found = sizing.capacity([ladder(84)], ("user_tokens_per_s_p95>=30",))
    assert "bounds the fastest users" in found.caveats[0].message


def test_unlike_runs_are_told() -> None:
    other = ladder(84, 3)
    other = change(other, info=change(other.info, prompts_sha256="f" * 64))
    found = sizing.capacity([ladder(84), other], SLO)
    assert "prompts: 000000000000 → ffffffffffff" in found.caveats[0].message
