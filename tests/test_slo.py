"""loadgen/slo.py: limits of a request and bounds on a load, by hand; where they are read."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadgen import slo
from loadgen.errors import UserError
from loadgen.summarize import summarize
from loadgen.types import (
    ClosedLoop,
    Load,
    OpenLoop,
    PhaseSummary,
    RequestFigures,
    Run,
    Scenario,
    TimedOut,
)
from scenarios import prompts
from tests.records import ENGINE, record, run_info

change = msgspec.structs.replace
MADE = [record([1, 2, 2], [0.0, 0.1 * n, 1.0, 2.0], dialogue=f"d{n}") for n in range(1, 5)]
"""TTFT 0.1 to 0.4 s."""


ONE: Load = ClosedLoop(concurrency=1)


def phase(*each: RequestFigures, load: Load = ONE) -> PhaseSummary:
    (made,) = summarize(Run(info=run_info(), records=MADE), ENGINE).phases
    return change(made, load=load, each=each, span_s=4.0)


def one(completed: bool = True, **values: float) -> RequestFigures:
    return RequestFigures(category="qa", completed=completed, values=values)


def bound(text: str) -> Any:
    bounds, limits = slo.read([text], "--slo")
    return (*bounds, *limits)[0]


def test_what_has_a_statistic_bounds_a_load_and_what_has_none_limits_a_request() -> None:
    bounds, limits = slo.read(["ttft_p95<=500ms", "ttft_s<=0.5", "tpot<=40ms"], "--slo")
    assert [b.text for b in bounds] == ["ttft_p95<=500ms"]
    assert [b.text for b in limits] == ["ttft_s<=0.5", "tpot<=40ms"]
    assert slo.read((), "--slo") == ((), ())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tftt_p95<=500ms", "did you mean 'ttft'?"),
        ("ttft_p95<=500ms@c=8", "at every load"),
        ("ttft_p95<=5%", "over no baseline"),
        ("chunk_gap<=20ms", "has many values a request"),
    ],
)
def test_what_is_no_slo_says_where_it_stands(text: str, said: str) -> None:
    with pytest.raises(UserError, match=r"^x\.toml, slo: ") as caught:
        slo.read([text], "x.toml, slo:")
    assert said in str(caught.value)


def test_goodput_counts_completed_requests_inside_every_limit() -> None:
    """Of five: two inside, one slow, one failed, one whose TPOT is not known."""
    _, limits = slo.read(["ttft_s<=0.5", "tpot_s<=0.04"], "--slo")
    good, slow = one(ttft_s=0.5, tpot_s=0.01), one(ttft_s=0.6, tpot_s=0.01)
    found = phase(good, good, slow, one(False), one(ttft_s=0.1))
    assert slo.goodput_rps(found, limits) == 2 / 4.0
    assert slo.goodput_rps(found, ()) is None, "without a limit there is no goodput"


def test_in_an_open_loop_the_wait_before_sending_counts() -> None:
    _, limits = slo.read(["ttft_s<=0.5"], "--slo")
    late = one(ttft_s=0.1, ttft_intended_s=0.9)
    opened = phase(late, one(ttft_s=0.1), load=OpenLoop(request_rate_rps=1))
    assert slo.goodput_rps(phase(late, one(ttft_s=0.1)), limits) == 2 / 4.0
    assert slo.goodput_rps(opened, limits) == 1 / 4.0
    assert slo.figure(bound("ttft_max<=1s"), [opened]) == 0.9


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("ttft_mean<=1s", 0.2),
        ("ttft_p50<=1s", 0.3),
        ("ttft_max<=1s", math.inf),
        ("ttft_p90<=1s", None),
        ("user_tokens_per_s_min>=1", 0.0),
        ("osl_tokens_min>=1", 0.0),
        ("chunk_gap_p50<=1s", 0.95),
    ],
)
def test_a_failed_request_never_came(text: str, value: float | None) -> None:
    """Three requests: three tell no 90th percentile, and none has a speed."""
    figures = [one(ttft_s=t, osl_tokens=9.0) for t in (0.1, 0.3)]
    found = slo.figure(bound(text), [phase(*figures, one(False))])
    assert found == (value if value is None else pytest.approx(value, abs=1e-6))


def test_a_run_reads_the_slo_of_its_scenario() -> None:
    """TTFT 0.1, 0.2, 0.3 and 0.4 s over 2 s; one more never came."""
    lost = change(MADE[0], outcome=TimedOut(after_s=9), dialogue_id="d9")
    scenario = Scenario(name="smoke", slo=("ttft_s<=0.25", "ttft_p50<=250ms", "ttft_max<=1s"))
    run = Run(info=run_info(scenario=scenario), records=[*MADE, lost])
    found = summarize(run, ENGINE)
    assert found.phases[0].goodput_rps == 2 / 2.0
    said = [c.message for c in found.caveats if c.code == "slo-crossed"]
    assert said == [
        "ttft_p50 is 0.3 s; the scenario's slo asks for ttft_p50<=250ms.",
        "ttft_max was lost with a request; the scenario's slo asks for ttft_max<=1s.",
    ]
    plain = summarize(dataclasses.replace(run, info=run_info()), ENGINE)
    assert plain.phases[0].goodput_rps is None
    assert "slo-crossed" not in [c.code for c in plain.caveats]


def test_a_scenario_is_refused_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text('name = "s"\nslo = ["ttft_p95<=500ms", "ttft_s<=0.5"]\n')
    assert prompts.scenario(str(path)).slo == ("ttft_p95<=500ms", "ttft_s<=0.5")
    path.write_text('name = "s"\nslo = ["ttft_p95<=500"]\n')
    with pytest.raises(UserError, match=r"s\.toml, slo: 'ttft_p95<=500': 500 of what\?"):
        prompts.scenario(str(path))
