"""Bytes in, chunks out, for any split of the bytes; the tally against captured streams."""

from __future__ import annotations

import itertools
from array import array

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.protocol import (
    SSE,
    Tally,
    chat_wire,
    completions_wire,
    decode_openai,
    gaps_us,
    survivors,
)
from loadgen.types import Broke, Completed, RequestRecord, Sampling
from tests.records import DATA, REQUEST

STREAMS = sorted(DATA.glob("*.sse"))


def whole(data: bytes) -> list[bytes]:
    sse = SSE()
    return sse.feed(data) + sse.close()


@pytest.mark.parametrize(
    ("data", "payloads"),
    [
        (b"data: a\n\n", [b"a"]),
        (b"data:a\n\n", [b"a"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
        (b": ping\n\ndata: a\n\n", [b"a"]),
        (b"event: error\ndata: a\n\n", [b"a"]),
        (b"id: 7\ndata: a\nretry: 3\n\n", [b"a"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"\n\n\n\ndata: a\n\n\n\n", [b"a"]),
        (b"data: a\n\ndata: b", [b"a", b"b"]),
        (b"data: \n\n", [b""]),
        (b"", []),
    ],
)
def test_framing(data: bytes, payloads: list[bytes]) -> None:
    assert whole(data) == payloads


@pytest.mark.parametrize("path", STREAMS, ids=lambda p: p.stem)
@given(cuts=st.lists(st.integers(0, 12000), max_size=40), crlf=st.booleans())
def test_any_split_of_a_stream_gives_the_same_events(
    path: object, cuts: list[int], crlf: bool
) -> None:
    data = (DATA / str(path)).read_bytes()
    if crlf:
        data = data.replace(b"\n", b"\r\n")
    sse = SSE()
    edges = [0, *sorted(c for c in cuts if c < len(data)), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    events = [e for piece in pieces for e in sse.feed(piece)] + sse.close()
    assert events == whole(data)


def test_byte_by_byte() -> None:
    data = (DATA / "vllm-chat.sse").read_bytes()
    sse = SSE()
    events = [e for i in range(len(data)) for e in sse.feed(data[i : i + 1])]
    assert events + sse.close() == whole(data)


def test_an_event_without_end_is_refused_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadgen.protocol.MAX_EVENT_BYTES", 1000)
    sse = SSE()
    assert sse.feed(b"data: " + b"x" * 900) == []
    with pytest.raises(ValueError, match="an event of more than"):
        sse.feed(b"x" * 100)


def tally_of(name: str, *, keep_text: bool = True) -> RequestRecord:
    data = (DATA / name).read_bytes()
    tally = Tally(decode_openai)
    for index, event in enumerate(data.split(b"\n\n")):
        tally.feed(1.0 + index, event + b"\n\n")
    tally.close(99.0)
    return tally.record(
        REQUEST, tally.outcome(), zero=0.5, sent=1.0, ended=50.0, keep_text=keep_text
    )


@pytest.mark.parametrize(
    ("name", "source", "chunks", "tokens", "isl", "finish"),
    [
        ("vllm-ngram.sse", "ids", [1, *[4] * 9, 3], 40, 27, "length"),
        ("vllm-ngram2.sse", "ids", None, 40, 44, "length"),
        ("vllm-chat.sse", "ids", None, None, 47, None),
        ("llamacpp-ngram.sse", "final_usage", None, 40, 27, "length"),
        ("llamacpp-ngram-timings.sse", "timings", [1] * 40, 40, 50, "length"),
        ("llamacpp-ngram-timings-eos.sse", "timings", [1] * 10, 10, 43, "stop"),
        ("vllm-nousage.sse", None, None, None, None, "length"),
    ],
)
def test_tokens_of_captured_streams(
    name: str,
    source: str | None,
    chunks: list[int] | None,
    tokens: int | None,
    isl: int | None,
    finish: str | None,
) -> None:
    record = tally_of(name)
    assert record.outcome == Completed()
    if source is not None:
        assert record.token_count_source == source
    if chunks is not None:
        assert record.chunk_tokens is not None
        assert record.chunk_tokens.tolist() == chunks
    if tokens is not None:
        assert record.osl_tokens == record.usage_tokens == tokens
    if isl is not None:
        assert record.isl_tokens == isl
    if finish is not None:
        assert record.finish_reason == finish


def test_vllm_capture_carries_its_own_figures() -> None:
    record = tally_of("vllm-ngram2.sse")
    assert record.spec is not None
    assert (record.spec.drafts, record.spec.draft_tokens, record.spec.accepted_tokens) == (
        11, 33, 18,
    )  # fmt: skip
    assert record.spec.accepted_histogram == (0, 6, 3, 2)
    assert record.spec.accepted_by_position == (11, 5, 2)
    assert record.spec.drafted_by_position == (11, 11, 11)
    assert record.spec.steps is None, "vLLM counts only steps that had a draft"
    assert record.output_token_ids is not None
    assert len(record.output_token_ids) == 40


def test_llamacpp_steps_are_groups_of_equal_predicted_ms() -> None:
    record = tally_of("llamacpp-ngram-timings.sse")
    assert record.step_tokens is not None
    assert record.spec is not None
    steps, accepted = len(record.step_tokens) - 1, record.spec.accepted_tokens
    assert accepted == 26
    assert steps == record.spec.steps == 40 - 1 - 26
    assert sum(record.step_tokens) == 40
    assert record.spec.draft_tokens == 29


def timed(n: int, ms: float, draft: int = 0, accepted: int = 0) -> bytes:
    drafts = f',"draft_n":{draft},"draft_n_accepted":{accepted}' if draft else ""
    timings = f'{{"predicted_n":{n},"predicted_ms":{ms}{drafts}}}'
    return f'data: {{"choices":[{{"text":"x"}}],"timings":{timings}}}\n\n'.encode()


@pytest.mark.parametrize(
    ("events", "passes", "drafts"),
    [
        # the prefill's token is half a character: its count comes with the first drafted step
        ([timed(2, 93.7, 3, 3), timed(3, 93.7, 3, 3), timed(5, 93.7, 3, 3)], [1, 4], 1),
        # so is that of a step without a draft
        ([timed(1, 0.001), timed(3, 9.0), timed(4, 12.0)], [1, 1, 1, 1], None),
        # held back inside a step: nothing is missing
        ([timed(1, 0.001), timed(2, 9.0, 3, 2), timed(4, 9.0, 3, 2)], [1, 3], 1),
        # the last token of a drafted step is held back into the next step
        ([timed(1, 0.001), timed(4, 9.0, 3, 3), timed(6, 12.0, 3, 3)], [1, 4, 1], 1),
        # an EOS inside an accepted burst: fewer than accepted + 1 are delivered
        ([timed(1, 0.001), timed(2, 9.0, 3, 3), timed(3, 9.0, 3, 3)], [1, 2], 1),
    ],
)
def test_tokens_held_back_for_half_a_character(
    events: list[bytes], passes: list[int], drafts: int | None
) -> None:
    """As seen on llama.cpp b11549 with multilingual prompts."""
    tally = Tally(decode_openai)
    for index, event in enumerate(events):
        tally.feed(1.0 + index, event)
    record = tally.record(REQUEST, Completed(), zero=0.0, sent=0.5, ended=9.0)
    assert record.step_tokens is not None
    assert record.step_tokens.tolist() == passes
    assert record.spec is not None
    assert record.spec.drafts == drafts
    assert record.spec.steps == len(passes) - 1


def test_final_usage_alone_gives_a_count_and_no_chunk_figures() -> None:
    record = tally_of("llamacpp-ngram.sse")
    assert record.chunk_tokens is None
    assert record.osl_tokens == 40
    assert len(record.chunk_gaps_us) == 40, "stamps of the text-carrying events are kept"


def test_without_text_the_record_keeps_none() -> None:
    assert tally_of("vllm-chat.sse", keep_text=False).text is None
    assert tally_of("vllm-chat.sse").text


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b'data: {"error":{"message":"boom","code":500}}\n\ndata: [DONE]\n\n', "server_error"),
        (b'data: {"choices":[{"text":"a"}]}\n\n', "truncated"),
        (b"data: [DONE]\n\n", "empty"),
        (b"", "truncated"),
    ],
)
def test_how_a_stream_breaks(stream: bytes, reason: str) -> None:
    tally = Tally(decode_openai)
    tally.feed(1.0, stream)
    outcome = tally.outcome()
    assert isinstance(outcome, Broke)
    assert outcome.reason == reason


def test_what_follows_done_is_not_the_answer() -> None:
    tally = Tally(decode_openai)
    tally.feed(1.0, b'data: {"choices":[{"token_ids":[7],"finish_reason":"stop"}]}\n\n')
    tally.feed(2.0, b"data: [DONE]\n\nevent: trtllm.perf_metrics\ndata: {not json\n\n")
    assert tally.outcome() == Completed()
    assert tally.tokens == 1
    assert tally.finished == 1.0, "the end is the chunk that said so"


@pytest.mark.parametrize(
    "payload",
    [
        b"{",
        b"[]",
        b'{"usage":{"completion_tokens":"x"}}',
        b'{"choices":[{"token_ids":[1.5]}]}',
        b"\xff",
    ],
)
def test_a_malformed_event_is_a_value_error(payload: bytes) -> None:
    with pytest.raises(ValueError, match="malformed event"):
        decode_openai(payload)


@pytest.mark.parametrize(
    ("events", "chunks", "tokens"),
    [
        # role first, then text held back while tokens are counted
        (['{"choices":[{"delta":{"role":"assistant"}}],"usage":{"completion_tokens":0}}',
          '{"choices":[{"delta":{"content":""}}],"usage":{"completion_tokens":1}}',
          '{"choices":[{"delta":{"content":"ab"}}],"usage":{"completion_tokens":4}}',
          '{"choices":[],"usage":{"completion_tokens":4}}'], [1, 3], 4),
        # thinking arrives in a field of its own, uncounted: the final usage gives the total
        (['{"choices":[{"delta":{"reasoning_content":"hm"}}]}',
          '{"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}',
          '{"choices":[],"usage":{"completion_tokens":9}}'], None, 9),
    ],
)  # fmt: skip
def test_counting_rules(events: list[str], chunks: list[int] | None, tokens: int) -> None:
    tally = Tally(decode_openai)
    for index, event in enumerate(events):
        tally.feed(1.0 + index, f"data: {event}\n\n".encode())
    tally.feed(9.0, b"data: [DONE]\n\n")
    record = tally.record(REQUEST, tally.outcome(), zero=0.0, sent=0.5, ended=9.0)
    assert (None if record.chunk_tokens is None else record.chunk_tokens.tolist()) == chunks
    assert record.osl_tokens == tokens


@given(st.lists(st.floats(0, 1e-3), max_size=300), st.floats(0, 1e6))
def test_gaps_never_drift(gaps: list[float], sent: float) -> None:
    stamps, at = array("d"), sent
    for gap in gaps:
        at += gap
        stamps.append(at)
    kept = gaps_us(stamps, sent)
    assert len(kept) == len(stamps)
    if stamps:
        assert sum(kept) == pytest.approx((stamps[-1] - sent) * 1e6, abs=1.0)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_survivors_count_accepted_tokens(histogram: list[int]) -> None:
    by_position = survivors(tuple(histogram))
    assert sum(by_position) == sum(j * n for j, n in enumerate(histogram))
    assert list(by_position) == sorted(by_position, reverse=True)


def test_bodies() -> None:
    sampling = Sampling(max_output_tokens=8, seed=3, top_p=0.9, ignore_eos=True)
    wire = completions_wire({"return_token_ids": True})
    body = msgspec.json.decode(wire.encode(REQUEST, "m", sampling))
    assert body == {
        "model": "m",
        "prompt": [1, 2, 3],
        "max_tokens": 40,
        "temperature": 0.0,
        "top_p": 0.9,
        "seed": 3,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "return_token_ids": True,
    }
    chat = msgspec.json.decode(chat_wire({}).encode(REQUEST, "m", Sampling()))
    assert chat["messages"] == [{"role": "user", "content": "hi"}]
    assert "prompt" not in chat
    assert "seed" not in chat
    assert chat["top_p"] == 1.0, "a server has a default of its own"


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["m", "other"], "m"),
        ([None, "owner/name"], "owner/name"),
        (["/home/me/models/a.gguf"], "a.gguf"),
        ([None], None),
    ],
)
def test_who_answered_is_recorded_without_a_path(names: list[str | None], kept: str | None) -> None:
    tally = Tally(decode_openai)
    for name in names:
        event: dict[str, object] = {"choices": [{"text": "x", "token_ids": [1]}]}
        payload = msgspec.json.encode(event | ({} if name is None else {"model": name}))
        tally.feed(1.0, b"data: " + payload + b"\n\n")
    made = tally.record(REQUEST, tally.outcome(), zero=0.0, sent=0.5, ended=2.0)
    assert made.served_model == kept


def test_thinking_in_a_field_of_its_own_is_told_apart_in_the_text() -> None:
    """As the model wrote it: the next turn's template finds the thinking by its tags."""
    tally = Tally(decode_openai)
    for delta in (
        {"role": "assistant", "content": ""},
        {"reasoning": "h"},
        {"reasoning_content": "m"},
        {"content": "a"},
        {"content": "b"},
    ):
        payload = msgspec.json.encode({"choices": [{"delta": delta}]})
        tally.feed(1.0, b"data: " + payload + b"\n\n")
    assert tally.answer() == "<think>hm</think>ab"


def test_template_arguments_go_to_the_chat_api_alone() -> None:
    asked = msgspec.structs.replace(REQUEST, template_args={"enable_thinking": False})
    for wire, sent in ((chat_wire({}), {"enable_thinking": False}), (completions_wire({}), None)):
        body = msgspec.json.decode(wire.encode(asked, "m", Sampling()))
        assert body.get("chat_template_kwargs") == sent
        assert "chat_template_kwargs" not in msgspec.json.decode(
            wire.encode(REQUEST, "m", Sampling())
        )
