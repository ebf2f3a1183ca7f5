"""The simulated engine: what it streams, counts and tells agree, and nothing passes for real."""

from __future__ import annotations

import asyncio
import json
import math
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestServer
from openai import AsyncOpenAI

from loadgen import __version__
from loadgen.errors import UserError
from loadgen.scrape import parse_page
from loadgen.transport import Transport
from loadgen.types import (
    U32,
    Broke,
    Completed,
    Dialogue,
    Message,
    Prompt,
    Refused,
    Request,
    RequestRecord,
    Sampling,
    ServerConfig,
    SpecConfig,
)
from loadgen.written import read_toml
from servers import simulated, simulator
from servers.simulated import Answer, Batch, preset
from servers.simulator import ENGINE, LOOP, Loop

CONFIGS = Path(__file__).parent.parent / "servers" / "configs"
MODEL = "simulated-8b"
FAST: dict[str, Any] = {"time_scale": 0.0}
METHODS = ["none", "eagle3", "ngram", "mtp", "draft_model"]


class Simulated:
    """A simulator in this process, with questions put to it."""

    def __init__(self, server: TestServer, http: aiohttp.ClientSession) -> None:
        self.url = str(server.make_url("/")).rstrip("/")
        self.batch: Batch = server.app[LOOP].batch
        self.http = http

    async def get(self, path: str) -> Any:
        async with self.http.get(self.url + path) as response:
            return json.loads(await response.read())

    async def page(self) -> dict[str, float]:
        async with self.http.get(self.url + "/metrics") as response:
            return parse_page(await response.text())

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.post(self.url + path, data=data) as response:
            return response.status, json.loads(await response.read())

    async def ask(
        self, ids: list[U32], *, osl: int = 40, ignore_eos: bool = False, api: str = "completions"
    ) -> list[RequestRecord]:
        """All at once."""
        wire = ENGINE.wires[api]
        sampling = Sampling(ignore_eos=ignore_eos)
        async with Transport(self.url, wire) as transport:
            requests = [request(prompt, osl) for prompt in ids]
            done = await asyncio.gather(
                *(transport.stream(r, wire.encode(r, MODEL, sampling)) for r in requests)
            )
        return [record for record, _ in done]


def request(ids: U32, osl: int) -> Request:
    return Request(
        request_id="r",
        phase="x",
        dialogue=Dialogue(dialogue_id="d", prompt=Prompt(prompt_id="p", category="c")),
        turn=0,
        max_output_tokens=osl,
        prompt_token_ids=ids,
        messages=(Message(role="user", content=f"say {ids[0]}"),),
    )


def prompts(count: int, isl: int = 12) -> list[U32]:
    return [array("I", [1000 + n, *range(isl - 1)]) for n in range(count)]


@asynccontextmanager
async def running(method: str = "none", k: int = 3, **changes: Any) -> AsyncIterator[Simulated]:
    server = TestServer(simulator.app(preset(method, k, **(FAST | changes))))
    async with server, aiohttp.ClientSession() as http:
        yield Simulated(server, http)


def answers(records: list[RequestRecord]) -> list[list[int]]:
    return [list(r.output_token_ids or ()) for r in records]


@pytest.fixture
def known(tmp_path: Path) -> Path:
    rows = [
        {"id": "a", "category": "coding", "turns": ["Write a loop, please.", "Now in C."]},
        {"id": "b", "category": "roleplay", "turns": ["You are a pirate. Greet me!"]},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ── the answers ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("api", ["completions", "chat"])
async def test_answers_depend_on_seed_and_prompt_alone(api: str) -> None:
    said = []
    for method, seed in [("none", 0), ("none", 0), ("eagle3", 0), ("ngram", 0), ("none", 1)]:
        async with running(method, seed=seed) as server:
            said.append(answers(await server.ask(prompts(6), api=api)))
    first, again, eagle, ngram, other_seed = said
    assert first == again == eagle == ngram
    assert other_seed != first
    assert len({tuple(a) for a in first}) == 6


async def test_a_longer_limit_begins_with_the_same_answer() -> None:
    async with running() as server:
        short, long = [
            answers(await server.ask(prompts(4), osl=n, ignore_eos=True)) for n in (7, 30)
        ]
    assert [len(a) for a in long] == [30] * 4
    assert [a[:7] for a in long] == short


async def test_an_answer_ends_by_eos_or_by_its_limit() -> None:
    async with running("eagle3", mean_output_tokens=20.0) as server:
        records = await server.ask(prompts(40), osl=25)
        told = await server.get("/truth")
    for record in records:
        ids = list(record.output_token_ids or ())
        assert record.finish_reason == ("stop" if ids[-1] == simulated.EOS else "length")
        assert record.usage_tokens == record.osl_tokens == len(ids) <= 25
        assert simulated.EOS not in ids[:-1]
    assert {r.finish_reason for r in records} == {"stop", "length"}
    assert told["overall"]["finished"] == 40


async def test_text_and_ids_say_the_same() -> None:
    async with running() as server:
        records = await server.ask(prompts(3), osl=9, ignore_eos=True)
    for record in records:
        assert simulated.encode(record.text or "") == list(record.output_token_ids or ())


# ── what it counts ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize("method", METHODS)
async def test_streams_counters_and_truth_agree(method: str, api: str) -> None:
    async with running(method) as server:
        records = await server.ask(prompts(48), api=api)
        told = (await server.get("/truth"))["overall"]
        counted = ENGINE.counters(await server.page())
    assert {type(r.outcome) for r in records} == {Completed}
    chunks = [list(r.chunk_tokens or ()) for r in records]
    assert {c[0] for c in chunks} == {1}
    assert max(max(c) for c in chunks) <= (1 if method == "none" else 4)
    tokens = sum(r.osl_tokens for r in records)
    assert sum(len(c) - 1 for c in chunks) == told["steps"]
    assert tokens == told["generated_tokens"] == counted.generated_tokens
    assert len(records) == told["requests"] == told["finished"] == counted.requests
    assert told["acceptance_length"] == (tokens - 48) / told["steps"]
    if method == "none":
        assert told["drafts"] == told["accepted_tokens"] == 0
        assert (counted.drafts, counted.accepted_tokens) == (None, None)
        assert counted.accepted_by_position is None
        assert all(r.spec is None for r in records)
        return
    figures = [r.spec for r in records if r.spec is not None]
    assert len(figures) == 48
    for name in ("drafts", "draft_tokens", "accepted_tokens"):
        own = sum(getattr(f, name) for f in figures)
        assert own == told[name] == getattr(counted, name) > 0
    positions = [f.accepted_by_position for f in figures]
    summed = [sum(column) for column in zip(*(p for p in positions if p is not None), strict=True)]
    assert summed == told["accepted_by_position"] == list(counted.accepted_by_position or ())


@pytest.mark.parametrize("ignore_eos", [True, False])
@pytest.mark.parametrize("method", METHODS)
async def test_every_token_is_accounted_for(method: str, ignore_eos: bool, known: Path) -> None:
    """T + O = R + S + A, in every category and over all."""
    async with running(method, mean_output_tokens=30.0, prompts=known) as server:
        texts = ("Write a loop, please.", "You are a pirate. Greet me!")
        asked = [(await server.post("/tokenize", {"prompt": text}))[1] for text in texts]
        ids = [array("I", body["tokens"]) for body in asked]
        await server.ask([*ids, *prompts(30)], osl=41, ignore_eos=ignore_eos)
        told = await server.get("/truth")
    assert set(told["categories"]) == {"coding", "default", "roleplay"}
    for part in (told["overall"], *told["categories"].values()):
        emitted = part["generated_tokens"] + part["overrun_tokens"]
        assert emitted == part["requests"] + part["steps"] + part["accepted_tokens"] > 1
    assert (told["overall"]["overrun_tokens"] > 0) == (method != "none")


async def test_steps_without_a_draft_are_no_drafts() -> None:
    async with running("ngram", coverage=0.3) as server:
        await server.ask(prompts(40), ignore_eos=True)
        told = (await server.get("/truth"))["overall"]
    share = told["drafts"] / told["steps"]
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / told["steps"])


async def test_a_request_that_drafted_nothing_is_not_one_that_was_rejected() -> None:
    async with running("ngram", coverage=0.0) as server:
        _, body = await server.post(
            "/v1/completions", {"prompt": [5, 6], "max_tokens": 8, "ignore_eos": True}
        )
    assert body["metrics"]["speculative_decoding"] == {
        "mean_acceptance_length": 1.0,
        "draft_acceptance_rate": 0.0,
        "acceptance_histogram": [0, 0, 0, 0],
        "num_spec_steps": 0,
        "num_accepted_draft_tokens": 0,
        "num_draft_tokens": 0,
        "num_spec_tokens": 3,
        "per_step_accepted": None,
        "per_step_drafted": None,
    }


async def test_per_request_figures_can_be_off() -> None:
    async with running("eagle3", per_request_metrics=False) as server:
        records = await server.ask(prompts(2))
    assert [r.spec for r in records] == [None, None]


def test_positions_are_accepted_as_often_as_the_settings_say() -> None:
    """20,000 steps: each conditional within 4 standard errors (the seed is fixed)."""
    batch = Batch(preset("eagle3", 3, conditional={"default": (0.8, 0.6, 0.3)}))
    for prompt in prompts(100):
        answer = make_answer(batch, prompt, limit=10_000)
        for _ in range(201):  # the prefill is no decode step
            answer.step(0.0)
    told = simulated.told(batch.tallies["default"], 3)
    reached = [told["drafts"], *told["accepted_by_position"]]
    assert reached[0] == 20_000
    for j, expected in enumerate((0.8, 0.6, 0.3)):
        found = reached[j + 1] / reached[j]
        assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / reached[j])


# ── batching ─────────────────────────────────────────────────────────────────────────────────────


async def test_the_running_limit_holds() -> None:
    async with running(max_running=3) as server:
        records = await server.ask(prompts(20), ignore_eos=True)
        told = await server.get("/truth")
    assert {type(r.outcome) for r in records} == {Completed}
    assert told["most_running"] == 3
    # Each 39 decode steps, three at a time.
    assert told["iterations"] >= 20 * 39 / 3


async def test_the_prefill_budget_spreads_a_burst_over_steps() -> None:
    batch = Batch(preset("none", prefill_budget=25, **FAST))
    for prompt in prompts(5, isl=10):
        batch.waiting[make_answer(batch, prompt)] = None
    assert [played(batch).prefilled for _ in range(4)] == [25, 23, 2, 0]
    batch.waiting[make_answer(batch, array("I", range(100)))] = None
    assert [played(batch).prefilled for _ in range(6)] == [20, 20, 20, 20, 20, 0]


def played(batch: Batch) -> simulated.Iteration:
    batch.plan()
    batch.finish(0.0)
    return batch.rows[-1]


def make_answer(batch: Batch, prompt: U32, limit: int = 10) -> Answer:
    return Answer(batch, prompt, limit=limit, ignore_eos=True)


class Clock:
    """A clock on which every sleep comes back `late` after its time."""

    def __init__(self, *late: float) -> None:
        self.now, self.late, self.sleeps = 100.0, list(late), 0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, delay_s: float) -> None:
        self.now += delay_s + self.late[min(self.sleeps, len(self.late) - 1)]
        self.sleeps += 1
        await asyncio.sleep(0)


async def steps_on(clock: Clock, tokens: int) -> float:
    """Time of one request of `tokens` in 1 s steps."""
    loop = Loop(preset("none", noise=0.0))
    loop.now, loop.sleep = clock, clock.sleep
    planned = loop.batch.plan
    loop.batch.plan = lambda: planned() * 0 + 1.0  # type: ignore[method-assign]
    answer = make_answer(loop.batch, prompts(1)[0], limit=tokens)
    task = asyncio.create_task(loop.run())
    await loop.answered(answer, lambda end: None)
    task.cancel()
    return answer.last_at - 100.0


async def test_late_wakings_do_not_add_up() -> None:
    assert await steps_on(Clock(0.25), 40) == 40.25


async def test_a_machine_that_falls_behind_does_not_catch_up_in_a_burst() -> None:
    """The third step is 10 s late: what was missed is missed, the next take their full time."""
    assert await steps_on(Clock(0.0, 0.0, 10.0, 0.0), 8) == 18.0


async def test_a_client_that_leaves_frees_its_slot_and_stays_counted() -> None:
    async with running("eagle3", max_running=1, max_model_len=1 << 20) as server:
        body = {"prompt": [7], "max_tokens": 1 << 19, "ignore_eos": True, "stream": True}
        async with server.http.post(server.url + "/v1/completions", json=body) as response:
            assert (await response.content.readline()).startswith(b"data: ")
        async with asyncio.timeout(20):
            records = await server.ask(prompts(1), osl=5, ignore_eos=True)
        told = (await server.get("/truth"))["overall"]
        counted = ENGINE.counters(await server.page())
        load = ENGINE.load(await server.page())
    assert isinstance(records[0].outcome, Completed)
    assert (told["requests"], told["finished"], counted.requests) == (2, 1, 1)
    assert counted.generated_tokens is not None
    assert counted.generated_tokens > 5
    assert (load.running, load.waiting, load.kv_cache_use) == (0, 0, 0.0)


async def test_when_the_loop_dies_open_requests_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed, whole, and those that come later: told, none hangs."""
    async with running("eagle3") as server, asyncio.timeout(20):
        monkeypatch.setattr(Answer, "step", lambda answer, now: 1 / 0)
        faults: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        body = {"prompt": [5]}
        records, (status, said) = await asyncio.gather(
            server.ask(prompts(3)), server.post("/v1/completions", body)
        )
        (later,) = await server.ask(prompts(1), api="chat")
        assert await server.post("/v1/completions", body) == (status, said)
    for record in records:
        assert isinstance(record.outcome, Broke)
        assert "ZeroDivisionError" in record.outcome.message
    assert isinstance(later.outcome, Refused)
    assert later.outcome.status == 500
    assert (status, said["error"]["type"]) == (500, "InternalServerError")
    assert "ZeroDivisionError" in said["error"]["message"]
    assert [type(fault["exception"]) for fault in faults] == [ZeroDivisionError]


# ── categories ───────────────────────────────────────────────────────────────────────────────────


async def test_a_category_is_learnt_when_its_text_is_tokenized(known: Path) -> None:
    texts = ["Write a loop, please.", "You are a pirate. Greet me!", "Something else."]
    async with running("eagle3", prompts=known) as server:
        for text in texts:
            _, body = await server.post(
                "/tokenize", {"messages": [{"role": "user", "content": text}]}
            )
            assert body["count"] == len(body["tokens"])
            await server.ask([array("I", body["tokens"])])
        told = await server.get("/truth")
    assert {n: t["requests"] for n, t in told["categories"].items()} == {
        "coding": 1,
        "default": 1,
        "roleplay": 1,
    }


async def test_later_turns_and_plain_texts_keep_their_category(known: Path) -> None:
    turns = [
        {"role": "user", "content": "Write a loop, please."},
        {"role": "assistant", "content": "while True"},
        {"role": "user", "content": "Now in C."},
    ]
    async with running("eagle3", prompts=known) as server:
        _, body = await server.post("/tokenize", {"messages": turns})
        await server.ask([array("I", body["tokens"])])
        await server.post("/v1/chat/completions", {"messages": turns, "max_tokens": 3})
        await server.post("/v1/completions", {"prompt": "User: Write a loop, please. Assistant:"})
        told = await server.get("/truth")
    assert {n: t["requests"] for n, t in told["categories"].items()} == {"coding": 3}


async def test_a_category_outlives_the_server_that_tokenized_it(known: Path) -> None:
    async with running(prompts=known) as server:
        _, body = await server.post("/tokenize", {"prompt": "Say: Write a loop, please. Now!"})
    ids = array("I", body["tokens"])
    batch = Batch(preset("none", prompts=known))
    assert [batch.category(p) for p in (ids, ids[:-2], ids[4:])] == ["coding", "coding", "default"]


def test_the_built_in_prompts_are_of_the_eleven_categories() -> None:
    settings = preset("eagle3", 3)
    categories = set(Batch(settings).known.values())
    assert len(categories) == 11
    assert categories | {"default", "trivial", "latched"} == set(settings.conditional)


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_presets_have_a_probability_for_every_position(method: str, k: int) -> None:
    for row in preset(method, k).conditional.values():
        assert len(row) == k
        assert all(0 < p < 1 for p in row)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a", [3 + ord("a")]),
        ("é", [3 + 0xC3, 3 + 0xA9]),
        (" babada", [1004]),
        ("Hello, Hello", [16578, 47, 16578]),  # a word is one id, with or without its space
    ],
)
def test_the_toy_tokenizer_is_the_same_in_every_process(text: str, ids: list[int]) -> None:
    assert simulated.encode(text) == ids


# ── the API ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("completions", b'{"model":', 400, ("Bad Request", "body")),
        ("completions", b"[]", 400, ("Bad Request", "body")),
        ("completions", b"\xff\xfe", 400, ("Bad Request", "body")),
        ("completions", {"model": "nope", "prompt": [5]}, 404, ("NotFoundError", "model")),
        ("completions", {"prompt": []}, 400, ("BadRequestError", None)),
        ("completions", {"prompt": ""}, 400, ("BadRequestError", None)),
        ("completions", {"prompt": [5, -1]}, 400, ("Bad Request", "body.prompt")),
        ("completions", {"prompt": [5, 1.5]}, 400, ("Bad Request", "body.prompt")),
        ("completions", {"prompt": {"a": 1}}, 400, ("Bad Request", "body.prompt")),
        ("completions", {"prompt": [1 << 18]}, 400, ("BadRequestError", None)),
        ("completions", {"prompt": [5] * 64}, 400, ("BadRequestError", "input_tokens")),
        ("completions", {"prompt": [5], "max_tokens": 0}, 400, ("BadRequestError", "max_tokens")),
        ("completions", {"prompt": [5], "n": 2}, 400, ("BadRequestError", "n")),
        ("completions", {"prompt": [[5], [6]]}, 400, ("BadRequestError", "prompt")),
        ("chat/completions", {"messages": []}, 400, ("BadRequestError", "messages")),
        ("chat/completions", {"prompt": [5]}, 400, ("BadRequestError", "messages")),
    ],
)
async def test_errors_are_in_vllms_shape(
    path: str, body: Any, status: int, said: tuple[str, str | None]
) -> None:
    async with running(max_model_len=64) as server:
        found, answer = await server.post(f"/v1/{path}", body)
        told = await server.get("/truth")
    error = answer["error"]
    assert (found, error["code"]) == (status, status)
    assert (error["type"], error["param"]) == said
    assert error["message"]
    assert told["overall"]["requests"] == 0


async def test_a_full_context_cuts_silently_as_vllm_does() -> None:
    async with running(max_model_len=64) as server:
        records = await server.ask([array("I", [5] * 56)], osl=64, ignore_eos=True)
    assert (records[0].osl_tokens, records[0].finish_reason) == (8, "length")


@pytest.mark.parametrize("prompt", [[1, 6], [[1, 6]], "hi", ["hi"]])
async def test_ids_and_text_are_taken_as_prompts(prompt: Any) -> None:
    async with running() as server:
        status, body = await server.post("/v1/completions", {"prompt": prompt, "max_tokens": 4})
    assert status == 200
    assert body["usage"]["prompt_tokens"] == 2  # a text gets a BOS, ids are left alone
    assert body["usage"]["completion_tokens"] == 4


async def test_a_stream_says_no_more_than_it_was_asked() -> None:
    async with (
        running("eagle3") as server,
        server.http.post(
            server.url + "/v1/completions", json={"prompt": [5], "max_tokens": 6, "stream": True}
        ) as response,
    ):
        text = await response.text()
    *events, done = [line[6:] for line in text.split("\n\n") if line]
    assert done == "[DONE]"
    for event in map(json.loads, events):
        assert "usage" not in event
        assert "metrics" not in event
        assert "token_ids" not in event["choices"][0]


async def test_the_openai_sdk_counts_the_same_tokens() -> None:
    """An independent client, four at a time, streamed and whole, text and usage."""
    async with (
        running("eagle3") as server,
        AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):

        async def streamed(n: int) -> tuple[str, int]:
            text, tokens = "", 0
            async for chunk in await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": f"say {n}"}],
                max_tokens=24,
                stream=True,
                stream_options={"include_usage": True},
            ):
                text += chunk.choices[0].delta.content or "" if chunk.choices else ""
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            return text, tokens

        async def whole(n: int) -> tuple[str, int]:
            answer = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": f"say {n}"}], max_tokens=24
            )
            assert answer.usage is not None
            return answer.choices[0].message.content or "", answer.usage.completion_tokens

        said = await asyncio.gather(*(streamed(n) for n in range(4)))
        again = await asyncio.gather(*(whole(n) for n in range(4)))
        ours = await server.ask([array("I", [n]) for n in range(4)], osl=24, api="chat")
    assert said == again
    assert said == [(r.text, r.osl_tokens) for r in ours]


# ── as an engine ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "state", "depth", "reported"),
    [("none", "off", None, None), ("eagle3", "on", 5, "eagle3"), ("ngram", "on", 5, "n-gram")],
)
async def test_its_pages_say_that_it_is_simulated(
    method: str, state: str, depth: int | None, reported: str | None
) -> None:
    async with running(method, 5, max_running=17) as server:
        pages = {path: await server.get(path) for path in ENGINE.describe_paths}
        version = await server.get("/version")
        card = (await server.get("/v1/models"))["data"][0]
        facts = ENGINE.describe(pages, await server.page())
    assert card["owned_by"] in ENGINE.owned_by
    assert card["id"] == MODEL
    assert card["max_model_len"] == 8192
    assert facts.simulated
    assert (facts.state, facts.draft_depth, facts.spec_reported) == (state, depth, reported)
    assert facts.max_running == 17
    assert version == {"version": f"{__version__}-simulated"}
    assert facts.version == __version__


def test_without_its_pages_it_is_still_simulated() -> None:
    facts = ENGINE.describe({"/truth": None}, {})
    assert (facts.simulated, facts.state, facts.version) == (True, "unknown", None)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("simulator-*.toml")), ids=lambda p: p.stem)
def test_the_configs_that_come_along_start_what_they_name(path: Path) -> None:
    argv = simulator.command(read_toml(path, ServerConfig), 8101)
    assert argv[1:6] == ["-P", "-m", "servers.simulator", "--port", "8101"]
    assert argv[argv.index("--spec") + 1] == path.stem.partition("-")[2]


def test_the_command_line_says_every_setting() -> None:
    spec = SpecConfig(method="ngram", draft_depth=4, options={"coverage": 0.2})
    config = ServerConfig(
        engine="simulated", model=MODEL, spec=spec, max_running=9, extra_args=("--noise", "0.1")
    )
    argv = simulator.command(config, 1)
    _, port, settings = simulator.parsed(argv[argv.index("--port") :])
    assert (settings.method, settings.draft_depth, settings.coverage) == ("ngram", 4, 0.2)
    assert (port, settings.max_running, settings.noise, settings.seed) == (1, 9, 0.1, 0)


@pytest.mark.parametrize(
    ("model", "spec", "said"),
    [
        ("simulated-80b", None, "did you mean 'simulated-8b'"),
        (MODEL, SpecConfig(method="eagle"), "did you mean 'eagle3'"),
        (MODEL, SpecConfig(method="ngram", options={"coverge": 1}), "did you mean 'coverage'"),
        (MODEL, SpecConfig(method="ngram", draft_depth=0), "expected 1 or more"),
    ],
)
def test_what_it_cannot_simulate_is_refused(model: str, spec: SpecConfig | None, said: str) -> None:
    with pytest.raises(UserError) as fault:
        simulator.command(ServerConfig(engine="simulated", model=model, spec=spec), 1)
    assert said in str(fault.value)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'ngram'"):
        preset("n-gram")


# ── other dialects over HTTP ─────────────────────────────────────────────────────────────────────


async def streamed(server: Simulated, path: str, body: Any) -> list[Any]:
    async with server.http.post(server.url + path, json=body) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        lines = [ln[6:] for ln in (await response.text()).split("\n") if ln.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("incremental", [False, True])
async def test_sglangs_own_api_streams_all_so_far_or_what_is_new(incremental: bool) -> None:
    ask = {"max_new_tokens": 20, "ignore_eos": True, "temperature": 0}
    body = {"input_ids": [5, 6, 7], "sampling_params": ask}
    async with running("eagle3", dialect="sglang", incremental=incremental) as server:
        whole = (await server.post("/generate", body))[1]
        events = await streamed(server, "/generate", body | {"stream": True})
        told = (await server.get("/truth"))["overall"]
    ids = [e["output_ids"] for e in events]
    assert ([*chain(*ids)] if incremental else ids[-1]) == whole["output_ids"]
    assert len(whole["output_ids"]) == 20
    assert len(events) - 1 == events[-1]["meta_info"]["spec_verify_ct"]
    metas = [whole["meta_info"], events[-1]["meta_info"]]
    assert sum(m["spec_verify_ct"] for m in metas) == told["steps"]
    assert sum(m["spec_num_correct_drafts"] for m in metas) == told["accepted_tokens"]


async def test_sglang_refuses_inside_the_stream_what_does_not_fit() -> None:
    """Its sample's error: HTTP 200 and an event (engines.md §3.2)."""
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 99}}
    async with running(dialect="sglang", max_model_len=64) as server:
        (event,) = await streamed(server, "/generate", body | {"stream": True})
        status, _ = await server.post("/generate", body)
    assert set(event["error"]) == {"message", "type", "code", "retryable"}
    assert (event["error"]["code"], status) == (400, 400)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"return_token_ids": True}, "'extra_forbidden', 'loc': ('body', 'return_token_ids')"),
        ({"stream_options": {}}, "stream_options can only be set when stream is true"),
    ],
)
async def test_tensorrt_llm_refuses_fields_that_it_does_not_know(more: Any, said: str) -> None:
    async with running(dialect="trtllm") as server:
        body = {"model": MODEL, "prompt": [5]}
        status, answer = await server.post("/v1/completions", body | more)
        fine, _ = await server.post("/v1/completions", body | {"max_tokens": 3})
    assert (status, fine) == (400, 200)
    assert said in answer["error"]


@pytest.mark.parametrize(("dialect", "key"), [("vllm", "prompt"), ("llamacpp", "content")])
async def test_ids_are_told_as_text(dialect: Any, key: str) -> None:
    ids = simulated.encode("Hello there")
    async with running(dialect=dialect) as server:
        _, found = await server.post("/detokenize", {"tokens": ids})
        refused, _ = await server.post("/detokenize", {"tokens": [-1]})
    assert found == {key: "".join(simulated.TEXT[i] for i in ids)}
    assert refused == 400


async def test_llama_cpp_renders_a_template_and_tokenizes_it() -> None:
    messages = [{"role": "user", "content": "Hello there"}]
    async with running(dialect="llamacpp") as server:
        _, rendered = await server.post("/apply-template", {"messages": messages})
        _, found = await server.post("/tokenize", {"content": rendered["prompt"]})
        status, answer = await server.post(
            "/completion", {"prompt": found["tokens"], "n_predict": 4}
        )
    assert found["tokens"] == simulated.encode("user\nHello there\nassistant\n")
    assert (status, answer["tokens_predicted"]) == (200, 4)
