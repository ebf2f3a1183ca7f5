"""The highest load inside an SLO, and what a request rate then takes: servers, GPUs, money.

Of the measured loads of a config, from the lowest up, the border lies between the last at which all
bounds hold and the first at which one does not; nothing is read between them or beyond. A request
that failed counts as one that never came: its latency is infinite. Figures are those of the traffic
measured, or of a mix of its categories: each request then weighs its category's share ÷ requests,
and a closed loop, whose users always wait for an answer, has its rate scaled by mean E2EL (Little's
law). A category's latency is taken as measured: what a batch of another make-up would do to it is
not known. Must not: extrapolate, read a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

import msgspec

from loadgen import slo as slos
from loadgen.bounds import holds, in_seconds
from loadgen.errors import UserError, nearest
from loadgen.sides import by_config, incomparable
from loadgen.types import (
    Bound,
    Capacity,
    CapacityLoad,
    Caveat,
    ClosedLoop,
    ConfigCapacity,
    PhaseSummary,
    RequestFigures,
    ServerInfo,
    Summary,
)

MIX_SUM = 1e-6
FEW = 20
"""A category with fewer requests at a load weighs on a few answers."""


def capacity(
    summaries: Sequence[Summary],
    slo: Sequence[str],
    *,
    rps: float | None = None,
    mix: Mapping[str, float] | None = None,
    gpu_price_per_h: float | None = None,
    headroom: float = 0.2,
) -> Capacity:
    """Every config of the runs under `slo`. UserError: a bound, mix or number that makes no sense,
    or figures that no run has."""
    bounds, limits = asked(slo)
    for flag, value in (("--rps", rps), ("--gpu-price", gpu_price_per_h)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{flag} {value:g} makes no sense. Expected a number above 0.")
    if not 0 <= headroom < 1:
        raise UserError(f"--headroom {headroom:g} makes no sense. Expected a share from 0 to 1.")
    if mix is not None:
        _mix_fits(mix, summaries)
    configs = [
        _config(group, kind, bounds, limits, mix)
        for group in by_config(summaries)
        for kind in (True, False)
        if any(_closed(p) is kind for s in group for p in s.phases)
    ]
    if all(load.inside is None for config in configs for load in config.loads):
        whys = dict.fromkeys(load.why for config in configs for load in config.loads)
        raise UserError(
            f"no run tells whether {' and '.join(b.text for b in bounds)} holds: "
            f"{'; '.join(whys)}. Measure with more requests, or bound another figure."
        )
    priced = [_needs(config, rps, gpu_price_per_h, headroom) for config in configs]
    return Capacity(
        bounds=bounds,
        limits=limits,
        configs=tuple(sorted(priced, key=_rank)),
        headroom=headroom,
        rps=rps,
        mix=dict(mix) if mix is not None else None,
        gpu_price_per_h=gpu_price_per_h,
        caveats=tuple(_caveats(summaries, priced, bounds, mix)),
    )


# ── what the user asks ───────────────────────────────────────────────────────────────────────────


def asked(slo: Sequence[str]) -> tuple[tuple[Bound, ...], tuple[Bound, ...]]:
    """Bounds on a load, and limits of each request. UserError: none on a load, or no such."""
    bounds, limits = slos.read(slo, "--slo")
    if not bounds:
        raise UserError(
            "no --slo bounds a load. Expected one with a statistic, such as ttft_p95<=500ms; a "
            "limit of each request, such as ttft_s<=0.5, is what goodput counts beside it."
        )
    return bounds, limits


def mix_of(text: str) -> dict[str, float]:
    """`rag=0.6,coding=0.4` → shares by category. UserError: not of that form."""
    shares: dict[str, float] = {}
    for word in text.split(","):
        name, equals, number = (part.strip() for part in word.partition("="))
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not name or not equals or name in shares or not 0 < share <= 1:
            raise UserError(
                f"--mix {text}: '{word.strip()}' is no share. Expected each category once with a "
                "share above 0, such as rag=0.6,coding=0.4."
            )
        shares[name] = share
    return shares


def _mix_fits(mix: Mapping[str, float], summaries: Sequence[Summary]) -> None:
    total = sum(mix.values())
    if abs(total - 1) > MIX_SUM:
        raise UserError(f"--mix: the shares sum to {total:g}. Expected 1.")
    known = sorted({one.category for s in summaries for p in s.phases for one in p.each})
    for name in mix:
        if name not in known:
            hint = nearest(name, known) or "."
            raise UserError(
                f"--mix: no run has a request of category '{name}'{hint} Known: {', '.join(known)}."
            )


# ── configs and their loads ──────────────────────────────────────────────────────────────────────


def gpus_of(server: ServerInfo) -> int | None:
    """GPUs of one server, as given with --gpus or by its config; None: not told."""
    if server.gpus is not None or server.config is None:
        return server.gpus
    return server.config.gpus or server.config.tensor_parallel


def _config(
    runs: Sequence[Summary],
    closed: bool,
    bounds: Sequence[Bound],
    limits: Sequence[Bound],
    mix: Mapping[str, float] | None,
) -> ConfigCapacity:
    phases = [p for s in runs for p in s.phases if _closed(p) is closed]
    loads = tuple(_load(same, bounds, limits, mix) for same in _by_load(phases))
    known = [load for load in loads if load.inside is not None]
    first = next((n for n, load in enumerate(known) if not load.inside), len(known))
    inside = known[first - 1] if first else None
    outside = known[first] if first < len(known) else None
    server = runs[0].info.server
    gpus = gpus_of(server)
    rate = inside.requests_per_s if inside is not None else None
    users = inside.users if inside is not None else None
    return ConfigCapacity(
        server=server,
        runs=tuple(s.info.run_id for s in runs),
        loads=loads,
        border="unknown"
        if inside is None and (not known or loads[0] is not known[0])
        else "below"
        if inside is None
        else "between"
        if outside is not None
        else "at least",
        gpus=gpus,
        holds=inside,
        fails=outside,
        users_per_gpu=users / (gpus or 1) if users is not None else None,
        requests_per_s_per_gpu=rate / (gpus or 1) if rate is not None else None,
    )


def _closed(phase: PhaseSummary) -> bool:
    return isinstance(phase.load, ClosedLoop)


def _size(phase: PhaseSummary) -> float:
    """Where the load stands among its kind: users, or requests a second."""
    load = phase.load
    return float(getattr(load, "concurrency", 0) or getattr(load, "request_rate_rps", 0))


def _load(
    phases: Sequence[PhaseSummary],
    bounds: Sequence[Bound],
    limits: Sequence[Bound],
    mix: Mapping[str, float] | None,
) -> CapacityLoad:
    """One load, its repeats pooled."""
    closed = _closed(phases[0])
    requests = [one for p in phases for one in p.each]
    weights = _weights(requests, mix)
    lost = [c for c in mix or () if not any(r.completed for r in requests if r.category == c)]
    found = CapacityLoad(
        load=phases[0].name.split(" ")[0],
        users=round(_size(phases[0])) if closed else None,
        figures=(None,) * len(bounds),
        inside=None,
        requests=sum(w > 0 for w in weights),
        weight_of=slos.weight_of(weights),
        why=f"no completed request of {', '.join(lost)}" if lost else "",
    )
    if lost or not any(r.completed for r in requests):
        return msgspec.structs.replace(found, why=found.why or "no request completed")
    shares = weights if mix is not None else None
    figures = tuple(slos.figure(bound, phases, shares) for bound in bounds)
    absent = [b.text for b, value in zip(bounds, figures, strict=True) if value is None]
    pairs = [(b, v) for b, v in zip(bounds, figures, strict=True) if v is not None]
    return msgspec.structs.replace(
        found,
        figures=figures,
        inside=None if absent else all(holds(bound, value) for bound, value in pairs),
        why=f"too few requests or no figure for {', '.join(absent)}" if absent else "",
        error=_error(requests, mix) if mix is not None and closed else None,
        **_rates(phases, requests, weights, limits, closed),
    )


def _weights(
    requests: Sequence[RequestFigures], mix: Mapping[str, float] | None
) -> tuple[float, ...]:
    """Of each request: 1, or its category's share in the mix ÷ its category's requests."""
    if mix is None:
        return (1.0,) * len(requests)
    counts: dict[str, int] = {}
    for one in requests:
        counts[one.category] = counts.get(one.category, 0) + 1
    return tuple(mix.get(one.category, 0.0) / counts[one.category] for one in requests)


def _rates(
    phases: Sequence[PhaseSummary],
    requests: Sequence[RequestFigures],
    weights: Sequence[float],
    limits: Sequence[Bound],
    closed: bool,
) -> dict[str, object]:
    """Requests, tokens and good requests a second."""
    pairs = [(one, w) for one, w in zip(requests, weights, strict=True) if one.completed]
    done = [one for one, _ in pairs]
    total = sum(w for _, w in pairs)
    span = sum(p.span_s for p in phases)
    if not span:
        return {}
    rate = len(done) / span
    if closed:
        before = sum(one.values["e2el_s"] for one in done) / len(done)
        after = sum(one.values["e2el_s"] * w for one, w in pairs) / total
        rate *= before / after
    steady = [(p.throughput.steady, p.throughput.whole) for p in phases]
    basis = "whole"
    if closed and all(s is not None and w for s, w in steady):
        basis = "steady"
        rate *= sum(s or 0.0 for s, _ in steady) / sum(w or 0.0 for _, w in steady)
    good = sum(w for one, w in pairs if slos.within(one, limits, closed))
    return {
        "requests_per_s": rate,
        "output_tokens_per_s": rate * sum(one.values["osl_tokens"] * w for one, w in pairs) / total,
        "goodput_rps": rate * good / total if limits else None,
        "basis": basis,
    }


def _error(requests: Sequence[RequestFigures], mix: Mapping[str, float]) -> float | None:
    """Half of a 95 % interval of the mean E2EL of the mix ÷ that mean: what the rate hangs on."""
    mean, variance = 0.0, 0.0
    for category, share in mix.items():
        times = [r.values["e2el_s"] for r in requests if r.completed and r.category == category]
        if len(times) < 2:
            return None
        middle = sum(times) / len(times)
        spread = sum((t - middle) ** 2 for t in times) / (len(times) - 1)
        mean += share * middle
        variance += share * share * spread / len(times)
    return 1.96 * math.sqrt(variance) / mean


# ── what it takes ────────────────────────────────────────────────────────────────────────────────


def _needs(
    config: ConfigCapacity, rps: float | None, price: float | None, headroom: float
) -> ConfigCapacity:
    """Servers for the rate, and the cost of a million output tokens, of servers used up to
    1 − headroom of what they carry."""
    at = config.holds
    if at is None or not at.requests_per_s or not at.output_tokens_per_s:
        return config
    used = 1 - headroom
    servers = None
    if rps is not None:
        servers = max(math.ceil(rps / (at.requests_per_s * used) - 1e-9), 1)
    cost = None
    if price is not None and config.gpus is not None:
        cost = price * config.gpus / 3600 / (at.output_tokens_per_s * used) * 1e6
    return msgspec.structs.replace(
        config,
        servers=servers,
        gpus_needed=servers * config.gpus if servers is not None and config.gpus else None,
        cost_per_million=cost,
    )


def _rank(config: ConfigCapacity) -> float:
    """Most requests a second a GPU first; those with no load inside last."""
    return -(config.requests_per_s_per_gpu or 0.0)


def _caveats(
    summaries: Sequence[Summary],
    configs: Sequence[ConfigCapacity],
    bounds: Sequence[Bound],
    mix: Mapping[str, float] | None,
) -> list[Caveat]:
    first = summaries[0].info
    unlike = dict.fromkeys(
        fact
        for s in summaries[1:]
        for fact in incomparable(first, s.info)
        if not (mix is not None and fact.startswith("prompts"))
    )
    found = []
    if unlike:
        found.append(
            Caveat(
                code="unlike-runs",
                message=f"The runs did not do the same work: {'; '.join(unlike)}.",
                advice="Rank only configs that were measured with the same prompts and sampling.",
            )
        )
    if {config.gpus is None for config in configs} == {True, False}:
        found.append(
            Caveat(
                code="gpus-unknown",
                message="The GPUs of some servers are not told: their figures are of a server.",
                advice="Measure with --gpus N, or write gpus into the server's config.",
            )
        )
    found += [caveat for config in configs for caveat in _of_config(config)]
    found += [caveat for bound in bounds for caveat in _of_speed(bound)]
    return found + (_of_mix(summaries, mix) if mix is not None else [])


def _of_config(config: ConfigCapacity) -> list[Caveat]:
    who = ", ".join(config.runs)
    found = [
        Caveat(
            code="load-not-judged",
            message=f"{load.load} of {who} was left out: {load.why}.",
            advice="Measure that load with more requests of every category.",
        )
        for load in config.loads
        if load.inside is None
    ]
    if config.fails is not None:
        after = config.loads[config.loads.index(config.fails) + 1 :]
        if again := [load.load for load in after if load.inside]:
            found.append(
                Caveat(
                    code="border-not-single",
                    message=f"{who}: the bounds fail at {config.fails.load} and hold again at "
                    f"{', '.join(again)}.",
                    advice="Repeat these loads: a border that comes twice is noise or warm-up.",
                )
            )
    return found


def _of_speed(bound: Bound) -> list[Caveat]:
    if (
        in_seconds(bound.metric)
        or bound.op[0] != ">"
        or bound.statistic not in ("p90", "p95", "p99")
    ):
        return []
    return [
        Caveat(
            code="bound-on-the-fastest",
            message=f"'{bound.text}' bounds the fastest users: high percentiles of a speed are the "
            "best, not the worst.",
            advice="For what nearly every user gets, bound tpot_p95 from above.",
        )
    ]


def _of_mix(summaries: Sequence[Summary], mix: Mapping[str, float]) -> list[Caveat]:
    """Categories of few requests at a load, and what a mix cannot know."""
    counts = {
        category: [
            n
            for group in by_config(summaries)
            for phases in _by_load([p for s in group for p in s.phases])
            if (n := sum(r.completed and r.category == category for p in phases for r in p.each))
        ]
        for category in mix
    }
    few = {category: min(n) for category, n in counts.items() if min(n, default=FEW) < FEW}
    found = [
        Caveat(
            code="mix-recombined",
            message="Figures are recombined by category from the batch that was measured; how a "
            "batch of the mix itself would slow or speed each category is not in them, nor in "
            "their error.",
            advice="Measure a dataset with the mix's own shares before you buy.",
        )
    ]
    if few:
        said = ", ".join(f"{n} of {category}" for category, n in few.items())
        found.append(
            Caveat(
                code="mix-of-few",
                message=f"The mix rests on few requests, at the load with the fewest: {said}.",
                advice=f"Measure with at least {FEW} requests of each category at every load.",
            )
        )
    return found


def _by_load(phases: Sequence[PhaseSummary]) -> list[tuple[PhaseSummary, ...]]:
    """Repeats of a load together, the lowest load first."""
    ordered = sorted(phases, key=_size)
    return [tuple(same) for _, same in groupby(ordered, key=lambda p: p.load)]
