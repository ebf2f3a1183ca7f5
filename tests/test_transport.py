"""One streaming POST: stamps at the socket, the one resend, outcomes of what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gzip
from collections.abc import AsyncIterator, Awaitable, Callable
from time import perf_counter

import aiohttp
import pytest

from loadgen.protocol import completions_wire
from loadgen.transport import Transport, broke, refusal, stamp_at_socket
from loadgen.types import Broke, Cancelled, Completed, Outcome, Refused, RequestRecord, TimedOut
from tests.records import REQUEST

WIRE = completions_wire({})
BODY = b'{"stream":true}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(tokens: int, finish: str | None = None) -> bytes:
    ids = ",".join(["7"] * tokens)
    end = f'"{finish}"' if finish else "null"
    choice = f'{{"text":"x","token_ids":[{ids}],"finish_reason":{end}}}'
    return f'data: {{"choices":[{choice}]}}\n\n'.encode()


GOOD = (
    HEAD
    + chunked(event(1))
    + chunked(event(3, "length"))
    + chunked(b"data: [DONE]\n\n")
    + (b"0\r\n\r\n")
)


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """A raw-socket server; the handler gets the number of requests on its connection so far."""
    connections: list[asyncio.StreamWriter] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        count = 0
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(len(BODY))
                await handler(reader, writer, count)
                count += 1
                if writer.is_closing():
                    return

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        host, port = server.sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}"
    finally:
        for writer in connections:
            writer.close()
        server.close()
        await server.wait_closed()


async def ask(url: str, **options: object) -> RequestRecord:
    async with Transport(url, WIRE, **options) as transport:  # type: ignore[arg-type]  # test
        record, _ = await transport.stream(REQUEST, BODY)
    return record


async def good(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int) -> None:
    writer.write(GOOD)
    await writer.drain()


async def test_a_good_stream() -> None:
    async with serving(good) as url:
        record = await ask(url)
    assert record.outcome == Completed()
    assert record.osl_tokens == 4
    assert record.chunk_tokens is not None
    assert record.chunk_tokens.tolist() == [1, 3]
    assert record.connect_s is not None
    assert record.connect_s >= 0
    assert record.sent_s <= record.end_s
    assert record.resent == 0


async def test_the_stamp_is_the_sockets_not_the_readers() -> None:
    """A loop that is blocked after the bytes came does not move their stamp."""
    connector = aiohttp.TCPConnector()
    assert stamp_at_socket(connector), "this aiohttp hides the connector's protocol factory"
    assert isinstance(connector._factory, functools.partial)
    await connector.close()
    block = 0.2
    arrived: list[float] = []

    async def handler(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int
    ) -> None:
        writer.write(GOOD)
        await writer.drain()
        arrived.append(perf_counter())

    async with serving(handler) as url, Transport(url, WIRE) as transport:
        from loadgen.transport import _StampedHandler

        seen = _StampedHandler.data_received

        def blocked(self: _StampedHandler, data: bytes) -> None:
            seen(self, data)
            until = perf_counter() + (block if data else 0.0)
            while perf_counter() < until:
                pass

        _StampedHandler.data_received = blocked  # type: ignore[method-assign]  # see above
        try:
            record, _ = await transport.stream(REQUEST, BODY)
        finally:
            _StampedHandler.data_received = seen  # type: ignore[method-assign]  # put back
    first = record.sent_s + transport.zero + record.chunk_gaps_us[0] / 1e6
    assert first - arrived[0] < block


async def test_without_the_hook_stamps_come_on_waking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadgen.transport.stamp_at_socket", lambda connector: False)
    async with serving(good) as url:
        record = await ask(url)
    assert record.outcome == Completed()
    assert record.osl_tokens == 4


async def test_a_reused_connection_that_drops_is_sent_once_more() -> None:
    async def drops_second(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int
    ) -> None:
        if count:
            writer.close()
        else:
            await good(reader, writer, count)

    async with serving(drops_second) as url, Transport(url, WIRE) as transport:
        records = [(await transport.stream(REQUEST, BODY))[0] for _ in range(3)]
    assert [r.outcome for r in records] == [Completed()] * 3
    assert [r.resent for r in records] == [0, 1, 0]
    assert all(r.osl_tokens == 4 for r in records)


async def test_a_fresh_connection_that_drops_is_not_resent() -> None:
    async def drops(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int) -> None:
        writer.close()

    async with serving(drops) as url:
        record = await ask(url)
    assert isinstance(record.outcome, Broke)
    assert record.outcome.reason == "disconnected"
    assert record.resent == 0


async def test_after_a_byte_came_nothing_is_resent() -> None:
    async def cuts_second(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int
    ) -> None:
        if count:
            writer.write(HEAD[:20] if count == 1 else HEAD)
            await writer.drain()
            writer.close()
        else:
            await good(reader, writer, count)

    async with serving(cuts_second) as url, Transport(url, WIRE) as transport:
        await transport.stream(REQUEST, BODY)
        record, _ = await transport.stream(REQUEST, BODY)
    assert isinstance(record.outcome, Broke)
    assert record.resent == 0


async def test_fresh_connections_never_reuse() -> None:
    counts: list[int] = []

    async def counting(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int
    ) -> None:
        counts.append(count)
        await good(reader, writer, count)

    async with serving(counting) as url, Transport(url, WIRE, fresh_connections=True) as transport:
        for _ in range(3):
            record, _ = await transport.stream(REQUEST, BODY)
            assert record.connect_s is not None
    assert counts == [0, 0, 0]


def sending(data: bytes, *, close: bool = True) -> Handler:
    async def handler(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int
    ) -> None:
        writer.write(data)
        await writer.drain()
        if close:
            writer.close()

    return handler


JSON_400 = b'{"error":{"message":"prompt too long","code":400}}'


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (HEAD + chunked(event(1)), Broke(reason="truncated", message="")),
        (HEAD + chunked(event(1)) + b"0\r\n\r\n", Broke(reason="truncated", message="")),
        (HEAD + chunked(b"data: {oops\n\n") + b"0\r\n\r\n", Broke(reason="malformed", message="")),
        (HEAD + chunked(b'data: {"error":"oom"}\n\n') + b"0\r\n\r\n",
         Broke(reason="server_error", message="oom")),
        (HEAD + b"zz\r\n", Broke(reason="protocol", message="")),
        (b"nonsense\r\n\r\n", Broke(reason="protocol", message="")),
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%s" % (len(JSON_400), JSON_400),
         Refused(status=400, message="prompt too long")),
        (b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", Refused(status=503, message="")),
        (b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n",
         Refused(status=302, message="")),
    ],
)  # fmt: skip
async def test_outcomes(data: bytes, expected: Outcome) -> None:
    async with serving(sending(data)) as url:
        outcome = (await ask(url)).outcome
    assert type(outcome) is type(expected)
    if isinstance(expected, Broke) and isinstance(outcome, Broke):
        assert outcome.reason == expected.reason
        assert expected.message in outcome.message
    else:
        assert outcome == expected


def body_of(*events: bytes, done: bool = True) -> bytes:
    return b"".join(events) + (b"data: [DONE]\n\n" if done else b"")


def chunked_whole(body: bytes, head: bytes = HEAD) -> bytes:
    return head + chunked(body) + b"0\r\n\r\n"


GZIPPED = gzip.compress(body_of(event(1), event(3, "length")))
NON_STREAM = b'{"choices":[{"text":"a","finish_reason":"stop"}],"usage":{"completion_tokens":4}}'
HUGE = b'data: {"choices":[{"text":"%s","token_ids":[1,2,3,4],"finish_reason":"stop"}]}\n\n' % (
    b"x" * 10_000_000
)


@pytest.mark.parametrize(
    ("data", "reason", "tokens"),
    [
        # what is unusual but whole
        (b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
         + body_of(event(1), event(3, "length")), "", 4),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s"
         % (len(GZIPPED), GZIPPED), "", 4),
        (chunked_whole(HUGE), "", 4),
        (chunked_whole(body_of(event(4, "stop"), done=False)), "", 4),
        (chunked_whole(b"retry: 3\r\n: hello\r\nevent: x\r\ndata:" + event(4, "stop")[6:-2]
                       + b"\r\n\r\n"), "", 4),
        (chunked_whole(body_of(event(4, "stop")) + event(9)), "", 4),
        # what is broken
        (HEAD + b"0\r\n\r\n", "truncated", 0),
        (chunked_whole(b"data: [DONE]\n\n"), "empty", 0),
        (chunked_whole(b": nothing but comments\n\n"), "truncated", 0),
        (chunked_whole(NON_STREAM), "truncated", 0),
        (chunked_whole(event(2) + b"data: {\"choices\":[{\"token_ids\":[NaN]}]}\n\n"),
         "malformed", 2),
        (chunked_whole(event(2) + b"data: " + b"[" * 100_000 + b"\n\n"), "malformed", 2),
        (chunked_whole(event(2) + b'data: {"error":' + b"[" * 100_000 + b"\n\n"), "malformed", 2),
        (chunked_whole(event(2) + b"data: \xff\xfe\n\n"), "malformed", 2),
        (chunked_whole(event(2) + b'data: {"error":{"message":"engine died"}}\n\n'),
         "server_error", 2),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + event(2), "truncated", 2),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope",
         "truncated", 0),
    ],
)  # fmt: skip
async def test_streams_as_they_come(data: bytes, reason: str, tokens: int) -> None:
    async with serving(sending(data)) as url:
        record = await ask(url)
    assert (record.outcome.reason if isinstance(record.outcome, Broke) else "") == reason
    assert record.osl_tokens == tokens


async def test_one_fault_touches_no_other_stream() -> None:
    """Twenty good streams beside one of each fault, on one transport."""
    faults = (
        HEAD[:30],
        HEAD + b"zz\r\n",
        HEAD + chunked(b"data: {\n\n"),
        b"",
        b"HTTP/1.1 500 x\r\n\r\n",
    )
    turn = iter(range(1000))

    async def mixed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, n: int) -> None:
        number = next(turn)
        writer.write(GOOD if number % 5 else faults[number // 5 % len(faults)])
        await writer.drain()
        writer.close()

    async with serving(mixed) as url, Transport(url, WIRE, fresh_connections=True) as transport:
        done = await asyncio.gather(*(transport.stream(REQUEST, BODY) for _ in range(25)))
    good_ones = [r for r, _ in done if r.outcome == Completed()]
    assert len(good_ones) == 20
    assert all(r.osl_tokens == 4 for r in good_ones)
    assert transport.live.in_flight == 0


async def test_refused_connections_break() -> None:
    async with serving(good) as url:
        pass
    outcome = (await ask(url)).outcome
    assert isinstance(outcome, Broke)
    assert outcome.reason == "connect"


async def test_a_stall_times_out_and_keeps_its_tokens() -> None:
    async with serving(sending(HEAD + chunked(event(1)), close=False)) as url:
        record = await ask(url, timeout_s=0.1)
    assert record.outcome == TimedOut(after_s=0.1)
    assert record.osl_tokens == 1


async def test_abort_cancels_what_is_in_flight() -> None:
    async with (
        serving(sending(HEAD + chunked(event(1)), close=False)) as url,
        Transport(url, WIRE) as transport,
    ):
        task = asyncio.create_task(transport.stream(REQUEST, BODY))
        while transport.live.chunks == 0:  # noqa: ASYNC110  # the counter is what is observed
            await asyncio.sleep(0)
        transport.abort()
        record, _ = await task
        assert record.outcome == Cancelled()
        assert transport.live.in_flight == 0


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error":{"message":"m"}}', "m"),
        (b'{"error":"s"}', "s"),
        (b'{"detail":"Not Found"}', "Not Found"),
        (b'{"object":"error","message":"flat"}', "flat"),
        (b"<html>\n bad  gateway</html>", "<html> bad gateway</html>"),
        (b"", ""),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
def test_what_a_refusal_says(body: bytes, text: str) -> None:
    assert refusal(body) == text


def test_a_fault_of_our_own_is_not_an_outcome() -> None:
    with pytest.raises(ZeroDivisionError):
        broke(ZeroDivisionError())
