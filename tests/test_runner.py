"""The loop against a server on an exact schedule: counts, the known stream, stops, observers."""

from __future__ import annotations

import asyncio
import gc
import itertools
import re
from array import array
from time import perf_counter

import msgspec
import pytest

from loadgen.errors import ServerError
from loadgen.metrics import distributions, tpot_s
from loadgen.plan import make_plan
from loadgen.protocol import completions_wire
from loadgen.runner import Runner, fan_out
from loadgen.scrape import Scraper
from loadgen.transport import Transport
from loadgen.types import (
    U32,
    Broke,
    Cancelled,
    Caveat,
    ClosedLoop,
    Completed,
    Engine,
    Message,
    OpenLoop,
    PhaseRecord,
    Record,
    RequestRecord,
    Sampling,
    Scenario,
    Snapshot,
    SpecCounters,
    Stop,
)
from tests.conftest import Truth
from tests.hostile import GOOD, listening
from tests.records import prompts

WIRE = completions_wire({"return_token_ids": True})


def counters(samples: object) -> SpecCounters:
    assert isinstance(samples, dict)
    values = {k.partition("{")[0]: int(v) for k, v in samples.items()}
    return SpecCounters(
        drafts=values.get("vllm:spec_decode_num_drafts_total"),
        accepted_tokens=values.get("vllm:spec_decode_num_accepted_tokens_total"),
        generated_tokens=values.get("vllm:generation_tokens_total"),
    )


ENGINE = Engine(
    name="truth", wires={"completions": WIRE}, metrics_path="/metrics", counters=counters
)


async def go(
    url: str, scenario: Scenario, *, interrupt_after: int = 0, grace_s: float = 30.0
) -> tuple[list[Record], str, dict[str, float]]:
    records: list[Record] = []
    zero = perf_counter()
    async with Transport(url, WIRE, zero=zero) as transport:
        scraper = Scraper(url + "/metrics", ENGINE, records.append, zero=zero)

        def observe(record: Record) -> None:
            records.append(record)
            done = sum(isinstance(r, RequestRecord) for r in records)
            if interrupt_after and done == interrupt_after and isinstance(record, RequestRecord):
                runner.interrupt()

        runner = Runner(
            transport,
            scraper,
            observe,
            model="truth",
            sampling=scenario.sampling,
            tokenize=None,
            grace_s=grace_s,
        )
        reason = await runner.run(make_plan(scenario, prompts(12)))
        page = await scraper.samples()
    return records, reason, page or {}


def requests(records: list[Record]) -> list[RequestRecord]:
    return [r for r in records if isinstance(r, RequestRecord)]


def scenario(load: int, *, requests: int | None = None, duration_s: float | None = None,
             tokens: int = 12, warmup: int = 0) -> Scenario:  # fmt: skip
    return Scenario(
        name="t",
        loads=(ClosedLoop(concurrency=load),),
        stop=Stop(requests=requests, duration_s=duration_s),
        sampling=Sampling(max_output_tokens=tokens),
        warmup_requests=warmup,
    )


async def test_every_request_ends_in_one_record(truth: Truth) -> None:
    url = truth(5, 1, 3)
    records, reason, page = await go(url, scenario(8, requests=50, warmup=3))
    assert reason == "completed"
    done = requests(records)
    assert len(done) == 58
    assert all(r.outcome == Completed() for r in done)
    assert page["truth_requests"] == 58
    measured = [r for r in done if r.phase == "c=8"]
    assert len({r.request_id for r in measured}) == 50
    assert all(r.osl_tokens == 12 for r in measured)
    phases = [r for r in records if isinstance(r, PhaseRecord)]
    assert [(p.name, p.measured) for p in phases] == [("warm-up c=8", False), ("c=8", True)]
    last = phases[1]
    assert last.steady_from_s is not None
    assert last.steady_to_s is not None
    assert last.started_s <= last.steady_from_s <= last.steady_to_s <= last.ended_s
    assert page["truth_active_peak"] <= 8
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


async def test_border_snapshots_hold_exactly_the_phase(truth: Truth) -> None:
    records, _, _ = await go(truth(5, 1, 3), scenario(4, requests=20, warmup=2))
    edges = [r for r in records if isinstance(r, Snapshot)]
    assert [(s.edge, s.settled) for s in edges] == [("start", True), ("end", True)]
    before, after = (counters(s.samples) for s in edges)
    assert before.generated_tokens is not None
    assert after.generated_tokens is not None
    assert after.generated_tokens - before.generated_tokens == 20 * 12


async def test_known_stream(truth: Truth) -> None:
    """60 tokens in 20 chunks of 3, 20 ms apart, first at 50 ms, against what was truly sent."""
    records, _, page = await go(truth(50, 20, 3), scenario(1, requests=8, tokens=60))
    done = requests(records)
    for record in done:
        assert record.chunk_tokens is not None
        assert record.chunk_tokens.tolist() == [3] * 20
    found = distributions(done)
    sent_gap = page["truth_itl_seconds_sum"] / page["truth_itl_seconds_count"]
    sent_tpot = page["truth_tpot_seconds_sum"] / page["truth_tpot_seconds_count"]
    assert found["chunk_gap_s"].mean == pytest.approx(sent_gap, rel=0.01)
    assert sum(tpot_s(r) or 0 for r in done) / len(done) == pytest.approx(sent_tpot, rel=0.01)


async def test_duration_sends_nothing_new_and_drains(truth: Truth) -> None:
    records, reason, _ = await go(truth(20, 5, 1), scenario(4, duration_s=1.0))
    assert reason == "completed"
    done = requests(records)
    assert len(done) > 12, "prompts come again until the time is up"
    assert all(r.outcome == Completed() for r in done)
    (phase,) = [r for r in records if isinstance(r, PhaseRecord)]
    assert phase.steady_to_s is not None
    assert phase.steady_to_s < phase.ended_s, "the last answers were waited for"
    assert max(r.end_s for r in done) <= phase.ended_s


async def test_an_interrupt_drains_and_stops(truth: Truth) -> None:
    records, reason, _ = await go(truth(5, 1, 3), scenario(4, requests=400), interrupt_after=10)
    assert reason == "interrupted"
    assert 10 <= len(requests(records)) <= 14
    assert all(r.outcome == Completed() for r in requests(records))
    assert any(isinstance(r, PhaseRecord) for r in records)


async def test_what_outlives_the_grace_is_cancelled_by_us(truth: Truth) -> None:
    url = truth(5, 50, 1)
    records, reason, _ = await go(url, scenario(4, duration_s=0.05, tokens=1000), grace_s=0.1)
    assert reason == "completed"
    assert [r.outcome for r in requests(records)] == [Cancelled()] * 4


async def test_a_store_that_fails_ends_the_run(truth: Truth) -> None:
    def full(record: Record) -> None:
        raise ServerError("disk full")

    url = truth(5, 1, 3)
    async with Transport(url, WIRE) as transport:
        scraper = Scraper(None, ENGINE, full, zero=0.0)
        runner = Runner(transport, scraper, full, model="truth", sampling=Sampling(), tokenize=None)
        with pytest.raises(ServerError, match="disk full"):
            await asyncio.wait_for(runner.run(make_plan(scenario(4), prompts(8))), 20)
    assert gc.isenabled()


def test_an_observer_that_raises_is_dropped_with_a_caveat() -> None:
    stored: list[Record] = []
    seen: list[Record] = []

    def bad(record: Record) -> None:
        raise ValueError("no")

    observe = fan_out(stored.append, (bad, seen.append))
    note = Caveat(code="x", message="m", advice="a")
    observe(note)
    observe(note)
    assert seen == [note, note]
    assert [r.code for r in stored if isinstance(r, Caveat)] == ["x", "observer-dropped", "x"]


async def test_a_tokenizer_that_fails_ends_its_dialogue_only(truth: Truth) -> None:
    """Two of four dialogues lose their second turn: a record each, never sent, and no more."""
    asked = tuple(
        msgspec.structs.replace(
            prompt, messages=(Message(role="user", content=str(i)),), later_turns=("more", "and on")
        )
        for i, prompt in enumerate(prompts(4))
    )
    records: list[Record] = []

    async def tokenize(messages: tuple[Message, ...]) -> U32:
        if int(messages[0].content) % 2:
            raise ServerError("the tokenizer is out of order")
        return array("I", [1, 2, 3])

    async with Transport(truth(1, 1, 3), WIRE) as transport:
        scraper = Scraper(None, ENGINE, records.append, zero=0.0)
        runner = Runner(
            transport, scraper, records.append, model="truth", sampling=Sampling(),
            tokenize=tokenize,
        )  # fmt: skip
        assert await runner.run(make_plan(scenario(2, requests=4), asked)) == "completed"
        assert transport.live.sent == 2 * 1 + 2 * 3
    failed = [r for r in requests(records) if not isinstance(r.outcome, Completed)]
    assert [(r.turn, r.outcome) for r in failed] == [
        (1, Broke(reason="tokenizer", message="the tokenizer is out of order"))
    ] * 2
    assert len(requests(records)) == 2 * 2 + 2 * 3


async def test_a_server_that_is_away_does_not_cost_the_whole_plan() -> None:
    """A worker that found nobody waits; a stop ends the waiting."""
    records: list[Record] = []
    async with Transport("http://127.0.0.1:1", WIRE) as transport:
        runner: Runner

        def observe(record: Record) -> None:
            records.append(record)
            if len(requests(records)) == 4:
                runner.interrupt()

        scraper = Scraper(None, ENGINE, observe, zero=0.0)
        runner = Runner(
            transport, scraper, observe, model="truth", sampling=Sampling(), tokenize=None
        )
        plan = make_plan(scenario(4, requests=4000), prompts(12))
        assert await asyncio.wait_for(runner.run(plan), 60) == "interrupted"
    assert len(requests(records)) == 4
    outcomes = {type(r.outcome) for r in requests(records)}
    assert outcomes == {Broke}


async def test_a_second_interrupt_waits_for_no_page(truth: Truth) -> None:
    """The page hangs at the end of the phase; the second Ctrl-C goes on without it."""
    records: list[Record] = []
    asked = asyncio.Event()
    pages = 0

    async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal pages
        pages += 1
        if pages > 2:
            asked.set()
            await reader.read()
        else:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\na 1\n")

    async with listening(page) as url, Transport(truth(1, 1, 3), WIRE) as transport:
        scraper = Scraper(url, ENGINE, records.append, zero=0.0, timeout_s=600.0)
        runner = Runner(
            transport, scraper, records.append, model="truth", sampling=Sampling(), tokenize=None
        )
        plan = make_plan(scenario(2, requests=4), prompts(4))
        task = asyncio.create_task(runner.run(plan))
        await asked.wait()
        runner.interrupt()
        runner.interrupt()
        assert await asyncio.wait_for(task, 60) == "interrupted"
    assert [s.edge for s in records if isinstance(s, Snapshot)] == ["start"]
    assert len(requests(records)) == 4


# ── open loops ───────────────────────────────────────────────────────────────────────────────────


def opened(rate: float, *, requests: int = 12, tokens: int = 12, ramp_s: float = 0.0,
           most: int | None = None, arrivals: str = "constant") -> Scenario:  # fmt: skip
    load = OpenLoop(request_rate_rps=rate, arrivals=arrivals, max_in_flight=most)
    return Scenario(
        name="t",
        loads=(load,),
        stop=Stop(requests=requests, ramp_s=ramp_s),
        sampling=Sampling(max_output_tokens=tokens),
        warmup_requests=0,
    )


def as_planned(records: list[Record], scenario: Scenario) -> list[RequestRecord]:
    """First turns by their intended instants, which are those of the plan to the microsecond."""
    (planned,) = make_plan(scenario, prompts(12)).phases
    (phase,) = [r for r in records if isinstance(r, PhaseRecord)]
    done = [r for r in requests(records) if r.turn == 0]
    done.sort(key=lambda r: r.intended_s or 0.0)
    intended = [r.intended_s for r in done]
    expected = [phase.started_s + offset for offset in planned.arrivals_s]
    assert intended == pytest.approx(expected, abs=1e-6)
    assert all(r.sent_s >= (r.intended_s or 0.0) for r in done), "nothing leaves early"
    return done


async def test_a_stall_at_the_server_holds_no_arrival_back() -> None:
    """It answers nobody before the last of twelve has come: a closed loop would never end."""
    stalled, come = asyncio.Event(), 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal come
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        if length is None:
            writer.close()  # it has no metrics page
            return
        await reader.readexactly(int(length[1]))
        come += 1
        if come == 12:
            stalled.set()
        await stalled.wait()
        writer.write(GOOD)
        await writer.drain()
        writer.close()

    scenario = opened(100)
    async with listening(handler) as url:
        records, reason, _ = await asyncio.wait_for(go(url, scenario), 60)
    assert reason == "completed"
    done = as_planned(records, scenario)
    assert len(done) == 12
    assert all(r.outcome == Completed() for r in done)
    found = distributions(done)
    waited = found["ttft_s"].mean, found["send_delay_s"].mean, found["ttft_intended_s"].mean
    assert None not in waited
    assert waited[2] == pytest.approx((waited[0] or 0) + (waited[1] or 0))
    longest = done[0].sent_s + done[0].chunk_gaps_us[0] / 1e6
    assert longest >= (done[-1].intended_s or 0.0), "the first waited through the whole stall"


async def test_what_a_limit_holds_back_keeps_its_instant(truth: Truth) -> None:
    """Coordinated omission: answers of 30 ms at 200 a second, one at a time. All are late, and
    none is intended later for it."""
    scenario = opened(200, most=1, tokens=3)
    records, _, page = await go(truth(30, 1, 3), scenario)
    done = as_planned(records, scenario)
    assert len(done) == page["truth_requests"] == 12
    assert page["truth_active_peak"] == 1
    assert all(b.sent_s >= a.end_s for a, b in itertools.pairwise(done)), "in order, in turn"
    late = [r.sent_s - (r.intended_s or 0.0) for r in done]
    assert late == sorted(late)


async def test_no_phase_is_steady_before_its_ramp_is_over(truth: Truth) -> None:
    scenario = opened(100, requests=12, ramp_s=0.1)
    records, _, _ = await go(truth(1, 1, 3), scenario)
    done = as_planned(records, scenario)
    (phase,) = [r for r in records if isinstance(r, PhaseRecord)]
    assert phase.steady_from_s == pytest.approx(done[5].intended_s), "five of twelve in the ramp"
    assert phase.steady_from_s == pytest.approx(phase.started_s + 0.1)
    assert phase.steady_to_s == pytest.approx(done[-1].intended_s)


async def test_a_later_turn_is_intended_when_the_turn_before_ended(truth: Truth) -> None:
    asked = tuple(
        msgspec.structs.replace(
            prompt, messages=(Message(role="user", content="x"),), later_turns=("more", "and on")
        )
        for prompt in prompts(3)
    )
    records: list[Record] = []

    async def tokenize(messages: tuple[Message, ...]) -> U32:
        return array("I", [1, 2, 3])

    async with Transport(truth(1, 1, 3), WIRE) as transport:
        scraper = Scraper(None, ENGINE, records.append, zero=0.0)
        runner = Runner(
            transport, scraper, records.append, model="truth", sampling=Sampling(),
            tokenize=tokenize,
        )  # fmt: skip
        await runner.run(make_plan(opened(500, requests=3), asked))
    ends = {(r.dialogue_id, r.turn): r.end_s for r in requests(records)}
    assert len(ends) == 9
    for record in requests(records):
        if record.turn:
            assert record.intended_s == ends[record.dialogue_id, record.turn - 1]


async def test_an_interrupt_ends_the_arrivals(truth: Truth) -> None:
    records, reason, _ = await asyncio.wait_for(
        go(truth(5, 1, 3), opened(20, requests=10_000), interrupt_after=3), 60
    )
    assert reason == "interrupted"
    assert 3 <= len(requests(records)) < 100
    assert all(r.outcome == Completed() for r in requests(records))


async def test_a_closed_loop_says_nothing_of_intentions_and_ramps_by_its_workers(
    truth: Truth,
) -> None:
    closed = scenario(4, duration_s=0.2)
    ramped = msgspec.structs.replace(closed, stop=Stop(duration_s=0.2, ramp_s=0.2))
    records, _, _ = await go(truth(10, 1, 3), ramped)
    (phase,) = [r for r in records if isinstance(r, PhaseRecord)]
    assert {r.intended_s for r in requests(records)} == {None}
    assert phase.steady_from_s is not None
    assert phase.steady_from_s >= phase.started_s + 0.15, "the fourth of four joins at 3/4 of it"
    assert phase.ended_s >= phase.started_s + 0.4, "the duration begins after the ramp"
