"""TensorRT-LLM: how to start trtllm-serve with its YAML, speak to it, and read its two pages.

Facts: read in the source of the 1.3/1.4 line, never seen on a live server. What to know of its
figures: per-position counters are of finished requests; `/metrics` is JSON, a row an iteration, and
every GET empties it, so it is read only where `/prometheus/metrics` is not mounted, by us alone,
into running sums. Running and waiting are of the last iteration's beginning, so on an idle server
they stay above zero. Must not: import tensorrt_llm, derive a figure from counters.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from loadgen.errors import UserError, nearest
from loadgen.protocol import chat_wire, completions_wire
from loadgen.types import (
    FILES,
    LOST,
    Count,
    Depth,
    Engine,
    Request,
    Sampling,
    ServerConfig,
    ServerFacts,
    ServerLoad,
    SpecConfig,
    SpecCounters,
    Wire,
)
from loadgen.written import (
    chain_depth,
    drafter_fits,
    flags,
    known_method,
    known_options,
    refuse_ours,
)
from servers.series import amount, by_position, rows, total

_QUEUED = "request_queue_time_seconds"
_AT = "token_position"
ROWS = "iterations:"
"""Our series of the JSON page: sums over its rows, and the last row's gauges by rank."""

# ── its pages ────────────────────────────────────────────────────────────────────────────────────


def counters(samples: Mapping[str, float]) -> SpecCounters:
    """Cumulative counters of either page. `drafts` are steps that had a draft: each drafts at
    position 0, or was counted in its row. A family that is absent is None.

    1.2 named its families with `trtllm_`, 1.1 without.
    """
    if any(series.startswith(ROWS) for series in samples):
        return SpecCounters(
            drafts=_whole(samples.get(f"{ROWS}numRequestsWithDraftTokens")),
            draft_tokens=_whole(samples.get(f"{ROWS}numDraftTokens")),
            accepted_tokens=_whole(samples.get(f"{ROWS}numAcceptedTokens")),
            requests=_whole(samples.get(f"{ROWS}numCompletedRequests")),
        )
    drafted = by_position(samples, _AT, *_names("spec_decode_drafted_tokens_total"))
    accepted = by_position(samples, _AT, *_names("spec_decode_accepted_tokens_total"))
    if drafted is not None:  # a position that never accepted has no series of its own
        accepted = (*(accepted or ()), *[0] * len(drafted))[: len(drafted)]
    return SpecCounters(
        drafts=drafted[0] if drafted else None,
        draft_tokens=_total(samples, "spec_decode_num_draft_tokens_total")
        if drafted is None
        else sum(drafted),
        accepted_tokens=_total(samples, "spec_decode_num_accepted_tokens_total")
        if drafted is None
        else sum(accepted or ()),
        accepted_by_position=accepted,
        drafted_by_position=drafted,
        generated_tokens=_total(samples, "generation_tokens_total"),
        prompt_tokens=_total(samples, "prompt_tokens_total"),
        requests=_total(samples, "request_success_total"),
    )


def load(samples: Mapping[str, float]) -> ServerLoad:
    """As the last iteration began. Rows have a rank each under attention DP: running requests are
    summed, the queue is rank 0's, the cache a mean."""
    if any(series.startswith(ROWS) for series in samples):
        used, most = (rows(samples, f"{ROWS}{n}NumBlocks").values() for n in ("used", "max"))
        return ServerLoad(
            running=_total(samples, f"{ROWS}numActiveRequests"),
            waiting=_whole(samples.get(f'{ROWS}numQueuedRequests{{rank="0"}}')),
            kv_cache_use=sum(used) / sum(most) if sum(most) else None,
        )
    kv = rows(samples, *_names("kv_cache_utilization")).values()
    return ServerLoad(
        running=_total(samples, "num_requests_running"),
        waiting=_total(samples, "num_requests_waiting"),
        kv_cache_use=sum(kv) / len(kv) if kv else None,
        prefix_hit_tokens=_total(samples, "prompt_cached_tokens_total"),
        prefix_asked_tokens=_total(samples, "prompt_tokens_total"),
        queue_time_s=amount(samples, *_names(f"{_QUEUED}_sum")),
        queued=_total(samples, f"{_QUEUED}_count"),
    )


def describe(pages: Mapping[str, Any], samples: Mapping[str, float]) -> ServerFacts:
    """Version from /version; speculation and context from the labels of the `_config_info` gauges.

    Without Prometheus, rows with speculation's figures say "on", rows without them "off".
    """
    page = pages.get("/version")
    version = page.get("version") if isinstance(page, dict) else None
    spec, model = (_labels(samples, f"{name}_config_info") for name in ("speculative", "model"))
    told = {"true": "on", "false": "off"}.get(spec.get("spec_enabled", "").lower())
    if told is None and f"{ROWS}rows" in samples:
        told = "on" if f"{ROWS}numDraftTokens" in samples else "off"
    parts = [spec.get(f"spec_{key}") for key in ("method", "num_tokens", "draft_model")]
    names = ("method", "draft tokens", "draft model")
    return ServerFacts(
        version=version if isinstance(version, str) else None,
        max_model_len=_number(model.get("max_model_len"), 1 << 30),
        max_running=_total(samples, "max_num_active_requests") or None,
        state="on" if told == "on" else "off" if told == "off" else "unknown",
        draft_depth=_number(spec.get("spec_num_tokens"), 1000) if told == "on" else None,
        spec_reported=", ".join(f"{n} {p}" for n, p in zip(names, parts, strict=True) if p) or None
        if told == "on"
        else None,
    )


def _names(family: str) -> tuple[str, str]:
    """With the prefix, and without it."""
    return f"trtllm_{family}", family


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _number(label: str | None, most: int) -> int | None:
    known = label is not None and re.fullmatch(r"[1-9][0-9]{0,8}", label)
    return int(label or 0) if known and int(label or 0) <= most else None


def _total(samples: Mapping[str, float], family: str) -> int | None:
    return total(samples, *_names(family))


def _labels(samples: Mapping[str, float], family: str) -> dict[str, str]:
    series = next(iter(rows(samples, *_names(family))), "")
    return dict(re.findall(r'[{,](\w+)="((?:[^"\\]|\\.)*)"', series))


class _Spec(msgspec.Struct, rename="camel"):
    num_draft_tokens: Count
    num_accepted_tokens: Count
    num_requests_with_draft_tokens: Count


class _Cache(msgspec.Struct, rename="camel"):
    used_num_blocks: Count
    max_num_blocks: Count


class _Row(msgspec.Struct, rename="camel"):
    """One iteration of one rank."""

    iter: Count
    num_active_requests: Count = 0
    num_queued_requests: Count = 0
    num_completed_requests: Count = 0
    attention_dp_rank: Depth = 0
    spec_decoding_stats: _Spec | None = None
    kv_cache_stats: _Cache | None = None


_page = msgspec.json.Decoder(list[_Row])


def drain(page: str, sums: Mapping[str, float]) -> dict[str, float]:
    """The running sums with the page's rows added; LOST counts iterations that are not there.

    A row that drafted nothing (prefill) adds no draft. `iter` of a rank grows by one a row; where
    it jumps, another reader took rows or the server's buffer of 1,000 ran over. An empty page
    leaves the gauges out: no iteration ended since, or its rows are still to come.
    """
    try:
        rows = _page.decode(page)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as fault:
        raise ValueError(f"expected a list of iterations: {fault}") from None
    kept = {k: v for k, v in sums.items() if "{" not in k or k.startswith(f"{ROWS}iter{{")}
    found = defaultdict(float, kept)
    for row in rows:
        rank = f'{{rank="{row.attention_dp_rank}"}}'
        before = found.get(f"{ROWS}iter{rank}")
        if before is not None and row.iter != before + 1:
            found[LOST] += max(row.iter - before - 1, 1)
        found[f"{ROWS}iter{rank}"] = row.iter
        found[f"{ROWS}rows"] += 1
        found[f"{ROWS}numCompletedRequests"] += row.num_completed_requests
        found[f"{ROWS}numActiveRequests{rank}"] = row.num_active_requests
        found[f"{ROWS}numQueuedRequests{rank}"] = row.num_queued_requests
        if (cache := row.kv_cache_stats) is not None:
            found[f"{ROWS}usedNumBlocks{rank}"] = cache.used_num_blocks
            found[f"{ROWS}maxNumBlocks{rank}"] = cache.max_num_blocks
        if (spec := row.spec_decoding_stats) is not None:
            drafted = spec.num_draft_tokens > 0
            found[f"{ROWS}numDraftTokens"] += spec.num_draft_tokens
            found[f"{ROWS}numAcceptedTokens"] += drafted * spec.num_accepted_tokens
            drafts = drafted * spec.num_requests_with_draft_tokens
            found[f"{ROWS}numRequestsWithDraftTokens"] += drafts
    return dict(found)


# ── its wire ─────────────────────────────────────────────────────────────────────────────────────

# Its schema answers 400 to a field that it does not know; of ours it knows all (1.4).
_TEXT, _IDS = completions_wire({}), completions_wire({"detokenize": False})


def _encode(request: Request, model: str, sampling: Sampling) -> bytes:
    """Ids come in the chunks only in place of text, which a later turn's prompt needs; there
    continuous usage counts the tokens."""
    wire = _TEXT if request.dialogue.prompt.later_turns else _IDS
    return wire.encode(request, model, sampling)


# ── how it is started ────────────────────────────────────────────────────────────────────────────

_COMMON = (
    "max_concurrency draft_len_schedule load_format use_rejection_sampling"
    " advanced_sampling_mode enable_penalty"
)
_EAGLE3 = (
    "eagle3_one_model eagle3_layers_to_capture eagle3_model_arch use_dynamic_tree"
    " dynamic_tree_max_topK eagle_choices sa_config"
)
_MTP = (
    "use_relaxed_acceptance_for_thinking relaxed_topk relaxed_delta use_mtp_vanilla"
    " mtp_eagle_one_model begin_thinking_phase_token end_thinking_phase_token sa_config"
)
_DFLASH = "mask_token_id target_layer_ids attention_backend spec_dec_variant context_recompute_tail"
# method → decoding_type (1.4), whether it takes a draft model, its own keys.
_METHODS: dict[str, tuple[str, bool, str]] = {
    "ngram": ("NGram", False, "max_matching_ngram_size is_keep_all is_use_oldest is_public_pool"),
    "draft_model": ("Draft_Target", True, ""),
    "eagle3": ("Eagle3", True, _EAGLE3),
    "mtp": ("MTP", False, _MTP),
    "dflash": ("DFlash", True, _DFLASH),
    "pard": ("PARD", True, "mask_token_id sa_config"),
    "sa": ("SA", False, "max_matching_ngram_size enable_global_pool global_pool_size"),
}
_OURS = {
    "decoding_type": "method",
    "speculative_model": "draft_model",
    "speculative_model_dir": "draft_model",
    "max_draft_len": "draft_depth",
    "num_nextn_predict_layers": "draft_depth",
    "max_total_draft_tokens": "draft_tokens",
}
# Pools shared by requests, off unless asked for: an answer would depend on those before it.
_POOLS = {"ngram": {"is_public_pool": False}, "sa": {"enable_global_pool": False}}


def speculative_config(spec: SpecConfig) -> dict[str, Any]:
    """`speculative_config` of the YAML. UserError: unknown, missing or contradicting settings."""
    kind, drafter, own = _METHODS[known_method(spec, tuple(_METHODS), "trtllm")]
    where = f"trtllm, method '{spec.method}'"
    refuse_ours(spec, _OURS, "trtllm")
    _refuse_ending(spec, where)
    options = known_options(spec, frozenset(f"{_COMMON} {own}".split()), "trtllm")
    drafter_fits(spec, "required" if drafter else "none", "trtllm")
    depth, nodes = _shape(spec, options, where)
    # MTP alone takes its depth from the checkpoint.
    if depth is None and spec.method != "mtp":
        raise UserError(f"{where}: expected draft_depth, the tokens drafted ahead.")
    _check(options, where)
    if (schedule := options.get("draft_len_schedule")) is not None:
        options["draft_len_schedule"] = _schedule(schedule, where)
    if "sa_config" in options:
        options["sa_config"] = _enhancer(options["sa_config"], where)
    told = {
        "decoding_type": kind,
        "speculative_model": spec.draft_model,
        "max_draft_len": depth,
        "max_total_draft_tokens": nodes,
    }
    merged = told | _POOLS.get(spec.method, {}) | options
    return {key: value for key, value in merged.items() if value is not None}


def _refuse_ending(spec: SpecConfig, where: str) -> None:
    """Keys that end speculation for good in mid-run."""
    for key in spec.options:
        if key.startswith("acceptance_"):
            raise UserError(
                f"{where}, '{key}': it switches speculation off for good once acceptance falls, so "
                "half of a run would be measured without. Leave it out; max_concurrency and "
                "draft_len_schedule adapt to the load and back."
            )


def _shape(spec: SpecConfig, options: Mapping[str, Any], where: str) -> tuple[int | None, ...]:
    """max_draft_len and max_total_draft_tokens: equal for a chain, depth and nodes for a tree."""
    choices, width = options.get("eagle_choices"), options.get("dynamic_tree_max_topK", 0)
    if not isinstance(width, int):
        raise UserError(f"{where}, dynamic_tree_max_topK = {width!r}: expected a whole number.")
    if choices is not None and not (
        isinstance(choices, list) and all(isinstance(path, list) for path in choices)
    ):
        raise UserError(f"{where}, eagle_choices = {choices!r}: expected a list of paths.")
    dynamic = bool(options.get("use_dynamic_tree", width))
    if choices is None and not dynamic and not width:
        depth = chain_depth(spec, "trtllm")
        return depth, depth
    if (choices is not None) == dynamic or dynamic != bool(width):
        raise UserError(
            f"{where}: expected dynamic_tree_max_topK (and use_dynamic_tree = true) for a dynamic "
            "tree, or eagle_choices for a static one; they exclude each other."
        )
    depth, nodes = spec.draft_depth, spec.draft_tokens
    if choices is not None:
        depth, nodes = max(map(len, choices), default=0), len(choices)
        if spec.draft_depth not in (None, depth) or spec.draft_tokens not in (None, nodes):
            raise UserError(
                f"{where}: eagle_choices has {nodes} nodes, {depth} deep; draft_tokens and "
                "draft_depth say otherwise. Leave them out or make them agree."
            )
    elif depth is None or nodes is None or not 1 <= depth <= nodes <= depth * width:
        raise UserError(
            f"{where}, a tree of dynamic_tree_max_topK = {width}: expected draft_depth (levels) "
            f"and draft_tokens (nodes), levels ≤ nodes ≤ {width} × levels; got {depth} and {nodes}."
        )
    return depth, nodes


def _check(options: Mapping[str, Any], where: str) -> None:
    if options.get("max_concurrency") is not None and options.get("draft_len_schedule") is not None:
        raise UserError(f"{where}: max_concurrency and draft_len_schedule exclude each other.")
    if options.get("global_pool_size") is not None and not options.get("enable_global_pool"):
        raise UserError(f"{where}: global_pool_size needs enable_global_pool = true.")
    if options.get("max_matching_ngram_size") == 0:
        raise UserError(f"{where}: max_matching_ngram_size = 0; expected 1 or more (SA also -1).")


def _schedule(given: Any, where: str) -> dict[int, int]:
    """{batch size: draft length}; a key of a TOML table is text."""
    try:
        return {int(size): int(length) for size, length in given.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise UserError(
            f"{where}, draft_len_schedule = {given!r}: expected {{ batch size = draft length }}, "
            "as in { 4 = 5, 32 = 2 }."
        ) from None


def _enhancer(given: Any, where: str) -> dict[str, Any]:
    """sa_config as 1.4 takes it (1.2: `use_sa_spec` and `sa_spec_threshold`, not written)."""
    known = ("threshold", "enable_global_pool")
    if not isinstance(given, dict):
        raise UserError(f"{where}, sa_config = {given!r}: expected a table of {', '.join(known)}.")
    for key in given:
        if key not in known:
            hint = nearest(key, known) or f". Known: {', '.join(known)}."
            raise UserError(f"{where}: unknown option 'sa_config.{key}'{hint}")
    return {"enable_global_pool": False} | given


_YAML = "trtllm.yaml"


def files(config: ServerConfig) -> dict[str, str]:
    """The YAML: what makes a benchmark honest, then speculation."""
    # Unknown keys are refused by the server, so only what 1.2 to 1.4 all know stands here.
    settings: dict[str, Any] = {
        "kv_cache_config": {"enable_block_reuse": False},
        "enable_iter_perf_stats": True,
        "return_perf_metrics": True,
        "stream_interval": 1,
    }
    if config.spec is not None:
        if config.spec.method == "ngram":
            settings["disable_overlap_scheduler"] = True  # it drafts on the host (1.4)
        settings["speculative_config"] = speculative_config(config.spec)
    return {_YAML: "\n".join(_yaml(settings)) + "\n"}


def command(config: ServerConfig, port: int) -> list[str]:
    """argv of `trtllm-serve`. `executable` stands for it and may be a prefix, where FILES is the
    folder of the YAML: `docker run -v {files}:{files}:ro … trtllm-serve`."""
    if config.max_running is None:
        raise UserError(
            "trtllm: expected max_running, at least the largest concurrency: its own limit differs "
            "by version and build, and above it requests queue."
        )
    argv = [*(config.executable or ("trtllm-serve",)), config.model]
    argv += ["--host", config.host, "--port", str(port), "--backend", "pytorch"]
    argv += flags(
        {
            "--max_batch_size": config.max_running,
            "--max_seq_len": config.max_model_len,
            "--tp_size": config.tensor_parallel,
            "--served_model_name": config.name,
        }
    )
    return [*argv, "--config", f"{FILES}/{_YAML}", *config.extra_args]


def help_argv(config: ServerConfig) -> list[str]:
    return [*(config.executable or ("trtllm-serve",)), "serve", "--help"]


def _yaml(mapping: Mapping[Any, Any], indent: str = "") -> Iterator[str]:
    """Lines of a block mapping; lists and what they hold in flow style."""
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{_scalar(key)}:"
            yield from _yaml(value, indent + "  ")
        else:
            yield f"{indent}{_scalar(key)}: {_scalar(value)}"


# Words that YAML 1.1 reads as something else than text.
_WORDS = frozenset(["y", "n", "yes", "no", "on", "off", "true", "false", "null"])


def _scalar(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(k)}: {_scalar(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_scalar, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, int):
        return str(value)
    text = str(value)
    if re.fullmatch(r"[A-Za-z][\w./-]*", text, re.ASCII) and text.lower() not in _WORDS:
        return text
    # JSON text is a double-quoted scalar once what YAML does not print is escaped too.
    quoted = json.dumps(text, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff]", lambda m: f"\\u{ord(m[0]):04x}", quoted)


def _float(value: float) -> str:
    if not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    digits, e, exponent = repr(value).partition("e")
    return repr(value) if not e or "." in digits else f"{digits}.0e{exponent}"


ENGINE = Engine(
    name="trtllm",
    wires={
        "completions": Wire(path=_IDS.path, encode=_encode, decode=_IDS.decode),
        "chat": chat_wire({}),
    },
    owned_by=("tensorrt_llm",),
    counters=counters,
    load=load,
    metrics_path="/prometheus/metrics",
    drained_path="/metrics",
    drain=drain,
    settle_s=1.0,  # its loop that feeds the counters turns every 0.5 s
    tick_prefixes=(
        *("trtllm_num_requests_", "trtllm_kv_cache_utilization", "trtllm_num_paused_requests"),
        *("trtllm_spec_decode_", "trtllm_generation_tokens_total", ROWS, LOST),
    ),
    describe_paths=("/version",),
    describe=describe,
    pool_options=("is_public_pool", "enable_global_pool"),
    methods=tuple(_METHODS),
    command=command,
    files=files,
    help=help_argv,
    optional=frozenset(["--served_model_name"]),  # newer than 1.2; else the id is the model's own
    respelled=(("--config", "--extra_llm_api_options"),),
    stop_s=60.0,  # its ranks are grandchildren, and end after the front end's own stop
    verified="not verified on a live server: read in source of the 1.3/1.4 line, and samples "
    "rebuilt from it",
)
