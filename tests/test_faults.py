"""What servers and networks do to a stream: one parameter a fault, and what became of it.

For each the outcome, the tokens that had come, and where their count comes from. Nothing is sent
twice here; tests/test_transport.py has the one resend.
"""

from __future__ import annotations

import asyncio
import gzip
import socket
import struct
from dataclasses import dataclass

import pytest

from loadgen import transport as timed
from loadgen.protocol import chat_wire
from loadgen.transport import Transport
from loadgen.types import (
    Broke,
    Cancelled,
    Completed,
    Outcome,
    Refused,
    RequestRecord,
    TimedOut,
    TokenCountSource,
    Wire,
)
from tests.hostile import BODY, GOOD, HEAD, WIRE, Handler, chunked, event, sending, serving
from tests.records import REQUEST


@dataclass(frozen=True)
class Fault:
    """What is sent, and what must have become of it. `sends` bytes: all in one write, then closed.

    `outcome`: "" completed, a Broke's reason, a refusal's status, or "timed out".
    """

    name: str
    sends: bytes | Handler
    outcome: str | int = ""
    tokens: int = 0
    source: TokenCountSource | None = None
    says: str = ""
    wire: Wire = WIRE


def body(*events: bytes, done: bool = True) -> bytes:
    return b"".join(events) + (b"data: [DONE]\n\n" if done else b"")


def whole(data: bytes, head: bytes = HEAD) -> bytes:
    return head + chunked(data) + b"0\r\n\r\n"


def status(line: str, said: bytes = b"", *headers: str) -> bytes:
    head = "".join(f"{h}\r\n" for h in (line, *headers, f"Content-Length: {len(said)}"))
    return f"HTTP/1.1 {head}\r\n".encode() + said


def resets(data: bytes) -> Handler:
    """Sends `data`, then RST instead of FIN."""

    async def handler(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int
    ) -> None:
        writer.write(data)
        await writer.drain()
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()

    return handler


def piecewise(data: bytes, size: int) -> Handler:
    """Sends `data` in writes of `size` bytes, each in a packet of its own."""

    async def handler(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int
    ) -> None:
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(data), size):
            writer.write(data[at : at + size])
            await writer.drain()
        writer.close()

    return handler


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int) -> None:
    writer.write(HEAD)
    while not writer.is_closing():
        writer.write(chunked(event(1) * 100))
        await writer.drain()


def usage(count: object, *, choices: bytes = b"[]") -> bytes:
    told = str(count).encode() if not isinstance(count, bytes) else count
    return b'data: {"choices":%s,"usage":{"prompt_tokens":3,"completion_tokens":%s}}\n\n' % (
        choices, told,
    )  # fmt: skip


def plain(text: str, finish: str | None = None) -> bytes:
    """A chunk without ids."""
    end = f'"{finish}"' if finish else "null"
    return f'data: {{"choices":[{{"text":"{text}","finish_reason":{end}}}]}}\n\n'.encode()


def delta(fields: str, finish: str | None = None) -> bytes:
    end = f'"{finish}"' if finish else "null"
    return f'data: {{"choices":[{{"delta":{{{fields}}},"finish_reason":{end}}}]}}\n\n'.encode()


STOP = event(3, "length")
CONTINUOUS = body(usage(1, choices=b'[{"text":"a"}]'), usage(4, choices=b'[{"text":"b"}]'), b"")
GZIPPED = gzip.compress(body(event(1), STOP))
HUGE = b'data: {"choices":[{"text":"%s","token_ids":[1,2,3,4],"finish_reason":"stop"}]}\n\n' % (
    b"x" * 10_000_000
)
NON_STREAM = b'{"choices":[{"text":"a","finish_reason":"stop"}],"usage":{"completion_tokens":4}}'
JSON_HEAD = "Content-Type: application/json"
UTF8 = event(1).replace(b'"x"', '"héllo \U0001f600"'.encode()) + STOP

UNUSUAL = (
    Fault("byte by byte", piecewise(whole(body(event(1), STOP)), 1), "", 4, "ids"),
    Fault("bunched writes", whole(body(event(1), event(2), event(3), STOP)), "", 9, "ids"),
    Fault("split UTF-8", piecewise(whole(body(UTF8)), 3), "", 4, "ids"),
    Fault("CRLF", whole(body(event(1), STOP).replace(b"\n", b"\r\n")), "", 4, "ids"),
    Fault("CR alone", whole(body(event(1), STOP).replace(b"\n", b"\r")), "", 4, "ids"),
    Fault("comments", whole(b": ping\n\n" + event(1) + b": ping\n\n" + body(STOP)), "", 4, "ids"),
    Fault("event, id and retry lines", whole(b"retry: 3\nid: 7\nevent: x\n" + body(event(1), STOP)),
          "", 4, "ids"),
    Fault("data without a space", whole(body(event(1), STOP).replace(b"data: ", b"data:")),
          "", 4, "ids"),
    Fault("gzip", b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s"
          % (len(GZIPPED), GZIPPED), "", 4, "ids"),
    Fault("HTTP/1.0, ended by close",
          b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + body(event(1), STOP),
          "", 4, "ids"),
    Fault("a 10 MB event", whole(body(HUGE)), "", 4, "ids"),
    Fault("no [DONE]", whole(body(event(1), STOP, done=False)), "", 4, "ids"),
    Fault("no empty line at the end", whole(body(event(1), STOP, done=False)[:-2]), "", 4, "ids"),
    Fault("data after [DONE]", whole(body(event(1), STOP) + event(9)), "", 4, "ids"),
    Fault("closed mid-frame after [DONE]", HEAD + chunked(body(event(1), STOP)), "truncated",
          4, "ids"),
    Fault("role-only first chunk",
          whole(body(delta('"role":"assistant","content":""'), delta('"content":"a"'),
                     delta("", "stop"), usage(4))), "", 4, "final_usage", wire=chat_wire({})),
    Fault("usage in every chunk", whole(CONTINUOUS + plain("", "stop") + body()), "", 4,
          "continuous_usage"),
    Fault("usage only at the end", whole(body(plain("a"), plain("b", "stop"), usage(4))), "", 4,
          "final_usage"),
    Fault("usage missing", whole(body(plain("a"), plain("b", "stop"))), "", 0, "final_usage"),
    Fault("usage null", whole(body(event(1), STOP, usage("null"))), "", 4, "ids"),
    Fault("usage lying", whole(body(event(1), STOP, usage(400))), "", 4, "ids"),
    Fault("usage that goes back",
          whole(body(usage(4, choices=b'[{"text":"a"}]'), usage(2, choices=b'[{"text":"b"}]'),
                     plain("", "stop"))), "", 4, "continuous_usage"),
)  # fmt: skip

BROKEN = (
    Fault("closed before headers", b"", "disconnected"),
    Fault("closed inside headers", HEAD[:30], "disconnected"),
    Fault("reset before headers", resets(b""), "reset"),
    Fault("reset mid-stream", resets(HEAD + chunked(event(2))), "truncated", 2, "ids",
          "reset by peer"),
    Fault("closed mid-stream", HEAD + chunked(event(2)), "truncated", 2, "ids"),
    Fault("ended without a finish", whole(event(2)), "truncated", 2, "ids"),
    Fault("closed in an event", HEAD + chunked(event(2) + b'data: {"cho'), "truncated", 2, "ids"),
    Fault("shorter than its length", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + event(2),
          "truncated", 2, "ids"),
    Fault("stall", sending(HEAD + chunked(event(2)), close=False), "timed out", 2, "ids"),
    Fault("stall before headers", sending(b"", close=False), "timed out"),
    Fault("malformed JSON", whole(event(2) + b"data: {oops\n\n"), "malformed", 2, "ids"),
    Fault("a token id that is NaN",
          whole(event(2) + b'data: {"choices":[{"token_ids":[NaN]}]}\n\n'), "malformed", 2, "ids"),
    Fault("usage that is a text", whole(event(2) + usage(b'"many"')), "malformed", 2, "ids"),
    Fault("a token id below zero", whole(event(2) + b'data: {"choices":[{"token_ids":[-1]}]}\n\n'),
          "malformed", 2, "ids"),
    Fault("usage beyond all bounds", whole(body(event(1), STOP, usage(1 << 60))), "malformed",
          4, "ids"),
    Fault("usage below zero", whole(body(event(1), STOP, usage(-5))), "malformed", 4, "ids"),
    Fault("JSON too deep", whole(event(2) + b"data: " + b"[" * 100_000 + b"\n\n"), "malformed",
          2, "ids"),
    Fault("an error too deep", whole(event(2) + b'data: {"error":' + b"[" * 100_000 + b"\n\n"),
          "malformed", 2, "ids"),
    Fault("not UTF-8", whole(event(2) + b"data: \xff\xfe\n\n"), "malformed", 2, "ids"),
    Fault("an error event", whole(event(2) + b'data: {"error":{"message":"engine died"}}\n\n'),
          "server_error", 2, "ids", "engine died"),
    Fault("an error event that is a text", whole(event(2) + b'data: {"error":"oom"}\n\n'),
          "server_error", 2, "ids", "oom"),
    Fault("an error event, then [DONE]", whole(event(2) + body(b'data: {"error":"oom"}\n\n')),
          "server_error", 2, "ids", "oom"),
    Fault("a role and nothing more",
          whole(body(delta('"role":"assistant"'), delta("", "stop"))), "empty",
          wire=chat_wire({})),
    Fault("[DONE] alone", whole(body()), "empty"),
    Fault("comments alone", whole(b": nothing\n\n"), "truncated"),
    Fault("an empty stream", HEAD + b"0\r\n\r\n", "truncated"),
    Fault("no stream but JSON", status("200 OK", NON_STREAM, JSON_HEAD), "not_a_stream",
          says="the answer is application/json"),
    Fault("no stream but HTML", status("200 OK", b"<html>", "Content-Type: text/html"),
          "not_a_stream", says="text/html"),
    Fault("bad chunked framing", HEAD + b"zz\r\n", "protocol"),
    Fault("bad chunked framing after a chunk", HEAD + chunked(event(2)) + b"zz\r\n", "protocol"),
    Fault("not HTTP", b"nonsense\r\n\r\n", "protocol"),
    Fault("gzip that is none",
          b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope",
          "truncated"),
)  # fmt: skip

REFUSED = (
    Fault("400 with JSON", status("400 Bad Request", b'{"error":{"message":"too long"}}'), 400,
          says="too long"),
    Fault("404 with detail", status("404 Not Found", b'{"detail":"Not Found"}'), 404,
          says="Not Found"),
    Fault("502 with HTML", status("502 Bad Gateway", b"<html>\n bad\tgateway</html>"), 502,
          says="<html> bad gateway</html>"),
    Fault("503 and nothing", status("503 No"), 503),
    Fault("500 with bytes", status("500 No", b"\xff\xfe"), 500, says="\ufffd\ufffd"),
    Fault("an error body without end", status("500 No", b"x" * 100_000), 500, says="x" * 500),
    Fault("a redirect", status("302 Found", b"", "Location: https://me:pass@other/v1/x?key=k"),
          302, says="it redirects to https://other/v1/x"),
    Fault("a redirect to itself", status("307 Temporary Redirect", b"", "Location: /v1/"), 307,
          says="it redirects to /v1/"),
)  # fmt: skip


async def sent_to(fault: Fault, timeout_s: float = 60.0) -> RequestRecord:
    handler = sending(fault.sends) if isinstance(fault.sends, bytes) else fault.sends
    async with serving(handler) as url, Transport(url, fault.wire, timeout_s=timeout_s) as sender:
        record, _ = await sender.stream(REQUEST, BODY)
        assert sender.live.in_flight == 0
    return record


def kind(outcome: Outcome) -> str | int:
    match outcome:
        case Completed():
            return ""
        case Broke():
            return outcome.reason
        case Refused():
            return outcome.status
        case TimedOut():
            return "timed out"
        case Cancelled():
            return "cancelled"


@pytest.mark.parametrize("fault", [*UNUSUAL, *BROKEN, *REFUSED], ids=lambda fault: fault.name)
async def test_a_fault_is_one_record(fault: Fault) -> None:
    record = await sent_to(fault, timeout_s=0.2 if fault.outcome == "timed out" else 60.0)
    assert (kind(record.outcome), record.osl_tokens) == (fault.outcome, fault.tokens)
    assert record.token_count_source == fault.source
    assert record.resent == 0
    assert fault.says in getattr(record.outcome, "message", "")
    if record.chunk_tokens is not None:
        assert sum(record.chunk_tokens) == record.osl_tokens
        assert len(record.chunk_gaps_us) == len(record.chunk_tokens)
    if isinstance(record.outcome, Refused):
        assert record.outcome.message == fault.says


async def test_text_split_in_a_character_comes_whole() -> None:
    handler = piecewise(whole(body(UTF8)), 1)
    async with serving(handler) as url, Transport(url, WIRE) as sender:
        record, answer = await sender.stream(REQUEST, BODY)
    assert answer == record.text == "héllo \U0001f600x"


async def test_a_stream_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed, "MAX_STREAM_BYTES", 1 << 20)
    record = await sent_to(Fault("endless", endless))
    assert isinstance(record.outcome, Broke)
    assert record.outcome.reason == "malformed"
    assert "a stream of more than 1 MiB" in record.outcome.message
    assert 0 < record.osl_tokens < 1 << 20


async def test_a_stream_without_end_ends_with_its_timeout() -> None:
    record = await sent_to(Fault("endless", endless), timeout_s=0.2)
    assert record.outcome == TimedOut(after_s=0.2)
    assert record.osl_tokens > 0


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        ("Retry-After: 7", 7, 7),
        ("Retry-After: Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Retry-After: Fri, 31 Dec 9999 23:59:59 GMT", 1e9, 1e12),
        ("Retry-After: soon", None, None),
        ("Retry-After: -3", None, None),
        ("X-Other: 1", None, None),
    ],
)
async def test_retry_after_is_recorded_and_not_obeyed(
    header: str, low: float | None, high: float | None
) -> None:
    refused = sending(status("429 Too Many Requests", b"slow down", header))
    async with serving(refused) as url, Transport(url, WIRE) as sender:
        outcome = (await sender.stream(REQUEST, BODY))[0].outcome
        assert sender.live.sent == 1
    assert isinstance(outcome, Refused)
    assert (outcome.status, outcome.message) == (429, "slow down")
    if low is None or high is None:
        assert outcome.retry_after_s is None
    else:
        assert outcome.retry_after_s is not None
        assert low <= outcome.retry_after_s <= high


async def test_one_fault_touches_no_other_stream() -> None:
    """Good streams and one of each fault, all at once on one transport."""
    faults = [f for f in (*BROKEN, *REFUSED) if isinstance(f.sends, bytes)]
    handlers = [sending(f.sends) for f in faults if isinstance(f.sends, bytes)]
    number = iter(range(1 << 20))
    healthy = 0

    async def mixed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, n: int) -> None:
        nonlocal healthy
        at = next(number)
        if at % 2 and at // 2 < len(handlers):
            await handlers[at // 2](reader, writer, n)
        else:
            healthy += 1
            writer.write(GOOD)
            await writer.drain()

    async with serving(mixed) as url, Transport(url, WIRE, fresh_connections=True) as sender:
        count = 3 * len(handlers)
        done = await asyncio.gather(*(sender.stream(REQUEST, BODY) for _ in range(count)))
        assert sender.live.in_flight == 0
    completed = [r for r, _ in done if r.outcome == Completed()]
    assert len(completed) == healthy == count - len(handlers)
    assert all(r.osl_tokens == 4 and len(r.chunk_gaps_us) == 2 for r in completed)
    assert all(r.text == "xx" for r in completed)
