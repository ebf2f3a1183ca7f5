"""The nouns: every frozen type that crosses a module.

What users write (TOML, JSONL) is strict: unknown keys are refused. What run files carry is lenient:
unknown fields are ignored and new fields have defaults; `SCHEMA` rises only when a meaning changes.
Times are seconds since the run started on one clock (`time.perf_counter`), chunk gaps in a record
are microseconds. Missing is None, never an invented zero. Must not: import ours, decide.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

if TYPE_CHECKING:
    U32 = array[int]
else:
    U32 = array  # array.array cannot be subscripted before Python 3.12

SCHEMA = 1
"""The run file's schema: what a field means. New fields with defaults do not raise it."""


# What a file says is checked as it is read: a number beyond these is damage or a slip, never a
# figure, and none may cost memory or become an infinity further on. NaN is in no bound.
Count = Annotated[int, Meta(ge=0, lt=1 << 53)]
AtLeastOne = Annotated[int, Meta(ge=1, le=10_000_000)]
Depth = Annotated[int, Meta(ge=0, le=4096)]
Seconds = Annotated[float, Meta(ge=-1e10, le=1e10)]
Sample = Annotated[float, Meta(gt=-(2.0**53), lt=2.0**53)]


class Noun(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A frozen record of the run file: unknown fields are ignored, defaults not written."""


class Written(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Something a user writes: unknown fields are refused."""


# ── what we ask ──────────────────────────────────────────────────────────────────────────────────


class Dataset(Written, frozen=True, kw_only=True):
    """Where prompts come from. `limit` is of all categories in turn; a file's rows tell its format.

    `skip_placeholders`: go on without the rows of SPEED-Bench that hold no text.
    `skip_too_long`: go on without prompts that, with their output limit, exceed the context.
    """

    kind: Literal["builtin", "jsonl"] = "builtin"
    path: str | None = None
    categories: tuple[str, ...] = ()
    limit: AtLeastOne | None = None
    seed: int = 0
    skip_placeholders: bool = False
    skip_too_long: bool = False


class ClosedLoop(Written, frozen=True, kw_only=True, tag="closed", tag_field="kind"):
    """`concurrency` workers, each sending its next request when the last one ended."""

    concurrency: Annotated[int, Meta(ge=1, le=1 << 16)]


Load = ClosedLoop


class Stop(Written, frozen=True, kw_only=True):
    """A phase ends after `requests` dialogues, or when nothing new is sent after `duration_s`."""

    requests: AtLeastOne | None = None
    duration_s: Annotated[float, Meta(gt=0, le=1e9)] | None = None


class Sampling(Written, frozen=True, kw_only=True, omit_defaults=False):
    """What is asked of the model for every request of a run."""

    temperature: Annotated[float, Meta(ge=0, le=10)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    max_output_tokens: AtLeastOne = 256
    ignore_eos: bool = False


class Templating(Written, frozen=True, kw_only=True):
    """How a conversation becomes a prompt.

    `apply` False sends the text as it is, for base models. `args` go to the chat template:
    enable_thinking, reasoning_effort. `history`: what of an answer a later turn sees, all of it,
    of which the template may drop the thinking, or only what follows the thinking.
    """

    apply: bool = True
    args: dict[str, Any] = {}
    history: Literal["full", "answer"] = "full"


class Scenario(Written, frozen=True, kw_only=True, omit_defaults=False):
    """What is asked, at which loads, until when."""

    name: str
    description: str = ""
    dataset: Dataset = Dataset()
    loads: Annotated[tuple[Load, ...], Meta(min_length=1, max_length=1000)] = (
        ClosedLoop(concurrency=1),
    )
    stop: Stop = Stop()
    sampling: Sampling = Sampling()
    templating: Templating = Templating()
    warmup_requests: Annotated[int, Meta(ge=0, le=1_000_000)] = 4
    repeats: Annotated[int, Meta(ge=1, le=1000)] = 1


class Message(Written, frozen=True, kw_only=True):
    """One chat message."""

    role: str
    content: str


class Prompt(Noun, frozen=True, kw_only=True):
    """One dialogue's opening, and what the user says after each answer.

    Exactly one of `messages` (then `later_turns`) or `prompt_token_ids` is the source of the text;
    once templated, `prompt_token_ids` holds the first turn's ids as well.
    """

    prompt_id: str
    category: str
    subcategory: str | None = None
    tier: str | None = None
    isl_bucket: str | None = None
    messages: tuple[Message, ...] = ()
    later_turns: tuple[str, ...] = ()
    prompt_token_ids: U32 | None = None
    max_output_tokens: int | None = None
    source: str | None = None


class Dialogue(Noun, frozen=True, kw_only=True):
    """One use of a prompt in a phase. `repeat` counts earlier uses of the prompt in this phase."""

    dialogue_id: str
    prompt: Prompt
    repeat: int = 0


class Request(Noun, frozen=True, kw_only=True):
    """One turn, ready to be encoded. `messages` is set for the chat API, ids for completions.

    `template_args` are for the server's template, where the server does the templating.
    """

    request_id: str
    phase: str
    dialogue: Dialogue
    turn: int
    max_output_tokens: int
    prompt_token_ids: U32 | None = None
    messages: tuple[Message, ...] = ()
    template_args: dict[str, Any] = {}


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One load, once. `dialogues` may be endless when the phase ends by `duration_s`."""

    name: str
    load: Load
    repeat: int
    measured: bool
    dialogues: Iterable[Dialogue]
    duration_s: float | None = None
    category: str | None = None
    max_output_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A scenario over its prompts: phases in the order in which they run."""

    scenario: Scenario
    prompts: tuple[Prompt, ...]
    phases: tuple[Phase, ...]


# ── what the server says ─────────────────────────────────────────────────────────────────────────


class SpecCounters(Noun, frozen=True, kw_only=True):
    """Speculation figures of one request, or of a window of the server's counters.

    `steps` are all decode steps, `drafts` the steps that had a draft. Position lists are dense,
    index 0 = first draft position; `accepted_histogram[j]` = drafted steps that accepted exactly j.
    `generated_tokens` and `requests` are the server's own count over a window. Any may be None.
    """

    steps: Count | None = None
    drafts: Count | None = None
    draft_tokens: Count | None = None
    draft_depth: Depth | None = None
    accepted_tokens: Count | None = None
    accepted_by_position: tuple[Count, ...] | None = None
    drafted_by_position: tuple[Count, ...] | None = None
    accepted_histogram: tuple[Count, ...] | None = None
    generated_tokens: Count | None = None
    requests: Count | None = None


class ServerLoad(Noun, frozen=True, kw_only=True):
    """What the server says about its own queue; requests, and the KV cache as a share 0…1."""

    running: int | None = None
    waiting: int | None = None
    kv_cache_use: float | None = None


class Usage(Noun, frozen=True, kw_only=True):
    """Token counts as the server reports them; in a running stream they are cumulative."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None


class Timings(Noun, frozen=True, kw_only=True):
    """Cumulative per-request timings on a chunk (llama.cpp): tokens so far, and ms of decoding.

    All tokens of one decode step carry the same `predicted_ms`. `draft_tokens` and
    `accepted_tokens` are None when the server left them out.
    """

    predicted_tokens: int
    predicted_ms: float
    draft_tokens: int | None = None
    accepted_tokens: int | None = None


class Chunk(Noun, frozen=True, kw_only=True):
    """One decoded event of a stream.

    `choice` False: an event without choices (usage only). `error` is what an `error` object inside
    a 200 stream said. `thinking`: the text came in a field of its own. `tokens_per_pass`: tokens so
    far ÷ target passes so far, prefill's included.
    """

    token_ids: tuple[int, ...] | None = None
    text: str = ""
    thinking: bool = False
    choice: bool = True
    usage: Usage | None = None
    spec: SpecCounters | None = None
    timings: Timings | None = None
    tokens_per_pass: float | None = None
    finish_reason: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Wire:
    """How one API of an engine is spoken. `decode` raises ValueError on a malformed event."""

    path: str
    encode: Callable[[Request, str, Sampling], bytes]
    decode: Callable[[bytes], Chunk]


# ── what happened to a request ───────────────────────────────────────────────────────────────────


class Completed(Noun, frozen=True, kw_only=True, tag="completed", tag_field="kind"):
    """The stream ended as the API says it ends."""


class Refused(Noun, frozen=True, kw_only=True, tag="refused", tag_field="kind"):
    """An HTTP error status instead of a stream. `retry_after_s` is the server's Retry-After."""

    status: int
    message: str
    retry_after_s: float | None = None


class Broke(Noun, frozen=True, kw_only=True, tag="broke", tag_field="kind"):
    """Anything else that ended it: connect failure, reset, malformed event, error in the stream.

    `reason` is a word of transport's table, or server_error, empty, truncated, not_a_stream, or
    tokenizer: a later turn that could not be made, and was never sent.
    """

    reason: str
    message: str


class TimedOut(Noun, frozen=True, kw_only=True, tag="timed_out", tag_field="kind"):
    """Longer than `--timeout`."""

    after_s: Seconds


class Cancelled(Noun, frozen=True, kw_only=True, tag="cancelled", tag_field="kind"):
    """Cancelled by us: never the server's failure."""


Outcome = Completed | Refused | Broke | TimedOut | Cancelled

TokenCountSource = Literal["ids", "continuous_usage", "timings", "final_usage"]


class RequestRecord(Noun, frozen=True, kw_only=True, tag="request", tag_field="type"):
    """One request, sent once and ended once.

    `chunk_gaps_us[0]` runs from `sent_s` to the first chunk that carries a token, each later entry
    from the chunk before. `chunk_tokens` is None when only the final usage tells a count.
    `step_tokens` are the tokens of each target pass, prefill first, where the server's own timings
    tell steps apart. `osl_tokens` follows `token_count_source`; `usage_tokens` is what the final
    usage said. `connect_s` is None on a reused connection.
    """

    request_id: str
    dialogue_id: str
    prompt_id: str
    category: str
    phase: str
    turn: Count
    outcome: Outcome
    sent_s: Seconds
    end_s: Seconds
    tier: str | None = None
    isl_bucket: str | None = None
    repeat: Count = 0
    isl_tokens: Count | None = None
    osl_tokens: Count = 0
    usage_tokens: Count | None = None
    cached_tokens: Count | None = None
    max_output_tokens: Count | None = None
    token_count_source: TokenCountSource | None = None
    intended_s: Seconds | None = None
    connect_s: Seconds | None = None
    resent: Count = 0
    chunk_gaps_us: U32 = msgspec.field(default_factory=lambda: array("I"))
    chunk_tokens: U32 | None = None
    step_tokens: U32 | None = None
    finish_reason: str | None = None
    spec: SpecCounters | None = None
    output_token_ids: U32 | None = None
    text: str | None = None


# ── the other lines of a run file ────────────────────────────────────────────────────────────────


class Caveat(Noun, frozen=True, kw_only=True, tag="caveat", tag_field="type"):
    """Why a figure may mislead, and what to do about it. `phase` None: the whole run."""

    code: str
    message: str
    advice: str
    phase: str | None = None


class PromptRecord(Noun, frozen=True, kw_only=True, tag="prompt", tag_field="type"):
    """A prompt's text, once. `text` is cut to 2,000 characters, or None with `--no-text`."""

    prompt_id: str
    category: str
    subcategory: str | None = None
    tier: str | None = None
    isl_bucket: str | None = None
    isl_tokens: Count | None = None
    turns: Count = 1
    sha256: str = ""
    text: str | None = None


class PhaseRecord(Noun, frozen=True, kw_only=True, tag="phase", tag_field="type"):
    """When a phase ran. Steady: from in-flight first at its target to the last dispatch."""

    name: str
    load: Load
    repeat: Count
    measured: bool
    started_s: Seconds
    ended_s: Seconds
    steady_from_s: Seconds | None = None
    steady_to_s: Seconds | None = None
    category: str | None = None


class Snapshot(Noun, frozen=True, kw_only=True, tag="snapshot", tag_field="type"):
    """The metrics page: raw series as `name{label="value",…}` → value.

    Kept raw so that a wrong mapping can be mended later without the server. `settled` on an edge:
    nothing was running and two scrapes agreed.
    """

    at_s: Seconds
    phase: str
    edge: Literal["start", "end", "tick"]
    samples: dict[str, Sample]
    settled: bool = True


class ClientSample(Noun, frozen=True, kw_only=True, tag="client", tag_field="type"):
    """The client about itself. `loop_lag_s` is the largest since the sample before."""

    at_s: Seconds
    phase: str
    in_flight: Count
    target: Count
    sent: Count
    chunks: Count
    tokens: Count
    loop_lag_s: Seconds
    cpu_s: Seconds
    rss_bytes: Count


class RunEnd(Noun, frozen=True, kw_only=True, tag="end", tag_field="type"):
    """The last line. `reason` is "completed", "interrupted" or "failed: …"."""

    at_s: Seconds
    reason: str


# ── servers ──────────────────────────────────────────────────────────────────────────────────────

FILES = "{files}"
"""In an engine's argv: the folder that holds what `Engine.files` gives."""
LOST = "draftload:lost_rows"
"""A series of a drained page: how many rows never reached us, so that sums over it are short."""


class SpecConfig(Written, frozen=True, kw_only=True):
    """A speculative-decoding setting in draftload's words.

    `draft_tokens` are nodes drafted a step, `draft_depth` (k) the longest acceptable path: equal
    for a chain, so one may be left out. `options` are the engine's own keys.
    """

    method: str
    draft_model: str | None = None
    draft_tokens: Depth | None = None
    draft_depth: Depth | None = None
    options: dict[str, Any] = {}


class ServerConfig(Written, frozen=True, kw_only=True):
    """A server to launch: `servers/configs/*.toml`."""

    engine: str
    model: str
    name: str | None = None
    spec: SpecConfig | None = None
    tensor_parallel: AtLeastOne = 1
    gpus: AtLeastOne | None = None
    port: Annotated[int, Meta(ge=0, lt=1 << 16)] = 0
    executable: tuple[str, ...] = ()
    env: dict[Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\Z")], str] = {}
    max_running: AtLeastOne | None = None
    max_model_len: Annotated[int, Meta(ge=1, lt=1 << 31)] | None = None
    extra_args: tuple[str, ...] = ()


class Honours(Noun, frozen=True, kw_only=True):
    """What the server did when it was asked, found by preflight. None: could not be told."""

    token_id_prompts: bool | None = None
    ids_in_chunks: bool = False
    continuous_usage: bool = False
    chunk_timings: bool = False
    per_request_acceptance: bool = False
    metrics_page: bool = False
    prefix_cache_off: bool | None = None


class ServerInfo(Noun, frozen=True, kw_only=True):
    """What is at the URL. `state` is whether speculation is on; `draft_depth` is k where known.

    `verified` is what of the engine was seen on a live server, as Engine says it. `vocabulary` is
    how many token ids the model has.
    """

    engine: str
    model: str
    url: str
    api: Literal["completions", "chat"] = "completions"
    version: str | None = None
    max_model_len: int | None = None
    vocabulary: int | None = None
    max_running: int | None = None
    state: Literal["on", "off", "unknown"] = "unknown"
    draft_depth: Depth | None = None
    spec_reported: str | None = None
    honours: Honours = Honours()
    simulated: bool = False
    verified: str = ""
    gpus: int | None = None
    config: ServerConfig | None = None


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What differs between engines: functions and facts, one value a file under `servers/`.

    counters(samples) maps a raw metrics page to cumulative SpecCounters; load(samples) to the
    queue. `chunk_is_step`: True when one token-carrying chunk is one decode step of the request
    unless proven merged, False when never, None when unknown. `keeps_alive` False: the server
    closes after a stream without saying so. `owned_by`: what /v1/models says, for detection.
    `tick_prefixes`: families sampled during a phase. `describe` reads version, context, slots and
    speculation off the engine's own pages (path → JSON) given by preflight.
    `drained_path`: a page that every GET empties, read only where `metrics_path` is not there;
    drain(page, sums) gives the running sums with its rows added (ValueError: not such a page).
    `settle_s`: where the queue's gauges stay at their last value on an idle server, counters that
    agree over this many seconds are at rest, whatever the gauges say.
    `pool_options`: options of [spec] that, when true, make a drafter learn across requests.
    `files`: name → content of what `command` needs beside it, in the folder that FILES stands for.
    """

    name: str
    wires: Mapping[str, Wire]
    owned_by: tuple[str, ...] = ()
    counters: Callable[[Mapping[str, float]], SpecCounters] = lambda samples: SpecCounters()
    load: Callable[[Mapping[str, float]], ServerLoad] = lambda samples: ServerLoad()
    metrics_path: str | None = None
    drained_path: str | None = None
    drain: Callable[[str, Mapping[str, float]], dict[str, float]] | None = None
    settle_s: float | None = None
    tick_prefixes: tuple[str, ...] = ()
    describe_paths: tuple[str, ...] = ()
    describe: Callable[[Mapping[str, Any], Mapping[str, float]], ServerFacts] = (
        lambda pages, samples: ServerFacts()
    )
    chunk_is_step: bool | None = None
    counts_eos: bool = True
    keeps_alive: bool = True
    remembers: Callable[[str], bool] = lambda method: False
    pool_options: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    command: Callable[[ServerConfig, int], list[str]] | None = None
    files: Callable[[ServerConfig], Mapping[str, str]] = lambda config: {}
    ready_path: str = "/health"
    stop_s: float = 10.0
    verified: str = "not verified on a live server"


class ServerFacts(Noun, frozen=True, kw_only=True):
    """What an engine's own pages tell: input to ServerInfo. Any may be None."""

    version: str | None = None
    max_model_len: int | None = None
    max_running: int | None = None
    state: Literal["on", "off", "unknown"] = "unknown"
    draft_depth: int | None = None
    spec_reported: str | None = None
    simulated: bool = False


class ClientInfo(Noun, frozen=True, kw_only=True):
    """Who measured: versions and machine. Never a path, an address or a header."""

    draftload: str
    python: str
    aiohttp: str
    loop: str
    cores: int
    machine: str


class RunInfo(Noun, frozen=True, kw_only=True, tag="run", tag_field="type"):
    """The first line of a run file."""

    run_id: str
    started_at: str
    scenario: Scenario
    server: ServerInfo
    client: ClientInfo
    prompts_sha256: str
    schema: int = SCHEMA
    cell: str | None = None
    caveats: tuple[Caveat, ...] = ()


Record = (
    RunInfo | PromptRecord | PhaseRecord | RequestRecord | Snapshot | ClientSample | Caveat | RunEnd
)

Observer = Callable[[Record], None]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run file as read: its RunInfo, then its other records, once, in file order."""

    info: RunInfo
    records: Iterable[Record]


# ── right of the seam ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class PhaseData:
    """All that was recorded of one phase: what metrics, acceptance and checks read.

    `draft_depth` is k where known. `counters` is the growth of the server's counters between the
    idle borders, None with `counters_missing` saying why.
    """

    phase: PhaseRecord
    server: ServerInfo
    engine: Engine
    records: tuple[RequestRecord, ...]
    draft_depth: int | None = None
    client: tuple[ClientSample, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    counters: SpecCounters | None = None
    counters_missing: str = ""


class Distribution(Noun, frozen=True, kw_only=True):
    """Linear percentiles; std with ddof 1. A percentile is None below 1/(1 − q) samples."""

    n: int
    mean: float | None = None
    std: float | None = None
    min: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    max: float | None = None


class Interval(Noun, frozen=True, kw_only=True):
    """`low`…`high`, and `kind`: what it is and how it was made, ready to print."""

    low: float
    high: float
    kind: str


class Acceptance(Noun, frozen=True, kw_only=True):
    """Acceptance from one source, pooled over decode steps unless a field says otherwise.

    `source` names where drafts and accepted tokens come from, `steps_source` where decode steps
    do. `interval` is statistical, or a range where steps are not known. `why_missing` explains an
    acceptance_length of None. Lists: index 0 = first draft position. `unverified`: chunks taken
    for steps without a second source.
    """

    source: str
    state: Literal["on", "off", "unknown"]
    steps_source: str | None = None
    acceptance_length: float | None = None
    interval: Interval | None = None
    acceptance_length_drafted: float | None = None
    draft_coverage: float | None = None
    acceptance_rate: float | None = None
    joint_by_position: tuple[float, ...] | None = None
    conditional_by_position: tuple[float, ...] | None = None
    positions_exact: bool = False
    acceptance_length_by_dialogue: float | None = None
    steps: int | None = None
    drafts: int | None = None
    accepted_tokens: int | None = None
    draft_tokens: int | None = None
    overrun_tokens: int | None = None
    unverified: bool = False
    why_missing: str = ""


class RequestCounts(Noun, frozen=True, kw_only=True):
    """sent = completed + refused + broke + timed_out + cancelled; `resent` is counted beside it."""

    sent: int = 0
    completed: int = 0
    refused: int = 0
    broke: int = 0
    timed_out: int = 0
    cancelled: int = 0
    resent: int = 0


class DialogueFigures(Noun, frozen=True, kw_only=True):
    """One dialogue's sums over its turns, for pairing and resampling. All turns completed.

    `decode_tokens` = Σ(osl − tokens of the first chunk); `decode_s` = Σ(last chunk − first);
    `steps` None where decode steps are not known. `output` is a digest of the answers' text.
    """

    dialogue_id: str
    prompt_id: str
    category: str
    repeat: int
    turns: int
    osl_tokens: int
    decode_tokens: int | None
    decode_s: float
    e2el_s: float
    steps: int | None = None
    output: str | None = None


class CategorySummary(Noun, frozen=True, kw_only=True):
    """One category in the mixed batch. `acceptance` None: no per-request figures."""

    category: str
    requests: int
    acceptance: Acceptance | None
    user_tokens_per_s: Distribution


class Throughput(Noun, frozen=True, kw_only=True):
    """Output tokens a second: `whole` over the phase, `steady` inside the steady window."""

    whole: float | None = None
    steady: float | None = None
    why_not_steady: str = ""


class PhaseSummary(Noun, frozen=True, kw_only=True):
    """One load and repeat. `distributions` by METRICS name; `acceptance` best source first."""

    name: str
    load: Load
    repeat: int
    measured: bool
    span_s: float
    requests: RequestCounts
    distributions: dict[str, Distribution]
    throughput: Throughput
    acceptance: tuple[Acceptance, ...]
    categories: tuple[CategorySummary, ...]
    step_time_s: float | None = None
    step_time_source: str | None = None
    achieved_concurrency_p50: float | None = None
    repeated_prompts: float = 0.0
    chunk_is_step: bool | None = None
    dialogues: tuple[DialogueFigures, ...] = ()


class Summary(Noun, frozen=True, kw_only=True):
    """A run file, read once. `end` is RunEnd's reason, None where the file has none."""

    info: RunInfo
    phases: tuple[PhaseSummary, ...]
    caveats: tuple[Caveat, ...]
    end: str | None = None


class Speedup(Noun, frozen=True, kw_only=True):
    """With ÷ without. `pairs` are dialogues completed in both runs."""

    ratio: float
    pairs: int
    interval: Interval | None = None


class CategoryComparison(Noun, frozen=True, kw_only=True):
    """speedup_user of one category in the mixed batch, with the acceptance of the run with it."""

    category: str
    speedup_user: Speedup | None
    acceptance: Acceptance | None
    steps: int | None


class LoadComparison(Noun, frozen=True, kw_only=True):
    """Both runs at one load. `outputs_differ` over `outputs_compared` paired answers (T = 0)."""

    load: Load
    repeat: int
    base: PhaseSummary
    spec: PhaseSummary
    speedup_user: Speedup | None
    speedup_throughput: Speedup | None
    throughput_basis: str
    categories: tuple[CategoryComparison, ...]
    outputs_compared: int = 0
    outputs_differ: int = 0


class Comparison(Noun, frozen=True, kw_only=True):
    """A run with speculation against its baseline. `differences`: what else is not the same."""

    base: RunInfo
    spec: RunInfo
    loads: tuple[LoadComparison, ...]
    differences: tuple[str, ...]
    caveats: tuple[Caveat, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a report renders: summaries with the paths they came from, and what was computed."""

    summaries: tuple[Summary, ...]
    paths: tuple[str, ...] = ()
    comparison: Comparison | None = None
    width: int = 100
    color: bool = False


# ── sets of prompts ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class SetFacts:
    """What a built-in set holds. `scripts` are writing systems, the most frequent first."""

    name: str
    description: str
    licence: str
    prompts: int
    turns: int
    multi_turn: int
    categories: Mapping[str, int]
    subcategories: int
    scripts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two prompts, their ids and the beginnings of their texts; `cosine` −1…1."""

    cosine: float
    ids: tuple[str, str]
    texts: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A category, or all: `cosine` is the mean over its pairs, None for one prompt."""

    category: str
    prompts: int
    multi_turn: int
    words: Distribution
    cosine: float | None
    nearest: Pair | None


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """How unlike the prompts of a set are. `near_duplicates` are pairs at or over `bound`."""

    source: str
    embedder: str
    categories: tuple[Spread, ...]
    whole: Spread
    pairs: tuple[Pair, ...]
    bound: float | None = None
    near_duplicates: int | None = None
