"""What is at a URL: asked of small servers that answer as engines do, and as engines fail."""

from __future__ import annotations

import json
import resource
from array import array
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from loadgen import preflight
from loadgen.errors import UserError
from loadgen.types import Engine, Message, Prompt, ServerConfig, ServerFacts, SpecConfig
from servers import llamacpp, openai, sglang, vllm
from tests.records import SERVER, prompts

ENGINES: Mapping[str, Engine] = {
    e.name: e for e in (vllm.ENGINE, sglang.ENGINE, llamacpp.ENGINE, openai.ENGINE)
}
HELLO = (Message(role="user", content="hi"),)
MODELS = {"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 2048}]}
Answer = Callable[[Any], Any]


def stream(*events: object) -> str:
    return "".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n"


def completion(body: Any) -> str:
    """vLLM's way: ids in chunks, a final usage."""
    count = len(body["prompt"])
    return stream(
        {"choices": [{"text": "a", "token_ids": [5]}]},
        {"choices": [{"text": "bc", "token_ids": [6, 7], "finish_reason": "length"}]},
        {"choices": [], "usage": {"prompt_tokens": count, "completion_tokens": 3}},
    )


@asynccontextmanager
async def server(**routes: object) -> AsyncIterator[str]:
    """`GET__v1_models={…}`: JSON, text, (status, text), or a function of the request's body."""

    async def handle(request: web.Request) -> web.Response:
        answer = routes.get(request.method + request.path.replace("/", "_"), (404, "not here"))
        if callable(answer):
            answer = answer(json.loads(await request.text()))
        if isinstance(answer, tuple):
            return web.Response(status=answer[0], text=answer[1])
        if isinstance(answer, str):
            return web.Response(text=answer)
        return web.json_response(answer)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    async with TestServer(app) as running:
        yield str(running.make_url("")).rstrip("/")


@pytest.mark.parametrize(
    ("given", "root"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://h:1/v1", "http://h:1"),
        ("http://h:1/v1/", "http://h:1"),
        ("https://h/v1/chat/completions", "https://h"),
        ("http://h/v1/completions", "http://h"),
        ("http://h/proxy/v1", "http://h/proxy"),
        ("http://h/", "http://h"),
        ("http://h?x=1#y", "http://h"),
    ],
)
def test_a_url_with_or_without_v1(given: str, root: str) -> None:
    assert preflight.base_url(given) == root


@pytest.mark.parametrize("given", ["", "http://", "ftp://h", "/v1"])
def test_what_is_no_url(given: str) -> None:
    with pytest.raises(UserError, match="no server's URL"):
        preflight.base_url(given)


def test_a_password_is_not_written_down() -> None:
    assert preflight.without_secrets("http://me:secret@h:1/x") == "http://h:1/x"


async def test_vllm_is_found_by_asking() -> None:
    page = 'vllm:spec_decode_num_drafts_total{engine="0"} 0\n' + "".join(
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="{j}"}} 0\n'
        for j in range(3)
    )
    async with server(
        GET_v1_models=MODELS, GET_version={"version": "0.32.0"}, GET_metrics=page
    ) as url:
        target = await preflight.identify(url + "/v1", ENGINES)
    info = target.info
    assert (info.engine, info.model, info.version, info.max_model_len) == (
        "vllm", "m", "0.32.0", 2048,
    )  # fmt: skip
    assert (info.state, info.draft_depth) == ("on", 3)
    assert target.metrics_url == url + "/metrics"
    assert target.caveats == ()


async def test_llamacpp_is_found_by_asking() -> None:
    models = {"data": [{"id": "smol", "owned_by": "llamacpp", "meta": {"n_ctx": 2048}}]}
    slots = [{"id": i, "n_ctx": 2048, "speculative": True} for i in range(8)]
    async with server(GET_v1_models=models, GET_slots=slots, GET_metrics="x 1\n") as url:
        target = await preflight.identify(url, ENGINES)
    assert (target.info.engine, target.info.max_running) == ("llamacpp", 8)
    assert target.info.state == "on"


async def test_anything_else_is_openai_and_a_missing_page_is_said() -> None:
    models = {"data": [{"id": "m", "owned_by": "somebody"}]}
    async with server(GET_v1_models=models) as url:
        target = await preflight.identify(url, ENGINES)
        assert (target.info.engine, target.metrics_url, target.caveats) == ("openai", None, ())
        target = await preflight.identify(url, ENGINES, engine="vllm")
    assert [c.code for c in target.caveats] == ["no-metrics-page"]


async def test_what_was_launched_is_known() -> None:
    spec = SpecConfig(method="ngram", draft_depth=3)
    async with server(GET_v1_models=MODELS) as url:
        off = await preflight.identify(
            url, ENGINES, config=ServerConfig(engine="vllm", model="/x/m")
        )
        on = await preflight.identify(
            url, ENGINES, config=ServerConfig(engine="vllm", model="/x/m", spec=spec)
        )
    assert (off.info.state, off.info.draft_depth) == ("off", None)
    assert (on.info.state, on.info.draft_depth) == ("on", 3)


EAGLE = ServerConfig(engine="vllm", model="m", spec=SpecConfig(method="eagle3", draft_depth=3))
NONE = ServerConfig(engine="vllm", model="m")


@pytest.mark.parametrize(
    ("facts", "config", "said"),
    [
        (ServerFacts(state="on", draft_depth=5), EAGLE, "the config says k = 3, the server k = 5"),
        (ServerFacts(state="off"), EAGLE, "the config says eagle3, the server it is off"),
        (
            ServerFacts(state="on", spec_reported="NGRAM"),
            NONE,
            "the config says none, the server NGRAM",
        ),
        (ServerFacts(state="on", draft_depth=3), EAGLE, ""),
        (ServerFacts(state="unknown"), EAGLE, ""),
        (ServerFacts(state="off"), NONE, ""),
        (ServerFacts(state="on"), None, ""),
    ],
)
def test_speculation_is_checked_against_what_was_claimed(
    facts: ServerFacts, config: ServerConfig | None, said: str
) -> None:
    found = preflight.not_as_claimed(facts, config)
    assert [c.code for c in found] == (["spec-not-as-claimed"] if said else [])
    assert all(said in c.message for c in found)


TWO = {"data": [{"id": "small"}, {"id": "large"}]}


@pytest.mark.parametrize(
    ("routes", "options", "said"),
    [
        ({"GET_v1_models": (503, "loading")}, {}, "still loading"),
        ({"GET_v1_models": (401, "")}, {}, "OPENAI_API_KEY"),
        ({"GET_v1_models": (500, "<html>")}, {}, "HTTP 500 and no list of models"),
        ({"GET_v1_models": "<html>"}, {}, "no list of models"),
        ({"GET_v1_models": {"data": []}}, {}, "no list of models"),
        ({"GET_v1_models": [1]}, {}, "no list of models"),
        ({}, {}, "HTTP 404 and no list of models"),
        ({"GET_v1_models": TWO}, {}, "has 2 models: small, large. Say which with --model"),
        ({"GET_v1_models": TWO}, {"model": "smal"}, "did you mean 'small'"),
        ({"GET_v1_models": MODELS}, {"engine": "vlm"}, "did you mean 'vllm'"),
    ],
)
async def test_what_is_wrong_is_one_paragraph(
    routes: dict[str, object], options: dict[str, str], said: str
) -> None:
    async with server(**routes) as url:
        with pytest.raises(UserError) as fault:
            await preflight.identify(url, ENGINES, **options)  # type: ignore[arg-type]  # table
    assert said in str(fault.value)
    assert "\n" not in str(fault.value)


async def test_a_list_of_models_that_arrives_in_pieces_is_read_whole() -> None:
    many = {"data": [{"id": f"model-{i}", "owned_by": "vllm"} for i in range(40_000)]}
    async with server(GET_v1_models=many) as url:
        target = await preflight.identify(url, ENGINES, model="model-39999")
    assert target.info.model == "model-39999"


async def test_no_server() -> None:
    with pytest.raises(UserError, match="no server answers"):
        await preflight.identify("http://127.0.0.1:1", ENGINES)


# ── tokenizer ────────────────────────────────────────────────────────────────────────────────────


async def target_of(url: str) -> preflight.Target:
    return await preflight.identify(url, ENGINES, engine="vllm")


async def test_both_dialects_of_a_servers_tokenizer() -> None:
    def vllm_ids(body: Any) -> object:
        assert body["add_generation_prompt"] is True
        return {"tokens": [1, 2, 3]}

    def llama_ids(body: Any) -> object:
        if "content" not in body:
            return {"tokens": []}
        assert (body["add_special"], body["parse_special"]) == (False, True)
        return {"tokens": [len(body["content"]), 7]}

    def template(body: Any) -> object:
        return {"prompt": "<u>" + body["messages"][0]["content"]}

    async with server(GET_v1_models=MODELS, POST_tokenize=vllm_ids) as url:
        tokenize = await preflight.tokenizer(await target_of(url), None)
        assert await tokenize(HELLO) == array("I", [1, 2, 3])
    async with server(
        GET_v1_models=MODELS, POST_tokenize=llama_ids, **{"POST_apply-template": template}
    ) as url:
        tokenize = await preflight.tokenizer(await target_of(url), None)
        assert await tokenize(HELLO) == array("I", [5, 7])
        asked = (*prompts(1), msgspec.structs.replace(
            prompts(2)[1], prompt_token_ids=None, messages=HELLO))  # fmt: skip
        ready = await preflight.tokenized(asked, tokenize)
        assert ready[0] == asked[0], "ids that were given are left alone"
        assert ready[1].prompt_token_ids == array("I", [5, 7])


async def test_what_ids_say_in_both_dialects_and_in_none() -> None:
    asked = tuple(
        Prompt(prompt_id=f"p{n}", category="random", prompt_token_ids=array("I", [n, n + 1]))
        for n in range(3)
    )

    def vllm_text(body: Any) -> object:
        assert body["model"] == "m"
        return {"prompt": f"says {body['tokens']}"}

    def llama_text(body: Any) -> object:
        return {"content": f"says {body['tokens']}"}

    for dialect in (vllm_text, llama_text):
        async with server(GET_v1_models=MODELS, POST_detokenize=dialect) as url:
            told = await preflight.with_texts(await target_of(url), None, asked)
        assert [p.text for p in told] == ["says [0, 1]", "says [1, 2]", "says [2, 3]"]
    for routes in ({}, {"POST_detokenize": {"error": "no"}}, {"POST_detokenize": ["what"]}):
        async with server(GET_v1_models=MODELS, **routes) as url:
            assert await preflight.with_texts(await target_of(url), None, asked) == asked


async def test_no_tokenizer_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise UserError(f"no tokenizer at '{name}'.")

    monkeypatch.setattr(preflight, "local_tokenizer", missing)
    async with server(GET_v1_models=MODELS, POST_tokenize={"tokens": "no"}) as url:
        with pytest.raises(UserError, match="no tokenizer for 'm'"):
            await preflight.tokenizer(await target_of(url), None)


# ── probe ────────────────────────────────────────────────────────────────────────────────────────

IDS = array("I", [1, 2, 3, 4])


async def probed(answer: object, ids: array[int] | None = IDS) -> preflight.Target:
    async with server(GET_v1_models=MODELS, POST_v1_completions=answer) as url:
        return await preflight.probe(await target_of(url), ids)


async def test_what_it_honours() -> None:
    honours = (await probed(completion)).info.honours
    assert honours.token_id_prompts
    assert honours.ids_in_chunks
    assert not honours.per_request_acceptance
    assert not honours.chunk_timings


def whole(body: Any) -> str:
    """SGLang's /generate: the answer so far, and figures at its end."""
    count = len(body["input_ids"])
    meta = {"prompt_tokens": count, "completion_tokens": 3, "finish_reason": {"type": "length"}}
    return stream(
        {"output_ids": [5], "meta_info": {"prompt_tokens": count, "completion_tokens": 1}},
        {"output_ids": [5, 6, 7], "meta_info": meta | {"spec_verify_ct": 1}},
    )


def counted(body: Any) -> str:
    """Usage in chunks, no ids: /v1/completions of an older SGLang."""
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 3}
    return stream({"choices": [{"text": "a", "finish_reason": "length"}], "usage": usage})


def extended(body: Any) -> str:
    """/v1/completions of SGLang 0.5.23: ids in chunks, figures before the end."""
    figures = {"choices": [], "sglext": {"spec_tokens_details": {"spec_verify_ct": 1}}}
    return completion(body).removesuffix("data: [DONE]\n\n") + stream(figures)


@pytest.mark.parametrize(
    ("completions", "generate", "algorithm", "wire"),
    [
        (counted, whole, "EAGLE3", "generate"),
        (completion, whole, "EAGLE3", "generate"),
        (completion, whole, None, None),  # off: there is no acceptance to tell
        (extended, whole, "EAGLE3", None),
        (counted, (404, "not here"), "EAGLE3", None),
        (counted, "nonsense", "EAGLE3", None),
    ],
)
async def test_a_second_wire_is_taken_where_it_tells_more(
    completions: object, generate: object, algorithm: str | None, wire: str | None
) -> None:
    models = {"data": [{"id": "m", "owned_by": "sglang", "max_model_len": 2048}]}
    routes = {"GET_v1_models": models, "POST_v1_completions": completions}
    info = {"speculative_algorithm": algorithm}
    async with server(**routes, POST_generate=generate, GET_server_info=info) as url:
        target = await preflight.probe(await preflight.identify(url, ENGINES), IDS)
    assert target.info.engine == "sglang"
    assert target.info.honours.wire == wire
    assert target.wire.path == ("/generate" if wire else "/v1/completions")


async def test_ids_that_are_templated_again_are_refused() -> None:
    with pytest.raises(UserError, match="counted 9 prompt tokens where 4 ids were sent"):
        await probed(
            stream(
                {"choices": [{"text": "a", "finish_reason": "stop"}]},
                {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 1}},
            )
        )


async def test_chunks_that_do_not_count_are_a_caveat() -> None:
    target = await probed(
        stream(
            {"choices": [{"text": "a", "finish_reason": "stop"}]},
            {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 1}},
        )
    )
    assert "chunk-tokens-unknown" in [c.code for c in target.caveats]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((400, '{"error":{"message":"extra field"}}'), "HTTP 400: extra field"),
        ((404, "nope"), "HTTP 404"),
        ("plain text", "did not complete"),
        (stream({"error": {"message": "out of memory"}}), "out of memory"),
    ],
)
async def test_a_probe_that_fails_is_the_users_error(answer: object, said: str) -> None:
    with pytest.raises(UserError) as fault:
        await probed(answer)
    assert said in str(fault.value)


# ── limits ───────────────────────────────────────────────────────────────────────────────────────


def test_prompts_that_do_not_fit_are_counted_before_the_run() -> None:
    info = msgspec.structs.replace(SERVER, max_model_len=40)
    preflight.check_fit(prompts(3, length=16), info, 24)
    with pytest.raises(UserError, match="3 of 3 prompts do not fit"):
        preflight.check_fit(prompts(3, length=16), info, 25)
    preflight.check_fit(prompts(3), SERVER, 10**6)


def test_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"soft": 100, "hard": 1000}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits["soft"], limits["hard"]))

    def set_soft(kind: int, pair: tuple[int, int]) -> None:
        limits["soft"] = pair[0]

    monkeypatch.setattr(resource, "setrlimit", set_soft)
    preflight.check_descriptors(512)
    assert limits["soft"] == 512 + preflight.SPARE_DESCRIPTORS
    with pytest.raises(UserError, match="ulimit -n"):
        preflight.check_descriptors(5000)
