"""A sweep: its plan before, what is filled in while it runs, and the table at its end.

A row of the table is a server × scenario × load, medians over the repeats with the lowest and the
highest. No verdict stands here: `compare` gives intervals. Must not: compute a figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.text import Text

from loadgen.errors import Bug
from loadgen.types import Cell, Matrix, OverRepeats, Study, SweepResult, SweepRow
from loadgen.written import load_label
from reports import page, units
from reports.page import Column, Section, wrapped

WAITING, RUNNING, FAILED = "·", "…", "✗"

Show = Callable[[float | None], str]


# ── before ───────────────────────────────────────────────────────────────────────────────────────


def plan(
    matrix: Matrix,
    cells: Sequence[Cell],
    left: int,
    expected: Sequence[float | None],
    differences: Mapping[str, Sequence[str]],
    width: int,
) -> Section:
    """What will be measured, in which order, for how long. `expected` seconds of the cells left."""
    names = [s.name + (" (baseline)" if s.name == matrix.baseline else "") for s in matrix.servers]
    fresh = [s.name for s in matrix.servers if s.fresh]
    done = f", {len(cells) - left} of them measured before" if left < len(cells) else ""
    lines = wrapped(
        f"Sweep {matrix.name}: {len(cells)} cells{done}. {units.count(matrix.repeats)} "
        f"repeat{'s' * (matrix.repeats > 1)}, each of all servers in turn.",
        width,
        style="bold",
    )
    lines += wrapped(", ".join(names), width, "servers    ", "           ")
    for scenario in matrix.scenarios:
        asked = f"{scenario.name} at {page.listed(map(load_label, scenario.loads))}, at most "
        asked += f"{units.count(scenario.sampling.max_output_tokens)} output tokens"
        lines += wrapped(asked, width, "scenario   ", "           ")
    if fresh:
        lines += wrapped(f"{page.listed(fresh)}: a fresh server a cell, as the drafter remembers",
                         width, "fresh      ", "           ")  # fmt: skip
    if matrix.baseline is None:
        lines += wrapped("refused: no speedup is given", width, "baseline   ")
    for said, servers in _alike(differences).items():
        text = f"{servers} differ from {matrix.baseline} in speculation and: "
        text += said or "nothing else, as the configs tell"
        lines += wrapped(text, width, "baseline   ", "           ")
    return lines + wrapped(duration(expected), width, "expected   ", "           ")


def duration(expected: Sequence[float | None]) -> str:
    """'about 9 min for 40 cells …, unknown for 20 …': what earlier cells tell."""
    if not expected:
        return "nothing is left to measure"
    known = [seconds for seconds in expected if seconds is not None]
    unknown = len(expected) - len(known)
    if not known:
        return f"unknown: {_cells(unknown)}, of which none was measured before"
    said = f"about {units.roughly(sum(known))} for {_cells(len(known))} by earlier ones like them, "
    said += "starts of servers not counted"
    return said + (f"; unknown for {_cells(unknown)}, never measured" if unknown else "")


def _cells(count: int) -> str:
    return f"{units.count(count)} cell{'s' * (count != 1)}"


# ── while it runs ────────────────────────────────────────────────────────────────────────────────


def grid(found: SweepResult, running: Cell | None, width: int) -> Section:
    """Servers down, loads across: steady output tokens/s, the median of the repeats so far."""
    lines: Section = []
    for scenario in dict.fromkeys(row.scenario for row in found.rows):
        rows = [row for row in found.rows if row.scenario == scenario]
        servers = list(dict.fromkeys(row.server for row in rows))
        columns = [Column("server", [page.short(name) for name in servers], left=True)]
        for load in dict.fromkeys(row.load for row in rows):
            of = {row.server: row for row in rows if row.load == load}
            cells = [_state(of.get(name), running) for name in servers]
            columns.append(Column(load_label(load), cells, 1, load_label(load)))
        title = f"{scenario}: steady output tok/s, median of the repeats so far"
        lines += [Text(title, style="bold"), *page.grid(columns, width)]
    return lines


def _state(row: SweepRow | None, running: Cell | None) -> str:
    if row is None:
        return ""
    now = running is not None and (row.server, row.scenario, row.load) == (
        running.server.name, running.scenario.name, running.load,
    )  # fmt: skip
    known = row.output_tokens_per_s.median
    text = units.figure(known) if row.measured else FAILED if row.failed else WAITING
    return (text if row.measured else "") + RUNNING if now else text


def line(cell: Cell, row: SweepRow, reason: str, done: int, total: int) -> str:
    """A cell's end in a line, where there is no terminal. `row` is of this cell alone."""
    start = f"[{done}/{total}] {page.clean(cell.name)}: "
    if not row.measured or reason != "completed":
        return start + page.clean(reason.split("\n")[0])
    user, length = row.user_tokens_per_s.median, row.acceptance_length.median
    said = [
        f"{units.rate(row.output_tokens_per_s.median)} steady",
        f"{units.rate(user)} a user",
        f"TTFT p95 {units.duration(row.ttft_p95_s.median)}",
        f"AL {units.number(length)}" if length is not None else "",
    ]
    return start + page.joined(said)


# ── at its end ───────────────────────────────────────────────────────────────────────────────────


def render(study: Study) -> str:
    """The table as text, `study.width` cells wide at most; Bug: there is no sweep in the study."""
    found, width = study.sweep, study.width
    if found is None:
        raise Bug("the sweep's report was given a study without a sweep")
    scenarios = dict.fromkeys(row.scenario for row in found.rows)
    sections = (
        wrapped(verdict(found), width, style="bold"),
        *(table([r for r in found.rows if r.scenario == name], found, width) for name in scenarios),
        what_differs(found, width),
        troubles(found, width),
    )
    return page.text_of(sections, study)


def verdict(found: SweepResult) -> str:
    """How much was measured, and what the figures are."""
    cells, measured = (sum(getattr(r, k) for r in found.rows) for k in ("cells", "measured"))
    start = "SIMULATED: " if found.simulated else ""
    repeats = max((row.measured for row in found.rows), default=0)
    over = "over the repeats, lowest and highest in brackets" if repeats > 1 else "of one repeat"
    against = f", speedups against {found.baseline}" if found.baseline is not None else ""
    counted = f"{units.count(measured)} of {units.count(cells)} cells measured"
    return f"{start}Sweep {found.name}: {counted}; medians {over}{against} (no verdict)."


def table(rows: Sequence[SweepRow], found: SweepResult, width: int) -> Section:
    """A row a server and load of one scenario."""
    if not rows:
        return []
    columns = [
        Column("server", [page.short(row.server) for row in rows], left=True),
        Column("load", [load_label(row.load) for row in rows]),
        Column("cells\ndone of", [f"{row.measured} of {row.cells}" for row in rows], 6, "cells"),
        *_figure("output\nsteady\ntok/s", "steady output", 0, 9, rows, units.figure,
                 lambda r: r.output_tokens_per_s),
        *_figure("user\np50\ntok/s", "user speed", 1, 8, rows, units.figure,
                 lambda r: r.user_tokens_per_s),
        *_figure("TTFT\np95\nms", "TTFT p95", 2, 10, rows, units.milliseconds,
                 lambda r: r.ttft_p95_s),
        *_figure("AL", "AL", 1, 7, rows, units.number, lambda r: r.acceptance_length),
    ]  # fmt: skip
    if found.baseline is not None:
        columns += [
            _speedup("user speed", rows, found, lambda r: r.speedup_user),
            _speedup("output", rows, found, lambda r: r.speedup_throughput),
        ]
    return [Text(page.clean(rows[0].scenario), style="bold"), *page.grid(columns, width)]


Take = Callable[[SweepRow], OverRepeats]


def _figure(
    head: str, name: str, drop: int, drop_range: int, rows: Sequence[SweepRow], show: Show,
    take: Take,
) -> list[Column]:  # fmt: skip
    """The median, and in a column of its own, which goes first, the range."""
    of = [take(row) for row in rows]
    around = [_around(one, show) for one in of]
    columns = [Column(head, [show(one.median) for one in of], drop, name)]
    if any(one.n > 1 for one in of):
        columns.append(Column("\nrange", around, drop_range, f"range of {name}", left=True))
    return columns


def _around(over: OverRepeats, show: Show) -> str:
    return f"[{show(over.low)}, {show(over.high)}]" if over.n > 1 else ""


def _speedup(what: str, rows: Sequence[SweepRow], found: SweepResult, take: Take) -> Column:
    cells = [
        "baseline" if row.server == found.baseline
        else f"{units.ratio(take(row).median)} {_around(take(row), units.number)}".strip()
        for row in rows
    ]  # fmt: skip
    return Column(f"{what}\n÷ baseline", cells, 0, what, left=True)


def what_differs(found: SweepResult, width: int) -> Section:
    """What else is not the baseline's, a line a server."""
    lines: Section = []
    for said, servers in _alike(found.differences).items():
        text = f"What else differs between {found.baseline} and {servers}: {said or 'nothing'}."
        lines += wrapped(text, width)
    return lines


def _alike(differences: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """What differs → the servers in which it does."""
    groups = page.grouped(("; ".join(facts), name) for name, facts in differences.items())
    return {said: page.listed(names) for said, names in groups.items()}


def troubles(found: SweepResult, width: int) -> Section:
    """What failed, and why figures are missing."""
    failed = page.grouped((why, f"{r.server} {load_label(r.load)}") for r in found.rows
                          for why in r.failed)  # fmt: skip
    notes = page.grouped((why, f"{r.server} {load_label(r.load)}") for r in found.rows
                         for why in r.notes)  # fmt: skip
    lines: Section = []
    for why, at in failed.items():
        text = f"{page.listed(dict.fromkeys(at))}: {why}"
        lines += wrapped(text, width, f"{FAILED} ", "  ")
    for why, at in notes.items():
        lines += wrapped(f"{page.listed(dict.fromkeys(at))}: {why}", width)
    missing = [r for r in found.rows if r.measured and r.acceptance_length.median is None]
    if missing:
        names = page.listed(dict.fromkeys(row.server for row in missing))
        lines += wrapped(f"No AL for {names}: speculation is off, or its steps are not known.",
                         width, style="dim")  # fmt: skip
    return lines
