"""Plans: counts, order, warm-up apart from what is measured, drafters that remember."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.errors import UserError
from loadgen.plan import by_category, in_order, make_plan
from loadgen.types import ClosedLoop, OpenLoop, Phase, Scenario, Stop
from tests.records import prompts


def scenario(*loads: int, requests: int | None = None, duration_s: float | None = None,
             warmup: int = 0, repeats: int = 1) -> Scenario:  # fmt: skip
    return Scenario(
        name="t",
        loads=tuple(ClosedLoop(concurrency=c) for c in loads),
        stop=Stop(requests=requests, duration_s=duration_s),
        warmup_requests=warmup,
        repeats=repeats,
    )


def dialogues(phase: Phase) -> list[str]:
    return [d.dialogue_id for d in itertools.islice(phase.dialogues, 10_000)]


@pytest.mark.parametrize(
    ("count", "load", "requests", "expected"), [(10, 1, None, 10), (10, 8, None, 32), (10, 8, 5, 5)]
)
def test_default_requests(count: int, load: int, requests: int | None, expected: int) -> None:
    (phase,) = make_plan(scenario(load, requests=requests), prompts(count)).phases
    assert len(dialogues(phase)) == expected


def test_loads_are_reversed_on_odd_repeats() -> None:
    plan = make_plan(scenario(1, 8, repeats=2), prompts(4))
    assert [p.name for p in plan.phases] == ["c=1 r=1", "c=8 r=1", "c=8 r=2", "c=1 r=2"]


def test_every_phase_asks_the_same_in_the_same_order() -> None:
    plan = make_plan(scenario(1, 2), prompts(20))
    assert dialogues(plan.phases[0]) == dialogues(plan.phases[1])
    assert dialogues(plan.phases[0]) != [p.prompt_id for p in prompts(20)], "categories are mixed"


def test_warm_up_is_never_a_measured_prompt() -> None:
    asked = prompts(6)
    plan = make_plan(scenario(4, warmup=2), asked)
    warm, measured = plan.phases
    assert (warm.measured, measured.measured) == (False, True)
    sent = [d.prompt.prompt_token_ids for d in warm.dialogues]
    assert len(sent) == 4, "at least one request a stream"
    assert all(ids is not None and list(ids) not in [list(p.prompt_token_ids or ()) for p in asked]
               for ids in sent)  # fmt: skip


@given(st.integers(1, 20), st.integers(0, 5))
def test_a_cycle_holds_every_prompt_once(count: int, seed: int) -> None:
    asked = prompts(count)
    two = list(itertools.islice(in_order(asked, seed), 2 * count))
    assert {d.prompt.prompt_id for d in two[:count]} == {p.prompt_id for p in asked}
    assert len({d.dialogue_id for d in two}) == 2 * count
    assert [d.repeat for d in two] == [0] * count + [1] * count


def test_duration_has_no_end_of_its_own() -> None:
    (phase,) = make_plan(scenario(2, duration_s=5.0), prompts(3)).phases
    assert len(dialogues(phase)) == 10_000
    assert phase.duration_s == 5.0


def test_a_drafter_that_remembers_never_sees_a_prompt_twice() -> None:
    with pytest.raises(UserError, match="learns from earlier requests"):
        make_plan(scenario(8), prompts(10), remembers=True)
    (phase,) = make_plan(scenario(8, duration_s=5.0), prompts(10), remembers=True).phases
    assert len(dialogues(phase)) == 10


@pytest.mark.parametrize("duration_s", [None, 6.0])
def test_categories_apart_send_the_same_dialogues_in_the_same_order(
    duration_s: float | None,
) -> None:
    mixed = [
        msgspec.structs.replace(p, category=c) for p, c in zip(prompts(12), "abc" * 4, strict=True)
    ]
    plan = make_plan(scenario(2, duration_s=duration_s), mixed)
    apart = by_category(plan)
    (whole,) = [p for p in plan.phases if p.measured]
    parts = [p for p in apart.phases if p.measured]
    assert [(p.name, p.category) for p in parts] == [(f"c=2 {c}", c) for c in "abc"]
    assert [p for p in apart.phases if not p.measured] == [p for p in plan.phases if not p.measured]
    for part in parts:
        sent = itertools.islice(part.dialogues, 4)
        assert {d.prompt.category for d in sent} == {part.category}
        assert part.duration_s == (None if duration_s is None else 2.0)
        if duration_s is None:
            assert dialogues(part) == [d for d in dialogues(whole) if d in dialogues(part)]
    if duration_s is None:
        assert sum(len(dialogues(p)) for p in parts) == len(dialogues(whole))


@pytest.mark.parametrize(("loads", "count"), [((1,), 0), ((0,), 5)])
def test_nothing_to_send_is_the_users_error(loads: tuple[int, ...], count: int) -> None:
    with pytest.raises(UserError):
        make_plan(scenario(*loads), prompts(count))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"repeats": 10**9}, "repeats"),
        ({"warmup_requests": 10**9}, "warmup_requests"),
        ({"stop": Stop(requests=10**12)}, "stop.requests"),
        ({"stop": Stop(requests=10**6), "repeats": 2}, "2,000,000 dialogues in all"),
        ({"stop": Stop(duration_s=float("nan"))}, "stop.duration_s"),
        ({"loads": ()}, "loads"),
        ({"loads": (ClosedLoop(concurrency=10**9),)}, "concurrency"),
    ],
)
def test_a_plan_that_memory_or_time_cannot_hold_is_refused(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        make_plan(msgspec.structs.replace(scenario(1), **changes), prompts(2))


# ── open loops ───────────────────────────────────────────────────────────────────────────────────


def opened(*rates: float, warmup: int = 0, repeats: int = 1, stop: Stop | None = None,
           **shape: Any) -> Scenario:  # fmt: skip
    return Scenario(
        name="t",
        loads=tuple(OpenLoop(request_rate_rps=rate, **shape) for rate in rates),
        stop=stop or Stop(),
        warmup_requests=warmup,
        repeats=repeats,
    )


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (Stop(), 10),
        (Stop(requests=7), 7),
        (Stop(duration_s=30), 120),
        (Stop(duration_s=30, ramp_s=10), 140),
        (Stop(duration_s=30, requests=50), 50),
        (Stop(duration_s=30, requests=500), 120),
        (Stop(duration_s=0.01), 1),
    ],
)
def test_an_open_loop_begins_rate_times_duration(stop: Stop, expected: int) -> None:
    (phase,) = make_plan(opened(4, stop=stop), prompts(10)).phases
    assert phase.name == "rate=4"
    assert len(dialogues(phase)) == len(phase.arrivals_s) == expected
    assert phase.duration_s is None, "its dialogues end it: none is left out"


def test_every_run_has_the_same_arrivals_and_every_repeat_its_own() -> None:
    scenario = opened(4, 0.5, repeats=2)
    plan, again = (make_plan(scenario, prompts(9)) for _ in range(2))
    assert [p.name for p in plan.phases] == ["rate=4 r=1", "rate=0.5 r=1", "rate=0.5 r=2",
                                             "rate=4 r=2"]  # fmt: skip
    assert [p.arrivals_s for p in plan.phases] == [p.arrivals_s for p in again.phases]
    assert len({p.arrivals_s for p in plan.phases}) == 4


@pytest.mark.parametrize(("most", "streams"), [(None, 4), (2, 2), (64, 4)])
def test_an_open_loop_is_warmed_by_a_few_streams(most: int | None, streams: int) -> None:
    warm, _ = make_plan(opened(4, warmup=6, max_in_flight=most), prompts(9)).phases
    assert (warm.name, warm.load) == ("warm-up rate=4", ClosedLoop(concurrency=streams))
    assert (len(dialogues(warm)), warm.arrivals_s, warm.ramp_s) == (6, (), 0.0)


def test_only_what_is_measured_has_a_ramp() -> None:
    stop = Stop(requests=20, ramp_s=5)
    loads = (ClosedLoop(concurrency=2), OpenLoop(request_rate_rps=1))
    plan = make_plan(Scenario(name="t", loads=loads, stop=stop, warmup_requests=1), prompts(4))
    assert [(p.measured, p.ramp_s) for p in plan.phases] == [(False, 0.0), (True, 5.0)] * 2
    assert not plan.phases[1].arrivals_s


@pytest.mark.parametrize(
    ("scenario", "said"),
    [
        (opened(4, stop=Stop(duration_s=1e9)), "4,000,000,000 dialogues in all"),
        (opened(4, arrivals="gama"), "did you mean 'gamma'"),
        (opened(4, burstiness=2.0), "only gamma arrivals"),
        (opened(4, 4.0), "two of its loads are rate=4"),
        (opened(float("nan")), "request_rate_rps"),
        (opened(4, max_in_flight=0), "max_in_flight"),
    ],
)
def test_open_loops_that_make_no_sense(scenario: Scenario, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_plan(scenario, prompts(4))


def test_a_drafter_that_remembers_needs_prompts_for_every_arrival() -> None:
    with pytest.raises(UserError, match="40 dialogues at rate=4/s"):
        make_plan(opened(4, stop=Stop(duration_s=10)), prompts(10), remembers=True)
