"""Per-request figures, counter growth and chunks → Acceptance, best source first.

The arithmetic (DESIGN §4): over R requests that delivered T tokens in S decode steps, of which D
had a draft and A draft tokens were accepted, T + O = R + S + A, where O are tokens emitted past the
end of a request and never delivered. Acceptance length = (T − R) ÷ S, pooled over steps, and
= 1 + coverage × (AL where drafted − 1) − O ÷ S. R stands for the tokens of the prefills, one a
request on every engine seen; where passes are known, what they really held is taken. Steps that the
server counted itself (SGLang) come before any other; over a window its own T and R go with them.
Where S has no source, AL is a range for O = 0 … k·R. Never derived from text, never from an
acceptance rate. Must not: mix client tokens with server steps unless every request in the window
completed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from loadgen.stats import interval, ratio
from loadgen.types import U32, Acceptance, Engine, Interval, RequestRecord, SpecCounters

State = Literal["on", "off", "unknown"]

PER_REQUEST = "per-request figures"
COUNTERS = "server counters"
CHUNKS = "chunks"
STEPS_FROM_TIMINGS = "groups of equal predicted_ms"
STEPS_FROM_CHUNKS = "token-carrying chunks"
STEPS_FROM_SERVER = "decode steps counted by the server"

TOLERANCE = 0.01
"""Two sources of steps that differ by more than this share disprove chunks as steps."""


def acceptance(
    records: Sequence[RequestRecord],
    engine: Engine,
    *,
    state: State,
    depth: int | None,
    counters: SpecCounters | None = None,
    counters_missing: str = "",
    whole_window: bool = True,
) -> tuple[Acceptance, ...]:
    """All sources that speak, best first, for completed `records` of one window.

    `depth` is k. `counters` is the growth of the server's counters over exactly these requests;
    `whole_window` False: some request of the window did not complete, so counters are not used.
    """
    if state == "off":
        return (Acceptance(source="none", state="off", why_missing="speculation is off"),)
    if not records:
        return (Acceptance(source="none", state=state, why_missing="no request completed"),)
    disproved = chunks_disproved(records, engine, depth)
    steps = [None if disproved else steps_of(r, engine) for r in records]
    sources = []
    if any(r.spec for r in records) and all(r.spec or _nothing_to_tell(r) for r in records):
        total = summed(r.spec for r in records if r.spec is not None)
        if _told(records) is None:
            total = _known(total, state)
        sources.append(_build(PER_REQUEST, records, steps, total, state, depth, engine))
    counted = counters is not None and (counters.drafts is not None or bool(counters.steps))
    if counters is not None and counted and whole_window:
        sources.append(_build(COUNTERS, records, steps, counters, state, depth, engine))
    elif engine.metrics_path is not None:
        why = counters_missing or "not every request of the window completed"
        if counters is not None and whole_window:
            why = "the page has no speculation counters"
        sources.append(Acceptance(source=COUNTERS, state=state, why_missing=why))
    if engine.chunk_is_step is not False:
        sources.append(_from_chunks(records, state, depth, engine, disproved))
    if not sources:
        why = "the server tells neither steps nor drafts"
        return (Acceptance(source="none", state=state, why_missing=why),)
    return tuple(sorted(sources, key=_rank))


def _rank(found: Acceptance) -> tuple[bool, bool]:
    """Those with a figure first, and of them those that know drafts: else in the order built."""
    return found.acceptance_length is None and found.interval is None, found.drafts is None


def steps_of(record: RequestRecord, engine: Engine) -> U32 | None:
    """Tokens of each target pass of a request, prefill first; None where passes are not known."""
    if record.step_tokens is not None:
        return record.step_tokens
    return record.chunk_tokens if engine.chunk_is_step is not False else None


def decode_steps(record: RequestRecord, engine: Engine, disproved: bool) -> int | None:
    """Decode steps of a request: the server's own count, else its passes without the prefill."""
    if record.spec is not None and record.spec.steps is not None and record.step_tokens is None:
        return record.spec.steps
    if record.osl_tokens <= 1:
        return 0
    passes = None if disproved else steps_of(record, engine)
    return None if passes is None else max(len(passes) - 1, 0)


def of_request(
    record: RequestRecord, engine: Engine, depth: int | None
) -> tuple[int, int, str] | None:
    """Of one request as soon as it ends: tokens after its prefill, decode steps and what counted
    these; None where they are not known. Chunks are disproved here only by one over k + 1."""
    source, chunks = _steps_source((record,)), record.chunk_tokens or ()
    if source == STEPS_FROM_CHUNKS and depth is not None and max(chunks, default=0) > depth + 1:
        return None
    (pair,) = _decoded((record,), (steps_of(record, engine),))
    return None if pair is None else (*pair, source)


def drafts_of(record: RequestRecord, state: State) -> SpecCounters | None:
    """Draft figures of one request as soon as it ends; None where it has none of its own."""
    if record.spec is None:
        return None
    total = summed((record.spec,))
    return _known(total, state) if _told((record,)) is None else total


def chunks_disproved(records: Sequence[RequestRecord], engine: Engine, depth: int | None) -> str:
    """Why a chunk is not a step in these records; "" while nothing says so."""
    sums = ChunkSums()
    for record in records:
        sums.add(record)
    return sums.disproved(engine, depth)


@dataclass
class ChunkSums:
    """What tells whether chunks are steps, summed over the requests that have chunks.

    Disproved by a chunk of more than k + 1 tokens, or by a step count outside what the per-request
    figures allow, S = T + O − R − A for O in 0 … k·R, or from what the server told, by over 1 %.
    """

    requests: int = 0
    tokens: int = 0
    largest: int = 0
    after: int = 0
    """Chunks after the first."""
    told: int = 0
    told_by: int = 0
    accepted: int = 0
    accepted_by: int = 0
    with_figures: int = 0
    timed: int = 0

    def add(self, record: RequestRecord) -> None:
        """One more request."""
        chunks, spec = record.chunk_tokens, record.spec
        if not chunks:
            return
        self.requests += 1
        self.tokens += record.osl_tokens
        self.largest = max(self.largest, max(chunks))
        self.after += len(chunks) - 1
        self.timed += record.step_tokens is not None
        self.with_figures += spec is not None
        steps = 0 if _nothing_to_tell(record) else spec.steps if spec is not None else None
        if steps is not None:
            self.told += steps
            self.told_by += 1
        if spec is not None and spec.accepted_tokens is not None:
            self.accepted += spec.accepted_tokens
            self.accepted_by += 1

    def disproved(self, engine: Engine, depth: int | None) -> str:
        """Why a chunk is not a step; "" while nothing says so."""
        if engine.chunk_is_step is False or not self.requests:
            return ""
        if depth is not None and self.largest > depth + 1:
            return f"a chunk held {self.largest} tokens, more than k + 1 = {depth + 1}"
        after, told = self.after, self.told
        all_told = self.told_by == self.requests and self.with_figures and not self.timed
        if all_told and abs(after - told) > told * TOLERANCE:
            return f"{after} chunks after the first, where the server counted {told} decode steps"
        if self.accepted_by == self.requests and depth is not None:
            fewest = self.tokens - self.requests - self.accepted
            most = fewest + depth * self.requests
            if after < fewest * (1 - TOLERANCE) or after > most * (1 + TOLERANCE):
                return (
                    f"{after} chunks after the first, where accepted tokens say "
                    f"{fewest}…{most} steps"
                )
        return ""


def _told(records: Sequence[RequestRecord]) -> list[int] | None:
    """Decode steps of each request as its server told them; None unless all have them alone.

    Where timings give the tokens of each pass (llama.cpp), those say more and are taken.
    """
    if any(r.step_tokens is not None for r in records) or not any(r.spec for r in records):
        return None
    told = [0 if _nothing_to_tell(r) else r.spec.steps if r.spec else None for r in records]
    known = [steps for steps in told if steps is not None]
    return known if len(known) == len(records) else None


def _nothing_to_tell(record: RequestRecord) -> bool:
    """A one-token answer has no decode step, and SGLang then sends no figures."""
    return record.spec is None and record.osl_tokens <= 1


def _decoded(
    records: Sequence[RequestRecord], steps: Sequence[U32 | None]
) -> list[tuple[int, int] | None]:
    """Of each request: tokens after its prefill's, and decode steps; None where not known."""
    told = _told(records)
    if told is not None:
        return [(max(r.osl_tokens - 1, 0), n) for r, n in zip(records, told, strict=True)]
    return [
        None if p is None else (r.osl_tokens - (p[0] if p else 0), max(len(p) - 1, 0))
        for r, p in zip(records, steps, strict=True)
    ]


def summed(figures: Iterable[SpecCounters]) -> SpecCounters:
    """Sums of per-request figures; a field that any request lacks is None, but for drafts.

    A request that drafted nothing may leave its draft figures out (llama.cpp); it counts as zero
    beside others that have them. SGLang tells accepted tokens and steps, but no drafts.
    """
    parts = list(figures)
    drafted = [p for p in parts if p.accepted_tokens is not None]
    steps = [p.steps for p in parts]
    if not drafted:
        return SpecCounters(steps=_total(steps))
    accepted = [p.accepted_by_position for p in drafted if p.drafts != 0]
    by_draft = [p.drafted_by_position for p in drafted if p.drafts != 0]
    return SpecCounters(
        steps=_total(steps),
        drafts=_total([p.drafts for p in drafted]),
        draft_tokens=_total([p.draft_tokens for p in drafted]),
        accepted_tokens=_total([p.accepted_tokens for p in drafted]),
        accepted_by_position=_columns(accepted),
        drafted_by_position=_columns(by_draft),
    )


def of_counters(windows: Iterable[SpecCounters], state: State) -> Acceptance:
    """What a server's counters tell alone, pooled over windows of their growth.

    Decode tokens are the server's own count less one a request, whole where requests are whole.
    """
    parts = list(windows)
    sums = {
        name: sum(known)
        if (known := [n for p in parts if (n := getattr(p, name)) is not None])
        else None
        for name in (
            "steps",
            "drafts",
            "draft_tokens",
            "accepted_tokens",
            "generated_tokens",
            "requests",
        )
    }
    counted = SpecCounters(**sums)
    steps, drafts, accepted = counted.steps, counted.drafts, counted.accepted_tokens
    length = None
    if steps and counted.generated_tokens is not None and counted.requests is not None:
        length = (counted.generated_tokens - counted.requests) / steps
    return Acceptance(
        source=COUNTERS,
        state=state,
        steps_source=STEPS_FROM_SERVER if length is not None else None,
        acceptance_length=length,
        acceptance_length_drafted=1 + accepted / drafts
        if drafts and accepted is not None
        else None,
        draft_coverage=drafts / steps if drafts is not None and steps else None,
        acceptance_rate=accepted / counted.draft_tokens
        if accepted is not None and counted.draft_tokens
        else None,
        steps=steps,
        drafts=drafts,
        accepted_tokens=accepted,
        draft_tokens=counted.draft_tokens,
    )


def _total(values: Sequence[int | None]) -> int | None:
    known = [v for v in values if v is not None]
    return sum(known) if known and len(known) == len(values) else None


def _columns(rows: Sequence[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    known = [row for row in rows if row is not None]
    if not known or len(known) != len(rows):
        return None
    return tuple(sum(column) for column in zip_longest(*known, fillvalue=0))


def _known(total: SpecCounters, state: State) -> SpecCounters:
    """With speculation known to be on, no draft figures anywhere means that nothing was drafted."""
    if total.drafts is None and state == "on":
        return SpecCounters(steps=total.steps, drafts=0, draft_tokens=0, accepted_tokens=0)
    return total


def _build(
    source: str,
    records: Sequence[RequestRecord],
    steps: Sequence[U32 | None],
    figures: SpecCounters,
    state: State,
    depth: int | None,
    engine: Engine,
) -> Acceptance:
    """One source's Acceptance: drafts and accepted tokens of `figures`, decode steps of `steps`."""
    requests, tokens = len(records), sum(r.osl_tokens for r in records)
    drafts, accepted = figures.drafts, figures.accepted_tokens
    pairs = _decoded(records, steps)
    known = [pair for pair in pairs if pair is not None]
    count = sum(n for _, n in known) if len(known) == len(records) else None
    decoded = sum(n for n, _ in known)
    where = _steps_source(records)
    if source == COUNTERS and figures.steps is not None:
        where, count, decoded = STEPS_FROM_SERVER, figures.steps, tokens - requests
        if figures.generated_tokens is not None and figures.requests is not None:
            decoded = figures.generated_tokens - figures.requests
    length, limits, why = None, None, ""
    overrun = None
    if count:
        length = decoded / count
        limits = _interval(records, pairs, depth)
        if accepted is not None:
            overrun = count + accepted - decoded
    elif accepted is not None:
        limits = _range(tokens - requests, accepted, requests, depth)
        why = "decode steps are not known; the range is for an overrun of 0…k·R tokens"
    coverage = drafts / count if drafts is not None and count else None
    impossible = _impossible(length, coverage, depth)
    if impossible:
        length = limits = coverage = overrun = None
        why = impossible
    joint = _joint(figures, depth)
    return Acceptance(
        source=source,
        state="on" if drafts else state,
        steps_source=where if count else None,
        acceptance_length=length,
        interval=limits,
        acceptance_length_drafted=1 + accepted / drafts
        if drafts and accepted is not None
        else None,
        draft_coverage=coverage,
        acceptance_rate=accepted / figures.draft_tokens
        if accepted is not None and figures.draft_tokens
        else None,
        joint_by_position=joint,
        conditional_by_position=conditional(joint),
        positions_exact=figures.drafted_by_position is not None
        and all(n == drafts for n in figures.drafted_by_position),
        acceptance_length_by_dialogue=by_dialogue(records, steps, engine),
        steps=count,
        drafts=drafts,
        accepted_tokens=accepted,
        draft_tokens=figures.draft_tokens,
        overrun_tokens=overrun,
        unverified=engine.chunk_is_step is None and _told(records) is None,
        why_missing=why,
    )


def _from_chunks(
    records: Sequence[RequestRecord],
    state: State,
    depth: int | None,
    engine: Engine,
    disproved: str,
) -> Acceptance:
    """Delivered tokens after the first chunk ÷ chunks after the first."""
    why = disproved
    if any(r.chunk_tokens is None for r in records):
        why = "the tokens of a chunk are not known"
    chunks = [r.chunk_tokens for r in records if r.chunk_tokens]
    steps = sum(len(c) - 1 for c in chunks)
    if not why and not steps:
        why = "no request had two chunks"
    length = None if why else sum(sum(c[1:]) for c in chunks) / steps
    impossible = _impossible(length, None, depth)
    pairs = [(sum(c[1:]), len(c) - 1) if c else None for c in (r.chunk_tokens for r in records)]
    return Acceptance(
        source=CHUNKS,
        state=state,
        steps_source=STEPS_FROM_CHUNKS,
        acceptance_length=None if impossible else length,
        interval=None if why or impossible else _interval(records, pairs, depth),
        acceptance_length_by_dialogue=None
        if why or impossible
        else by_dialogue(records, [r.chunk_tokens for r in records], engine),
        steps=None if why else steps,
        unverified=not _confirmed(records, depth),
        why_missing=why or impossible,
    )


def _confirmed(records: Sequence[RequestRecord], depth: int | None) -> bool:
    """Another source of steps agrees with the chunks: `chunks_disproved` had what it needs."""
    if _told(records) is not None:
        return True
    return depth is not None and all(
        r.spec is not None and r.spec.accepted_tokens is not None for r in records
    )


def _steps_source(records: Sequence[RequestRecord]) -> str:
    if _told(records) is not None:
        return STEPS_FROM_SERVER
    timed = all(r.step_tokens is not None for r in records)
    return STEPS_FROM_TIMINGS if timed else STEPS_FROM_CHUNKS


def _impossible(length: float | None, coverage: float | None, depth: int | None) -> str:
    """An error, never a figure (DESIGN §4)."""
    if length is not None and depth is not None and length > depth + 1 + 1e-9:
        return f"{length:.3f} tokens a step is more than k + 1 = {depth + 1}: the sources disagree"
    if coverage is not None and coverage > 1 + 1e-9:
        return f"{coverage:.3f} drafts a step is more than one: the sources disagree"
    return ""


def _range(decoded: int, accepted: int, requests: int, depth: int | None) -> Interval | None:
    """(T − R) ÷ S for S = T + O − R − A, O = 0 … k·R."""
    fewest = decoded - accepted
    if fewest <= 0 or depth is None:
        return None
    return Interval(
        low=decoded / (fewest + depth * requests),
        high=decoded / fewest,
        kind="range for an overrun of 0…k·R tokens",
    )


def _interval(
    records: Sequence[RequestRecord], pairs: Sequence[tuple[int, int] | None], depth: int | None
) -> Interval | None:
    """Over dialogues, of delivered decode tokens ÷ decode steps."""
    sums: dict[str, list[float]] = {}
    for record, pair in zip(records, pairs, strict=True):
        if pair is not None:
            dialogue = sums.setdefault(record.dialogue_id, [0.0, 0.0])
            dialogue[0] += pair[0]
            dialogue[1] += pair[1]
    found = interval(list(zip(*sums.values(), strict=True)), ratio) if sums else None
    if found is None:
        return None
    # A step delivers at least one token and at most k + 1.
    most = float("inf") if depth is None else depth + 1.0
    return Interval(low=max(found.low, 1.0), high=min(found.high, most), kind=found.kind)


def _joint(figures: SpecCounters, depth: int | None) -> tuple[float, ...] | None:
    """Accepted at position j ÷ drafts, dense over 1 … k; ÷ steps where drafts are not told."""
    accepted, drafts = figures.accepted_by_position, figures.drafts
    drafts = figures.steps if drafts is None else drafts
    if accepted is None or not drafts:
        return None
    length = max(len(accepted), depth or 0)
    padded = accepted + (0,) * (length - len(accepted))
    return tuple(n / drafts for n in padded)


def conditional(joint: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """joint[j] ÷ joint[j − 1], with joint[0] = 1; ends where nothing was accepted before."""
    if joint is None:
        return None
    rates = []
    before = 1.0
    for rate in joint:
        if before == 0:
            break
        rates.append(rate / before)
        before = rate
    return tuple(rates)


def by_dialogue(
    records: Sequence[RequestRecord], steps: Sequence[U32 | None], engine: Engine
) -> float | None:
    """Mean over dialogues of the mean step length, each turn's prefill a step of its own.

    SPEED-Bench's published figure (specdec_bench @ a2fbac7): the steps of all turns concatenated,
    an EOS trimmed from the last step, empty steps dropped. None where steps are not known.
    """
    lengths: dict[str, list[int]] = {}
    for record, passes in zip(records, steps, strict=True):
        if passes is None:
            return None
        eos = engine.counts_eos and record.finish_reason == "stop"
        lengths.setdefault(record.dialogue_id, []).extend(trimmed(passes, eos))
    means = [sum(steps) / len(steps) for steps in lengths.values() if steps]
    return sum(means) / len(means) if means else None


def trimmed(passes: Sequence[int], eos: bool) -> list[int]:
    """Step lengths without empty ones, and without the EOS token of the last (golden G4, G8)."""
    kept = [n for n in passes if n]
    if eos and kept:
        kept[-1] -= 1
        if not kept[-1]:
            kept.pop()
    return kept
