"""An engine without a GPU: batching and acceptance are simulated, the dialect is vLLM's.

One loop advances all running requests one decode step at a time. A step takes base_s + per_token_s
× (tokens verified in it), so the gain of speculation shrinks with the load; draft position j is
accepted with a fixed probability given that j − 1 was, by the category of the built-in prompt whose
token ids the request holds. Answers depend on seed and prompt alone, never on the method:
speculation is lossless here. `/truth` tells what really happened, to hold a client's figures
against. All it serves says "simulated". Must not: pass for a measurement of any engine.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import resource
import sys
import time
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count, product
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from loadgen import __version__
from loadgen.errors import UserError
from loadgen.types import U32, Message, ServerConfig, ServerFacts, SpecConfig
from loadgen.written import chain_depth, known_method, known_options
from servers import vllm

MODEL = "simulated-8b"
OWNER = "draftload-simulator"
VERSION = f"{__version__}-simulated"
BUILTIN = Path(__file__).parent.parent / "scenarios" / "data" / "qualitative.jsonl"
DEFAULT = "default"
_DONE = b"data: [DONE]\n\n"

# Probability that the first draft token is accepted. Made up, ordered as published acceptance by
# category usually is (code and math high, role play low); not measured on anything.
_FIRST = {"coding": 0.82, "math": 0.80, "rag": 0.74, "reasoning": 0.72, "stem": 0.70}
_FIRST |= {"summarization": 0.70, DEFAULT: 0.68, "humanities": 0.68, "qa": 0.66}
_FIRST |= {"writing": 0.62, "multilingual": 0.60, "roleplay": 0.58}
# method → share of _FIRST for the first position, share kept from one position to the next,
# coverage, name on the pages. n-gram: rarely a match, and a good one when there is.
METHODS = {"eagle3": (1.0, 0.94, 1.0, "eagle3"), "ngram": (1.05, 0.97, 0.35, "n-gram")}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is simulated. Times in seconds.

    `conditional[category][j]`: probability that draft position j + 1 is accepted given that j was,
    `draft_depth` of them, with a row "default". `coverage`: probability that a step has a draft.
    `prefill_budget`: prompt tokens that may begin in one step. `mean_output_tokens`: where an
    answer ends by itself. `prompts`: JSONL rows with `category` and `turns`, to tell categories.
    """

    method: str = "none"
    draft_depth: int = 0
    coverage: float = 1.0
    conditional: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: {DEFAULT: ()})
    base_s: float = 0.012
    per_token_s: float = 50e-6
    prefill_s_per_token: float = 20e-6
    prefill_budget: int = 8192
    max_running: int = 256
    max_model_len: int = 8192
    mean_output_tokens: float = 200.0
    seed: int = 0
    per_request_metrics: bool = True
    prompts: Path = BUILTIN

    def step_s(self, tokens: int, prefilled: int = 0) -> float:
        """Time of a step that verifies `tokens` for running requests and prefills `prefilled`."""
        return self.base_s + self.per_token_s * tokens + self.prefill_s_per_token * prefilled


def preset(method: str, draft_depth: int = 3, **changes: Any) -> Settings:
    """Settings of 'none', 'eagle3' or 'ngram', with changes. UserError: another method."""
    if known_method(SpecConfig(method=method), ("none", *METHODS), "simulated") == "none":
        return Settings(**changes)
    first, kept, coverage, _ = METHODS[method]
    k = draft_depth
    rows = {c: tuple(min(p * first, 0.99) * kept**j for j in range(k)) for c, p in _FIRST.items()}
    given: dict[str, Any] = {"coverage": coverage, "conditional": rows} | changes
    return Settings(method=method, draft_depth=k, **given)


BOS, EOS = 1, 2
_BYTE_0, _WORD_0, _WORDS = 3, 1000, 31000
_SYLLABLES = ["".join(pair) for pair in product("bdfgklmn", "aeio")]
_WORD = ["".join(three) for three in product(_SYLLABLES, repeat=3)][:_WORDS]
_TEXT = [""] * _WORD_0 + [" " + word for word in _WORD]  # special ids have none
_WORD_ID = {word: _WORD_0 + n for n, word in enumerate(_WORD)}
_PIECE = re.compile(r" ?([A-Za-z]{2,})|(.)", re.DOTALL)


def encode(text: str) -> list[int]:
    """Text → ids, the same in every process: one a word, else one a UTF-8 byte."""
    ids: list[int] = []
    for word, other in _PIECE.findall(text):
        hashed = _WORD_0 + zlib.crc32(word.encode()) % _WORDS
        ids += [_WORD_ID.get(word, hashed)] if word else [_BYTE_0 + b for b in other.encode()]
    return ids


Tally = Counter[str | int]
"""What really happened, by name; under j: drafted decode steps that accepted j, before the cut at
an answer's end. generated + overrun = requests + steps + accepted."""


def told(tally: Tally, depth: int) -> dict[str, Any]:
    """A tally as `/truth` says it."""
    histogram = [tally[j] for j in range(depth + 1)]
    accepted = [sum(histogram[j:]) for j in range(1, depth + 1)]
    drafts = sum(histogram)
    steps, requests, generated = drafts + tally["undrafted"], tally["requests"], tally["generated"]
    return {
        "requests": requests,
        "finished": tally["stop"] + tally["length"],
        "steps": steps,
        "drafts": drafts,
        "draft_tokens": drafts * depth,
        "accepted_tokens": sum(accepted),
        "accepted_by_position": accepted,
        "generated_tokens": generated,
        "overrun_tokens": tally["overrun"],
        "acceptance_length": (generated - requests) / steps if steps else None,
    }


class Answer:
    """One request, its answer known from the start. `cuts`: `sent` after each step; -1: no more."""

    def __init__(self, batch: Batch, prompt: U32, *, limit: int, ignore_eos: bool) -> None:
        self.settings = settings = batch.settings
        key = settings.seed << 32 | zlib.crc32(prompt)
        dice = random.Random(key << 1)
        ends_at = 2 + int(dice.gammavariate(2.0, settings.mean_output_tokens / 2))
        self.finish = "length" if ignore_eos or ends_at > limit else "stop"
        length = limit if self.finish == "length" else ends_at
        # Whole 32-bit words, so that a longer answer begins with the shorter one.
        drawn = array("H", dice.randbytes((length + 1) // 2 * 4))
        self.ids = array("I", (_WORD_0 + value % _WORDS for value in drawn[:length]))
        if self.finish == "stop":
            self.ids[-1] = EOS
        category = batch.category(prompt)
        self._tally = batch.tallies[category]
        self._conditional = settings.conditional.get(category, settings.conditional[DEFAULT])
        self._coverage = settings.coverage if settings.method != "none" else 0.0
        self._dice = random.Random(key << 1 | 1).random
        self.prompt, self.sent = prompt, 0
        self.ended = self.drafted = False
        self.accepted: list[int] = []
        self.cuts: asyncio.Queue[int] = asyncio.Queue()

    def step(self) -> None:
        """The prompt's pass: one token. Then a draft's accepted tokens and the target's own."""
        tally, accepted = self._tally, 0
        if not self.sent:
            tally["requests"] += 1
            tally["prompt_tokens"] += len(self.prompt)
        elif self.drafted:
            for probability in self._conditional:
                if self._dice() >= probability:
                    break
                accepted += 1
            self.accepted.append(accepted)
            tally[accepted] += 1
        else:
            tally["undrafted"] += 1
        emitted = min(accepted + 1, len(self.ids) - self.sent)
        tally["generated"] += emitted
        self.sent += emitted
        self.drafted = self._dice() < self._coverage
        if self.sent == len(self.ids):
            self.ended, self.drafted = True, False
            tally[self.finish] += 1
            tally["overrun"] += accepted + 1 - emitted
        self.cuts.put_nowait(self.sent)


class Batch:
    """Continuous batching: admit, wait a step's time on an absolute schedule, emit; and again."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.now: Callable[[], float] = time.perf_counter
        self.sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
        rows = [msgspec.json.decode(row) for row in settings.prompts.read_bytes().splitlines()]
        self.known = {array("I", encode(r["turns"][0])).tobytes(): r["category"] for r in rows}
        self.tallies: defaultdict[str, Tally] = defaultdict(Counter)
        self.waiting: dict[Answer, None] = {}
        self.running: dict[Answer, None] = {}
        self.iterations = self.most_running = 0
        self.numbers = count(1)
        self.died = ""  # why the loop is over
        self._work = asyncio.Event()

    def category(self, prompt: U32) -> str:
        """Of the known prompt that it holds, in whatever template or turn; else "default"."""
        held = prompt.tobytes()
        return next((c for known, c in self.known.items() if known in held), DEFAULT)

    def add(self, answer: Answer) -> None:
        """Queue a request. HTTPException: the loop is over."""
        if self.died:
            raise refusal(self.died, kind="InternalServerError")
        self.waiting[answer] = None
        self._work.set()

    def over(self, task: asyncio.Task[None]) -> None:
        """The loop has ended: so do the open requests, which would wait for ever."""
        if not task.cancelled():
            fault = task.exception()
            self.died = f"The simulated engine is gone: {fault!r}"
            task.get_loop().call_exception_handler({"message": self.died, "exception": fault})
            for answer in (*self.running, *self.waiting):
                answer.cuts.put_nowait(-1)

    async def run(self) -> None:
        """Until cancelled. A step that was late does not make the next one late, unless the
        machine is a whole step behind: then what was missed is missed."""
        due, k = self.now(), self.settings.draft_depth
        while True:
            if not (self.waiting or self.running):
                self._work.clear()
                await self._work.wait()
                due = self.now()
            begun = self._admitted()
            batch = list(self.running)
            verified = len(batch) - len(begun) + k * sum(a.drafted for a in batch)
            step_s = self.settings.step_s(verified, sum(len(a.prompt) for a in begun))
            due += step_s
            await self.sleep(max(due - self.now(), 0.0))
            now = self.now()
            if now - due > step_s:
                due = now
            for answer in batch:
                if answer in self.running:  # else its client left during the step
                    answer.step()
                    if answer.ended:
                        del self.running[answer]
            self.iterations += 1

    def _admitted(self) -> list[Answer]:
        """Requests whose prefill begins: as long as slots are free and the budget lasts."""
        admitted: list[Answer] = []
        budget = self.settings.prefill_budget
        for answer in [*self.waiting][: self.settings.max_running - len(self.running)]:
            budget -= len(answer.prompt)
            if admitted and budget < 0:
                break
            admitted.append(answer)
            del self.waiting[answer]
        self.running |= dict.fromkeys(admitted)
        self.most_running = max(self.most_running, len(self.running))
        return admitted


class Ask(msgspec.Struct):
    """The fields of a completions, chat or tokenize body that mean something here."""

    model: str = MODEL
    prompt: Any = None
    messages: list[Message] | None = None
    max_tokens: int | None = None
    n: int = 1
    stream: bool = False
    stream_options: dict[str, Any] = {}
    return_token_ids: bool = False
    ignore_eos: bool = False


_STATUS = {"NotFoundError": web.HTTPNotFound, "InternalServerError": web.HTTPInternalServerError}


def refusal(message: str, param: str = "", kind: str = "BadRequestError") -> web.HTTPException:
    """An HTTP error in vLLM 0.32's shape."""
    of: type[web.HTTPException] = _STATUS.get(kind, web.HTTPBadRequest)
    error = {"message": message, "type": kind, "param": param or None, "code": of.status_code}
    text = msgspec.json.encode({"error": error}).decode()
    return of(text=text, content_type="application/json")


async def _asked(request: web.Request) -> Ask:
    try:
        ask = msgspec.json.decode(await request.read(), type=Ask)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise refusal(f"1 validation error:\n  {fault}", "body", "Bad Request") from None
    if ask.model != MODEL:
        raise refusal(f"The model `{ask.model}` does not exist.", "model", "NotFoundError")
    if ask.n != 1:
        raise refusal(f"The simulator answers once a request, got n={ask.n}", "n")
    return ask


def _prompt_ids(ask: Ask, *, chat: bool) -> U32:
    """The prompt as ids. HTTPException: none, or not valid."""
    prompt = ask.prompt
    if chat:
        if not ask.messages:
            raise refusal("You must pass at least one message", "messages")
        prompt = [BOS]
        for message in ask.messages:
            prompt += [*encode(f"{message.role}\n{message.content}"), EOS]
        prompt += encode("assistant\n")
    elif isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise refusal("The simulator takes one prompt a request", "prompt")
        prompt = prompt[0]
    if not prompt:
        raise refusal("You must pass at least one prompt")
    if isinstance(prompt, str):
        prompt = [BOS, *encode(prompt)]
    try:
        ids = array("I", prompt)
    except (TypeError, OverflowError) as fault:
        raise refusal(f"1 validation error:\n  {fault}", "body.prompt", "Bad Request") from None
    if max(ids) >= 1 << 18:  # below, a prompt in a real model's ids is as good as one in ours
        raise refusal(f"Token id {max(ids)} is out of vocabulary")
    return ids


class Reply:
    """One answer in vLLM 0.32's shapes: an event a step, or one body."""

    def __init__(self, ask: Ask, answer: Answer, number: int, *, chat: bool) -> None:
        short, kind = ("chatcmpl", "chat.completion") if chat else ("cmpl", "text_completion")
        kind += ".chunk" if chat and ask.stream else ""
        self._head: dict[str, Any] = {"id": f"{short}-simulated-{number}", "object": kind}
        self._head |= {"created": int(time.time()), "model": MODEL}
        self._usage = ask.stream_options.get("include_usage")
        self._continuous = self._usage and ask.stream_options.get("continuous_usage_stats")
        self._prompt = {"prompt_token_ids": answer.prompt.tolist()} if ask.return_token_ids else {}
        self._key = ("delta" if ask.stream else "message") if chat else "text"
        self._answer, self._written = answer, 0

    def upto(self, end: int) -> bytes:
        """The event of the tokens up to `end`; what precedes the first and follows the last too."""
        begin, self._written = self._written, end
        choice, events = self._choice(begin, end), []
        if begin == 0 and self._key == "delta":
            role: dict[str, Any] = {"index": 0, "delta": {"role": "assistant", "content": ""}}
            role |= {"logprobs": None, "finish_reason": None}
            events.append(self._event([role], 0, self._prompt))
        elif begin == 0:
            choice |= self._prompt
        events.append(self._event([choice], end, {}))
        if end == len(self._answer.ids):
            events += [self._event([], end, self._figures())] if self._usage else []
            events.append(_DONE)
        return b"".join(events)

    def whole(self) -> dict[str, Any]:
        """An answer that is not streamed."""
        return {**self._head, "choices": [self._choice(0, self._answer.sent)], **self._figures()}

    def _event(self, choices: list[Any], sent: int, more: Mapping[str, Any]) -> bytes:
        usage = self._counts(sent) if self._continuous else {}
        body = {**self._head, "choices": choices, **usage, **more}
        return b"data: " + msgspec.json.encode(body) + b"\n\n"

    def _choice(self, begin: int, end: int) -> dict[str, Any]:
        ids, key = self._answer.ids[begin:end].tolist(), self._key
        text = "".join([_TEXT[i] for i in ids])
        role = {"role": "assistant"} if key == "message" else {}
        said: Any = text if key == "text" else {**role, "content": text}
        why = self._answer.finish if end == len(self._answer.ids) else None
        row = {"index": 0, key: said, "logprobs": None, "finish_reason": why, "stop_reason": None}
        return row | {"token_ids": ids} if self._prompt else row

    def _counts(self, sent: int) -> dict[str, Any]:
        isl = len(self._answer.prompt)
        usage = {"prompt_tokens": isl, "total_tokens": isl + sent, "completion_tokens": sent}
        return {"usage": usage}

    def _figures(self) -> dict[str, Any]:
        """Usage and, as --per-request-spec-decode-metrics detailed has it, the own acceptance."""
        answer, settings = self._answer, self._answer.settings
        figures = self._counts(answer.sent) | {"system_fingerprint": VERSION}
        figures["usage"]["prompt_tokens_details"] = {"cached_tokens": 0}
        if settings.method == "none" or not settings.per_request_metrics:
            return figures
        k, drafts, accepted = settings.draft_depth, len(answer.accepted), sum(answer.accepted)
        own = {
            "mean_acceptance_length": 1 + accepted / drafts if drafts else 1.0,
            "draft_acceptance_rate": accepted / (drafts * k) if drafts else 0.0,
            "acceptance_histogram": [answer.accepted.count(j) for j in range(k + 1)],
            "num_spec_steps": drafts,
            "num_accepted_draft_tokens": accepted,
            "num_draft_tokens": drafts * k,
            "num_spec_tokens": k,
            "per_step_accepted": answer.accepted or None,
            "per_step_drafted": [k] * drafts or None,
        }
        return figures | {"metrics": {"speculative_decoding": own}}


async def generate(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions and /v1/chat/completions."""
    batch, chat = request.app[BATCH], "chat" in request.path
    ask = await _asked(request)
    prompt = _prompt_ids(ask, chat=chat)
    isl, context = len(prompt), batch.settings.max_model_len
    if isl >= context:
        raise refusal(f"The context length is {context} tokens, the input {isl}.", "input_tokens")
    limit = (context if chat else 16) if ask.max_tokens is None else ask.max_tokens
    if limit < 1:
        raise refusal(f"max_tokens must be at least 1, got {limit}.", "max_tokens")
    limit = min(limit, context - isl)  # silently, as vLLM does (0.32)
    answer = Answer(batch, prompt, limit=limit, ignore_eos=ask.ignore_eos)
    batch.add(answer)
    reply = Reply(ask, answer, next(batch.numbers), chat=chat)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    try:
        if ask.stream:
            await response.prepare(request)
        end = 0
        while end < len(answer.ids):
            end = await answer.cuts.get()
            if end < 0:
                fault = refusal(batch.died, kind="InternalServerError")
                if not ask.stream:
                    raise fault
                await response.write(f"data: {fault.text}\n\n".encode() + _DONE)
                return response
            if ask.stream:
                await response.write(reply.upto(end))
    finally:  # ended, or its client is gone
        batch.waiting.pop(answer, None)
        batch.running.pop(answer, None)
    return response if ask.stream else web.json_response(reply.whole())


async def tokenize(request: web.Request) -> web.Response:
    """POST /tokenize, of a prompt or of messages."""
    batch, ask = request.app[BATCH], await _asked(request)
    ids = _prompt_ids(ask, chat=ask.messages is not None).tolist()
    limit = batch.settings.max_model_len
    told = {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": None}
    return web.json_response(told)


def truth(batch: Batch) -> dict[str, Any]:
    """What is simulated, as ServerFacts has it, and what really happened since the start."""
    settings, k = batch.settings, batch.settings.draft_depth
    return {
        "simulated": True,
        "version": __version__,
        "state": "on" if k else "off",
        "draft_depth": k or None,
        "spec_reported": METHODS[settings.method][-1] if k else None,
        **{name: getattr(settings, name) for name in ("method", "max_running", "seed")},
        "most_running": batch.most_running,
        "iterations": batch.iterations,
        "overall": told(sum(batch.tallies.values(), Counter()), k),
        "categories": {name: told(tally, k) for name, tally in sorted(batch.tallies.items())},
    }


def metrics_page(batch: Batch) -> str:
    """vLLM's families (0.32), those of speculation only where there is any."""
    settings, tally = batch.settings, sum(batch.tallies.values(), Tally())
    held = sum(len(a.prompt) + a.sent for a in batch.running)
    rows: dict[str, float] = {
        vllm.RUNNING: len(batch.running),
        vllm.WAITING: len(batch.waiting),
        vllm.KV_USE: held / (settings.max_running * settings.max_model_len),
        "vllm:prompt_tokens_total": tally["prompt_tokens"],
        vllm.GENERATED: tally["generated"],
        'vllm:request_success_total,finished_reason="stop"': tally["stop"],
        'vllm:request_success_total,finished_reason="length"': tally["length"],
    }
    if settings.method != "none":
        figures = told(tally, settings.draft_depth)
        for name in ("drafts", "draft_tokens", "accepted_tokens"):
            rows[f"{vllm.SPEC}num_{name}_total"] = figures[name]
        for j, count in enumerate(figures["accepted_by_position"]):
            rows[f'{vllm.SPEC}num_accepted_tokens_per_pos_total,position="{j}"'] = count
    lines: list[str] = []
    for name, value in rows.items():
        family, comma, label = name.partition(",")
        kind = "counter" if family.endswith("_total") else "gauge"
        lines += [f"# HELP {family} Simulated.", f"# TYPE {family} {kind}"]
        lines += [f'{family}{{engine="0",model_name="{MODEL}"{comma}{label}}} {value}']
    return "\n".join(dict.fromkeys(lines)) + "\n"


_CARD = {"id": MODEL, "object": "model", "created": 0, "owned_by": OWNER}
BATCH = web.AppKey("batch", Batch)
PAGES: dict[str, Callable[[Batch], Any]] = {
    "/health": lambda batch: "",
    "/version": lambda batch: {"version": VERSION},
    "/v1/models": lambda batch: {
        "object": "list",
        "data": [_CARD | {"max_model_len": batch.settings.max_model_len}],
    },
    "/metrics": metrics_page,
    "/truth": truth,
}


async def page(request: web.Request) -> web.Response:
    """GET one of PAGES."""
    found = PAGES[request.path](request.app[BATCH])
    return web.Response(text=found) if isinstance(found, str) else web.json_response(found)


# ── as a process, and as an engine to load ───────────────────────────────────────────────────────


def app(settings: Settings) -> web.Application:
    """The simulated server, ready to run. Its Batch is `app[BATCH]`."""
    found = web.Application(client_max_size=64 << 20)
    batch = found[BATCH] = Batch(settings)

    async def loop(_: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(batch.run())
        task.add_done_callback(batch.over)
        yield
        task.cancel()
        await asyncio.wait([task])

    found.cleanup_ctx.append(loop)
    found.router.add_post("/v1/completions", generate)
    found.router.add_post("/v1/chat/completions", generate)
    found.router.add_post("/tokenize", tokenize)
    for path in PAGES:
        found.router.add_get(path, page)
    return found


def parsed(argv: Sequence[str] | None = None) -> tuple[str, int, Settings]:
    """Host, port and settings of a command line: a flag for every number in Settings."""
    parser = argparse.ArgumentParser("servers.simulator", argument_default=argparse.SUPPRESS)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--spec", default="none", choices=("none", *METHODS))
    for setting in fields(Settings):
        if type(setting.default) in (int, float):
            parser.add_argument(f"--{setting.name.replace('_', '-')}", type=type(setting.default))
    given = vars(parser.parse_args(argv))
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
    if config.model != MODEL:
        raise UserError(f"the simulator serves '{MODEL}', not '{config.model}'. Expected that.")
    flags: dict[str, Any] = {"port": port, "spec": "none"}
    if config.spec is not None:
        flags["spec"] = known_method(config.spec, tuple(METHODS), "simulated")
        flags["draft-depth"] = chain_depth(config.spec, "simulated")
        flags |= known_options(config.spec, frozenset({"coverage"}), "simulated")
    flags |= {"max-running": config.max_running, "max-model-len": config.max_model_len}
    argv = [*(config.executable or (sys.executable,)), "-P", "-m", "servers.simulator"]
    for flag, value in flags.items():
        argv += [] if value is None else [f"--{flag}", str(value)]
    return [*argv, *config.extra_args]


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
    owned_by=(OWNER,),
    describe_paths=("/truth",),
    describe=describe,
    methods=tuple(METHODS),
    command=command,
    verified="simulated: no engine, its figures follow from its settings",
)

if __name__ == "__main__":
    main()
