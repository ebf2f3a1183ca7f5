"""Figures of requests and of phases. METRICS is the table: one row a figure of a request.

TTFT runs from `sent_s` to the first chunk that carries a token; TPOT is the time from first to last
chunk over the tokens after the first chunk (several tokens a chunk under speculation, so a chunk
gap is no time per token). In an open loop latencies run from `intended_s` too: what a user waits
who came when nobody was ready. Must not: read a clock or a server's counters, round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from loadgen.stats import distribution
from loadgen.types import (
    Broke,
    Cancelled,
    Completed,
    Distribution,
    PhaseData,
    PhaseSummary,
    Refused,
    RequestCounts,
    RequestFigures,
    RequestRecord,
    ServerContext,
    ServerLoad,
    Throughput,
    TimedOut,
)

# Upper bounds of vLLM's histograms of time to first token, of time per token and of whole requests,
# seconds (0.32, as its page has them): one query then overlays what client and server say.
TTFT_BOUNDS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_BOUNDS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
REQUEST_BOUNDS_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure of a request. `values` gives what the request adds to the sample: one or none,
    unless `many`."""

    name: str
    unit: str
    meaning: str
    values: Callable[[RequestRecord], Sequence[float]]
    many: bool = False


def decode_s(record: RequestRecord) -> float | None:
    """First chunk to last, seconds; None below two chunks."""
    gaps = record.chunk_gaps_us
    return sum(gaps[1:]) / 1e6 if len(gaps) > 1 else None


def decode_tokens(record: RequestRecord) -> int | None:
    """Tokens after the first chunk; None where chunks were not counted."""
    if record.chunk_tokens is None or len(record.chunk_tokens) < 2:
        return None
    return record.osl_tokens - record.chunk_tokens[0]


def tpot_s(record: RequestRecord) -> float | None:
    """Seconds an output token after the first chunk."""
    time, tokens = decode_s(record), decode_tokens(record)
    return time / tokens if time is not None and tokens else None


def _optional(value: float | None) -> tuple[float, ...]:
    return () if value is None else (value,)


def _ttft(record: RequestRecord) -> tuple[float, ...]:
    return (record.chunk_gaps_us[0] / 1e6,) if record.chunk_gaps_us else ()


def _since_intended(record: RequestRecord, at_s: float | None) -> tuple[float, ...]:
    if at_s is None or record.intended_s is None:
        return ()
    return (at_s - record.intended_s,)


def _first_token_s(record: RequestRecord) -> float | None:
    return record.sent_s + record.chunk_gaps_us[0] / 1e6 if record.chunk_gaps_us else None


def _gaps(record: RequestRecord) -> Any:
    import numpy as np

    gaps = record.chunk_gaps_us[1:]
    return np.frombuffer(gaps, dtype=np.uint32) / 1e6 if gaps else ()


def _user_speed(record: RequestRecord) -> tuple[float, ...]:
    seconds = tpot_s(record)
    return (1 / seconds,) if seconds else ()


USER_SPEED = Metric(
    name="user_tokens_per_s", unit="tokens/s", meaning="user speed: 1 ÷ TPOT", values=_user_speed
)

TTFT = Metric(
    name="ttft_s",
    unit="s",
    meaning="time to first token: first token-carrying chunk − sent",
    values=_ttft,
)

ISL = Metric(
    name="isl_tokens",
    unit="tokens",
    meaning="input length in the target model's tokens",
    values=lambda r: _optional(r.isl_tokens),
)

METRICS: tuple[Metric, ...] = (
    ISL,
    Metric(
        name="osl_tokens",
        unit="tokens",
        meaning="output length in the target model's tokens",
        values=lambda r: (r.osl_tokens,),
    ),
    TTFT,
    Metric(
        name="tpot_s",
        unit="s",
        meaning="time per output token after the first chunk",
        values=lambda r: _optional(tpot_s(r)),
    ),
    Metric(
        name="chunk_gap_s",
        unit="s",
        meaning="time between token-carrying chunks",
        values=_gaps,
        many=True,
    ),
    Metric(
        name="tokens_per_chunk",
        unit="tokens",
        meaning="tokens in a token-carrying chunk",
        values=lambda r: r.chunk_tokens or (),
        many=True,
    ),
    Metric(
        name="e2el_s",
        unit="s",
        meaning="end-to-end latency: finish chunk − sent",
        values=lambda r: (r.end_s - r.sent_s,),
    ),
    USER_SPEED,
    Metric(
        name="ttft_intended_s",
        unit="s",
        meaning="open loop: first token-carrying chunk − when the request should have left",
        values=lambda r: _since_intended(r, _first_token_s(r)),
    ),
    Metric(
        name="e2el_intended_s",
        unit="s",
        meaning="open loop: finish chunk − when the request should have left",
        values=lambda r: _since_intended(r, r.end_s),
    ),
    Metric(
        name="send_delay_s",
        unit="s",
        meaning="open loop: sent − when the request should have left",
        values=lambda r: _since_intended(r, r.sent_s),
    ),
)


def completed(records: Sequence[RequestRecord]) -> tuple[RequestRecord, ...]:
    """The records whose stream ended as the API says."""
    return tuple(r for r in records if isinstance(r.outcome, Completed))


def distributions(records: Sequence[RequestRecord]) -> dict[str, Distribution]:
    """Every row of METRICS over `records`."""
    return {metric.name: figure(metric, records) for metric in METRICS}


def each(records: Sequence[RequestRecord]) -> tuple[RequestFigures, ...]:
    """The single figures of METRICS of every request that we did not cancel."""
    single = [metric for metric in METRICS if not metric.many]
    return tuple(
        RequestFigures(
            category=record.category,
            completed=isinstance(record.outcome, Completed),
            values={m.name: float(some[0]) for m in single if len(some := m.values(record))}
            if isinstance(record.outcome, Completed)
            else {},
        )
        for record in records
        if not isinstance(record.outcome, Cancelled)
    )


def figure(metric: Metric, records: Sequence[RequestRecord]) -> Distribution:
    """One row of METRICS over `records`."""
    import numpy as np

    parts = [values for r in records if len(values := metric.values(r))]
    return distribution(np.concatenate(parts) if parts else ())


def counts(records: Sequence[RequestRecord]) -> RequestCounts:
    """Every request sent ends in exactly one outcome."""
    of = dict.fromkeys((Completed, Refused, Broke, TimedOut, Cancelled), 0)
    for record in records:
        of[type(record.outcome)] += 1
    return RequestCounts(
        sent=len(records),
        completed=of[Completed],
        refused=of[Refused],
        broke=of[Broke],
        timed_out=of[TimedOut],
        cancelled=of[Cancelled],
        resent=sum(r.resent for r in records),
    )


def span_s(records: Sequence[RequestRecord]) -> float:
    """First send to last end, seconds."""
    if not records:
        return 0.0
    return max(r.end_s for r in records) - min(r.sent_s for r in records)


def requests_per_s(phase: PhaseSummary) -> float | None:
    """Completed requests a second, first send to last end."""
    return phase.requests.completed / phase.span_s if phase.span_s > 0 else None


def total(distribution: Distribution) -> int | None:
    """The sum of what is counted in whole numbers, such as tokens; None where nothing was."""
    return None if distribution.mean is None else round(distribution.mean * distribution.n)


def throughput(data: PhaseData) -> Throughput:
    """Output tokens a second, whole and steady (DESIGN §4).

    Steady counts the tokens of all streams stamped between the moment when in-flight first reached
    its target and the last dispatch; None where that is shorter than two median E2EL.
    """
    done = completed(data.records)
    span = span_s(done)
    whole = sum(r.osl_tokens for r in done) / span if span > 0 else None
    start, end = data.phase.steady_from_s, data.phase.steady_to_s
    if not done or start is None or end is None:
        return Throughput(whole=whole, why_not_steady="the load was never at its target")
    found = _around(data.records, whole, start, end)
    if any(r.chunk_tokens is None for r in done):
        return replace(found, why_not_steady="the tokens of a chunk are not known")
    shortest = 2 * statistics.median(r.end_s - r.sent_s for r in done)
    if end - start < shortest:
        return replace(
            found, why_not_steady="the window at full load is shorter than two median E2EL"
        )
    tokens = sum(_tokens_between(r, start, end) for r in data.records)
    return replace(found, steady=tokens / (end - start))


def tokens_by_slice(
    records: Sequence[RequestRecord], start: float, end: float, slices: int
) -> tuple[int, ...]:
    """Tokens of all streams in `slices` even parts of start … end; chunks without counts tell
    nothing."""
    import numpy as np

    counted = np.zeros(slices)
    for record in records:
        if record.chunk_tokens is not None and record.chunk_gaps_us:
            stamps = record.sent_s + np.cumsum(record.chunk_gaps_us, dtype=np.float64) / 1e6
            weights = np.asarray(record.chunk_tokens)
            counted += np.histogram(stamps, slices, (start, end), weights=weights)[0]
    return tuple(int(n) for n in counted)


def _around(
    records: Sequence[RequestRecord], whole: float | None, start: float, end: float
) -> Throughput:
    """What of the phase is not steady: ramp before the window, drain after it."""
    span = span_s(records)
    if span <= 0:
        return Throughput(whole=whole)
    ramp = start - min(r.sent_s for r in records)
    drain = max(r.end_s for r in records) - end
    return Throughput(
        whole=whole, ramp_share=max(ramp, 0.0) / span, drain_share=max(drain, 0.0) / span
    )


def _tokens_between(record: RequestRecord, start: float, end: float) -> int:
    import numpy as np

    if record.chunk_tokens is None or not record.chunk_gaps_us:
        return 0
    if record.sent_s >= start and record.end_s <= end:
        return record.osl_tokens
    stamps = record.sent_s + np.cumsum(record.chunk_gaps_us, dtype=np.float64) / 1e6
    inside = (stamps >= start) & (stamps <= end)
    return int(np.asarray(record.chunk_tokens)[inside].sum())


def server_context(data: PhaseData) -> ServerContext | None:
    """What the server's pages say of the phase; None where they say nothing of it."""
    load = data.engine.load
    since, until = data.phase.steady_from_s, data.phase.steady_to_s
    shots = [s for s in data.snapshots if s.edge == "tick"]
    if since is not None and until is not None:
        shots = [s for s in shots if since <= s.at_s <= until]
    ticks = [load(s.samples) for s in shots]
    start = next((s for s in data.snapshots if s.edge == "start"), None)
    end = next((s for s in reversed(data.snapshots) if s.edge == "end"), None)
    before, after = (ServerLoad() if s is None else load(s.samples) for s in (start, end))

    def seen(name: str) -> list[float]:
        return [n for tick in ticks if (n := getattr(tick, name)) is not None]

    def grown(name: str) -> float | None:
        then, now = getattr(before, name), getattr(after, name)
        # A family may be absent until it is first touched.
        growth = None if now is None else now - (then or 0)
        return growth if growth is not None and growth >= 0 and start is not None else None

    hits, asked = grown("prefix_hit_tokens"), grown("prefix_asked_tokens")
    waited, queued, put_back = grown("queue_time_s"), grown("queued"), grown("preemptions")
    both = [t.running + t.waiting for t in ticks if t.running is not None and t.waiting is not None]
    found = ServerContext(
        in_flight_p50=distribution(both).p50,
        running_p50=distribution(seen("running")).p50,
        waiting_p50=distribution(seen("waiting")).p50,
        waiting_max=max(seen("waiting"), default=None),
        kv_cache_use_max=max(seen("kv_cache_use"), default=None),
        prefix_hit_share=hits / asked if hits is not None and asked else None,
        preemptions=None if put_back is None else int(put_back),
        queue_time_s=waited / queued if waited is not None and queued else None,
    )
    return None if found == ServerContext() else found


def beside(records: Sequence[RequestRecord], step_time_s: float) -> tuple[float, float] | None:
    """Prompt tokens of other requests computed beside a decode step, a mean over the steps, and the
    share of the steps that had any.

    A prompt counts for every request that decodes when its first token comes, to half a step. None:
    an input length is not known.
    """
    import numpy as np

    firsts = [
        (r.sent_s + r.chunk_gaps_us[0] / 1e6, r.isl_tokens, r.cached_tokens or 0)
        for r in records
        if r.chunk_gaps_us
    ]
    firsts.sort(key=lambda row: row[0])
    decoded = [(r.sent_s + r.chunk_gaps_us[0] / 1e6, decode_s(r)) for r in completed(records)]
    spans = [(first, time) for first, time in decoded if time]
    if not spans or any(isl is None for _, isl, _ in firsts):
        return None
    at = np.array([first for first, _, _ in firsts])
    tokens = np.cumsum([0, *(max((isl or 0) - cached, 0) for _, isl, cached in firsts)])
    passes = np.cumsum([0, 1, *(np.diff(at) > step_time_s / 2)])
    time = np.array([time for _, time in spans])
    start = np.array([first for first, _ in spans]) + step_time_s / 2
    since, until = np.searchsorted(at, start), np.searchsorted(at, start + time)
    steps = time.sum() / step_time_s
    share = (passes[until] - passes[since]).sum() / steps
    return float((tokens[until] - tokens[since]).sum() / steps), float(min(share, 1.0))


def achieved_concurrency(data: PhaseData) -> float | None:
    """Time-weighted median of requests in flight, between full load and the last dispatch."""
    start, end = data.phase.steady_from_s, data.phase.steady_to_s
    if start is None or end is None or end <= start:
        return None
    edges = sorted(
        edge
        for r in data.records
        if r.end_s > start and r.sent_s < end
        for edge in ((max(r.sent_s, start), 1), (min(r.end_s, end), -1))
    )
    time_at: dict[int, float] = {}
    level, before = 0, start
    for at, step in edges:
        time_at[level] = time_at.get(level, 0.0) + at - before
        level, before = level + step, at
    half = sum(time_at.values()) / 2
    for level in sorted(time_at):
        half -= time_at[level]
        if half <= 0:
            return float(level)
    return None
