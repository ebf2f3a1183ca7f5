"""How the simulator speaks: the wire and errors of vLLM, SGLang, TensorRT-LLM and llama.cpp.

Shapes as captured (vLLM 0.32.0, llama.cpp b11434) or rebuilt from source (SGLang 0.5.23,
TensorRT-LLM 1.4.0rc1). Versions, models and system fingerprints say that they are simulated. Chat
is spoken where a chat stream was captured: vLLM and llama.cpp. Must not: decide what happens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from loadgen.types import Message
from servers import pages
from servers.pages import VERSION
from servers.simulated import TEXT, Answer, Batch

DONE = b"data: [DONE]\n\n"


class Ask(msgspec.Struct):
    """The fields of a body that mean something here, whichever API they are of."""

    model: str | None = None
    prompt: Any = None
    messages: list[Message] | None = None
    max_tokens: int | None = None
    n: int = 1
    temperature: float = 0.0
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    return_token_ids: bool = False
    ignore_eos: bool = False
    # llama.cpp
    content: str | None = None
    tokens: list[int] | None = None
    n_predict: int | None = None
    timings_per_token: bool = False
    return_tokens: bool = False
    # TensorRT-LLM
    detokenize: bool = True
    # SGLang
    return_spec_tokens_details: bool = False
    input_ids: Any = None
    sampling_params: dict[str, Any] = {}


class Reply(Protocol):
    """One answer on one wire."""

    def events(self, begin: int, end: int) -> list[Any]:
        """The events of a step that sent the tokens from `begin` to `end`, and at the answer's end
        those that follow. Bytes go out as they are."""
        ...

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        ...


def sse(events: Iterable[Any]) -> bytes:
    """Events as server-sent events."""
    encode = msgspec.json.encode
    return b"".join([e if isinstance(e, bytes) else b"data: %b\n\n" % encode(e) for e in events])


def _text(ids: Iterable[int]) -> str:
    return "".join([TEXT[i] for i in ids])


def _usage(answer: Answer, sent: int) -> dict[str, Any]:
    isl = len(answer.prompt)
    return {"prompt_tokens": isl, "total_tokens": isl + sent, "completion_tokens": sent}


def _details(answer: Answer) -> dict[str, Any]:
    return {"prompt_tokens_details": {"cached_tokens": answer.cached}}


def _why(answer: Answer, end: int) -> str | None:
    return answer.finish if end == len(answer.ids) else None


def _head(ask: Ask, number: int, model: str, api: str) -> dict[str, Any]:
    chat = api == "chat"
    short, kind = ("chatcmpl", "chat.completion") if chat else ("cmpl", "text_completion")
    kind += ".chunk" if chat and ask.stream else ""
    head = {"id": f"{short}-simulated-{number}", "object": kind, "created": int(time.time())}
    return head | {"model": model}


# ── vLLM ─────────────────────────────────────────────────────────────────────────────────────────


class VllmReply:
    """An event a step; usage and the own acceptance at the end (vLLM 0.32)."""

    def __init__(self, ask: Ask, answer: Answer, number: int, api: str) -> None:
        self._head = _head(ask, number, answer.model, api)
        options = ask.stream_options or {}
        self._usage = options.get("include_usage")
        self._continuous = self._usage and options.get("continuous_usage_stats")
        self._prompt = {"prompt_token_ids": answer.prompt.tolist()} if ask.return_token_ids else {}
        self._key = ("delta" if ask.stream else "message") if api == "chat" else "text"
        self._answer, self._settings = answer, answer.settings

    def events(self, begin: int, end: int) -> list[Any]:
        choice, found = self._choice(begin, end), []
        if begin == 0 and self._key == "delta":
            role: dict[str, Any] = {"index": 0, "delta": {"role": "assistant", "content": ""}}
            role |= {"logprobs": None, "finish_reason": None}
            found.append(self._event([role], 0) | self._prompt)
        elif self._prompt and self._key == "text":
            choice |= self._prompt if begin == 0 else {"prompt_token_ids": None}
        found.append(self._event([choice], end))
        if end == len(self._answer.ids):
            found += [{**self._head, "choices": [], **self._figures()}] if self._usage else []
            return [*found, DONE]
        return found

    def whole(self) -> dict[str, Any]:
        return {**self._head, "choices": [self._choice(0, self._answer.sent)], **self._figures()}

    def _event(self, choices: list[Any], sent: int) -> dict[str, Any]:
        body = {**self._head, "choices": choices}
        return body | {"usage": _usage(self._answer, sent)} if self._continuous else body

    def _choice(self, begin: int, end: int) -> dict[str, Any]:
        ids, key = self._answer.ids[begin:end].tolist(), self._key
        role = {"role": "assistant"} if key == "message" else {}
        said: Any = _text(ids) if key == "text" else {**role, "content": _text(ids)}
        row = {"index": 0, key: said, "logprobs": None, "finish_reason": _why(self._answer, end)}
        row["stop_reason"] = None
        return row | {"token_ids": ids} if self._prompt else row

    def _figures(self) -> dict[str, Any]:
        """Usage and, as --per-request-spec-decode-metrics detailed has it, the own acceptance."""
        answer = self._answer
        figures: dict[str, Any] = {"usage": _usage(answer, answer.sent) | _details(answer)}
        figures["system_fingerprint"] = VERSION
        if self._settings.method == "none" or not self._settings.per_request_metrics:
            return figures
        k, drafts, accepted = self._settings.draft_depth, len(answer.accepted), sum(answer.accepted)
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


# ── SGLang ───────────────────────────────────────────────────────────────────────────────────────


class SglangReply:
    """/generate (all so far, or with --incremental-streaming-output what is new); completions."""

    def __init__(self, ask: Ask, answer: Answer, number: int, api: str) -> None:
        self._native = api == "generate"
        self._head = _head(ask, number, answer.model, api)
        self._ask, self._answer, self._settings = ask, answer, answer.settings
        options = ask.stream_options or {}
        self._usage, self._continuous = (
            options.get(name) for name in ("include_usage", "continuous_usage_stats")
        )

    def events(self, begin: int, end: int) -> list[Any]:
        last = end == len(self._answer.ids)
        if self._native:
            begin = begin if self._settings.incremental else 0
            return [self._generated(begin, end), *([DONE] if last else [])]
        choice = self._choice(begin, end)
        if self._ask.return_token_ids and begin == 0:
            choice["prompt_token_ids"] = self._answer.prompt.tolist()
        usage = self._counts(end) if self._continuous else None
        found: list[Any] = [{**self._head, "choices": [choice], "usage": usage}]
        if last and self._ask.return_spec_tokens_details and self._settings.draft_depth:
            none = {"spec_cap_length": 0.0, "spec_block_accept_length": 0.0}
            details = self._figures() | none | {"spec_cap_lens_histogram": []}
            more = {"usage": None, "sglext": {"spec_tokens_details": details}}
            found.append({**self._head, "choices": [], **more})
        if last and self._usage:
            usage = _usage(self._answer, end) | {"reasoning_tokens": 0}
            found.append({**self._head, "choices": [], "usage": usage})
        return [*found, DONE] if last else found

    def whole(self) -> dict[str, Any]:
        sent = self._answer.sent
        if self._native:
            return self._generated(0, sent)
        return {**self._head, "choices": [self._choice(0, sent)], "usage": self._counts(sent)}

    def _counts(self, sent: int) -> dict[str, Any]:
        more = {"prompt_tokens_details": None, "reasoning_tokens": 0}
        return _usage(self._answer, sent) | more | {"completion_tokens_details": None}

    def _choice(self, begin: int, end: int) -> dict[str, Any]:
        ids = self._answer.ids[begin:end].tolist()
        row = {"index": 0, "text": _text(ids), "logprobs": None}
        row |= {"finish_reason": _why(self._answer, end), "matched_stop": None}
        return row | {"token_ids": ids} if self._ask.return_token_ids else row

    def _generated(self, begin: int, end: int) -> dict[str, Any]:
        answer = self._answer
        ids, why = answer.ids[begin:end].tolist(), _why(answer, end)
        meta: dict[str, Any] = {"id": self._head["id"], "finish_reason": None}
        meta |= {"prompt_tokens": len(answer.prompt), "weight_version": VERSION}
        meta |= {"num_retractions": answer.preempted, "reasoning_tokens": 0}
        meta |= {"completion_tokens": end, "cached_tokens": answer.cached}
        if why is not None:
            reason = {"length": end} if why == "length" else {"matched": answer.ids[-1]}
            meta["finish_reason"] = {"type": why, **reason}
            meta["e2e_latency"] = answer.last_at - answer.asked_at
            meta |= self._figures() if self._settings.draft_depth else {}
        return {"text": _text(ids), "output_ids": ids, "meta_info": meta}

    def _figures(self) -> dict[str, Any]:
        """Steps without a draft count, the denominator is nominal, and the prefill's token is in
        spec_accept_length: 11 ÷ 4 = 2.75 where 1 + 6 ÷ 4 = 2.5 (engines.md §4.2; golden G14)."""
        answer, k = self._answer, self._settings.draft_depth
        accepted = sum(answer.accepted)
        steps = len(answer.accepted) + answer.own["undrafted"]
        histogram = [answer.accepted.count(j) for j in range(max(answer.accepted, default=0) + 1)]
        histogram[0] += answer.own["undrafted"]
        return {
            "spec_accept_rate": accepted / (steps * k) if steps else 0.0,
            "spec_accept_length": answer.sent / steps if steps else 0.0,
            "spec_num_correct_drafts": accepted,
            "spec_num_proposed_drafts": steps * k,
            "spec_verify_ct": steps,
            "spec_correct_drafts_histogram": histogram,
        }


# ── TensorRT-LLM ─────────────────────────────────────────────────────────────────────────────────

_TRT_FIELDS = (
    "model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty"
    " seed stop stream stream_options suffix temperature top_p user use_beam_search top_k top_p_min"
    " min_p repetition_penalty length_penalty early_stopping stop_token_ids min_tokens ignore_eos"
    " include_stop_str_in_output skip_special_tokens spaces_between_special_tokens detokenize"
    " truncate_prompt_tokens add_special_tokens response_format prompt_ignore_length"
)
"""What its strict schema takes (openai_protocol.py @0076e939): anything else is a 400."""


class TrtReply:
    """An event an iteration; token ids where `detokenize` is false (1.4.0rc1)."""

    def __init__(self, ask: Ask, answer: Answer, number: int, api: str) -> None:
        self._head = _head(ask, number, answer.model, api)
        options = ask.stream_options
        self._usage = options is not None and options.get("include_usage", True)
        self._continuous = self._usage and (options or {}).get("continuous_usage_stats")
        self._ids, self._answer, self._passes = not ask.detokenize, answer, 0

    def events(self, begin: int, end: int) -> list[Any]:
        self._passes += 1
        usage = self._counts(end) if self._continuous else None
        found: list[Any] = [{**self._head, "choices": [self._choice(begin, end)], "usage": usage}]
        if end < len(self._answer.ids):
            return found
        if self._usage:
            found.append({**self._head, "choices": [], "usage": self._counts(end)})
        return [*found, DONE]

    def whole(self) -> dict[str, Any]:
        sent = self._answer.sent
        self._passes = 1 + len(self._answer.accepted) + self._answer.own["undrafted"]
        return {**self._head, "choices": [self._choice(0, sent)], "usage": self._counts(sent)}

    def _counts(self, sent: int) -> dict[str, Any]:
        return _usage(self._answer, sent) | _details(self._answer)

    def _choice(self, begin: int, end: int) -> dict[str, Any]:
        """avg_decoded_tokens_per_iter counts the prefill's pass: 11 ÷ 5, where AL is 10 ÷ 4."""
        ids = self._answer.ids[begin:end].tolist()
        row: dict[str, Any] = {"index": 0, "text": "" if self._ids else _text(ids)}
        row |= {"token_ids": ids if self._ids else None, "logprobs": None}
        row |= {"finish_reason": _why(self._answer, end), "stop_reason": None}
        return row | {"avg_decoded_tokens_per_iter": end / self._passes}


# ── llama.cpp ────────────────────────────────────────────────────────────────────────────────────


class LlamaReply:
    """An event a token and one that closes; all tokens of a step bear one predicted_ms (b11434)."""

    def __init__(self, ask: Ask, answer: Answer, number: int, api: str) -> None:
        self._ask, self._answer, self._chat = ask, answer, api == "chat"
        self._native = api == "completion"
        self._head = _head(ask, number, answer.model, api) | {"system_fingerprint": VERSION}

    def events(self, begin: int, end: int) -> list[Any]:
        found: list[Any] = []
        if begin == 0 and self._chat:
            found.append(self._event({"delta": {"role": "assistant", "content": None}}))
        timings = self._timings(end)
        for at in range(begin, end):
            one = self._answer.ids[at]
            found.append(self._token(one, at + 1) | self._timed(timings, at + 1))
        if end == len(self._answer.ids):
            found += self._closing(timings)
        return found

    def whole(self) -> dict[str, Any]:
        answer, sent = self._answer, self._answer.sent
        if self._native:
            ids = answer.ids.tolist()
            tokens = ids if self._ask.return_tokens else []
            return self._final() | {"content": _text(ids), "tokens": tokens}
        text = _text(answer.ids)
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        more = {"usage": self._counts(), "timings": self._timings(sent)}
        return self._event(said, answer.finish) | more

    def _token(self, token: int, count: int) -> dict[str, Any]:
        text = TEXT[token]
        if not self._native:
            return self._event({"delta": {"content": text}} if self._chat else {"text": text})
        ids = [token] if self._ask.return_tokens else []
        row = {"index": 0, "content": text, "tokens": ids, "stop": False, "id_slot": -1}
        return row | {"tokens_predicted": count, "tokens_evaluated": len(self._answer.prompt)}

    def _timed(self, timings: dict[str, Any], count: int) -> dict[str, Any]:
        return {"timings": timings | {"predicted_n": count}} if self._ask.timings_per_token else {}

    def _closing(self, timings: dict[str, Any]) -> list[Any]:
        """/completion sends no [DONE]; chat puts usage and timings on an event of their own."""
        if self._native:
            return [self._final()]
        more = {"usage": self._counts(), "timings": timings}
        if not self._chat:
            return [self._event({"text": ""}, self._answer.finish) | more, DONE]
        return [
            self._event({"delta": {}}, self._answer.finish),
            {**self._head, "choices": []} | more,
            DONE,
        ]

    def _event(self, said: dict[str, Any], why: str | None = None) -> dict[str, Any]:
        row = {**said, "index": 0, "finish_reason": why}
        return {"choices": [row if self._chat else row | {"logprobs": None}], **self._head}

    def _final(self) -> dict[str, Any]:
        answer = self._answer
        row = {"index": 0, "content": "", "tokens": [], "id_slot": 0, "stop": True}
        row |= {"model": answer.model, "tokens_predicted": answer.sent}
        row |= {"tokens_evaluated": len(answer.prompt), "truncated": False}
        row["stop_type"] = "limit" if answer.finish == "length" else "eos"
        return row | {"tokens_cached": answer.held, "timings": self._timings(answer.sent)}

    def _counts(self) -> dict[str, Any]:
        return _usage(self._answer, self._answer.sent) | _details(self._answer)

    def _timings(self, count: int) -> dict[str, Any]:
        answer = self._answer
        spent = max((answer.last_at - answer.first_at) * 1e3, 0.001)
        prompt, prompt_ms = len(answer.prompt), (answer.first_at - answer.asked_at) * 1e3
        found: dict[str, Any] = {"cache_n": answer.cached, "prompt_n": prompt - answer.cached}
        found |= {"prompt_ms": prompt_ms, "predicted_n": count, "predicted_ms": spent}
        if answer.drafts:  # left out where nothing was drafted
            found |= {"draft_n": sum(answer.drafts), "draft_n_accepted": sum(answer.accepted)}
        return found


# ── the four ─────────────────────────────────────────────────────────────────────────────────────


def error(dialect: str, message: str, kind: str, param: str, status: int) -> dict[str, Any]:
    """The body of an HTTP error; `kind` and `param` as vLLM 0.32 names them."""
    if kind == "Bad Request" and dialect in ("sglang", "trtllm"):  # their schemas' own check
        return {"error": message}
    found: dict[str, Any] = {"message": message, "type": kind, "code": status}
    if dialect == "trtllm":
        return {"object": "error", **found, "param": param or None}
    if dialect == "sglang":
        name = "invalid_request_error" if status < 500 else "internal_error"
        return {"error": found | {"type": name, "retryable": False}}
    if dialect == "llamacpp":
        name = {404: "not_found_error", 500: "server_error"}.get(status, "invalid_request_error")
        too_long = param == "input_tokens"
        return {"error": found | {"type": "exceed_context_size_error" if too_long else name}}
    return {"error": found | {"param": param or None}}


Page = Callable[[Batch], Any]


@dataclass(frozen=True, kw_only=True)
class Speech:
    """A dialect: what it answers to and shows.

    `posts` path → API. `pages` path → page, JSON or text. `known`: the fields a body may have,
    where others are refused. `cuts`: is an answer cut at the context, or else refused?
    """

    reply: Callable[..., Reply]
    posts: Mapping[str, str]
    pages: Mapping[str, Page]
    known: frozenset[str] = frozenset()
    default_max_tokens: int | None = 16
    cuts: bool = True


_OPENAI = {"/v1/completions": "completions"}
_CHAT = {
    "/v1/chat/completions": "chat", "/tokenize": "tokenize", "/detokenize": "detokenize",
}  # fmt: skip
DIALECTS: dict[str, Speech] = {
    "vllm": Speech(
        reply=VllmReply,
        posts=_OPENAI | _CHAT,
        pages={
            "/health": lambda batch: "",
            "/version": lambda batch: {"version": VERSION},
            "/v1/models": pages.long_models,
            "/metrics": pages.vllm_page,
        },
    ),
    "sglang": Speech(
        reply=SglangReply,
        posts=_OPENAI | {"/generate": "generate", "/tokenize": "tokenize"},
        pages={
            "/health": lambda batch: "",
            "/ready": lambda batch: "",
            "/v1/models": pages.long_models,
            "/metrics": pages.sglang_page,
            "/server_info": pages.server_info,
            "/v1/loads": pages.loads,
        },
        cuts=False,
    ),
    "trtllm": Speech(
        reply=TrtReply,
        posts=_OPENAI | {"/tokenize": "tokenize"},
        pages={
            "/health": lambda batch: "",
            "/version": lambda batch: {"version": VERSION},
            "/v1/models": pages.models,
            "/metrics": pages.trt_rows,
            "/prometheus/metrics": pages.trt_page,
        },
        known=frozenset(_TRT_FIELDS.split()),
        default_max_tokens=None,
    ),
    "llamacpp": Speech(
        reply=LlamaReply,
        posts=_OPENAI | _CHAT | {"/completion": "completion", "/apply-template": "template"},
        pages={
            "/health": lambda batch: {"status": "ok"},
            "/v1/models": pages.llama_models,
            "/metrics": pages.llama_page,
            "/props": pages.props,
            "/slots": pages.slots,
        },
        default_max_tokens=None,
    ),
}
