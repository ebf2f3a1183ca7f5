"""One streaming POST: stamps at the socket, the one resend, outcomes of what goes wrong."""

from __future__ import annotations

import asyncio
import functools
from time import perf_counter

import aiohttp
import pytest

from loadgen.transport import Transport, broke, refusal, stamp_at_socket
from loadgen.types import Broke, Cancelled, Completed, RequestRecord, TimedOut
from tests.hostile import BODY, GOOD, HEAD, WIRE, chunked, event, sending, serving
from tests.records import REQUEST


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


KEY = "sk-echoed-0123"
ECHO = b'{"error":{"message":"bad key ' + KEY.encode() + b" in Bearer " + KEY.encode() + b'"}}'


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 401 No\r\nContent-Length: %d\r\n\r\n%s" % (len(ECHO), ECHO),
        HEAD + chunked(b"data: " + ECHO + b"\n\n") + b"0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /?key=" + KEY.encode() + b"\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /" + KEY.encode() + b"\r\nContent-Length: 0\r\n\r\n",
        HEAD + b"zz\r\n",
        b"nonsense hunter2word\r\n\r\n",
        b"",
    ],
)
async def test_no_record_holds_what_a_server_echoes_of_our_secrets(sent: bytes) -> None:
    async with serving(sending(sent)) as url:
        with_password = url.replace("http://", "http://me:hunter2word@")
        record = await ask(with_password, headers={"X-Team": f"Bearer {KEY}"})
    assert record.outcome != Completed()
    assert KEY not in repr(record)
    assert "hunter2word" not in repr(record)


async def test_a_proxy_is_used_and_its_password_is_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://me:hunter2word@127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    record = await ask("http://server.invalid")
    assert isinstance(record.outcome, Broke)
    assert "127.0.0.1:1" in record.outcome.message
    assert "hunter2word" not in repr(record)
