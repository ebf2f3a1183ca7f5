"""Which run belongs to which side, runs joined, and repeats as one phase."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from loadgen.errors import UserError
from loadgen.sides import as_one, joined, sides, swept, took_turns
from loadgen.types import (
    Acceptance,
    CategorySummary,
    Caveat,
    ClosedLoop,
    Distribution,
    Interval,
    PhaseSummary,
    RequestCounts,
    RunInfo,
    Scenario,
    ServerConfig,
    SpecConfig,
    Summary,
    Throughput,
)
from tests.records import SERVER, run_info

change = msgspec.structs.replace


def info(method: str | None, run_id: str, minute: int = 0, **server: Any) -> RunInfo:
    """A launched server; every launch takes another port."""
    spec = None if method is None else SpecConfig(method=method, draft_depth=3)
    config = ServerConfig(engine="test", model="m", spec=spec, port=8000 + minute)
    at = change(SERVER, state="on" if method else "off", config=config, url=f"http://h:{minute}")
    return run_info(
        run_id=run_id, started_at=f"2026-11-24T12:{minute:02}:00Z", server=change(at, **server)
    )


def phase(concurrency: int = 8, repeat: int = 0, **changes: Any) -> PhaseSummary:
    made = PhaseSummary(
        name=f"c={concurrency}",
        load=ClosedLoop(concurrency=concurrency),
        repeat=repeat,
        measured=True,
        span_s=10.0,
        requests=RequestCounts(sent=9, completed=8, broke=1),
        distributions={},
        throughput=Throughput(whole=100.0, steady=120.0),
        acceptance=(),
        categories=(),
        started_s=5.0,
    )
    return change(made, **changes)


def run(of: RunInfo, *phases: PhaseSummary, **changes: Any) -> Summary:
    made = Summary(info=of, phases=phases or (phase(),), caveats=(), end="completed")
    return change(made, **changes)


def ids(found: list[tuple[list[Summary], list[Summary]]]) -> list[tuple[str, str]]:
    def said(side: list[Summary]) -> str:
        return " ".join(run.info.run_id for run in side)

    return [(said(base), said(spec)) for base, spec in found]


def test_runs_of_one_config_are_one_side_whatever_their_port() -> None:
    b1, b2 = run(info(None, "b1", 0)), run(info(None, "b2", 3))
    e1, e2 = run(info("eagle3", "e1", 1)), run(info("eagle3", "e2", 4))
    n1 = run(info("ngram", "n1", 2))
    assert ids(sides([b1], [e1, n1, b2, e2])) == [("b1 b2", "e1 e2"), ("b1 b2", "n1")]


def test_where_all_are_of_one_config_the_first_is_the_base() -> None:
    first, *rest = (run(info("eagle3", f"e{n}", n)) for n in range(3))
    assert ids(sides([first], rest)) == [("e0", "e1 e2")]
    assert ids(sides([first], [first])) == [("e0", "e0")]


def test_what_a_launched_server_reports_only_later_makes_no_other_side() -> None:
    """llama.cpp tells its method once it has served a request: unknown in a sweep's first cell."""
    first, later = info("ngram", "a", spec_reported=None), info("ngram", "b", 1)
    assert ids(sides([run(info(None, "base"))], [run(first), run(later)])) == [("base", "a b")]


def test_another_version_is_another_side() -> None:
    old, new = run(info("eagle3", "old")), run(info("eagle3", "new", version="2"))
    again = run(info("eagle3", "again", 5))
    assert ids(sides([old], [new, again])) == [("old again", "new")]


def test_more_gpus_are_another_side() -> None:
    one, two = run(info("eagle3", "one", gpus=1)), run(info("eagle3", "two", gpus=2))
    assert ids(sides([one], [two, run(info("eagle3", "again", 5, gpus=1))])) == [
        ("one again", "two")
    ]


def test_attached_servers_are_told_apart_by_their_url() -> None:
    a = run(run_info(run_id="a", server=change(SERVER, url="http://a")))
    b = run(run_info(run_id="b", server=change(SERVER, url="http://b")))
    c = run(run_info(run_id="c", server=change(SERVER, url="http://a")))
    assert ids(sides([a], [b, c])) == [("a c", "b")]


def test_of_a_sweep_the_base_is_what_does_not_speculate() -> None:
    cells = [run(info(m, f"{m}{n}", n)) for n in range(2) for m in ("ngram", None, "eagle3")]
    other = change(info("ngram", "x"), scenario=Scenario(name="other"))
    found = ids(swept([*cells, run(other)]))
    assert found == [("None0 None1", "ngram0 ngram1"), ("None0 None1", "eagle30 eagle31")]


def test_of_a_cell_measured_twice_the_newest_counts() -> None:
    def cell(method: str | None, run_id: str, minute: int) -> Summary:
        return run(
            change(info(method, run_id, minute), cell=f"{method} smoke c=8 r=1", cell_sha256="x")
        )

    cells = [cell("ngram", "new", 5), cell(None, "base", 1), cell("ngram", "old", 2)]
    assert ids(swept(cells)) == [("base", "new")]
    runs = [
        run(
            change(
                r.info, cell="ngram" if r.info.server.state == "on" else "none", cell_sha256=None
            )
        )
        for r in cells
    ]
    assert ids(swept(runs)) == [("base", "old new")], "runs of one server by hand are repeats"


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        (["ngram", "eagle3"], r"no baseline .* among ngram \(on\), eagle3 \(on\)"),
        ([None], "no baseline and a config to compare it with"),
    ],
)
def test_a_sweep_without_a_baseline_is_refused(methods: list[str | None], said: str) -> None:
    with pytest.raises(UserError, match=said):
        swept([run(info(m, str(m))) for m in methods])


def test_two_baselines_are_refused_by_name() -> None:
    named = [run(change(info(None, n, version=n), cell=f"none-{n}")) for n in ("a", "b")]
    with pytest.raises(UserError, match="2 configs without speculation: none-a, none-b"):
        swept([*named, run(info("ngram", "n"))])


def test_runs_of_repeat_0_are_numbered_as_they_began() -> None:
    later = run(info(None, "later", 9), phase(8), phase(64))
    first = run(info(None, "first", 1), phase(8))
    found = joined([later, first])
    assert [(p.name, p.repeat) for p in found.phases] == [
        ("c=8 r=1", 0),
        ("c=8 r=2", 1),
        ("c=64 r=1", 0),
    ]
    assert [p.started_s for p in found.phases] == [5.0, 5.0 + 8 * 60, 5.0 + 8 * 60]
    assert found.run_ids == ("first", "later")
    assert found.info.scenario.repeats == 2
    assert found.info.scenario.loads == (ClosedLoop(concurrency=8), ClosedLoop(concurrency=64))


def test_cells_keep_their_repeat_and_a_run_given_twice_counts_once() -> None:
    cells = [run(info(None, f"r{n}", n), phase(8, n)) for n in range(3)]
    found = joined([cells[2], cells[0], cells[1], cells[1]])
    assert [p.repeat for p in found.phases] == [0, 1, 2]
    assert found.run_ids == ("r0", "r1", "r2")
    assert joined([cells[0], cells[0]]) == cells[0]


def test_a_caveat_follows_its_phase_and_an_end_that_went_wrong_is_kept() -> None:
    caveat = Caveat(code="x", message="m", advice="a", phase="c=8")
    first = run(info(None, "a", 0))
    second = run(info(None, "b", 1), caveats=(caveat,), end="interrupted")
    found = joined([first, second])
    assert [c.phase for c in found.caveats] == ["c=8 r=2"]
    assert found.end == "interrupted"


def test_runs_of_one_side_must_have_done_the_same_work() -> None:
    odd = change(info(None, "b", 1), prompts_sha256="1" * 64)
    with pytest.raises(UserError, match=r"runs a and b cannot be compared: prompts: 0{12} → 1{12}"):
        joined([run(info(None, "a")), run(odd)])
    assert joined([run(info(None, "a")), run(odd)], force=True).run_ids == ("a", "b")


@pytest.mark.parametrize(
    ("order", "turns"),
    [("bsbsbs", True), ("bssbbs", True), ("bbbsss", False), ("sssbbb", False), ("bssssbbb", False)],
)
def test_taking_turns(order: str, turns: bool) -> None:
    starts = {side: [float(at) for at, s in enumerate(order) if s == side] for side in "bs"}
    pairs = [
        (phase(started_s=b), phase(started_s=s))
        for b, s in zip(starts["b"], starts["s"], strict=True)
    ]
    base, spec = run(info(None, "b")), run(info("ngram", "s"))
    assert took_turns(base, spec, pairs) is turns
    odd = run(change(info("ngram", "s"), started_at="yesterday"))
    assert took_turns(base, odd, pairs) is False, "not known is not interleaved"


def test_one_repeat_is_itself_and_of_several_counts_are_sums() -> None:
    one = phase(step_time_s=0.010)
    assert as_one([one]) is one
    two = change(
        one, repeat=1, step_time_s=0.020, throughput=Throughput(whole=50.0, why_not_steady="w")
    )
    both = as_one([one, two])
    assert (both.requests.sent, both.requests.broke, both.span_s) == (18, 2, 20.0)
    assert both.step_time_s == pytest.approx(0.015)
    assert both.throughput == Throughput(whole=75.0, why_not_steady="w")
    assert as_one([one, change(two, step_time_s=None)]).step_time_s == 0.010


def test_acceptance_is_pooled_over_steps_and_drafts() -> None:
    def said(length: float, steps: int, drafts: int, joint: tuple[float, ...]) -> Acceptance:
        return Acceptance(
            source="s",
            state="on",
            acceptance_length=length,
            interval=Interval(low=length - 0.1, high=length + 0.1, kind="k"),
            draft_coverage=drafts / steps,
            joint_by_position=joint,
            steps=steps,
            drafts=drafts,
            accepted_tokens=drafts,
            draft_tokens=3 * drafts,
        )

    parts = [said(2.0, 100, 50, (0.8, 0.4)), said(3.0, 300, 150, (0.4,))]
    (found,) = as_one([phase(acceptance=(part,)) for part in parts]).acceptance
    assert found.acceptance_length == pytest.approx(2.75)
    assert found.draft_coverage == 0.5
    assert found.acceptance_length_drafted == 2.0
    assert found.joint_by_position == pytest.approx((0.5, 0.1))
    assert found.conditional_by_position == pytest.approx((0.5, 0.2))
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((2.4, 2.6))
    blind = change(parts[1], acceptance_length=None, why_missing="no steps")
    (found,) = as_one([phase(acceptance=(p,)) for p in (parts[0], blind)]).acceptance
    assert (found.acceptance_length, found.why_missing) == (None, "no steps")


def test_groups_and_distributions_are_means_over_the_repeats_that_have_them() -> None:
    def group(name: str, p50: float | None) -> CategorySummary:
        speed = Distribution(n=4, p50=p50, min=p50, max=p50)
        return CategorySummary(category=name, requests=4, acceptance=None, user_tokens_per_s=speed)

    first = phase(categories=(group("qa", 10.0),), distributions={"x": Distribution(n=1, p50=1.0)})
    second = phase(categories=(group("coding", 5.0), group("qa", 20.0)))
    found = as_one([first, second])
    assert [(c.category, c.requests, c.user_tokens_per_s.p50) for c in found.categories] == [
        ("coding", 4, 5.0),
        ("qa", 8, 15.0),
    ]
    assert (found.categories[1].user_tokens_per_s.min, found.distributions["x"].n) == (10.0, 1)
