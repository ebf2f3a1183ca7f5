"""SGLang: how to start it, speak to it, and read its pages.

Facts: read in 0.5.23's source, older names in 0.5.9's; nothing was seen on a live server. What to
know of its figures: `spec_verify_ct` counts every decode step, drafted or not, so it fills `steps`
and never `drafts`; accepted drafts are counted before an answer is cut; `num_draft_tokens` holds
the bonus token's slot, so k is one less; proposed drafts are nominal, steps × k; counters move when
a request ends and families that were never touched are absent; gauges move once in
--decode-log-interval steps and keep their last value for 30 s on an idle server. Must not: import
sglang, derive a figure from counters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from loadgen.errors import UserError
from loadgen.protocol import chat_wire, completions_wire, decode_openai, error_text, survivors
from loadgen.types import (
    Chunk,
    Engine,
    Request,
    Sampling,
    ServerConfig,
    ServerFacts,
    ServerLoad,
    SpecConfig,
    SpecCounters,
    Usage,
    Wire,
)
from loadgen.written import (
    Drafter,
    chain_depth,
    drafter_fits,
    flags,
    known_method,
    known_options,
    refuse_ours,
)
from servers.series import amount, rows, total

GENERATED = "sglang:generation_tokens_total"
PROMPTED = "sglang:prompt_tokens_total"
REQUESTS = "sglang:num_requests_total"
VERIFIED = "sglang:spec_verify_calls_total"
WINDOW = "sglang:spec_num_draft_tokens"
SHOWN = "sglang:spec_accept_length"
RUNNING = "sglang:num_running_reqs"
WAITING = "sglang:num_queue_reqs"
KV_USE = "sglang:token_usage"
QUEUED = "sglang:queue_time_seconds"
WORK = "sglang:realtime_tokens_total"

State = Literal["on", "off", "unknown"]


# ── what its pages say ───────────────────────────────────────────────────────────────────────────


def counters(samples: Mapping[str, float]) -> SpecCounters:
    """Cumulative counters of finished requests, aborted ones not among them; `steps` are verify
    calls. Drafts and accepted tokens are told nowhere on the page.
    """
    return SpecCounters(
        steps=total(samples, VERIFIED),
        generated_tokens=total(samples, GENERATED),
        prompt_tokens=total(samples, PROMPTED),
        requests=total(samples, REQUESTS),
    )


def load(samples: Mapping[str, float]) -> ServerLoad:
    """Requests summed over data-parallel ranks; the KV cache's use is their mean."""
    kv = _ranks(samples, KV_USE)
    running, waiting = (_ranks(samples, family) for family in (RUNNING, WAITING))
    return ServerLoad(
        running=round(sum(running)) if running else None,
        waiting=round(sum(waiting)) if waiting else None,
        kv_cache_use=sum(kv) / len(kv) if kv else None,
        prefix_hit_tokens=total(samples, "sglang:cached_tokens_total"),
        prefix_asked_tokens=total(samples, PROMPTED),
        preemptions=total(samples, "sglang:num_retracted_requests_total"),
        queue_time_s=amount(samples, f"{QUEUED}_sum"),
        queued=total(samples, f"{QUEUED}_count"),
    )


_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def _ranks(samples: Mapping[str, float], family: str) -> list[float]:
    """A scheduler gauge, one value a data-parallel rank.

    Tensor- and pipeline-parallel ranks repeat their group's value; rows with a priority are shares
    of the row whose priority is "".
    """
    found: dict[tuple[str | None, ...], float] = {}
    for row, value in rows(samples, family).items():
        labels = dict(_LABEL.findall(row))
        if not labels.get("priority"):
            rank = tuple(labels.get(key) for key in ("model_name", "engine_type", "dp_rank"))
            found[rank] = max(value, found.get(rank, value))
    return list(found.values())


def acceptance_gauge(samples: Mapping[str, float]) -> float | None:
    """Its own acceptance length over the last --decode-log-interval steps, accepted drafts and the
    bonus token a step: the mean over ranks that show one. 0 is what it shows without speculation.
    """
    shown = [value for value in _ranks(samples, SHOWN) if value > 0]
    return sum(shown) / len(shown) if shown else None


_TREES = ("EAGLE", "EAGLE3", "NEXTN", "STANDALONE", "FROZEN_KV_MTP")


def describe(pages: Mapping[str, Any], samples: Mapping[str, float]) -> ServerFacts:
    """What /server_info tells (in 0.5.9 /get_server_info), as the server resolved it."""
    told = [pages.get(path) for path in ("/server_info", "/get_server_info")]
    info: dict[str, Any] = next((page for page in told if isinstance(page, dict)), {})
    algorithm, version = info.get("speculative_algorithm"), info.get("version")
    state: State = "on" if algorithm else "off"
    if "speculative_algorithm" not in info:
        state = _state(samples)
    steps, topk, window = (
        _whole(info.get(f"speculative_{key}"))
        for key in ("num_steps", "eagle_topk", "num_draft_tokens")
    )
    window = window or round(max(_ranks(samples, WINDOW), default=0)) or None
    depth = window - 1 if window else None
    if depth and steps and algorithm in _TREES and (topk or 1) > 1:
        depth = min(steps, depth)
    if info.get("speculative_adaptive"):
        depth = None  # k changes while it runs
    shape = f" (steps {steps}, topk {topk}, draft tokens {window} with the bonus token's)"
    return ServerFacts(
        version=version if isinstance(version, str) else None,
        max_running=_max_running(info),
        state=state,
        draft_depth=depth if state != "off" else None,
        spec_reported=f"{algorithm}{shape}" if isinstance(algorithm, str) else None,
    )


def _state(samples: Mapping[str, float]) -> State:
    """By the metrics page alone. Zeros are also what a server shows that has decoded nothing yet;
    they say "off" once requests of more than one token have ended.
    """
    if total(samples, VERIFIED) or any(_ranks(samples, WINDOW)):
        return "on"
    generated, requests = total(samples, GENERATED), total(samples, REQUESTS)
    decoded = (generated or 0) > (requests or 0)
    return "off" if decoded and _ranks(samples, WINDOW) else "unknown"


def _max_running(info: Mapping[str, Any]) -> int | None:
    """What its memory left of the limit that was asked for, over data-parallel ranks."""
    states = info.get("internal_states")
    limits = [
        _whole(state.get("effective_max_running_requests_per_dp"))
        for state in (states if isinstance(states, list) else [])
        if isinstance(state, dict)
    ]
    known = [limit for limit in limits if limit is not None]
    if known and len(known) == len(limits):
        return sum(known)
    return _whole(info.get("max_running_requests"))


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


# ── how it is spoken to ──────────────────────────────────────────────────────────────────────────


class _Figures(msgspec.Struct, gc=False):
    """Speculation of one request: 0.5.23's names, then those of 0.5.9 and of the releases between.

    The lists may be longer or shorter than k + 1: they end at the largest count seen.
    """

    spec_verify_ct: int | None = None
    spec_num_correct_drafts: int | None = None
    spec_num_proposed_drafts: int | None = None
    spec_correct_drafts_histogram: tuple[int, ...] | None = None
    spec_accepted_drafts: int | None = None
    spec_accept_token_num: int | None = None
    spec_accept_histogram: tuple[int, ...] | None = None

    def counters(self) -> SpecCounters | None:
        """None where no step was verified: speculation is off, or the prefill ended the answer."""
        steps, proposed = self.spec_verify_ct, self.spec_num_proposed_drafts
        if not steps:
            return None
        accepted = self.spec_num_correct_drafts
        for older in (self.spec_accepted_drafts, self.spec_accept_token_num):
            accepted = older if accepted is None else accepted
        # Nominal: steps × nodes a step, so that this is k, or a bound of k where a tree is drafted.
        # The older names' figure took other numbers (sglang#13212) and is not read.
        depth = proposed // steps if proposed and proposed % steps == 0 else None
        histogram = self.spec_correct_drafts_histogram or self.spec_accept_histogram
        if histogram is not None:
            closes = sum(j * n for j, n in enumerate(histogram)) == accepted
            histogram = histogram if closes and sum(histogram) == steps else None
        if histogram is not None and depth is not None:
            histogram += (0,) * (depth + 1 - len(histogram))
        return SpecCounters(
            steps=steps,
            draft_tokens_nominal=proposed,
            draft_depth=depth,
            accepted_tokens=accepted,
            accepted_histogram=histogram,
            accepted_by_position=survivors(histogram) if histogram is not None else None,
        )


class _Reason(msgspec.Struct, gc=False):
    type: str = "unknown"
    message: str | None = None


class _Meta(_Figures, gc=False):
    finish_reason: _Reason | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None


class _Generated(msgspec.Struct, gc=False):
    text: str | None = None
    output_ids: tuple[int, ...] | None = None
    meta_info: _Meta | None = None
    error: Any = None


class _Extension(msgspec.Struct, gc=False):
    spec_tokens_details: _Figures | None = None


class _Extended(msgspec.Struct, gc=False):
    sglext: _Extension | None = None


_generated = msgspec.json.Decoder(_Generated)
_extended = msgspec.json.Decoder(_Extended)
_FAULTS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def decode_generate(payload: bytes) -> Chunk:
    """One event of a `/generate` stream; ValueError when malformed.

    `output_ids` and `text` are the whole answer so far, or with --incremental-streaming-output what
    is new of it; `completion_tokens` is always the whole. Whoever counts tells them apart.
    """
    try:
        event = _generated.decode(payload)
    except _FAULTS as fault:
        raise ValueError(f"malformed event: {fault}") from None
    if event.error is not None:
        return Chunk(error=error_text(event.error))
    meta = event.meta_info or _Meta()
    reason = meta.finish_reason
    if reason is not None and reason.type == "abort":
        return Chunk(error=f"aborted by the server: {reason.message or 'no reason was given'}")
    return Chunk(
        token_ids=event.output_ids,
        tokens_so_far=meta.completion_tokens,
        text=event.text or "",
        usage=Usage(
            prompt_tokens=meta.prompt_tokens,
            completion_tokens=meta.completion_tokens,
            cached_tokens=meta.cached_tokens,
        ),
        spec=meta.counters(),
        finish_reason=None if reason is None else reason.type,
    )


def decode_extended(payload: bytes) -> Chunk:
    """One event of the OpenAI wire, with SGLang's `sglext`; ValueError when malformed."""
    chunk = decode_openai(payload)
    if b'"sglext"' not in payload:
        return chunk
    try:
        extension = _extended.decode(payload).sglext
    except _FAULTS as fault:
        raise ValueError(f"malformed event: {fault}") from None
    if extension is None or extension.spec_tokens_details is None:
        return chunk
    return msgspec.structs.replace(chunk, spec=extension.spec_tokens_details.counters())


def encode_generate(request: Request, model: str, sampling: Sampling) -> bytes:
    """The body of `POST /generate`. It names no model: there is one."""
    del model
    params: dict[str, Any] = {
        "max_new_tokens": request.max_output_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "ignore_eos": sampling.ignore_eos,
    }
    if sampling.seed is not None:
        params["sampling_seed"] = sampling.seed
    ids = request.prompt_token_ids
    body = {"input_ids": [] if ids is None else ids.tolist(), "sampling_params": params}
    return msgspec.json.encode(body | {"stream": True})


_ASKED = {"return_token_ids": True, "return_spec_tokens_details": True}
WIRES: Mapping[str, Wire] = {
    "completions": replace(completions_wire(_ASKED), decode=decode_extended),
    "chat": replace(chat_wire(_ASKED), decode=decode_extended),
    # Older servers give neither ids nor figures on /v1/completions. Else it is the better of the
    # two: what is cumulative here costs the square of the answer's length in bytes.
    "generate": Wire(path="/generate", encode=encode_generate, decode=decode_generate),
}


# ── how it is started ────────────────────────────────────────────────────────────────────────────

DECODE_LOG_INTERVAL = 10
"""Steps between two readings of all scheduler gauges and a log line; SGLang's own is 40."""

_DRAFTER = (
    "draft_model_revision draft_model_quantization draft_load_format draft_kv_cache_dtype"
    " draft_attention_backend attention_mode"
)
_EAGLE = (
    f"{_DRAFTER} eagle_topk accept_threshold_single accept_threshold_acc draft_window_size"
    " draft_sink_size moe_runner_backend moe_a2a_backend adaptive adaptive_config"
    " use_rejection_sampling use_block_verification enable_multi_layer_eagle"
)
_NGRAM = (
    "ngram_min_bfs_breadth ngram_max_bfs_breadth ngram_match_type ngram_max_trie_depth"
    " ngram_capacity ngram_external_corpus_path ngram_external_sam_budget"
    " ngram_external_corpus_max_tokens attention_mode"
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A speculative method: SGLang's algorithm and its options, without `--speculative-`."""

    algorithm: str
    options: str
    draft_model: Drafter = "required"


# token_map (a pruned draft vocabulary) is not among eagle3's: its heads bring their own, and
# SGLang ignores the option there with a warning.
METHODS: Mapping[str, Method] = {
    "ngram": Method(algorithm="NGRAM", options=_NGRAM, draft_model="none"),
    "draft_model": Method(algorithm="STANDALONE", options=f"{_DRAFTER} eagle_topk token_map"),
    "eagle": Method(algorithm="EAGLE", options=f"{_EAGLE} token_map"),
    "eagle3": Method(algorithm="EAGLE3", options=_EAGLE),
    "mtp": Method(algorithm="NEXTN", options=f"{_EAGLE} token_map", draft_model="optional"),
    "dflash": Method(algorithm="DFLASH", options=f"{_DRAFTER} draft_window_size draft_sink_size"),
}
_OURS = {
    "algorithm": "method",
    "draft_model_path": "draft_model",
    "num_steps": "draft_depth",
    "num_draft_tokens": "draft_tokens, without the bonus token's slot",
    "dflash_block_size": "draft_tokens, without the bonus token's slot",
}
_SWITCHES = frozenset(
    ["adaptive", "use_rejection_sampling", "use_block_verification", "enable_multi_layer_eagle"]
)


def _module(prefix: tuple[str, ...]) -> bool:
    return prefix[-1].endswith("launch_server")


def help_argv(config: ServerConfig) -> list[str]:
    prefix = config.executable or ("sglang",)
    return [*prefix, *([] if _module(prefix) else ["serve"]), "--help"]


def command(config: ServerConfig, port: int) -> list[str]:
    """argv of `sglang serve`, prefix cache off, metrics on, a chunk a step.

    `executable` stands for `sglang` and may be a prefix that ends with it (`docker run
    --network host … sglang`), or end with `-m sglang.launch_server`. UserError: no max_running, or
    settings that SGLang has not.
    """
    if config.max_running is None:
        raise UserError(
            "sglang: expected max_running, at least the largest concurrency. With a speculative "
            "method SGLang would silently run 48 requests at a time and queue the rest, without "
            "one thousands: the two could not be compared."
        )
    prefix = config.executable or ("sglang",)
    argv = [*prefix, "--model-path" if _module(prefix) else "serve", config.model]
    argv += ["--host", config.host, "--port", str(port), "--tp-size", str(config.tensor_parallel)]
    argv += ["--max-running-requests", str(config.max_running), "--disable-radix-cache"]
    argv += ["--enable-metrics", "--enable-cache-report", "--stream-interval", "1"]
    argv += ["--decode-log-interval", str(DECODE_LOG_INTERVAL)]
    argv += flags({"--served-model-name": config.name, "--context-length": config.max_model_len})
    if config.spec is not None:
        argv += speculation(config.spec)
    return [*argv, *config.extra_args]


def speculation(spec: SpecConfig) -> list[str]:
    """The flags of one method. UserError: unknown, missing or contradicting settings."""
    method = METHODS[known_method(spec, tuple(METHODS), "sglang")]
    where = f"sglang, method '{spec.method}'"
    refuse_ours(spec, _OURS | {f"speculative_{key}": ours for key, ours in _OURS.items()}, "sglang")
    if spec.method == "eagle3" and "token_map" in spec.options:
        raise UserError(
            f"{where} has no token_map: SGLang ignores it there, as an EAGLE-3 head brings its own "
            "draft vocabulary. Give another head as draft_model, or use method 'eagle'."
        )
    options = known_options(spec, frozenset(method.options.split()), "sglang")
    drafter_fits(spec, method.draft_model, "sglang")
    argv = flags(
        {
            "--speculative-algorithm": method.algorithm,
            "--speculative-draft-model-path": spec.draft_model,
        }
    )
    argv += _window(spec, options, where)
    for key, value in options.items():
        argv += _option(where, key, value)
    return argv


def _window(spec: SpecConfig, options: dict[str, Any], where: str) -> list[str]:
    """Draft length and shape. SGLang counts the verified window: nodes drafted, and the bonus."""
    if "eagle_topk" not in METHODS[spec.method].options.split():
        nodes = chain_depth(spec, "sglang")
        if nodes is None and spec.method != "dflash":
            raise UserError(f"{where}: expected draft_depth, the tokens drafted ahead.")
        return [] if nodes is None else ["--speculative-num-draft-tokens", str(nodes + 1)]
    topk = options.pop("eagle_topk", 1)
    if _whole(topk) is None or topk < 1:
        raise UserError(f"{where}: option eagle_topk = {topk!r}: expected a whole number from 1.")
    depth, drafted = _tree(spec, topk, where) if topk > 1 else _chain(spec, where)
    argv = ["--speculative-num-steps", str(depth), "--speculative-eagle-topk", str(topk)]
    return [*argv, "--speculative-num-draft-tokens", str(drafted + 1)]


def _chain(spec: SpecConfig, where: str) -> tuple[int, int]:
    if spec.draft_depth != spec.draft_tokens and None not in (spec.draft_depth, spec.draft_tokens):
        raise UserError(
            f"{where}: draft_tokens = {spec.draft_tokens} and draft_depth = {spec.draft_depth} "
            "contradict each other in a chain. For a tree give eagle_topk of 2 or more in options."
        )
    depth = chain_depth(spec, "sglang")
    if depth is None:
        raise UserError(f"{where}: expected draft_depth, the tokens drafted ahead.")
    return depth, depth


def _tree(spec: SpecConfig, topk: int, where: str) -> tuple[int, int]:
    depth, nodes = spec.draft_depth, spec.draft_tokens
    if depth is None or nodes is None:
        raise UserError(
            f"{where}: eagle_topk = {topk} drafts a tree. Expected draft_depth, its longest path, "
            "and draft_tokens, its nodes."
        )
    # 0.5.23 chooses the nodes among topk of the first step and topk² of every later one.
    most = topk + (depth - 1) * topk * topk
    if depth < 1 or not depth <= nodes <= most:
        raise UserError(
            f"{where}: draft_tokens = {nodes} with draft_depth = {depth} and eagle_topk = {topk}. "
            f"Expected {depth} to {max(most, depth)} nodes, and a depth of 1 or more."
        )
    return depth, nodes


def _option(where: str, key: str, value: Any) -> list[str]:
    flag = "--" + key.replace("_", "-")
    if key != "enable_multi_layer_eagle":
        flag = "--speculative-" + key.replace("_", "-")
    if key in _SWITCHES:
        if not isinstance(value, bool):
            raise UserError(f"{where}: option {key} = {value!r}: expected true or false.")
        return [flag] if value else []
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: option {key} = {value!r}: expected a number or a text.")
    return [flag, str(value)]


ENGINE = Engine(
    name="sglang",
    wires=WIRES,
    owned_by=("sglang",),
    counters=counters,
    load=load,
    acceptance_gauge=acceptance_gauge,
    metrics_path="/metrics",
    # Gauges keep their last value on an idle server for 30 s, and counters move when a request
    # ends: only this and WORK, which grows every --decode-log-interval steps, tell rest.
    settle_s=0.5,
    work=WORK,
    tick_prefixes=(
        *(RUNNING, WAITING, KV_USE, GENERATED, REQUESTS, VERIFIED),
        *("sglang:spec_", "sglang:cache_hit_rate", "sglang:num_retracted_re"),
    ),
    describe_paths=("/server_info", "/get_server_info"),
    describe=describe,
    chunk_is_step=True,
    remembers=lambda method: method == "ngram",  # one trie for all requests
    methods=tuple(METHODS),
    command=command,
    help=help_argv,
    optional=frozenset(["--enable-cache-report", "--stream-interval", "--decode-log-interval"]),
    # Not /ready, which 0.5.9 has not. /health is 503 until a token can be made, and makes one.
    ready_path="/health",
    # SIGTERM sets a flag that is looked at every 5 s; then it drains without limit.
    stop_s=20.0,
    verified="not verified on a live server: pages and streams rebuilt from the source of 0.5.23",
)
