"""The nouns: every frozen type that crosses a module.

What users write (TOML, JSONL) is strict: unknown keys are refused. What run files carry is lenient:
unknown fields are ignored and new fields have defaults; `SCHEMA` rises only when a meaning changes.
Times are seconds since the run started on one clock (`time.perf_counter`), chunk gaps in a record
are microseconds. Missing is None, never an invented zero. Must not: import ours, decide.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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

    kind: Literal["builtin", "jsonl", "throughput", "random"] = "builtin"
    isl_tokens: int | None = None
    path: str | None = None
    categories: tuple[str, ...] = ()
    limit: AtLeastOne | None = None
    seed: int = 0
    skip_placeholders: bool = False
    skip_too_long: bool = False


class ClosedLoop(Written, frozen=True, kw_only=True, tag="closed", tag_field="kind"):
    """`concurrency` workers, each sending its next request when the last one ended."""

    concurrency: Annotated[int, Meta(ge=1, le=1 << 16)]


class OpenLoop(Written, frozen=True, kw_only=True, tag="open", tag_field="kind"):
    """`request_rate_rps` dialogues begun a second, whatever the state of the others.

    `arrivals` is a name of loadgen.arrivals.ARRIVALS. `burstiness` is vLLM's: gaps of `gamma` have
    a coefficient of variation of 1/√burstiness. At `max_in_flight` dialogues under way the next
    one waits in the client, and keeps the instant at which it should have begun.
    """

    request_rate_rps: Annotated[float, Meta(ge=0.001, le=100_000)]
    arrivals: str = "poisson"
    burstiness: Annotated[float, Meta(ge=0.01, le=1000)] = 1.0
    max_in_flight: Annotated[int, Meta(ge=1, le=1 << 16)] | None = None


Load = ClosedLoop | OpenLoop


class Stop(Written, frozen=True, kw_only=True):
    """A phase ends after `requests` dialogues, or when nothing new is sent after `duration_s`.

    Its load comes up over `ramp_s` before that: workers of a closed loop join evenly, the rate of
    an open loop grows linearly.
    """

    requests: AtLeastOne | None = None
    duration_s: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    ramp_s: Annotated[float, Meta(ge=0, le=1e9)] = 0.0


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
    """What is asked, at which loads, until when.

    `slo`: limits of each request, which goodput counts (ttft_s<=0.5), and bounds on a load, which
    is told where one does not hold (ttft_p95<=500ms).
    """

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
    slo: tuple[str, ...] = ()


class Message(Written, frozen=True, kw_only=True):
    """One chat message."""

    role: str
    content: str


class Prompt(Noun, frozen=True, kw_only=True):
    """One dialogue's opening, and what the user says after each answer.

    Exactly one of `messages` (then `later_turns`) or `prompt_token_ids` is the source of the text;
    once templated, `prompt_token_ids` holds the first turn's ids as well. `text` is what random ids
    say, as far as the tokenizer can tell.
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
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Prompts of an exact length in tokens, which only the target's tokenizer can make.

    `texts` are tokenized once, each as a user's only message, template and all; build() takes their
    ids in the same order and gives the prompts and a sentence on them for a person.
    """

    texts: tuple[str, ...]
    build: Callable[[Sequence[U32]], tuple[tuple[Prompt, ...], str]]


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
    """One load, once. `dialogues` may be endless when the phase ends by `duration_s`.

    `arrivals_s`: of an open loop, when each dialogue is to begin, from the start of the phase.
    """

    name: str
    load: Load
    repeat: int
    measured: bool
    dialogues: Iterable[Dialogue]
    duration_s: float | None = None
    category: str | None = None
    max_output_tokens: int | None = None
    ramp_s: float = 0.0
    arrivals_s: tuple[float, ...] = ()


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
    index 0 = first draft position; `accepted_histogram[j]` = drafted steps that accepted exactly j
    (all steps, where `drafts` is None). `draft_tokens_nominal` is steps × nodes a step, where
    nobody counts what was drafted. `generated_tokens`, `prompt_tokens` and `requests` are the
    server's own count over a window. Any may be None.
    """

    steps: Count | None = None
    drafts: Count | None = None
    draft_tokens: Count | None = None
    draft_tokens_nominal: Count | None = None
    draft_depth: Depth | None = None
    accepted_tokens: Count | None = None
    accepted_by_position: tuple[Count, ...] | None = None
    drafted_by_position: tuple[Count, ...] | None = None
    accepted_histogram: tuple[Count, ...] | None = None
    generated_tokens: Count | None = None
    prompt_tokens: Count | None = None
    requests: Count | None = None


class ServerLoad(Noun, frozen=True, kw_only=True):
    """What the server says about its own queue; requests, and the KV cache as a share 0…1.

    The others are cumulative: prompt tokens found in the prefix cache and asked of it, requests put
    back for want of memory, seconds that `queued` requests waited before they ran.
    """

    running: int | None = None
    waiting: int | None = None
    kv_cache_use: float | None = None
    prefix_hit_tokens: int | None = None
    prefix_asked_tokens: int | None = None
    preemptions: int | None = None
    queue_time_s: float | None = None
    queued: int | None = None


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
    far ÷ target passes so far, prefill's included. `tokens_so_far`: the answer's length up to here,
    on a wire (SGLang /generate) whose `token_ids` and `text` may be either all of the answer or
    what is new of it.
    """

    token_ids: tuple[int, ...] | None = None
    tokens_so_far: int | None = None
    text: str = ""
    thinking: bool = False
    choice: bool = True
    usage: Usage | None = None
    spec: SpecCounters | None = None
    timings: Timings | None = None
    tokens_per_pass: float | None = None
    finish_reason: str | None = None
    model: str | None = None
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
    usage said. `served_model` is who answered, as the answer says. `connect_s` is None on a reused
    connection. `intended_s`: when it should have left,
    in an open loop: a first turn at its arrival, a later one at the end of the turn before.
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
    served_model: str | None = None
    text: str | None = None


# ── the other lines of a run file ────────────────────────────────────────────────────────────────


class Caveat(Noun, frozen=True, kw_only=True, tag="caveat", tag_field="type"):
    """Why a figure may mislead, and what to do about it. `phase` None: the whole run."""

    code: str
    message: str
    advice: str
    phase: str | None = None


class PromptRecord(Noun, frozen=True, kw_only=True, tag="prompt", tag_field="type"):
    """A prompt's text, once. `text` is cut to 2,000 characters, or None with `--no-text`.

    `padded`: the share of its first turn, 0…1, that is one short piece repeated at an end; None in
    files of before it was measured.
    """

    prompt_id: str
    category: str
    subcategory: str | None = None
    tier: str | None = None
    isl_bucket: str | None = None
    isl_tokens: Count | None = None
    turns: Count = 1
    sha256: str = ""
    padded: Annotated[float, Meta(ge=0, le=1)] | None = None
    text: str | None = None


class PhaseRecord(Noun, frozen=True, kw_only=True, tag="phase", tag_field="type"):
    """When a phase ran. Steady: from in-flight first at its target to the last dispatch; of an
    open loop from the first arrival after the ramp to the last one."""

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
    """The client about itself. `loop_lag_s` is the largest since the sample before. An open loop
    has no `target`."""

    at_s: Seconds
    phase: str
    in_flight: Count
    target: Count | None = None
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
    """A server to launch: `servers/configs/*.toml`.

    `host`: what the server binds and draftload connects to (all addresses: through this machine).
    `executable` may be a prefix: `docker run … IMAGE vllm`, `ssh HOST vllm`. `files_dir`: a folder
    that both sides see, for what an engine needs beside its command.
    """

    engine: str
    model: str
    name: str | None = None
    spec: SpecConfig | None = None
    tensor_parallel: AtLeastOne = 1
    gpus: AtLeastOne | None = None
    host: Annotated[str, Meta(pattern=r"^[A-Za-z0-9:][A-Za-z0-9.:_-]*\Z")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, lt=1 << 16)] = 0
    executable: tuple[str, ...] = ()
    files_dir: str | None = None
    env: dict[Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\Z")], str] = {}
    max_running: AtLeastOne | None = None
    max_model_len: Annotated[int, Meta(ge=1, lt=1 << 31)] | None = None
    extra_args: tuple[str, ...] = ()


class Honours(Noun, frozen=True, kw_only=True):
    """What the server did when it was asked, found by preflight. None: could not be told.

    `wire` names the Engine's wire that was chosen where the API has more than one.
    """

    token_id_prompts: bool | None = None
    ids_in_chunks: bool = False
    continuous_usage: bool = False
    chunk_timings: bool = False
    per_request_acceptance: bool = False
    metrics_page: bool = False
    prefix_cache_off: bool | None = None
    wire: str | None = None


class ServerInfo(Noun, frozen=True, kw_only=True):
    """What is at the URL. `state` is whether speculation is on; `draft_depth` is k where known.

    `verified` is what of the engine was seen on a live server, as Engine says it. `vocabulary` is
    how many token ids the model has. `sampling_defaults`: what acts on its sampling beside
    what a request asks, in the engine's words.
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
    sampling_defaults: dict[str, float] = {}
    honours: Honours = Honours()
    simulated: bool = False
    verified: str = ""
    gpus: int | None = None
    config: ServerConfig | None = None


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What differs between engines: functions and facts, one value a file under `servers/`.

    `wires` by API; a third, "generate", is another way to send ids, which preflight takes where the
    server tells more on it. counters(samples) maps a raw metrics page to cumulative SpecCounters;
    load(samples) to the queue. `chunk_is_step`: True when one token-carrying chunk is one decode
    step of the request unless proven merged, False when never, None when unknown. `keeps_alive`
    False: the server closes after a stream without saying so.
    `owned_by`: what /v1/models says, for detection.
    `tick_prefixes`: families sampled during a phase. `describe` reads version, context, slots and
    speculation off the engine's own pages (path → JSON) given by preflight.
    `drained_path`: a page that every GET empties, read only where `metrics_path` is not there;
    drain(page, sums) gives the running sums with its rows added (ValueError: not such a page).
    `settle_s`: where the queue's gauges stay at their last value on an idle server, counters that
    agree over this many seconds are at rest, whatever the gauges say.
    `work`: a counter that grows with every step and is then at rest as well.
    `pool_options`: options of [spec] that, when true, make a drafter learn across requests.
    `files`: name → content of what `command` needs beside it, in the folder that FILES stands for.
    help(config): argv that prints every flag the executable knows; empty: it is not asked.
    `optional`: flags that are left out where it does not know them; `respelled`: (ours, older).
    acceptance_gauge(samples): the acceptance length that the server shows itself, over a window of
    its own; None: it has no such gauge, or nothing to show.
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
    work: str | None = None
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
    help: Callable[[ServerConfig], list[str]] = lambda config: []
    optional: frozenset[str] = frozenset()
    respelled: tuple[tuple[str, str], ...] = ()
    acceptance_gauge: Callable[[Mapping[str, float]], float | None] = lambda samples: None
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
    sampling_defaults: dict[str, float] = {}
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
    """The first line of a run file. `cell_sha256`: Cell.sha256 of a sweep's cell."""

    run_id: str
    started_at: str
    scenario: Scenario
    server: ServerInfo
    client: ClientInfo
    prompts_sha256: str
    schema: int = SCHEMA
    cell: str | None = None
    cell_sha256: str | None = None
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
    idle borders, None with `counters_missing` saying why. `prompts` by id. `figures`: once they
    are known, for the checks.
    """

    phase: PhaseRecord
    scenario: Scenario
    server: ServerInfo
    engine: Engine
    records: tuple[RequestRecord, ...]
    draft_depth: int | None = None
    client: tuple[ClientSample, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    counters: SpecCounters | None = None
    counters_missing: str = ""
    prompts: Mapping[str, PromptRecord] = field(default_factory=dict)
    figures: PhaseSummary | None = None


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
    `steps` None where decode steps are not known. `output`: the answers of all turns, as token ids
    of four bytes where the server gave them, else as text.
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
    output: bytes | str | None = None
    tier: str | None = None
    isl_bucket: str | None = None


class RequestFigures(Noun, frozen=True, kw_only=True):
    """One request: its single figures by METRICS name; none of one that did not complete."""

    category: str
    completed: bool
    values: dict[str, float]


class CategorySummary(Noun, frozen=True, kw_only=True):
    """One category, tier or ISL bucket, in the mixed batch or (a category) apart.

    `acceptance` None: no per-request figures. `step_time_s` None: steps are not known.
    """

    category: str
    requests: int
    acceptance: Acceptance | None
    user_tokens_per_s: Distribution
    ttft_s: Distribution = Distribution(n=0)
    step_time_s: float | None = None


class ServerContext(Noun, frozen=True, kw_only=True):
    """The server's own account of a phase, in one vocabulary for all engines.

    Medians and maxima are over one reading a second, inside the steady window where the phase has
    one; in flight is running + waiting. `prefix_hit_share` (of prompt tokens), `preemptions` and
    `queue_time_s` (mean a request) are growth over the phase.
    """

    in_flight_p50: float | None = None
    running_p50: float | None = None
    waiting_p50: float | None = None
    waiting_max: float | None = None
    kv_cache_use_max: float | None = None
    prefix_hit_share: float | None = None
    preemptions: int | None = None
    queue_time_s: float | None = None


class Throughput(Noun, frozen=True, kw_only=True):
    """Output tokens a second: `whole` over the phase, `steady` inside the steady window.

    `ramp_share` and `drain_share`: what of the phase, from its first send to its last end, lies
    before and after that window, 0…1.
    """

    whole: float | None = None
    steady: float | None = None
    why_not_steady: str = ""
    ramp_share: float | None = None
    drain_share: float | None = None


class AnswerShare(Noun, frozen=True, kw_only=True):
    """Answers under one label, their share 0…1 with its interval, and their pooled AL."""

    label: str
    count: int
    interval: Interval | None = None
    acceptance_length: float | None = None


class AnswerFigures(Noun, frozen=True, kw_only=True):
    """What a phase's answers to random input were. `shares` add up to `answers`.

    `prompts_known` False: the prompts' text is not known, so echo and latched could not be told.
    `clustered` are answers that begin like another; `bimodality` is of the requests' AL.
    """

    answers: int
    prompts_known: bool
    shares: tuple[AnswerShare, ...]
    clustered: AnswerShare
    bimodality: float | None = None


class PhaseSummary(Noun, frozen=True, kw_only=True):
    """One load and repeat. `distributions` by METRICS name; `acceptance` best source first.

    `tiers` and `isl_buckets` group what `categories` groups otherwise; () where prompts have none.
    `started_s` is None where the phase's own record is missing. `categories_apart`: the categories
    ran one after another, not in a mixed batch.
    """

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
    answers: AnswerFigures | None = None
    server: ServerContext | None = None
    categories_apart: bool = False
    tiers: tuple[CategorySummary, ...] = ()
    isl_buckets: tuple[CategorySummary, ...] = ()
    started_s: float | None = None
    prompt_tokens_a_step: float | None = None
    prompt_steps_share: float | None = None
    each: tuple[RequestFigures, ...] = ()
    goodput_rps: float | None = None


class Summary(Noun, frozen=True, kw_only=True):
    """A run file, read once. `end` is RunEnd's reason, None where the file has none.

    `run_ids`: of several runs joined into one, all of them; `info` is then the first's.
    """

    info: RunInfo
    phases: tuple[PhaseSummary, ...]
    caveats: tuple[Caveat, ...]
    end: str | None = None
    run_ids: tuple[str, ...] = ()


Mark = Literal["pays", "no difference", "costs", "?"]
"""Where an interval over repeats lies: above 1, around it, below it; "?" is no such interval."""


class Speedup(Noun, frozen=True, kw_only=True):
    """With ÷ without, of a speed or of output length. `pairs`: dialogues completed in both runs.

    Over `repeats`: the geometric mean of their ratios. `mark` is "?" below three repeats that took
    turns: then the interval is one within a run.
    """

    ratio: float
    pairs: int
    interval: Interval | None = None
    repeats: int = 1
    mark: Mark = "?"


class CategoryComparison(Noun, frozen=True, kw_only=True):
    """speedup_user of one category (or tier, or ISL bucket) in the mixed batch, and both runs'
    figures of it; `acceptance` and `steps` are of the run with speculation."""

    category: str
    speedup_user: Speedup | None
    acceptance: Acceptance | None
    steps: int | None
    base: CategorySummary | None = None
    spec: CategorySummary | None = None


class OutputDifference(Noun, frozen=True, kw_only=True):
    """Pairs of answers to one prompt at temperature 0. `first_p50`: median position, from 0, of the
    first token (or character, `unit`) that differs, over all turns of the pairs that differ."""

    compared: int = 0
    differ: int = 0
    first_p50: float | None = None
    unit: Literal["token", "character", "token or character"] = "token"


class RepeatComparison(Noun, frozen=True, kw_only=True):
    """The two phases of one repeat and their ratios, which the figures over repeats come from."""

    repeat: int
    base_phase: str
    spec_phase: str
    speedup_user: float | None
    speedup_throughput: float | None


class LoadComparison(Noun, frozen=True, kw_only=True):
    """Both sides at one load, over the `repeats` that both have.

    `base`, `spec`: of several repeats, counts are sums, acceptance is pooled over steps, and other
    figures are means over the repeats. `verdict` None: `why_no_verdict` says why.
    `outputs` are base against spec, `noise` base against base; None: there are no such pairs.
    `speedup_by_dialogue` is Spec-Bench's, `speedup_expected` AL × step time without ÷ with.
    `queue_s`: seconds that a request waited at the server, without and with.
    """

    load: Load
    base: PhaseSummary
    spec: PhaseSummary
    speedup_user: Speedup | None
    speedup_throughput: Speedup | None
    throughput_basis: str
    categories: tuple[CategoryComparison, ...]
    tiers: tuple[CategoryComparison, ...] = ()
    isl_buckets: tuple[CategoryComparison, ...] = ()
    repeats: tuple[RepeatComparison, ...] = ()
    verdict: Literal["pays", "no difference", "costs", "disagree"] | None = None
    why_no_verdict: str = ""
    outputs: OutputDifference | None = None
    noise: OutputDifference | None = None
    output_length: Speedup | None = None
    speedup_by_dialogue: float | None = None
    speedup_expected: float | None = None
    queue_s: tuple[float | None, float | None] = (None, None)


class Comparison(Noun, frozen=True, kw_only=True):
    """Runs with speculation against their baseline. `differences`: what else is not the same.

    `base` and `spec` are the first run of each side, `base_runs` and `spec_runs` the ids of all.
    """

    base: RunInfo
    spec: RunInfo
    loads: tuple[LoadComparison, ...]
    differences: tuple[str, ...]
    caveats: tuple[Caveat, ...] = ()
    base_runs: tuple[str, ...] = ()
    spec_runs: tuple[str, ...] = ()


class Factor(Noun, frozen=True, kw_only=True):
    """One cause of a ratio, as a factor of it."""

    name: str
    ratio: float


class Misstated(Noun, frozen=True, kw_only=True):
    """One load on random and on real input, ratios random ÷ real.

    `factors` multiply to `throughput.ratio`; () with `not_split` saying why. `routing`: what the
    times without speculation say of experts routed to otherwise, None with speculation.
    """

    load: Load
    repeat: int
    random: PhaseSummary
    real: PhaseSummary
    throughput: Speedup | None
    basis: str
    acceptance: Speedup | None
    time_per_token: Speedup | None
    time_outside_decoding: Speedup | None
    routing: Literal["unequal_lengths", "signs", "no_signs"] | None
    factors: tuple[Factor, ...]
    not_split: str = ""


class Misstatement(Noun, frozen=True, kw_only=True):
    """A random control against real text on the same server."""

    random: RunInfo
    real: RunInfo
    loads: tuple[Misstated, ...]
    differences: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a report renders: summaries with the paths they came from, and what was computed."""

    summaries: tuple[Summary, ...]
    paths: tuple[str, ...] = ()
    comparison: Comparison | None = None
    advice: tuple[Advice, ...] = ()
    capacity: Capacity | None = None
    sweep: SweepResult | None = None
    misstatement: Misstatement | None = None
    width: int = 100
    color: bool = False
    break_even: BreakEven | None = None
    judged: tuple[Judged, ...] = ()


# ── the monitor ──────────────────────────────────────────────────────────────────────────────────

ScrapeResult = Literal["ok", "unidentified", "unreachable", "timed_out", "refused", "garbage"]
"""How a scrape ended: `refused` by an HTTP error, `garbage`: that was no metrics page,
`unidentified`: what is there could not be told."""


class Reading(Noun, frozen=True, kw_only=True):
    """One scrape of a deployed server. `server` is its host:port, `at_unix_s` the wall clock.

    `info`: what was found there last; None until it was found once. `grown`: by what its counters
    grew since the last scrape that worked, after a restart all that they hold. `load` and
    `acceptance_gauge` (Engine's) are as they stand. All are None where the scrape failed, and `why`
    says why. `rss_bytes` is the monitor's own memory.
    """

    server: str
    at_unix_s: float
    duration_s: float
    result: ScrapeResult
    rss_bytes: int
    why: str = ""
    info: ServerInfo | None = None
    grown: SpecCounters | None = None
    load: ServerLoad | None = None
    acceptance_gauge: float | None = None
    restarted: bool = False


@dataclass(frozen=True, kw_only=True)
class Probed:
    """One request of the monitor's canary to a server, as it ended."""

    server: str
    info: ServerInfo
    engine: Engine
    scenario: str
    record: RequestRecord


# ── sets of prompts ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class SetFacts:
    """What a built-in set holds. `scripts` are writing systems, the most frequent first.

    `made`: how its prompts are made, where no file holds them; then `scripts` is empty.
    """

    name: str
    description: str
    licence: str
    prompts: int
    turns: int
    multi_turn: int
    categories: Mapping[str, int]
    subcategories: int
    scripts: tuple[str, ...]
    made: str = ""


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


# ── bounds, step cost, capacity ──────────────────────────────────────────────────────────────────

STATISTICS = ("mean", "min", "max", "p50", "p90", "p95", "p99")
"""What a bound may ask of a distribution."""


class Bound(Noun, frozen=True, kw_only=True):
    """A limit as the user wrote it (`text`), read: `metric` `op` `value`, in base units.

    `statistic` None: of each request, or of a figure that a phase has once. `relative`: `value` is
    a change in proportion to the baseline, −0.02 for -2%. `load`: at this one only, such as "c=32".
    """

    text: str
    metric: str
    op: str
    value: float
    statistic: str | None = None
    relative: bool = False
    load: str | None = None


# ── break-even map, bounds on a comparison ───────────────────────────────────────────────────────


class Crossing(Noun, frozen=True, kw_only=True):
    """Where a row goes through 1.0: between two measured loads, at `at` by interpolation in the
    logarithms of load and ratio. `falls`: it is above 1.0 at `low` and below at `high`."""

    low: Load
    high: Load
    at: float
    falls: bool


class BreakEvenRow(Noun, frozen=True, kw_only=True):
    """One row of the map: a cell a load, None where it was not measured."""

    name: str
    figure: Literal["speedup_user", "speedup_throughput"]
    cells: tuple[Speedup | None, ...]
    crossings: tuple[Crossing, ...] = ()


class BreakEven(Noun, frozen=True, kw_only=True):
    """Speedup by category (or tier, or ISL bucket) and load. The rows of all prompts come last:
    speedup_user, then speedup_throughput. `why_no_verdict`: why cells have no mark."""

    by: Literal["category", "tier", "isl_bucket"]
    loads: tuple[Load, ...]
    rows: tuple[BreakEvenRow, ...]
    repeats: int = 1
    why_no_verdict: str = ""


class OperatingPoint(Noun, frozen=True, kw_only=True):
    """One load of one config: user speed against output tokens/s, which may be of a GPU.

    `steady` False: output over the whole phase. Means over `repeats`.
    """

    load: Load
    user_tokens_per_s: float
    output_tokens_per_s: float
    steady: bool = True
    repeats: int = 1


class CurveCrossing(Noun, frozen=True, kw_only=True):
    """Where two configs give the same output at the same user speed, between measured loads.
    `second_above`: at higher user speeds the second gives more output, at lower ones less."""

    user_tokens_per_s: float
    output_tokens_per_s: float
    second_above: bool


class Judged(Noun, frozen=True, kw_only=True):
    """A `--fail-if` bound at one load. `crossed` with the value that it was held against; `spec`
    is what the side with speculation is called."""

    bound: Bound
    spec: str
    load: str
    value: float
    crossed: bool


# ── advice, capacity ─────────────────────────────────────────────────────────────────────────────


class StepPoint(Noun, frozen=True, kw_only=True):
    """One phase's mean step time and what the fit gives there, seconds. `load` such as "c=8".

    `batch` requests decode together, `k` tokens are drafted for each; `acceptance_length` is 1
    where k = 0. `drafting_s`: the fit's share of drafting. None: no fit.
    """

    load: str
    batch: float
    k: int
    step_time_s: float
    acceptance_length: float | None = None
    fitted_s: float | None = None
    drafting_s: float | None = None


class DraftLength(Noun, frozen=True, kw_only=True):
    """What k drafted tokens are predicted to give at one load. `cost` = step time ÷ at k = 0.

    `speedup_user_low`: were drafting as dear as at the one k that was measured; None where another
    k was measured too, and at that k.
    """

    k: int
    acceptance_length: float
    step_time_s: float
    cost: float
    speedup_user: float
    speedup_user_low: float | None = None


class LoadAdvice(Noun, frozen=True, kw_only=True):
    """Draft lengths 0 … the longest measured at one load; `best` is the k to use.

    `near`: another k is predicted within the fit's residual of it, or within its range. `limit`:
    why the longest does not pay: "" (it does), "drafts" (its AL would not pay for the cheapest step
    at any load) or "verification" (there it would pay, here a step costs more).
    """

    load: str
    batch: float
    lengths: tuple[DraftLength, ...]
    best: int
    near: bool
    limit: Literal["", "drafts", "verification"]


class Advice(Noun, frozen=True, kw_only=True):
    """One drafter on one server: its step cost, and the k to use by load.

    `why_not`: why there is no prediction (`loads` and `schedule` are empty), `missing`: the run
    that would mend it. `residual` is the fit's root mean square error as a share of step time, None
    where the fit has as many coefficients as points. `schedule` is (first batch, last batch, k);
    `vllm`, `trtllm` and `trtllm_1_2` are it as the engines read it, None where they cannot.
    """

    server: ServerInfo
    method: str
    runs: tuple[str, ...]
    points: tuple[StepPoint, ...]
    residual: float | None = None
    r_squared: float | None = None
    loads: tuple[LoadAdvice, ...] = ()
    schedule: tuple[tuple[int, int, int], ...] = ()
    vllm: str | None = None
    trtllm: str | None = None
    trtllm_1_2: str | None = None
    why_not: str = ""
    missing: str = ""
    confirm: str = ""


class CapacityLoad(Noun, frozen=True, kw_only=True):
    """One load of one config, repeats pooled, weighted to the mix. `figures` stand in the order of
    the bounds; infinite where failed requests are the percentile.

    `users` None: an open loop. `inside`: every bound holds; None: it cannot be told, `why` says so.
    `error`: half of a 95 % interval of `requests_per_s`, as a share of it, that weighting by
    category brings; None without a mix, or where a category has one request. `weight_of` is how
    many requests of equal weight would tell as much. `basis` of the rates: "steady" or "whole".
    """

    load: str
    users: int | None
    figures: tuple[float | None, ...]
    inside: bool | None
    requests: int
    weight_of: float
    why: str = ""
    requests_per_s: float | None = None
    output_tokens_per_s: float | None = None
    goodput_rps: float | None = None
    error: float | None = None
    basis: str = ""


class ConfigCapacity(Noun, frozen=True, kw_only=True):
    """What one server config carries. `border`: the bounds hold at `holds` and no longer at
    `fails`; "at least": they hold at every measured load; "below": at none; "unknown".

    `gpus` of one server, None: not told, and figures a GPU are of a server. `servers` for the rate
    asked for, with headroom. `cost_per_million` output tokens at `holds` with headroom.
    """

    server: ServerInfo
    runs: tuple[str, ...]
    loads: tuple[CapacityLoad, ...]
    border: Literal["between", "at least", "below", "unknown"]
    gpus: int | None = None
    holds: CapacityLoad | None = None
    fails: CapacityLoad | None = None
    users_per_gpu: float | None = None
    requests_per_s_per_gpu: float | None = None
    servers: int | None = None
    gpus_needed: int | None = None
    cost_per_million: float | None = None


class Capacity(Noun, frozen=True, kw_only=True):
    """Every config under the same bounds, the one that carries most a GPU first.

    `bounds` are of a load, `limits` of each request (goodput). `mix`: category → share, None: as
    measured. `gpu_price_per_h` in the user's currency.
    """

    bounds: tuple[Bound, ...]
    limits: tuple[Bound, ...]
    configs: tuple[ConfigCapacity, ...]
    headroom: float
    rps: float | None = None
    mix: dict[str, float] | None = None
    gpu_price_per_h: float | None = None
    caveats: tuple[Caveat, ...] = ()


# ── sweeps ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class SweepServer:
    """A server of a matrix: launched from `config`, or attached to at `url`.

    `fresh`: its drafter learns from earlier requests, so every cell gets a server just started.
    The other fields are the flags of `draftload run` of that name.
    """

    name: str
    url: str | None = None
    config: ServerConfig | None = None
    fresh: bool = False
    engine: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    api: Literal["completions", "chat"] = "completions"
    metrics_url: str | None = None
    gpus: int | None = None


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """What to sweep over. `baseline` names the server that the others are held against, if any."""

    name: str
    servers: tuple[SweepServer, ...]
    scenarios: tuple[Scenario, ...]
    repeats: int
    baseline: str | None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One server × scenario × load × repeat of a matrix: one run file.

    `scenario` holds the one load. `repeat` counts from 0, `name` says it from 1. `sha256` is of all
    that decides what is measured, the repeat and what is secret left out.
    """

    name: str
    server: SweepServer
    scenario: Scenario
    repeat: int
    sha256: str

    @property
    def load(self) -> Load:
        """The one load."""
        return self.scenario.loads[0]


@dataclass(frozen=True, kw_only=True)
class OverRepeats:
    """A figure over `n` repeats; all None where no repeat has it."""

    n: int = 0
    median: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """A server × scenario × load over its repeats: `measured` of `cells`, `failed` says why not.

    `notes`: why a figure is missing, or may mislead. Throughput is the steady one.
    """

    server: str
    scenario: str
    load: Load
    cells: int
    measured: int
    failed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    output_tokens_per_s: OverRepeats = OverRepeats()
    user_tokens_per_s: OverRepeats = OverRepeats()
    ttft_p95_s: OverRepeats = OverRepeats()
    acceptance_length: OverRepeats = OverRepeats()
    speedup_user: OverRepeats = OverRepeats()
    speedup_throughput: OverRepeats = OverRepeats()


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """A sweep as far as it has come. `differences`: server → what else is not the baseline's."""

    name: str
    rows: tuple[SweepRow, ...]
    baseline: str | None
    differences: Mapping[str, tuple[str, ...]]
    simulated: bool = False
