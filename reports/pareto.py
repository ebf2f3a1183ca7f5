"""The Pareto plot in characters: output tokens/s up, user speed across, a curve a config.

Both axes are logarithmic: loads go up by factors, and so do both speeds. Configs are told apart by
their marks, not by colour. Must not: compute a figure, decide which config is better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.text import Text

from loadgen.capacity import gpus_of
from loadgen.pareto import crossings, point
from loadgen.types import CurveCrossing, OperatingPoint, PhaseSummary, ServerInfo
from loadgen.written import load_label, load_order
from reports import units
from reports.page import Section, grouped, listed, speculation, wrapped

MARKS = "○●△▲□■◇◆"
CROSSING = "✕"
LINE = "·"
ROWS = 13
WIDEST = 64
NARROWEST = 2.0
"""An axis spans a factor of at least this."""
MARGIN = 12
"""Left of the plot, for the figures of its axis."""


ROUND = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9))
"""Kinds of figures, the roundest first; any factor of NARROWEST holds three of the last."""

Config = tuple[str, ServerInfo, Sequence[PhaseSummary]]
"""A config's name ('' where it is alone), its server, and its measured phases."""
Found = Mapping[tuple[str, str, int], CurveCrossing]
"""The first config's name, another's, and which of their crossings."""


@dataclass(frozen=True)
class _Curve:
    """One config, its points in the order of their loads."""

    name: str
    what: str
    points: Sequence[OperatingPoint]


def _curve(config: Config, gpus: int | None) -> _Curve:
    """Repeats of a load are one point."""
    name, server, phases = config
    loads = grouped((phase.load, phase) for phase in phases)
    found = [point(loads[load], gpus) for load in sorted(loads, key=load_order)]
    return _Curve(name, speculation(server), [at for at in found if at is not None])


@dataclass
class _Canvas:
    """Cells of a plot; its axes, low and high end of each, are logarithmic."""

    width: int
    across: tuple[float, float]
    up: tuple[float, float]
    cells: list[list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.cells = [[" "] * self.width for _ in range(ROWS)]

    def at(self, point: OperatingPoint | CurveCrossing) -> tuple[int, int]:
        """Column and row."""
        column = _share(point.user_tokens_per_s, self.across) * (self.width - 1)
        return round(column), round((1 - _share(point.output_tokens_per_s, self.up)) * (ROWS - 1))

    def put(self, place: tuple[int, int], mark: str) -> None:
        self.cells[place[1]][place[0]] = mark

    def line(self, a: tuple[int, int], b: tuple[int, int]) -> None:
        steps = max(abs(a[0] - b[0]), abs(a[1] - b[1]), 1)
        for n in range(steps + 1):
            self.put((_between(a[0], b[0], n / steps), _between(a[1], b[1], n / steps)), LINE)

    def say(self, place: tuple[int, int], text: str) -> None:
        """Right of a mark, or left of it, where there is room."""
        column, row = place
        said = f" {text} "
        for start in (column + 1, column - len(said)):
            end = start + len(said)
            if start >= 0 and end <= self.width and {*self.cells[row][start:end]} <= {" ", LINE}:
                self.cells[row][start:end] = said
                return


def _share(value: float, axis: tuple[float, float]) -> float:
    return math.log(value / axis[0]) / math.log(axis[1] / axis[0])


def _between(a: int, b: int, share: float) -> int:
    return round(a + (b - a) * share)


def plot(configs: Sequence[Config], width: int) -> Section:
    """The plot with its legend and what crosses; nothing where no config has two loads.

    Output is a GPU where GPUs are known of all and any has more than one.
    """
    gpus = [gpus_of(server) for _, server, _ in configs]
    a_gpu = None not in gpus and {*gpus} != {1}
    every = [_curve(c, n if a_gpu else None) for c, n in zip(configs, gpus, strict=True)]
    known = [curve for curve in every if curve.points]
    if not any(len(curve.points) > 1 for curve in known):
        return []
    curves, found = known[: len(MARKS)], _crossings(known[: len(MARKS)])
    unit = " a GPU" if a_gpu else ""
    title = f"Output tok/s{unit} (up) against user p50 tok/s (across), both logarithmic"
    said = _legend(curves, found)
    said += [f"{len(known) - len(curves)} more are not drawn."] if len(known) > len(curves) else []
    return [
        *wrapped(title, width, style="bold"),
        *_axes(_filled(curves, found, min(width - MARGIN, WIDEST))),
        *(line for text in said for line in wrapped(text, width, rest="  ")),
    ]


def _filled(curves: Sequence[_Curve], found: Found, width: int) -> _Canvas:
    """Lines first, then what must be seen over them, then loads where there is room."""
    points = [at for curve in curves for at in curve.points]
    ends = [_ends([p.user_tokens_per_s for p in points]),
            _ends([p.output_tokens_per_s for p in points])]  # fmt: skip
    canvas = _Canvas(width, ends[0], ends[1])
    places = [[canvas.at(p) for p in curve.points] for curve in curves]
    for row in places:
        for a, b in itertools.pairwise(row):
            canvas.line(a, b)
    for crossing in found.values():
        canvas.put(canvas.at(crossing), CROSSING)
    for mark, row in zip(MARKS, places, strict=False):
        for place in row:
            canvas.put(place, mark)
    for curve, row in zip(curves, places, strict=True):
        for at, place in zip(curve.points, row, strict=True):
            canvas.say(place, load_label(at.load))
    return canvas


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Of an axis: a little beyond the values, and never so near that noise looks like a cliff."""
    low, high = min(values), max(values)
    more = max(1.05, math.sqrt(NARROWEST * low / high))
    return low / more, high * more


def _crossings(curves: Sequence[_Curve]) -> Found:
    """Of the first config with each other."""
    return {
        (curves[0].name, other.name, n): crossing
        for other in curves[1:]
        for n, crossing in enumerate(crossings(curves[0].points, other.points))
    }


def _axes(canvas: _Canvas) -> Section:
    """The cells with their axes, round figures beside them."""
    up = {round((1 - _share(v, canvas.up)) * (ROWS - 1)): v for v in _ticks(canvas.up)}
    lines = []
    for row, cells in enumerate(canvas.cells):
        said = f"{units.amount(up[row])} ┤" if row in up else "│"
        lines.append(said.rjust(MARGIN) + "".join(cells).rstrip())
    base, under = ["─"] * canvas.width, " " * canvas.width
    for value in _ticks(canvas.across):
        column, said = round(_share(value, canvas.across) * (canvas.width - 1)), units.amount(value)
        start = min(max(column - len(said) // 2, 0), canvas.width - len(said))
        end = start + len(said)
        if not under[max(start - 1, 0) : end + 1].strip():
            base[column], under = "┬", under[:start] + said + under[end:]
    lines += [f"{'└':>{MARGIN}}{''.join(base)}", " " * MARGIN + under.rstrip()]
    return [Text(line) for line in lines]


def _ticks(axis: tuple[float, float]) -> list[float]:
    """Round figures on an axis: the roundest of which there are three."""
    low, high = axis
    decades = [10.0**n for n in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    found: list[float] = []
    for kinds in ROUND:
        found = [kind * ten for ten in decades for kind in kinds if low <= kind * ten <= high]
        if len(found) >= 3:
            break
    return found


def _legend(curves: Sequence[_Curve], found: Found) -> list[str]:
    """Whose mark is whose, what was drawn of it, and what the crossings say."""
    names = [
        f"{mark} {f'{c.name} ({c.what})' if c.name else c.what}"
        for mark, c in zip(MARKS, curves, strict=False)
    ]
    said = [", ".join(names)]
    whole = [
        " ".join(filter(None, (c.name, load_label(at.load))))
        for c in curves
        for at in c.points
        if not at.steady
    ]
    said += [f"Output: steady, but of the whole phase at {listed(whole)}."] if whole else []
    if max(at.repeats for c in curves for at in c.points) > 1:
        said.append("Points are means over repeats.")
    for (first, second, _), crossing in found.items():
        x, y = crossing.user_tokens_per_s, crossing.output_tokens_per_s
        more, less = (second, first) if crossing.second_above else (first, second)
        said.append(
            f"{CROSSING} {first} and {second} cross near {units.about(x)} tok/s a user, "
            f"{units.about(y)} tok/s output: above that user speed {more} gives more output, "
            f"below it {less} (interpolated, no interval)."
        )
    if len(curves) > 1 and not found:
        said.append(f"No curve crosses that of {curves[0].name} between measured loads.")
    return said
