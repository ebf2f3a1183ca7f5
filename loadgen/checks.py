"""Can this run be trusted? Every known way to fool such a benchmark is one function here.

A check reads one phase and yields caveats: what was seen with its value, and what to do. It changes
no figure. A new check is a function and an entry in CHECKS. Must not: raise, round for print.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from loadgen.acceptance import TOLERANCE, chunks_disproved
from loadgen.metrics import achieved_concurrency, completed, server_context
from loadgen.plan import DIALOGUES_PER_STREAM
from loadgen.stats import distribution
from loadgen.types import (
    Broke,
    Cancelled,
    Caveat,
    ClosedLoop,
    Completed,
    OpenLoop,
    PhaseData,
    Refused,
    TimedOut,
)
from loadgen.written import load_label

LAG_LIMIT_S = 0.010
CPU_LIMIT = 0.80
CAPPED_LIMIT = 0.20
REACHED = 0.95


def client_saturated(data: PhaseData) -> Iterator[Caveat]:
    """The client's own loop was late or its core full: latencies are its own in part."""
    if len(data.client) < 2:
        return
    lag = distribution([s.loop_lag_s for s in data.client[1:]])
    first, last = data.client[0], data.client[-1]
    cpu = (last.cpu_s - first.cpu_s) / max(last.at_s - first.at_s, 1e-9)
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
    if data.counters is not None:
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
    context = server_context(data)
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
    known = [a for a in data.acceptance if a.drafts is not None and a.accepted_tokens is not None]
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
    lengths = [(n, a) for a in data.acceptance if (n := a.acceptance_length) is not None]
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
    if done and len(capped) / len(done) > CAPPED_LIMIT:
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
        streams = int(achieved_concurrency(data) or 1)
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
    achieved = achieved_concurrency(data)
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


Check = Callable[[PhaseData], Iterable[Caveat]]

CHECKS: tuple[Check, ...] = (
    request_errors,
    asked_to_wait,
    client_saturated,
    foreign_traffic,
    unsettled,
    sources_disagree,
    server_queued,
    counters_not_usable,
    prefix_cache_hits,
    chunks_are_not_steps,
    output_counts_disagree,
    outputs_over_limit,
    outputs_cut_short,
    outputs_capped,
    too_few_samples,
    load_not_reached,
)


def check_phase(data: PhaseData) -> tuple[Caveat, ...]:
    """All checks over one measured phase, in the order of CHECKS."""
    return tuple(caveat for check in CHECKS for caveat in check(data))


def _caveat(data: PhaseData, code: str, message: str, advice: str) -> Caveat:
    return Caveat(code=code, message=message, advice=advice, phase=data.phase.name)
