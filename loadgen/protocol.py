"""The wire, without I/O: server-sent-events framing, the OpenAI wire, and one stream's tally.

Bytes in, chunks out, for any split of the bytes (h11's sans-IO idea). SSE framing follows the
WHATWG HTML standard §9.2.6: lines end in LF, CRLF or CR, an empty line ends an event, `data:` lines
are joined by LF, comments and other fields are passed over. Must not: read a clock, await, know a
server.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise, repeat
from typing import Annotated, Any

import msgspec

from loadgen.types import (
    U32,
    Broke,
    Chunk,
    Completed,
    Depth,
    Outcome,
    Request,
    RequestRecord,
    Sampling,
    SpecCounters,
    Timings,
    TokenCountSource,
    Usage,
    Wire,
)

DONE = b"[DONE]"
MAX_EVENT_BYTES = 64 << 20
"""An event longer than this is refused: no server sends one, and memory must stay bounded."""

_U32_MAX = 0xFFFFFFFF


class SSE:
    """Splits a byte stream into the payloads of its events, however the bytes are cut."""

    __slots__ = ("_cr", "_parts", "_size")

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._cr = False  # a CR ended the last read: an LF that follows belongs to it

    def feed(self, data: bytes) -> list[bytes]:
        """The `data` payloads of all events that `data` completes. ValueError: event too long."""
        if (
            not self._parts
            and not self._cr
            and data.startswith(b"data: ")
            and data.endswith(b"\n\n")
            and data.find(b"\n") == len(data) - 2
            and b"\r" not in data
        ):
            return [data[6:-2]]  # one whole event, as nearly every read is
        data = self._normalised(data)
        if self._parts and data:
            seam = self._parts[-1][-1:]
            self._parts.append(data)
            self._size += len(data)
            if b"\n\n" not in seam + data:
                return self._within_bounds()
            data = b"".join(self._parts)
            self._parts.clear()
            self._size = 0
        *blocks, rest = data.split(b"\n\n")
        if rest:
            self._parts.append(rest)
            self._size = len(rest)
            self._within_bounds()
        payloads = []
        for block in blocks:
            if block.startswith(b"data: ") and b"\n" not in block:
                payloads.append(block[6:])
            elif (payload := _payload(block)) is not None:
                payloads.append(payload)
        return payloads

    def close(self) -> list[bytes]:
        """A last event without its empty line: sent by servers that close in a hurry."""
        rest = b"".join(self._parts)
        self._parts.clear()
        payload = _payload(rest)
        return [payload] if payload is not None else []

    def _normalised(self, data: bytes) -> bytes:
        if self._cr and data:
            self._cr = False
            data = data.removeprefix(b"\n")
        if b"\r" in data:
            self._cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return data

    def _within_bounds(self) -> list[bytes]:
        if self._size > MAX_EVENT_BYTES:
            raise ValueError(f"an event of more than {MAX_EVENT_BYTES >> 20} MiB")
        return []


def _payload(block: bytes) -> bytes | None:
    lines = [
        line[6:] if line.startswith(b"data: ") else line[5:]
        for line in block.split(b"\n")
        if line.startswith(b"data:")
    ]
    return b"\n".join(lines) if lines else None


# ── the OpenAI wire ──────────────────────────────────────────────────────────────────────────────


# A count below zero, or one that no array of ours holds, is a malformed event, never a figure.
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
# Lists are made as long as these: a lie of two thousand million drafts must not cost memory.
MOST_DRAFTED = 4096
_Histogram = Annotated[tuple[_Count, ...], msgspec.Meta(max_length=MOST_DRAFTED + 1)]
_Answer = Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]
_Ids = tuple[Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)], ...]


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Speculative(msgspec.Struct, gc=False):
    """Acceptance of one request: vLLM 0.32's `metrics.speculative_decoding`."""

    num_spec_steps: _Count
    num_accepted_draft_tokens: _Count
    num_draft_tokens: _Count
    num_spec_tokens: Depth | None = None
    acceptance_histogram: _Histogram | None = None
    per_step_drafted: tuple[Depth, ...] | None = None


_TRTLLM = {
    "num_accepted_draft_tokens": "total_accepted_draft_tokens",
    "num_draft_tokens": "total_draft_tokens",
}


class _ChoiceSpeculative(msgspec.Struct, gc=False, rename=_TRTLLM):
    """The same in a choice (TensorRT-LLM #19311); its steps are taken for those with a draft."""

    num_spec_steps: _Count | None = None
    num_accepted_draft_tokens: _Count | None = None
    num_draft_tokens: _Count | None = None
    num_spec_tokens: Depth | None = None
    acceptance_histogram: _Histogram | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: _Ids | None = None
    avg_decoded_tokens_per_iter: float | None = None
    speculative_decoding: _ChoiceSpeculative | None = None


class _Details(msgspec.Struct, gc=False):
    cached_tokens: _Count | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: _Details | None = None


class _Timings(msgspec.Struct, gc=False):
    predicted_n: _Answer
    predicted_ms: float
    draft_n: _Count | None = None
    draft_n_accepted: _Count | None = None


class _Metrics(msgspec.Struct, gc=False):
    speculative_decoding: _Speculative | None = None


class _Event(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    timings: _Timings | None = None
    metrics: _Metrics | None = None
    model: str | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)


def decode_openai(payload: bytes) -> Chunk:
    """One event of `/v1/completions` or `/v1/chat/completions`; ValueError when malformed.

    Reads the extensions that name tokens and speculation where a server sends them: `token_ids`
    and `metrics.speculative_decoding` (vLLM 0.32), `timings` (llama.cpp b11434), and in a choice
    `avg_decoded_tokens_per_iter` (TensorRT-LLM 1.4) and `speculative_decoding` (its #19311, open).
    """
    try:
        event = _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise ValueError(f"malformed event: {fault}") from None
    choice = event.choices[0] if event.choices else None
    text, thinking, ids, finish, rate = "", False, None, None, None
    if choice is not None:
        rate = choice.avg_decoded_tokens_per_iter
        ids, finish = choice.token_ids, choice.finish_reason
        if choice.text is not None:
            text = choice.text
        elif (delta := choice.delta) is not None:
            # Thinking comes in a field of its own, named in two ways; its tokens are output too.
            text = delta.content or delta.reasoning_content or delta.reasoning or ""
            thinking = bool(text) and not delta.content
    usage = event.usage
    return Chunk(
        token_ids=ids,
        text=text,
        thinking=thinking,
        choice=choice is not None,
        usage=None
        if usage is None
        else Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.prompt_tokens_details.cached_tokens
            if usage.prompt_tokens_details
            else None,
        ),
        timings=None
        if event.timings is None
        else Timings(
            predicted_tokens=event.timings.predicted_n,
            predicted_ms=event.timings.predicted_ms,
            draft_tokens=event.timings.draft_n,
            accepted_tokens=event.timings.draft_n_accepted,
        ),
        spec=_acceptance(event, choice),
        tokens_per_pass=rate,
        finish_reason=finish,
        model=event.model,
        error=None if event.error is None else error_text(event.error),
    )


def _acceptance(event: _Event, choice: _Choice | None) -> SpecCounters | None:
    """What the stream says of itself (vLLM), else what its choice says (TensorRT-LLM)."""
    whole = event.metrics.speculative_decoding if event.metrics is not None else None
    if whole is not None:
        return _figures(whole, whole.per_step_drafted)
    own = choice.speculative_decoding if choice is not None else None
    return _figures(own) if own is not None else None


def _figures(
    told: _Speculative | _ChoiceSpeculative, drafted: tuple[int, ...] | None = None
) -> SpecCounters:
    """Only steps that had a draft are counted here, before the cut at max_tokens (vLLM 0.32).

    `drafted`: draft tokens of each of those steps.
    """
    histogram = told.acceptance_histogram
    return SpecCounters(
        drafts=told.num_spec_steps,
        draft_tokens=told.num_draft_tokens,
        draft_depth=told.num_spec_tokens,
        accepted_tokens=told.num_accepted_draft_tokens,
        accepted_histogram=histogram,
        accepted_by_position=None if histogram is None else survivors(histogram),
        drafted_by_position=None if drafted is None else survivors(histogram_of(drafted)),
    )


def survivors(histogram: Sequence[int]) -> tuple[int, ...]:
    """Steps by accepted count (index = accepted, from 0) → steps that accepted position j + 1."""
    return tuple(accumulate(reversed(histogram[1:])))[::-1]


def histogram_of(counts: Sequence[int]) -> tuple[int, ...]:
    """Counts from 0, one a step → steps by count."""
    found = Counter(counts)
    return tuple(found[n] for n in range(max(counts, default=0) + 1))


def error_text(error: object) -> str:
    """What an `error` member says: its message where it has one."""
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])
    return str(error)


def _body(request: Request, model: str, sampling: Sampling) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": request.max_output_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,  # 1 too: llama.cpp would take 0.95, vLLM a model's own
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.ignore_eos:
        body["ignore_eos"] = True
    return body


def completions_wire(extra: Mapping[str, Any]) -> Wire:
    """`POST /v1/completions` with token ids; `extra` are the engine's own body fields."""

    def encode(request: Request, model: str, sampling: Sampling) -> bytes:
        ids = request.prompt_token_ids
        body = _body(request, model, sampling) | dict(extra)
        body["prompt"] = [] if ids is None else ids.tolist()
        return msgspec.json.encode(body)

    return Wire(path="/v1/completions", encode=encode, decode=decode_openai)


def chat_wire(extra: Mapping[str, Any]) -> Wire:
    """`POST /v1/chat/completions` with messages: the server applies its own template."""

    def encode(request: Request, model: str, sampling: Sampling) -> bytes:
        body = _body(request, model, sampling) | dict(extra)
        body["messages"] = [{"role": m.role, "content": m.content} for m in request.messages]
        if request.template_args:
            body["chat_template_kwargs"] = request.template_args
        return msgspec.json.encode(body)

    return Wire(path="/v1/chat/completions", encode=encode, decode=decode_openai)


def without_folder(model: str) -> str:
    """`/models/a.gguf` → `a.gguf`, so that no run file tells a path; a hub's `owner/name` stays."""
    return model.rpartition("/")[2] if model.startswith("/") else model


# ── one stream's tally ───────────────────────────────────────────────────────────────────────────


class _Steps:
    """Decode steps read off cumulative timings: all tokens of a step carry one `predicted_ms`.

    llama.cpp, `timings_per_token` (b11434 and b11549): a step that verified a draft is one in which
    `draft_n` grew, by the tokens drafted; `draft_n_accepted` grew by those accepted. A token whose
    bytes are half a character has no event of its own; its count arrives with the next one, which
    may be of a later step. A step gives its accepted tokens and one more: what a group holds beyond
    that is owed to the step before, or were steps of one token without an event.
    """

    __slots__ = ("_accepted", "_before", "_drafted", "_groups", "_ms")

    def __init__(self) -> None:
        self._groups: list[int] = []  # tokens by predicted_ms
        self._drafted: list[int] = []  # draft tokens a group, 0 where it had no draft
        self._accepted: list[int] = []
        self._ms: float | None = None
        self._before = (0, 0)

    def add(self, timings: Timings, tokens: int) -> None:
        """ValueError: more drafted than any step can hold."""
        if timings.predicted_ms != self._ms:
            before, now = self._before, (timings.draft_tokens or 0, timings.accepted_tokens or 0)
            drafted, accepted = max(now[0] - before[0], 0), max(now[1] - before[1], 0)
            if drafted > MOST_DRAFTED:
                raise ValueError(f"{drafted} tokens drafted in one step")
            self._ms, self._before = timings.predicted_ms, now
            self._groups.append(0)
            self._drafted.append(drafted)
            self._accepted.append(accepted)
        self._groups[-1] += tokens

    def passes(self) -> U32:
        """Tokens of each target pass, prefill first."""
        found: U32 = array("I")
        owed = 0  # tokens of earlier steps that were held back
        for tokens, accepted in zip(self._groups, self._accepted, strict=True):
            spare = tokens - accepted - 1
            late = min(spare, owed)
            if late > 0:
                found[-1] += late
                tokens, spare, owed = tokens - late, spare - late, owed - late
            found.extend(repeat(1, max(spare, 0)))
            found.append(tokens - max(spare, 0))
            owed += max(-spare, 0)
        return found

    def counters(self) -> SpecCounters:
        steps = max(len(self.passes()) - 1, 0)
        drafts = [(d, a) for d, a in zip(self._drafted, self._accepted, strict=True) if d > 0]
        if not drafts:
            # Nothing drafted and speculation off look alike here: acceptance knows which it is.
            return SpecCounters(steps=steps)
        depth = max(d for d, _ in drafts)
        kept = histogram_of([min(a, depth) for _, a in drafts])
        histogram = (*kept, *[0] * (depth + 1 - len(kept)))
        return SpecCounters(
            steps=steps,
            drafts=len(drafts),
            draft_tokens=sum(d for d, _ in drafts),
            accepted_tokens=sum(a for _, a in drafts),
            accepted_histogram=histogram,
            accepted_by_position=survivors(histogram),
            drafted_by_position=survivors(histogram_of([d for d, _ in drafts])),
        )


class Tally:
    """What one stream delivered: stamps and token counts of its chunks, figures, text, end.

    `finished` is the stamp of the chunk that ended the answer.
    Feed it every read with the time at which its bytes arrived. Tokens of a chunk are counted from
    ids, else continuous usage, else per-chunk timings, else not at all: then the final usage alone
    gives `osl_tokens` and chunk figures are None. Acceptance is never derived from text.
    """

    __slots__ = (
        "_chunks",
        "_decode",
        "_ids",
        "_rate",
        "_source",
        "_spec",
        "_sse",
        "_stamps",
        "_steps",
        "_text",
        "_thinking",
        "_uncounted",
        "_usage",
        "cached_tokens",
        "done",
        "error",
        "finish_reason",
        "finished",
        "model",
        "prompt_tokens",
        "tokens",
    )

    def __init__(self, decode: Callable[[bytes], Chunk]) -> None:
        self._decode = decode
        self._sse = SSE()
        self._stamps: array[float] = array("d")
        self._chunks: U32 = array("I")
        self._source: TokenCountSource | None = None
        self._uncounted = 0
        self._ids: U32 = array("I")
        self._text: list[str] = []
        self._thinking = False
        self._usage: int | None = None
        self._rate: float | None = None
        self._spec: SpecCounters | None = None
        self._steps: _Steps | None = None
        self.tokens = 0
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.finish_reason: str | None = None
        self.finished: float | None = None
        self.model: str | None = None
        self.error: str | None = None
        self.done = False

    @property
    def chunks(self) -> int:
        """Token-carrying chunks so far."""
        return len(self._stamps)

    def feed(self, stamp: float, data: bytes) -> None:
        """One read. ValueError: an event that is not what the wire speaks."""
        for payload in self._sse.feed(data):
            self._event(stamp, payload)

    def close(self, stamp: float) -> None:
        """The stream ended; a last event may lack its empty line."""
        for payload in self._sse.close():
            self._event(stamp, payload)

    def _event(self, stamp: float, payload: bytes) -> None:
        if self.done or not payload:
            return  # what follows [DONE] (TensorRT-LLM's perf_metrics event) is not the answer
        if payload == DONE:
            self.done = True
            if self.finished is None:
                self.finished = stamp
            return
        chunk = self._decode(payload)
        if chunk.error is not None:
            self.error = chunk.error
            return
        if chunk.tokens_so_far is not None:
            chunk = self._grown(chunk, chunk.tokens_so_far)
        tokens = self._count(chunk)
        if tokens:
            self._stamps.append(stamp)
            self._chunks.append(tokens)
            self.tokens += tokens
        elif chunk.text and self._source in (None, "final_usage"):
            self._source = "final_usage"
            self._uncounted += 1
            self._stamps.append(stamp)
        if chunk.text:
            if chunk.thinking != self._thinking:
                # As the model wrote it, before the server took the tags away: the next turn's
                # template finds the thinking by them.
                self._text.append("<think>" if chunk.thinking else "</think>")
                self._thinking = chunk.thinking
            self._text.append(chunk.text)
        if chunk.finish_reason is not None:
            self.finish_reason = chunk.finish_reason
            self.finished = stamp
        if chunk.spec is not None:
            self._spec = chunk.spec
        if chunk.tokens_per_pass is not None:
            self._rate = chunk.tokens_per_pass
        if self.model is None:
            self.model = chunk.model
        usage = chunk.usage
        if usage is not None:
            if usage.completion_tokens is not None:
                self._usage = usage.completion_tokens
            if usage.prompt_tokens is not None:
                self.prompt_tokens = usage.prompt_tokens
            if usage.cached_tokens is not None:
                self.cached_tokens = usage.cached_tokens

    def _grown(self, chunk: Chunk, so_far: int) -> Chunk:
        """The chunk with only its new ids: the last ones, whether it holds all ids or the new."""
        ids = chunk.token_ids or ()
        if len(ids) == so_far:
            self._text.clear()  # the chunk holds the whole answer, its text too
        return msgspec.structs.replace(
            chunk, token_ids=ids[max(len(ids) - max(so_far - self.tokens, 0), 0) :]
        )

    def _count(self, chunk: Chunk) -> int:
        """Tokens this chunk brought, 0 where none or unknown."""
        source, timings = self._source, chunk.timings
        tokens = 0
        if chunk.token_ids is not None and source in (None, "ids"):
            tokens = len(chunk.token_ids)
            if tokens:
                self._source = "ids"
                self._ids.extend(chunk.token_ids)
        elif (
            chunk.usage is not None
            and chunk.usage.completion_tokens is not None
            and chunk.choice
            and source in (None, "continuous_usage")
            and timings is None
        ):
            tokens = max(chunk.usage.completion_tokens - self.tokens, 0)
            if tokens:
                self._source = "continuous_usage"
        elif timings is not None and source in (None, "timings"):
            tokens = max(timings.predicted_tokens - self.tokens, 0)
            if tokens:
                self._source = "timings"
        if timings is not None and tokens:
            if self._steps is None:
                self._steps = _Steps()
            self._steps.add(timings, tokens)
        return tokens

    def outcome(self) -> Outcome:
        """How a stream that the server ended came out."""
        if self.error is not None:
            return Broke(reason="server_error", message=self.error[:500])
        if self.done or self.finish_reason is not None:
            if self.tokens or self._uncounted or self._usage:
                return Completed()
            return Broke(reason="empty", message="the stream ended without a token")
        return Broke(
            reason="truncated",
            message=f"the stream ended after {self.chunks} chunks without a finish_reason",
        )

    def record(
        self,
        request: Request,
        outcome: Outcome,
        *,
        zero: float,
        sent: float,
        ended: float,
        connect_s: float | None = None,
        resent: int = 0,
        keep_text: bool = True,
    ) -> RequestRecord:
        """The request's one record. `zero`, `sent`, `ended` are readings of the run's clock."""
        prompt = request.dialogue.prompt
        counted = self._source not in (None, "final_usage")
        ids = request.prompt_token_ids
        return RequestRecord(
            request_id=request.request_id,
            dialogue_id=request.dialogue.dialogue_id,
            prompt_id=prompt.prompt_id,
            category=prompt.category,
            tier=prompt.tier,
            isl_bucket=prompt.isl_bucket,
            repeat=request.dialogue.repeat,
            phase=request.phase,
            turn=request.turn,
            outcome=outcome,
            sent_s=sent - zero,
            end_s=ended - zero,
            connect_s=connect_s,
            resent=resent,
            isl_tokens=self.prompt_tokens
            if self.prompt_tokens is not None
            else (None if ids is None else len(ids)),
            osl_tokens=self.tokens if counted else (self._usage or 0),
            usage_tokens=self._usage,
            cached_tokens=self.cached_tokens,
            max_output_tokens=request.max_output_tokens,
            token_count_source=self._source,
            chunk_gaps_us=gaps_us(self._stamps, sent),
            chunk_tokens=self._chunks if counted else None,
            step_tokens=self._steps.passes() if self._steps is not None else None,
            finish_reason=self.finish_reason,
            spec=self._figures(),
            output_token_ids=self._ids if self._source == "ids" else None,
            served_model=None if self.model is None else without_folder(self.model[:200]),
            text="".join(self._text) if keep_text else None,
        )

    def answer(self) -> str:
        """The text so far: a later turn's history."""
        return "".join(self._text)

    def _figures(self) -> SpecCounters | None:
        if self._spec is None and self._steps is not None:
            return self._steps.counters()
        steps = self._told_steps()
        if steps is None:
            return self._spec
        return msgspec.structs.replace(self._spec or SpecCounters(), steps=steps)

    def _told_steps(self) -> int | None:
        """Decode steps from tokens per target pass, of which the prefill's is the first."""
        tokens = self.tokens or self._usage or 0
        if self._rate is None or not 1 <= self._rate <= tokens:
            return None
        return round(tokens / self._rate) - 1


def gaps_us(stamps: array[float], sent: float) -> U32:
    """Stamps in seconds → µs between them, the first from `sent`; rounding never accumulates."""
    at = [round((stamp - sent) * 1e6) for stamp in stamps]
    return array("I", [min(max(b - a, 0), _U32_MAX) for a, b in pairwise((0, *at))])
