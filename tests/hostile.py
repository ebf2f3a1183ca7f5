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


Connected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def listening(handler: Connected, port: int = 0) -> AsyncIterator[str]:
    """A raw-socket server, one call of the handler a connection; all closed at the end."""
    connections: list[asyncio.StreamWriter] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await handler(reader, writer)

    server = await asyncio.start_server(connected, "127.0.0.1", port)
    try:
        host, bound = server.sockets[0].getsockname()[:2]
        yield f"http://{host}:{bound}"
    finally:
        server.close()
        for _ in range(5):
            await asyncio.sleep(0)  # whoever was let in just now becomes a connection
        for writer in connections:
            writer.close()
        await server.wait_closed()


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """A server of POSTs of BODY; the handler gets the number of them before on its connection."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        count = 0
        while not writer.is_closing():
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(len(BODY))
            await handler(reader, writer, count)
            count += 1

    async with listening(connected) as url:
        yield url


def sending(data: bytes, *, close: bool = True) -> Handler:
    async def handler(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int
    ) -> None:
        writer.write(data)
        await writer.drain()
        if close:
            writer.close()

    return handler
