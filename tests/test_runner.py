"""The loop against a server on an exact schedule: counts, the known stream, stops, observers."""

from __future__ import annotations

import asyncio
import gc
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
from tests.hostile import listening
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
    records, reason, _ = await go(truth(20, 5, 1), scenario(4, duration_s=0.3))
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
