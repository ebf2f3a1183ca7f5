"""Run files → the two sides of a comparison; several repeats of one load → one phase.

A side is all runs of one server config, joined into one Summary whose phases are (load, repeat): a
sweep's cells bring their repeats with them, runs of repeat 0 are numbered as they began. Of several
repeats counts are sums, acceptance is pooled over steps, and the other figures, percentiles too,
are means over the repeats that have them. Must not: form a ratio of two sides, read a file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import msgspec

from loadgen.acceptance import conditional
from loadgen.errors import UserError
from loadgen.types import (
    Acceptance,
    CategorySummary,
    Caveat,
    Distribution,
    Interval,
    Load,
    PhaseSummary,
    RequestCounts,
    RunInfo,
    ServerContext,
    Summary,
    Throughput,
)
from loadgen.written import load_label, load_order

Sides = tuple[list[Summary], list[Summary]]


# ── which run belongs where ──────────────────────────────────────────────────────────────────────


def sides(base: Sequence[Summary], others: Sequence[Summary]) -> list[Sides]:
    """`base` against each other server config of `others`, in the order in which they come.

    Others of base's config are more of the base, unless there is nothing else: then they are what
    is compared with it, such as a later build.
    """
    first = config_of(base[0].info)
    groups = by_config(run for run in others if config_of(run.info) != first)
    same = [run for run in others if config_of(run.info) == first]
    if not groups:
        return [([*base], same)]
    return [([*base, *same], group) for group in groups]


def swept(runs: Sequence[Summary]) -> list[Sides]:
    """A sweep's cells: of each scenario, engine and model the baseline against each other config.

    Of a cell that was measured more than once the newest run counts. UserError: no such group has a
    baseline and something to compare, or one has two baselines.
    """
    ordered = sorted(runs, key=lambda run: run.info.started_at)
    newest = {_place(run.info): run for run in ordered}
    found: list[Sides] = []
    for group in _grouped((_work(run.info), run) for run in newest.values()):
        bases = by_config(run for run in group if run.info.server.state == "off")
        specs = by_config(run for run in group if run.info.server.state != "off")
        if len(bases) > 1:
            raise UserError(
                f"there are {len(bases)} configs without speculation: "
                f"{', '.join(named(side[0].info) for side in bases)}. Expected one baseline, the "
                "engine's best setting; give its run file as BASE, then the others."
            )
        found += [(bases[0], spec) for spec in specs if bases]
    if not found:
        states = dict.fromkeys(f"{named(r.info)} ({r.info.server.state})" for r in runs)
        raise UserError(
            f"no baseline and a config to compare it with among {', '.join(states)}. Expected runs "
            "of one scenario and model without speculation (off) and with it."
        )
    return found


def _place(info: RunInfo) -> str:
    """A sweep's cell by its name and what it measured; any other run is one of its own."""
    return f"{info.cell} {info.cell_sha256}" if info.cell_sha256 else info.run_id


def _work(info: RunInfo) -> tuple[str, str, str]:
    return info.scenario.name, info.server.engine, info.server.model


def named(info: RunInfo) -> str:
    """What a run is called: its cell, its config's name or method, else its id."""
    config = info.server.config
    spec = config.spec if config is not None else None
    name = config.name if config is not None else None
    return info.cell or name or (spec.method if spec is not None else None) or info.run_id


def config_of(info: RunInfo) -> tuple[Any, ...]:
    """What makes two runs of one server config: as launched on any port, or one URL and version."""
    s = info.server
    config = None if s.config is None else msgspec.structs.replace(s.config, port=0)
    where = s.url if config is None else msgspec.json.encode(config, order="deterministic")
    # What llama.cpp reports it reports once it has served a request: not from the first cell on.
    told = (s.draft_depth, s.spec_reported) if s.config is None else ()
    return s.engine, s.version, s.model, s.api, s.state, s.gpus, *told, where


def by_config(runs: Iterable[Summary]) -> list[list[Summary]]:
    """Runs of one server config together, in the order in which configs come."""
    return _grouped((config_of(run.info), run) for run in runs)


def _grouped(pairs: Iterable[tuple[tuple[Any, ...], Summary]]) -> list[list[Summary]]:
    groups: dict[tuple[Any, ...], list[Summary]] = {}
    for key, run in pairs:
        groups.setdefault(key, []).append(run)
    return list(groups.values())


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


def _sampling(info: RunInfo) -> str:
    s = info.scenario.sampling
    eos = ", EOS ignored" if s.ignore_eos else ""
    return f"T {s.temperature:g}, top_p {s.top_p:g}, ≤ {s.max_output_tokens} tokens{eos}"


def refuse(first: RunInfo, second: RunInfo, unlike: Sequence[str]) -> UserError:
    """What is raised where two runs did not do the same work."""
    return UserError(
        f"runs {first.run_id} and {second.run_id} cannot be compared: {'; '.join(unlike)}. "
        "Expected the same prompts, sampling and templating; run both again alike, or give --force "
        "to compare all the same."
    )


# ── several runs as one ──────────────────────────────────────────────────────────────────────────


def joined(runs: Sequence[Summary], *, force: bool = False) -> Summary:
    """Runs of one config as one Summary. A run that is given twice counts once.

    UserError: they did not do the same work (`force` joins them anyway).
    """
    by_id = {run.info.run_id: run for run in runs}
    ordered = sorted(by_id.values(), key=lambda run: run.info.started_at)
    first = ordered[0]
    if len(ordered) == 1:
        return first
    phases: dict[tuple[Load, int], PhaseSummary] = {}
    caveats: list[Caveat] = []
    for run in ordered:
        if (unlike := incomparable(first.info, run.info)) and not force:
            raise refuse(first.info, run.info, unlike)
        names: dict[str, str] = {}
        for phase in sorted(run.phases, key=lambda p: p.repeat):
            load = phase.load
            repeat = next(n for n in itertools.count(phase.repeat) if (load, n) not in phases)
            names[phase.name] = f"{load_label(load)} r={repeat + 1}"
            phases[load, repeat] = msgspec.structs.replace(
                phase,
                name=names[phase.name],
                repeat=repeat,
                started_s=_later(phase.started_s, _after(first.info, run.info)),
            )
        caveats += [
            msgspec.structs.replace(c, phase=names.get(c.phase or "", c.phase)) for c in run.caveats
        ]
    keys = sorted(phases, key=lambda key: (load_order(key[0]), key[1]))
    ends = dict.fromkeys(run.end for run in ordered if run.end != "completed")
    return Summary(
        info=_info(first.info, keys),
        phases=tuple(phases[key] for key in keys),
        caveats=tuple(caveats),
        end=next(iter(ends), "completed"),
        run_ids=tuple(run.info.run_id for run in ordered),
    )


def _info(info: RunInfo, keys: Sequence[tuple[Load, int]]) -> RunInfo:
    """The first run's, with the loads and repeats of all."""
    scenario = msgspec.structs.replace(
        info.scenario,
        loads=tuple(dict.fromkeys(load for load, _ in keys)) or info.scenario.loads,
        repeats=max((repeat for _, repeat in keys), default=0) + 1,
    )
    return msgspec.structs.replace(info, scenario=scenario)


def _after(first: RunInfo, later: RunInfo) -> float | None:
    """Seconds from one run's start to another's; None where a start is no time."""
    try:
        starts = [datetime.fromisoformat(info.started_at) for info in (first, later)]
        return (starts[1] - starts[0]).total_seconds()
    except (ValueError, TypeError):  # no ISO time; one with a zone and one without
        return None


def _later(at: float | None, by: float | None) -> float | None:
    return None if at is None or by is None else at + by


def took_turns(
    base: Summary, spec: Summary, pairs: Sequence[tuple[PhaseSummary, PhaseSummary]]
) -> bool:
    """Whether the repeats of both sides were interleaved: in the order of time the side changes at
    least once a repeat. A machine that drifts would else count as an effect of speculation."""
    after = _after(base.info, spec.info)
    starts = []
    for b, s in pairs:
        own, other = b.started_s, _later(s.started_s, after)
        if own is None or other is None:
            return False
        starts += [(own, 0), (other, 1)]
    order = [side for _, side in sorted(starts)]
    return sum(a != b for a, b in itertools.pairwise(order)) >= len(pairs)


# ── several repeats as one ───────────────────────────────────────────────────────────────────────


def as_one(phases: Sequence[PhaseSummary]) -> PhaseSummary:
    """The repeats of one load as one phase; a single one is itself."""
    first = phases[0]
    if len(phases) == 1:
        return first
    names = dict.fromkeys(name for p in phases for name in p.distributions)
    steps = [a for p in phases for a in p.acceptance]
    sources = dict.fromkeys(a.source for a in steps)
    known = [p.chunk_is_step for p in phases]
    return PhaseSummary(
        name=load_label(first.load),
        load=first.load,
        repeat=0,
        measured=True,
        span_s=sum(p.span_s for p in phases),
        requests=RequestCounts(
            **{
                kind: sum(getattr(p.requests, kind) for p in phases)
                for kind in RequestCounts.__struct_fields__
            }
        ),
        distributions={
            name: _distribution([p.distributions[name] for p in phases if name in p.distributions])
            for name in names
        },
        throughput=_throughput([p.throughput for p in phases]),
        acceptance=tuple(_acceptance([a for a in steps if a.source == s]) for s in sources),
        categories=_groups([p.categories for p in phases]),
        step_time_s=_mean(p.step_time_s for p in phases),
        step_time_source=first.step_time_source,
        achieved_concurrency_p50=_mean(p.achieved_concurrency_p50 for p in phases),
        server=_server([p.server for p in phases if p.server is not None]),
        categories_apart=first.categories_apart,
        repeated_prompts=_mean(p.repeated_prompts for p in phases) or 0.0,
        chunk_is_step=False if False in known else None if None in known else True,
        dialogues=tuple(d for p in phases for d in p.dialogues),
        tiers=_groups([p.tiers for p in phases]),
        isl_buckets=_groups([p.isl_buckets for p in phases]),
        started_s=first.started_s,
        goodput_rps=_mean(p.goodput_rps for p in phases),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _server(parts: Sequence[ServerContext]) -> ServerContext | None:
    """Means over the repeats; preemptions are their sum."""
    if not parts:
        return None
    means = {n: _mean(getattr(p, n) for p in parts) for n in ServerContext.__struct_fields__}
    put_back = [p.preemptions for p in parts if p.preemptions is not None]
    means["preemptions"] = sum(put_back) if put_back else None
    return ServerContext(**means)  # type: ignore[arg-type]  # a count among floats


def _distribution(parts: Sequence[Distribution]) -> Distribution:
    """n is the sum, min and max those of all, the rest means over the repeats."""
    lows = [d.min for d in parts if d.min is not None]
    highs = [d.max for d in parts if d.max is not None]
    means = {
        name: _mean(getattr(d, name) for d in parts)
        for name in ("mean", "std", "p50", "p90", "p95", "p99")
    }
    return Distribution(
        n=sum(d.n for d in parts),
        min=min(lows, default=None),
        max=max(highs, default=None),
        **means,
    )


def _throughput(parts: Sequence[Throughput]) -> Throughput:
    """Steady only where every repeat is, so that no two repeats are measured differently."""
    why = next((p.why_not_steady for p in parts if p.steady is None), "")
    return Throughput(
        ramp_share=_mean(p.ramp_share for p in parts),
        drain_share=_mean(p.drain_share for p in parts),
        whole=_mean(p.whole for p in parts),
        steady=None if any(p.steady is None for p in parts) else _mean(p.steady for p in parts),
        why_not_steady=why,
    )


def _groups(repeats: Sequence[Sequence[CategorySummary]]) -> tuple[CategorySummary, ...]:
    by_name: dict[str, list[CategorySummary]] = {}
    for group in itertools.chain(*repeats):
        by_name.setdefault(group.category, []).append(group)
    summaries = []
    for name in sorted(by_name):
        parts = by_name[name]
        found = [p.acceptance for p in parts if p.acceptance is not None]
        summaries.append(
            CategorySummary(
                category=name,
                requests=sum(p.requests for p in parts),
                acceptance=_acceptance(found) if found else None,
                user_tokens_per_s=_distribution([p.user_tokens_per_s for p in parts]),
                ttft_s=_distribution([p.ttft_s for p in parts]),
                step_time_s=_mean(p.step_time_s for p in parts),
            )
        )
    return tuple(summaries)


def _acceptance(parts: Sequence[Acceptance]) -> Acceptance:
    """One source's figures: AL weighted by steps, what is per draft by drafts."""
    first = parts[0]
    if len(parts) == 1:
        return first
    lengths = [a.acceptance_length for a in parts if a.acceptance_length is not None]
    whole = len(lengths) == len(parts)
    steps, drafts = _total(a.steps for a in parts), _total(a.drafts for a in parts)
    accepted, drafted = (
        _total(a.accepted_tokens for a in parts),
        _total(a.draft_tokens for a in parts),
    )
    joint, all_covered = _joint(parts), all(a.draft_coverage is not None for a in parts)
    return Acceptance(
        source=first.source,
        state=next((a.state for a in parts if a.state == "on"), first.state),
        steps_source=next((a.steps_source for a in parts if a.steps_source), None),
        acceptance_length=_weighted(lengths, [a.steps for a in parts]) if whole else None,
        interval=_interval(parts, whole),
        acceptance_length_drafted=1 + accepted / drafts
        if drafts and accepted is not None
        else None,
        draft_coverage=drafts / steps if all_covered and steps and drafts is not None else None,
        acceptance_rate=accepted / drafted if drafted and accepted is not None else None,
        joint_by_position=joint,
        conditional_by_position=conditional(joint),
        positions_exact=all(a.positions_exact for a in parts),
        acceptance_length_by_dialogue=_mean(a.acceptance_length_by_dialogue for a in parts),
        steps=steps,
        drafts=drafts,
        accepted_tokens=accepted,
        draft_tokens=drafted,
        overrun_tokens=_total(a.overrun_tokens for a in parts),
        unverified=any(a.unverified for a in parts),
        why_missing="" if whole else next((a.why_missing for a in parts if a.why_missing), ""),
    )


def _total(values: Iterable[int | None]) -> int | None:
    """None where any is missing: a sum of the others would not be of the whole."""
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _weighted(values: Sequence[float], weights: Sequence[int | None]) -> float:
    """Mean by weight; by equal weights where one is not known."""
    known = [w for w in weights if w]
    if len(known) != len(values):
        return sum(values) / len(values)
    return sum(v * w for v, w in zip(values, known, strict=True)) / sum(known)


def _joint(parts: Sequence[Acceptance]) -> tuple[float, ...] | None:
    rows = [a.joint_by_position for a in parts if a.joint_by_position is not None]
    if len(rows) != len(parts):
        return None
    columns = itertools.zip_longest(*rows, fillvalue=0.0)
    return tuple(_weighted(column, [a.drafts for a in parts]) for column in columns)


def _interval(parts: Sequence[Acceptance], whole: bool) -> Interval | None:
    """Repeats send the same prompts, so their spread says nothing about other prompts: the ends are
    the means of theirs. Where steps are not known in some repeat, what the ranges of all cover."""
    found = [a.interval for a in parts if a.interval is not None]
    if len(found) != len(parts):
        return None
    lows, highs = [i.low for i in found], [i.high for i in found]
    if whole:
        low, high = sum(lows) / len(lows), sum(highs) / len(highs)
        return Interval(low=low, high=high, kind=found[0].kind)
    return Interval(low=min(lows), high=max(highs), kind=found[0].kind)
