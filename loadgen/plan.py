"""Scenario + prompts → Plan: which dialogues, in which phases, in which order. Deterministic.

A phase is one load, once. Loads run in the given order, reversed on odd repeats, so that a drift of
the machine does not sit on one load. Prompts are shuffled by the dataset's seed, which mixes the
categories, the same way for every phase and every run. Warm-up prompts are never measured prompts.
An open loop has rate × duration dialogues: however late the server is, none is left out. Must not:
read files, tokenize, wait.
"""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import msgspec

from loadgen.arrivals import offsets
from loadgen.errors import UserError
from loadgen.types import ClosedLoop, Dialogue, Load, OpenLoop, Phase, Plan, Prompt, Scenario
from loadgen.written import explain, load_label

DIALOGUES_PER_STREAM = 4
"""A phase needs at least this many dialogues a stream, or ramp and drain are what it measures."""

WARMUP_OUTPUT_TOKENS = 16
WARMUP_STREAMS = 4
"""Of an open loop, which has no streams of its own to warm."""
MOST_DIALOGUES = 1_000_000


def make_plan(
    scenario: Scenario,
    prompts: Sequence[Prompt],
    warmup: Sequence[Prompt] = (),
    *,
    remembers: bool = False,
) -> Plan:
    """The plan of a run. `warmup` () warms up on the measured prompts' ids reversed.

    `remembers`: the drafter learns across requests, so a prompt may not be sent twice in a phase.
    UserError: no prompts, a number out of bounds, or too few prompts for a drafter that remembers.
    """
    try:
        msgspec.convert(msgspec.to_builtins(scenario), Scenario)  # flags may have changed it
    except msgspec.ValidationError as fault:
        raise UserError(f"scenario {scenario.name}: {explain(str(fault), Scenario)}") from None
    if not prompts:
        raise UserError(
            f"scenario {scenario.name}: no prompts are left to send. Expected at least one; "
            "check the dataset, its categories and its limit."
        )
    counts = [_count(scenario, load, prompts) or 0 for load in scenario.loads]
    total = scenario.repeats * (sum(counts) + len(counts) * scenario.warmup_requests)
    if total > MOST_DIALOGUES:
        raise UserError(
            f"scenario {scenario.name}: {total:,} dialogues in all. Expected at most "
            f"{MOST_DIALOGUES:,}, as all are laid out ahead; lower --requests or --rate, or give "
            "a closed loop --duration instead."
        )
    names = [phase_name(load) for load in scenario.loads]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(
            f"scenario {scenario.name}: two of its loads are {twice}, and their figures would be "
            "mixed. Expected each once; give --repeat to measure a load several times."
        )
    phases: list[Phase] = []
    for repeat in range(scenario.repeats):
        loads = scenario.loads if repeat % 2 == 0 else scenario.loads[::-1]
        for load in loads:
            name = phase_name(load) + (f" r={repeat + 1}" if scenario.repeats > 1 else "")
            if scenario.warmup_requests:
                phases.append(_warmup(name, load, repeat, scenario, prompts, warmup))
            phases.append(_measured(name, load, repeat, scenario, prompts, remembers))
    return Plan(scenario=scenario, prompts=tuple(prompts), phases=tuple(phases))


def by_category(plan: Plan) -> Plan:
    """Each measured phase as one phase a category, in the order in which they first come.

    For servers that tell no request's steps: the growth of their counters over such a phase is the
    category's alone. A phase that ends by its duration gives each category an equal part of it.
    """
    phases: list[Phase] = []
    for phase in plan.phases:
        categories = tuple(dict.fromkeys(p.category for p in plan.prompts))
        if not phase.measured or len(categories) < 2:
            phases.append(phase)
            continue
        duration_s = phase.duration_s
        for category in categories:
            of_it: Iterable[Dialogue] = in_order(
                [p for p in plan.prompts if p.category == category], plan.scenario.dataset.seed
            )
            if isinstance(phase.dialogues, tuple):
                of_it = tuple(d for d in phase.dialogues if d.prompt.category == category)
                if not of_it:
                    continue
            phases.append(
                replace(
                    phase,
                    name=f"{phase.name} {category}",
                    category=category,
                    dialogues=of_it,
                    duration_s=None if duration_s is None else duration_s / len(categories),
                )
            )
    return replace(plan, phases=tuple(phases))


def phase_name(load: Load) -> str:
    """'c=32', 'rate=4': the name of its phase, before the repeat."""
    return load_label(load).removesuffix("/s")


def _measured(
    name: str,
    load: Load,
    repeat: int,
    scenario: Scenario,
    prompts: Sequence[Prompt],
    remembers: bool,
) -> Phase:
    endless = in_order(prompts, scenario.dataset.seed)
    if (count := _count(scenario, load, prompts)) is None:
        if remembers:
            endless = itertools.islice(endless, len(prompts))
        dialogues: Iterator[Dialogue] | tuple[Dialogue, ...] = endless
    else:
        if remembers and count > len(prompts):
            raise UserError(
                f"{count} dialogues at {load_label(load)} need as many prompts, and there are "
                f"{len(prompts)}: this drafter learns from earlier requests, so a prompt sent "
                "twice would flatter it. Use more prompts, a lower load or fewer --requests."
            )
        dialogues = tuple(itertools.islice(endless, count))
    return Phase(
        name=name,
        load=load,
        repeat=repeat,
        measured=True,
        dialogues=dialogues,
        duration_s=None if isinstance(load, OpenLoop) else scenario.stop.duration_s,
        ramp_s=scenario.stop.ramp_s,
        arrivals_s=_arrivals(scenario, load, repeat, count or 0),
    )


def _arrivals(scenario: Scenario, load: Load, repeat: int, count: int) -> tuple[float, ...]:
    """Of an open loop: the same in every run, another sample in every repeat."""
    if isinstance(load, ClosedLoop):
        return ()
    begins = offsets(load, f"arrivals/{scenario.dataset.seed}/{repeat}", scenario.stop.ramp_s)
    return tuple(itertools.islice(begins, count))


def _count(scenario: Scenario, load: Load, prompts: Sequence[Prompt]) -> int | None:
    """Dialogues of a measured phase; None where its duration ends it."""
    stop = scenario.stop
    if isinstance(load, OpenLoop):
        if stop.duration_s is None:
            return stop.requests or len(prompts)
        begun = round(load.request_rate_rps * (stop.ramp_s / 2 + stop.duration_s)) or 1
        return min(begun, stop.requests or begun)
    if stop.duration_s is not None and stop.requests is None:
        return None
    return stop.requests or max(len(prompts), DIALOGUES_PER_STREAM * load.concurrency)


def in_order(prompts: Sequence[Prompt], seed: int) -> Iterator[Dialogue]:
    """All prompts shuffled, then all of them shuffled anew, without end."""
    for cycle in itertools.count():
        order = list(prompts)
        random.Random(f"{seed}/{cycle}").shuffle(order)
        for prompt in order:
            suffix = f"#{cycle + 1}" if cycle else ""
            yield Dialogue(dialogue_id=f"{prompt.prompt_id}{suffix}", prompt=prompt, repeat=cycle)


def _warmup(
    name: str,
    load: Load,
    repeat: int,
    scenario: Scenario,
    prompts: Sequence[Prompt],
    warmup: Sequence[Prompt],
) -> Phase:
    if isinstance(load, OpenLoop):
        load = ClosedLoop(concurrency=min(WARMUP_STREAMS, load.max_in_flight or WARMUP_STREAMS))
    count = max(scenario.warmup_requests, load.concurrency)
    source = warmup or [_reversed(prompt) for prompt in prompts[:64]]
    dialogues = tuple(
        Dialogue(
            dialogue_id=f"warm-up-{index}",
            prompt=source[index % len(source)],
            repeat=index // len(source),
        )
        for index in range(count)
    )
    return Phase(
        name=f"warm-up {name}",
        load=load,
        repeat=repeat,
        measured=False,
        dialogues=dialogues,
        max_output_tokens=WARMUP_OUTPUT_TOKENS,
    )


def _reversed(prompt: Prompt) -> Prompt:
    """The prompt's ids backwards: the right length and vocabulary, and no prefix in common."""
    ids = prompt.prompt_token_ids
    return Prompt(
        prompt_id=f"warm-up-{prompt.prompt_id}",
        category=prompt.category,
        messages=prompt.messages if ids is None else (),
        prompt_token_ids=None if ids is None else array("I", ids[::-1]),
        source="warm-up",
    )
