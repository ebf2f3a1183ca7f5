"""(Run, Engine) → Summary: the one pass right of the seam. Pure: same file, same summary.

The engine's mapping of counters is applied here, not when they were scraped, so that a wrong
mapping is mended by reading the file again. Must not: talk to a server, know a report.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, zip_longest

import msgspec

from loadgen import slo
from loadgen.acceptance import State, acceptance, chunks_disproved, decode_steps
from loadgen.answers import answer_caveats, answer_figures
from loadgen.checks import check_phase
from loadgen.errors import UserError
from loadgen.metrics import (
    TTFT,
    USER_SPEED,
    achieved_concurrency,
    beside,
    completed,
    counts,
    decode_s,
    decode_tokens,
    distributions,
    each,
    figure,
    server_context,
    span_s,
    throughput,
)
from loadgen.plan import phase_name
from loadgen.types import (
    LOST,
    Acceptance,
    CategorySummary,
    Caveat,
    ClientSample,
    Completed,
    DialogueFigures,
    Engine,
    PhaseData,
    PhaseRecord,
    PhaseSummary,
    PromptRecord,
    RequestRecord,
    Run,
    RunEnd,
    ServerInfo,
    Snapshot,
    SpecCounters,
    Summary,
    Throughput,
)

_STARTED = "process_start_time_seconds"
_IDENTITY = re.compile(r'[{,](model_name|engine|dp_rank|tp_rank|pp_rank)="([^"]*)"')
_COUNTED = (
    *("drafts", "draft_tokens", "accepted_tokens"),
    *("generated_tokens", "prompt_tokens", "requests", "steps"),
)

RANDOM = Caveat(
    code="random-control",
    message="Every prompt is random token ids: a control, and no figure of it is the server's.",
    advice="Set it beside real text of the same length: draftload run --scenario throughput with "
    "the same --isl, then draftload compare THIS REAL.",
)
"""What stands over every run on random input."""


def summarize(run: Run, engine: Engine) -> Summary:
    """One run file's figures. UserError: it holds no measured request."""
    phases: dict[str, PhaseRecord] = {}
    records: dict[str, list[RequestRecord]] = {}
    client: dict[str, list[ClientSample]] = {}
    snapshots: dict[str, list[Snapshot]] = {}
    prompts: dict[str, PromptRecord] = {}
    control = run.info.scenario.dataset.kind == "random"
    _, limits = slo.read(run.info.scenario.slo, f"run {run.info.run_id}, slo of its scenario:")
    caveats = [*run.info.caveats, *([RANDOM] if control else [])]
    end: str | None = None
    for record in run.records:
        match record:
            case RequestRecord():
                records.setdefault(record.phase, []).append(record)
            case PhaseRecord():
                phases[record.name] = record
            case ClientSample():
                client.setdefault(record.phase, []).append(record)
            case Snapshot():
                snapshots.setdefault(record.phase, []).append(record)
            case Caveat():
                caveats.append(record)
            case RunEnd():
                end = record.reason
            case PromptRecord():
                kept = record.text if control else None  # else many, long, and read by nobody
                prompts[record.prompt_id] = msgspec.structs.replace(record, text=kept)
            case _:
                pass
    parts: dict[tuple[object, ...], list[PhaseData]] = {}
    for name, requests in records.items():
        phase = phases.get(name) or _unfinished(name, requests, run)
        if not phase.measured:
            continue
        data = PhaseData(
            phase=phase,
            scenario=run.info.scenario,
            prompts=prompts,
            server=run.info.server,
            engine=engine,
            draft_depth=_depth(requests, run.info.server),
            records=tuple(requests),
            client=tuple(client.get(name, ())),
            snapshots=tuple(snapshots.get(name, ())),
        )
        key = (phase.load, phase.repeat) if phase.category is not None else (name,)
        parts.setdefault(key, []).append(_counted(data))
    summaries = []
    for apart in parts.values():
        data = apart[0] if apart[0].phase.category is None else _together(apart)
        found = _phase(data) if apart[0].phase.category is None else _pooled(data, apart)
        if control:
            texts = {name: prompt.text or "" for name, prompt in prompts.items()}
            answers = answer_figures(completed(data.records), texts, engine, data.draft_depth)
            found = msgspec.structs.replace(found, answers=answers)
            caveats += answer_caveats(answers, found.name)
        found = msgspec.structs.replace(found, goodput_rps=slo.goodput_rps(found, limits))
        summaries.append(found)
        caveats += check_phase(replace(data, figures=found))
    if not summaries:
        raise UserError(
            f"run {run.info.run_id} ({end or 'no end was recorded'}) holds no measured request: it "
            "ended before its first phase did anything. There is nothing to report; run it again."
        )
    return Summary(info=run.info, phases=tuple(summaries), caveats=tuple(caveats), end=end)


def _counted(data: PhaseData) -> PhaseData:
    growth, missing = counter_growth(data.snapshots, data.engine)
    return replace(data, counters=growth, counters_missing=missing)


def _together(parts: Sequence[PhaseData]) -> PhaseData:
    """The phases of one load whose categories ran one after another, with nothing between them."""
    first, last = parts[0].phase, parts[-1].phase
    phase = msgspec.structs.replace(
        first,
        name=first.name.removesuffix(f" {first.category}"),
        category=None,
        ended_s=last.ended_s,
        steady_from_s=None,
        steady_to_s=None,
    )
    return _counted(
        replace(
            parts[0],
            phase=phase,
            draft_depth=max((p.draft_depth for p in parts if p.draft_depth), default=None),
            records=tuple(r for p in parts for r in p.records),
            client=tuple(c for p in parts for c in p.client),
            snapshots=tuple(s for p in parts for s in p.snapshots),
        )
    )


def _pooled(data: PhaseData, parts: Sequence[PhaseData]) -> PhaseSummary:
    """`data`, which is all the parts together, with each category's figures from its own part."""
    each = [(p, _phase(p)) for p in parts]
    span = sum(summary.span_s for _, summary in each)
    tokens = sum(r.osl_tokens for r in completed(data.records))
    return msgspec.structs.replace(
        _phase(data),
        span_s=span,
        throughput=Throughput(
            whole=tokens / span if span > 0 else None,
            why_not_steady="the categories ran one after another",
        ),
        categories=tuple(
            CategorySummary(
                category=part.phase.category or "",
                requests=summary.requests.completed,
                acceptance=summary.acceptance[0],
                user_tokens_per_s=summary.distributions[USER_SPEED.name],
            )
            for part, summary in each
        ),
        categories_apart=True,
    )


def _unfinished(name: str, requests: Sequence[RequestRecord], run: Run) -> PhaseRecord:
    """A phase whose own record was never written: the run was killed in it."""
    loads = {phase_name(load): load for load in run.info.scenario.loads}
    measured = not name.startswith("warm-up ")
    load = loads.get(name.removeprefix("warm-up ").split(" ")[0], run.info.scenario.loads[0])
    return PhaseRecord(
        name=name,
        load=load,
        repeat=0,
        measured=measured,
        started_s=min(r.sent_s for r in requests),
        ended_s=max(r.end_s for r in requests),
    )


def counter_growth(
    snapshots: Sequence[Snapshot], engine: Engine
) -> tuple[SpecCounters | None, str]:
    """Growth of the server's counters between the borders of a phase; None and why."""
    start = next((s for s in snapshots if s.edge == "start"), None)
    end = next((s for s in reversed(snapshots) if s.edge == "end"), None)
    if start is None or end is None:
        return None, "the metrics page was not read at both ends of the phase"
    if why := _not_the_same(start.samples, end.samples):
        return None, why
    lost = end.samples.get(LOST, 0) - start.samples.get(LOST, 0)
    if lost:
        return None, (
            f"{lost:g} rows or reads of the server's statistics never reached us: another reader "
            "took them, or its buffer ran over"
        )
    before, after = engine.counters(start.samples), engine.counters(end.samples)
    growth: dict[str, int | None] = {}
    for name in _COUNTED:
        now, then = getattr(after, name), getattr(before, name) or 0
        if now is not None and now < then:
            return None, f"the server's counter of {name} went back from {then} to {now}"
        growth[name] = None if now is None else now - then
    seen = [engine.counters(s.samples).generated_tokens or 0 for s in snapshots]
    for then, now in pairwise(n for n in seen if n):
        if now < then:
            return None, f"the server's counter of generated tokens went back from {then} to {now}"
    accepted = _grown(after.accepted_by_position, before.accepted_by_position)
    drafted = _grown(after.drafted_by_position, before.drafted_by_position)
    if any(n < 0 for n in (*(accepted or ()), *(drafted or ()))):
        return None, "a counter by draft position went back"
    return SpecCounters(
        drafts=growth["drafts"],
        draft_tokens=growth["draft_tokens"],
        accepted_tokens=growth["accepted_tokens"],
        generated_tokens=growth["generated_tokens"],
        prompt_tokens=growth["prompt_tokens"],
        requests=growth["requests"],
        steps=growth["steps"],
        accepted_by_position=accepted,
        drafted_by_position=drafted,
    ), ""


def _not_the_same(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Why two pages are not those of one server and model; "" where nothing says so.

    A series that comes up during a phase is usual; a new model or rank is not: its counters hold
    what it did before.
    """
    if before.get(_STARTED, 0.0) != after.get(_STARTED, before.get(_STARTED, 0.0)):
        return f"the server's counters went back to zero: its {_STARTED} changed"
    then, now = _labels(before), _labels(after)
    models = now.get("model_name", set())
    if len(models) > 1:
        return f"the metrics page has the counters of {len(models)} models: " + ", ".join(
            sorted(models)[:4]
        )
    for label, values in then.items():
        if changed := values ^ now.get(label, set()):
            return f"the counters' label {label} changed in the phase: " + ", ".join(
                sorted(changed)[:4]
            )
    return ""


def _labels(samples: Mapping[str, float]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for series in samples:
        for label, value in _IDENTITY.findall(series):
            found.setdefault(label, set()).add(value)
    return found


def _grown(after: tuple[int, ...] | None, before: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if after is None:
        return None
    return tuple(now - then for now, then in zip_longest(after, before or (), fillvalue=0))


def _phase(data: PhaseData) -> PhaseSummary:
    server, engine = data.server, data.engine
    done = completed(data.records)
    state = _state(data, server)
    depth = data.draft_depth
    sources = acceptance(
        done,
        engine,
        state=state,
        depth=depth,
        counters=data.counters,
        counters_missing=data.counters_missing,
        whole_window=all(isinstance(r.outcome, Completed) for r in data.records),
    )
    disproved = bool(chunks_disproved(done, engine, depth))
    step_time = _step_time(done, engine, disproved)
    prompts = beside(data.records, step_time) if step_time else None

    def grouped(by: Callable[[RequestRecord], str | None]) -> tuple[CategorySummary, ...]:
        return _groups(done, by, engine, state, depth, disproved)

    return PhaseSummary(
        name=data.phase.name,
        load=data.phase.load,
        repeat=data.phase.repeat,
        measured=data.phase.measured,
        span_s=span_s(data.records),
        requests=counts(data.records),
        distributions=distributions(done),
        throughput=throughput(data),
        acceptance=sources,
        categories=grouped(lambda r: r.category),
        step_time_s=step_time,
        step_time_source=_step_source(sources, state) if step_time is not None else None,
        achieved_concurrency_p50=achieved_concurrency(data),
        repeated_prompts=sum(r.repeat > 0 for r in data.records) / len(data.records),
        chunk_is_step=False if disproved else engine.chunk_is_step,
        dialogues=dialogue_figures(data.records, engine, disproved),
        server=server_context(data),
        tiers=grouped(lambda r: r.tier),
        isl_buckets=grouped(lambda r: r.isl_bucket),
        started_s=data.phase.started_s,
        prompt_tokens_a_step=prompts[0] if prompts else None,
        each=each(data.records),
        prompt_steps_share=prompts[1] if prompts else None,
    )


def _step_time(done: Sequence[RequestRecord], engine: Engine, disproved: bool) -> float | None:
    """Σ decode time ÷ decode steps; None where the steps of any request are not known."""
    times = [(decode_s(r), decode_steps(r, engine, disproved)) for r in done]
    timed = [(t, n) for t, n in times if t is not None and n]
    steps = sum(n for _, n in timed)
    known = bool(steps) and all(n is not None for _, n in times)
    return sum(t for t, _ in timed) / steps if known else None


def _step_source(sources: Sequence[Acceptance], state: State) -> str:
    named = next((a.steps_source for a in sources if a.steps_source), None)
    return named or ("one token a step: speculation is off" if state == "off" else "chunks")


def _state(data: PhaseData, server: ServerInfo) -> State:
    """What preflight found; a draft seen in the phase settles an unknown."""
    if server.state != "unknown":
        return server.state
    drafted = any(r.spec and (r.spec.drafts or r.spec.accepted_tokens) for r in data.records)
    grown = data.counters is not None and bool(data.counters.drafts or data.counters.steps)
    return "on" if drafted or grown else "unknown"


def _depth(records: Sequence[RequestRecord], server: ServerInfo) -> int | None:
    """k as configured or reported, else as the server wrote it beside a request's figures."""
    if server.draft_depth is not None:
        return server.draft_depth
    told = [r.spec.draft_depth for r in records if r.spec and r.spec.draft_depth is not None]
    return max(told, default=None)


def _groups(
    done: Sequence[RequestRecord],
    by: Callable[[RequestRecord], str | None],
    engine: Engine,
    state: State,
    depth: int | None,
    disproved: bool,
) -> tuple[CategorySummary, ...]:
    """The requests that `by` gives a name, by name."""
    groups: dict[str, list[RequestRecord]] = {}
    for record in done:
        if (name := by(record)) is not None:
            groups.setdefault(name, []).append(record)
    summaries = []
    for name in sorted(groups):
        records = groups[name]
        sources = acceptance(records, engine, state=state, depth=depth, whole_window=False)
        summaries.append(
            CategorySummary(
                category=name,
                requests=len(records),
                acceptance=sources[0] if sources[0].acceptance_length is not None else None,
                user_tokens_per_s=figure(USER_SPEED, records),
                ttft_s=figure(TTFT, records),
                step_time_s=_step_time(records, engine, disproved),
            )
        )
    return tuple(summaries)


def dialogue_figures(
    records: Sequence[RequestRecord], engine: Engine, disproved: bool
) -> tuple[DialogueFigures, ...]:
    """Dialogues of which every turn that was sent completed, in order of their first send."""
    turns: dict[str, list[RequestRecord]] = {}
    for record in records:
        turns.setdefault(record.dialogue_id, []).append(record)
    figures = []
    for dialogue_id, parts in turns.items():
        if not all(isinstance(r.outcome, Completed) for r in parts):
            continue
        steps = [decode_steps(r, engine, disproved) for r in parts]
        decoded = [decode_tokens(r) for r in parts if len(r.chunk_gaps_us) > 1]
        figures.append(
            DialogueFigures(
                dialogue_id=dialogue_id,
                prompt_id=parts[0].prompt_id,
                category=parts[0].category,
                repeat=parts[0].repeat,
                turns=len(parts),
                osl_tokens=sum(r.osl_tokens for r in parts),
                decode_tokens=None if None in decoded else sum(n or 0 for n in decoded),
                decode_s=sum(decode_s(r) or 0.0 for r in parts),
                e2el_s=sum(r.end_s - r.sent_s for r in parts),
                steps=None if None in steps else sum(n or 0 for n in steps),
                output=_output(parts),
                tier=parts[0].tier,
                isl_bucket=parts[0].isl_bucket,
            )
        )
    return tuple(figures)


def _output(parts: Sequence[RequestRecord]) -> bytes | str | None:
    """The answers' token ids where the server gave all of them, else their text."""
    ids = [r.output_token_ids for r in parts if r.output_token_ids is not None]
    if len(ids) == len(parts):
        return b"".join(turn.tobytes() for turn in ids)
    texts = [r.text for r in parts if r.text is not None]
    return "".join(texts) if len(texts) == len(parts) else None
