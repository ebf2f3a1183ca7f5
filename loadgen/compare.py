"""A run with speculation against its baseline: speedups, acceptance, output differences.

speedup_user = (Σ decode tokens ÷ Σ decode time) with ÷ without, over dialogues completed in both,
paired by dialogue; speedup_throughput = steady output tokens/s with ÷ without at the same load. One
repeat gives a ratio and a within-run interval (a paired bootstrap over dialogues) and no verdict:
noise between runs is not in it. Must not: say "pays", read a file.
"""

from __future__ import annotations

from collections.abc import Sequence

from loadgen.errors import UserError
from loadgen.stats import ENOUGH, interval, pooled, ratio_of_ratios
from loadgen.types import (
    CategoryComparison,
    Caveat,
    Comparison,
    DialogueFigures,
    Interval,
    LoadComparison,
    OpenLoop,
    PhaseSummary,
    RunInfo,
    Speedup,
    Summary,
)
from loadgen.written import load_label

WITHIN_RUN = "within-run interval: paired "
"""What an interval of one repeat is: noise between runs is not in it."""

STEP_TIME_FELL = 0.9
"""Below this ratio a step with drafts was quicker than one without, which cannot be."""

Pair = tuple[DialogueFigures, DialogueFigures]


def compare(base: Summary, spec: Summary, *, force: bool = False) -> Comparison:
    """`spec` over `base`. UserError: they did not do the same work (`force` compares anyway)."""
    unlike = incomparable(base.info, spec.info)
    if unlike and not force:
        raise UserError(
            f"runs {base.info.run_id} and {spec.info.run_id} cannot be compared: "
            f"{'; '.join(unlike)}. Expected the same prompts, sampling and templating; run both "
            "again alike, or give --force to compare all the same."
        )
    before = {(p.load, p.repeat): p for p in base.phases}
    pairs = [(before[key], p) for p in spec.phases if (key := (p.load, p.repeat)) in before]
    if not pairs:
        raise UserError(
            f"runs {base.info.run_id} and {spec.info.run_id} have no load in common: "
            f"{_loads(base)} against {_loads(spec)}. Run both at the same loads."
        )
    greedy = base.info.scenario.sampling.temperature == 0
    return Comparison(
        base=base.info,
        spec=spec.info,
        loads=tuple(_load(b, s, greedy) for b, s in pairs),
        differences=(*unlike, *differences(base.info, spec.info)),
        caveats=tuple(caveat for b, s in pairs for caveat in drifted(b, s)),
    )


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
            advice="Measure again on a machine that does nothing else, and repeat base and "
            "spec in turn.",
            phase=spec.name,
        ),
    )


def incomparable(base: RunInfo, spec: RunInfo) -> tuple[str, ...]:
    """What makes two runs different work: each as "what: base → spec"."""
    facts = (
        ("prompts", base.prompts_sha256[:12], spec.prompts_sha256[:12]),
        ("sampling", _sampling(base), _sampling(spec)),
        ("API", base.server.api, spec.server.api),
        ("model", base.server.model, spec.server.model),
        ("simulated", base.server.simulated, spec.server.simulated),
    )
    return tuple(f"{name}: {a} → {b}" for name, a, b in facts if a != b)


def differences(base: RunInfo, spec: RunInfo) -> tuple[str, ...]:
    """What else is not the same, apart from speculation itself, asked for or resolved."""
    a, b = base.server, spec.server
    facts: list[tuple[str, object, object]] = [
        ("engine", a.engine, b.engine),
        ("engine version", a.version, b.version),
        ("context limit", a.max_model_len, b.max_model_len),
        ("running limit", a.max_running, b.max_running),
        ("GPUs", a.gpus, b.gpus),
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


def _sampling(info: RunInfo) -> str:
    s = info.scenario.sampling
    eos = ", EOS ignored" if s.ignore_eos else ""
    return f"T {s.temperature:g}, top_p {s.top_p:g}, ≤ {s.max_output_tokens} tokens{eos}"


def _loads(summary: Summary) -> str:
    return ", ".join(load_label(p.load) for p in summary.phases)


def _load(base: PhaseSummary, spec: PhaseSummary, greedy: bool) -> LoadComparison:
    without = {d.dialogue_id: d for d in base.dialogues}
    pairs = [
        (without[d.dialogue_id], d)
        for d in spec.dialogues
        if d.dialogue_id in without and without[d.dialogue_id].turns == d.turns
    ]
    throughput, basis = _throughput(base, spec, pairs)
    outputs = [(b.output, s.output) for b, s in pairs if b.output and s.output] if greedy else []
    return LoadComparison(
        load=spec.load,
        repeat=spec.repeat,
        base=base,
        spec=spec,
        speedup_user=speedup_user(pairs),
        speedup_throughput=throughput,
        throughput_basis=basis,
        categories=_categories(spec, pairs),
        outputs_compared=len(outputs),
        outputs_differ=sum(b != s for b, s in outputs),
    )


def speedup_user(pairs: Sequence[Pair]) -> Speedup | None:
    """Decode tokens a second with ÷ without, over paired dialogues; None without decode time."""
    columns = _decoded(pairs)
    if not columns:
        return None
    return Speedup(
        ratio=ratio_of_ratios([float(sum(column)) for column in columns]),
        pairs=len(columns[0]),
        interval=interval(columns, ratio_of_ratios, what=WITHIN_RUN),
    )


def _decoded(pairs: Sequence[Pair]) -> list[tuple[float, ...]]:
    """Tokens and time with, tokens and time without: a column each, a pair a row."""
    rows = [
        (float(s.decode_tokens), s.decode_s, float(b.decode_tokens), b.decode_s)
        for b, s in pairs
        if s.decode_tokens and b.decode_tokens and s.decode_s > 0 and b.decode_s > 0
    ]
    return list(zip(*rows, strict=True))


def _throughput(
    base: PhaseSummary, spec: PhaseSummary, pairs: Sequence[Pair]
) -> tuple[Speedup | None, str]:
    """Steady where both are, else whole. The interval is that of Σ osl ÷ Σ E2EL over the pairs,
    which a closed loop's throughput follows, laid around the measured ratio. An open loop's
    follows its arrivals, and has none."""
    basis = "steady"
    with_, without = spec.throughput.steady, base.throughput.steady
    if with_ is None or without is None:
        basis, with_, without = "whole", spec.throughput.whole, base.throughput.whole
    if not with_ or not without:
        return None, basis
    ratio = with_ / without
    rows = [(s.osl_tokens, s.e2el_s, b.osl_tokens, b.e2el_s) for b, s in pairs if b.osl_tokens]
    limits = None
    if rows and not isinstance(spec.load, OpenLoop):
        columns = list(zip(*rows, strict=True))
        centre = ratio_of_ratios([float(sum(column)) for column in columns])
        limits = interval(columns, ratio_of_ratios, what=WITHIN_RUN)
        if limits is not None:
            limits = Interval(
                low=ratio * limits.low / centre, high=ratio * limits.high / centre, kind=limits.kind
            )
    return Speedup(ratio=ratio, pairs=len(rows), interval=limits), basis


def _categories(spec: PhaseSummary, pairs: Sequence[Pair]) -> tuple[CategoryComparison, ...]:
    """speedup_user by category; below ten dialogues with the spread of all categories."""
    own = {c.category: [p for p in pairs if p[1].category == c.category] for c in spec.categories}
    columns = {category: found for category, some in own.items() if (found := _decoded(some))}
    shared = pooled([*columns.values()], ratio_of_ratios, what=WITHIN_RUN)
    limits = dict(zip(columns, shared, strict=True))
    compared = []
    for summary in spec.categories:
        speedup = speedup_user(own[summary.category])
        if speedup is not None and speedup.pairs < ENOUGH:
            speedup = Speedup(
                ratio=speedup.ratio, pairs=speedup.pairs, interval=limits[summary.category]
            )
        compared.append(
            CategoryComparison(
                category=summary.category,
                speedup_user=speedup,
                acceptance=summary.acceptance,
                steps=summary.acceptance.steps if summary.acceptance is not None else None,
            )
        )
    return tuple(compared)
