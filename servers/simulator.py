"""An engine without a GPU: batching and acceptance are simulated, the dialect is vLLM's.

One loop advances all running requests one decode step at a time, as continuous batching does. A
step takes base_s + per_token_s × (tokens verified in it), so the gain of speculation shrinks with
the load; a draft's position j is accepted with a fixed probability given that j − 1 was, by the
prompt's category (found by its text, remembered under its token ids). Answers depend on seed and
prompt alone, never on the method: speculation is lossless here. `/truth` tells what really
happened, to hold a client's figures against. All that it serves says "simulated". Must not: pass
for a measurement of any engine, learn anything a real server would not be told.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import math
import random
import re
import resource
import sys
import time
import zlib
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import msgspec
from aiohttp import web

from loadgen import __version__
from loadgen.errors import UserError, nearest
from loadgen.types import U32, Engine, ServerConfig, ServerFacts
from servers import vllm

MODEL = "simulated-8b"
OWNER = "draftload-simulator"
VERSION = f"simulated-{__version__}"
BUILTIN = Path(__file__).parent.parent / "scenarios" / "data" / "qualitative.jsonl"
DEFAULT = "default"
MAX_BODY_BYTES = 64 << 20


# ── settings ─────────────────────────────────────────────────────────────────────────────────────

# Probability that the first draft token is accepted. Made up, ordered as published acceptance by
# category usually is (code and math high, role play low); not measured on anything.
_FIRST = {
    "coding": 0.82,
    "humanities": 0.68,
    "math": 0.80,
    "multilingual": 0.60,
    "qa": 0.66,
    "rag": 0.74,
    "reasoning": 0.72,
    "roleplay": 0.58,
    "stem": 0.70,
    "summarization": 0.70,
    "writing": 0.62,
    DEFAULT: 0.68,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is simulated. Times in seconds.

    `conditional[category][j]`: probability that draft position j + 1 is accepted given that j was,
    `draft_depth` of them, with a row "default". `coverage`: probability that a decode step has a
    draft. `prefill_budget`: prompt tokens that may begin in one step. `mean_output_tokens`: where
    an answer ends by itself. `prompts`: JSONL rows with `category` and `turns`, to tell categories.
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
    prompts: Path | None = BUILTIN

    def step_s(self, tokens: int, prefilled: int = 0) -> float:
        """Time of a step that verifies `tokens` for running requests and prefills `prefilled`."""
        return self.base_s + self.per_token_s * tokens + self.prefill_s_per_token * prefilled


METHODS: dict[str, tuple[float, float, float]] = {
    # method → share of _FIRST for the first position, share kept from one position to the next,
    # coverage. n-gram: rarely a match, and a good one when there is.
    "eagle3": (1.0, 0.94, 1.0),
    "ngram": (1.05, 0.97, 0.35),
}


def preset(method: str, draft_depth: int = 3, **changes: Any) -> Settings:
    """Settings of 'none', 'eagle3' or 'ngram', with changes. UserError: another method."""
    if method == "none":
        return replace(Settings(), **changes)
    if method not in METHODS:
        raise UserError(
            f"the simulator has no method '{method}'{nearest(method, METHODS) or '.'} "
            f"Known: none, {', '.join(METHODS)}."
        )
    first, kept, coverage = METHODS[method]
    conditional = {
        category: tuple(min(p * first, 0.99) * kept**j for j in range(draft_depth))
        for category, p in _FIRST.items()
    }
    settings = Settings(
        method=method, draft_depth=draft_depth, coverage=coverage, conditional=conditional
    )
    return replace(settings, **changes)


# ── a toy tokenizer ──────────────────────────────────────────────────────────────────────────────

BOS, EOS = 1, 2
_BYTE_0, _WORD_0, _WORDS = 3, 1000, 31000
VOCABULARY = 1 << 18
"""Ids below it are taken: a prompt in a real model's ids is as good as one of ours."""
_PIECE = re.compile(r" ?([A-Za-z]{2,})|(.)", re.DOTALL)


@functools.cache
def words() -> tuple[str, ...]:
    """The word of every word id, three syllables each."""
    syllables = [c + v for c in "bdfgklmn" for v in "aeio"]
    return tuple(
        syllables[n >> 10] + syllables[n >> 5 & 31] + syllables[n & 31] for n in range(_WORDS)
    )


@functools.cache
def _word_ids() -> dict[str, int]:
    return {word: _WORD_0 + n for n, word in enumerate(words())}


def encode(text: str) -> list[int]:
    """Text → ids, the same in every process: one a word, else one a UTF-8 byte."""
    known = _word_ids()
    ids: list[int] = []
    for word, other in _PIECE.findall(text):
        if word:
            own = known.get(word)
            ids.append(_WORD_0 + zlib.crc32(word.encode()) % _WORDS if own is None else own)
        else:
            ids.extend(_BYTE_0 + byte for byte in other.encode("utf-8", "surrogatepass"))
    return ids


def decode(ids: Sequence[int]) -> str:
    """The text of answer ids: words, and nothing for special ids."""
    table = words()
    return "".join(" " + table[i - _WORD_0] for i in ids if i >= _WORD_0)


class Message(msgspec.Struct):
    """One chat message, text only."""

    role: str
    content: str


def template(messages: Sequence[Message], *, open_answer: bool = True) -> list[int]:
    """The toy chat template: BOS, then role, text and EOS of each message."""
    ids = [BOS]
    for message in messages:
        ids += [*encode(message.role), *encode("\n"), *encode(message.content), EOS]
    return [*ids, *encode("assistant\n")] if open_answer else ids


class Categories:
    """Which category a prompt is of: told by its text, then remembered under its token ids."""

    REMEMBERED = 1 << 16

    def __init__(self, path: Path | None) -> None:
        self._texts: dict[str, str] = {}
        self._ids: dict[int, str] = {}
        if path is not None and path.is_file():
            for line in path.read_bytes().splitlines():
                row = msgspec.json.decode(line, type=_Row)
                self._texts[row.turns[0]] = row.category

    def learn(self, texts: Sequence[str], ids: U32) -> None:
        """Remember ids whose text holds a known prompt."""
        for text in texts:
            category = self._texts.get(text) or next(
                (self._texts[known] for known in self._texts if known in text), None
            )
            if category is not None:
                while len(self._ids) >= self.REMEMBERED:
                    del self._ids[next(iter(self._ids))]
                self._ids[zlib.crc32(ids)] = category
                return

    def of(self, ids: U32) -> str:
        """The category, or "default"."""
        return self._ids.get(zlib.crc32(ids), DEFAULT)


class _Row(msgspec.Struct):
    category: str
    turns: tuple[str, ...]


# ── one request under way ────────────────────────────────────────────────────────────────────────

Finish = Literal["stop", "length"]


@dataclass(kw_only=True, slots=True)
class Tally:
    """What really happened. `histogram[j]`: drafted decode steps that accepted j, before the cut at
    an answer's end; `overrun`: tokens so cut. generated + overrun = requests + steps + accepted."""

    histogram: list[int]
    undrafted: int = 0
    generated: int = 0
    overrun: int = 0
    prompt_tokens: int = 0
    requests: int = 0
    stop: int = 0
    length: int = 0

    @property
    def by_position(self) -> list[int]:
        """Accepted at each draft position."""
        return [sum(self.histogram[j:]) for j in range(1, len(self.histogram))]

    def told(self) -> dict[str, Any]:
        """As `/truth` says it."""
        drafts = sum(self.histogram)
        steps = drafts + self.undrafted
        return {
            "requests": self.requests,
            "finished": self.stop + self.length,
            "steps": steps,
            "drafts": drafts,
            "draft_tokens": drafts * (len(self.histogram) - 1),
            "accepted_tokens": sum(self.by_position),
            "accepted_by_position": self.by_position,
            "generated_tokens": self.generated,
            "overrun_tokens": self.overrun,
            "acceptance_length": (self.generated - self.requests) / steps if steps else None,
        }


def summed(tallies: Iterable[Tally], depth: int) -> Tally:
    """All of them as one."""
    rows = list(tallies)
    counts = {
        name: sum(getattr(row, name) for row in rows)
        for name in Tally.__slots__
        if name != "histogram"
    }
    histogram = [sum(row.histogram[j] for row in rows) for j in range(depth + 1)]
    return Tally(histogram=histogram, **counts)


class Answer:
    """One request: its answer's ids (known from the start), how far it is, what was said of it.

    `out` are SSE events not yet written, `more` is set when there are some or the answer ended.
    """

    def __init__(
        self,
        prompt: U32,
        settings: Settings,
        category: str,
        tally: Tally,
        *,
        limit: int,
        ignore_eos: bool,
        render: Render | None,
    ) -> None:
        key = settings.seed << 32 | zlib.crc32(prompt)
        self.ids, self.finish = _written(random.Random(key << 1), settings, limit, ignore_eos)
        self._dice = random.Random(key << 1 | 1).random
        table = settings.conditional
        self._conditional = table.get(category, table[DEFAULT])
        self._coverage = settings.coverage if settings.method != "none" else 0.0
        self._render = render
        self.isl = len(prompt)
        self.sent = 0
        self.tally = tally
        self.drafted = False
        self.accepted: list[int] = []
        self.out: list[bytes] = []
        self.more = asyncio.Event()

    @property
    def ended(self) -> bool:
        """All of the answer was emitted."""
        return self.sent == len(self.ids)

    def prefill(self) -> None:
        """The prompt's pass: exactly one token."""
        self.tally.requests += 1
        self.tally.prompt_tokens += self.isl
        self._emit(1)

    def step(self) -> None:
        """One decode step: a draft's accepted tokens and the target's own, cut at the end."""
        accepted = 0
        if self.drafted:
            for probability in self._conditional:
                if self._dice() >= probability:
                    break
                accepted += 1
            self.accepted.append(accepted)
            self.tally.histogram[accepted] += 1
        else:
            self.tally.undrafted += 1
        count = min(accepted + 1, len(self.ids) - self.sent)
        self.tally.overrun += accepted + 1 - count
        self._emit(count)

    def _emit(self, count: int) -> None:
        before, self.sent = self.sent, self.sent + count
        self.tally.generated += count
        if not self.ended:
            self.drafted = self._dice() < self._coverage
        elif self.finish == "stop":
            self.tally.stop += 1
        else:
            self.tally.length += 1
        if self._render is not None:
            self.out.append(self._render.event(self, before))
            self.more.set()
        elif self.ended:
            self.more.set()


def _written(
    dice: random.Random, settings: Settings, limit: int, ignore_eos: bool
) -> tuple[U32, Finish]:
    """The answer's ids and why it ends. A higher limit gives the same answer, longer."""
    ends_at = 2 + int(dice.gammavariate(2.0, settings.mean_output_tokens / 2))
    stops = not ignore_eos and ends_at <= limit
    count = ends_at if stops else limit
    # Whole 32-bit words, so that a longer answer begins with the shorter one.
    drawn = array("H", dice.randbytes(4 * math.ceil(count / 2)))
    ids = array("I", (_WORD_0 + value % _WORDS for value in drawn[:count]))
    if stops:
        ids[-1] = EOS
    return ids, "stop" if stops else "length"


class Render:
    """One stream's events as bytes: vLLM 0.32's shapes, one event a decode step."""

    def __init__(self, ask: Ask, prompt: U32, name: str, *, chat: bool, settings: Settings) -> None:
        kind = "chat.completion.chunk" if chat else "text_completion"
        self._head = (
            f'data: {{"id":"{name}","object":"{kind}","created":{int(time.time())},'
            f'"model":"{MODEL}","choices":['
        )
        self._open = '{"index":0,"delta":{"content":"' if chat else '{"index":0,"text":"'
        self._close = '"},"logprobs":null,' if chat else '","logprobs":null,'
        options = ask.stream_options or StreamOptions()
        self._usage = bool(options.include_usage)
        self._continuous = self._usage and bool(options.continuous_usage_stats)
        self._ids = bool(ask.return_token_ids)
        self._isl = len(prompt)
        self._prompt = _joined(prompt) if self._ids else ""
        self._chat = chat
        self._settings = settings

    def event(self, answer: Answer, before: int) -> bytes:
        """Tokens `before`…`sent` of the answer; the first with what precedes, the last with all
        that follows."""
        ids = answer.ids[before : answer.sent]
        finish = f'"{answer.finish}"' if answer.ended else "null"
        told = f',"token_ids":[{_joined(ids)}]' if self._ids else ""
        lead = ""
        if before == 0:
            lead = self._role() if self._chat else ""
            if self._ids and not self._chat:
                told = f',"prompt_token_ids":[{self._prompt}]{told}'
        text = (
            f"{lead}{self._head}{self._open}{decode(ids)}{self._close}"
            f'"finish_reason":{finish},"stop_reason":null{told}}}]'
            f"{self._so_far(answer.sent)}}}\n\n"
        )
        if answer.ended:
            text += (self._figures(answer) if self._usage else "") + "data: [DONE]\n\n"
        return text.encode()

    def _so_far(self, sent: int) -> str:
        if not self._continuous:
            return ""
        return (
            f',"usage":{{"prompt_tokens":{self._isl},"total_tokens":{self._isl + sent},'
            f'"completion_tokens":{sent}}}'
        )

    def _role(self) -> str:
        prompt = f',"prompt_token_ids":[{self._prompt}]' if self._ids else ""
        return (
            f'{self._head}{{"index":0,"delta":{{"role":"assistant","content":""}},"logprobs":null,'
            f'"finish_reason":null}}]{self._so_far(0)}{prompt}}}\n\n'
        )

    def _figures(self, answer: Answer) -> str:
        closing = msgspec.json.encode(closing_figures(answer, self._settings)).decode()
        return f"{self._head}],{closing[1:]}\n\n"


def _joined(ids: U32) -> str:
    return ",".join(map(str, ids))


def closing_figures(answer: Answer, settings: Settings) -> dict[str, Any]:
    """Usage, and the request's own acceptance as vLLM 0.32 gives it under
    --per-request-spec-decode-metrics detailed: drafted steps only, before the cut."""
    told: dict[str, Any] = {
        "usage": {
            "prompt_tokens": answer.isl,
            "total_tokens": answer.isl + answer.sent,
            "completion_tokens": answer.sent,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
        "system_fingerprint": VERSION,
    }
    if settings.method == "none" or not settings.per_request_metrics:
        return told
    k, drafts, accepted = settings.draft_depth, len(answer.accepted), sum(answer.accepted)
    told["metrics"] = {
        "speculative_decoding": {
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
    }
    return told


# ── the engine's loop ────────────────────────────────────────────────────────────────────────────


class Batch:
    """Continuous batching: admit, wait a step's time on an absolute schedule, emit; and again."""

    def __init__(
        self,
        settings: Settings,
        *,
        now: Callable[[], float] = perf_counter,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.settings = settings
        self._now, self._sleep = now, sleep
        self.tallies: dict[str, Tally] = {}
        self.waiting: dict[Answer, None] = {}
        self.running: dict[Answer, None] = {}
        self.iterations = self.most_running = self.decoded = 0
        self.waited_s = self.asked_s = 0.0
        self._work = asyncio.Event()

    def tally(self, category: str) -> Tally:
        """The category's tally."""
        if category not in self.tallies:
            self.tallies[category] = Tally(histogram=[0] * (self.settings.draft_depth + 1))
        return self.tallies[category]

    def total(self) -> Tally:
        """All categories."""
        return summed(self.tallies.values(), self.settings.draft_depth)

    def add(self, answer: Answer) -> None:
        """Queue a request."""
        self.waiting[answer] = None
        self._work.set()

    def drop(self, answer: Answer) -> None:
        """Forget a request, ended or not: its client is gone."""
        self.waiting.pop(answer, None)
        self.running.pop(answer, None)

    async def run(self) -> None:
        """Until cancelled. A step that was late does not make the next one late, unless the
        machine is a whole step behind: then what was missed is missed."""
        due = began = self._now()
        while True:
            if not (self.waiting or self.running):
                self._work.clear()
                await self._work.wait()
                due = began = self._now()
            decoding, prefilling = list(self.running), self._admitted()
            k = self.settings.draft_depth
            asked = self.settings.step_s(
                sum(1 + k if a.drafted else 1 for a in decoding), sum(a.isl for a in prefilling)
            )
            due += asked
            await self._sleep(max(due - self._now(), 0.0))
            now = self._now()
            if now - due > asked:
                due = now
            self._emit(decoding, prefilling, now - began, asked)
            began = now

    def _admitted(self) -> list[Answer]:
        """Requests whose prefill begins: as long as slots are free and the budget lasts."""
        admitted: list[Answer] = []
        budget = self.settings.prefill_budget
        while self.waiting and len(self.running) < self.settings.max_running:
            answer = next(iter(self.waiting))
            if admitted and answer.isl > budget:
                break
            budget -= answer.isl
            del self.waiting[answer]
            self.running[answer] = None
            admitted.append(answer)
        self.most_running = max(self.most_running, len(self.running))
        return admitted

    def _emit(
        self, decoding: list[Answer], prefilling: list[Answer], waited: float, asked: float
    ) -> None:
        running, stepped = self.running, 0
        for answer in decoding:
            if answer in running:  # else its client left during the step
                stepped += 1
                answer.step()
                if answer.ended:
                    del running[answer]
        for answer in prefilling:
            if answer in running:
                answer.prefill()
                if answer.ended:
                    del running[answer]
        self.iterations += 1
        self.decoded += stepped
        self.waited_s += waited * stepped
        self.asked_s += asked * stepped


# ── HTTP ─────────────────────────────────────────────────────────────────────────────────────────


class StreamOptions(msgspec.Struct):
    """What a stream says of usage; continuous only together with include_usage (vLLM 0.33)."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Ask(msgspec.Struct):
    """The fields of a completions, chat or tokenize body that mean something here."""

    model: str | None = None
    prompt: Any = None
    messages: list[Message] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    ignore_eos: bool | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


_asks = msgspec.json.Decoder(Ask)


class Refusal(Exception):
    """An HTTP error in vLLM 0.32's shape."""

    def __init__(
        self, message: str, *, status: int = 400, kind: str = "BadRequestError", param: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {"message": message, "type": kind, "param": param or None, "code": status}
        }


def _ask(body: bytes) -> Ask:
    try:
        ask = _asks.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise Refusal(f"1 validation error:\n  {fault}", kind="Bad Request", param="body") from None
    if ask.model not in (None, MODEL):
        raise Refusal(
            f"The model `{ask.model}` does not exist. Valid aliases: {MODEL}.",
            status=404,
            kind="NotFoundError",
            param="model",
        )
    return ask


def _prompt_ids(ask: Ask, categories: Categories, *, chat: bool | None = None) -> U32:
    """The prompt as ids; a text's category is learnt on the way. Refusal: none, or not valid.

    `chat`: messages are expected, or not; None takes either.
    """
    texts: list[str] = []
    if chat or (chat is None and ask.messages is not None):
        if not ask.messages:
            raise Refusal("You must pass at least one message", param="messages")
        texts = [m.content for m in ask.messages if m.role == "user"]
        ids = template(ask.messages, open_answer=ask.add_generation_prompt)
    else:
        prompt = ask.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
            if len(prompt) > 1:
                raise Refusal("The simulator takes one prompt a request", param="prompt")
            prompt = prompt[0]
        if not prompt:
            raise Refusal("You must pass at least one prompt")
        if isinstance(prompt, str):
            texts = [prompt]
            prompt = [BOS] * ask.add_special_tokens + encode(prompt)
        ids = prompt
    try:
        taken = array("I", ids)
    except (TypeError, OverflowError) as fault:
        raise Refusal(
            f"1 validation error:\n  prompt: {fault}", kind="Bad Request", param="body.prompt"
        ) from None
    if max(taken) >= VOCABULARY:
        raise Refusal(f"Token id {max(taken)} is out of vocabulary")
    categories.learn(texts, taken)
    return taken


def _limit(ask: Ask, isl: int, chat: bool, context: int) -> int:
    """Output limit: what was asked, silently cut to the context as vLLM does (0.32)."""
    if isl >= context:
        raise Refusal(
            f"This model's maximum context length is {context} tokens. However, your prompt "
            f"contains {isl} input tokens, which exceeds this limit even without any output "
            "tokens. Please reduce the length of the input prompt. (parameter=input_tokens, "
            f"value={isl})",
            param="input_tokens",
        )
    asked = ask.max_tokens if ask.max_completion_tokens is None else ask.max_completion_tokens
    if asked is None:
        asked = context if chat else 16
    if asked < 1:
        raise Refusal(
            f"max_tokens must be at least 1, got {asked}. (parameter=max_tokens, value={asked})",
            param="max_tokens",
        )
    if ask.n not in (None, 1):
        raise Refusal(f"The simulator answers once a request, got n={ask.n}", param="n")
    return min(asked, context - isl)


class Handlers:
    """The endpoints over one Batch."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.batch = Batch(settings)
        self.categories = Categories(settings.prompts)
        self.asked = 0

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        return await self._generate(request, chat=False)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        return await self._generate(request, chat=True)

    async def _generate(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        try:
            ask = _ask(await request.read())
            prompt = _prompt_ids(ask, self.categories, chat=chat)
            limit = _limit(ask, len(prompt), chat, self.settings.max_model_len)
        except Refusal as refusal:
            return _json(refusal.body, refusal.status)
        self.asked += 1
        name = f"{'chatcmpl' if chat else 'cmpl'}-simulated-{self.asked}"
        render = Render(ask, prompt, name, chat=chat, settings=self.settings)
        category = self.categories.of(prompt)
        answer = Answer(
            prompt,
            self.settings,
            category,
            self.batch.tally(category),
            limit=limit,
            ignore_eos=bool(ask.ignore_eos),
            render=render if ask.stream else None,
        )
        self.batch.add(answer)
        try:
            if ask.stream:
                return await _streamed(request, answer)
            await answer.more.wait()
            return _json(_whole(ask, answer, name, chat=chat, settings=self.settings))
        finally:
            self.batch.drop(answer)

    async def tokenize(self, request: web.Request) -> web.Response:
        """POST /tokenize, of a prompt or of messages."""
        try:
            ids = _prompt_ids(_ask(await request.read()), self.categories)
        except Refusal as refusal:
            return _json(refusal.body, refusal.status)
        return _json(
            {
                "count": len(ids),
                "max_model_len": self.settings.max_model_len,
                "tokens": ids.tolist(),
                "token_strs": None,
            }
        )


async def _streamed(request: web.Request, answer: Answer) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    while True:
        await answer.more.wait()
        answer.more.clear()
        data = b"".join(answer.out)
        answer.out.clear()
        if answer.ended:
            await response.write_eof(data)
            return response
        await response.write(data)


def _whole(
    ask: Ask, answer: Answer, name: str, *, chat: bool, settings: Settings
) -> dict[str, Any]:
    """An answer that was not streamed."""
    text = decode(answer.ids)
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": answer.finish}
    choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    if ask.return_token_ids:
        choice["token_ids"] = answer.ids.tolist()
    return {
        "id": name,
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [choice],
        **closing_figures(answer, settings),
    }


def _json(body: Any, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(body), status=status, content_type="application/json"
    )


def truth(batch: Batch) -> dict[str, Any]:
    """What really happened since the start. `step_time_s` is the mean over decode steps of the
    time from one emission to the next, `step_time_asked_s` what the settings asked for."""
    settings, decoded = batch.settings, batch.decoded
    return {
        "simulated": True,
        "method": settings.method,
        "draft_depth": settings.draft_depth,
        "max_running": settings.max_running,
        "seed": settings.seed,
        "most_running": batch.most_running,
        "iterations": batch.iterations,
        "step_time_s": batch.waited_s / decoded if decoded else None,
        "step_time_asked_s": batch.asked_s / decoded if decoded else None,
        "overall": batch.total().told(),
        "categories": {name: t.told() for name, t in sorted(batch.tallies.items())},
    }


def metrics_page(batch: Batch) -> str:
    """vLLM's families (0.32), those of speculation only where there is any."""
    total, settings = batch.total(), batch.settings
    held = sum(a.isl + a.sent for a in batch.running)
    capacity = settings.max_running * settings.max_model_len
    rows: list[tuple[str, str, str, float]] = [
        (vllm.RUNNING, "gauge", "", len(batch.running)),
        (vllm.WAITING, "gauge", "", len(batch.waiting)),
        (vllm.KV_USE, "gauge", "", held / capacity),
        ("vllm:prompt_tokens_total", "counter", "", total.prompt_tokens),
        (vllm.GENERATED, "counter", "", total.generated),
    ]
    rows += [
        (vllm.FINISHED, "counter", f',finished_reason="{reason}"', count)
        for reason, count in (("stop", total.stop), ("length", total.length))
    ]
    if settings.method != "none":
        drafts = sum(total.histogram)
        rows += [
            (vllm.DRAFTS, "counter", "", drafts),
            (vllm.DRAFT_TOKENS, "counter", "", drafts * settings.draft_depth),
            (vllm.ACCEPTED, "counter", "", sum(total.by_position)),
        ]
        rows += [
            (vllm.ACCEPTED_BY_POSITION, "counter", f',position="{j}"', count)
            for j, count in enumerate(total.by_position)
        ]
    lines, before = [], ""
    for family, kind, label, value in rows:
        if family != before:
            lines += [f"# HELP {family} Simulated.", f"# TYPE {family} {kind}"]
            before = family
        lines.append(f'{family}{{engine="0",model_name="{MODEL}"{label}}} {value}')
    return "\n".join(lines) + "\n"


def models_page(settings: Settings) -> dict[str, Any]:
    """`/v1/models`: one card, whose owner says that this is no engine."""
    card = {"id": MODEL, "object": "model", "created": 0, "owned_by": OWNER, "root": MODEL}
    card |= {"parent": None, "max_model_len": settings.max_model_len}
    return {"object": "list", "data": [card]}


def _page(path: str, body: Callable[[], Any]) -> web.RouteDef:
    async def page(_: web.Request) -> web.Response:
        found = body()
        return web.Response(text=found) if isinstance(found, str) else _json(found)

    return web.get(path, page)


BATCH = web.AppKey("batch", Batch)


def app(settings: Settings) -> web.Application:
    """The simulated server, ready to run. Its Batch is `app[BATCH]`."""
    handlers = Handlers(settings)
    words()
    _word_ids()

    async def loop(_: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(handlers.batch.run())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    found = web.Application(client_max_size=MAX_BODY_BYTES)
    found[BATCH] = handlers.batch
    found.cleanup_ctx.append(loop)
    found.add_routes(
        [
            web.post("/v1/completions", handlers.completions),
            web.post("/v1/chat/completions", handlers.chat),
            web.post("/tokenize", handlers.tokenize),
            _page("/health", str),
            _page("/version", lambda: {"version": VERSION}),
            _page("/v1/models", lambda: models_page(settings)),
            _page("/metrics", lambda: metrics_page(handlers.batch)),
            _page("/truth", lambda: truth(handlers.batch)),
        ]
    )
    return found


# ── as a process, and as an engine to load ───────────────────────────────────────────────────────


NUMBERS = {
    f.name: type(f.default)
    for f in fields(Settings)
    if type(f.default) in (int, float) and f.name != "draft_depth"
}
"""Settings that are flags of the same name; the method's own value without."""


def _parsed(argv: Sequence[str] | None) -> tuple[str, int, Settings]:
    parser = argparse.ArgumentParser(
        prog="servers.simulator", description="A simulated engine that speaks vLLM's dialect."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--spec", default="none", choices=("none", *METHODS))
    parser.add_argument("--draft-depth", type=int, default=3)
    for name, kind in NUMBERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    host, port = given.pop("host"), given.pop("port")
    return host, port, preset(given.pop("spec"), given.pop("draft_depth"), **given)


def settings_of(argv: Sequence[str]) -> Settings:
    """The settings that a command line asks for."""
    return _parsed(argv)[2]


def main(argv: Sequence[str] | None = None) -> None:
    """`python -P -m servers.simulator`: serve until SIGTERM or Ctrl-C."""
    host, port, settings = _parsed(argv)
    _allow_connections()
    web.run_app(
        app(settings),
        host=host,
        port=port,
        print=None,
        access_log=None,
        backlog=4096,
        handler_cancellation=True,
        shutdown_timeout=1.0,
        loop=_new_loop(),
    )


def _allow_connections(wanted: int = 1 << 16) -> None:
    """Raise the soft limit on open files as far as it goes: a stream is a descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def command(config: ServerConfig, port: int) -> list[str]:
    """argv of the simulator. UserError: a model or a setting that it does not have."""
    if config.model != MODEL:
        raise UserError(f"the simulator serves '{MODEL}', not '{config.model}'. Expected that.")
    argv = [*(config.executable or (sys.executable,)), "-P", "-m", "servers.simulator"]
    argv += ["--port", str(port)]
    if config.spec is None:
        argv += ["--spec", "none"]
    else:
        method = vllm.known_method(config.spec, tuple(METHODS), "simulated")
        options = vllm.known_options(config.spec, frozenset({"coverage"}), "simulated")
        depth = vllm.chain_depth(config.spec, "simulated")
        argv += ["--spec", method, "--draft-depth", str(3 if depth is None else depth)]
        for key, value in options.items():
            argv += [f"--{key}", str(value)]
    if config.max_running is not None:
        argv += ["--max-running", str(config.max_running)]
    if config.max_model_len is not None:
        argv += ["--max-model-len", str(config.max_model_len)]
    return [*argv, "--seed", "0", *config.extra_args]


def describe(pages: Mapping[str, Any], samples: Mapping[str, float]) -> ServerFacts:
    """What the simulator's own pages tell, and that it is one."""
    facts = vllm.describe(pages, samples)
    page = pages.get("/truth")
    if not isinstance(page, dict):
        return msgspec.structs.replace(facts, simulated=True)
    method, depth = page.get("method"), page.get("draft_depth")
    on = method != "none"
    return ServerFacts(
        version=facts.version,
        max_running=page.get("max_running"),
        state="on" if on else "off",
        draft_depth=depth if on else None,
        spec_reported=f"{method} k={depth}" if on else "none",
        simulated=True,
    )


ENGINE = Engine(
    name="simulated",
    wires=vllm.WIRES,
    owned_by=(OWNER,),
    counters=vllm.counters,
    load=vllm.load,
    metrics_path="/metrics",
    tick_prefixes=vllm.TICKS,
    describe_paths=("/version", "/truth"),
    describe=describe,
    chunk_is_step=True,
    methods=tuple(METHODS),
    command=command,
    verified="simulated: no engine, its figures follow from its settings",
)

if __name__ == "__main__":
    main()
