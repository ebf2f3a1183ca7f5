"""The report of capacity: what each config carries inside the SLO, and what a rate takes.

A border is named by the two measured loads that it lies between; "at least" and "no measured load"
say that one of them was not measured. Must not: compute a figure, read between two loads.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from loadgen.bounds import in_seconds
from loadgen.errors import Bug
from loadgen.types import Bound, Capacity, CapacityLoad, ConfigCapacity, Study
from reports import page, units
from reports.page import Column, Section, wrapped

SHORT = {
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "e2el_s": "E2EL",
    "chunk_gap_s": "chunk gap",
    "user_tokens_per_s": "user speed",
}
OPERATORS = {"<=": "≤", ">=": "≥", "<": "<", ">": ">"}


def render(study: Study) -> str:
    """The report as text, `study.width` cells wide at most; Bug: no capacity was looked for."""
    found, width = study.capacity, study.width
    if found is None:
        raise Bug("the capacity report was given a study without a capacity")
    several = len(study.summaries) > 1
    runs = [(f"[{n}]" if several else "", s) for n, s in enumerate(study.summaries, 1)]
    own = msgspec.structs.replace(study.summaries[0], caveats=found.caveats)
    names = labels(found)
    sections = (
        wrapped(verdict(found), width, style="bold"),
        page.header([(label, s.info) for label, s in runs], width),
        ranking(found, names, width),
        *(
            loads(found, config, name, width)
            for config, name in zip(found.configs, names, strict=True)
        ),
        page.caveats([("", own), *runs], width),
        page.paths(study, [label for label, _ in runs]),
    )
    return page.text_of(sections, study)


def labels(found: Capacity) -> list[str]:
    """What tells the configs apart: speculation; model and engine if they differ; else the run."""
    names = [page.speculation(config.server) for config in found.configs]
    whose = [f"{c.server.model} on {c.server.engine}" for c in found.configs]
    if len(set(whose)) > 1:
        names = [f"{who}, {name}" for who, name in zip(whose, names, strict=True)]
    return [
        f"{name} ({config.runs[0]})" if names.count(name) > 1 else name
        for name, config in zip(names, found.configs, strict=True)
    ]


def bound(of: Bound) -> str:
    """'p95 TTFT ≤ 500 ms'."""
    name = " ".join(filter(None, (of.statistic, SHORT.get(of.metric, of.metric))))
    value = units.duration(of.value) if in_seconds(of.metric) else units.figure(of.value)
    unit = " tok/s" if of.metric.endswith("tokens_per_s") else ""
    return f"{name} {OPERATORS[of.op]} {value}{unit}"


def verdict(found: Capacity) -> str:
    """The one sentence: what each config carries, the best first."""
    simulated = "SIMULATED: " if any(c.server.simulated for c in found.configs) else ""
    said = [
        _carries(config, name) for config, name in zip(found.configs, labels(found), strict=True)
    ]
    asked = page.listed(bound(of) for of in found.bounds)
    return f"{simulated}At {asked}: {'; '.join(said)}.{_price(found)}"


def _carries(config: ConfigCapacity, name: str) -> str:
    unit = "GPU" if config.gpus else "server"
    name = {"no speculation": "without speculation"}.get(name, f"with {name}")
    least = "at least " if config.border == "at least" else ""
    if config.holds is None:
        lowest = config.loads[0].load
        below = f"no measured load {name} (the lowest, {lowest}, is outside)"
        if config.border == "below":
            return below
        less = f"; {config.fails.load} is outside" if config.fails is not None else ""
        return f"not known {name} (lower loads could not be judged{less})"
    much = f"{units.figure(config.requests_per_s_per_gpu)} requests/s a {unit}"
    if config.users_per_gpu is not None:
        users = units.amount(config.users_per_gpu)
        much = f"{users} {'user' if users == '1' else 'users'} a {unit}"
    rest = "the highest measured" if config.fails is None else f"{config.fails.load} does not"
    return f"{least}{much} {name} ({config.holds.load} holds, {rest})"


def _price(found: Capacity) -> str:
    """What the best takes for the rate asked for."""
    best = found.configs[0]
    if found.rps is None or best.servers is None:
        return ""
    gpus = f", {units.count(best.gpus_needed)} GPUs" if best.gpus_needed is not None else ""
    return (
        f" {units.amount(found.rps)} requests/s take {units.count(best.servers)} servers{gpus} of "
        f"the first, {units.percent(found.headroom)} of each kept free."
    )


Cell = Callable[[ConfigCapacity], str]


def ranking(found: Capacity, names: list[str], width: int) -> Section:
    """A row a config."""

    def at(config: ConfigCapacity, figure: Callable[[CapacityLoad], float | None]) -> str:
        return units.figure(figure(config.holds)) if config.holds is not None else units.MISSING

    columns = (
        ("holds\nat", "border", 0, lambda c: c.holds.load if c.holds else units.MISSING),
        ("no more\nat", "border", 0, lambda c: c.fails.load if c.fails else units.MISSING),
        ("GPUs a\nserver", "GPUs a server", 5, lambda c: units.count(c.gpus)),
        ("users\na GPU", "users a GPU", 1, lambda c: units.amount(c.users_per_gpu)),
        ("req/s\na GPU", "requests/s a GPU", 2, lambda c: units.figure(c.requests_per_s_per_gpu)),
        ("output\ntok/s", "output", 6, lambda c: at(c, lambda h: h.output_tokens_per_s)),
        ("goodput\nreq/s", "goodput", 3, lambda c: at(c, lambda h: h.goodput_rps)),
        ("servers", "servers", 2, lambda c: units.count(c.servers)),
        ("GPUs", "GPUs", 2, lambda c: units.count(c.gpus_needed)),
        ("cost per\nM tokens", "cost", 2, lambda c: units.figure(c.cost_per_million)),
    )
    cells: tuple[tuple[str, str, int, Cell], ...] = columns
    absent = {
        "goodput": not found.limits,
        "servers": found.rps is None,
        "GPUs": found.rps is None,
        "cost": found.gpu_price_per_h is None,
    }
    table = [
        Column("config", [page.short(name) for name in names], left=True),
        *(
            Column(head, [cell(config) for config in found.configs], drop, name)
            for head, name, drop, cell in cells
            if not absent.get(name)
        ),
    ]
    notes = [line for note in _notes(found) for line in wrapped(note, width, style="dim")]
    title = wrapped("Configs, most requests/s a GPU first", width, style="bold")
    return [*title, *page.grid(table, width), *notes]


def _notes(found: Capacity) -> list[str]:
    """What the figures stand on."""
    notes = []
    if found.mix is not None:
        mix = ", ".join(f"{name} {units.percent(share)}" for name, share in found.mix.items())
        notes.append(f"Mix: {mix}; each request weighs its category's share, rates by mean E2EL.")
    if found.rps is not None or found.gpu_price_per_h is not None:
        notes.append(
            f"Servers and cost: of the measured load inside, {units.percent(found.headroom)} kept "
            "free (--headroom)."
        )
    if found.limits:
        notes.append(f"Goodput: {page.listed(bound(of) for of in found.limits)} for each request.")
    if any(config.gpus is not None for config in found.configs):
        notes.append("GPUs a server: as --gpus said, or gpus or tensor_parallel in its config.")
    if any(config.gpus is None for config in found.configs):
        notes.append("Where the GPUs of a server are not told, figures a GPU are of a server.")
    bases = dict.fromkeys(load.basis for c in found.configs for load in c.loads if load.basis)
    if bases:
        notes.append(f"Rates a second: {page.listed(bases)} phase.")
    return notes


def loads(found: Capacity, config: ConfigCapacity, name: str, width: int) -> Section:
    """A row a load: the figures that the bounds are about."""
    rows = config.loads
    columns = [
        Column("load", [load.load for load in rows], left=True),
        *(
            Column(_head(of), [_cell(of, load.figures[n]) for load in rows])
            for n, of in enumerate(found.bounds)
        ),
        Column(
            "inside", [{True: "yes", False: "no", None: "–"}[x.inside] for x in rows], left=True
        ),
        Column("req/s", [units.figure(load.requests_per_s) for load in rows], 3, "requests/s"),
        Column("output\ntok/s", [units.figure(x.output_tokens_per_s) for x in rows], 4, "output"),
    ]
    if found.limits:
        goodput = [units.figure(load.goodput_rps) for load in rows]
        columns.append(Column("goodput\nreq/s", goodput, 2, "goodput"))
    columns.append(Column("requests", [units.count(load.requests) for load in rows], 5, "requests"))
    if found.mix is not None:
        columns += [
            Column("weigh\nas", [units.whole(load.weight_of) for load in rows], 2, "weigh as"),
            Column("req/s ±\n%", [units.hundredths(load.error) for load in rows], 1, "error"),
        ]
    return [*wrapped(f"Loads, {name}", width, style="bold"), *page.grid(columns, width)]


def _head(of: Bound) -> str:
    name = " ".join(filter(None, (of.statistic, SHORT.get(of.metric, of.metric))))
    return f"{name}\n{'ms' if in_seconds(of.metric) else ''}".rstrip()


def _cell(of: Bound, value: float | None) -> str:
    if value is not None and value == float("inf"):
        return "failed"
    return units.milliseconds(value) if in_seconds(of.metric) else units.figure(value)
