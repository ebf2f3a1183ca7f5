"""The real engine, measured by draftload itself: the arithmetic closes, and a known answer.

Fetches the demo's model (93 MB) once; skipped where xllamacpp is not installed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loadgen.acceptance import COUNTERS, PER_REQUEST, STEPS_FROM_TIMINGS
from loadgen.measure import measure
from loadgen.metrics import completed
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
    SpecConfig,
    Stop,
    Summary,
)
from loadgen.written import most_in_flight
from servers import launch, llamacpp
from tests.conftest import processes
from tests.test_measure import job

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed"
    ),
]
ROOT = Path(__file__).parents[1]
DEPTH = 3


@pytest.fixture(scope="module")
def model() -> str:
    """$DRAFTLOAD_MODEL_FILE, or the demo's model, fetched as the demo fetches it."""
    given = os.environ.get("DRAFTLOAD_MODEL_FILE")
    return given or str(llamacpp.demo_model(llamacpp.cache_dir(), print))


async def run(
    model: str, spec: SpecConfig | None, scenario: Scenario, out: Path
) -> tuple[Summary, list[RequestRecord]]:
    slots = max(most_in_flight(load) or 1 for load in scenario.loads)
    config = ServerConfig(
        engine="llamacpp", model=model, name="smollm2", spec=spec, max_running=slots,
        max_model_len=1024,
    )  # fmt: skip
    engines = {"llamacpp": llamacpp.ENGINE, "openai": llamacpp.ENGINE}
    async with launch.launched(llamacpp.ENGINE, config, start_timeout_s=120) as server:
        path, reason = await measure(server.url, job(out, scenario, engines=engines), config)
    assert reason == "completed"
    found = read(path)
    records = [r for r in found.records if isinstance(r, RequestRecord)]
    return summarize(read(path), llamacpp.ENGINE), records


def scenario(tokens: int, *, ignore_eos: bool, requests: int, load: int = 4) -> Scenario:
    return Scenario(
        name="engine",
        dataset=Dataset(limit=22),
        loads=(ClosedLoop(concurrency=load),),
        stop=Stop(requests=requests),
        sampling=Sampling(max_output_tokens=tokens, ignore_eos=ignore_eos),
        warmup_requests=1,
    )


def source(summary: Summary, name: str) -> Acceptance:
    return next(a for a in summary.phases[0].acceptance if a.source == name)


NGRAM = SpecConfig(method="ngram", draft_depth=DEPTH, options={"size_n": 2})


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
async def test_steps_close_exactly_where_lengths_are_fixed(
    method: str, model: str, tmp_path: Path
) -> None:
    """With ignore_eos: S = T − R − A, and per-request figures are the counters' growth.

    The target is its own draft model here, so that greedy drafts are accepted but for rounding.
    """
    own = SpecConfig(method="draft_model", draft_model=model, draft_depth=DEPTH)
    asked = scenario(40 if method == "ngram" else 24, ignore_eos=True, requests=12)
    summary, records = await run(model, NGRAM if method == "ngram" else own, asked, tmp_path)
    (phase,) = summary.phases
    figures, counters = source(summary, PER_REQUEST), source(summary, COUNTERS)
    tokens = sum(r.osl_tokens for r in records if r.phase == phase.name)
    assert tokens == 12 * asked.sampling.max_output_tokens
    assert figures.steps_source == STEPS_FROM_TIMINGS
    assert figures.drafts
    assert figures.acceptance_length is not None
    assert figures.acceptance_length_drafted is not None
    assert figures.draft_coverage is not None
    assert figures.acceptance_length == pytest.approx(
        1 + figures.draft_coverage * (figures.acceptance_length_drafted - 1)
    )
    if method != "ngram":
        assert figures.acceptance_length > 2, "a model agrees with itself"
    assert figures.steps == tokens - 12 - (figures.accepted_tokens or 0)
    assert figures.overrun_tokens == 0
    assert figures.drafts == counters.drafts
    assert figures.draft_tokens == counters.draft_tokens
    assert figures.accepted_tokens == counters.accepted_tokens
    assert figures.joint_by_position == counters.joint_by_position
    codes = {c.code for c in summary.caveats}
    assert not codes & {"foreign-traffic", "prefix-cache", "request-errors", "server-not-idle"}
    assert not any(r.resent for r in records), "a fresh connection each, as this engine needs"


async def test_steps_close_with_overrun_where_answers_end_by_themselves(
    model: str, tmp_path: Path
) -> None:
    """Without ignore_eos: S = T + O − R − A, O at most k a stopped request."""
    asked = scenario(320, ignore_eos=False, requests=12)  # half of them, whichever way it rounds
    summary, records = await run(model, NGRAM, asked, tmp_path)
    figures, counters = source(summary, PER_REQUEST), source(summary, COUNTERS)
    measured = completed([r for r in records if r.phase == summary.phases[0].name])
    stopped = sum(r.finish_reason == "stop" for r in measured)
    assert stopped, "some answers end by themselves"
    assert figures.overrun_tokens is not None
    assert 0 <= figures.overrun_tokens <= DEPTH * stopped
    assert figures.accepted_tokens == counters.accepted_tokens


async def test_nothing_is_drafted_without_speculation(model: str, tmp_path: Path) -> None:
    summary, _ = await run(model, None, scenario(16, ignore_eos=True, requests=8), tmp_path)
    (found,) = summary.phases[0].acceptance
    assert (found.state, found.acceptance_length) == ("off", None)


@pytest.mark.slow
async def test_known_answer(model: str, tmp_path: Path) -> None:
    """Synthetic acceptance 2.2 with the model as its own draft, k = 3, at least 2,000 steps.

    The engine accepts each draft token with one probability p, 1 + p + p² + p³ = 2.2, so a draft
    cut to d tokens is expected to give 1 + p + … + p^d. The 99.9 % interval follows from the
    variance of that truncated count, summed over the drafts as they were cut.
    """
    spec = SpecConfig(
        method="draft_model", draft_model=model, draft_depth=DEPTH, options={"synth_len": 2.2}
    )
    asked = scenario(256, ignore_eos=True, requests=20, load=2)
    summary, records = await run(model, spec, asked, tmp_path)
    figures = source(summary, PER_REQUEST)
    assert figures.steps is not None
    assert figures.steps >= 2000
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if p + p**2 + p**3 < 1.2 else (low, p)
    drafts_of = [0] * (DEPTH + 1)  # drafts by their length
    for record in records:
        if record.phase == summary.phases[0].name and record.spec is not None:
            at = (*(record.spec.drafted_by_position or ()), *[0] * DEPTH)[:DEPTH]
            for length in range(1, DEPTH + 1):
                drafts_of[length] += at[length - 1] - (at[length] if length < DEPTH else 0)
    assert sum(drafts_of) == figures.drafts
    mean = variance = 0.0
    for length, count in enumerate(drafts_of):
        chances = [p**j * (1 - p if j < length else 1.0) for j in range(length + 1)]
        first = sum(j * c for j, c in enumerate(chances))
        second = sum(j * j * c for j, c in enumerate(chances))
        mean += count * first
        variance += count * (second - first**2)
    drafts = sum(drafts_of)
    expected, error = 1 + mean / drafts, 3.29 * math.sqrt(variance) / drafts
    print(
        f"AL where drafted {figures.acceptance_length_drafted:.4f}, expected {expected:.4f} ± "
        f"{error:.4f} (99.9 %), {figures.steps} steps, {drafts} drafts, by length {drafts_of[1:]}"
    )
    assert figures.acceptance_length_drafted == pytest.approx(expected, abs=error)


def test_kill_9_of_a_demo_leaves_no_server(model: str, tmp_path: Path) -> None:
    mine = tmp_path / "only-this-test.gguf"
    mine.symlink_to(model)
    words = ["demo", "--quick", "--quiet", "--model-file", str(mine)]
    process = subprocess.Popen(
        [sys.executable, "-m", "loadgen.cli", *words],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "runs").glob("*.jsonl")):  # the server is up and measured
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert set(processes(str(mine))) - {process.pid}, "there is a server to leave behind"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
        deadline = time.monotonic() + 20
        while processes(str(mine)):
            assert time.monotonic() < deadline, "the server outlived draftload"
            time.sleep(0.05)
    finally:
        for left in processes(str(mine)):
            os.kill(left, signal.SIGKILL)
