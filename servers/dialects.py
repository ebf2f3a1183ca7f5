"""How the simulator speaks: the wire, pages and errors of vLLM, SGLang, TensorRT-LLM, llama.cpp.

Shapes as captured (vLLM 0.32.0, llama.cpp b11434) or rebuilt from source (SGLang 0.5.23,
TensorRT-LLM 1.4.0rc1); what an engine counts, when, and what it leaves out, by engines.md §4 and
real-engines.md. Versions, models and system fingerprints say that they are simulated. Chat is
spoken where a chat stream was captured: vLLM and llama.cpp. Must not: decide what happens.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from loadgen import __version__
from loadgen.types import Message
from servers import vllm
from servers.simulated import NAMES, TEXT, Answer, Batch, Iteration

OWNER = "draftload-simulator"
VERSION = f"{__version__}-simulated"
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


def _vllm_page(batch: Batch) -> str:
    """vLLM's families (0.32), those of speculation only where there is any."""
    settings, tally = batch.settings, _all(batch)
    by = {"engine": "0", "model_name": batch.model}
    rows: list[Row] = [
        (vllm.RUNNING, "gauge", by, len(batch.running)),
        (vllm.WAITING, "gauge", by, len(batch.waiting)),
        (vllm.KV_USE, "gauge", by, _held(batch) / batch.kv_tokens),
        ("vllm:prompt_tokens_total", "counter", by, tally["prompt_tokens"]),
        (vllm.GENERATED, "counter", by, tally["generated"]),
        ("vllm:prefix_cache_queries_total", "counter", by, batch.prefix_queries),
        ("vllm:prefix_cache_hits_total", "counter", by, batch.prefix_hits),
        ("vllm:num_preemptions_total", "counter", by, batch.preemptions),
    ]
    for why in ("stop", "length"):
        labels = by | {"finished_reason": why}
        rows += [("vllm:request_success_total", "counter", labels, tally[why])]
    if settings.method != "none":
        drafts, accepted = _positions(tally, settings.draft_depth)
        totals = {"drafts": drafts, "draft_tokens": tally["draft_tokens"]}
        totals["accepted_tokens"] = sum(accepted)
        rows += [(f"{vllm.SPEC}num_{n}_total", "counter", by, v) for n, v in totals.items()]
        name = f"{vllm.SPEC}num_accepted_tokens_per_pos_total"
        rows += [(name, "counter", by | {"position": str(j)}, n) for j, n in enumerate(accepted)]
    return _page(rows)


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


def _sglang_page(batch: Batch) -> str:
    """Counters of finished requests; gauges that move every 40 iterations and are 0 without
    speculation (0.5.23)."""
    done, k = batch.done, batch.settings.draft_depth
    front = {"engine_type": "unified", "model_name": batch.model}
    ranks = front | {"moe_ep_rank": "0", "pp_rank": "0", "tp_rank": "0"}
    streaming = front | {"is_streaming": "true"}
    held, tally = _held(batch), _all(batch)
    verified = sum(_positions(done, k)[:1]) + done["undrafted"] if k else 0
    gauges = {
        "num_running_reqs": len(batch.running),
        "num_queue_reqs": len(batch.waiting),
        "cache_hit_rate": batch.prefix_hits / max(batch.prefix_queries, 1),
        "token_usage": held / batch.kv_tokens,
        "num_used_tokens": held,
        "kv_available_tokens": batch.kv_tokens - held,
        "max_total_num_tokens": batch.kv_tokens,
        "spec_accept_length": batch.shown[0],
        "spec_accept_rate": batch.shown[1],
        "spec_num_steps": k,
        "spec_num_draft_tokens": k + 1 if k else 0,
        "context_len": batch.max_model_len,
    }
    counters = {
        "prompt_tokens_total": done["prompt_tokens"],
        "generation_tokens_total": done["generated"],
        "num_requests_total": done["requests"],
    }
    decoded = tally["generated"] - tally["requests"]
    realtime = ranks | {"mode": "decode"}
    rows: list[Row] = [
        ("sglang:num_retracted_requests_total", "counter", ranks, batch.preemptions),
        ("sglang:realtime_tokens_total", "counter", realtime, decoded),
        ("sglang:spec_verify_calls_total", "counter", front, verified),
        ("sglang:num_aborted_requests_total", "counter", front, batch.aborted),
        *((f"sglang:{name}", "counter", streaming, n) for name, n in counters.items()),
        *((f"sglang:{name}", "gauge", ranks, n) for name, n in gauges.items()),
        ("sglang:num_retracted_reqs", "gauge", ranks | {"pid": "1"}, 0),
    ]
    return _page(rows)


def _server_info(batch: Batch) -> dict[str, Any]:
    settings, k = batch.settings, batch.settings.draft_depth
    algorithm = {"eagle3": "EAGLE3", "mtp": "EAGLE", "ngram": "NGRAM", "draft_model": "STANDALONE"}
    figures = _positions(_all(batch), k)
    average = 1 + sum(figures[1]) / figures[0] if k and figures[0] else None
    return {
        "model_path": batch.model,
        "tp_size": 1,
        "speculative_algorithm": algorithm.get(settings.method),
        "speculative_num_steps": k or None,
        "speculative_eagle_topk": 1 if k else None,
        "speculative_num_draft_tokens": k + 1 if k else None,  # with the bonus slot
        "decode_log_interval": 40,
        "max_running_requests": settings.max_running,
        "context_length": batch.max_model_len,
        "launch_command": f"python -m servers.simulator  # {VERSION}",
        "internal_states": [{"avg_spec_accept_length": average} if average else {}],
        "version": VERSION,
        "frontend": "python",
    }


def _loads(batch: Batch) -> dict[str, Any]:
    load: dict[str, Any] = {"dp_rank": 0, "num_running_reqs": len(batch.running)}
    load["num_waiting_reqs"] = len(batch.waiting)
    load["speculative"] = dict(zip(("accept_length", "accept_rate"), batch.shown, strict=True))
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    head = {"timestamp": stamp, "version": VERSION, "accelerator": "simulated"}
    return head | {"num_accelerators": 1, "loads": [load]}


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


def _trt_rows(batch: Batch) -> list[dict[str, Any]]:
    """GET /metrics: the iterations since the last GET, which it takes away (engines.md §4.3)."""
    rows = [_trt_row(batch, row) for row in batch.rows]
    batch.rows.clear()
    return rows


def _trt_row(batch: Batch, row: Iteration) -> dict[str, Any]:
    settings = batch.settings
    blocks, used = batch.kv_tokens // 32, -(-row.context // 32)
    active, ms = row.decoding + row.begun, row.step_s * 1e3
    inflight = {
        "avgNumDecodedTokensPerIter": 0.0,
        "microBatchId": 0,
        "numContextRequests": row.begun,
        "numCtxKvTokens": 0,
        "numCtxTokens": row.prefilled,
        "numGenKvTokens": row.context,
        "numGenRequests": row.decoding,
        "numPausedRequests": 0,
        "numQueuedContextRequests": row.waiting,
        "numQueuedGenRequests": 0,
        "numScheduledRequests": active,
    }
    drafted = row.with_draft
    spec = {
        "acceptanceLength": (row.accepted + drafted) / drafted if drafted else 0.0,
        "draftOverhead": 0.0,
        "iterLatencyMS": 0.0,
        "numAcceptedTokens": row.accepted,
        "numDraftTokens": row.draft_tokens,
        "numRequestsWithDraftTokens": drafted,
    }
    kv = {"cacheHitRate": 0.0, "freeNumBlocks": blocks - used, "maxNumBlocks": blocks}
    kv |= {"missedBlocks": 0, "reusedBlocks": 0, "tokensPerBlock": 32, "usedNumBlocks": used}
    return {
        "attentionDpRank": 0,
        "inflightBatchingStats": inflight,
        "iter": row.number,
        "iterLatencyMS": ms,
        "kvCacheStats": kv,
        "maxNumActiveRequests": settings.max_running,
        "numActiveRequests": active,
        "numCompletedRequests": row.completed,
        "numNewActiveRequests": row.begun,
        "numQueuedRequests": row.waiting,
        **({"specDecodingStats": spec} if settings.method != "none" else {}),
        "timestamp": time.strftime("%m-%d-%Y %H:%M:%S"),
        "hostStepTimeMS": ms,
        "prevDeviceStepTimeMS": ms,
        "gpuForwardTimeMS": ms,
        "schedulerMode": "overlap",
    }


def _trt_page(batch: Batch) -> str:
    """GET /prometheus/metrics: finished requests by position, the batch in gauges with a pid."""
    settings, done, k = batch.settings, batch.done, batch.settings.draft_depth
    by = {"engine_type": "pytorch", "model_name": batch.model}
    pid = by | {"pid": "1"}
    held, last = _held(batch), batch.rows[-1] if batch.rows else None
    blocks = batch.kv_tokens // 32
    counters = {
        "prompt_tokens_total": done["prompt_tokens"],
        "generation_tokens_total": done["generated"],
        "num_requests_completed_total": done["requests"],
        "prompt_cached_tokens_total": batch.prefix_hits,
    }
    gauges = {
        "kv_cache_utilization": held / batch.kv_tokens,
        "kv_cache_max_blocks": blocks,
        "kv_cache_used_blocks": -(-held // 32),
        "kv_cache_tokens_per_block": 32,
        "num_requests_running": len(batch.running),
        "num_requests_waiting": len(batch.waiting),
        "max_num_active_requests": settings.max_running,
        "iteration_latency_seconds": last.step_s if last else 0.0,
        "num_paused_requests": 0,
        "avg_decoded_tokens_per_iter": 0,
    }
    rows: list[Row] = [(f"trtllm_{n}", "counter", by, v) for n, v in counters.items()]
    for why in ("stop", "length"):
        labels = by | {"finished_reason": why}
        rows += [("trtllm_request_success_total", "counter", labels, done[why])] * (done[why] > 0)
    if k:
        rows += _trt_positions(done, k, by)
        drafted = last.with_draft if last else 0
        mean = (last.accepted + drafted) / drafted if last and drafted else 0.0
        gauges["spec_decode_acceptance_length"] = mean
    rows += [(f"trtllm_{n}", "gauge", pid, v) for n, v in gauges.items()]
    methods = {"eagle3": "Eagle3", "mtp": "MTP", "ngram": "NGram", "draft_model": "Draft_Target"}
    method = methods.get(settings.method, "none")
    config = {"spec_enabled": str(k > 0).lower(), "spec_method": method, "spec_num_tokens": str(k)}
    config["spec_draft_model"] = "simulated" if k else "none"
    model_info = {"max_model_len": str(batch.max_model_len), "model": batch.model, "dtype": "auto"}
    model_info |= {
        "gpu_type": "simulated",
        "quantization": "none",
        "served_model_name": batch.model,
    }
    rows.append(("trtllm_speculative_config_info", "gauge", pid | config, 1))
    rows.append(("trtllm_model_config_info", "gauge", pid | model_info, 1))
    return _page(rows)


def _trt_positions(done: Counter[str | int], k: int, by: Mapping[str, str]) -> list[Row]:
    drafts, accepted = _positions(done, k)
    prefix = "trtllm_spec_decode_"
    rows: list[Row] = [
        (f"{prefix}num_draft_tokens_total", "counter", by, done["draft_tokens"]),
        (f"{prefix}num_accepted_tokens_total", "counter", by, sum(accepted)),
    ]
    for name, counts in (("drafted", [drafts] * k), ("accepted", accepted)):
        rows += [
            (f"{prefix}{name}_tokens_total", "counter", {**by, "token_position": str(j)}, n)
            for j, n in enumerate(counts)
            if n  # a position that never accepted has no series
        ]
    return rows


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


def _llama_page(batch: Batch) -> str:
    """Counters that move when a request ends; speculation's are zeros without it."""
    done = batch.done
    drafts, accepted = _positions(done, batch.settings.draft_depth)
    spec = "llamacpp:spec_decode_num_"
    names = {
        "llamacpp:prompt_tokens_total": done["prompt_tokens"] - batch.prefix_hits,
        "llamacpp:prompt_tokens_cached_total": batch.prefix_hits,
        "llamacpp:tokens_predicted_total": done["generated"],
        "llamacpp:n_decode_total": batch.iterations,
        f"{spec}draft_tokens_total": done["draft_tokens"],
        f"{spec}accepted_tokens_total": sum(accepted),
        f"{spec}drafts_total": drafts,
    }
    rows: list[Row] = [(name, "counter", {}, value) for name, value in names.items()]
    rows.append(("llamacpp:requests_processing", "gauge", {}, len(batch.running)))
    rows.append(("llamacpp:requests_deferred", "gauge", {}, len(batch.waiting)))
    for j, count in enumerate(accepted):
        if count:  # absent until filled
            labels = {"position": str(j)}
            rows.append((f"{spec}accepted_tokens_per_pos_total", "counter", labels, count))
    return _page(rows)


def _props(batch: Batch) -> dict[str, Any]:
    """/props: the build says what this is."""
    settings = {"params": {}, "n_ctx": batch.max_model_len}
    more = {"model_path": batch.model, "endpoint_slots": True, "endpoint_metrics": True}
    head = {"default_generation_settings": settings, "total_slots": batch.settings.max_running}
    return head | {"model_alias": batch.model, **more, "build_info": VERSION}


def _slots(batch: Batch) -> list[dict[str, Any]]:
    settings = batch.settings
    params = {"speculative.types": f"none,{NAMES[settings.method]}"} if settings.draft_depth else {}
    row = {"n_ctx": batch.max_model_len, "speculative": settings.draft_depth > 0}
    used = len(batch.running)
    rows = [{"id": n, **row, "is_processing": n < used} for n in range(settings.max_running)]
    return [r | {"params": params} if r["is_processing"] and params else r for r in rows]


# ── pages ────────────────────────────────────────────────────────────────────────────────────────

Row = tuple[str, str, Mapping[str, str], float]
"""Family, type, labels, value."""


def _page(rows: Iterable[Row]) -> str:
    lines: dict[str, None] = {}
    for name, kind, labels, value in rows:
        lines |= {f"# HELP {name} Simulated.": None, f"# TYPE {name} {kind}": None}
        inside = ",".join([f'{key}="{text}"' for key, text in sorted(labels.items())])
        lines[f"{name}{{{inside}}} {value}" if inside else f"{name} {value}"] = None
    return "\n".join(lines) + "\n"


def _all(batch: Batch) -> Counter[str | int]:
    return sum(batch.tallies.values(), Counter())


def _held(batch: Batch) -> int:
    return sum(a.held for a in batch.running)


def _positions(tally: Counter[str | int], k: int) -> tuple[int, list[int]]:
    """Drafted steps, and of them those that accepted position 1 … k."""
    histogram = [tally[j] for j in range(k + 1)] if k else []
    return sum(histogram), [sum(histogram[j:]) for j in range(1, k + 1)]


def _card(batch: Batch, **more: Any) -> dict[str, Any]:
    owner = DIALECTS[batch.settings.dialect].owned_by
    card = {"id": batch.model, "object": "model", "created": 0, "owned_by": owner}
    return {"object": "list", "data": [card | more]}


def _models(batch: Batch) -> dict[str, Any]:
    return _card(batch, max_model_len=batch.max_model_len)


def _llama_models(batch: Batch) -> dict[str, Any]:
    return _card(batch, aliases=[batch.model], tags=[], meta={"n_ctx": batch.max_model_len})


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
    """A dialect: what it says of itself, answers to and shows.

    `posts` path → API. `pages` path → page, JSON or text. `known`: the fields a body may have,
    where others are refused. `cuts`: is an answer cut at the context, or else refused?
    """

    owned_by: str
    reply: Callable[..., Reply]
    posts: Mapping[str, str]
    pages: Mapping[str, Page]
    known: frozenset[str] = frozenset()
    default_max_tokens: int | None = 16
    cuts: bool = True


_OPENAI = {"/v1/completions": "completions"}
_CHAT = {"/v1/chat/completions": "chat", "/tokenize": "tokenize"}
DIALECTS: dict[str, Speech] = {
    "vllm": Speech(
        owned_by=OWNER,
        reply=VllmReply,
        posts=_OPENAI | _CHAT,
        pages={
            "/health": lambda batch: "",
            "/version": lambda batch: {"version": VERSION},
            "/v1/models": _models,
        }
        | {"/metrics": _vllm_page},
    ),
    "sglang": Speech(
        owned_by="sglang",
        reply=SglangReply,
        posts=_OPENAI | {"/generate": "generate", "/tokenize": "tokenize"},
        pages={"/health": lambda batch: "", "/ready": lambda batch: "", "/v1/models": _models}
        | {"/metrics": _sglang_page, "/server_info": _server_info, "/v1/loads": _loads},
        cuts=False,
    ),
    "trtllm": Speech(
        owned_by="tensorrt_llm",
        reply=TrtReply,
        posts=_OPENAI | {"/tokenize": "tokenize"},
        pages={
            "/health": lambda batch: "",
            "/version": lambda batch: {"version": VERSION},
            "/v1/models": _card,
        }
        | {"/metrics": _trt_rows, "/prometheus/metrics": _trt_page},
        known=frozenset(_TRT_FIELDS.split()),
        default_max_tokens=None,
    ),
    "llamacpp": Speech(
        owned_by="llamacpp",
        reply=LlamaReply,
        posts=_OPENAI | _CHAT | {"/completion": "completion", "/apply-template": "template"},
        pages={"/health": lambda batch: {"status": "ok"}, "/v1/models": _llama_models}
        | {"/metrics": _llama_page, "/props": _props, "/slots": _slots},
        default_max_tokens=None,
    ),
}
