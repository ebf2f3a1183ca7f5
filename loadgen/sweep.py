"""A sweep: the cells of a matrix, one run file each, on servers started and stopped in turn.

Neighbouring cells of one server share it, unless its drafter remembers. The index of what is done
is a scan of the folder, so a sweep that was killed goes on where it stopped. A server that will not
start marks all its cells; one that dies marks the cell in which it died and is started again for
the next. `start` is given by cli. Must not: import servers, print, say how a figure is rounded.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from loadgen.compare import compare, differences
from loadgen.errors import ServerError, UserError
from loadgen.measure import Job, measure
from loadgen.store import glance
from loadgen.types import (
    Cell,
    Load,
    OverRepeats,
    PhaseSummary,
    ServerConfig,
    Summary,
    SweepResult,
    SweepRow,
)


class Ready(Protocol):
    """A server that was started: servers.launch.Launched."""

    @property
    def url(self) -> str: ...

    async def died(self) -> str:
        """Waits until the server ends by itself, and says how."""
        ...


Start = Callable[[ServerConfig], AbstractAsyncContextManager[Ready]]
Ended = Callable[[Cell, Path | None, str], None]
"""Hears of each cell's end: its run file, if there is one, and "completed", "interrupted" or
"failed: …"."""


# ── what is done already ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Index:
    """Run files of a folder: `done` by cell name; `seconds` each of them took, by Cell.sha256."""

    done: Mapping[str, Path] = field(default_factory=dict)
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)


def index(out: Path, cells: Sequence[Cell]) -> Index:
    """Scans `out` for completed run files of these cells; the newest of several counts."""
    wanted = {(cell.name, cell.sha256) for cell in cells}
    done: dict[str, tuple[str, Path]] = {}
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for path in sorted(out.glob("*.jsonl")):
        found = glance(path) if path.is_file() else None
        info, end = found if found is not None else (None, None)
        if info is None or info.cell is None or info.cell_sha256 is None:
            continue
        if end is None or end.reason != "completed":
            continue
        seconds[info.cell_sha256].append(end.at_s)
        if (info.cell, info.cell_sha256) in wanted:
            done[info.cell] = max(done.get(info.cell, ("", path)), (info.started_at, path))
    return Index({name: path for name, (_, path) in done.items()}, seconds)


def expected_s(cell: Cell, seconds: Mapping[str, Sequence[float]]) -> float | None:
    """Seconds that the cell took before, in whichever repeat; None where it never ran."""
    known = seconds.get(cell.sha256)
    return statistics.median(known) if known else None


# ── running ──────────────────────────────────────────────────────────────────────────────────────


async def sweep(
    cells: Sequence[Cell], job: Callable[[Cell], Job], start: Start, ended: Ended
) -> bool:
    """Measures the cells in their order; False where Ctrl-C ended it. Failures are marks."""
    unable: dict[str, str] = {}
    for session in sessions(cells):
        left = deque(session)
        name = left[0].server.name
        while left:
            if name in unable:
                ended(left.popleft(), None, unable[name])
                continue
            try:
                if not await _session(left, job, start, ended):
                    return False
            except (ServerError, UserError) as fault:
                unable[name] = f"failed: {fault}"
    return True


def sessions(cells: Sequence[Cell]) -> Iterator[tuple[Cell, ...]]:
    """Cells that share a server in turn: neighbours of one server and repeat, for what a start
    draws by lot is part of the noise between repeats; alone where the server must be fresh."""

    def shared(at: tuple[int, Cell]) -> tuple[str, int, int]:
        place, cell = at
        return cell.server.name, cell.repeat, place if cell.server.fresh else -1

    for _, group in itertools.groupby(enumerate(cells), shared):
        yield tuple(cell for _, cell in group)


async def _session(
    left: deque[Cell], job: Callable[[Cell], Job], start: Start, ended: Ended
) -> bool:
    """Takes cells from the front of `left` until none is left or their server is gone.

    False: interrupted. ServerError, UserError: the server would not start; no cell was taken.
    """
    server = left[0].server
    if server.config is None:
        return await _in_turn(left, str(server.url), job, ended)
    async with start(server.config) as ready:
        gone = asyncio.ensure_future(ready.died())
        try:
            return await _in_turn(left, ready.url, job, ended, ready.died, gone)
        finally:
            gone.cancel()


async def _in_turn(
    left: deque[Cell],
    url: str,
    job: Callable[[Cell], Job],
    ended: Ended,
    died: Callable[[], Awaitable[str]] | None = None,
    gone: asyncio.Future[str] | None = None,
) -> bool:
    while left and not (gone is not None and gone.done()):
        cell = left.popleft()
        path: Path | None = None
        try:
            path, reason = await measure(url, job(cell), cell.server.config, died)
        except (ServerError, UserError) as fault:
            reason = f"failed: {fault}"
        ended(cell, path, reason)
        if reason == "interrupted":
            return False
    return True


# ── figures over the repeats ─────────────────────────────────────────────────────────────────────


def result(
    name: str,
    cells: Sequence[Cell],
    summaries: Mapping[str, Summary],
    failed: Mapping[str, str],
    baseline: str | None,
) -> SweepResult:
    """A row a server × scenario × load, in the matrix's order. `summaries`, `failed` by cell."""
    groups: defaultdict[tuple[str, str, Load], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.server.name, cell.scenario.name, cell.load].append(cell)
    rows = []
    for (server, scenario, load), group in groups.items():
        against = [] if server == baseline else groups.get((baseline or "", scenario, load), [])
        rows.append(_row(server, group, against, summaries, failed))
    return SweepResult(
        name=name,
        rows=tuple(rows),
        baseline=baseline,
        differences=_differences(cells, summaries, baseline),
        simulated=any(s.info.server.simulated for s in summaries.values()),
    )


def _row(
    server: str,
    group: Sequence[Cell],
    against: Sequence[Cell],
    summaries: Mapping[str, Summary],
    failed: Mapping[str, str],
) -> SweepRow:
    found = {cell.repeat: summaries[cell.name] for cell in group if cell.name in summaries}
    base = {cell.repeat: summaries[cell.name] for cell in against if cell.name in summaries}
    phases = [phase for summary in found.values() for phase in summary.phases]
    pairs = [speedups(base[r], found[r]) for r in sorted(base.keys() & found.keys())]
    why = [p.throughput.why_not_steady for p in phases]
    notes = [f"no steady output: {reason}." for reason in why if reason]
    notes += [note for *_, said in pairs for note in said]
    return SweepRow(
        server=server,
        scenario=group[0].scenario.name,
        load=group[0].load,
        cells=len(group),
        measured=len(found),
        failed=tuple(dict.fromkeys(failed[c.name] for c in group if c.name in failed)),
        notes=tuple(dict.fromkeys(notes)),
        output_tokens_per_s=_over(p.throughput.steady for p in phases),
        user_tokens_per_s=_over(p.distributions["user_tokens_per_s"].p50 for p in phases),
        ttft_p95_s=_over(p.distributions["ttft_s"].p95 for p in phases),
        acceptance_length=_over(map(_acceptance_length, phases)),
        speedup_user=_over(user for user, _, _ in pairs),
        speedup_throughput=_over(output for _, output, _ in pairs),
    )


def _over(values: Iterator[float | None]) -> OverRepeats:
    known = [value for value in values if value is not None]
    if not known:
        return OverRepeats()
    return OverRepeats(
        n=len(known), median=statistics.median(known), low=min(known), high=max(known)
    )


def _acceptance_length(phase: PhaseSummary) -> float | None:
    return phase.acceptance[0].acceptance_length if phase.acceptance else None


def speedups(base: Summary, spec: Summary) -> tuple[float | None, float | None, tuple[str, ...]]:
    """speedup_user and speedup_throughput of one repeat, and what is to be said of them."""
    try:
        found = compare(base, spec)
    except UserError as fault:
        return None, None, (str(fault),)
    (load,) = found.loads
    said = [f"{caveat.code}: {caveat.advice}" for caveat in found.caveats]
    if load.throughput_basis != "steady":
        said.append("the speedup of output is of the whole phase.")
    user, output = load.speedup_user, load.speedup_throughput
    return user.ratio if user else None, output.ratio if output else None, tuple(said)


def _differences(
    cells: Sequence[Cell], summaries: Mapping[str, Summary], baseline: str | None
) -> dict[str, tuple[str, ...]]:
    """Server → what else differs from the baseline, of the first cell of each that was measured."""
    infos = {c.server.name: summaries[c.name].info for c in cells[::-1] if c.name in summaries}
    base = infos.get(baseline or "")
    if base is None:
        return {}
    servers = dict.fromkeys(cell.server.name for cell in cells)
    return {s: differences(base, infos[s]) for s in servers if s in infos and s != baseline}
