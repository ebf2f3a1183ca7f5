"""The metrics page: parsing, what is left out, borders that wait, pages that fail."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import aiohttp.web
import pytest
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from loadgen.protocol import completions_wire
from loadgen.scrape import Scraper, parse_page
from loadgen.transport import Transport
from loadgen.types import (
    Caveat,
    Completed,
    Engine,
    Record,
    Sampling,
    ServerLoad,
    Snapshot,
    SpecCounters,
)
from tests.conftest import Truth
from tests.hostile import listening
from tests.records import ENGINE, REQUEST

PAGE = """\
# HELP vllm:drafts_total Number of drafts.
# TYPE vllm:drafts_total counter
vllm:drafts_total{engine="0",model_name="m"} 47.0
vllm:drafts_created{engine="0",model_name="m"} 1.79e+09
vllm:ttft_bucket{le="0.5"} 3
vllm:ttft_sum 1.5
llamacpp:requests_processing 0
with_timestamp 7 1700000000000
spaces{a="b c"}   2
nan_gauge NaN
broken line here
{nothing} 1
"""


def test_a_page() -> None:
    assert parse_page(PAGE) == {
        'vllm:drafts_total{engine="0",model_name="m"}': 47.0,
        "vllm:ttft_sum": 1.5,
        "llamacpp:requests_processing": 0.0,
        "with_timestamp": 7.0,
        'spaces{a="b c"}': 2.0,
    }
    assert parse_page(PAGE, ("llamacpp:",)) == {"llamacpp:requests_processing": 0.0}


@given(st.text(max_size=300))
def test_any_text_is_a_page(text: str) -> None:
    assert all(value == value for value in parse_page(text).values())


def engine() -> Engine:
    def counters(samples: Mapping[str, float]) -> SpecCounters:
        return SpecCounters(generated_tokens=int(samples["tokens"]))

    def load(samples: Mapping[str, float]) -> ServerLoad:
        return ServerLoad(running=int(samples["running"]))

    import dataclasses

    return dataclasses.replace(ENGINE, counters=counters, load=load, tick_prefixes=("running",))


async def scraped(pages: list[str | int], *, patience_s: float = 5.0) -> tuple[list[Record], int]:
    """A border over pages served in turn (the last again and again); records and requests."""
    asked = 0

    async def page(request: aiohttp.web.Request) -> aiohttp.web.Response:
        nonlocal asked
        answer = pages[min(asked, len(pages) - 1)]
        asked += 1
        if isinstance(answer, int):
            return aiohttp.web.Response(status=answer)
        return aiohttp.web.Response(text=answer)

    app = aiohttp.web.Application()
    app.router.add_get("/metrics", page)
    records: list[Record] = []
    async with TestServer(app) as server:
        scraper = Scraper(str(server.make_url("/metrics")), engine(), records.append, zero=0.0)
        await scraper.border("c=1", "end", patience_s=patience_s)
        await scraper.border("c=1", "end", patience_s=0.0)
    return records, asked


async def test_a_border_waits_until_counters_rest() -> None:
    pages = ["running 2\ntokens 5\n", "running 0\ntokens 7\n", "running 0\ntokens 9\n"]
    records, _ = await scraped([*pages, pages[-1]])
    first = records[0]
    assert isinstance(first, Snapshot)
    assert first.samples == {"running": 0.0, "tokens": 9.0}
    assert first.settled


async def test_a_server_that_never_rests_is_marked() -> None:
    records, _ = await scraped(["running 1\ntokens 1\n"], patience_s=0.0)
    assert [r.settled for r in records if isinstance(r, Snapshot)] == [False, False]


def answer(body: bytes, *, kind: str = "text/plain", status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (answer(b"", status="404 Not Found"), "answered HTTP 404"),
        (answer(b"oops", status="500 No"), "answered HTTP 500"),
        (answer(b"", status="302 Found"), "answered HTTP 302"),
        (answer(b"<html>please log in</html>\n", kind="text/html"), "is HTML, no metrics"),
        (answer(b"running 0\ntokens 12"), "is cut short"),
        (answer(b"running 0\ntokens 1234\n")[:-3], "ClientPayloadError"),
        (answer(b"running 0\n" + b"# x\n" * 13_000_000), "is over 8 MiB"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "failed: "),
        (b"", "ServerDisconnectedError"),
        (None, "TimeoutError"),
    ],
    ids=["missing", "500", "redirect", "HTML", "cut at a value", "truncated", "50 MB",
         "bad framing", "closed", "slow"],
)  # fmt: skip
async def test_a_page_that_fails_is_a_caveat_said_once(sent: bytes | None, why: str) -> None:
    """And no snapshot is invented."""
    asked = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await reader.readuntil(b"\r\n\r\n")
        if sent is None:
            await reader.read()  # says nothing until the client leaves
        else:
            writer.write(sent)
            await writer.drain()
        writer.close()

    records: list[Record] = []
    timeout_s = 0.2 if sent is None else 20.0
    async with listening(handler) as url:
        scraper = Scraper(url + "/metrics", engine(), records.append, zero=0.0, timeout_s=timeout_s)
        await scraper.border("c=1", "start")
        await scraper.border("c=1", "end")
    assert asked in (2, 4), "aiohttp asks once more for a GET whose connection dropped"
    (caveat,) = records
    assert isinstance(caveat, Caveat)
    assert why in caveat.message


async def test_a_slow_scrape_delays_no_request(truth: Truth) -> None:
    """The page hangs for the whole phase, and every stream of it ends."""
    hung = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hung.set()
        await reader.read()

    async with listening(handler) as url, Transport(truth(1, 1, 3), completions_wire({})) as sender:
        scraper = Scraper(url, engine(), lambda record: None, zero=0.0, timeout_s=60.0)
        ticks = asyncio.create_task(scraper.ticks("c=1", every_s=0.0))
        await hung.wait()
        body = sender.wire.encode(REQUEST, "m", Sampling())
        done = await asyncio.gather(*(sender.stream(REQUEST, body) for _ in range(20)))
        assert all(record.outcome == Completed() for record, _ in done)
        assert not ticks.done()
        ticks.cancel()
        await asyncio.gather(ticks, return_exceptions=True)


async def test_a_failing_page_tells_no_password() -> None:
    records: list[Record] = []
    url = "http://me:hunter2word@127.0.0.1:1/metrics"
    await Scraper(url, engine(), records.append, zero=0.0).border("c=1", "start")
    assert "hunter2word" not in str(records)
    assert len(records) == 1


async def test_no_server_is_a_caveat_not_a_fault() -> None:
    records: list[Record] = []
    scraper = Scraper("http://127.0.0.1:1/metrics", engine(), records.append, zero=0.0)
    await scraper.border("c=1", "start")
    assert [type(r) for r in records] == [Caveat]


async def test_no_page_is_nothing() -> None:
    records: list[Record] = []
    scraper = Scraper(None, engine(), records.append, zero=0.0)
    await scraper.border("c=1", "start")
    await asyncio.wait_for(scraper.ticks("c=1"), 5)
    assert records == []
