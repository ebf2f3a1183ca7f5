"""The report of advice on the draft length: what a step costs, and the k to use at each load.

Measured figures and predictions stand in tables of their own, and say which they are. Must not:
compute a figure, call a prediction a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence

from loadgen.errors import Bug
from loadgen.types import Advice, LoadAdvice, Study
from reports import page, units
from reports.page import Column, Section, wrapped

_MS = units.milliseconds

ONE_K = (
    "Ranges: one k was measured with drafts, which cannot tell what drafting costs at all from "
    "what each draft token costs. Measure another k to tell them apart."
)
LIMITS = {"": "", "drafts": "drafts are bad", "verification": "verification is dear"}


def render(study: Study) -> str:
    """The report as text, `study.width` cells wide at most; Bug: there is no advice."""
    if not study.advice:
        raise Bug("the report of advice was given a study without advice")
    width, several = study.width, len(study.summaries) > 1
    runs = [(f"[{n}]" if several else "", s) for n, s in enumerate(study.summaries, 1)]
    sections = [
        *(wrapped(verdict(advice), width, style="bold") for advice in study.advice),
        page.header([(label, s.info) for label, s in runs], width),
    ]
    for advice in study.advice:
        sections += [costs(advice, width), predictions(advice, width), schedules(advice, width)]
    sections += [page.caveats(runs, width), page.paths(study, [label for label, _ in runs])]
    return page.text_of(sections, study)


def verdict(advice: Advice) -> str:
    """The one sentence: the k by batch, or why there is no prediction and what is missing."""
    simulated = "SIMULATED: " if advice.server.simulated else ""
    what = f"{simulated}{advice.server.model} on {advice.server.engine} with {_method(advice)}"
    if advice.why_not:
        need = f" Missing: {advice.missing}." if advice.missing else ""
        return f"{what}: no prediction, as {advice.why_not}.{need}"
    uses = [
        f"{f'k = {k}' if k else 'no speculation'} at {_range(first, last)}"
        for first, last, k in advice.schedule
    ]
    last = advice.loads[-1]
    most = max(last.lengths, key=lambda one: one.k)
    return (
        f"{what}, predicted: {'; '.join(uses)} requests in flight. At {last.load}, k = {most.k} "
        f"makes a step {units.ratio(most.cost)} as long for an acceptance length of "
        f"{units.number(most.acceptance_length)}: user speed {units.ratio(most.speedup_user)}."
    )


def _method(advice: Advice) -> str:
    return advice.method or "a drafter of unknown kind"


def _range(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}–{last}"


def costs(advice: Advice, width: int) -> Section:
    """Measured step times beside the fit."""
    points = sorted(advice.points, key=lambda p: (p.batch, p.k))
    if not points:
        return wrapped("No step time is known in these runs.", width)
    fitted = any(point.fitted_s is not None for point in points)
    columns = [
        Column("load", [p.load for p in points], left=True),
        Column("in\nflight", [units.whole(p.batch) for p in points], 2, "in flight"),
        Column("k", [str(p.k) for p in points]),
        Column("AL", [units.number(p.acceptance_length) for p in points]),
        Column("step time\nms", [_MS(p.step_time_s) for p in points]),
    ]
    if fitted:
        columns += [
            Column("fit\nms", [_MS(p.fitted_s) for p in points]),
            Column("of it\ndrafting\nms", [_MS(p.drafting_s) for p in points], 1, "drafting"),
        ]
    title = f"Step time against requests in flight and k, measured, {_method(advice)}"
    note = ""
    if fitted and advice.residual is not None:
        note = (
            f"Fit: root mean square error {units.percent(advice.residual)} of a step, R² "
            f"{units.number(advice.r_squared)}, over {len(points)} phases."
        )
    elif fitted:
        note = f"Fit: {len(points)} phases are too few to say how well it fits."
    grid = page.grid(columns, width)
    return [*wrapped(title, width, style="bold"), *grid, *(_dim(note, width) if note else [])]


def _dim(text: str, width: int) -> Section:
    return wrapped(text, width, style="dim")


def predictions(advice: Advice, width: int) -> Section:
    """Speedup by load and k; the best of a row has a mark."""
    if not advice.loads:
        return []
    depths = range(1, len(advice.loads[0].lengths))
    columns = [
        Column("load", [row.load for row in advice.loads], left=True),
        *(
            Column(f"k = {k}", [_speedup(row, k) for row in advice.loads], left=True)
            for k in depths
        ),
        Column("use\nk", [str(row.best) for row in advice.loads]),
        Column("longest k", [_remark(row) for row in advice.loads], 1, left=True),
    ]
    lengths = ", ".join(
        f"{units.number(one.acceptance_length)} at k = {one.k}"
        for one in advice.loads[0].lengths
        if one.k
    )
    title = "User speed over no speculation, predicted: AL × step time without ÷ with"
    near = any(row.near for row in advice.loads)
    return [
        *wrapped(title, width, style="bold"),
        *page.grid(columns, width),
        *_dim(f"AL from joint acceptance, pooled over steps and loads: {lengths}.", width),
        *(_dim("~ another k is within the error of the best.", width) if near else []),
        *(
            _dim(ONE_K, width)
            if any(one.speedup_user_low for one in advice.loads[0].lengths)
            else []
        ),
    ]


def _speedup(row: LoadAdvice, k: int) -> str:
    one = row.lengths[k]
    low = "" if one.speedup_user_low is None else f"{units.number(one.speedup_user_low)}–"
    return low + units.ratio(one.speedup_user) + (" ●" if row.best == k else "")


def _remark(row: LoadAdvice) -> str:
    return page.joined((LIMITS[row.limit], "~" if row.near else ""))


def schedules(advice: Advice, width: int) -> Section:
    """The schedule as engines read it, what it does not know, and the run that confirms it."""
    if not advice.loads:
        return []
    largest = advice.schedule[-1][1]
    lines: Sequence[tuple[str, str | None]] = (
        ("vLLM --speculative-config keys", advice.vllm),
        ("TensorRT-LLM speculative_config, 1.3 and later", advice.trtllm),
        ("TensorRT-LLM speculative_config, 1.2", advice.trtllm_1_2),
    )
    section = wrapped("As a schedule", width, style="bold")
    for name, text in lines:
        section += wrapped(f"{name}: {text or units.MISSING}", width, "  ", "    ")
    if advice.vllm is None:
        section += wrapped("No schedule: leave speculation off at these loads.", width, "  ", "  ")
    beyond = (
        f"Above {units.count(largest)} in flight nothing was measured. There vLLM keeps the last "
        "k, TensorRT-LLM 1.3 drafts nothing."
    )
    section += _dim(beyond, width)
    return section + wrapped(f"To confirm: {advice.confirm}.", width)
