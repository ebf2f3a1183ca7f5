"""What is at a URL: asked of small servers that answer as engines do, and as engines fail."""

from __future__ import annotations

import asyncio
import json
import resource
import threading
import unicodedata
from array import array
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from loadgen import preflight, tokens
from loadgen.errors import UserError
from loadgen.tokens import LocalTokenizer
from loadgen.types import Engine, Message, Prompt, ServerConfig, ServerFacts, SpecConfig, Templating
from servers import llamacpp, openai, sglang, vllm
from tests.records import SERVER, prompts
from tests.test_tokens import TEMPLATE, folder

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
    models = {
        "data": [{"id": "smol", "owned_by": "llamacpp", "meta": {"n_ctx": 2048, "n_vocab": 49152}}]
    }
    slots = [{"id": i, "n_ctx": 2048, "speculative": True} for i in range(8)]
    async with server(GET_v1_models=models, GET_slots=slots, GET_metrics="x 1\n") as url:
        target = await preflight.identify(url, ENGINES)
    assert (target.info.engine, target.info.max_running) == ("llamacpp", 8)
    assert (target.info.state, target.info.vocabulary) == ("on", 49152)


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


async def test_no_tokenizer_anywhere(tmp_path: Path) -> None:
    missing = MODELS | {"data": [{"id": str(tmp_path), "owned_by": "vllm"}]}
    async with server(GET_v1_models=missing, POST_tokenize={"tokens": "no"}) as url:
        with pytest.raises(UserError, match=r"no tokenizer for .*: the server has no /tokenize"):
            await preflight.tokenizer(await target_of(url), None)


@pytest.mark.parametrize(
    ("templating", "sent"),
    [
        (Templating(args={"x": 1}), {"chat_template_kwargs": {"x": 1}}),
        (Templating(), {"chat_template_kwargs": None}),
        (Templating(apply=False), {"prompt": "hi", "add_special_tokens": False}),
    ],
)
async def test_templating_is_the_servers_where_the_server_tokenizes(
    templating: Templating, sent: dict[str, object]
) -> None:
    seen: list[dict[str, Any]] = []

    def ids(body: Any) -> object:
        seen.append(body)
        return {"tokens": [1, 2]}

    def text(body: Any) -> object:
        seen.append(body)
        return {"prompt": "<u>hi"}

    async with server(GET_v1_models=MODELS, POST_tokenize=ids) as url:
        await (await preflight.tokenizer(await target_of(url), None, templating))(HELLO)
    assert {key: seen[-1].get(key) for key in sent} == sent
    assert ("messages" in seen[-1]) == templating.apply

    def llama_ids(body: Any) -> object:
        seen.append(body)
        return {"tokens": [1, 2] if "content" in body else []}

    seen.clear()
    async with server(
        GET_v1_models=MODELS, POST_tokenize=llama_ids, **{"POST_apply-template": text}
    ) as url:
        await (await preflight.tokenizer(await target_of(url), None, templating))(HELLO)
    assert seen[-1]["content"] == ("<u>hi" if templating.apply else "hi")
    if templating.apply:
        assert seen[-2].get("chat_template_kwargs") == sent["chat_template_kwargs"]


def reads(ids: list[int]) -> Callable[[Any], Any]:
    """vLLM's /tokenize of a text."""
    return lambda body: {"tokens": ids if "prompt" in body else [1, 2, 3]}


def counts(tokens: int) -> dict[str, object]:
    """A completion of a text, without a /tokenize."""
    return {"choices": [{"text": "a"}], "usage": {"prompt_tokens": tokens}}


@pytest.mark.parametrize(
    ("name", "answer", "known"),
    [
        ("POST_tokenize", lambda ours: reads(ours), True),
        ("POST_tokenize", lambda ours: reads([*ours[:-1], 7]), False),
        ("POST_v1_completions", lambda ours: counts(len(ours)), True),
        ("POST_v1_completions", lambda ours: counts(len(ours) + 1), True),
        ("POST_v1_completions", lambda ours: counts(len(ours) - 1), False),
        ("POST_v1_completions", lambda ours: {"choices": []}, None),
        ("POST_nothing", lambda ours: {}, None),
    ],
)
async def test_a_local_tokenizer_must_be_the_served_models(
    tmp_path: Path, name: str, answer: Callable[[list[int]], object], known: bool | None
) -> None:
    path = folder(tmp_path / "model", chat_template=TEMPLATE)
    ours = LocalTokenizer(path).plain(preflight.READ).tolist()
    async with server(GET_v1_models=MODELS, **{name: answer(ours)}) as url:
        target = await target_of(url)
        if known is False:
            with pytest.raises(UserError, match="is not that of 'm'"):
                await preflight.tokenizer(target, path)
        else:
            tokenize = await preflight.tokenizer(target, path)
            codes = [c.code for c in preflight.unchecked(tokenize)]
            assert codes == ([] if known else ["tokenizer-unchecked"])
        forced = await preflight.tokenizer(target, path, check=False)
        assert [c.code for c in preflight.unchecked(forced)] == ["tokenizer-unchecked"]


def test_the_text_that_tells_tokenizers_apart_has_several_scripts() -> None:
    scripts = {unicodedata.name(c).split()[0] for c in preflight.READ if c.isalpha()}
    assert scripts == {"LATIN", "CYRILLIC", "CJK"}


async def test_a_local_tokenizer_gives_all_prompts_at_once_and_says_how_far_it_is(
    tmp_path: Path,
) -> None:
    path = folder(tmp_path / "model", chat_template=TEMPLATE)
    local = preflight.Local(LocalTokenizer(path))
    asked = (
        *prompts(1),
        *(Prompt(prompt_id=f"t{n}", category="c", messages=HELLO * n) for n in (1, 2)),
    )
    told: list[int] = []
    ready = await preflight.tokenized(asked, local, told.append)
    assert ready[0] == asked[0], "ids that were given are left alone"
    assert [p.prompt_token_ids for p in ready[1:]] == [await local(HELLO), await local(HELLO * 2)]
    assert told[-1] == 2


async def test_ctrl_c_ends_the_thread_that_tokenizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 1)
    local = preflight.Local(LocalTokenizer(folder(tmp_path / "model", chat_template=TEMPLATE)))
    asked = [Prompt(prompt_id=f"t{n}", category="c", messages=HELLO) for n in range(5)]
    loop, ended, told = asyncio.get_running_loop(), threading.Event(), list[int]()

    def done(count: int) -> None:
        told.append(count)
        loop.call_soon_threadsafe(task.cancel)
        assert ended.wait(30)

    task = asyncio.create_task(preflight.tokenized(asked, local, done))
    with pytest.raises(asyncio.CancelledError):
        await task
    ended.set()
    await loop.shutdown_default_executor()
    assert told == [0]


async def test_a_prompt_of_no_tokens_is_refused(tmp_path: Path) -> None:
    raw = LocalTokenizer(folder(tmp_path / "model"), Templating(apply=False))
    nothing = Prompt(
        prompt_id="void", category="c", messages=(Message(role="user", content=" \n"),)
    )
    with pytest.raises(UserError, match="prompt void has no tokens"):
        await preflight.tokenized((nothing,), preflight.Local(raw))
    with pytest.raises(UserError, match="no prompt has a token"):
        preflight.probe_ids((nothing,))


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


async def test_what_a_server_tells_only_after_a_request_is_asked_again() -> None:
    """llama.cpp names the kind of its speculation in a slot that has had a request."""
    slot: dict[str, object] = {"id": 0, "n_ctx": 64, "speculative": True}

    def answered(body: Any) -> str:
        slot["params"] = {"speculative.types": "ngram-simple"}
        return completion(body)

    models = {"data": [{"id": "m", "owned_by": "llamacpp"}]}
    async with server(
        GET_v1_models=models,
        GET_slots=[slot],
        POST_completion=answered,
        POST_v1_completions=answered,
    ) as url:
        target = await preflight.identify(url, ENGINES)
        assert target.info.spec_reported is None
        target = await preflight.probe(target, IDS)
    assert target.info.spec_reported == "ngram-simple"


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
    assert preflight.fitting(prompts(3, length=16), info, 24) == (prompts(3, length=16), ())
    with pytest.raises(UserError, match=r"3 of 3 prompts do not fit: .* up to 41 tokens"):
        preflight.fitting(prompts(3, length=16), info, 25)
    assert preflight.fitting(prompts(3), SERVER, 10**6) == (prompts(3), ())
    assert preflight.fitting((), info, 1) == ((), ())


def test_prompts_that_do_not_fit_are_left_out_when_asked() -> None:
    info = msgspec.structs.replace(SERVER, max_model_len=40)
    short, *long = prompts(3, length=16)
    long = [msgspec.structs.replace(p, max_output_tokens=25, category="rag") for p in long]
    text = Prompt(prompt_id="text", category="c", messages=HELLO)
    kept, (caveat,) = preflight.fitting((long[0], short, text, long[1]), info, 24, skip=True)
    assert kept == (short, text)
    assert caveat.code == "prompts-skipped"
    assert "2 of 4 prompts do not fit" in caveat.message
    assert "(2 rag)" in caveat.message
    with pytest.raises(UserError, match="2 of 2"):
        preflight.fitting(long, info, 24, skip=True)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    asked = prompts(2, length=4)
    greatest = max(max(p.prompt_token_ids or ()) for p in asked)
    preflight.check_vocabulary(asked, SERVER)
    preflight.check_vocabulary(asked, msgspec.structs.replace(SERVER, vocabulary=greatest + 1))
    with pytest.raises(UserError, match=f"holds token id {greatest}"):
        preflight.check_vocabulary(asked, msgspec.structs.replace(SERVER, vocabulary=greatest))
    assert max(preflight.probe_ids(asked)) == greatest, "else the server says it of the probe"
    assert preflight.probe_ids(asked)[0] == (asked[0].prompt_token_ids or array("I"))[-1]


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
