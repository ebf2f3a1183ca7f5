"""Arrival processes: when the dialogues of an open loop begin, whatever becomes of the others.

A process gives offsets in seconds without end, from the start of the phase. It is laid out before
the phase and never changed in it: to wait for an answer before the next arrival is what hides a
stall (coordinated omission). Offsets are not scaled so that the last one falls on n ÷ rate, as vLLM
does: that would be no Poisson process. Must not: read a clock, wait.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping

from loadgen.errors import UserError, nearest
from loadgen.types import OpenLoop

Process = Callable[[float, random.Random, float], Iterator[float]]
"""(dialogues a second, dice, burstiness) → offsets."""


def constant(rate_rps: float, _dice: random.Random, _burstiness: float) -> Iterator[float]:
    """Every 1 ÷ rate, the first at once."""
    return (number / rate_rps for number in itertools.count())


def poisson(rate_rps: float, dice: random.Random, _burstiness: float) -> Iterator[float]:
    """Exponential gaps: independent users."""
    return itertools.accumulate(dice.expovariate(rate_rps) for _ in itertools.count())


def gamma(rate_rps: float, dice: random.Random, burstiness: float) -> Iterator[float]:
    """Gamma gaps of shape `burstiness` and mean 1 ÷ rate, so their coefficient of variation is
    1 ÷ √burstiness: below 1 in bursts, 1 Poisson, above 1 evener (vLLM bench serve)."""
    scale_s = 1 / (rate_rps * burstiness)
    gaps = (dice.gammavariate(burstiness, scale_s) for _ in itertools.count())
    return itertools.accumulate(gaps)


ARRIVALS: Mapping[str, Process] = {"constant": constant, "poisson": poisson, "gamma": gamma}


def process_of(load: OpenLoop) -> Process:
    """UserError: no such process, or a burstiness that it does not have."""
    process = ARRIVALS.get(load.arrivals)
    if process is None:
        hint = nearest(load.arrivals, ARRIVALS) or "."
        raise UserError(f"unknown arrivals '{load.arrivals}'{hint} Known: {', '.join(ARRIVALS)}.")
    if load.burstiness != 1 and process is not gamma:
        raise UserError(
            f"burstiness {load.burstiness:g} with {load.arrivals} arrivals: only gamma arrivals "
            "have one. Choose gamma, or leave it out."
        )
    return process


def offsets(load: OpenLoop, seed: str, ramp_s: float = 0.0) -> Iterator[float]:
    """When dialogues begin, seconds without end; the same for the same seed, and at another rate
    the same pattern. Over `ramp_s` the rate grows linearly from 0. UserError: as process_of."""
    even = process_of(load)(load.request_rate_rps, random.Random(seed), load.burstiness)
    return (_ramped(at, ramp_s) for at in even)


def _ramped(at_s: float, ramp_s: float) -> float:
    """The instant at which a growing rate has begun as many as the full rate had at `at_s`."""
    return math.sqrt(2 * ramp_s * at_s) if at_s < ramp_s / 2 else at_s + ramp_s / 2
