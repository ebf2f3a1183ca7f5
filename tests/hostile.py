"""A raw-socket server that sends what no server should."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from loadgen.protocol import completions_wire

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


def sending(data: bytes, *, close: bool = True) -> Handler:
    async def handler(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int
    ) -> None:
        writer.write(data)
        await writer.drain()
        if close:
            writer.close()

    return handler
