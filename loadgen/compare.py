"""A side with speculation against its baseline: speedups, acceptance, output differences.

speedup_user = (Σ decode tokens ÷ Σ decode time) with ÷ without, over dialogues completed in both,
paired by dialogue; speedup_throughput = steady output tokens/s with ÷ without at the same load.
Phases are paired by load and repeat. From three repeats that took turns a ratio is the geometric
mean of the repeats', its interval Student's t of their logarithms, and a mark may be given: noise
between runs is in it. One or two repeats give a within-run interval (a paired bootstrap over
dialogues) and no mark. Must not: read a file, mark an effect that the repeats do not carry.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from loadgen.errors import UserError
from loadgen.sides import as_one, incomparable, refuse, took_turns
from loadgen.stats import ENOUGH, FEWEST, interval, over_repeats, pooled, ratio, ratio_of_ratios
from loadgen.types import (
    CategoryComparison,
    CategorySummary,
    Caveat,
    ClosedLoop,
    Comparison,
    DialogueFigures,
    Interval,
    Load,
    LoadComparison,
    Mark,
    OpenLoop,
    OutputDifference,
    PhaseSummary,
    RepeatComparison,
    RunInfo,
    Speedup,
    Summary,
)
from loadgen.written import load_label, load_order

WITHIN_RUN = "within-run interval: paired "
"""What an interval of one repeat is: noise between runs is not in it."""

STEP_TIME_FELL = 0.9
"""Below this ratio a step with drafts was quicker than one without, or a fuller batch quicker than
a smaller one, which cannot be."""
STEP_TIMES_APART = 1.25
"""Repeats of one load do the same work, and step times of a machine that is left alone agree to a
few percent. A quarter more is another machine."""

Pair = tuple[DialogueFigures, DialogueFigures]
Phases = tuple[PhaseSummary, PhaseSummary]
Statistic = Callable[[Any], Any]
Columns = list[tuple[float, ...]]


def compare(base: Summary, spec: Summary, *, force: bool = False) -> Comparison:
    """`spec` over `base`, each as `sides.joined` made it. UserError: they did not do the same work
    (`force` compares anyway), or have no load in common."""
    unlike = incomparable(base.info, spec.info)
    if unlike and not force:
        raise refuse(base.info, spec.info, unlike)
    before = {(p.load, p.repeat): p for p in base.phases}
    loads: dict[Load, list[Phases]] = {}
    for phase in spec.phases:
        if (found := before.get((phase.load, phase.repeat))) is not None:
            loads.setdefault(phase.load, []).append((found, phase))
    if not loads:
        raise UserError(
            f"runs {base.info.run_id} and {spec.info.run_id} have no load in common: "
            f"{_loads(base.phases)} against {_loads(spec.phases)}. Run both at the same loads."
        )
    greedy = base.info.scenario.sampling.temperature == 0
    compared = tuple(
        _load(pairs, took_turns(base, spec, pairs), greedy) for pairs in loads.values()
    )
    return Comparison(
        base=base.info,
        spec=spec.info,
        loads=compared,
        differences=(*unlike, *differences(base.info, spec.info)),
        caveats=(
            *(caveat for load in compared for caveat in drifted(load.base, load.spec)),
            *(caveat for pairs in loads.values() for caveat in _repeats_apart(pairs)),
            *_quicker_when_fuller([load.base for load in compared]),
            *_left_over(base, spec),
        ),
        base_runs=base.run_ids or (base.info.run_id,),
        spec_runs=spec.run_ids or (spec.info.run_id,),
    )


def _left_over(base: Summary, spec: Summary) -> tuple[Caveat, ...]:
    """What only one side measured, and is in no figure."""
    sides = [{(p.load, p.repeat): p for p in side.phases} for side in (base, spec)]
    said = [
        f"{_loads([own[key] for key in own if key not in other])} of {name} only"
        for name, own, other in zip(("base", "spec"), sides, sides[::-1], strict=True)
        if own.keys() - other.keys()
    ]
    if not said:
        return ()
    return (
        Caveat(
            code="not-paired",
            message=f"Left out of every figure: {'; '.join(said)}.",
            advice="Measure both sides at the same loads and as often.",
        ),
    )


def _loads(phases: Iterable[PhaseSummary]) -> str:
    return ", ".join(
        load_label(p.load) + (f" repeat {p.repeat + 1}" if p.repeat else "") for p in phases
    )


_AGAIN = "Measure again on a machine that does nothing else, and repeat base and spec in turn."


def drifted(base: PhaseSummary, spec: PhaseSummary) -> tuple[Caveat, ...]:
    """A target pass that verifies drafts does more work than one that does not: where it took
    less time, the machine was not the same in both runs."""
    before, after = base.step_time_s, spec.step_time_s
    if not before or not after or after >= before * STEP_TIME_FELL:
        return ()
    return (
        Caveat(
            code="machine-drifted",
            message=f"A decode step took {after * 1e3:.1f} ms with speculation and "
            f"{before * 1e3:.1f} ms without, at the same load. Verifying drafts cannot make a step "
            "quicker, so the machine changed between the runs and the speedup is not to be "
            "believed.",
            advice=_AGAIN,
            phase=spec.name,
        ),
    )


def _repeats_apart(phases: Sequence[Phases]) -> Iterator[Caveat]:
    """One side's repeats of a load: a slow baseline, which any batch may hide beside drafts."""
    for side, name in zip(zip(*phases, strict=True), ("without", "with"), strict=True):
        known = sorted((p.step_time_s, p.name) for p in side if p.step_time_s)
        (low, _), (high, slow) = (known[0], known[-1]) if known else ((1.0, ""), (1.0, ""))
        if high > low * STEP_TIMES_APART:
            yield Caveat(
                code="machine-drifted",
                message=f"In repeats of one load a decode step {name} speculation took "
                f"{low * 1e3:.1f} and {high * 1e3:.1f} ms: the machine changed between them, and "
                "a mean over them is of neither.",
                advice=_AGAIN,
                phase=slow,
            )


def _quicker_when_fuller(bases: Sequence[PhaseSummary]) -> Iterator[Caveat]:
    """A step of a larger batch without drafts that took less time: the smaller load ran slow."""
    closed = [p for p in bases if isinstance(p.load, ClosedLoop)]
    for few, many in itertools.pairwise(sorted(closed, key=lambda p: load_order(p.load))):
        before, after = few.step_time_s, many.step_time_s
        if before and after and after < before * STEP_TIME_FELL:
            yield Caveat(
                code="machine-drifted",
                message=f"Without speculation a decode step took {before * 1e3:.1f} ms at "
                f"{load_label(few.load)} and {after * 1e3:.1f} ms at {load_label(many.load)}. A "
                "fuller batch cannot be quicker, so the machine was slow at the first: the "
                "speedup there is too high.",
                advice=_AGAIN,
                phase=few.name,
            )


def differences(base: RunInfo, spec: RunInfo) -> tuple[str, ...]:
    """What else is not the same, apart from speculation itself, asked for or resolved."""
    a, b = base.server, spec.server
    facts: list[tuple[str, object, object]] = [
        ("engine", a.engine, b.engine),
        ("engine version", a.version, b.version),
        ("context limit", a.max_model_len, b.max_model_len),
        ("running limit", a.max_running, b.max_running),
        ("GPUs", a.gpus, b.gpus),
        ("sampling defaults", _told(a.sampling_defaults), _told(b.sampling_defaults)),
        ("prefix cache off", a.honours.prefix_cache_off, b.honours.prefix_cache_off),
        ("client machine", base.client.machine, spec.client.machine),
        ("draftload", base.client.draftload, spec.client.draftload),
    ]
    if a.config is not None and b.config is not None:
        facts += [
            ("tensor parallel", a.config.tensor_parallel, b.config.tensor_parallel),
            ("extra arguments", " ".join(a.config.extra_args), " ".join(b.config.extra_args)),
            ("executable", " ".join(a.config.executable), " ".join(b.config.executable)),
        ]
    return tuple(
        f"{name}: {x if x not in (None, '') else '–'} → {y if y not in (None, '') else '–'}"
        for name, x, y in facts
        if x != y
    )


def _told(defaults: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in defaults.items())


def _load(phases: Sequence[Phases], turns: bool, greedy: bool) -> LoadComparison:
    """All repeats of one load; `turns`: they were interleaved."""
    base, spec = (as_one(side) for side in zip(*phases, strict=True))
    repeats = [paired(b, s) for b, s in phases]
    user = speedup_user(repeats, turns)
    throughput, basis, ratios = _throughput(phases, repeats, turns)
    verdict, why = _verdict(user, throughput, len(phases), turns)
    every = [pair for pairs in repeats for pair in pairs]
    return LoadComparison(
        load=spec.load,
        base=base,
        spec=spec,
        speedup_user=user,
        speedup_throughput=throughput,
        throughput_basis=basis,
        categories=_groups(base.categories, spec.categories, repeats, turns, lambda d: d.category),
        tiers=_groups(base.tiers, spec.tiers, repeats, turns, lambda d: d.tier),
        isl_buckets=_groups(
            base.isl_buckets, spec.isl_buckets, repeats, turns, lambda d: d.isl_bucket
        ),
        repeats=tuple(
            RepeatComparison(
                repeat=s.repeat,
                base_phase=b.name,
                spec_phase=s.name,
                speedup_user=_ratio(_decoded(pairs), ratio_of_ratios),
                speedup_throughput=found,
            )
            for (b, s), pairs, found in zip(phases, repeats, ratios, strict=True)
        ),
        verdict=verdict,
        why_no_verdict=why,
        outputs=differing((b.output, s.output) for b, s in every) if greedy else None,
        noise=_noise([b for b, _ in phases]) if greedy else None,
        output_length=_figure(repeats, _lengths, ratio, turns=False),
        speedup_by_dialogue=speedup_by_dialogue(every),
        speedup_expected=_expected(base, spec),
        queue_s=(_queue_s(base), _queue_s(spec)),
    )


def paired(base: PhaseSummary, spec: PhaseSummary) -> list[Pair]:
    """Dialogues completed in both, with as many turns."""
    without = {d.dialogue_id: d for d in base.dialogues}
    return [
        (without[d.dialogue_id], d)
        for d in spec.dialogues
        if d.dialogue_id in without and without[d.dialogue_id].turns == d.turns
    ]


# ── ratios, over repeats or within a run ─────────────────────────────────────────────────────────


def speedup_user(repeats: Sequence[Sequence[Pair]], turns: bool) -> Speedup | None:
    """Decode tokens a second with ÷ without, over paired dialogues; None without decode time."""
    return _figure(repeats, _decoded, ratio_of_ratios, turns)


def _figure(
    repeats: Sequence[Sequence[Pair]],
    columns_of: Callable[[Sequence[Pair]], Columns],
    statistic: Statistic,
    turns: bool,
) -> Speedup | None:
    """A statistic of column sums: over repeats from three on, else within the run."""
    ratios = [_ratio(columns_of(pairs), statistic) for pairs in repeats]
    known = [r for r in ratios if r is not None]
    columns = columns_of([pair for pairs in repeats for pair in pairs])
    if not known:
        return None
    if len(known) >= FEWEST:
        return _repeated(known, len(columns[0]), turns)
    return Speedup(
        ratio=float(statistic([float(sum(column)) for column in columns])),
        pairs=len(columns[0]),
        interval=interval(columns, statistic, what=WITHIN_RUN),
        repeats=len(known),
    )


def _repeated(ratios: Sequence[float], pairs: int, turns: bool) -> Speedup:
    """Three or more repeats; only those that took turns carry a mark."""
    limits = over_repeats(ratios, what="interleaved " if turns else "")
    return Speedup(
        ratio=statistics.geometric_mean(ratios),
        pairs=pairs,
        interval=limits,
        repeats=len(ratios),
        mark=_mark(limits) if turns else "?",
    )


def _mark(limits: Interval | None) -> Mark:
    if limits is None:
        return "?"
    return "pays" if limits.low > 1 else "costs" if limits.high < 1 else "no difference"


def _ratio(columns: Columns, statistic: Statistic) -> float | None:
    return float(statistic([float(sum(column)) for column in columns])) if columns else None


def _decoded(pairs: Sequence[Pair]) -> Columns:
    """Tokens and time with, tokens and time without: a column each, a pair a row."""
    rows = [
        (float(s.decode_tokens), s.decode_s, float(b.decode_tokens), b.decode_s)
        for b, s in pairs
        if s.decode_tokens and b.decode_tokens
        if min(s.decode_tokens, s.decode_s, b.decode_tokens, b.decode_s) > 0
    ]
    return list(zip(*rows, strict=True))


def _answered(pairs: Sequence[Pair]) -> Columns:
    """Σ osl ÷ Σ E2EL with and without, which a closed loop's throughput follows."""
    rows = [
        (float(s.osl_tokens), s.e2el_s, float(b.osl_tokens), b.e2el_s)
        for b, s in pairs
        if b.osl_tokens
    ]
    return list(zip(*rows, strict=True))


def _lengths(pairs: Sequence[Pair]) -> Columns:
    rows = [(float(s.osl_tokens), float(b.osl_tokens)) for b, s in pairs if b.osl_tokens]
    return list(zip(*rows, strict=True)) if any(s for s, _ in rows) else []


def _throughput(
    phases: Sequence[Phases], repeats: Sequence[Sequence[Pair]], turns: bool
) -> tuple[Speedup | None, str, list[float | None]]:
    """Steady where every phase is, else whole; its basis; each repeat's ratio. Within a run the
    interval is that of Σ osl ÷ Σ E2EL over the pairs, laid around the measured ratio; an open
    loop's throughput follows its arrivals instead, and has none."""
    steady = all(p.throughput.steady is not None for pair in phases for p in pair)
    basis: Literal["steady", "whole"] = "steady" if steady else "whole"
    rates = [(getattr(b.throughput, basis), getattr(s.throughput, basis)) for b, s in phases]
    ratios = [with_ / without if with_ and without else None for without, with_ in rates]
    known = [r for r in ratios if r is not None]
    if not known:
        return None, basis, ratios
    columns = _answered([pair for pairs in repeats for pair in pairs])
    count = len(columns[0]) if columns else 0
    if len(known) >= FEWEST:
        return _repeated(known, count, turns), basis, ratios
    middle = known[0] if len(known) == 1 else statistics.geometric_mean(known)
    closed = columns and not isinstance(phases[0][0].load, OpenLoop)
    limits = interval(columns, ratio_of_ratios, what=WITHIN_RUN) if closed else None
    if limits is not None and (centre := _ratio(columns, ratio_of_ratios)):
        limits = Interval(
            low=middle * limits.low / centre, high=middle * limits.high / centre, kind=limits.kind
        )
    return Speedup(ratio=middle, pairs=count, interval=limits, repeats=len(known)), basis, ratios


Verdict = Literal["pays", "no difference", "costs", "disagree"]


def _verdict(
    user: Speedup | None, throughput: Speedup | None, repeats: int, turns: bool
) -> tuple[Verdict | None, str]:
    """What both speedups say, or why nothing may be said."""
    if repeats < FEWEST:
        return None, f"{repeats} of the {FEWEST} interleaved repeats that a verdict needs"
    if not turns:
        return None, (
            "the repeats of base and spec did not take turns, so that a machine that drifts would "
            "look like an effect"
        )
    marks = {found.mark if found is not None else "?" for found in (user, throughput)}
    if "?" in marks:
        return None, "a speedup is not known in three repeats"
    if len(marks) > 1:
        return "disagree", ""
    (mark,) = marks
    return (None if mark == "?" else mark), ""


# ── categories, tiers, ISL buckets ───────────────────────────────────────────────────────────────


def _groups(
    base: Sequence[CategorySummary],
    spec: Sequence[CategorySummary],
    repeats: Sequence[Sequence[Pair]],
    turns: bool,
    name: Callable[[DialogueFigures], str | None],
) -> tuple[CategoryComparison, ...]:
    """speedup_user of each group; within a run, below ten dialogues with the spread of all."""
    own = {
        g.category: [[p for p in pairs if name(p[1]) == g.category] for pairs in repeats]
        for g in spec
    }
    flat = {group: _decoded([p for pairs in own[group] for p in pairs]) for group in own}
    columns = {group: found for group, found in flat.items() if found}
    shared = pooled([*columns.values()], ratio_of_ratios, what=WITHIN_RUN)
    limits = dict(zip(columns, shared, strict=True))
    before = {g.category: g for g in base}
    compared = []
    for group in spec:
        speedup = speedup_user(own[group.category], turns)
        if speedup is not None and speedup.repeats < FEWEST and speedup.pairs < ENOUGH:
            speedup = Speedup(
                ratio=speedup.ratio,
                pairs=speedup.pairs,
                interval=limits[group.category],
                repeats=speedup.repeats,
            )
        compared.append(
            CategoryComparison(
                category=group.category,
                speedup_user=speedup,
                acceptance=group.acceptance,
                steps=group.acceptance.steps if group.acceptance is not None else None,
                base=before.get(group.category),
                spec=group,
            )
        )
    return tuple(compared)


# ── answers ──────────────────────────────────────────────────────────────────────────────────────

Output = bytes | str | None


def differing(pairs: Iterable[tuple[Output, Output]]) -> OutputDifference | None:
    """How many pairs of answers differ, and from where. Ids are never held against text; None
    where no pair can be compared."""
    compared = 0
    places: list[int] = []
    kinds = set()
    for a, b in pairs:
        if a is None or type(a) is not type(b):
            continue
        compared += 1
        kinds.add("token" if isinstance(a, bytes) else "character")
        if a != b and b is not None:
            places.append(_first_difference(a, b))
    if not compared:
        return None
    return OutputDifference(
        compared=compared,
        differ=len(places),
        first_p50=statistics.median(places) if places else None,
        unit="character"
        if kinds == {"character"}
        else "token"
        if len(kinds) == 1
        else "token or character",
    )


def _first_difference(a: bytes | str, b: bytes | str) -> int:
    """Index of the first token (four bytes) or character; where the shorter ends, if all agree."""
    shorter = min(len(a), len(b))
    at = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    return at // 4 if isinstance(a, bytes) else at


def _noise(bases: Sequence[PhaseSummary]) -> OutputDifference | None:
    """Base against base: each repeat against the one before, or uses of one prompt in one phase."""
    if len(bases) > 1:
        pairs = [pair for two in itertools.pairwise(bases) for pair in paired(*two)]
    else:
        uses: dict[str, list[DialogueFigures]] = {}
        for dialogue in bases[0].dialogues:
            uses.setdefault(dialogue.prompt_id, []).append(dialogue)
        pairs = [p for used in uses.values() for p in itertools.pairwise(used)]
    return differing((a.output, b.output) for a, b in pairs if a.turns == b.turns)


# ── other figures of a load ──────────────────────────────────────────────────────────────────────


def speedup_by_dialogue(pairs: Sequence[Pair]) -> float | None:
    """Spec-Bench's speedup (evaluation/speed.py): mean over dialogues of output tokens ÷ wall
    time, prefill included, with ÷ without. To be set beside published ones."""
    rates = [
        (s.osl_tokens / s.e2el_s, b.osl_tokens / b.e2el_s)
        for b, s in pairs
        if s.e2el_s > 0 and b.e2el_s > 0
    ]
    with_, without = (sum(side) for side in zip(*rates, strict=True)) if rates else (0.0, 0.0)
    return with_ / without if without else None


def expected_speedup(base_step_s: float, spec_step_s: float, acceptance_length: float) -> float:
    """AL tokens in the time of a step with drafts, against one in that of a step without."""
    return base_step_s * acceptance_length / spec_step_s


def _expected(base: PhaseSummary, spec: PhaseSummary) -> float | None:
    """From both step times and AL; the base's steps give one token where it does not speculate."""
    a, b = spec.acceptance[:1], base.acceptance[:1]
    length = a[0].acceptance_length if a else None
    before = (1.0 if b[0].state == "off" else b[0].acceptance_length) if b else None
    if not (length and before and base.step_time_s and spec.step_time_s):
        return None
    return expected_speedup(base.step_time_s, spec.step_time_s, length / before)


def _queue_s(phase: PhaseSummary) -> float | None:
    """As the server says; else by Little's law: the median of requests that waited at the server ÷
    requests done a second."""
    if phase.server is None:
        return None
    if phase.server.queue_time_s is not None:
        return phase.server.queue_time_s
    waiting, done = phase.server.waiting_p50, phase.requests.completed
    return waiting * phase.span_s / done if waiting is not None and done else None
