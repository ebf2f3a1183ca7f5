"""Can this run be trusted? Every known way to fool such a benchmark is one function here.

A check reads one phase and yields caveats: what was seen with its value, and what to do. It changes
no figure. A new check is a function and an entry in CHECKS. `across` reads several runs. What can
be told before a run starts is preflight's. Must not: raise, round for print.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from loadgen import slo
from loadgen.acceptance import TOLERANCE, chunks_disproved
from loadgen.bounds import holds, in_seconds
from loadgen.metrics import ISL, completed, tokens_by_slice
from loadgen.plan import DIALOGUES_PER_STREAM
from loadgen.sides import config_of
from loadgen.stats import distribution, trend
from loadgen.types import (
    Acceptance,
    Broke,
    Cancelled,
    CategorySummary,
    Caveat,
    ClosedLoop,
    Completed,
    OpenLoop,
    PhaseData,
    Refused,
    Summary,
    TimedOut,
)
from loadgen.written import load_label, looks_text_up

LAG_LIMIT_S = 0.010
STALL_S = 1.0
CPU_LIMIT = 0.80
CAPPED_LIMIT = 0.20
REACHED = 0.95
NOT_STEADY = 1 / 3
"""Ramp and drain as a share of a phase. Of four dialogues a stream, the fewest asked for, about a
quarter is left to them; beyond a third most requests ran beside fewer others than the load says."""
SLICES = (10, 20)
"""Fewest and most slices of a steady window; none shorter than a median E2EL, so that one stream
does not put the same answer into two of them."""
TREND = 0.05
TREND_WIDER = 1.5
"""A trend is one that a 95 % interval, made this much wider, holds above TREND: about 99 %, since a
report has many phases. In played closed loops whose answers differ in speed by 30 %, phases without
a trend trip it in 5 % of the cases at one stream and 12 dialogues, in 1 % from 30 dialogues a
stream on; a fall by 15 % is found in 2 of 10 at 8 streams of 30, in all at 64 of 30
(tests/test_checks.py)."""
PADDED = 0.10
PADDED_PROMPTS = 0.05
"""From this share of a prompt on it is padded, from this share of prompts on it is a way of making
them. Text ends in a row of one sign at times, but not a tenth of it."""
ALIKE, ALIKE_PROMPTS, ALIKE_TOKENS = 0.5, 20, 64
"""Half of so many prompts, of so many tokens, have one length: no texts that people wrote do."""
UNLIKE = 0.15
"""Of an ISL bucket's prompts so many are of other kinds than all prompts are."""
ISL_FALL = 0.25
"""Acceptance length lost from an ISL bucket to the next. Llama 3.3 70B on SPEED-Bench: EAGLE-3 goes
2.93, 2.59, 1.19 at 1k, 2k, 8k (−12 %, −54 %); a draft model stays within 3 %."""
LONGER = 1.25
"""Between runs: less is another repeat of one length."""


_MODEL = re.compile(r'[{,]model_name="([^"]*)"')
_STARTED = "process_start_time_seconds"
_AT_ANY_TEMPERATURE = (
    *("repeat_penalty", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("dry_multiplier", "xtc_probability", "typical_p"),
)
"""They change or remove the likeliest token too, so they act at temperature 0."""
_FALLS = "acceptance-falls-with-isl"
_BY_ISL = (
    "Read acceptance by ISL bucket, never pooled. A drafter that was trained on short text "
    "collapses on long input: see its trained context, or use a draft model or MTP there."
)


def client_saturated(data: PhaseData) -> Iterator[Caveat]:
    """The client's own loop was late or its core full: latencies are its own in part."""
    if len(data.client) < 2:
        return
    lag = distribution([s.loop_lag_s for s in data.client[1:]])
    first, last = data.client[0], data.client[-1]
    cpu = (last.cpu_s - first.cpu_s) / max(last.at_s - first.at_s, 1e-9)
    if lag.max is not None and lag.max > STALL_S:
        yield _caveat(
            data,
            "client-stalled",
            f"The client's event loop stood still for {lag.max:.1f} s: latencies of that time are "
            "its own.",
            "Look for what stopped the process: a machine that slept, a debugger, memory that was "
            "swapped out.",
        )
    if lag.p50 is not None and lag.p50 > LAG_LIMIT_S:
        yield _caveat(
            data,
            "client-late",
            f"The client's event loop was {lag.p50 * 1e3:.0f} ms late in half of its half-second "
            f"windows (at most {(lag.max or 0) * 1e3:.0f} ms): latencies are too high by as much.",
            "Run the client on a machine that does not share its cores with the server, or at a "
            "lower concurrency.",
        )
    if cpu > CPU_LIMIT:
        yield _caveat(
            data,
            "client-saturated",
            f"The client used {cpu:.0%} of a core: it may be the bottleneck that is measured.",
            "Lower the concurrency, or use a machine with faster or freer cores.",
        )


def foreign_traffic(data: PhaseData) -> Iterator[Caveat]:
    """The server generated more or fewer tokens than this client received."""
    counters = data.counters
    if counters is None or counters.generated_tokens is None:
        return
    if not all(isinstance(r.outcome, Completed) for r in data.records):
        return  # a request that was cut off leaves tokens on the server that nobody received
    ours = sum(r.osl_tokens for r in data.records)
    if counters.generated_tokens != ours:
        yield _caveat(
            data,
            "foreign-traffic",
            f"The server's counters grew by {counters.generated_tokens:,} tokens while this client "
            f"received {ours:,}: somebody else used the server, or it counts differently.",
            "Measure a server that nobody else uses. Counter figures of this phase are off by as "
            "much; per-request figures are not.",
        )


def counters_not_usable(data: PhaseData) -> Iterator[Caveat]:
    """Counters that shrink or change their labels: a restart, another model, another rank."""
    if data.counters is not None or any(several_models(data)):
        return
    if "went back" in data.counters_missing:
        yield _caveat(
            data,
            "counters-went-back",
            f"{data.counters_missing}: the server restarted during the phase.",
            "Find out why it restarted and measure again.",
        )
    elif data.snapshots:
        yield _caveat(
            data,
            "counters-not-usable",
            f"The server's counters were left out: {data.counters_missing}.",
            "The next source of acceptance is used. Measure one model on one server, and see that "
            "its metrics page can be read all the time.",
        )


def unsettled(data: PhaseData) -> Iterator[Caveat]:
    """A border was taken while the server was busy, so its counters belong to others too."""
    edges = [s.edge for s in data.snapshots if s.edge != "tick" and not s.settled]
    if edges:
        yield _caveat(
            data,
            "server-not-idle",
            f"The server was not idle at the {' and '.join(edges)} of the phase.",
            "Measure a server that nobody else uses; counter figures may hold others' work.",
        )


def server_queued(data: PhaseData) -> Iterator[Caveat]:
    """More was in flight than the server ran: TTFT holds a queue, and the batch is its limit."""
    context = data.figures.server if data.figures is not None else None
    if context is None:
        return
    if (context.waiting_p50 or 0) >= 1:
        limit = data.server.max_running
        yield _caveat(
            data,
            "server-queued",
            f"Requests waited at the server in half of its readings or more (median "
            f"{context.waiting_p50:g}, at most {context.waiting_max:g})"
            + (f"; it runs at most {limit:,} at a time." if limit else "."),
            "Read throughput as that of a full server and TTFT with its queue in it, or raise the "
            "server's running limit to the largest concurrency.",
        )
    if context.preemptions:
        yield _caveat(
            data,
            "server-preempted",
            f"The server put back {context.preemptions:,} running requests for want of KV cache: "
            "their tokens were computed twice.",
            "Give the cache more memory, or lower the concurrency or the context.",
        )


def sources_disagree(data: PhaseData) -> Iterator[Caveat]:
    """Two sources of one figure that differ, with what differs between them."""
    acceptance = data.figures.acceptance if data.figures is not None else ()
    known = [a for a in acceptance if a.drafts is not None and a.accepted_tokens is not None]
    for first, other in zip(known[:1] * len(known), known[1:], strict=False):
        drafts = (other.drafts or 0) - (first.drafts or 0)
        accepted = (other.accepted_tokens or 0) - (first.accepted_tokens or 0)
        if drafts or accepted:
            yield _caveat(
                data,
                "sources-disagree",
                f"{other.source} and {first.source} differ by {drafts:+,} of {first.drafts:,} "
                f"drafts and {accepted:+,} of {first.accepted_tokens:,} accepted tokens: "
                f"{_why_apart(data)}.",
                f"Figures are from {first.source}, which are of this run's requests alone.",
            )
    lengths = [(n, a) for a in acceptance if (n := a.acceptance_length) is not None]
    for length, other in lengths[1:]:
        best, source = lengths[0]
        if abs(length - best) > TOLERANCE * best:
            yield _caveat(
                data,
                "sources-disagree",
                f"Acceptance length is {length:.3f} with {other.steps_source} as decode steps and "
                f"{best:.3f} with {source.steps_source}: chunks were merged or split, or the "
                "server counts requests that this client did not complete.",
                f"Figures are from {source.source}. Set the server's stream interval to 1.",
            )


def _why_apart(data: PhaseData) -> str:
    """What the server's own count of tokens says about the difference."""
    told = data.counters.generated_tokens if data.counters is not None else None
    ours = sum(r.osl_tokens for r in data.records)
    if told is None:
        return "the server does not tell how many tokens it generated, so it cannot be said why"
    if told > ours:
        return f"the server generated {told - ours:,} tokens for somebody else in that time"
    if told < ours:
        return f"the server's counters miss {ours - told:,} tokens of this run"
    return "the same tokens were generated, so the server counts drafts in two ways"


def prefix_cache_hits(data: PhaseData) -> Iterator[Caveat]:
    """Prompt tokens that were not computed flatter TTFT and pollute the first step (vLLM 0.32)."""
    hits = sum(r.cached_tokens or 0 for r in data.records)
    prompts = sum(r.isl_tokens or 0 for r in data.records)
    if hits:
        yield _caveat(
            data,
            "prefix-cache",
            f"{hits:,} of {prompts:,} prompt tokens came from the prefix cache: TTFT is flattered, "
            "and acceptance can be too.",
            "Start the server with its prefix cache off (vLLM --no-enable-prefix-caching, SGLang "
            "--disable-radix-cache, llama.cpp --no-cache-prompt), or use prompts not sent before.",
        )


def chunks_are_not_steps(data: PhaseData) -> Iterator[Caveat]:
    """Merged or split chunks: no acceptance and no step time can be read off them."""
    why = chunks_disproved(completed(data.records), data.engine, data.draft_depth)
    if why:
        yield _caveat(
            data,
            "chunks-not-steps",
            f"Chunks are not decode steps here: {why}. Acceptance from chunks is left out.",
            "Set the server's stream interval to 1, take away buffering proxies, and lower the "
            "load on the server's API process.",
        )


def outputs_capped(data: PhaseData) -> Iterator[Caveat]:
    """Answers that our cap cut: their length is ours, and their ends were never measured."""
    done = completed(data.records)
    capped = [r for r in done if r.finish_reason == "length"]
    asked = data.scenario.sampling.ignore_eos  # then eos_ignored says it
    if done and not asked and len(capped) / len(done) > CAPPED_LIMIT:
        yield _caveat(
            data,
            "outputs-capped",
            f"{len(capped)} of {len(done)} answers were cut at the output limit: acceptance was "
            "measured on beginnings only.",
            "Raise --max-output-tokens until most answers end by themselves (SPEED-Bench uses "
            "4,096), or say that lengths were fixed.",
        )


def too_few_samples(data: PhaseData) -> Iterator[Caveat]:
    """Ramp and drain dominate a short phase, and a tail percentile needs its samples."""
    dialogues, load = len({r.dialogue_id for r in data.records}), data.phase.load
    if isinstance(load, ClosedLoop):
        streams, at = load.concurrency, f"concurrency {load.concurrency}"
    else:
        streams = int(_in_flight(data) or 1)
        at = f"{load_label(load)} with {streams} in flight"
    needed = DIALOGUES_PER_STREAM * streams
    if dialogues < needed:
        yield _caveat(
            data,
            "too-few-dialogues",
            f"{dialogues} dialogues at {at}: ramp and drain are a large part of the phase. "
            f"Expected at least {needed}.",
            "Raise --requests, or lower the load.",
        )


def load_not_reached(data: PhaseData) -> Iterator[Caveat]:
    """Figures of a load that was not there: too few in flight, or arrivals that had to wait."""
    load = data.phase.load
    if isinstance(load, OpenLoop):
        yield from _held_back(data, load)
        return
    achieved = _in_flight(data)
    if achieved is None and data.client:  # never full, or no end: the whole phase
        achieved = statistics.median(s.in_flight for s in data.client)
    if achieved is not None and data.records and achieved < REACHED * load.concurrency:
        yield _caveat(
            data,
            "load-not-reached",
            f"A median of {achieved:g} requests was in flight, and the load asks for "
            f"{load.concurrency}: its figures are of a lower load.",
            "Give more --requests than streams, look for what holds requests back (a late client, "
            "a tokenizer, a server that refuses), or measure the lower load.",
        )


def _in_flight(data: PhaseData) -> float | None:
    return data.figures.achieved_concurrency_p50 if data.figures is not None else None


def _held_back(data: PhaseData, load: OpenLoop) -> Iterator[Caveat]:
    first = [r for r in data.records if r.turn == 0 and r.intended_s is not None]
    if len(first) < 2:
        return
    intended = [r.intended_s or 0.0 for r in first]
    sent = [r.sent_s for r in first]
    planned_s, taken_s = max(intended) - min(intended), max(sent) - min(sent)
    if planned_s < REACHED * taken_s:
        limit = f" (at most {load.max_in_flight} in flight)" if load.max_in_flight else ""
        yield _caveat(
            data,
            "load-not-reached",
            f"{len(first)} dialogues were to begin within {planned_s:.3g} s and took "
            f"{taken_s:.3g} s{limit}: the server had a lower rate.",
            "Latencies from the intended instants hold the wait. Raise --max-in-flight, use a "
            "quicker client, or measure a lower rate.",
        )


def slo_crossed(data: PhaseData) -> Iterator[Caveat]:
    """A bound of the scenario's slo does not hold at this load, or cannot be told to."""
    if data.figures is None:
        return
    bounds, _ = slo.read(data.scenario.slo, "the scenario's slo:")
    for bound in bounds:
        value = slo.figure(bound, [data.figures])
        if value is None:
            yield _caveat(
                data,
                "slo-not-judged",
                f"Whether {bound.text} holds could not be judged: too few requests, or no such "
                "figure.",
                "Raise --requests (a p99 needs 100), or bound another figure.",
            )
        elif not holds(bound, value):
            unit = " s" if in_seconds(bound.metric) else ""
            name = bound.metric.removesuffix("_s") if unit else bound.metric
            said = f"is {value:.4g}{unit}" if math.isfinite(value) else "was lost with a request"
            yield _caveat(
                data,
                "slo-crossed",
                f"{name}_{bound.statistic} {said}; the scenario's slo asks for {bound.text}.",
                "This load is outside the SLO. draftload capacity finds the highest load inside.",
            )


def request_errors(data: PhaseData) -> Iterator[Caveat]:
    """Failed requests are not in the figures, and a server that fails is not at its load."""
    reasons: Counter[str] = Counter()
    example = ""
    for record in data.records:
        outcome = record.outcome
        match outcome:
            case Refused():
                reasons[f"refused with HTTP {outcome.status}"] += 1
                example = example or outcome.message
            case Broke():
                reasons[f"broke ({outcome.reason})"] += 1
                example = example or outcome.message
            case TimedOut():
                reasons[f"timed out after {outcome.after_s:g} s"] += 1
            case Cancelled() | Completed():
                pass
    if reasons:
        what = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        yield _caveat(
            data,
            "request-errors",
            f"{reasons.total()} of {len(data.records)} requests failed: {what}."
            + (f" The first said: {example}" if example else ""),
            "Figures are of the completed requests only. Read the server's log.",
        )


def output_counts_disagree(data: PhaseData) -> Iterator[Caveat]:
    """Tokens counted in the chunks are not what the final usage says."""
    done = completed(data.records)
    off = [r for r in done if r.usage_tokens is not None and r.usage_tokens != r.osl_tokens]
    if off:
        worst = max(off, key=lambda r: abs(r.osl_tokens - (r.usage_tokens or 0)))
        yield _caveat(
            data,
            "token-counts-disagree",
            f"In {len(off)} of {len(done)} answers the tokens in the chunks are not those of the "
            f"final usage (at worst {worst.osl_tokens} and {worst.usage_tokens}).",
            "The chunks' count was used. Look for a proxy or a parser that swallows tokens.",
        )


def outputs_over_limit(data: PhaseData) -> Iterator[Caveat]:
    """More than was asked for: the server's stream, or its count, is not to be trusted."""
    over = [r for r in data.records if r.max_output_tokens and r.osl_tokens > r.max_output_tokens]
    if over:
        worst = max(over, key=lambda r: r.osl_tokens)
        yield _caveat(
            data,
            "outputs-over-limit",
            f"{len(over)} of {len(data.records)} answers are longer than was asked for (at worst "
            f"{worst.osl_tokens:,} tokens, limit {worst.max_output_tokens:,}).",
            "The server ignores max_tokens, or counts something else: find out before you use "
            "figures of this run.",
        )


def outputs_cut_short(data: PhaseData) -> Iterator[Caveat]:
    """Cut for length below the limit: a prompt and its limit exceed the context, and the server
    answers 200 all the same (vLLM 0.32, llama.cpp b11434)."""
    cut = [
        r
        for r in completed(data.records)
        if r.finish_reason == "length"
        and r.token_count_source is not None
        and max(r.osl_tokens, r.usage_tokens or 0) < (r.max_output_tokens or 0)
    ]
    if cut:
        worst = min(cut, key=lambda r: r.osl_tokens)
        yield _caveat(
            data,
            "outputs-cut-short",
            f"{len(cut)} of {len(data.records)} answers ended for length below their limit (at "
            f"worst {worst.osl_tokens:,} of {worst.max_output_tokens:,} tokens): the context was "
            "full, and the server shortened them without a word.",
            "Start the server with a larger context, or lower --max-output-tokens; later turns "
            "carry all answers before them.",
        )


def asked_to_wait(data: PhaseData) -> Iterator[Caveat]:
    """Retry-After: the server, or a gateway before it, limits the rate. Nothing is sent again."""
    waits = [
        r.outcome.retry_after_s
        for r in data.records
        if isinstance(r.outcome, Refused) and r.outcome.retry_after_s is not None
    ]
    if waits:
        yield _caveat(
            data,
            "asked-to-wait",
            f"{len(waits)} requests were refused with Retry-After (up to {max(waits):g} s): a rate "
            "limit was measured, not the server.",
            "Take the limit away for the measurement, or lower the load below it.",
        )


def _where_in_turns(values: Iterable[object]) -> bool:
    """Whether a value comes back after another one was seen."""
    order = [value for value, _ in itertools.groupby(values)]
    return len(order) > len(set(order))


def several_models(data: PhaseData) -> Iterator[Caveat]:
    """A balancer before unlike servers: the figures are a mixture that nobody chose."""
    named = {r.served_model for r in completed(data.records)} - {None}
    paged = {name for s in data.snapshots for row in s.samples for name in _MODEL.findall(row)}
    for models, who in ((named, "answers name"), (paged, "the metrics page counts")):
        if len(models) > 1:
            yield _caveat(
                data,
                "several-models",
                f"More than one model is behind this URL: {who} "
                f"{', '.join(sorted(filter(None, models))[:4])}.",
                "Give the URL of one server, or one model, and measure each alone.",
            )
            return
    pages = [s.samples for s in data.snapshots]
    starts = [page[_STARTED] for page in pages if _STARTED in page]
    made = [n for page in pages if (n := data.engine.counters(page).generated_tokens) is not None]
    falls = sum(now < then for then, now in itertools.pairwise(made))
    if _where_in_turns(starts) or falls > 1:
        yield _caveat(
            data,
            "several-servers",
            "The metrics page is now one server's and now another's: a balancer stands before "
            "several.",
            "Give --url or --metrics-url of one server: counters of a balancer's pages belong to "
            "whichever answered.",
        )


def ids_not_honoured(data: PhaseData) -> Iterator[Caveat]:
    """The server read other prompts than were sent: cut, templated again, or tokenized anew."""
    if data.server.api != "completions":
        return
    first = [r for r in completed(data.records) if r.turn == 0 and r.isl_tokens is not None]
    sent = {name: prompt.isl_tokens for name, prompt in data.prompts.items()}
    other = [r for r in first if sent.get(r.prompt_id) not in (None, r.isl_tokens)]
    if other:
        worst = max(other, key=lambda r: abs((r.isl_tokens or 0) - (sent[r.prompt_id] or 0)))
        yield _caveat(
            data,
            "ids-not-honoured",
            f"In {len(other)} of {len(first)} first turns the server counted other prompt tokens "
            f"than were sent (at worst {worst.isl_tokens:,} of {sent[worst.prompt_id]:,}).",
            "It cuts prompts, adds tokens or reads ids as text: find out, or use --api chat.",
        )


def padded_prompts(data: PhaseData) -> Iterator[Caveat]:
    """Prompts stretched by one piece, or made to one length: a drafter copies what repeats."""
    used = [data.prompts[n] for n in {r.prompt_id for r in data.records} if n in data.prompts]
    stretched = [share for prompt in used if (share := prompt.padded or 0.0) >= PADDED]
    if used and len(stretched) > PADDED_PROMPTS * len(used):
        yield _caveat(
            data,
            "padded-prompts",
            f"{len(stretched)} of {len(used)} prompts are stretched by one piece over and over, by "
            f"{statistics.fmean(stretched):.0%} of their length in the mean.",
            "Repetition flatters n-gram drafters and caches. Use text that is long by itself: "
            "--scenario throughput --isl N.",
        )
    elif data.scenario.dataset.kind in ("builtin", "jsonl"):
        yield from _alike(data)


def _alike(data: PhaseData) -> Iterator[Caveat]:
    lengths = {r.prompt_id: r.isl_tokens for r in data.records if r.turn == 0 and r.isl_tokens}
    if len(lengths) < ALIKE_PROMPTS:
        return
    ((length, count),) = Counter(lengths.values()).most_common(1)
    if length >= ALIKE_TOKENS and count >= ALIKE * len(lengths):
        yield _caveat(
            data,
            "padded-prompts",
            f"{count} of {len(lengths)} prompts have exactly {length:,} tokens: they were cut or "
            "padded to a length.",
            "Acceptance on cut or padded text is not that on text as people write it: say how it "
            "was made, or use --scenario throughput --isl N, which cuts only documents.",
        )


def eos_ignored(data: PhaseData) -> Iterator[Caveat]:
    """What a model writes past its own end is no text that anybody would get."""
    if data.scenario.sampling.ignore_eos and completed(data.records):
        yield _caveat(
            data,
            "eos-ignored",
            "Answers ran past their end to the output limit (ignore_eos): lengths are made, and "
            "acceptance holds text after the end, which often repeats itself.",
            "Use it for throughput at a fixed length only. Measure acceptance without "
            "--ignore-eos.",
        )


def sampling_mismatch(data: PhaseData) -> Iterator[Caveat]:
    """The server samples by defaults of its own, which no request of ours sets."""
    greedy = data.scenario.sampling.temperature == 0
    acting = {
        name: value
        for name, value in data.server.sampling_defaults.items()
        if name in _AT_ANY_TEMPERATURE or not greedy
    }
    if acting:
        said = ", ".join(f"{name} {value:g}" for name, value in acting.items())
        yield _caveat(
            data,
            "sampling-mismatch",
            f"The server samples by defaults that this run did not ask for: {said}.",
            "They change what is written and accepted. Start every server that you compare with "
            "the same ones (llama.cpp --top-k 0 --min-p 0, vLLM --generation-config vllm).",
        )


def spec_not_as_claimed(data: PhaseData) -> Iterator[Caveat]:
    """What drafts were seen, against the config that the server was started with."""
    config = data.server.config
    if config is None:
        return
    found = data.figures.acceptance[0] if data.figures is not None else None
    told = [r.spec for r in completed(data.records) if r.spec is not None]
    if config.spec is None:
        grown = data.counters.drafts or 0 if data.counters is not None else 0
        drafts = max(grown, sum(spec.drafts or 0 for spec in told))
        said = f"the config says none, and {drafts:,} drafts were counted" if drafts else ""
    else:
        # What answers tell may be the nodes of a tree (SGLang), which are more than its depth.
        claimed = max(config.spec.draft_depth or 0, config.spec.draft_tokens or 0)
        depth = max((spec.draft_depth or 0 for spec in told), default=0)
        said = ""
        always = not looks_text_up(config.spec.method)
        if always and found is not None and found.drafts == 0 and found.steps:
            said = f"the config says {config.spec.method}, and no step of {found.steps:,} drafted"
        elif claimed and depth > claimed:
            said = f"the config says k = {claimed}, and answers tell k = {depth}"
    if said:
        yield _caveat(
            data,
            "spec-not-as-claimed",
            f"Speculation is not what the server was started with: {said}.",
            "Read the server's log for why it changed or left out the setting; figures are of "
            "what the server does, whatever the config is called.",
        )


def ramp_too_large(data: PhaseData) -> Iterator[Caveat]:
    """Most of the phase was not at its load: whole-phase figures are of a lower one."""
    rates = data.figures.throughput if data.figures is not None else None
    if rates is None or rates.ramp_share is None or rates.drain_share is None:
        return
    if rates.ramp_share + rates.drain_share > NOT_STEADY and not any(too_few_samples(data)):
        yield _caveat(
            data,
            "ramp-too-large",
            f"Ramp and drain are {rates.ramp_share:.0%} and {rates.drain_share:.0%} of the phase: "
            "latencies, and throughput over the whole phase, are in part of a lower load.",
            "Use the steady throughput, and raise --requests or --duration.",
        )


def throughput_trend(data: PhaseData) -> Iterator[Caveat]:
    """A window that is called steady and is not: something warms up, fills up or slows down.

    Not of an open loop: its window begins with few in flight, and they come to their number within
    it.
    """
    if not isinstance(data.phase.load, ClosedLoop):
        return
    start, end = data.phase.steady_from_s, data.phase.steady_to_s
    done = completed(data.records)
    if data.figures is None or data.figures.throughput.steady is None or start is None or not end:
        return
    median = statistics.median(r.end_s - r.sent_s for r in done)
    slices = min(int((end - start) / median), SLICES[1]) if median > 0 else 0
    if slices < SLICES[0]:
        return
    if found := clear_trend(tokens_by_slice(data.records, start, end, slices)):
        change, reach = found
        yield _caveat(
            data,
            "throughput-trend",
            f"Output throughput {'rose' if change > 0 else 'fell'} by {abs(change):.0%} of its "
            f"mean (± {reach:.0%}) within the window at full load: it was not steady.",
            "Look for what changes: clocks and heat, a cache that fills, a queue, a drafter that "
            "learns, longer contexts. Warm up longer, or measure for longer.",
        )


def clear_trend(counts: Sequence[float]) -> tuple[float, float] | None:
    """The change over even slices as a share of their mean, and its reach; None: within noise."""
    if (found := trend(counts)) is None:
        return None
    change, reach = (found.low + found.high) / 2, (found.high - found.low) / 2
    return (change, reach) if abs(change) - TREND_WIDER * reach > TREND else None


def acceptance_falls_with_isl(data: PhaseData) -> Iterator[Caveat]:
    """A drafter that was trained on short text: pooled over input lengths, AL is nobody's."""
    lengths: dict[str, list[int]] = {}
    for r in completed(data.records):
        if r.isl_bucket is not None and r.isl_tokens is not None:
            lengths.setdefault(r.isl_bucket, []).append(r.isl_tokens)
    groups = data.figures.isl_buckets if data.figures is not None else ()
    buckets = [
        (statistics.median(lengths[g.category]), g.category, g.acceptance)
        for g in groups
        if g.category in lengths and g.acceptance is not None
    ]
    buckets.sort(key=lambda bucket: bucket[0])
    if _unlike(data):
        return  # other text, not longer text
    for (_, short, before), (_, long, after) in itertools.pairwise(buckets):
        if said := _fall(before, after, short, long):
            yield _caveat(data, _FALLS, said, _BY_ISL)


def _unlike(data: PhaseData) -> bool:
    """Whether the ISL buckets hold other categories or tiers, or the same in other shares."""
    rows = [r for r in completed(data.records) if r.isl_bucket is not None]
    buckets = {r.isl_bucket for r in rows}
    every = Counter((r.category, r.tier) for r in rows)
    for bucket in buckets:
        here = Counter((r.category, r.tier) for r in rows if r.isl_bucket == bucket)
        apart = sum(abs(here[k] / here.total() - every[k] / every.total()) for k in every) / 2
        if apart > UNLIKE:
            return True
    return False


def _fall(before: Acceptance, after: Acceptance, short: str, long: str, of: str = "") -> str:
    """How far acceptance length falls, where it is by ISL_FALL or more and the intervals, which
    fewer than three dialogues have not, leave a gap; "" else."""
    high, low = before.acceptance_length, after.acceptance_length
    if high is None or low is None or low > high * (1 - ISL_FALL):
        return ""
    if not before.interval or not after.interval or after.interval.high >= before.interval.low:
        return ""
    return (
        f"Acceptance length falls by {1 - low / high:.0%} from {short} to {long} input tokens{of}: "
        f"{high:.2f}, {low:.2f}."
    )


Check = Callable[[PhaseData], Iterable[Caveat]]

CHECKS: tuple[Check, ...] = (
    request_errors,
    asked_to_wait,
    client_saturated,
    foreign_traffic,
    unsettled,
    several_models,
    spec_not_as_claimed,
    sampling_mismatch,
    ids_not_honoured,
    padded_prompts,
    eos_ignored,
    sources_disagree,
    acceptance_falls_with_isl,
    server_queued,
    counters_not_usable,
    prefix_cache_hits,
    chunks_are_not_steps,
    output_counts_disagree,
    outputs_over_limit,
    outputs_cut_short,
    outputs_capped,
    too_few_samples,
    ramp_too_large,
    throughput_trend,
    load_not_reached,
    slo_crossed,
)


def check_phase(data: PhaseData) -> tuple[Caveat, ...]:
    """All checks over one measured phase, in the order of CHECKS."""
    return tuple(caveat for check in CHECKS for caveat in check(data))


def across(summaries: Sequence[Summary]) -> tuple[Summary, ...]:
    """The runs with what only several of them tell: acceptance that falls with the input, where
    each run has one length (--scenario throughput), of one config and load, tier by tier."""
    places: dict[object, list[tuple[float, int, str, CategorySummary]]] = {}
    for index, run in enumerate(summaries):
        asked = run.info.scenario
        for phase in run.phases if asked.dataset.kind == "throughput" else ():
            isl = phase.distributions[ISL.name].p50 or 0.0
            for group in phase.tiers if isl else ():
                key = (config_of(run.info), phase.load, asked.sampling, group.category)
                places.setdefault(key, []).append((isl, index, phase.name, group))
    told: dict[int, list[Caveat]] = {}
    for measured in places.values():
        measured.sort(key=lambda at: at[0])
        for (short, _, _, before), (long, index, phase_name, after) in itertools.pairwise(measured):
            one, other = before.acceptance, after.acceptance
            if long < short * LONGER or one is None or other is None:
                continue
            tier = f" ({after.category})"
            if said := _fall(one, other, f"{short:,.0f}", f"{long:,.0f}", tier):
                found = Caveat(code=_FALLS, message=said, advice=_BY_ISL, phase=phase_name)
                told.setdefault(index, []).append(found)
    return tuple(
        msgspec.structs.replace(run, caveats=(*run.caveats, *told.get(index, ())))
        for index, run in enumerate(summaries)
    )


def _caveat(data: PhaseData, code: str, message: str, advice: str) -> Caveat:
    return Caveat(code=code, message=message, advice=advice, phase=data.phase.name)
