"""By how much a run on random input misstates a run on real input: throughput, acceptance, and why.

Same server, load, length and sampling; only the text differs. The ratio of throughputs is split by
putting the random run's figures one after the other into the real run's time a request,
E2EL = time outside decoding + decode steps × step time, steps = (tokens − first chunk) ÷ AL: output
length first, then acceptance, step time, time outside decoding; what is then left of the measured
ratio is "the rest" (ramp, drain, uneven streams). The factors multiply to the ratio. Routed
experts are not read: vLLM 0.32.0 adds them to whole answers of /v1/completions, never to a stream.
So only the indirect test of §6.4 is left: without speculation and at equal output lengths an effect
on times is consistent with other experts, with caches or with noise between the runs, and proves
none of these. Must not: call one of the runs a speedup.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loadgen.compare import differences
from loadgen.errors import UserError
from loadgen.sides import incomparable
from loadgen.stats import interval, ratio
from loadgen.types import (
    Acceptance,
    ClosedLoop,
    Factor,
    Interval,
    Misstated,
    Misstatement,
    PhaseSummary,
    RunInfo,
    Speedup,
    Summary,
)

BOTH = "from both runs, on logarithms"
LENGTHS_APART = 0.10
"""Mean lengths that differ by more than this share are another experiment."""
ROUTED = 0.03
"""Times that differ by less say nothing of experts (reference §6.4)."""


def is_control(info: RunInfo) -> bool:
    """A run on random input."""
    return info.scenario.dataset.kind == "random"


def misstatement(random: Summary, real: Summary, *, force: bool = False) -> Misstatement:
    """`random` over `real`. UserError: more than the text differs (`force` goes on anyway)."""
    unlike = _unlike(random, real)
    if unlike and not force:
        raise UserError(
            f"the random run {random.info.run_id} and {real.info.run_id} differ in more than their "
            f"text: {'; '.join(unlike)}. Expected the same server, sampling and prompt length: run "
            "--scenario throughput with the same --isl and --max-output-tokens, or give --force."
        )
    of = {(p.load, p.repeat): p for p in real.phases}
    pairs = [(p, of[key]) for p in random.phases if (key := (p.load, p.repeat)) in of]
    if not pairs:
        raise UserError(
            f"runs {random.info.run_id} and {real.info.run_id} have no load in common. Run both "
            "with the same -c."
        )
    return Misstatement(
        random=random.info,
        real=real.info,
        loads=tuple(_load(a, b) for a, b in pairs),
        differences=(*unlike, *differences(real.info, random.info)),
    )


def _unlike(random: Summary, real: Summary) -> tuple[str, ...]:
    a, b = random.info, real.info
    if is_control(b) or not is_control(a):
        return ("input: expected one run on random input and one on real text",)
    found = [what for what in incomparable(a, b) if not what.startswith("prompts: ")]
    if a.server.state != b.server.state:
        found.append(f"speculation: {a.server.state} → {b.server.state}")
    if a.server.draft_depth != b.server.draft_depth:
        found.append(f"draft depth: {a.server.draft_depth} → {b.server.draft_depth}")
    x, y = (_mean(run.phases, "isl_tokens") for run in (random, real))
    if x is not None and y is not None and abs(x - y) > LENGTHS_APART * max(x, y):
        found.append(f"mean prompt length: {x:,.0f} → {y:,.0f} tokens")
    return tuple(found)


def _mean(phases: Sequence[PhaseSummary], metric: str) -> float | None:
    found = [p.distributions[metric].mean for p in phases if metric in p.distributions]
    known = [mean for mean in found if mean is not None]
    return sum(known) / len(known) if known else None


def _load(random: PhaseSummary, real: PhaseSummary) -> Misstated:
    basis = "steady"
    a, b = random.throughput.steady, real.throughput.steady
    if a is None or b is None:
        basis, a, b = "whole", random.throughput.whole, real.throughput.whole
    closed = isinstance(real.load, ClosedLoop)
    throughput = None
    if a and b:
        around = _of_throughput(random, real, a / b) if closed else None
        throughput = Speedup(ratio=a / b, pairs=0, interval=around)
    factors, why = split(random, real, throughput.ratio if throughput else None)
    if not closed:
        factors, why = (), "in an open loop throughput follows the arrivals, not the server's speed"
    a_token, outside = _time_per_token(random, real), _time_outside(random, real)
    return Misstated(
        load=real.load,
        repeat=real.repeat,
        random=random,
        real=real,
        throughput=throughput,
        basis=basis if throughput else "",
        acceptance=_acceptance(random, real),
        time_per_token=a_token,
        time_outside_decoding=outside,
        routing=routing(random, real, (a_token, outside)),
        factors=factors,
        not_split=why,
    )


# ── intervals of a ratio of two runs that share no dialogue ──────────────────────────────────────


def apart(
    a: float, around_a: Interval | None, b: float, around_b: Interval | None
) -> Interval | None:
    """The interval of a ÷ b of two independent figures, their distances added in squares on the
    logarithm (MOVER; Zou & Donner 2008)."""
    if around_a is None or around_b is None or min(a, b, around_a.low, around_b.low) <= 0:
        return None
    down = math.hypot(math.log(a / around_a.low), math.log(around_b.high / b))
    up = math.hypot(math.log(around_a.high / a), math.log(b / around_b.low))
    kind = around_a.kind if around_a.kind == around_b.kind else "95 % over dialogues"
    return Interval(low=a / b * math.exp(-down), high=a / b * math.exp(up), kind=f"{kind}, {BOTH}")


def _pooled(rows: Sequence[tuple[float, float]]) -> tuple[float, Interval | None] | None:
    """Σ ÷ Σ with its interval over dialogues."""
    above, below = (sum(column) for column in zip(*rows, strict=True)) if rows else (0.0, 0.0)
    if not above or not below:
        return None
    return above / below, interval(list(zip(*rows, strict=True)), ratio)


def _ratio(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> Speedup | None:
    x, y = _pooled(a), _pooled(b)
    if x is None or y is None:
        return None
    return Speedup(ratio=x[0] / y[0], pairs=0, interval=apart(x[0], x[1], y[0], y[1]))


def _of_throughput(random: PhaseSummary, real: PhaseSummary, measured: float) -> Interval | None:
    """That of Σ osl ÷ Σ E2EL, which a closed loop's throughput follows, laid around `measured`."""
    found = _ratio(
        *(
            [(float(d.osl_tokens), d.e2el_s) for d in p.dialogues if d.osl_tokens]
            for p in (random, real)
        )
    )
    if found is None or found.interval is None:
        return None
    shift = measured / found.ratio
    limits = found.interval
    return Interval(low=limits.low * shift, high=limits.high * shift, kind=limits.kind)


def _time_per_token(random: PhaseSummary, real: PhaseSummary) -> Speedup | None:
    """Decode seconds a token, random ÷ real."""
    return _ratio(
        *(
            [(d.decode_s, float(d.decode_tokens)) for d in p.dialogues if d.decode_tokens]
            for p in (random, real)
        )
    )


def _time_outside(random: PhaseSummary, real: PhaseSummary) -> Speedup | None:
    """Seconds a turn before its first chunk and after its last, mostly TTFT, random ÷ real."""
    return _ratio(
        *([(d.e2el_s - d.decode_s, float(d.turns)) for d in p.dialogues] for p in (random, real))
    )


def routing(
    random: PhaseSummary, real: PhaseSummary, times: Sequence[Speedup | None]
) -> Literal["unequal_lengths", "signs", "no_signs"] | None:
    """Do the times without speculation hint at experts that are routed to otherwise?"""
    known = [(t.ratio, t.interval) for t in times if t is not None and t.interval is not None]
    if not known or not all(
        p.acceptance and p.acceptance[0].state == "off" for p in (random, real)
    ):
        return None
    x, y = (_mean((p,), "osl_tokens") for p in (random, real))
    if x is None or y is None or abs(x - y) > LENGTHS_APART * max(x, y):
        return "unequal_lengths"
    signs = [abs(r - 1) >= ROUTED and (of.low > 1 or of.high < 1) for r, of in known]
    return "signs" if any(signs) else "no_signs"


def _acceptance(random: PhaseSummary, real: PhaseSummary) -> Speedup | None:
    """Of the best source that both have."""
    theirs = {a.source: a for a in real.acceptance}
    pairs = [(a, theirs[a.source]) for a in random.acceptance if a.source in theirs]
    for a, b in pairs:
        if a.acceptance_length and b.acceptance_length:
            return Speedup(
                ratio=a.acceptance_length / b.acceptance_length,
                pairs=0,
                interval=apart(
                    a.acceptance_length, _statistical(a), b.acceptance_length, _statistical(b)
                ),
            )
    return None


def _statistical(found: Acceptance) -> Interval | None:
    return found.interval if found.steps is not None else None


# ── the split ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Request:
    """A mean request: tokens, those of the first chunk, AL, seconds a step and outside decoding."""

    tokens: float
    first: float
    length: float
    step_s: float
    outside_s: float

    def tokens_per_s(self) -> float:
        """Of one stream that sends such requests one after the other."""
        return self.tokens / (
            self.outside_s + (self.tokens - self.first) / self.length * self.step_s
        )


def split(
    random: PhaseSummary, real: PhaseSummary, measured: float | None
) -> tuple[tuple[Factor, ...], str]:
    """Factors that multiply to `measured`, or () and why. Steps unknown: time a token instead of
    acceptance and step time."""
    if measured is None:
        return (), "no throughput is known of one of the runs"
    by_step = all(d.steps for p in (random, real) for d in p.dialogues if d.decode_tokens)
    off = all(p.acceptance and p.acceptance[0].state == "off" for p in (random, real))
    a, b = (mean_request(p, by_step and not off) for p in (random, real))
    if a is None or b is None:
        return (), "the tokens of a chunk are not known of one of the runs"
    steps = [
        ("output length", Request(a.tokens, a.first, b.length, b.step_s, b.outside_s)),
        ("acceptance", Request(a.tokens, a.first, a.length, b.step_s, b.outside_s)),
        ("step time", Request(a.tokens, a.first, a.length, a.step_s, b.outside_s)),
        ("outside decoding", a),
    ]
    if off or not by_step:
        steps = [
            ("time a token" if n == "step time" else n, r) for n, r in steps if n != "acceptance"
        ]
    factors, before = [], b.tokens_per_s()
    for name, request in steps:
        after = request.tokens_per_s()
        factors.append(Factor(name=name, ratio=after / before))
        before = after
    rest = measured / (a.tokens_per_s() / b.tokens_per_s())
    return (*factors, Factor(name="the rest", ratio=rest)), ""


def mean_request(phase: PhaseSummary, by_step: bool) -> Request | None:
    """Over dialogues with decode time, a turn being a request; None without one."""
    known = [d for d in phase.dialogues if d.decode_tokens and d.decode_s > 0]
    turns = sum(d.turns for d in known)
    if not turns:
        return None
    tokens, decoded = sum(d.osl_tokens for d in known), sum(d.decode_tokens or 0 for d in known)
    steps = sum(d.steps or 0 for d in known) if by_step else decoded
    decode_s, whole_s = sum(d.decode_s for d in known), sum(d.e2el_s for d in known)
    return Request(
        tokens=tokens / turns,
        first=(tokens - decoded) / turns,
        length=decoded / steps,
        step_s=decode_s / steps,
        outside_s=max(whole_s - decode_s, 0.0) / turns,
    )
