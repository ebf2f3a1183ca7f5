"""One streaming POST → one RequestRecord. The timed path: aiohttp, stamped at the socket.

What makes a stamp right, with figures in docs/performance.md: bytes are stamped in `data_received`,
before the task that reads them wakes; nothing is parsed by the HTTP client but its framing; bodies
arrive here encoded. A request that a *reused* connection drops before the first response byte is
sent once more on a fresh one, timed from the new send and counted as `resent`; nothing else is
retried. Must not: decide what to send or when, compute a figure.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import ssl
import urllib.request
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import aiohttp
from aiohttp.client_proto import ResponseHandler

from loadgen.errors import UserError
from loadgen.protocol import Tally
from loadgen.types import Broke, Cancelled, Outcome, Refused, Request, RequestRecord, TimedOut, Wire
from loadgen.written import hide

EVENT_STREAM = "text/event-stream"

READ_BUFFER_BYTES = 1 << 26
"""aiohttp pauses a socket whose buffer is fuller than this: never, or the stamps would wait."""

REFUSAL_BYTES = 2000
"""What is read of an HTTP error's body: its message stands at the front."""

MAX_STREAM_BYTES = 256 << 20
"""A stream longer than this is ended: one that never ends must not fill the memory."""


class _Sending:
    """What aiohttp tells us of one attempt, through hooks that run inside its request."""

    __slots__ = ("protocol", "reused", "written")

    def __init__(self) -> None:
        self.reused = False
        self.written: float | None = None
        self.protocol: object = None

    def answered(self) -> bool:
        """A byte has come since the request was written (True where that cannot be told)."""
        stamp = getattr(self.protocol, "stamp", None)
        return self.written is None or stamp is None or stamp > self.written


_sending: ContextVar[_Sending | None] = ContextVar("draftload_sending", default=None)


class _StampedRequest(aiohttp.ClientRequest):
    """Stamps the moment just before the request's bytes are written on an open connection."""

    async def write_bytes(self, writer: Any, conn: Any, *args: Any, **kwargs: Any) -> None:
        sending = _sending.get()
        if sending is not None:
            sending.protocol = conn.protocol
            sending.written = perf_counter()
        await super().write_bytes(writer, conn, *args, **kwargs)


class _StampedHandler(ResponseHandler):
    """Stamps bytes as the event loop hands them over, before the reading task is woken."""

    stamp = 0.0

    def data_received(self, data: bytes) -> None:
        if data:  # aiohttp calls it with b"" to resume parsing: nothing arrived then
            self.stamp = perf_counter()
        super().data_received(data)


# What ends a stream otherwise than by the API's own end → (reason, what is said). In this order.
_FAULTS: tuple[tuple[type[BaseException], str], ...] = (
    (aiohttp.ClientConnectorCertificateError, "tls"),
    (aiohttp.ClientSSLError, "tls"),
    (aiohttp.ClientConnectorError, "connect"),
    (aiohttp.ServerTimeoutError, "stalled"),
    (aiohttp.ServerDisconnectedError, "disconnected"),
    (aiohttp.ClientPayloadError, "truncated"),
    (aiohttp.ClientOSError, "reset"),
    (aiohttp.ClientResponseError, "protocol"),
    (aiohttp.ClientError, "client"),
    (ConnectionError, "reset"),
    (RuntimeError, "reset"),  # aiohttp: "Connection closed." on a read after the loss
    (OSError, "connect"),
    (ValueError, "malformed"),
)


def broke(fault: BaseException, secrets: Sequence[str] = ()) -> Broke:
    """The one place where a foreign exception becomes an outcome."""
    for kind, reason in _FAULTS:
        if isinstance(fault, kind):
            said = hide(f"{type(fault).__name__}: {fault}", secrets)
            return Broke(reason=reason, message=said[:500])
    raise fault


class Live:
    """Running totals of a transport, read by the runner's sampler."""

    __slots__ = ("chunks", "in_flight", "sent", "tokens")

    def __init__(self) -> None:
        self.in_flight = self.sent = self.chunks = self.tokens = 0


class Transport:
    """A session to one server. `zero` is the reading of `perf_counter` at the run's start.

    `fresh_connections`: a new connection for every request, for servers that close after a stream
    without saying so (llama.cpp). Use as an async context manager.
    """

    def __init__(
        self,
        base_url: str,
        wire: Wire,
        *,
        headers: dict[str, str] | None = None,
        timeout_s: float = 600.0,
        fresh_connections: bool = False,
        keep_text: bool = True,
        tls: ssl.SSLContext | bool = True,
        zero: float | None = None,
    ) -> None:
        self.url = base_url.rstrip("/") + wire.path
        self.wire = wire
        self.timeout_s = timeout_s
        self.keep_text = keep_text
        self.zero = perf_counter() if zero is None else zero
        self.live = Live()
        self._headers = {
            "Content-Type": "application/json",
            "Accept": EVENT_STREAM,
            "Accept-Encoding": "identity",
            **(headers or {}),
        }
        self._secrets = secrets_of(base_url, headers or {})
        self._fresh_connections = fresh_connections
        self._tls = tls
        self._aborting = False
        self._scopes: set[asyncio.Timeout] = set()

    async def __aenter__(self) -> Self:
        fresh = self._session(force_close=True)
        self._fresh = fresh
        self._pooled = fresh if self._fresh_connections else self._session(force_close=False)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for session in {self._pooled, self._fresh}:
            await session.close()

    def _session(self, *, force_close: bool) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0, force_close=force_close, ssl=self._tls)
        stamp_at_socket(connector)
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        return aiohttp.ClientSession(
            connector=connector,
            request_class=_StampedRequest,
            trace_configs=[trace],
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=READ_BUFFER_BYTES,
            auto_decompress=True,
            proxy=environment_proxy(self.url),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    def abort(self) -> None:
        """End every request in flight now, as Cancelled."""
        self._aborting = True
        now = asyncio.get_running_loop().time()
        for scope in self._scopes:
            scope.reschedule(now)

    def resume(self) -> None:
        """Send again after `abort`."""
        self._aborting = False

    async def stream(self, request: Request, body: bytes) -> tuple[RequestRecord, str]:
        """Send `body`, read the stream to its end; the record, and the answer's text.

        Never raises for what the server or the network does: that is the record's outcome.
        """
        live = self.live
        live.sent += 1
        live.in_flight += 1
        started = perf_counter()
        tally, sending, resent = Tally(self.wire.decode), _Sending(), 0
        outcome: Outcome
        try:
            async with asyncio.timeout(self.timeout_s) as scope:
                self._scopes.add(scope)
                try:
                    outcome = await self._attempt(self._pooled, body, tally, sending)
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as fault:
                    if (
                        not sending.reused
                        or sending.answered()
                        or isinstance(fault, aiohttp.ClientConnectorError)
                    ):
                        raise
                    resent = 1
                    tally, sending = Tally(self.wire.decode), _Sending()
                    started = perf_counter()
                    outcome = await self._attempt(self._fresh, body, tally, sending)
        except TimeoutError:
            outcome = Cancelled() if self._aborting else TimedOut(after_s=self.timeout_s)
        except (aiohttp.ClientError, OSError, RuntimeError, ValueError) as fault:
            outcome = broke(fault, self._secrets)
        finally:
            self._scopes.discard(scope)
            live.in_flight -= 1
        sent = sending.written if sending.written is not None else started
        record = tally.record(
            request,
            outcome,
            zero=self.zero,
            sent=sent,
            ended=perf_counter() if tally.finished is None else tally.finished,
            connect_s=None if sending.reused else max(sent - started, 0.0),
            resent=resent,
            keep_text=self.keep_text,
        )
        return record, tally.answer()

    async def _attempt(
        self, session: aiohttp.ClientSession, body: bytes, tally: Tally, sending: _Sending
    ) -> Outcome:
        token = _sending.set(sending)
        live, feed = self.live, tally.feed
        try:
            async with session.post(
                self.url, data=body, headers=self._headers, allow_redirects=False
            ) as response:
                if response.status != 200:
                    return await self._refused(response)
                # Not response.connection: an answer that came whole has let go of it already.
                protocol, content = sending.protocol, response.content
                left = MAX_STREAM_BYTES
                while data := await content.readany():
                    left -= len(data)
                    if left < 0:
                        raise ValueError(f"a stream of more than {MAX_STREAM_BYTES >> 20} MiB")
                    before = tally.tokens, tally.chunks
                    feed(getattr(protocol, "stamp", None) or perf_counter(), data)
                    live.tokens += tally.tokens - before[0]
                    live.chunks += tally.chunks - before[1]
                tally.close(perf_counter())
                return self._ended(tally, response.content_type)
        finally:
            _sending.reset(token)

    def _ended(self, tally: Tally, content_type: str) -> Outcome:
        """How a stream that the server ended came out."""
        outcome = tally.outcome()
        if not isinstance(outcome, Broke):
            return outcome
        if outcome.reason == "truncated" and not tally.chunks and content_type != EVENT_STREAM:
            said = f"the answer is {content_type}, no {EVENT_STREAM}"
            return Broke(reason="not_a_stream", message=said)
        return Broke(reason=outcome.reason, message=hide(outcome.message, self._secrets))

    async def _refused(self, response: aiohttp.ClientResponse) -> Refused:
        said = refusal(await bounded(response, REFUSAL_BYTES))
        if 300 <= response.status < 400:
            # Followed, the answer would be another server's: somebody else would be measured.
            place = urlsplit(response.headers.get("Location", ""))
            where = f"{place.scheme}://{place.netloc.rpartition('@')[2]}" if place.netloc else ""
            said = f"it redirects to {where}{place.path}"[:500]
        return Refused(
            status=response.status,
            message=hide(said, self._secrets),
            retry_after_s=retry_after(response.headers.get("Retry-After")),
        )


def retry_after(header: str | None) -> float | None:
    """Seconds of a Retry-After header (RFC 9110 §10.2.3: seconds or a date); None if unreadable."""
    if header is None:
        return None
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if header.strip().isdecimal():
            return float(header)
        return max((parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds(), 0.0)
    return None


def secrets_of(url: str, headers: Mapping[str, str]) -> tuple[str, ...]:
    """What must never be written down: passwords of the URL and its proxy, header values, keys."""
    words = []
    for place in (url, environment_proxy(url) or ""):
        password = urlsplit(place).password or ""
        words += [password, unquote(password)]
    for value in headers.values():
        words += [value, value.rpartition(" ")[2]]
    return tuple(sorted({w for w in words if len(w) > 3}, key=len, reverse=True))


def tls_context(ca_file: Path | None, cert: Path | None, key: Path | None) -> ssl.SSLContext | bool:
    """What verifies the server, and who we are. True: the system's authorities, no certificate.

    UserError: a file that cannot be read or is not PEM, or a key without its certificate.
    """
    if key is not None and cert is None:
        raise UserError("--client-key was given without --client-cert. Expected both, or neither.")
    if ca_file is None and cert is None:
        return True
    try:
        # With a file of our own only its authorities count: a pinned company CA.
        context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
        if cert is not None:
            context.load_cert_chain(cert, key, password=lambda: "")  # "": never ask the terminal
    except (OSError, ValueError) as fault:  # ssl.SSLError is an OSError
        files = ", ".join(str(f) for f in (ca_file, cert, key) if f is not None)
        raise UserError(
            f"cannot use the TLS files {files}: {fault}. Expected PEM: authorities in --ca-file, a "
            "certificate in --client-cert with its unencrypted key there or in --client-key."
        ) from None
    return context


def environment_proxy(url: str) -> str | None:
    """The proxy that the environment names for `url`, looked up once.

    aiohttp's `trust_env` asks again for every request, in a thread, and reads ~/.netrc each time:
    a tenth of the client's CPU, and milliseconds of delay for streams that are under way.
    """
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def stamp_at_socket(connector: aiohttp.BaseConnector) -> bool:
    """Make the connector's connections stamp their bytes; False: this aiohttp has no such hook.

    `_factory` is private to aiohttp (3.8 to 3.14). Where it is gone, `stream` stamps on waking,
    about a millisecond later at 512 streams; tests/test_transport.py says so loudly.
    """
    if not isinstance(getattr(connector, "_factory", None), functools.partial):
        return False
    stamped: Any = functools.partial(_StampedHandler, loop=asyncio.get_running_loop())
    connector._factory = stamped
    return True


async def _note_reuse(*_: object) -> None:
    sending = _sending.get()
    if sending is not None:
        sending.reused = True


async def bounded(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body up to `limit` bytes. One `read(n)` gives only what has arrived so far."""
    body = b""
    while len(body) < limit and (more := await response.content.read(limit - len(body))):
        body += more
    return body


def refusal(body: bytes) -> str:
    """What an HTTP error says, in one line: the JSON message where there is one."""
    text = body.decode("utf-8", "replace").strip()
    with contextlib.suppress(ValueError):
        error = json.loads(text)
        while isinstance(error, dict):
            error = error.get("error") or error.get("message") or error.get("detail") or str(error)
        text = str(error)
    return " ".join(text.split())[:500]
