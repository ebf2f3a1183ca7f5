"""An engine without a GPU: what servers/simulated.py simulates, over HTTP, in four dialects.

One loop plays one step of the whole batch after the other: one timer a step, whatever the number of
streams, and each stream's event is written where the step ends. `/truth` tells what was to happen
and what did, to hold a client's figures against. All it serves says "simulated". `--time-scale N`
multiplies every time: 2 plays twice as slowly as the hardware it stands for, 0.5 twice as fast.
Must not: pass for a measurement of any engine.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import sys
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import count
from typing import Any, get_args

import msgspec
from aiohttp import web

from loadgen.errors import UserError, nearest
from loadgen.types import U32, ServerConfig, ServerFacts
from loadgen.written import chain_depth, flags, known_method, known_options
from servers import vllm
from servers.dialects import DIALECTS, DONE, Ask, Reply, error, sse
from servers.pages import OWNED_BY
from servers.simulated import (
    BOS,
    EOS,
    MODELS,
    NAMES,
    PREFIX,
    TEXT,
    Answer,
    Batch,
    Dialect,
    Settings,
    encode,
    preset,
)


class Gone(Exception):
    """The loop is over, and with it every open request."""


class Loop:
    """The batch in real time. `now` and `sleep` are the clock; `numbers` names requests."""

    def __init__(self, settings: Settings) -> None:
        self.batch = Batch(settings)
        self.now: Callable[[], float] = time.perf_counter
        self.sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
        self.numbers = count(1)
        self.died = ""  # why the loop is over
        self._open: dict[Answer, asyncio.Future[None]] = {}
        self._work = asyncio.Event()

    async def answered(self, answer: Answer, emit: Callable[[int], None]) -> None:
        """Queue a request and wait for its end; `emit` gets the tokens sent so far after each step.
        Gone: the loop is over. ConnectionError: as `emit` raises it."""
        done = self._open[answer] = asyncio.get_running_loop().create_future()

        def each(end: int) -> None:
            try:
                emit(end)
            except ConnectionError as fault:
                self.batch.leave(answer)
                if not done.done():
                    done.set_exception(fault)
            if answer.ended and not done.done():
                done.set_result(None)

        answer.emit, answer.asked_at = each, self.now()
        self.batch.waiting[answer] = None
        self._work.set()
        try:
            await done
        finally:  # ended, or its client is gone
            del self._open[answer]
            self.batch.leave(answer)

    def over(self, task: asyncio.Task[None]) -> None:
        """The loop has ended: so do the open requests, which would wait for ever."""
        if not task.cancelled():
            fault = task.exception()
            self.died = f"The simulated engine is gone: {fault!r}"
            task.get_loop().call_exception_handler({"message": self.died, "exception": fault})
            for done in self._open.values():
                if not done.done():
                    done.set_exception(Gone(self.died))

    async def run(self) -> None:
        """Until cancelled. A step that was late does not make the next one late, unless the
        machine is a whole step behind: then what was missed is missed."""
        due, batch = self.now(), self.batch
        while True:
            if not (batch.waiting or batch.running):
                self._work.clear()
                await self._work.wait()
                due = self.now()
            step_s = batch.plan()
            due += step_s
            await self.sleep(max(due - self.now(), 0.0))
            now = self.now()
            if now - due > step_s:
                due = now
            batch.finish(now)


# ── the API ──────────────────────────────────────────────────────────────────────────────────────

LOOP = web.AppKey("loop", Loop)
_STATUS: dict[str, type[web.HTTPException]] = {"NotFoundError": web.HTTPNotFound}
_STATUS["InternalServerError"] = web.HTTPInternalServerError


def refusal(
    batch: Batch, message: str, param: str = "", kind: str = "BadRequestError"
) -> web.HTTPException:
    """An HTTP error in the dialect's shape; `kind` and `param` as vLLM 0.32 names them."""
    of = _STATUS.get(kind, web.HTTPBadRequest)
    said = error(batch.settings.dialect, message, kind, param, of.status_code)
    return of(text=msgspec.json.encode(said).decode(), content_type="application/json")


async def _asked(request: web.Request, batch: Batch) -> Ask:
    """The body. HTTPException: not valid, or not for this server."""
    dialect, data = batch.settings.dialect, await request.read()
    try:
        ask = msgspec.json.decode(data, type=Ask)
        given = set(msgspec.json.decode(data)) if dialect == "trtllm" else set()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise refusal(batch, f"1 validation error:\n  {fault}", "body", "Bad Request") from None
    said: str | list[Any] = [
        {"type": "extra_forbidden", "loc": ("body", name), "msg": "Extra inputs are not permitted"}
        for name in sorted(given - DIALECTS[dialect].known)
        if request.path != "/tokenize"
    ]
    if dialect == "trtllm" and ask.stream_options is not None and not ask.stream:
        said = "stream_options can only be set when stream is true"
    if said:
        raise refusal(batch, str(said), kind="Bad Request")
    if dialect == "vllm" and ask.model not in (None, batch.model):
        raise refusal(batch, f"The model `{ask.model}` does not exist.", "model", "NotFoundError")
    if ask.n != 1:
        raise refusal(batch, f"The simulator answers once a request, got n={ask.n}", "n")
    return ask


def _prompt_ids(batch: Batch, ask: Ask, api: str) -> U32:
    """The prompt as ids. HTTPException: none, or not valid."""
    prompt = ask.input_ids if api == "generate" else ask.prompt
    if api == "chat":
        if not ask.messages:
            raise refusal(batch, "You must pass at least one message", "messages")
        prompt = [BOS]
        for message in ask.messages:
            prompt += [*encode(f"{message.role}\n{message.content}"), EOS]
        prompt += encode("assistant\n")
    elif isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise refusal(batch, "The simulator takes one prompt a request", "prompt")
        prompt = prompt[0]
    if not prompt:
        raise refusal(batch, "'prompt' must not be empty.")
    if isinstance(prompt, str):
        prompt = [BOS, *encode(prompt)]
    try:
        ids = array("I", prompt)
    except (TypeError, OverflowError) as fault:
        said = f"1 validation error:\n  {fault}"
        raise refusal(batch, said, "body.prompt", "Bad Request") from None
    if max(ids) >= 1 << 18:  # below, a prompt in a real model's ids is as good as one in ours
        raise refusal(batch, f"Token id {max(ids)} is out of vocabulary")
    return ids


def _answer(batch: Batch, ask: Ask, api: str, prompt: U32) -> Answer:
    """The answer to a body. HTTPException: it does not fit."""
    speech, context, isl = DIALECTS[batch.settings.dialect], batch.max_model_len, len(prompt)
    if isl >= context:
        said = f"The context length is {context} tokens, the input {isl}."
        raise refusal(batch, said, "input_tokens")
    params, limit = ask.sampling_params, ask.max_tokens
    if api == "generate":
        limit = params.get("max_new_tokens", 128)
    elif limit is None:
        limit = speech.default_max_tokens if ask.n_predict is None else ask.n_predict
        limit = context if limit is None or api == "chat" else limit
    if not isinstance(limit, int) or limit < 1:
        raise refusal(batch, f"max_tokens must be at least 1, got {limit}.", "max_tokens")
    if isl + limit > context and not speech.cuts:
        said = "Requested token count exceeds the model's maximum context length"
        raise refusal(batch, f"{said} of {context} tokens.", "input_tokens")
    return Answer(
        batch,
        prompt,
        limit=min(limit, context - isl),  # silently, as vLLM 0.32 and llama.cpp b11434 do
        ignore_eos=ask.ignore_eos or bool(params.get("ignore_eos")),
        temperature=float(params.get("temperature", ask.temperature)),
    )


async def generate(request: web.Request) -> web.StreamResponse:
    """POST to an API that answers."""
    loop = request.app[LOOP]
    batch, speech = loop.batch, DIALECTS[loop.batch.settings.dialect]
    api = speech.posts[request.path]
    ask = await _asked(request, batch)
    prompt = _prompt_ids(batch, ask, api)
    if loop.died:
        raise refusal(batch, loop.died, kind="InternalServerError")
    try:
        answer = _answer(batch, ask, api, prompt)
    except web.HTTPException as fault:
        if not (ask.stream and api == "generate"):
            raise
        # Its stream has begun by then (SGLang 0.5.23).
        return web.Response(text=f"data: {fault.text}\n\n{DONE.decode()}", content_type=SSE)
    reply = speech.reply(ask, answer, next(loop.numbers), api)
    if ask.stream:
        return await _stream(request, answer, reply)
    try:
        await loop.answered(answer, lambda end: None)
    except Gone as fault:
        raise refusal(batch, str(fault), kind="InternalServerError") from None
    return web.json_response(reply.whole())


SSE = "text/event-stream"


async def _stream(request: web.Request, answer: Answer, reply: Reply) -> web.StreamResponse:
    """Events go past aiohttp's writer to the socket, from the loop: a stream costs no task switch
    a step. The framing is the chunked coding that `prepare` announced."""
    loop = request.app[LOOP]
    response = web.StreamResponse(headers={"Content-Type": f"{SSE}; charset=utf-8"})
    response.enable_chunked_encoding()
    await response.prepare(request)
    begin = 0

    def emit(end: int) -> None:
        nonlocal begin
        transport, events = request.transport, reply.events(begin, end)
        begin = end
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        data = sse(events)
        transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    try:
        await loop.answered(answer, emit)
    except Gone as fault:
        said = refusal(loop.batch, str(fault), kind="InternalServerError").text
        await response.write(f"data: {said}\n\n".encode() + DONE)
    return response


async def tokenize(request: web.Request) -> web.Response:
    """POST /tokenize, in vLLM's shape, or in llama.cpp's of a text. SGLang's and TensorRT-LLM's
    have none such: here it makes up for a tokenizer that nobody could download."""
    batch = request.app[LOOP].batch
    ask = await _asked(request, batch)
    if ask.content is not None:
        return web.json_response({"tokens": encode(ask.content)})
    ids = _prompt_ids(batch, ask, "chat" if ask.messages is not None else "").tolist()
    told = {"count": len(ids), "max_model_len": batch.max_model_len, "tokens": ids}
    return web.json_response(told | {"token_strs": None})


async def detokenize(request: web.Request) -> web.Response:
    """POST /detokenize: ids → what they say, in vLLM's shape or llama.cpp's."""
    batch = request.app[LOOP].batch
    ids = (await _asked(request, batch)).tokens or []
    if not all(0 <= i < len(TEXT) for i in ids):
        raise refusal(batch, "a token id is not of the vocabulary", "tokens")
    key = "content" if batch.settings.dialect == "llamacpp" else "prompt"
    return web.json_response({key: "".join(TEXT[i] for i in ids)})


async def template(request: web.Request) -> web.Response:
    """POST /apply-template, llama.cpp's: messages → a text that it tokenizes without more ado."""
    ask = await _asked(request, request.app[LOOP].batch)
    said = [f"{m.role}\n{m.content}\n" for m in ask.messages or ()]
    return web.json_response({"prompt": "".join(said) + "assistant\n"})


async def page(request: web.Request) -> web.Response:
    """GET one of the dialect's pages, or /truth."""
    batch = request.app[LOOP].batch
    if request.path == "/truth":
        return web.json_response(batch.truth())
    found = DIALECTS[batch.settings.dialect].pages[request.path](batch)
    return web.Response(text=found) if isinstance(found, str) else web.json_response(found)


# ── as a process, and as an engine to load ───────────────────────────────────────────────────────


def app(settings: Settings) -> web.Application:
    """The simulated server, ready to run. Its Loop is `app[LOOP]`."""
    found = web.Application(client_max_size=64 << 20)
    loop = found[LOOP] = Loop(settings)

    async def play(_: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(loop.run())
        task.add_done_callback(loop.over)
        yield
        task.cancel()
        await asyncio.wait([task])

    found.cleanup_ctx.append(play)
    others = {"tokenize": tokenize, "detokenize": detokenize, "template": template}
    for path, api in DIALECTS[settings.dialect].posts.items():
        found.router.add_post(path, others.get(api, generate))
    for path in ("/truth", *DIALECTS[settings.dialect].pages):
        found.router.add_get(path, page)
    return found


def parsed(argv: Sequence[str] | None = None) -> tuple[str, int, Settings]:
    """Host, port and settings of a command line: a flag for every number in Settings. Unless it
    names its `start`, each has run-level noise of its own, as on a machine."""
    parser = argparse.ArgumentParser("servers.simulator", argument_default=argparse.SUPPRESS)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", choices=tuple(MODELS))
    parser.add_argument("--dialect", choices=get_args(Dialect))
    parser.add_argument("--spec", default="none", choices=("none", *NAMES))
    for setting in fields(Settings):
        flag = f"--{setting.name.replace('_', '-')}"
        if type(setting.default) in (int, float):
            parser.add_argument(flag, type=type(setting.default))
        elif setting.default is False:
            parser.add_argument(flag, action="store_true")
    given = {"start": time.time_ns()} | vars(parser.parse_args(argv))
    return given.pop("host"), given.pop("port"), preset(given.pop("spec"), **given)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -P -m servers.simulator`: serve until SIGTERM or Ctrl-C."""
    import uvloop

    host, port, settings = parsed(argv)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # a stream is a descriptor
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if 0 <= hard < 1 << 16 else 1 << 16, hard))
    options: dict[str, Any] = {"access_log": None, "backlog": 4096, "shutdown_timeout": 1.0}
    options |= {"handler_cancellation": True, "loop": uvloop.new_event_loop()}
    web.run_app(app(settings), host=host, port=port, **options)


def command(config: ServerConfig, port: int) -> list[str]:
    """argv of the simulator. UserError: a model or a setting that it does not have."""
    models = {PREFIX + name: name for name in MODELS}
    if config.model not in models:
        hint, known = nearest(config.model, models) or ".", ", ".join(models)
        raise UserError(f"the simulator has no model '{config.model}'{hint} Known: {known}.")
    told: dict[str, Any] = {"--port": port, "--model": models[config.model], "--spec": "none"}
    told["--host"] = config.host
    if config.spec is not None:
        told["--spec"] = known_method(config.spec, tuple(NAMES), "simulated")
        told["--draft-depth"] = chain_depth(config.spec, "simulated")
        options = known_options(config.spec, frozenset({"coverage"}), "simulated")
        told |= {f"--{name}": value for name, value in options.items()}
    told |= {"--max-running": config.max_running, "--max-model-len": config.max_model_len}
    prefix = config.executable or (sys.executable,)
    return [*prefix, "-P", "-m", "servers.simulator", *flags(told), *config.extra_args]


def describe(pages: Mapping[str, Any], _: Mapping[str, float]) -> ServerFacts:
    """What the simulator's own page tells, and that it is one."""
    page = pages.get("/truth")
    known = page if isinstance(page, dict) else {}
    try:
        return msgspec.convert({**known, "simulated": True}, ServerFacts)
    except msgspec.ValidationError:
        return ServerFacts(simulated=True)


ENGINE = replace(
    vllm.ENGINE,
    name="simulated",
    owned_by=(OWNED_BY["vllm"],),
    describe_paths=("/truth",),
    describe=describe,
    methods=tuple(NAMES),
    command=command,
    help=lambda config: [],  # of our own version
    verified="simulated: no engine, its figures follow from its settings",
)

if __name__ == "__main__":
    main()
