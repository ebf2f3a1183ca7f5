"""A metrics page: sums kept by hand, text in Prometheus' format 0.0.4, and a thread that serves it.

Who counts adds to a Page; `text` is built when asked for, once a tick, and the thread hands out the
last one built: a scrape costs the event loop nothing. A series' name and labels are written once,
when it first counts. Must not: know what is measured, raise while a run goes on.
"""

from __future__ import annotations

import math
import socket
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Literal, Self

from loadgen.errors import UserError

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
HANGS_S = 5.0
"""A client that sends or takes nothing for so long is let go."""
Labels = Mapping[str, str]
OTHERS = "others"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One metric. `buckets` are a histogram's upper bounds, rising, without +Inf."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    buckets: tuple[float, ...] = ()


@dataclass(slots=True)
class _Series:
    """`heads` are the beginnings of its lines, `counts` what stands behind them."""

    heads: tuple[str, ...]
    counts: list[float]


@dataclass
class Page:
    """Families in the order of the page, and their series in the order in which they came."""

    families: Sequence[Family]
    _series: dict[str, dict[tuple[str, ...], _Series]] = field(init=False)
    _seen: dict[str, set[str]] = field(default_factory=dict)
    _hidden: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self._series = {family.name: {} for family in self.families}

    def add(self, family: Family, labels: Labels, amount: float = 1.0) -> None:
        """Count on."""
        self._of(family, labels).counts[0] += amount

    def set(self, family: Family, labels: Labels, value: float) -> None:
        """What a gauge stands at."""
        self._of(family, labels).counts[0] = value

    def observe(self, family: Family, labels: Labels, values: Sequence[float]) -> None:
        """A histogram's values. Its counts are kept by bucket and summed up in the text."""
        counts = self._of(family, labels).counts
        ordered = sorted(values)  # a bisection a bound, not one a value: a request has many gaps
        below = 0
        for n, bound in enumerate(family.buckets):
            upto = bisect_right(ordered, bound, below)
            counts[n] += upto - below
            below = upto
            if below == len(ordered):
                break
        counts[-2] += len(ordered) - below
        counts[-1] += math.fsum(ordered)

    def bounded(self, label: str, value: str, most: int) -> str:
        """The value, or OTHERS where the label has had so many others since the page was cleared:
        a data set may give every prompt a category of its own."""
        seen = self._seen.setdefault(label, set())
        if value not in seen and len(seen) >= most:
            return OTHERS
        seen.add(value)
        return value

    def clear(self, *families: Family) -> None:
        """Forget the series of these families, or of all."""
        if not families:
            self._seen.clear()
        for family in families or self.families:
            self._series[family.name].clear()

    def hide(self, *families: Family) -> None:
        """Leave these, and only these, out of the text; they go on counting."""
        self._hidden = frozenset(family.name for family in families)

    def __len__(self) -> int:
        """How many lines carry a value."""
        shown = (rows for name, rows in self._series.items() if name not in self._hidden)
        return sum(len(s.heads) for rows in shown for s in rows.values())

    def text(self) -> bytes:
        """The page."""
        return joined((self,))

    def rows(self, family: Family) -> list[str]:
        """The lines of a family's series."""
        if family.name in self._hidden:
            return []
        series = self._series.get(family.name, {}).values()
        if family.kind == "histogram":
            return [line for one in series for line in _histogram(one)]
        return [one.heads[0] + _number(one.counts[0]) for one in series]

    def _of(self, family: Family, labels: Labels) -> _Series:
        rows, key = self._series[family.name], tuple(labels.values())
        found = rows.get(key)
        if found is None:
            size = len(family.buckets) + 2 if family.kind == "histogram" else 1
            found = rows[key] = _Series(_heads(family, labels), [0.0] * size)
        return found


def joined(pages: Sequence[Page]) -> bytes:
    """Several pages as one: a family stands once, whichever of them have it."""
    families = {family.name: family for page in pages for family in page.families}
    lines: list[str] = []
    for family in families.values():
        rows = [row for page in pages for row in page.rows(family)]
        if rows:
            said = family.help.replace("\\", "\\\\").replace("\n", "\\n")
            lines.append(f"# HELP {family.name} {said}\n# TYPE {family.name} {family.kind}")
            lines += rows
    lines.append("")
    return "\n".join(lines).encode("utf-8", "replace")  # half a surrogate pair is no text


def _heads(family: Family, labels: Labels) -> tuple[str, ...]:
    pairs = [f'{name}="{escaped(value)}"' for name, value in labels.items()]
    if family.kind != "histogram":
        return (f"{family.name}{_braced(pairs)} ",)
    # As Prometheus 3 and its Python client spell a bound, and with it vLLM: one sum over `le`.
    bounds = [f'le="{bound}"' for bound in (*map(repr, family.buckets), "+Inf")]
    named = [f"{family.name}_bucket{_braced([*pairs, bound])} " for bound in bounds]
    return (*named, f"{family.name}_sum{_braced(pairs)} ", f"{family.name}_count{_braced(pairs)} ")


def _braced(pairs: Sequence[str]) -> str:
    return "{" + ",".join(pairs) + "}" if pairs else ""


def _histogram(series: _Series) -> list[str]:
    """`counts`: one a bucket, +Inf's, then the sum of the values."""
    lines, below = [], 0.0
    *heads, sum_head, count_head = series.heads
    for head, count in zip(heads, series.counts[:-1], strict=True):
        below += count
        lines.append(head + _number(below))
    return [*lines, sum_head + _number(series.counts[-1]), count_head + _number(below)]


def _number(value: float) -> str:
    value = float(value)
    return str(int(value)) if value.is_integer() else repr(value)


def escaped(value: str) -> str:
    """A label's value, as the format has it."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# ── serving ──────────────────────────────────────────────────────────────────────────────────────


class Served:
    """GET /metrics answers with what `show` was last given. Use as a context manager.

    UserError: the address cannot be had. Port 0 takes a free one; `port` tells which, `url` where
    the page is.
    """

    def __init__(self, host: str, port: int) -> None:
        self._text = b""
        self._taken = threading.Event()
        self._lock = threading.Lock()
        served = self
        self._host = f"[{host}]" if ":" in host else host

        class Handler(BaseHTTPRequestHandler):
            timeout = HANGS_S

            def do_GET(self) -> None:
                served.answer(self)

            def log_message(self, *_: object) -> None:
                """Nothing: stderr is the live view's."""

        try:
            self._server = _Server((host, port), Handler)
        except (OSError, OverflowError) as fault:
            raise UserError(
                f"The metrics page cannot be served on {self._host}:{port}: {fault}. Expected an "
                "address of this machine and a free port. Give another to --prometheus-port, or "
                "stop what holds it."
            ) from None
        self.port: int = self._server.server_address[1]
        self.scrapes = 0
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self.port}/metrics"

    def show(self, text: bytes) -> None:
        """What the next scrapes get."""
        with self._lock:
            self._text = text
            self._taken.clear()

    def taken(self, within_s: float) -> bool:
        """Waits until somebody was given what is shown; False: nobody was, or there is nothing."""
        return bool(self._text) and self._taken.wait(within_s)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """One GET, in a thread of its own."""
        path = request.path.partition("?")[0]
        found = path in ("/metrics", "/")
        body = self._text if found else b"The metrics are at /metrics.\n"
        request.send_response(200 if found else 404)
        request.send_header("Content-Type", MEDIA_TYPE if found else "text/plain")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)
        with self._lock:
            self.scrapes += found
            if found and body is self._text:
                self._taken.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *fault: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Without the base class's look-up of our own name, which may wait for a name server."""
        TCPServer.server_bind(self)

    def handle_error(self, *_: object) -> None:
        """A scraper that went away is its own affair."""
