"""The live view on stderr while a run goes on: an observer, not a report. And, before it, how far
the prompts are tokenized.

One bar a phase with in-flight, tokens/s and failures; without a terminal a plain line every 10 s.
Sums are kept by hand, redraws are at most four a second. Must not: touch a record, raise.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Self

from rich.console import Console, Group
from rich.live import Live as Display
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from loadgen.types import ClientSample, Completed, Observer, Plan, Record, RequestRecord

PLAIN_EVERY_S = 10.0


class Live:
    """Shows one plan's progress. Use as a context manager; call it with every record."""

    def __init__(self, plan: Plan, label: str, *, quiet: bool = False) -> None:
        self._label = label
        self._quiet = quiet
        self._totals = {
            phase.name: len(phase.dialogues) if isinstance(phase.dialogues, tuple) else None
            for phase in plan.phases
        }
        self._console = Console(stderr=True, highlight=False)
        self._tasks: dict[str, TaskID] = {}
        self._dialogues: dict[str, int] = {}
        self._failed = 0
        self._before: ClientSample | None = None
        self._said_s = 0.0
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[done]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[speed]}", markup=False),
            console=self._console,
            refresh_per_second=4,
            transient=True,
        )
        self._bars = self._console.is_terminal and not quiet

    def __enter__(self) -> Self:
        if self._bars:
            self._progress.start()
        return self

    def __exit__(self, *fault: object) -> None:
        if self._bars:
            self._progress.stop()

    def __call__(self, record: Record) -> None:
        if self._quiet:
            return
        if isinstance(record, RequestRecord):
            self._request(record)
        elif isinstance(record, ClientSample):
            self._sample(record)

    def _request(self, record: RequestRecord) -> None:
        name = record.phase
        self._failed += not isinstance(record.outcome, Completed)
        self._dialogues[name] = self._dialogues.get(name, 0) + (record.turn == 0)
        if not self._bars:
            return
        if name not in self._tasks:
            for task in self._tasks.values():
                self._progress.update(task, visible=False)
            self._tasks[name] = self._progress.add_task(
                f"{self._label}  {name}", total=self._totals.get(name), done="", speed=""
            )
        self._progress.update(
            self._tasks[name], completed=self._dialogues[name], done=self._count(name)
        )

    def _count(self, name: str) -> str:
        total = self._totals.get(name)
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{self._dialogues[name]}" + (f"/{total}" if total else "") + failed

    def _sample(self, sample: ClientSample) -> None:
        before, self._before = self._before, sample
        if before is None or before.phase != sample.phase or sample.at_s <= before.at_s:
            return
        speed = (sample.tokens - before.tokens) / (sample.at_s - before.at_s)
        of = "" if sample.target is None else f"/{sample.target}"
        text = f"{sample.in_flight}{of} in flight, {speed:,.0f} tok/s"
        if self._bars:
            if sample.phase in self._tasks:
                self._progress.update(self._tasks[sample.phase], speed=text)
        elif sample.at_s - self._said_s >= PLAIN_EVERY_S:
            self._said_s = sample.at_s
            done = self._count(sample.phase) if sample.phase in self._dialogues else "0"
            print(f"{self._label}  {sample.phase}: {done} dialogues, {text}", file=sys.stderr)


class SweepLive:
    """A sweep's table that fills in, and a line on the cell under way. Use as a context manager.

    Redrawn when a cell ends and with each ClientSample, never by a clock of its own. Without a
    terminal `ended` prints a line a cell, and a cell is shown by `Live`.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False)
        self._drawn = self._console.is_terminal and not quiet
        self._display = Display(console=self._console, auto_refresh=False, transient=True)
        self._table: Sequence[Text] = ()

    @property
    def width(self) -> int:
        """Cells that a line may take."""
        return self._console.width

    def __enter__(self) -> Self:
        if self._drawn:
            self._display.start()
        return self

    def __exit__(self, *fault: object) -> None:
        if self._drawn:
            self._display.stop()

    def show(self, table: Sequence[Text], line: str = "", status: str = "") -> None:
        """The table as it is now; `line` is what stands for it where nothing is drawn."""
        self._table = table
        if self._drawn:
            self._draw(status)
        elif line and not self._quiet:
            print(line, file=sys.stderr)

    @contextlib.contextmanager
    def watch(self, plan: Plan, label: str) -> Iterator[Observer]:
        """An observer of one cell."""
        if not self._drawn:
            with Live(plan, label, quiet=self._quiet) as view:
                yield view
            return
        dialogues: dict[str, int] = {}

        def see(record: Record) -> None:
            if isinstance(record, RequestRecord):
                dialogues[record.phase] = dialogues.get(record.phase, 0) + (record.turn == 0)
            elif isinstance(record, ClientSample):
                done = dialogues.get(record.phase, 0)
                at = f"{record.in_flight}/{record.target} in flight"
                self._draw(f"{label}  {record.phase}: {done:,} dialogues, {at}")

        yield see

    def _draw(self, status: str) -> None:
        self._display.update(Group(*self._table, Text(status, style="dim")), refresh=True)


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
