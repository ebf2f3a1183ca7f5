"""What stderr shows while a run goes on: an observer, not a report. And, before it, how far the
prompts are tokenized.

On a terminal what reports.progress knows is drawn with the client's samples, at most four times a
second: laid out in the loop's thread, written by one that waits where the terminal does. Without a
terminal there is a line every 10 s and one a load; with --quiet one at the end. Must not: touch a
record, raise, wait for a terminal.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import Queue
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live as Display
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from loadgen.types import ClientSample, Engine, Observer, PhaseRecord, Plan, Record, RunInfo
from reports import progress

PLAIN_EVERY_S = 10.0
DRAWN_EVERY_S = 0.25
MOST_KEPT = 4
"""Writes that wait for a terminal; a frame is one."""

Engines = Mapping[str, Engine]


class _Behind(io.StringIO):
    """stderr, written by a thread of its own: a terminal that takes nothing (Ctrl-S, a stalled
    connection) must hold up no stream. `busy`: much of what was written is still to be taken."""

    def __init__(self) -> None:
        super().__init__()
        self._stderr = sys.stderr  # Rich puts a proxy in its place, which prints above the view
        self._texts: Queue[str | None] = Queue()
        self._thread = threading.Thread(target=self._pass_on, daemon=True)

    @property
    def busy(self) -> bool:
        return self._texts.unfinished_tasks > MOST_KEPT

    def isatty(self) -> bool:
        return self._stderr.isatty()

    def write(self, text: str) -> int:
        self._texts.put(text)
        return len(text)

    def begin(self) -> None:
        self._thread.start()

    def end(self, within_s: float = 2.0) -> None:
        """Waits until all is written, but not for ever."""
        self._texts.put(None)
        self._thread.join(within_s)

    def _pass_on(self) -> None:
        while (text := self._texts.get()) is not None:
            with contextlib.suppress(OSError, ValueError):
                self._stderr.write(text)
                self._stderr.flush()
            self._texts.task_done()


class _Screen:
    """The part of a terminal that is drawn over and over; `drawn` False: there is none."""

    def __init__(self, *, quiet: bool) -> None:
        self._behind = _Behind()
        self._console = Console(file=self._behind, highlight=False)
        terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        self.drawn = terminal and not quiet
        self._display = Display(
            console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop"
        )

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows, now."""
        width, height = self._console.size
        return width, height

    def start(self) -> None:
        if self.drawn:
            self._behind.begin()
            self._display.start()

    def stop(self) -> None:
        if self.drawn:
            self._display.stop()
            self._behind.end()

    def draw(self, lines: Sequence[Text]) -> None:
        """Draws, unless the terminal has not taken what was drawn before."""
        if not self._behind.busy:
            self._display.update(Group(*lines), refresh=True)


class Live:
    """Shows one run. Use as a context manager; call it with every record."""

    def __init__(
        self, plan: Plan, label: str, info: RunInfo, engines: Engines, *, quiet: bool = False
    ) -> None:
        self._progress = progress.Progress(plan, label, info, engines)
        self._quiet = quiet
        self._screen = _Screen(quiet=quiet)
        self._shown_s = 0.0

    def __enter__(self) -> Self:
        self._screen.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._screen.stop()
        if self._quiet:
            print(self._progress.end(), file=sys.stderr)

    def __call__(self, record: Record) -> None:
        self._progress.take(record)
        if self._quiet:
            return
        if self._screen.drawn:
            if isinstance(record, ClientSample) and self._due(record.at_s, DRAWN_EVERY_S):
                self._screen.draw(self._progress.lines(*self._screen.size))
        elif isinstance(record, ClientSample) and self._due(record.at_s, PLAIN_EVERY_S):
            print(self._progress.line(PLAIN_EVERY_S), file=sys.stderr)
        elif isinstance(record, PhaseRecord) and record.measured:
            print(f"{self._progress.label}  {self._progress.ended[-1]}", file=sys.stderr)

    def _due(self, at_s: float, every_s: float) -> bool:
        if at_s - self._shown_s < every_s:
            return False
        self._shown_s = at_s
        return True


class SweepLive:
    """A sweep's table that fills in, and under it the cell under way. Use as a context manager.

    Without a terminal `show` prints a line a cell, and a cell is shown by `Live`.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._screen = _Screen(quiet=quiet)
        self._table: Sequence[Text] = ()
        self._ended = ""

    @property
    def width(self) -> int:
        """Cells that a line may take."""
        return self._screen.size[0]

    def __enter__(self) -> Self:
        self._screen.start()
        return self

    def __exit__(self, *fault: object) -> None:
        self._screen.stop()
        if self._quiet and self._ended:
            print(self._ended, file=sys.stderr)

    def show(self, table: Sequence[Text], line: str = "") -> None:
        """The table as it is now; `line` is what stands for it where nothing is drawn."""
        self._table, self._ended = table, line or self._ended
        if self._screen.drawn:
            self._screen.draw(table)
        elif line and not self._quiet:
            print(line, file=sys.stderr)

    @contextlib.contextmanager
    def watch(self, plan: Plan, label: str, info: RunInfo, engines: Engines) -> Iterator[Observer]:
        """An observer of one cell."""
        if self._quiet:
            yield lambda record: None
            return
        if not self._screen.drawn:
            with Live(plan, label, info, engines) as view:
                yield view
            return
        known, shown_s = progress.Progress(plan, label, info, engines), 0.0

        def see(record: Record) -> None:
            nonlocal shown_s
            known.take(record)
            if isinstance(record, ClientSample) and record.at_s - shown_s >= DRAWN_EVERY_S:
                shown_s = record.at_s
                width, height = self._screen.size
                cell = known.lines(width, max(height - len(self._table) - 1, 2))
                self._screen.draw([*self._table, Text(), *cell])

        yield see


@contextlib.contextmanager
def tokenizing(total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """What is told how many prompts have their ids: a bar, or without a terminal a line every
    10 s and one in the end. May be called in another thread."""
    console, what = Console(stderr=True, highlight=False), f"tokenizing {total:,} prompts"
    if quiet:
        yield lambda count: None
    elif console.is_terminal:
        columns = (TextColumn(what), BarColumn(bar_width=24), MofNCompleteColumn())
        with Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True
        ) as progress:
            task = progress.add_task(what, total=total)
            yield lambda count: progress.update(task, completed=count)
    else:
        said_s = began = time.monotonic()

        def say(count: int) -> None:
            nonlocal said_s
            if time.monotonic() - said_s >= PLAIN_EVERY_S:
                said_s = time.monotonic()
                print(f"{what}: {count:,}", file=sys.stderr)

        yield say
        print(f"{what}: done in {time.monotonic() - began:.1f} s", file=sys.stderr)
