"""Studies to render: figures as a 135 M model on two cores gives them, without and with n-gram.

The same values every time. `blank()` is a phase in which nothing was measured. `golden` holds a
rendering against the one stored under tests/data.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec

from loadgen.types import (
    Acceptance,
    CategoryComparison,
    CategorySummary,
    Caveat,
    ClientInfo,
    ClosedLoop,
    Comparison,
    DialogueFigures,
    Distribution,
    Honours,
    Interval,
    LoadComparison,
    PhaseSummary,
    RequestCounts,
    RunInfo,
    Scenario,
    ServerConfig,
    ServerContext,
    ServerInfo,
    SpecConfig,
    Speedup,
    Stop,
    Study,
    Summary,
    Throughput,
)
from loadgen.types import Sampling as SamplingNoun

BOOTSTRAP = "95 % bootstrap over dialogues"
WITHIN_RUN = "95 % within-run interval: paired bootstrap over dialogues"

# category: requests, steps, AL with interval, AL where drafted, user tok/s, speedup with interval
CATEGORIES = {
    "coding": (4, 98, 1.87, 1.58, 2.21, 3.31, 14.7, 1.02, 0.91, 1.14),
    "humanities": (4, 143, 1.29, 1.12, 1.47, 3.02, 11.2, 0.79, 0.72, 0.88),
    "math": (4, 112, 1.66, 1.43, 1.92, 3.28, 13.4, 0.94, 0.83, 1.05),
    "multilingual": (2, 61, 1.51, 1.22, 1.85, 3.10, 12.3, 0.87, 0.71, 1.02),
    "qa": (2, 24, 1.33, 1.00, 1.71, 2.95, 11.6, 0.81, 0.52, 1.31),
    "rag": (2, 48, 1.92, 1.61, 2.30, 3.47, 15.1, 1.06, 0.90, 1.22),
    "reasoning": (4, 121, 1.53, 1.34, 1.74, 3.15, 12.6, 0.89, 0.80, 0.98),
    "roleplay": (4, 152, 1.22, 1.08, 1.36, 2.88, 10.8, 0.76, 0.69, 0.83),
    "stem": (2, 66, 1.41, 1.20, 1.66, 3.05, 11.9, 0.83, 0.70, 0.97),
    "summarization": (2, 53, 1.75, 1.42, 2.10, 3.39, 13.9, 0.97, 0.81, 1.15),
    "writing": (4, 149, 1.25, 1.10, 1.42, 2.92, 11.0, 0.77, 0.70, 0.85),
}


def server(method: str | None = "ngram") -> ServerInfo:
    """What stood at the URL; `method` None is no speculation."""
    spec = None if method is None else SpecConfig(method=method, draft_depth=3)
    return ServerInfo(
        engine="llamacpp",
        model="smollm2-135m-instruct",
        url="http://127.0.0.1:8080",
        version="xllamacpp 2026.10.11549",
        max_model_len=2048,
        max_running=8,
        state="off" if method is None else "on",
        draft_depth=None if method is None else 3,
        spec_reported=None if method is None else "ngram_simple, n 3, m 3",
        honours=Honours(token_id_prompts=True, chunk_timings=True, metrics_page=True),
        config=ServerConfig(
            engine="llamacpp",
            model="smollm2-135m-instruct",
            spec=spec,
            env={"SECRET": "hunter2"},
            extra_args=("--api-key", "hunter2"),
        ),
    )


def info(method: str | None = "ngram") -> RunInfo:
    """The first line of the run file."""
    return RunInfo(
        run_id=f"20261124T114302-qualitative-{method or 'none'}",
        started_at="2026-11-24T11:43:02Z",
        scenario=Scenario(
            name="qualitative",
            loads=(ClosedLoop(concurrency=1), ClosedLoop(concurrency=8)),
            stop=Stop(requests=22),
            sampling=SamplingNoun(max_output_tokens=48),
        ),
        server=server(method),
        client=ClientInfo(
            draftload="0.1.0",
            python="3.11.9",
            aiohttp="3.14.5",
            loop="uvloop 0.22.1",
            cores=2,
            machine="Linux x86_64",
        ),
        prompts_sha256="9f" * 32,
    )


def spread(middle: float, *, n: int = 34) -> Distribution:
    """A distribution around a median, with the p95 and p99 of a mild tail."""
    return Distribution(
        n=n,
        mean=middle * 1.04,
        std=middle * 0.2,
        min=middle * 0.8,
        p50=middle,
        p90=middle * 1.3,
        p95=middle * 1.5,
        p99=None,
        max=middle * 1.7,
    )


def per_request(concurrency: int = 8) -> Acceptance:
    """The best source on llama.cpp: timings on every chunk. At 1 two answers are a step shorter."""
    found = Acceptance(
        source="per-request figures",
        state="on",
        steps_source="groups of equal predicted_ms",
        acceptance_length=1.4613,
        interval=Interval(low=1.3608, high=1.5702, kind=BOOTSTRAP),
        acceptance_length_drafted=3.1311,
        draft_coverage=0.2165,
        acceptance_rate=0.7104,
        joint_by_position=(0.8431, 0.7019, 0.5861),
        conditional_by_position=(0.8431, 0.8325, 0.8350),
        acceptance_length_by_dialogue=1.4402,
        steps=1027,
        drafts=222,
        accepted_tokens=473,
        draft_tokens=666,
        overrun_tokens=0,
    )
    if concurrency == 8:
        return found
    return msgspec.structs.replace(
        found,
        acceptance_length=1.4642,
        interval=Interval(low=1.3633, high=1.5741, kind=BOOTSTRAP),
        draft_coverage=0.2171,
        acceptance_length_by_dialogue=1.4427,
        steps=1025,
    )


OFF = Acceptance(source="none", state="off", why_missing="speculation is off")


def categories(speeding: float, on: bool) -> tuple[CategorySummary, ...]:
    """The rows of CATEGORIES; `speeding` scales user speed."""
    return tuple(
        CategorySummary(
            category=name,
            requests=row[0],
            acceptance=msgspec.structs.replace(
                per_request(),
                steps=row[1],
                acceptance_length=row[2],
                interval=Interval(low=row[3], high=row[4], kind=BOOTSTRAP),
                acceptance_length_drafted=row[5],
            )
            if on
            else None,
            user_tokens_per_s=spread(row[6] * speeding, n=row[0]),
        )
        for name, row in CATEGORIES.items()
    )


def phase(concurrency: int = 8, *, on: bool = True, repeat: int = 0) -> PhaseSummary:
    """One load: at 1 n-gram gains a little, at 8 it loses, as two cores have it."""
    user = {(1, False): 93.4, (1, True): 100.9, (8, False): 14.6, (8, True): 12.2}[concurrency, on]
    tokens_s = {1: 0.93, 8: 7.5}[concurrency] * user
    counters = msgspec.structs.replace(
        per_request(), source="server counters", interval=None, acceptance_length_by_dialogue=None
    )
    late = Acceptance(
        source="server counters",
        state="on",
        why_missing="the metrics page was not read at both ends of the phase",
    )
    second = counters if concurrency == 8 else late
    return PhaseSummary(
        name=f"c={concurrency}" if not repeat else f"c={concurrency} repeat {repeat + 1}",
        load=ClosedLoop(concurrency=concurrency),
        repeat=repeat,
        measured=True,
        span_s=1632 / tokens_s,
        requests=RequestCounts(sent=34, completed=34),
        distributions={
            "isl_tokens": spread(61.0),
            "osl_tokens": spread(48.0),
            "ttft_s": spread((0.0412 if concurrency == 1 else 0.312) * (1.04 if on else 1)),
            "tpot_s": spread(1 / user),
            "chunk_gap_s": spread(0.0041, n=1598),
            "tokens_per_chunk": spread(1.0, n=1632),
            "e2el_s": spread(0.05 + 47 / user),
            "user_tokens_per_s": spread(user),
        },
        throughput=Throughput(whole=tokens_s, steady=tokens_s * 1.03)
        if concurrency == 8
        else Throughput(
            whole=tokens_s, why_not_steady="the window at full load is shorter than two median E2EL"
        ),
        acceptance=(per_request(concurrency), second) if on else (OFF,),
        categories=categories(user / 12.2, on),
        step_time_s=1.46 / user if on else 1 / user,
        step_time_source="groups of equal predicted_ms" if on else "one token a step",
        achieved_concurrency_p50=float(concurrency),
        server=ServerContext(
            in_flight_p50=8.0,
            running_p50=4.0,
            waiting_p50=4.0,
            waiting_max=4.0,
            kv_cache_use_max=0.081,
            preemptions=0,
            queue_time_s=0.2711,
        )
        if concurrency == 8
        else None,
        chunk_is_step=False,
        dialogues=tuple(
            DialogueFigures(
                dialogue_id=f"d{i}",
                prompt_id=f"p{i}",
                category=name,
                repeat=0,
                turns=1,
                osl_tokens=48,
                decode_tokens=47,
                decode_s=47 / user,
                e2el_s=0.05 + 47 / user,
            )
            for i, name in enumerate(CATEGORIES)
        ),
    )


CAPPED = (
    "31 of 34 answers were cut at the output limit: acceptance was measured on beginnings only."
)
CAPPED_ADVICE = (
    "Raise --max-output-tokens until most answers end by themselves (SPEED-Bench uses 4,096), or "
    "say that lengths were fixed."
)


def caveats() -> tuple[Caveat, ...]:
    """One of a run, one of both phases, one of the highest load."""
    return (
        Caveat(
            code="same-machine",
            message="Client and server share this machine's 2 cores: each takes time from the "
            "other.",
            advice="Run the client on another machine for figures that you will publish.",
        ),
        Caveat(code="outputs-capped", message=CAPPED, advice=CAPPED_ADVICE, phase="c=1"),
        Caveat(code="outputs-capped", message=CAPPED, advice=CAPPED_ADVICE, phase="c=8"),
        Caveat(
            code="too-few-dialogues",
            message="22 dialogues at concurrency 8: ramp and drain are a large part of the phase. "
            "Expected at least 32.",
            advice="Raise --requests, or lower the concurrency.",
            phase="c=8",
        ),
    )


def summary(method: str | None = "ngram") -> Summary:
    """A run at concurrency 1 and 8."""
    on = method is not None
    return Summary(
        info=info(method),
        phases=(phase(1, on=on), phase(8, on=on)),
        caveats=caveats(),
        end="completed",
    )


def single(width: int = 100, *, method: str | None = "ngram") -> Study:
    """A study of one run."""
    return Study(
        summaries=(summary(method),),
        paths=(f"runs/20261124T114302-qualitative-{method or 'none'}.jsonl",),
        width=width,
    )


def speedup(ratio: float, low: float, high: float, pairs: int = 22) -> Speedup:
    """A ratio with its within-run interval."""
    return Speedup(ratio=ratio, pairs=pairs, interval=Interval(low=low, high=high, kind=WITHIN_RUN))


def load_comparison(concurrency: int, *, repeat: int = 0) -> LoadComparison:
    """Both runs at one load."""
    user = speedup(1.0803, 1.0211, 1.1504) if concurrency == 1 else speedup(0.8342, 0.7789, 0.8801)
    whole = speedup(1.0612, 1.0032, 1.1321) if concurrency == 1 else speedup(0.8356, 0.7812, 0.8910)
    gain = user.ratio / 0.8342
    return LoadComparison(
        load=ClosedLoop(concurrency=concurrency),
        repeat=repeat,
        base=phase(concurrency, on=False, repeat=repeat),
        spec=phase(concurrency, on=True, repeat=repeat),
        speedup_user=user,
        speedup_throughput=whole,
        throughput_basis="whole" if concurrency == 1 else "steady",
        categories=tuple(map(partial(category_comparison, gain), categories(1.0, True))),
        outputs_compared=22,
        outputs_differ=1 if concurrency == 8 else 0,
    )


def category_comparison(gain: float, of: CategorySummary) -> CategoryComparison:
    """One row of CATEGORIES, its speedup scaled by `gain`."""
    ratio, low, high = (value * gain for value in CATEGORIES[of.category][7:10])
    return CategoryComparison(
        category=of.category,
        speedup_user=speedup(ratio, low, high, pairs=2),
        acceptance=of.acceptance,
        steps=of.acceptance.steps if of.acceptance else None,
    )


def compared(width: int = 100) -> Study:
    """A study of two runs and their comparison."""
    base, spec = summary(None), summary("ngram")
    return Study(
        summaries=(base, spec),
        paths=tuple(f"runs/{s.info.run_id}.jsonl" for s in (base, spec)),
        comparison=Comparison(
            base=base.info,
            spec=spec.info,
            loads=(load_comparison(1), load_comparison(8)),
            differences=(),
        ),
        width=width,
    )


def blank(concurrency: int = 1) -> PhaseSummary:
    """A phase of which nothing is known but its load."""
    return PhaseSummary(
        name=f"c={concurrency}",
        load=ClosedLoop(concurrency=concurrency),
        repeat=0,
        measured=True,
        span_s=0.0,
        requests=RequestCounts(),
        distributions={},
        throughput=Throughput(),
        acceptance=(Acceptance(source="none", state="unknown"),),
        categories=(
            CategorySummary(
                category="coding", requests=0, acceptance=None, user_tokens_per_s=Distribution(n=0)
            ),
        ),
    )


def blank_study(width: int = 100) -> Study:
    """Two runs and a comparison in which nothing was measured."""
    bare = msgspec.structs.replace(
        info(None), server=ServerInfo(engine="openai", model="m", url="http://x")
    )
    nothing = Summary(info=bare, phases=(blank(),), caveats=(), end="completed")
    load = LoadComparison(
        load=ClosedLoop(concurrency=1),
        repeat=0,
        base=blank(),
        spec=blank(),
        speedup_user=None,
        speedup_throughput=None,
        throughput_basis="",
        categories=(
            CategoryComparison(category="coding", speedup_user=None, acceptance=None, steps=None),
        ),
    )
    comparison = Comparison(base=bare, spec=bare, loads=(load,), differences=())
    return Study(summaries=(nothing, nothing), comparison=comparison, width=width)


def with_summary(study: Study, changed: Summary) -> Study:
    """`study` with `changed` in place of its last run, in the comparison too."""
    comparison = study.comparison
    if comparison is not None:
        comparison = msgspec.structs.replace(comparison, spec=changed.info)
    return replace(study, summaries=(*study.summaries[:-1], changed), comparison=comparison)


def golden(name: str, text: str) -> str:
    """The stored text `tests/data/golden-<name>.txt`; DRAFTLOAD_GOLDEN=1 stores `text` first."""
    path = Path(__file__).parent / "data" / f"golden-{name}.txt"
    if os.environ.get("DRAFTLOAD_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    return path.read_text(encoding="utf-8")
