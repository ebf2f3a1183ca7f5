"""What the simulator simulates: step time, acceptance, answers and continuous batching.

A step costs fixed time, the larger of (weights ÷ bandwidth, FLOPs ÷ rate) with a rounded edge, the
KV cache read, and what drafting takes: so speculation pays while a step is bound by memory and
costs once batch × (k + 1) tokens make it bound by arithmetic. Draft position j is accepted with a
probability given that j − 1 was, from published acceptance lengths by category (below; prompts are
told apart by the built-in texts that they hold). Answers depend on seed and prompt alone, never on
the method: speculation is lossless here. Left out: attention's FLOPs, sliding windows, shared KV
blocks, how MoE routing differs between prompts. `Batch.truth` says what really happened, and what
was to be expected. Must not: do I/O, wait, pass for a measurement of any engine.
"""

from __future__ import annotations

import math
import random
import re
import zlib
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from loadgen import __version__
from loadgen.errors import UserError, nearest
from loadgen.metrics import REQUEST_BOUNDS_S, TOKEN_BOUNDS_S, TTFT_BOUNDS_S
from loadgen.types import U32, SpecConfig
from loadgen.written import known_method

Dialect = Literal["vllm", "sglang", "trtllm", "llamacpp"]
PREFIX = "simulated-"
"""Of the model's id: "simulated-70b" stands for the preset "70b"."""
BUILTIN = Path(__file__).parent.parent / "scenarios" / "data" / "qualitative.jsonl"
DEFAULT, TRIVIAL, LATCHED = "default", "trivial", "latched"

# ── the hardware and the models ──────────────────────────────────────────────────────────────────

# NVIDIA H100 SXM5 80 GB data sheet: HBM3 bandwidth, dense BF16 rate, memory. The shares reached of
# them, and the share of memory that an engine takes (vLLM's gpu-memory-utilization), are assumed.
BANDWIDTH, FLOPS, MEMORY = 3.35e12 * 0.75, 989e12 * 0.6, 80e9 * 0.9
EDGE = 3.0
"""Roundness of the roofline: (memory^3 + FLOPs^3)^(1/3). Assumed; kernels near it reach neither."""
SEQUENCE_S = 10e-6
"""Host time a running request: scheduling, sampling, detokenizing. Assumed."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A target on `gpus` (tensor parallel). `active` and `drafts` in parameters, `kv` in bytes.

    Of `weights` bytes, `routed` are experts', of which a token reads `top_k` of `experts`.
    `drafts[method]`: parameters and bytes of one draft pass. `fixed_s`: launches, all-reduces.
    """

    weights: float
    active: float
    kv: float
    gpus: int
    fixed_s: float
    drafts: Mapping[str, tuple[float, float]]
    routed: float = 0.0
    experts: int = 1
    top_k: int = 1

    def kv_tokens(self) -> int:
        """Tokens of KV cache in what the weights leave of the memory."""
        return int((self.gpus * MEMORY - self.weights) / self.kv)

    def weights_read(self, tokens: int) -> float:
        """Bytes of a pass over `tokens`: of the experts, those that independent draws hit."""
        hit = 1 - (1 - self.top_k / self.experts) ** tokens
        return self.weights - self.routed * (1 - hit)


# fixed_s is assumed: 1 ms, and about 20 µs a layer for two all-reduces where there are more GPUs.
# An EAGLE-3 head is one layer on 2 × hidden inputs, a 3 × hidden fusion and its own output matrix;
# an MTP module is one layer of the target and the output matrix; the draft model is Llama-3.2-1B
# (1.24e9 parameters). Bytes at BF16.
_1B = (1.24e9, 2.48e9)
MODELS = {
    # Llama-3.1-8B: 8.03e9 parameters, BF16; KV 32 layers × 8 heads × 128 × 2 × 2 B. Head: attention
    # 67e6, MLP 3 × 4096 × 14336, fusion 50e6, 32,000 outputs 131e6. MTP: 0.22e9 + 0.53e9.
    "8b": Model(
        weights=16.06e9, active=8.03e9, kv=131072, gpus=1, fixed_s=1e-3,
        drafts={"eagle3": (0.425e9, 0.85e9), "mtp": (0.75e9, 1.5e9), "draft_model": _1B},
    ),
    # Llama-3.3-70B: 70.55e9 parameters, BF16; KV 80 layers × 8 heads × 128 × 2 × 2 B. Head:
    # attention 235e6, MLP 3 × 8192 × 28672, fusion 201e6, 32,000 outputs 262e6. MTP: 0.86 + 1.05e9.
    "70b": Model(
        weights=141.1e9, active=70.55e9, kv=327680, gpus=4, fixed_s=2.6e-3,
        drafts={"eagle3": (1.40e9, 2.8e9), "mtp": (1.91e9, 3.82e9), "draft_model": _1B},
    ),
    # gpt-oss-120b (model card): 116.8e9 parameters, 5.13e9 active; experts 114.7e9 at MXFP4 (4.25
    # bits), 128 of which 4 a token, the rest BF16: 65.3 GB as its checkpoint has. KV 18 full layers
    # × 8 heads × 64 × 2 × 2 B. Head with all 201,088 outputs, MLP 6 × hidden (assumed): 0.79e9.
    # MTP, which the model has not: one layer's experts 1.7e9 bytes and the outputs 1.16e9 bytes.
    "moe": Model(
        weights=65.3e9, active=5.13e9, kv=36864, gpus=2, fixed_s=1.7e-3,
        routed=60.9e9, experts=128, top_k=4,
        drafts={"eagle3": (0.79e9, 1.58e9), "mtp": (0.69e9, 2.86e9), "draft_model": _1B},
    ),
}  # fmt: skip
# Host and launch time of one draft pass, and of one request's n-gram look-up: chosen so that "70b"
# at 32 streams and k = 3 has the published speedups of Llama-3.3-70B (speedbench.md §4.1, B200,
# TensorRT-LLM): 1.90 EAGLE-3, 1.60 draft model, 0.88 n-gram. An MTP pass is taken as EAGLE-3's.
PASS_S = {"eagle3": 1.2e-3, "mtp": 1.2e-3, "draft_model": 2.6e-3}
LOOKUP_S = 0.32e-3

# ── published acceptance ─────────────────────────────────────────────────────────────────────────

_CATEGORIES = "coding humanities math multilingual qa rag reasoning roleplay stem summarization"
_ROWS = [*_CATEGORIES.split(), "writing", DEFAULT]
# SPEED-Bench table 1 (arXiv 2604.09557, as speedbench.md §4.1 has it), AL at k = 3, temperature 0;
# "default" is the published mean. EAGLE-3 and n-gram: Llama-3.3-70B; MTP: Qwen3-Next. The draft
# model's is published as a mean alone, and taken for every category.
_PUBLISHED = {
    "eagle3": (3.00, 2.37, 2.47, 1.73, 2.32, 2.75, 2.61, 2.04, 2.43, 2.60, 2.64, 2.45),
    "ngram": (1.54, 1.39, 1.43, 1.91, 1.21, 1.51, 1.34, 1.15, 1.38, 1.36, 1.33, 1.41),
    "mtp": (3.34, 2.68, 3.13, 3.19, 2.71, 2.94, 2.89, 2.09, 2.85, 2.66, 2.46, 2.81),
    "draft_model": (2.44,) * 12,
}
# gpt-oss-120b's own n-gram column; writing is not published: its other categories' mean. EAGLE-3:
# the mean 2.25 is published and four categories; the rest follow Llama's order about that mean.
_NGRAM_MOE = (1.31, 1.35, 1.30, 1.58, 1.27, 1.31, 1.31, 1.25, 1.30, 1.25, 1.32, 1.32)
_EAGLE3_MOE = {"coding": 2.46, "math": 2.46, "roleplay": 1.87, "writing": 1.98, DEFAULT: 2.25}
# Two example answers to random tokens, gpt-oss-120b with EAGLE-3, k = 3 (§4.3): a clarifying reply
# to noise, and an essay on a word found in it. How often each comes is not published: one in two.
_RANDOM = {TRIVIAL: 3.44, LATCHED: 1.877}
# Share of its AL that a method keeps at temperature 1: the published speedups at T = 1 ÷ T = 0
# (§4.1), steps being as long; linear in between (assumed).
_AT_T1 = {"eagle3": 1.75 / 1.90, "ngram": 0.85 / 0.88, "draft_model": 1.15 / 1.60}
_AT_T1 |= {"mtp": 1.18 / 1.20}
# EAGLE-3's AL 2.93, 2.59, 1.19 at ISL 1k, 2k, 8k (§4.2): tokens → share of AL − 1 that is left,
# linear in log ISL between. Drafters of other kinds stay flat there.
_EAGLE3_ISL = ((1000, 1.0), (2000, 1.59 / 1.93), (8000, 0.19 / 1.93))
NAMES = {"eagle3": "eagle3", "ngram": "n-gram", "draft_model": "draft model", "mtp": "mtp"}
"""Methods, and their names on the pages."""
NGRAM_COVERAGE = 0.35
"""Share of decode steps with a match; 0.41 in the one vLLM capture (real-engines.md §1.4)."""


def length(row: tuple[float, ...]) -> float:
    """AL where drafted of conditional probabilities: 1 + Σ joint."""
    joint, total = 1.0, 1.0
    for probability in row:
        joint *= probability
        total += joint
    return total


@lru_cache(4096)
def thinned(row: tuple[float, ...], share: float) -> tuple[float, ...]:
    """The row times one factor, so that AL − 1 is `share` (0 … 1) of what it was."""
    low, high = 0.0, 1.0
    wanted = 1 + share * (length(row) - 1)
    for _ in range(30):
        middle = (low + high) / 2
        above = length(tuple(p * middle for p in row)) > wanted
        low, high = (low, middle) if above else (middle, high)
    return tuple(p * high for p in row)


def acceptance(method: str, model: str, k: int) -> dict[str, tuple[float, ...]]:
    """Category → k conditional probabilities, all alike as the published histogram nearly has them
    (golden G1: 0.68, 0.70, 0.71), with which AL at k = 3 is the published one."""
    lengths = dict(zip(_ROWS, _PUBLISHED[method], strict=True))
    if model == "moe" and method == "ngram":
        lengths = dict(zip(_ROWS, _NGRAM_MOE, strict=True))
    elif model == "moe" and method == "eagle3":
        shift = _EAGLE3_MOE[DEFAULT] / lengths[DEFAULT]
        lengths = {c: _EAGLE3_MOE.get(c, al * shift) for c, al in lengths.items()}
    coverage = NGRAM_COVERAGE if method == "ngram" else 1.0
    lengths |= {c: lengths[DEFAULT] if method == "ngram" else al for c, al in _RANDOM.items()}
    one = (1.0,) * 3
    found = {c: thinned(one, (al - 1) / coverage / 3)[0] for c, al in lengths.items()}
    return {category: (p,) * k for category, p in found.items()}


# ── settings ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is simulated.

    `conditional[category][j]`: probability that draft position j + 1 is accepted given that j was,
    `draft_depth` of them, with a row "default". `coverage`: probability that a step has a draft.
    `time_scale` multiplies every time: 2 plays twice as slowly, 0.5 twice as fast, 0 does not wait.
    `noise`: standard deviation of the logarithm of a factor on step time, drawn once a start of
    the server; `start` tells starts apart.
    `prefill_budget`: tokens a step at most, decoding first. `kv_tokens` 0: what the memory holds.
    `mean_output_tokens`: where an answer ends by itself. `incremental`: SGLang's /generate streams
    what is new instead of all so far. `prompts`: JSONL rows with `category` and `turns`, to tell
    categories.
    """

    model: str = "8b"
    dialect: Dialect = "vllm"
    method: str = "none"
    draft_depth: int = 0
    coverage: float = 1.0
    conditional: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: {DEFAULT: ()})
    time_scale: float = 1.0
    noise: float = 0.02
    prefill_budget: int = 8192
    kv_tokens: int = 0
    prefix_cache: bool = False
    max_running: int = 256
    max_model_len: int = 8192
    mean_output_tokens: float = 200.0
    seed: int = 0
    start: int = 0
    per_request_metrics: bool = True
    incremental: bool = False
    prompts: Path = BUILTIN

    def row(self, category: str, isl: int, temperature: float) -> tuple[float, ...]:
        """Conditional probabilities for a request of `isl` input tokens."""
        row = self.conditional.get(category, self.conditional[DEFAULT])
        gain = self.coverage * (length(row) - 1)
        if gain <= 0:
            return row
        left = gain * (_isl_share(isl) if self.method == "eagle3" else 1.0)
        kept = 1 - (1 - _AT_T1.get(self.method, 1.0)) * min(max(temperature, 0.0), 1.0)
        return thinned(row, round(max((1 + left) * kept - 1, 0.0) / gain, 3))

    def step_s(
        self, decoding: int, *, drafted: int = 0, context: int = 0, prefill: int = 0
    ) -> float:
        """Seconds of a step, unscaled, for `decoding` requests, `drafted` of them with a draft of k
        tokens, that read `context` cached tokens, and `prefill` tokens of prompts beside them."""
        model, k = MODELS[self.model], self.draft_depth
        bandwidth, flops = BANDWIDTH * model.gpus, FLOPS * model.gpus
        tokens = decoding + k * drafted + prefill
        passed = _roof(model.weights_read(tokens) / bandwidth, 2 * model.active * tokens / flops)
        time = model.fixed_s + passed + context * model.kv / bandwidth + SEQUENCE_S * decoding
        if self.method == "ngram":
            time += LOOKUP_S * decoding  # whether or not it finds something
        elif drafted:
            size, read = model.drafts[self.method]
            one = _roof(read / bandwidth, 2 * size * drafted / flops)
            time += k * (PASS_S[self.method] + one)
        return time


def _roof(memory_s: float, compute_s: float) -> float:
    return float((memory_s**EDGE + compute_s**EDGE) ** (1 / EDGE))


def _isl_share(isl: int) -> float:
    (x0, y0), *rest = _EAGLE3_ISL
    if isl <= x0:
        return y0
    for x1, y1 in rest:
        if isl < x1:
            return y0 + (y1 - y0) * math.log(isl / x0) / math.log(x1 / x0)
        x0, y0 = x1, y1
    return y0


def preset(method: str, draft_depth: int = 3, *, model: str = "8b", **changes: Any) -> Settings:
    """Settings of 'none' or a method of NAMES, with changes. UserError: unknown names."""
    known_method(SpecConfig(method=method), ("none", *NAMES), "simulated")
    for what, value, known in (
        ("model", model, tuple(MODELS)),
        ("dialect", changes.get("dialect", "vllm"), get_args(Dialect)),
    ):
        if value not in known:
            hint = nearest(value, known) or "."
            raise UserError(f"simulated has no {what} '{value}'{hint} Known: {', '.join(known)}.")
    if method == "none":
        return Settings(model=model, **changes)
    given: dict[str, Any] = {"conditional": acceptance(method, model, draft_depth)} | changes
    given.setdefault("coverage", NGRAM_COVERAGE if method == "ngram" else 1.0)
    return Settings(model=model, method=method, draft_depth=draft_depth, **given)


# ── tokens and answers ───────────────────────────────────────────────────────────────────────────

BOS, EOS = 1, 2
_BYTE_0, _WORD_0, _WORDS = 3, 1000, 31000
_NOISE = (
    "It looks like the text you sent is random or garbled. Could you please clarify what you need?",
    "Your message seems to be jumbled, so I am not sure what you mean. Please share more context.",
    "I am unable to understand this input; it appears corrupted. How can I help you today?",
)
_PLAIN = re.findall(r"\w+", "the of and to in is it that for as with was on by are this be from or")
_PIECE = re.compile(r" ?([A-Za-z]{2,})|(.)", re.DOTALL)
_ENGLISH = list(dict.fromkeys([*_PLAIN, *re.findall("[A-Za-z]{2,}", " ".join(_NOISE))]))
_SYLLABLES = ["".join(pair) for pair in product("bdfgklmn", "aeio")]
_MADE_UP = ["".join(three) for three in product(_SYLLABLES, repeat=3)][: _WORDS - len(_ENGLISH)]
_WORD = [*_MADE_UP, *_ENGLISH]
_WORD_ID = {word: _WORD_0 + n for n, word in enumerate(_WORD)}
TEXT = [""] * _WORD_0 + [" " + word for word in _WORD]  # special ids and most bytes have none
TEXT[_BYTE_0 + 32 : _BYTE_0 + 127] = [chr(b) for b in range(32, 127)]
# Words as often as in a language, a few much and most hardly: 65,536 draws → ids.
_DRAW = array("I", (_WORD_0 + int((n / 65536) ** 4 * len(_MADE_UP)) for n in range(65536)))


def encode(text: str) -> list[int]:
    """Text → ids, the same in every process: one a word, else one a UTF-8 byte."""
    ids: list[int] = []
    for word, other in _PIECE.findall(text):
        hashed = _WORD_0 + zlib.crc32(word.encode()) % _WORDS
        ids += [_WORD_ID.get(word, hashed)] if word else [_BYTE_0 + b for b in other.encode()]
    return ids


def is_random(prompt: U32) -> bool:
    """Does hardly an id come twice in its first 512? No text of 48 tokens or more is like that, in
    any tokenizer; uniform ids and ids in a row are. The built-in prompts' share is 0.86 at most."""
    seen = prompt[:512]
    return len(seen) >= 48 and len(set(seen)) > 0.92 * len(seen)


def answer_ids(kind: str, prompt: U32, dice: random.Random, limit: int, mean: float) -> U32:
    """What is answered without a limit, EOS last, or its first `limit` + 1 tokens. A longer limit
    begins with the same answer."""
    if kind == TRIVIAL:
        return array("I", [*encode(" " + dice.choice(_NOISE)), EOS])
    ends_at = 2 + int(dice.gammavariate(2.0, mean / 2)) + (256 if kind == LATCHED else 0)
    count = min(ends_at, limit + 1)
    # Whole 32-bit words, so that a longer answer begins with the shorter one.
    drawn = array("H", dice.randbytes((count + 1) // 2 * 4))[:count]
    ids = array("I", [_DRAW[value] for value in drawn])
    if kind == LATCHED:  # plain words in between, and again and again one of the prompt's
        words = [i for i in prompt if _WORD_0 <= i < len(TEXT)] or [_WORD_0]
        ids[::2] = array("I", [_WORD_ID[_PLAIN[v % len(_PLAIN)]] for v in drawn[::2]])
        ids[1::12] = array("I", [words[drawn[0] % len(words)]] * len(ids[1::12]))
    if count == ends_at:
        ids[-1] = EOS
    return ids


Tally = Counter[str | int]
"""What really happened, by name; under j: drafted decode steps that accepted j, before the cut at
an answer's end. generated + overrun = requests + steps + accepted."""


class Bins:
    """A histogram: how many values are above one of `bounds` and not above the next; their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Answer:
    """One request, its answer known from the start.

    `emit(end)` is called after each step with the tokens sent so far. `pending`: prompt tokens that
    are still to be computed; `cached`: those that a prefix cache had. `own`: its tally.
    """

    def __init__(
        self, batch: Batch, prompt: U32, *, limit: int, ignore_eos: bool, temperature: float = 0.0
    ) -> None:
        self.settings = settings = batch.settings
        self.model = batch.model
        key = settings.seed << 32 | zlib.crc32(prompt)
        dice = random.Random(key << 1)
        self.category = batch.category(prompt)
        if self.category == DEFAULT and is_random(prompt):
            self.category = TRIVIAL if dice.random() < 0.5 else LATCHED
        mean = 1e12 if ignore_eos else settings.mean_output_tokens
        kind = LATCHED if ignore_eos and self.category == TRIVIAL else self.category
        whole = answer_ids(kind, prompt, dice, limit, mean)
        self.finish = "length" if len(whole) > limit or ignore_eos else "stop"
        self.ids, self.limit = whole[:limit], limit
        self.row = settings.row(self.category, len(prompt), temperature)
        # The same prompt again gets the same answer and other luck: repeats tell something new.
        batch.sent_before[key] += 1
        self.dice = random.Random(f"{key}/{batch.sent_before[key]}").random
        self._batch, self._coverage = batch, settings.coverage if settings.draft_depth else 0.0
        self._cuts_drafts = settings.dialect == "llamacpp"  # at max_tokens (real-engines.md §2.4)
        self.prompt, self.sent, self.pending, self.cached = prompt, 0, 0, 0
        self.ended = self.drafted = False
        self.accepted: list[int] = []
        self.drafts: list[int] = []
        self.own: Tally = Counter()
        self.emit: Callable[[int], None] = lambda end: None
        self.preempted = 0
        self.asked_at = self.first_at = self.last_at = 0.0

    @property
    def held(self) -> int:
        """Tokens of KV cache it needs."""
        return len(self.prompt) + self.sent

    def step(self, now: float) -> int | None:
        """The prompt's pass: one token. Then a draft's accepted tokens and the target's own. How
        many were accepted; None: it had no draft."""
        accepted, drafted = 0, None
        left = len(self.ids) - self.sent
        if not self.sent:
            self.first_at = now
            self._batch.latencies["ttft_s"].add(now - self.asked_at)
            self._count("requests", 1)
            self._count("prompt_tokens", len(self.prompt))
        elif self.drafted:
            row = self.row[: self.limit - self.sent - 1] if self._cuts_drafts else self.row
            for probability in row:
                if self.dice() >= probability:
                    break
                accepted += 1
            if row:
                drafted = accepted
                self.accepted.append(accepted)
                self.drafts.append(len(row))
                self._count(accepted, 1)
                self._count("draft_tokens", len(row))
        if self.sent and drafted is None:
            self._count("undrafted", 1)
        emitted = min(accepted + 1, left)
        self._count("generated", emitted)
        self.sent += emitted
        self.last_at = now
        self.drafted = self.dice() < self._coverage
        if self.sent == len(self.ids):
            self.ended, self.drafted = True, False
            self._count(self.finish, 1)
            self._count("overrun", accepted + 1 - emitted)
        self.emit(self.sent)
        return drafted

    def _count(self, name: str | int, by: int) -> None:
        self._batch.tallies[self.category][name] += by
        self.own[name] += by


@lru_cache(512)
def expected_steps(row: tuple[float, ...], coverage: float, size: int) -> tuple[float, ...]:
    """Decode steps to be expected for 0 … `size` delivered tokens (a renewal equation)."""
    joint = [coverage]
    for probability in row:
        joint.append(joint[-1] * probability)
    exactly = [a - b for a, b in zip(joint, [*joint[1:], 0.0], strict=True)]
    exactly[0] += 1 - coverage
    table = [0.0]
    for n in range(1, size + 1):
        table.append(1 + sum(p * table[max(n - j - 1, 0)] for j, p in enumerate(exactly)))
    return tuple(table)


def positions(tally: Tally, depth: int) -> tuple[int, list[int]]:
    """Drafted steps, and of them those that accepted position 1 … k."""
    histogram = [tally[j] for j in range(depth + 1)] if depth else []
    return sum(histogram), [sum(histogram[j:]) for j in range(1, depth + 1)]


def told(tally: Tally, depth: int) -> dict[str, Any]:
    """A tally as `/truth` says it. `expected`: what the settings give for the answers that ended,
    cut where they were, preemption aside: a measured acceptance length scatters about it."""
    drafts, accepted = positions(tally, depth)
    steps, requests, generated = drafts + tally["undrafted"], tally["requests"], tally["generated"]
    tokens, awaited = tally["ended_tokens"], tally["expected_steps"]
    return {
        "requests": requests,
        "finished": tally["stop"] + tally["length"],
        "steps": steps,
        "drafts": drafts,
        "draft_tokens": tally["draft_tokens"],
        "accepted_tokens": sum(accepted),
        "accepted_by_position": accepted,
        "generated_tokens": generated,
        "overrun_tokens": tally["overrun"],
        "acceptance_length": (generated - requests) / steps if steps else None,
        "expected": {
            "decode_tokens": tokens,
            "steps": awaited,
            "acceptance_length": tokens / awaited if awaited else None,
        },
    }


# ── continuous batching ──────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One step of the whole batch: requests, tokens, and seconds as played."""

    number: int
    step_s: float
    begun: int
    prefilled: int
    decoding: int
    context: int
    waiting: int
    completed: int
    with_draft: int
    draft_tokens: int
    accepted: int


class Batch:
    """Admit, preempt, share out the prefill; and after the step's time, emit.

    `plan()` decides a step and says how long it takes, `finish(now)` carries it out.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.model = settings, PREFIX + settings.model
        rows = [msgspec.json.decode(row) for row in settings.prompts.read_bytes().splitlines()]
        self.known = {array("I", encode(r["turns"][0])).tobytes(): r["category"] for r in rows}
        self.kv_tokens = settings.kv_tokens or MODELS[settings.model].kv_tokens()
        self.max_model_len = min(settings.max_model_len, self.kv_tokens - settings.draft_depth - 1)
        self.sent_before: Counter[int] = Counter()
        self.tallies: defaultdict[str, Tally] = defaultdict(Counter)
        self.done: Tally = Counter()  # of requests that ended, as some engines count
        self.aborted = 0
        self.waiting: dict[Answer, None] = {}
        self.running: dict[Answer, None] = {}
        self.iterations = self.most_running = self.preemptions = 0
        self.prefix_hits = self.prefix_queries = 0
        self.rows: deque[Iteration] = deque(maxlen=1000)  # TensorRT-LLM's default ring
        self.step_times: defaultdict[int, list[float]] = defaultdict(lambda: [0, 0.0])
        self.decode_s = 0.0
        self.latencies = {
            "ttft_s": Bins(TTFT_BOUNDS_S),
            "tpot_s": Bins(TOKEN_BOUNDS_S),
            "decode_s": Bins(REQUEST_BOUNDS_S),
            "e2el_s": Bins(REQUEST_BOUNDS_S),
        }
        self.window = (0, 0)  # SGLang's gauges: accepted tokens and steps at the last report
        self.shown = (0.0, 0.0)
        identity = f"{settings.seed}/{settings.model}/{settings.method}/{settings.draft_depth}"
        identity += f"/{settings.start}"
        self.factor = math.exp(random.Random(identity).gauss(0.0, settings.noise))
        self._prefixes: dict[int, None] = {}
        self._step: tuple[list[Answer], list[Answer], dict[str, Any]] = ([], [], {})

    def category(self, prompt: U32) -> str:
        """Of the known prompt that it holds, in whatever template or turn; else "default"."""
        held = prompt.tobytes()
        return next((c for known, c in self.known.items() if known in held), DEFAULT)

    def leave(self, answer: Answer) -> None:
        """Its answer is complete, or its client is gone."""
        known = answer in self.running or answer in self.waiting
        self.waiting.pop(answer, None)
        self.running.pop(answer, None)
        if known and not answer.ended:
            self.aborted += 1
            if self.settings.dialect == "llamacpp":  # flushes at an abort (real-engines.md §2.4)
                self.done.update(answer.own)

    def plan(self) -> float:
        """Seconds, as played, of the next step."""
        settings, k = self.settings, self.settings.draft_depth
        self._preempt()
        decoding = [a for a in self.running if not a.pending]
        drafted = sum(a.drafted for a in decoding)
        budget = max(settings.prefill_budget - len(decoding) - k * drafted, 16)
        begun = self._admit(budget - sum(a.pending for a in self.running))
        completed: list[Answer] = []
        prefilled = 0
        for answer in [a for a in self.running if a.pending]:
            take = min(answer.pending, budget - prefilled)
            answer.pending -= take
            prefilled += take
            if not answer.pending:
                completed.append(answer)
        context = sum(a.held for a in decoding)
        step_s = settings.step_s(len(decoding), drafted=drafted, context=context, prefill=prefilled)
        step_s *= self.factor * settings.time_scale
        facts = {"step_s": step_s, "begun": begun, "prefilled": prefilled, "context": context}
        self._step = (decoding, completed, facts)
        return step_s

    def finish(self, now: float) -> None:
        """What the planned step emits. Who left during the step gets nothing."""
        decoding, completed, facts = self._step
        self._step = ([], [], {})
        accepted, ended, count = [], 0, 0
        drafting = [a for a in decoding if a.drafted]
        draft_tokens = -sum(a.own["draft_tokens"] for a in drafting)
        for answer in (*decoding, *completed):
            if answer not in self.running:
                continue
            count += answer.sent > 0
            found = answer.step(now)
            if found is not None:
                accepted.append(found)
            if answer.ended:
                ended += 1
                self._ended(answer)
        self.iterations += 1
        draft_tokens += sum(a.own["draft_tokens"] for a in drafting)
        if not completed and not facts["prefilled"]:
            times = self.step_times[len(decoding)]
            times[0] += 1
            times[1] += facts["step_s"]
        self.decode_s += facts["step_s"] * count
        self.rows.append(
            Iteration(
                number=self.iterations,
                decoding=len(decoding),
                waiting=len(self.waiting),
                completed=ended,
                with_draft=len(accepted),
                draft_tokens=draft_tokens,
                accepted=sum(accepted),
                **facts,
            )
        )
        if self.iterations % 40 == 0:  # --decode-log-interval, SGLang 0.5.23
            self._report()

    def _ended(self, answer: Answer) -> None:
        del self.running[answer]
        tokens = answer.sent - 1
        decode_s = answer.last_at - answer.first_at
        self.latencies["decode_s"].add(decode_s)
        self.latencies["e2el_s"].add(answer.last_at - answer.asked_at)
        if tokens:
            self.latencies["tpot_s"].add(decode_s / tokens)
        coverage = self.settings.coverage if self.settings.draft_depth else 0.0
        extra: dict[str | int, Any] = {"ended_tokens": tokens}
        table = expected_steps(answer.row, coverage, 1 << tokens.bit_length())
        extra["expected_steps"] = table[tokens]
        self.tallies[answer.category].update(extra)
        self.done.update(answer.own)

    def _report(self) -> None:
        figures = told(self.overall(), self.settings.draft_depth)
        now = (figures["accepted_tokens"], figures["steps"])
        accepted, steps = (a - b for a, b in zip(now, self.window, strict=True))
        self.window = now
        k = self.settings.draft_depth
        if steps and k:
            self.shown = (1 + accepted / steps, accepted / steps / k)

    def overall(self) -> Tally:
        """The tallies of all categories."""
        return sum(self.tallies.values(), Counter())

    def _preempt(self) -> None:
        """The youngest go back to the head of the queue, to be computed anew (vLLM's recompute)."""
        need = self.settings.draft_depth + 1
        held = sum(a.held + need for a in self.running)
        while held > self.kv_tokens and len(self.running) > 1:
            answer, _ = self.running.popitem()
            held -= answer.held + need
            answer.drafted = False
            answer.preempted += 1
            self.waiting = {answer: None} | self.waiting
            self.preemptions += 1

    def _admit(self, budget: int) -> int:
        """Requests that begin, in order: while slots, budget and KV cache last. How many."""
        need = self.settings.draft_depth + 1
        free = self.kv_tokens - sum(a.held + need for a in self.running)
        begun = 0
        for answer in [*self.waiting]:
            free -= answer.held + need
            if len(self.running) >= self.settings.max_running or budget <= 0 or free < 0:
                break
            answer.cached = self._cached(answer) if self.settings.prefix_cache else 0
            answer.pending = answer.held - answer.cached
            budget -= answer.pending
            del self.waiting[answer]
            self.running[answer] = None
            begun += 1
        self.most_running = max(self.most_running, len(self.running))
        return begun

    def _cached(self, answer: Answer) -> int:
        """Prompt tokens whose blocks of 16 (vLLM's) were computed before; all but the last token at
        most. Forgets the oldest beyond the cache's size."""
        key, hits, met = 0, 0, True
        for at in range(0, len(answer.prompt) - 15, 16):
            key = hash((key, answer.prompt[at : at + 16].tobytes()))
            met = met and key in self._prefixes
            hits += 16 * met
            self._prefixes.pop(key, None)
            self._prefixes[key] = None
        while len(self._prefixes) * 16 > self.kv_tokens:
            del self._prefixes[next(iter(self._prefixes))]
        hits = min(hits, len(answer.prompt) - 1)
        self.prefix_queries += len(answer.prompt)
        self.prefix_hits += hits
        return hits

    def truth(self) -> dict[str, Any]:
        """What is simulated, as ServerFacts has it, and what really happened since the start.

        Times are seconds as played. `step_times`: requests decoding → [steps without any prefill,
        their seconds]; `decode_s`: the sum over requests of their decode steps' times, so
        decode_s ÷ steps is the mean step time that requests saw.
        """
        settings, k = self.settings, self.settings.draft_depth
        return {
            "simulated": True,
            "version": __version__,
            "state": "on" if k else "off",
            "draft_depth": k or None,
            "spec_reported": NAMES[settings.method] if k else None,
            "max_model_len": self.max_model_len,
            **{name: getattr(settings, name) for name in ("method", "max_running", "seed")},
            **{name: getattr(settings, name) for name in ("model", "dialect", "time_scale")},
            "run_factor": self.factor,
            "most_running": self.most_running,
            "iterations": self.iterations,
            "preemptions": self.preemptions,
            "decode_s": self.decode_s,
            "step_times": {str(n): times for n, times in sorted(self.step_times.items())},
            "overall": told(self.overall(), k),
            "categories": {name: told(tally, k) for name, tally in sorted(self.tallies.items())},
        }
