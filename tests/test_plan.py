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
from loadgen.types import ClosedLoop, Phase, Scenario, Stop
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
