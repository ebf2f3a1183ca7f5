"""Step time against batch and draft length, and the draft length to use at each load.

A decode step of b requests with k drafted tokens each is taken to last

    t(b, k) = a + m·√(1 + (n ÷ bend)²) + x·(1 − e^(−n ÷ τ)) + s·b + k·(d + e·b)

with n = b·(k + 1) + the tokens of other requests' prompts that it computes beside them: weights
read once, then arithmetic a token (a roofline with a rounded edge), the experts of a mixture that
more tokens wake, each request's own cost, and drafting. No coefficient is negative. Least squares
of relative errors; below `ENOUGH` points a straight line in n and k. Between the measured k of a
load the fit gives the shape, the measured times the level.

A drafter that is a model proposes the same first tokens whatever k is, so joint acceptance measured
at k gives the acceptance length (AL) of every k' < k: 1 + coverage × Σ joint[j ≤ k'], less what is
cut off at the end of an answer (O in DESIGN §4; by renewal theory it grows as Σ j·joint[j] ÷ AL).
speedup_user = AL × t(b, 0) ÷ t(b, k'). One measured k cannot tell what drafting costs at all from
what each draft token costs: the law takes it all for the latter, and a range goes to where it is
all the former (llama.cpp on a CPU lies in between). Never beyond the measured loads nor the longest
measured k. Must not: read a file, predict for a drafter that looks text up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from loadgen.errors import UserError
from loadgen.sides import incomparable
from loadgen.types import (
    Acceptance,
    Advice,
    ClosedLoop,
    DraftLength,
    LoadAdvice,
    PhaseSummary,
    RunInfo,
    StepPoint,
    Summary,
)
from loadgen.written import looks_text_up

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

ENOUGH = 10
"""Points from which on the bent law is fitted."""
BETTER = 0.8
"""A term for experts is taken where it leaves less than this share of the residual."""
NOTHING = Acceptance(source="none", state="unknown")
BENDS = [4 * 1.25**i for i in range(35)]
TAUS = (0.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)

Schedule = tuple[tuple[int, int, int], ...]


class Cell(NamedTuple):
    """One measured phase. `prompt`: other requests' prompt tokens that a decode step computed too
    (0.0 where input lengths are not known: the fit then puts them down to b and k), `share` of the
    steps had any."""

    phase: PhaseSummary
    load: str
    batch: float
    k: int
    step_s: float
    length: float
    prompt: float
    share: float


def advise(summaries: Sequence[Summary]) -> tuple[Advice, ...]:
    """An Advice for each drafter of each server. UserError: no run has speculation on."""
    bases = [s for s in summaries if s.info.server.state == "off"]
    drafters: dict[tuple[object, ...], list[Summary]] = {}
    for summary in summaries:
        if summary.info.server.state != "off":
            key = (*_server(summary.info), method(summary.info), _draft_model(summary.info))
            drafters.setdefault(key, []).append(summary)
    if not drafters:
        raise UserError(
            f"speculation is off in all {len(summaries)} runs, so there is no draft length to "
            "advise on. Add a run with a drafter at the same loads."
        )
    return tuple(_advice(runs, bases) for runs in drafters.values())


def _server(info: RunInfo) -> tuple[object, ...]:
    return info.server.engine, info.server.model, info.server.gpus


def method(info: RunInfo) -> str:
    """The drafter's name, as configured or else as the server reports it; "" unknown."""
    config = info.server.config
    if config is not None and config.spec is not None:
        return config.spec.method
    return info.server.spec_reported or ""


def _draft_model(info: RunInfo) -> str | None:
    config = info.server.config
    return config.spec.draft_model if config is not None and config.spec is not None else None


def _advice(runs: Sequence[Summary], bases: Sequence[Summary]) -> Advice:
    """One drafter's runs, at one k or several, with the baselines of the same server."""
    info = max((s.info for s in runs), key=lambda i: i.server.draft_depth or 0)
    same = [b for b in bases if _server(b.info) == _server(info)]
    alike = [b for b in same if not incomparable(b.info, info)]
    cells = [cell for s in (*alike, *runs) for cell in _cells(s)]
    found = Advice(
        server=info.server,
        method=method(info),
        runs=tuple(dict.fromkeys(s.info.run_id for s in (*alike, *runs))),
        points=tuple(_point(cell) for cell in cells),
    )
    why, missing, drafts = unpredictable(info), "", _drafts(cells)
    if not why:
        why, missing = _missing(info, same, alike, cells)
    if not why and drafts is None:
        why = "acceptance by position or draft coverage is not known"
        missing = "one on a server that tells accepted tokens by draft position"
    if why or drafts is None:
        return msgspec.structs.replace(found, why_not=why, missing=missing)
    return _predicted(found, cells, drafts)


def _cells(summary: Summary) -> list[Cell]:
    """The measured phases whose step time, k and requests in flight are known."""
    server, cells = summary.info.server, []
    k = 0 if server.state == "off" else server.draft_depth
    for phase in summary.phases:
        load = phase.load
        batch = phase.achieved_concurrency_p50
        if batch is None and isinstance(load, ClosedLoop):
            batch = float(load.concurrency)
        length = 1.0 if k == 0 else best(phase).acceptance_length
        if phase.step_time_s is None or k is None or not batch or length is None:
            continue
        prompt, share = phase.prompt_tokens_a_step or 0.0, phase.prompt_steps_share or 1.0
        batch = min(batch, server.max_running or math.inf)
        name = phase.name.split(" ")[0]
        cells.append(Cell(phase, name, batch, k, phase.step_time_s, length, prompt, share))
    return cells


def best(phase: PhaseSummary) -> Acceptance:
    """The source with acceptance by position, or else the first."""
    known = (a for a in phase.acceptance if a.joint_by_position and a.draft_coverage is not None)
    return next(known, (*phase.acceptance, NOTHING)[0])


def _point(cell: Cell) -> StepPoint:
    return StepPoint(
        load=cell.load,
        batch=cell.batch,
        k=cell.k,
        step_time_s=cell.step_s,
        acceptance_length=cell.length,
    )


def unpredictable(info: RunInfo) -> str:
    """Why joint acceptance at k says nothing about a shorter draft; "" for a model's chain."""
    name = "".join(c for c in method(info).lower() if c.isalnum())
    config = info.server.config
    spec = config.spec if config is not None else None
    if (
        spec is not None
        and spec.draft_tokens not in (None, spec.draft_depth, 0)
        and (spec.draft_depth is not None)
    ):
        return "it drafts a tree: acceptance by position is not that of a chain"
    if looks_text_up(name):
        return (
            "it looks drafts up in text: with another k it finds other matches at other places, so "
            "how often it drafts at all (coverage) changes, and is known only from a run at that k"
        )
    if name.startswith(("dflash", "dspark")):
        return "it drafts its block at once: a shorter block is another draft, not its beginning"
    if not any(known in name for known in ("draft", "eagle", "mtp", "medusa", "pard")):
        return f"how the drafter '{method(info) or 'unknown'}' works is not known to draftload"
    return ""


def _missing(
    info: RunInfo, same: Sequence[Summary], alike: Sequence[Summary], cells: Sequence[Cell]
) -> tuple[str, str]:
    """Why a prediction cannot be made of these runs, and the run that is missing; or two ""."""
    users = [getattr(load, "concurrency", None) for load in info.scenario.loads]
    loads = ",".join(str(n) for n in users if n is not None)
    without = f"the same server and prompts without speculation (k = 0), at -c {loads}"
    if not same:
        return "speedup is over the same server without speculation, and no such run is here", (
            without
        )
    if not alike:
        unlike = "; ".join(incomparable(same[0].info, info))
        return f"the run without speculation did other work ({unlike})", without
    known = {bool(cell.k): {c.load for c in cells if bool(c.k) == bool(cell.k)} for cell in cells}
    if len(known) < 2:
        side = "with" if False in known or not known else "without"
        return f"the step time {side} speculation is not known in any run", (
            "one whose report shows step times: the server or the chunks must tell decode steps"
        )
    if not known[False] & known[True]:
        return "no load was measured both with and without speculation", without
    return "", ""


# ── acceptance length at a shorter k ─────────────────────────────────────────────────────────────


class Drafts(NamedTuple):
    """Pooled over all loads at the longest k: drafted tokens are accepted alike at any load."""

    joint: tuple[float, ...]
    coverage: float
    delivered: float
    overrun: float

    def length(self, k: int) -> float:
        """Acceptance length with k drafted tokens, k at most the measured one."""
        gross, excess = self._gross(k)
        most, measured = self._gross(len(self.joint))
        cut = self.overrun * (excess / gross) / (measured / most) if measured else 0.0
        return gross * self.delivered / (self.delivered + cut)

    def _gross(self, k: int) -> tuple[float, float]:
        """Tokens a step before answers end, and Σ j·P(more than j)."""
        joint = [self.coverage * share for share in self.joint[:k]]
        return 1 + sum(joint), sum(j * share for j, share in enumerate(joint, 1))


def _drafts(cells: Sequence[Cell]) -> Drafts | None:
    longest = max((cell.k for cell in cells), default=0)
    found = [best(cell.phase) for cell in cells if cell.k == longest]
    known = [
        (a.joint_by_position, a.drafts, a.steps, a.acceptance_length, a.overrun_tokens)
        for a in found
        if a.joint_by_position and a.drafts and a.steps and a.acceptance_length is not None
    ]
    if not longest or not known or len(known) < len(found):
        return None
    drafts = sum(n for _, n, _, _, _ in known if n)
    steps = sum(n for _, _, n, _, _ in known if n)
    return Drafts(
        joint=tuple(
            sum((joint or ())[j] * (n or 0) for joint, n, _, _, _ in known) / drafts
            for j in range(longest)
        ),
        coverage=drafts / steps,
        delivered=sum((al or 0.0) * (n or 0) for _, _, n, al, _ in known),
        overrun=float(max(sum(o or 0 for _, _, _, _, o in known), 0)),
    )


# ── the fit ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Coefficients of the law. `bend` None: the straight line; `tau` 0: no experts.

    `levels`: k → (log batch, measured ÷ fitted) of the loads measured at that k.
    """

    bend: float | None
    tau: float
    coefficients: tuple[float, ...]
    levels: Mapping[int, tuple[Sequence[float], Sequence[float]]]

    def law(self, batch: float, k: float, prompt: float, share: float) -> float:
        """Seconds of a step by the law alone."""
        import numpy as np

        at = (np.array([value]) for value in (batch, k, prompt, share))
        return float(terms(*at, bend=self.bend, tau=self.tau)[0] @ np.array(self.coefficients))

    def time(self, batch: float, k: int, prompt: float, share: float) -> float:
        """Seconds of a step: the law at the level of what was measured about it."""
        import numpy as np

        at = math.log(batch)
        levels = {n: float(np.interp(at, *known)) for n, known in self.levels.items()}
        level = float(np.interp(k, [*levels], [*levels.values()]))
        return self.law(batch, k, prompt, share) * level

    def drafting(self, batch: float, k: int) -> float:
        """Seconds of the law's drafting: its terms in k and k·b."""
        first = 2 if self.bend is None else 3
        d, *rest = self.coefficients[first:]
        return k * (d + (rest[0] * batch if rest else 0.0))


def terms(
    batch: Floats, k: Floats, prompt: Floats, share: Floats, *, bend: float | None, tau: float = 0.0
) -> Floats:
    """The law's terms, a row a step: a mean over steps with prompts beside them and without."""
    import numpy as np

    one, alone = np.ones_like(batch), batch * (k + 1)
    if bend is None:
        return np.stack([one, alone + prompt, k], axis=1)
    crowded = alone + prompt / share

    def mean(of: Callable[[Floats], Floats]) -> Floats:
        return share * of(crowded) + (1 - share) * of(alone)

    columns = [one, mean(lambda n: np.hypot(1, n / bend)), batch, k, k * batch]
    if tau:
        columns.append(mean(lambda n: 1 - np.exp(-n / tau)))
    return np.stack(columns, axis=1)


def fit(cells: Sequence[Cell]) -> Fit:
    """The law with the least relative error over the cells."""
    import numpy as np

    batch, k, prompt, share, times = (
        np.array([getattr(c, name) for c in cells], dtype=np.float64)
        for name in ("batch", "k", "prompt", "share", "step_s")
    )
    few = len(cells) < ENOUGH
    least, chosen = math.inf, Fit(bend=None, tau=0.0, coefficients=(), levels={})
    for tau in (0.0,) if few else TAUS:
        for bend in (None,) if few else BENDS:
            rows = terms(batch, k, prompt, share, bend=bend, tau=tau) / times[:, None]
            found = _not_negative(rows)
            error = float(np.sqrt(np.mean((rows @ found - 1) ** 2)))
            if error < least * (BETTER if tau and not chosen.tau else 1.0):
                least = error
                chosen = Fit(bend=bend, tau=tau, coefficients=tuple(map(float, found)), levels={})
    return replace(chosen, levels=_levels(chosen, cells))


def _levels(law: Fit, cells: Sequence[Cell]) -> dict[int, tuple[list[float], list[float]]]:
    """Measured ÷ fitted at each k, over the logarithm of the batch; repeats are averaged."""
    ordered = sorted(cells, key=lambda c: (c.k, c.batch))
    levels: dict[int, tuple[list[float], list[float]]] = {}
    for depth, group in groupby(ordered, key=lambda c: c.k):
        at: list[float] = []
        ratios: list[float] = []
        for size, same in groupby(group, key=lambda c: c.batch):
            known = [c.step_s / law.law(c.batch, c.k, c.prompt, c.share) for c in same]
            at.append(math.log(size))
            ratios.append(sum(known) / len(known))
        levels[depth] = (at, ratios)
    return levels


def _not_negative(rows: Floats) -> Floats:
    """Least squares of rows @ x = 1 with x ≥ 0: the most negative term leaves until none is."""
    import numpy as np

    kept = list(range(rows.shape[1]))
    while True:
        some = np.linalg.lstsq(rows[:, kept], np.ones(rows.shape[0]), rcond=None)[0]
        weight = some * np.linalg.norm(rows[:, kept], axis=0)
        if weight.min() >= -1e-12:
            break
        kept.pop(int(weight.argmin()))
    found = np.zeros(rows.shape[1])
    found[kept] = np.maximum(some, 0)
    return found


# ── predictions ──────────────────────────────────────────────────────────────────────────────────


def _predicted(advice: Advice, cells: Sequence[Cell], drafts: Drafts) -> Advice:
    law = fit(cells)
    residual, r_squared = _quality(law, cells)
    depths = range(len(drafts.joint) + 1)
    one_k = len({c.k for c in cells if c.k}) == 1

    def low(batch: float, k: int, length: float, time: float, base: float) -> float | None:
        if not one_k or k in (0, depths[-1]):
            return None
        return length * base / (time + law.drafting(batch, depths[-1]) - law.drafting(batch, k))

    def lengths(batch: float) -> tuple[DraftLength, ...]:
        known = [(k, drafts.length(k)) for k in depths]
        times = [law.time(batch, k, *_prompts(cells, batch, k, length)) for k, length in known]
        return tuple(
            DraftLength(
                k=k,
                acceptance_length=length,
                step_time_s=time,
                cost=time / times[0],
                speedup_user=length * times[0] / time,
                speedup_user_low=low(batch, k, length, time, times[0]),
            )
            for (k, length), time in zip(known, times, strict=True)
        )

    both = {c.load for c in cells if not c.k} & {c.load for c in cells if c.k}
    batches = {load: [c.batch for c in cells if c.load == load] for load in both}
    means = sorted((sum(b) / len(b), load) for load, b in batches.items())
    tables = {load: lengths(batch) for batch, load in means}
    cheapest = min(table[-1].cost for table in tables.values())
    loads = tuple(
        _load(load, batch, tables[load], residual or 0.0, cheapest) for batch, load in means
    )
    sizes = range(max(round(means[0][0]), 1), max(round(means[-1][0]), 1) + 1)
    schedule = _schedule([(size, _best(lengths(float(size)))) for size in sizes])
    return msgspec.structs.replace(
        advice,
        points=tuple(
            msgspec.structs.replace(
                point,
                fitted_s=law.law(cell.batch, cell.k, cell.prompt, cell.share),
                drafting_s=law.drafting(cell.batch, cell.k),
            )
            for point, cell in zip(advice.points, cells, strict=True)
        ),
        residual=residual,
        r_squared=r_squared,
        loads=loads,
        schedule=schedule,
        vllm=vllm_keys(schedule),
        trtllm=trtllm_keys(schedule, upper=True),
        trtllm_1_2=trtllm_keys(schedule, upper=False),
        confirm=_confirm(loads, cells),
    )


def _prompts(cells: Sequence[Cell], batch: float, k: int, length: float) -> tuple[float, float]:
    """Prompt tokens beside a step, and the share of steps with any: as measured without speculation
    or, a delivered token, with it."""
    import numpy as np

    side = sorted((c for c in cells if bool(c.k) == bool(k)), key=lambda c: c.batch)
    at = [c.batch for c in side]
    tokens = float(np.interp(batch, at, [c.prompt / c.length for c in side])) * length
    share = float(np.interp(batch, at, [c.share / c.length for c in side])) * length
    return tokens, min(share, 1.0)


def _quality(law: Fit, cells: Sequence[Cell]) -> tuple[float | None, float | None]:
    """Root mean square of relative errors, and R² of the seconds; None: nothing is left to err."""
    free = len(cells) - len(law.coefficients) - (0 if law.bend is None else 1 + bool(law.tau))
    if free < 1:
        return None, None
    times = [c.step_s for c in cells]
    errors = [law.law(c.batch, c.k, c.prompt, c.share) - c.step_s for c in cells]
    mean = sum(times) / len(times)
    spread = sum((t - mean) ** 2 for t in times)
    relative = sum((e / t) ** 2 for e, t in zip(errors, times, strict=True)) / len(times)
    return math.sqrt(relative), 1 - sum(e * e for e in errors) / spread if spread else None


def _best(lengths: Sequence[DraftLength]) -> int:
    """The shortest of those that are fastest."""
    return max(lengths, key=lambda one: (one.speedup_user, -one.k)).k


def _load(
    load: str, batch: float, lengths: tuple[DraftLength, ...], residual: float, cheapest: float
) -> LoadAdvice:
    chosen, last = _best(lengths), lengths[-1]
    bar = lengths[chosen].speedup_user * (1 - residual)
    bar = min(bar, lengths[chosen].speedup_user_low or bar)
    limit: Literal["", "drafts", "verification"] = ""
    if last.acceptance_length < last.cost:
        limit = "drafts" if last.acceptance_length < cheapest else "verification"
    return LoadAdvice(
        load=load,
        batch=batch,
        lengths=lengths,
        best=chosen,
        near=any(one.speedup_user > bar for one in lengths if one.k != chosen),
        limit=limit,
    )


def _schedule(chosen: Sequence[tuple[int, int]]) -> Schedule:
    """(first batch, last batch, k): from 1, as both engines ask, to the largest measured."""
    ranges: list[tuple[int, int, int]] = []
    for size, k in chosen:
        if ranges and ranges[-1][2] == k:
            ranges[-1] = (ranges[-1][0], size, k)
        else:
            ranges.append((ranges[-1][1] + 1 if ranges else 1, size, k))
    return tuple(ranges)


def vllm_keys(schedule: Schedule) -> str | None:
    """For --speculative-config: [first, last, k], both ends inclusive, from 1 without overlap; a
    larger batch keeps the last k (vLLM 0.25 documentation, "Dynamic Speculative Decoding")."""
    deepest = max(k for _, _, k in schedule)
    if not deepest:
        return None
    keys = {
        "num_speculative_tokens": deepest,
        "num_speculative_tokens_per_batch_size": [list(row) for row in schedule],
    }
    return json.dumps(keys)[1:-1]


def trtllm_keys(schedule: Schedule, *, upper: bool) -> str | None:
    """For speculative_config. `upper`: a key is the largest batch of its length and a batch beyond
    all keys drafts nothing (TensorRT-LLM 1.3 and later, llm_args.py); else a key is the smallest
    (1.2). The first length must be max_draft_len: None where it is not the longest."""
    deepest = max(k for _, _, k in schedule)
    if not deepest or schedule[0][2] != deepest:
        return None
    rows = schedule[:-1] if upper and not schedule[-1][2] else schedule
    keys = ", ".join(f"{last if upper else first}: {k}" for first, last, k in rows)
    return f"max_draft_len: {deepest}, draft_len_schedule: {{{keys}}}"


def _confirm(loads: Sequence[LoadAdvice], cells: Sequence[Cell]) -> str:
    """The runs that would prove the advice: those of its k that nobody measured at that load."""
    measured = {(cell.load, cell.k) for cell in cells}
    wanted: dict[int, list[str]] = {}
    for row in loads:
        if (row.load, row.best) not in measured:
            wanted.setdefault(row.best, []).append(row.load)
    runs = "; ".join(f"k = {k} at {', '.join(at)}" for k, at in wanted.items())
    if runs:
        return f"run {runs}, with the same prompts and three repeats, and compare with the baseline"
    longest = max(cell.k for cell in cells)
    if any(row.best == longest for row in loads):
        return (
            f"every advised k was measured; k = {longest + 1} was not, and may be better at "
            f"{', '.join(row.load for row in loads if row.best == longest)}"
        )
    return "every advised k was measured: compare those runs with the baseline, three repeats each"
