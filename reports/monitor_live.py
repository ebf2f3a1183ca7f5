"""What `draftload monitor` shows on stderr: a table of the servers, or lines without a terminal.

A watcher of loadgen/monitor.py. A server that came, went or began anew is a line at once; what it
does is over its last WINDOW scrapes, which are all that is kept. Redrawn with each scrape, at most
four times a second, never by a clock. What a server says of itself loses its control characters.
Must not: know an engine, raise.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

from rich.console import Console, Group
from rich.live import Live as Display
from rich.table import Table
from rich.text import Text

from loadgen.acceptance import of_counters
from loadgen.types import Completed, Probed, Reading, SpecCounters
from reports import page, units

WINDOW = 20
PLAIN_EVERY_S = 10.0
REDRAW_S = 0.25


@dataclass
class _Seen:
    """One server. `changed_s`: since when it is up, or not. `window`: (wall clock, growth)."""

    last: Reading
    changed_s: float
    window: deque[tuple[float, SpecCounters]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    restarts: int = 0
    said_s: float = float("-inf")


class MonitorLive:
    """Use as a context manager; call it with every event. `quiet`: changes only."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False)
        self._drawn = self._console.is_terminal and not quiet
        self._display = Display(console=self._console, auto_refresh=False, transient=True)
        self._seen: dict[str, _Seen] = {}
        self._probes = self._failed = 0
        self._drawn_s = float("-inf")

    def __enter__(self) -> Self:
        if self._drawn:
            self._display.start()
        return self

    def __exit__(self, *fault: object) -> None:
        if self._drawn:
            self._display.stop()

    def say(self, line: str) -> None:
        """A line of its own, above the table."""
        text = page.clean(f"draftload: {line}")
        if self._drawn:
            self._console.print(Text(text))
        else:
            print(text, file=sys.stderr)

    def __call__(self, event: Reading | Probed) -> None:
        if isinstance(event, Probed):
            self._probes += 1
            if not isinstance(event.record.outcome, Completed):
                self._failed += 1
            return
        seen = self._seen.get(event.server)
        before = seen.last if seen is not None else None
        if seen is None:
            seen = self._seen[event.server] = _Seen(last=event, changed_s=event.at_unix_s)
        for line in _changes(before, event, event.at_unix_s - seen.changed_s):
            self.say(f"{event.server} {line}")
        if before is None or (before.result == "ok") != (event.result == "ok"):
            seen.changed_s = event.at_unix_s
        seen.last = event
        seen.restarts += event.restarted
        if event.grown is not None:
            seen.window.append((event.at_unix_s, event.grown))
        elif event.result == "ok":
            seen.window.clear()  # it is not counted any more
        self._show(event.server, seen)

    def _show(self, server: str, seen: _Seen) -> None:
        now = time.monotonic()
        if self._drawn:
            if now - self._drawn_s >= REDRAW_S:
                self._drawn_s = now
                self._display.update(self._table(), refresh=True)
        elif not self._quiet and now - seen.said_s >= PLAIN_EVERY_S and seen.last.result == "ok":
            seen.said_s = now
            print(page.clean(f"{server}: {_line(seen)}"), file=sys.stderr)

    def _table(self) -> Group:
        width = self._console.width
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        left = ["server", *["engine"] * (width >= 100), *["model"] * (width >= 130)]
        for name in left:
            table.add_column(name, no_wrap=True, overflow="ellipsis", max_width=30)
        heads = [name for name, least in _HEADS.items() if width >= least]
        for name in heads:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True, overflow="ellipsis")
        for server, seen in sorted(self._seen.items()):
            info = seen.last.info
            told = (server, info.engine, info.model) if info is not None else (server, "–", "–")
            figures = _figures(seen)
            cells = [*map(page.clean, told[: len(left)]), *(figures[name] for name in heads)]
            style = "" if seen.last.result == "ok" else "red"
            table.add_row(*map(Text, cells), Text(_state(seen), style=style))
        said = f"by the servers' own counters, over {WINDOW} scrapes"
        probes = f"; probe: {self._probes} sent, {self._failed} failed" if self._probes else ""
        return Group(table, Text(said + probes, style="dim"))


def _changes(before: Reading | None, now: Reading, lasted_s: float) -> Iterator[str]:
    """What is worth a line at once."""
    was, is_up = before is not None and before.result == "ok", now.result == "ok"
    if not is_up and (before is None or was):
        yield f"is not there ({now.result.replace('_', ' ')}): {now.why}"
    elif not is_up and before is not None and before.result != now.result:
        yield f"is still not there ({now.result.replace('_', ' ')}): {now.why}"
    info = now.info
    known = info is not None and (before is None or before.info != info)
    if is_up and not was and before is not None:
        yield f"is back after {units.roughly(lasted_s)}"
    if now.restarted:
        yield "was restarted: its counters began anew"
    if is_up and info is not None and known:
        told = " ".join(filter(None, (info.engine, info.version)))
        yield f"is {told}, {info.model}, {page.speculation(info)}"
        if now.why:
            yield f"tells nothing: {now.why}"


_HEADS = {"AL": 0, "AL drafted": 0, "accepted": 120, "tok/s": 0, "run+wait": 0, "KV": 100}
"""Columns of figures, and from which width on they are shown."""


def _figures(seen: _Seen) -> dict[str, str]:
    """Cells under _HEADS. Where counters give no acceptance length, the engine's own gauge."""
    info, load = seen.last.info, seen.last.load
    state = info.state if info is not None else "unknown"
    found = of_counters((grown for _, grown in seen.window), state)
    length = units.number(found.acceptance_length)
    if found.acceptance_length is None and seen.last.acceptance_gauge is not None:
        length = f"{units.number(seen.last.acceptance_gauge)} (gauge)"
    queue = (load.running, load.waiting) if load is not None else (None, None)
    cells = (
        length if state != "off" else "off",
        units.number(found.acceptance_length_drafted) if state != "off" else "off",
        units.percent(found.acceptance_rate),
        units.figure(_tokens_per_s(seen)),
        "+".join(map(units.count, queue)) if queue != (None, None) else units.MISSING,
        units.percent(load.kv_cache_use if load is not None else None),
    )
    return dict(zip(_HEADS, cells, strict=True))


def _tokens_per_s(seen: _Seen) -> float | None:
    """Over the window; its first growth came before it."""
    if len(seen.window) < 2:
        return None
    (first_s, _), *rest = seen.window
    tokens = [grown.generated_tokens for _, grown in rest if grown.generated_tokens is not None]
    return sum(tokens) / max(rest[-1][0] - first_s, 1e-9) if tokens else None


def _state(seen: _Seen) -> str:
    if seen.last.result != "ok":
        lasted_s = seen.last.at_unix_s - seen.changed_s
        return f"{seen.last.result.replace('_', ' ')} for {units.roughly(lasted_s)}"
    again = f", {seen.restarts} restarts" if seen.restarts > 1 else ", 1 restart"
    info = seen.last.info
    simulated = ", simulated" if info is not None and info.simulated else ""
    return "up" + simulated + again * (seen.restarts > 0)


def _line(seen: _Seen) -> str:
    """The cells with their names, without what is missing."""
    cells = _figures(seen).items()
    told = ", ".join(f"{name} {cell}" for name, cell in cells if cell != units.MISSING)
    return f"{_state(seen)}, {told}" if told else _state(seen)
