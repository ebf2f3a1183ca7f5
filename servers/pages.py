"""The simulator's pages in its four dialects: metrics as text or JSON, models, versions, settings.

What an engine counts, when, and what it leaves out, by engines.md §4 and real-engines.md: vLLM 0.32
counts each step, SGLang 0.5.23, TensorRT-LLM 1.4.0rc1 and llama.cpp b11434 when a request ends.
Must not: decide what happens.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

from loadgen import __version__
from servers import vllm
from servers.simulated import NAMES, Batch, Bins, Iteration, positions

OWNED_BY = {"vllm": "draftload-simulator", "sglang": "sglang", "trtllm": "tensorrt_llm"}
OWNED_BY |= {"llamacpp": "llamacpp"}
"""As /v1/models says it; in vLLM's dialect, the simulator's own name: it is an engine to attach to.
In the others the model's id tells."""
VERSION = f"{__version__}-simulated"

Row = tuple[str, str, Mapping[str, str], float]
"""Family, type, labels, value."""


def _page(rows: Iterable[Row]) -> str:
    lines: dict[str, None] = {}
    for name, kind, labels, value in rows:
        lines |= {f"# HELP {name} Simulated.": None, f"# TYPE {name} {kind}": None}
        inside = ",".join([f'{key}="{text}"' for key, text in sorted(labels.items())])
        lines[f"{name}{{{inside}}} {value}" if inside else f"{name} {value}"] = None
    return "\n".join(lines) + "\n"


def _histogram(name: str, labels: Mapping[str, str], bins: Bins) -> str:
    """The lines of one, under its bare name's type, as the text format has it."""
    inside = ",".join([f'{key}="{text}"' for key, text in sorted(labels.items())])
    bounds = [*map(str, bins.bounds), "+Inf"]
    below = list(accumulate(bins.counts))
    rows = zip(bounds, below, strict=True)
    lines = [f"# HELP {name} Simulated.", f"# TYPE {name} histogram"]
    lines += [f'{name}_bucket{{{inside},le="{bound}"}} {count}' for bound, count in rows]
    lines += [f"{name}_sum{{{inside}}} {bins.total}", f"{name}_count{{{inside}}} {below[-1]}", ""]
    return "\n".join(lines)


def _held(batch: Batch) -> int:
    return sum(a.held for a in batch.running)


def models(batch: Batch, **more: Any) -> dict[str, Any]:
    card: dict[str, Any] = {"id": batch.model, "object": "model", "created": 0}
    card |= {"owned_by": OWNED_BY[batch.settings.dialect]}
    return {"object": "list", "data": [card | more]}


def long_models(batch: Batch) -> dict[str, Any]:
    return models(batch, max_model_len=batch.max_model_len)


def llama_models(batch: Batch) -> dict[str, Any]:
    return models(batch, aliases=[batch.model], tags=[], meta={"n_ctx": batch.max_model_len})


# ── vLLM ──────────────────────────────────────────────────────────────────────────────────────────


VLLM_LATENCIES = {
    "vllm:time_to_first_token_seconds": "ttft_s",
    "vllm:request_time_per_output_token_seconds": "tpot_s",
    "vllm:request_decode_time_seconds": "decode_s",
    "vllm:e2e_request_latency_seconds": "e2el_s",
}


def vllm_page(batch: Batch) -> str:
    """vLLM's families (0.32), those of speculation only where there is any."""
    settings, tally = batch.settings, batch.overall()
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
        drafts, accepted = positions(tally, settings.draft_depth)
        totals = {"drafts": drafts, "draft_tokens": tally["draft_tokens"]}
        totals["accepted_tokens"] = sum(accepted)
        rows += [(f"{vllm.SPEC}num_{n}_total", "counter", by, v) for n, v in totals.items()]
        name = f"{vllm.SPEC}num_accepted_tokens_per_pos_total"
        rows += [(name, "counter", by | {"position": str(j)}, n) for j, n in enumerate(accepted)]
    times = [_histogram(name, by, batch.latencies[of]) for name, of in VLLM_LATENCIES.items()]
    return _page(rows) + "".join(times)


# ── SGLang ────────────────────────────────────────────────────────────────────────────────────────


def sglang_page(batch: Batch) -> str:
    """Counters of finished requests; gauges that move every 40 iterations and are 0 without
    speculation (0.5.23)."""
    done, k = batch.done, batch.settings.draft_depth
    front = {"engine_type": "unified", "model_name": batch.model}
    ranks = front | {"moe_ep_rank": "0", "pp_rank": "0", "tp_rank": "0"}
    streaming = front | {"is_streaming": "true"}
    held, tally = _held(batch), batch.overall()
    verified = sum(positions(done, k)[:1]) + done["undrafted"] if k else 0
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


def server_info(batch: Batch) -> dict[str, Any]:
    settings, k = batch.settings, batch.settings.draft_depth
    algorithm = {"eagle3": "EAGLE3", "mtp": "EAGLE", "ngram": "NGRAM", "draft_model": "STANDALONE"}
    figures = positions(batch.overall(), k)
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


def loads(batch: Batch) -> dict[str, Any]:
    load: dict[str, Any] = {"dp_rank": 0, "num_running_reqs": len(batch.running)}
    load["num_waiting_reqs"] = len(batch.waiting)
    load["speculative"] = dict(zip(("accept_length", "accept_rate"), batch.shown, strict=True))
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    head = {"timestamp": stamp, "version": VERSION, "accelerator": "simulated"}
    return head | {"num_accelerators": 1, "loads": [load]}


# ── TensorRT-LLM ──────────────────────────────────────────────────────────────────────────────────


def trt_rows(batch: Batch) -> list[dict[str, Any]]:
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


def trt_page(batch: Batch) -> str:
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
    drafts, accepted = positions(done, k)
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


# ── llama.cpp ─────────────────────────────────────────────────────────────────────────────────────


def llama_page(batch: Batch) -> str:
    """Counters that move when a request ends; speculation's are zeros without it."""
    done = batch.done
    drafts, accepted = positions(done, batch.settings.draft_depth)
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


def props(batch: Batch) -> dict[str, Any]:
    """/props: the build says what this is."""
    settings = {"params": {}, "n_ctx": batch.max_model_len}
    more = {"model_path": batch.model, "endpoint_slots": True, "endpoint_metrics": True}
    head = {"default_generation_settings": settings, "total_slots": batch.settings.max_running}
    return head | {"model_alias": batch.model, **more, "build_info": VERSION}


def slots(batch: Batch) -> list[dict[str, Any]]:
    settings = batch.settings
    params = {"speculative.types": f"none,{NAMES[settings.method]}"} if settings.draft_depth else {}
    row = {"n_ctx": batch.max_model_len, "speculative": settings.draft_depth > 0}
    used = len(batch.running)
    rows = [{"id": n, **row, "is_processing": n < used} for n in range(settings.max_running)]
    return [r | {"params": params} if r["is_processing"] and params else r for r in rows]
