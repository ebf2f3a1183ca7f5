"""A whole run against the simulator: its truth, an independent peer, what the file holds."""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import aiohttp
import msgspec
import openai
import pytest
from aiohttp.test_utils import TestServer

from loadgen.acceptance import COUNTERS
from loadgen.errors import UserError
from loadgen.measure import Attach, Job, _without_folder, _without_paths, measure, prompt_records
from loadgen.store import read
from loadgen.summarize import summarize
from loadgen.tokens import LocalTokenizer, next_turn
from loadgen.types import (
    ClosedLoop,
    Completed,
    Dataset,
    Message,
    OpenLoop,
    Prompt,
    PromptRecord,
    RequestRecord,
    Sampling,
    Scenario,
    ServerConfig,
    SpecConfig,
    Stop,
    Study,
    Summary,
    Templating,
)
from loadgen.written import masked, secret_values
from reports import table
from scenarios import prompts as sets
from scenarios import random_control, throughput
from servers import llamacpp, sglang, simulator, trtllm
from servers import openai as generic
from servers.simulated import preset
from tests.test_tokens import TEMPLATE, folder

SCENARIO = Scenario(
    name="t",
    dataset=Dataset(categories=("coding", "roleplay"), limit=8),
    loads=(ClosedLoop(concurrency=1), ClosedLoop(concurrency=4)),
    sampling=Sampling(max_output_tokens=40),
    warmup_requests=2,
)
ENGINES = {
    e.name: e
    for e in (simulator.ENGINE, generic.ENGINE, llamacpp.ENGINE, trtllm.ENGINE, sglang.ENGINE)
}


@contextlib.asynccontextmanager
async def simulated(method: str = "eagle3", **changes: Any) -> AsyncIterator[str]:
    settings = preset(method, **({"time_scale": 0.1} | changes))
    async with TestServer(simulator.app(settings)) as server:
        yield str(server.make_url("")).rstrip("/")


async def truth(url: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as http, http.get(url + "/truth") as response:
        found: dict[str, Any] = await response.json()
        return found


def job(out: Path, scenario: Scenario = SCENARIO, **changes: Any) -> Job:
    fields: dict[str, Any] = {
        "scenario": scenario,
        "prompts": sets.read(scenario.dataset).prompts,
        "warmup": sets.warmup(),
        "engines": ENGINES,
        "out": out,
        "say": lambda line: None,
        "watch": lambda plan, info: contextlib.nullcontext(lambda record: None),
    }
    return Job(**(fields | changes))


TEXTS: tuple[Literal["cut", "all", "none"], ...] = ("cut", "all", "none")


async def run(url: str, out: Path, **changes: Any) -> tuple[Summary, list[RequestRecord]]:
    path, reason = await measure(url, job(out, **changes))
    assert reason == "completed"
    records = [r for r in read(path).records if isinstance(r, RequestRecord)]
    found = read(path)
    return summarize(found, ENGINES[found.info.server.engine]), records


async def test_every_source_says_what_the_simulator_did(tmp_path: Path) -> None:
    async with simulated() as url:
        summary, _ = await run(url, tmp_path)
    assert summary.info.server.simulated
    assert summary.end == "completed"
    for phase in summary.phases:
        by_source = {a.source: a for a in phase.acceptance}
        assert set(by_source) == {"per-request figures", "server counters", "chunks"}
        first, second = by_source["per-request figures"], by_source["server counters"]
        assert first.drafts == second.drafts
        assert first.accepted_tokens == second.accepted_tokens
        assert first.joint_by_position == second.joint_by_position
        lengths = {a.acceptance_length for a in phase.acceptance}
        assert len(lengths) == 1, "three sources, one acceptance length"
        assert first.overrun_tokens is not None
        assert first.overrun_tokens >= 0
        assert phase.requests.completed == phase.requests.sent
    codes = {c.code for c in summary.caveats}
    assert not codes & {"foreign-traffic", "chunks-not-steps", "server-not-idle", "request-errors"}


async def test_multi_turn_dialogues_carry_the_models_own_answers(tmp_path: Path) -> None:
    async with simulated() as url:
        _, records = await run(url, tmp_path)
    turns = {r.prompt_id: r for r in records if r.turn == 1 and r.phase == "c=1"}
    assert set(turns) == {"coding-04", "roleplay-04"}
    for record in records:
        if record.phase == "c=1" and record.turn == 0 and record.prompt_id in turns:
            later = turns[record.prompt_id]
            assert later.isl_tokens is not None
            assert record.isl_tokens is not None
            assert later.isl_tokens > record.isl_tokens + record.osl_tokens * 0.5
            assert later.sent_s > record.end_s


async def test_an_open_loop_over_a_server_that_is_slower(tmp_path: Path) -> None:
    """One slot, and arrivals far beyond it: the queue is at the server, the arrivals are on time,
    and no figure of acceptance minds."""
    scenario = msgspec.structs.replace(
        SCENARIO, loads=(OpenLoop(request_rate_rps=200),), stop=Stop(requests=24)
    )
    async with simulated(max_running=1, time_scale=0.05) as url:
        summary, records = await run(url, tmp_path, scenario=scenario)
    (phase,) = summary.phases
    first = [r for r in records if r.phase == "rate=200" and r.turn == 0]
    assert len(first) == 24
    assert all(r.outcome == Completed() for r in records)
    assert all(r.sent_s >= r.intended_s for r in records if r.intended_s is not None)
    assert phase.distributions["ttft_intended_s"].n == phase.requests.completed > 24
    best = phase.acceptance[0]
    assert best.acceptance_length is not None
    assert best.steps is not None
    mine = [r for r in records if r.intended_s is not None]
    assert best.acceptance_length * best.steps == pytest.approx(
        sum(r.osl_tokens for r in mine) - len(mine)
    )
    for record in records:
        assert (record.intended_s is None) == record.phase.startswith("warm-up")


async def test_speculation_off_is_off(tmp_path: Path) -> None:
    async with simulated("none") as url:
        summary, _ = await run(url, tmp_path)
    for phase in summary.phases:
        assert [a.state for a in phase.acceptance] == ["off"]
        assert phase.step_time_s is not None


async def test_an_independent_peer_counts_the_same_tokens(tmp_path: Path) -> None:
    """The openai SDK, the same server and prompts, concurrency 4."""
    async with simulated() as url:
        _, records = await run(url, tmp_path)
        ours = {
            r.prompt_id: (r.isl_tokens, r.osl_tokens)
            for r in records
            if r.phase == "c=4" and r.turn == 0
        }
        asked = {p.prompt_id: p for p in sets.read(SCENARIO.dataset).prompts}
        gate = asyncio.Semaphore(4)
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none") as client:
            models = await client.models.list()
            model = models.data[0].id

            async def one(prompt_id: str) -> tuple[str, tuple[int, int]]:
                async with gate:
                    text = asked[prompt_id].messages[0].content
                    stream = await client.chat.completions.create(
                        model=model,
                        messages=[{"role": "user", "content": text}],
                        max_tokens=40,
                        temperature=0,
                        stream=True,
                        stream_options={"include_usage": True},
                    )
                    usage = None
                    async for chunk in stream:
                        usage = chunk.usage or usage
                    assert usage is not None
                    return prompt_id, (usage.prompt_tokens, usage.completion_tokens)

            theirs = dict(await asyncio.gather(*(one(p) for p in ours)))
    assert len(ours) == 8
    assert theirs == ours


async def test_nine_intervals_in_ten_hold_the_truth(tmp_path: Path) -> None:
    """Acceptance length of every category and of all, at four loads; deterministic by the seed."""
    scenario = Scenario(
        name="t",
        dataset=Dataset(limit=44),
        loads=tuple(ClosedLoop(concurrency=c) for c in (1, 8, 32, 64)),
        sampling=Sampling(max_output_tokens=40),
        warmup_requests=1,
    )
    async with simulated("eagle3", model="70b", time_scale=0.0, max_running=64) as url:
        summary, _ = await run(
            url, tmp_path, scenario=scenario, prompts=sets.read(scenario.dataset).prompts
        )
        told = await truth(url)
    held = []
    expected = {c: told["categories"][c]["expected"] for c in told["categories"] if c != "default"}
    tokens, steps = (sum(e[n] for e in expected.values()) for n in ("decode_tokens", "steps"))
    for phase in (p for p in summary.phases if p.measured):
        figures = [(phase.acceptance[0], tokens / steps)]
        for row in phase.categories:
            assert row.acceptance is not None
            figures.append((row.acceptance, expected[row.category]["acceptance_length"]))
        held += [a.interval.low <= al <= a.interval.high for a, al in figures if a.interval]
    assert len(held) == 4 * 12
    assert sum(held) >= 0.9 * len(held)


@pytest.mark.parametrize(
    ("dialect", "method"),
    [
        ("vllm", "ngram"),
        ("llamacpp", "none"),
        ("llamacpp", "ngram"),
        ("trtllm", "eagle3"),
        ("sglang", "eagle3"),
    ],
)
async def test_every_dialect_is_measured_as_its_engine(
    dialect: str, method: str, tmp_path: Path
) -> None:
    """Found by asking, read by the engine's own file, and never taken for the real one."""
    async with simulated(method, dialect=dialect, time_scale=0.02) as url:
        summary, records = await run(url, tmp_path)
        overall = (await truth(url))["overall"]
    server = summary.info.server
    assert server.engine == {"vllm": "simulated"}.get(dialect, dialect)
    assert server.simulated
    assert all(r.outcome == Completed() for r in records)
    assert "length" in {r.finish_reason for r in records}
    assert "outputs-cut-short" not in {c.code for c in summary.caveats}
    for phase in (p for p in summary.phases if p.measured and method != "none"):
        best = phase.acceptance[0]
        assert best.acceptance_length is not None
        assert best.steps is not None
        mine = [r for r in records if r.phase == phase.name]
        assert best.acceptance_length * best.steps == pytest.approx(
            sum(r.osl_tokens for r in mine) - len(mine)
        )
    if method != "none" and dialect != "trtllm" and dialect != "sglang":  # which tell no drafts
        drafts = [r.spec.drafts or 0 for r in records if r.spec is not None]
        probe_and_warm_up = overall["drafts"] - sum(drafts)
        assert 0 <= probe_and_warm_up < overall["drafts"] / 4


async def test_categories_run_apart_where_no_request_tells_its_steps(tmp_path: Path) -> None:
    """Each category's drafts are then the growth of the counters over its own phase."""
    deaf = replace(simulator.ENGINE, chunk_is_step=None)
    async with simulated("ngram", per_request_metrics=False, time_scale=0.02) as url:
        summary, records = await run(url, tmp_path, engines=ENGINES | {deaf.name: deaf})
        told = (await truth(url))["categories"]
    assert "categories-apart" in {c.code for c in summary.caveats}
    assert [(p.name, p.categories_apart) for p in summary.phases] == [("c=1", True), ("c=4", True)]
    drafts: dict[str, int] = {}
    for phase in summary.phases:
        mine = [r for r in records if r.phase.startswith(phase.name + " ")]
        assert phase.requests.sent == len(mine)
        assert phase.throughput.whole == pytest.approx(
            sum(r.osl_tokens for r in mine) / phase.span_s
        )
        assert [c.category for c in phase.categories] == ["coding", "roleplay"]
        for row in phase.categories:
            assert row.acceptance is not None
            assert row.acceptance.source == COUNTERS
            drafts[row.category] = drafts.get(row.category, 0) + (row.acceptance.drafts or 0)
        counted = next(a for a in phase.acceptance if a.source == COUNTERS)
        assert counted.drafts == sum(
            c.acceptance.drafts or 0 for c in phase.categories if c.acceptance is not None
        )
    assert drafts == {c: told[c]["drafts"] for c in ("coding", "roleplay")}


async def test_the_chat_api_is_measured_too(tmp_path: Path) -> None:
    async with simulated() as url:
        summary, records = await run(url, tmp_path, attach=Attach(api="chat"))
    assert summary.info.server.api == "chat"
    assert all(r.osl_tokens == r.usage_tokens for r in records)


@pytest.mark.parametrize(("text", "kept"), [("cut", 2000), ("all", 5000), ("none", None)])
async def test_texts_in_the_file(tmp_path: Path, text: str, kept: int | None) -> None:
    long = msgspec.structs.replace(
        sets.read(SCENARIO.dataset).prompts[0],
        messages=(Message(role="user", content="word " * 1000),),
        later_turns=(),
    )
    async with simulated() as url:
        path, _ = await measure(url, job(tmp_path, prompts=(long,), text=text))
    (prompt,) = [r for r in read(path).records if isinstance(r, PromptRecord)]
    assert (None if prompt.text is None else len(prompt.text)) == kept
    answers = [r.text for r in read(path).records if isinstance(r, RequestRecord)]
    assert all((answer is None) == (text == "none") for answer in answers)


@pytest.mark.parametrize("kind", ["throughput", "random"])
async def test_prompts_of_an_exact_length_reach_the_server_so(tmp_path: Path, kind: Any) -> None:
    """The server's own count of every prompt, template included."""
    data = Dataset(kind=kind, isl_tokens=700, limit=12)
    made = {"throughput": throughput.recipe, "random": random_control.recipe}[kind](data)
    said: list[str] = []
    scenario = msgspec.structs.replace(SCENARIO, dataset=data)
    async with simulated() as url:
        summary, records = await run(
            url, tmp_path, scenario=scenario, prompts=(), recipe=made, say=said.append
        )
        chat = job(tmp_path, scenario, prompts=(), recipe=made, attach=Attach(api="chat"))
        with pytest.raises(UserError, match="sends token ids"):
            await measure(url, chat)
    measured = [r for r in records if r.phase in ("c=1", "c=4")]
    assert {r.isl_tokens for r in measured} == {700}
    assert len({r.prompt_id for r in measured}) == 12
    assert {r.isl_bucket for r in measured} == {"700"}
    assert any("12 prompts of" in line for line in said)
    control = kind == "random"
    assert ("random-control" in {c.code for c in summary.caveats}) == control
    for phase in summary.phases:
        assert (phase.answers is not None) == control
        if phase.answers is not None:
            assert phase.answers.answers == sum(s.count for s in phase.answers.shares)
            assert phase.answers.prompts_known


async def test_noise_is_judged_as_what_the_server_made_of_it(tmp_path: Path) -> None:
    """The simulator answers half of it by asking back, half by an essay on a word in it."""
    data = Dataset(kind="random", isl_tokens=300, limit=40)
    scenario = msgspec.structs.replace(
        SCENARIO,
        dataset=data,
        loads=(ClosedLoop(concurrency=40),),
        sampling=Sampling(max_output_tokens=320),
    )
    async with simulated(time_scale=0.02) as url:
        recipe = random_control.recipe(data)
        summary, _ = await run(url, tmp_path, scenario=scenario, prompts=(), recipe=recipe)
    (phase,) = summary.phases
    assert phase.answers is not None
    shares = {s.label: s.count for s in phase.answers.shares}
    assert shares["trivial"] > 8
    assert shares["latched"] > 8
    assert shares["trivial"] + shares["latched"] >= 38
    assert "random-unrepresentative" in {c.code for c in summary.caveats}


def test_the_text_of_random_ids_is_kept_whole_unless_no_text_is() -> None:
    prompt = Prompt(
        prompt_id="p", category="random", prompt_token_ids=array("I", [1]), text="x" * 5000
    )
    kept = {text: [r.text for r in prompt_records([prompt], text)] for text in TEXTS}
    assert kept == {"cut": ["x" * 5000], "all": ["x" * 5000], "none": [None]}


async def test_prompts_that_do_not_fit_stop_before_the_run(tmp_path: Path) -> None:
    scenario = msgspec.structs.replace(SCENARIO, sampling=Sampling(max_output_tokens=10**6))
    async with simulated() as url:
        with pytest.raises(UserError, match="prompts do not fit"):
            await measure(url, job(tmp_path, scenario))
    assert list(tmp_path.iterdir()) == []


async def test_prompts_that_do_not_fit_are_left_out_and_the_run_file_says_so(
    tmp_path: Path,
) -> None:
    asked = sets.read(SCENARIO.dataset).prompts
    long = (Message(role="user", content="word " * 900),)
    asked = (*asked, msgspec.structs.replace(asked[0], prompt_id="long", messages=long))
    data = msgspec.structs.replace(SCENARIO.dataset, skip_too_long=True)
    scenario = msgspec.structs.replace(SCENARIO, dataset=data)
    said: list[str] = []
    async with simulated(max_model_len=800) as url:
        summary, records = await run(
            url, tmp_path, scenario=scenario, prompts=asked, say=said.append
        )
    assert "long" not in {r.prompt_id for r in records}
    assert {p.prompt_id for p in asked} - {"long"} <= {r.prompt_id for r in records}
    (caveat,) = [c for c in summary.info.caveats if c.code == "prompts-skipped"]
    assert caveat.message.startswith("1 of 9 prompts do not fit")
    assert [line for line in said if line.startswith("prompts-skipped: 1 of 9")]


@pytest.mark.parametrize("dialect", ["vllm", "llamacpp"])
async def test_answers_that_the_server_shortens_are_seen(dialect: str, tmp_path: Path) -> None:
    """A later turn whose history leaves too little of the context: 200, and fewer tokens."""
    asked = sets.read(SCENARIO.dataset).prompts[0]
    said = tuple("word " * 40 for _ in range(3))
    asked = msgspec.structs.replace(asked, messages=HELLO, later_turns=said)
    async with simulated(dialect=dialect, max_model_len=280, mean_output_tokens=4000) as url:
        summary, records = await run(url, tmp_path, prompts=(asked,))
    (phase, *_) = summary.phases
    told = [(r.turn, r.isl_tokens, r.osl_tokens) for r in records if r.phase == phase.name]
    assert set(told) == {(0, 7, 40), (1, 94, 40), (2, 181, 40), (3, 268, 12)}
    assert {r.outcome for r in records} == {Completed()}
    assert [c.phase for c in summary.caveats if c.code == "outputs-cut-short"][:1] == [phase.name]


HELLO = (Message(role="user", content="hello"),)


@pytest.mark.parametrize(
    ("prompts", "attach", "templating", "fault"),
    [
        ({"prompt_token_ids": array("I", [1, 1 << 20])}, {}, {}, "greatest was 1048576"),
        ({"prompt_token_ids": array("I")}, {}, {}, "no prompt has a token"),
        ({"messages": HELLO}, {"tokenizer": "LOCAL"}, {}, "is not that of 'simulated-8b'"),
        ({"messages": HELLO}, {"tokenizer": "LOCAL"}, {"args": {"thinkin": 1}}, "did you mean"),
        ({"messages": HELLO}, {"api": "chat"}, {"apply": False}, "Drop --no-template"),
    ],
)
async def test_bad_input_ends_before_any_measured_request(
    tmp_path: Path,
    prompts: dict[str, Any],
    attach: dict[str, Any],
    templating: dict[str, Any],
    fault: str,
) -> None:
    path = folder(tmp_path / "model", chat_template=TEMPLATE)
    attach |= {"tokenizer": path} if "tokenizer" in attach else {}
    scenario = msgspec.structs.replace(SCENARIO, templating=Templating(**templating))
    asked = Prompt(prompt_id="p", category="c", **prompts)
    async with simulated() as url:
        with pytest.raises(UserError, match=fault):
            await measure(
                url, job(tmp_path / "runs", scenario, prompts=(asked,), attach=Attach(**attach))
            )
    assert not (tmp_path / "runs").exists()


async def test_any_tokenizer_goes_on_and_says_so(tmp_path: Path) -> None:
    """Ids of a local tokenizer, arguments and all, are what the server counts; later turns too."""
    path = folder(tmp_path / "model", chat_template=TEMPLATE)
    templating = Templating(args={"thinking": False}, history="answer")
    scenario = msgspec.structs.replace(SCENARIO, templating=templating)
    asked = Prompt(prompt_id="p", category="c", messages=HELLO, later_turns=("you",))
    attach = Attach(tokenizer=path, any_tokenizer=True, token_cache=tmp_path / "cache")
    told: list[tuple[int, int]] = []

    @contextlib.contextmanager
    def tokenizing(total: int) -> Iterator[Callable[[int], None]]:
        yield lambda count: told.append((count, total))

    async with simulated() as url:
        for _ in range(2):
            summary, records = await run(
                url, tmp_path, scenario=scenario, prompts=(asked,), attach=attach,
                tokenizing=tokenizing,
            )  # fmt: skip
    assert told == [(0, 1), (1, 1), (1, 1)], "made, then read"
    render = LocalTokenizer(path, templating)
    answers = {(r.dialogue_id, r.phase): r for r in records if r.turn == 0 and r.prompt_id == "p"}
    for record in (r for r in records if r.prompt_id == "p"):
        before = answers[record.dialogue_id, record.phase]
        history = HELLO if record.turn == 0 else next_turn(HELLO, before.text or "", "you")
        assert record.isl_tokens == len(render(history))
    assert "tokenizer-unchecked" in [c.code for c in summary.info.caveats]
    assert summary.info.scenario.templating == templating
    text = table.render(Study(summaries=(summary,)))
    assert "template arguments thinking=false, history without thinking" in text


async def test_template_arguments_make_another_digest(tmp_path: Path) -> None:
    digests = []
    async with simulated() as url:
        for args in ({}, {"enable_thinking": False}, {}):
            scenario = msgspec.structs.replace(SCENARIO, templating=Templating(args=args))
            summary, _ = await run(url, tmp_path, scenario=scenario)
            digests.append(summary.info.prompts_sha256)
    assert digests[0] == digests[2] != digests[1]


def test_a_launched_config_leaves_its_paths_and_secrets_behind() -> None:
    config = ServerConfig(
        engine="vllm",
        model="/models/llama",
        executable=("/opt/venv/bin/vllm",),
        env={"HF_TOKEN": "s"},
        extra_args=("--api-key", "s3cret", "--hf-token=s3cret", "--max-num-batched-tokens", "8"),
        spec=SpecConfig(method="eagle3", draft_model="/models/head", draft_depth=3),
    )
    kept = _without_paths(config)
    assert kept.model == "llama"
    assert kept.executable == ("vllm",)
    behind = ("/usr/bin/docker", "-e", "HF_TOKEN=s3cret", "-eA_KEY=s3cret", "--env=B_KEY=s3cret")
    prefixed = msgspec.structs.replace(config, executable=behind, files_dir="/home/me")
    assert _without_paths(prefixed).executable == (
        "docker", "-e", "HF_TOKEN=***", "-eA_KEY=***", "--env=B_KEY=***",
    )  # fmt: skip
    assert _without_paths(prefixed).files_dir is None
    assert secret_values(behind, {}) == ("s3cret",) * 3
    assert kept.env == {}
    assert kept.spec is not None
    assert kept.spec.draft_model == "head"
    assert kept.extra_args == (
        "--api-key", "***", "--hf-token=***", "--max-num-batched-tokens", "8",
    )  # fmt: skip
    assert _without_folder("/models/a.gguf") == "a.gguf"
    assert _without_folder("meta-llama/Llama-3.3-70B") == "meta-llama/Llama-3.3-70B"
    assert masked(("--tokenizer", "x", "--tokenizer-mode=slow", "CUDA=0")) == (
        "--tokenizer", "x", "--tokenizer-mode=slow", "CUDA=0",
    )  # fmt: skip
