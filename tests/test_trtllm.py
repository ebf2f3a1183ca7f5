"""TensorRT-LLM: argv and YAML of every method, its streams, and both of its metrics pages.

Samples are rebuilt from source, not captured; their values obey the arithmetic by design.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import subprocess
from array import array
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from loadgen import preflight
from loadgen.acceptance import (
    CHUNKS,
    COUNTERS,
    PER_REQUEST,
    STEPS_FROM_SERVER,
    acceptance,
    chunks_disproved,
)
from loadgen.errors import UserError
from loadgen.plan import remembering
from loadgen.protocol import Tally
from loadgen.scrape import Scraper, parse_page
from loadgen.summarize import counter_growth
from loadgen.transport import refusal
from loadgen.types import (
    LOST,
    Completed,
    Message,
    Record,
    RequestRecord,
    Sampling,
    ServerConfig,
    Snapshot,
    SpecConfig,
    SpecCounters,
)
from loadgen.written import read_toml
from servers import launch, openai, trtllm
from tests.records import DATA, REQUEST, record

CONFIGS = Path(trtllm.__file__).parent / "configs"
PROMETHEUS = (DATA / "trtllm-prometheus.txt").read_text()
ROWS = (DATA / "trtllm-iterations.json").read_text()
ENGINE = trtllm.ENGINE


def config(spec: SpecConfig | None = None, **fields: Any) -> ServerConfig:
    return ServerConfig(engine="trtllm", model="M", spec=spec, **{"max_running": 8} | fields)


def written(spec: SpecConfig | None) -> str:
    (text,) = trtllm.files(config(spec)).values()
    return text


# ── how it is started ────────────────────────────────────────────────────────────────────────────

BASE = """\
kv_cache_config:
  enable_block_reuse: false
enable_iter_perf_stats: true
return_perf_metrics: true
stream_interval: 1
"""


def test_the_baseline_has_no_word_of_speculation() -> None:
    made = config(max_running=64, max_model_len=2048, tensor_parallel=2)
    assert trtllm.command(made, 8101) == [
        *("trtllm-serve", "M", "--host", "127.0.0.1", "--port", "8101", "--backend", "pytorch"),
        *("--max_batch_size", "64", "--max_seq_len", "2048", "--tp_size", "2"),
        *("--config", "{files}/trtllm.yaml"),
    ]
    assert trtllm.files(made) == {"trtllm.yaml": BASE}


NGRAM = """\
disable_overlap_scheduler: true
speculative_config:
  decoding_type: NGram
  max_draft_len: 4
  max_total_draft_tokens: 4
  is_public_pool: false
  max_matching_ngram_size: 3
"""
DRAFT = """\
speculative_config:
  decoding_type: Draft_Target
  speculative_model: meta-llama/Llama-3.2-1B-Instruct
  max_draft_len: 3
  max_total_draft_tokens: 3
  draft_len_schedule:
    4: 5
    32: 2
"""
EAGLE3 = """\
speculative_config:
  decoding_type: Eagle3
  speculative_model: D
  max_draft_len: 3
  max_total_draft_tokens: 3
  eagle3_layers_to_capture: [1, 15, 28]
  sa_config:
    enable_global_pool: false
    threshold: 4
"""
TREE = """\
speculative_config:
  decoding_type: Eagle3
  speculative_model: D
  max_draft_len: 4
  max_total_draft_tokens: 20
  dynamic_tree_max_topK: 5
"""
STATIC = """\
speculative_config:
  decoding_type: Eagle3
  speculative_model: D
  max_draft_len: 2
  max_total_draft_tokens: 3
  eagle_choices: [[0], [1], [0, 0]]
"""
MTP = """\
speculative_config:
  decoding_type: MTP
  max_draft_len: 2
  max_total_draft_tokens: 2
  use_relaxed_acceptance_for_thinking: true
  relaxed_topk: 10
  relaxed_delta: 0.6
"""
DFLASH = """\
speculative_config:
  decoding_type: DFlash
  speculative_model: "/models/d flash"
  max_draft_len: 15
  max_total_draft_tokens: 15
  attention_backend: FA4
"""
PARD = """\
speculative_config:
  decoding_type: PARD
  speculative_model: D
  max_draft_len: 4
  max_total_draft_tokens: 4
  mask_token_id: 128256
"""
SA = """\
speculative_config:
  decoding_type: SA
  max_draft_len: 4
  max_total_draft_tokens: 4
  enable_global_pool: true
  global_pool_size: 64
"""


def spec(method: str, draft_model: str | None = None, depth: int | None = None,
         tokens: int | None = None, **options: Any) -> SpecConfig:  # fmt: skip
    return SpecConfig(
        method=method, draft_model=draft_model, draft_depth=depth, draft_tokens=tokens,
        options=options,
    )  # fmt: skip


GOLDEN = [
    (spec("ngram", depth=4, max_matching_ngram_size=3), NGRAM),
    (
        spec(
            "draft_model", "meta-llama/Llama-3.2-1B-Instruct", 3,
            draft_len_schedule={"4": 5, "32": 2},
        ),
        DRAFT,
    ),
    (
        spec("eagle3", "D", tokens=3, eagle3_layers_to_capture=[1, 15, 28],
             sa_config={"threshold": 4}),
        EAGLE3,
    ),
    (spec("eagle3", "D", 4, 20, dynamic_tree_max_topK=5), TREE),
    (spec("eagle3", "D", eagle_choices=[[0], [1], [0, 0]]), STATIC),
    (
        spec("mtp", depth=2, use_relaxed_acceptance_for_thinking=True, relaxed_topk=10,
             relaxed_delta=0.6),
        MTP,
    ),
    (spec("mtp"), "speculative_config:\n  decoding_type: MTP\n"),
    (spec("dflash", "/models/d flash", 15, 15, attention_backend="FA4"), DFLASH),
    (spec("pard", "D", 4, mask_token_id=128256), PARD),
    (spec("sa", depth=4, enable_global_pool=True, global_pool_size=64), SA),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "text"), GOLDEN, ids=lambda p: getattr(p, "method", None))
def test_yaml_of_every_method(asked: SpecConfig, text: str) -> None:
    assert written(asked) == BASE + text
    assert trtllm.command(config(asked), 1) == trtllm.command(config(), 1)


def test_no_method_lacks_a_golden_yaml() -> None:
    assert {asked.method for asked, _ in GOLDEN} == set(ENGINE.methods)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (spec("eagel3"), "did you mean 'eagle3'"),
        (spec("medusa", depth=3), "no speculative method 'medusa'"),
        (spec("suffix", depth=3), "Known: ngram, draft_model, eagle3, mtp, dflash, pard, sa"),
        (spec("eagle3", depth=3), "expected draft_model"),
        (spec("pard", "D"), "expected draft_depth"),
        (spec("ngram"), "expected draft_depth"),
        (spec("ngram", depth=0), "expected 1 or more"),
        (spec("mtp", "D", 1), "has no draft model"),
        (spec("eagle3", "D", 3, 8), "contradict each other"),
        (spec("eagle3", "D", 3, 16, dynamic_tree_max_topK=5), "levels ≤ nodes ≤ 5 × levels"),
        (spec("eagle3", "D", 3, 2, dynamic_tree_max_topK=5), "got 3 and 2"),
        (spec("eagle3", "D", 3, dynamic_tree_max_topK=5), "got 3 and None"),
        (spec("eagle3", "D", 3, 8, use_dynamic_tree=True), "expected dynamic_tree_max_topK"),
        (spec("eagle3", "D", 3, eagle_choices=[[0]]), "1 nodes, 1 deep"),
        (spec("eagle3", "D", eagle_choices=[[0]], dynamic_tree_max_topK=2), "exclude each other"),
        (spec("ngram", depth=3, max_matching_ngram_sise=2), "'max_matching_ngram_size'"),
        (spec("ngram", depth=3, enable_global_pool=True), "unknown option 'enable_global_pool'"),
        (spec("ngram", depth=3, max_draft_len=3), "this is 'draft_depth' of the [spec] table"),
        (spec("mtp", num_nextn_predict_layers=3), "this is 'draft_depth'"),
        (spec("mtp", acceptance_rate_threshold=0.5), "off for good"),
        (spec("mtp", acceptance_window=50), "off for good"),
        (spec("sa", depth=3, global_pool_size=64), "needs enable_global_pool"),
        (spec("sa", depth=3, max_matching_ngram_size=0), "max_matching_ngram_size = 0"),
        (spec("mtp", max_concurrency=4, draft_len_schedule={"1": 2}), "exclude each other"),
        (spec("mtp", draft_len_schedule={"few": 2}), "expected { batch size = draft length }"),
        (spec("mtp", draft_len_schedule=3), "expected { batch size = draft length }"),
        (spec("pard", "D", 4, sa_config={"treshold": 4}), "did you mean 'threshold'"),
        (spec("pard", "D", 4, sa_config=True), "expected a table"),
    ],
)
def test_what_it_does_not_take_is_refused(asked: SpecConfig, said: str) -> None:
    with pytest.raises(UserError) as fault:
        trtllm.files(config(asked))
    assert said in str(fault.value)


def test_a_running_limit_must_be_given() -> None:
    with pytest.raises(UserError, match="expected max_running"):
        trtllm.command(config(max_running=None), 1)


@pytest.mark.parametrize(
    ("asked", "remembers"),
    [
        (spec("ngram", depth=3), False),
        (spec("ngram", depth=3, is_public_pool=True), True),
        (spec("ngram", depth=3, is_public_pool=False), False),
        (spec("sa", depth=3), False),
        (spec("sa", depth=3, enable_global_pool=True), True),
        (spec("pard", "D", 3, sa_config={"enable_global_pool": True}), True),
        (spec("pard", "D", 3, sa_config={"threshold": 4}), False),
    ],
)
def test_a_drafter_remembers_where_its_pool_is_shared(asked: SpecConfig, remembers: bool) -> None:
    assert remembering(ENGINE, asked) is remembers


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SCALARS = (
    TEXT
    | st.integers()
    | st.booleans()
    | st.floats(allow_nan=False)
    | st.sampled_from(["no", "Null", "y", "1e3", "0x1f", "-", "a: b", "# c", "1_000", "~", ".inf"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXT, VALUES, max_size=4))
def test_yaml_means_what_was_written(mapping: dict[str, Any]) -> None:
    yaml = pytest.importorskip("yaml")
    text = "\n".join(trtllm._yaml(mapping)) or "{}"
    assert yaml.safe_load(text) == mapping


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("trtllm-*.toml")), ids=lambda p: p.stem)
def test_the_configs_that_come_along_are_valid(path: Path) -> None:
    found = read_toml(path, ServerConfig)
    assert trtllm.command(found, 1)[1] == found.model
    assert ("speculative_config" in written(found.spec)) == (found.spec is not None)


def test_a_prefix_knows_the_folder_of_the_yaml() -> None:
    prefix = ("docker", "run", "-v", "{files}:{files}:ro", "image", "trtllm-serve")
    argv = trtllm.command(config(executable=prefix, name="short", extra_args=("--x", "1")), 9)
    assert argv[:7] == [*prefix, "M"]
    assert argv[-6:] == [
        *("--served_model_name", "short", "--config", "{files}/trtllm.yaml", "--x", "1")
    ]


# ── its wire ─────────────────────────────────────────────────────────────────────────────────────


def told(data: bytes, cuts: list[int]) -> RequestRecord:
    tally = Tally(ENGINE.wires["completions"].decode)
    edges = [0, *sorted({c for c in cuts if c < len(data)}), len(data)]
    for at, (start, end) in enumerate(itertools.pairwise(edges)):
        tally.feed(float(at), data[start:end])
    return tally.record(REQUEST, tally.outcome(), zero=0.0, sent=0.0, ended=99.0)


@pytest.mark.parametrize(
    ("name", "tokens", "chunks", "source", "steps"),
    [
        ("ids", 11, [1, 3, 2, 4, 1], "ids", 4),
        ("text", 11, None, "final_usage", 4),
        ("metrics-event", 1, [1], "ids", None),  # an excerpt: its last chunk of eleven tokens
    ],
)
def test_streams_tell_their_steps_at_every_split(
    name: str, tokens: int, chunks: list[int] | None, source: str, steps: int | None
) -> None:
    """11 tokens at 2.2 a pass are 5 passes, one of them the prefill's: AL (11 − 1) ÷ 4 = 2.5."""
    data = (DATA / f"trtllm-{name}.sse").read_bytes()
    whole = told(data, [])
    for cut in range(1, len(data)):
        found = told(data, [cut])
        assert msgspec.structs.replace(found, chunk_gaps_us=whole.chunk_gaps_us) == whole
    assert whole.outcome == Completed()
    assert (whole.osl_tokens or whole.usage_tokens, whole.token_count_source) == (tokens, source)
    assert whole.chunk_tokens == (None if chunks is None else array("I", chunks))
    assert (whole.spec.steps if whole.spec else None) == steps
    assert whole.cached_tokens == 0


@given(st.lists(st.integers(0, 2200), max_size=30))
def test_any_split_of_the_ids_stream(cuts: list[int]) -> None:
    data = (DATA / "trtllm-ids.sse").read_bytes()
    found = told(data, cuts)
    assert found.output_token_ids == array(
        "I", [791, 6864, 315, 9822, 374, 12366, 11, 264, 3363, 304, 10890]
    )
    assert found.spec == SpecCounters(steps=4)


def stream(*events: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in events)


@pytest.mark.parametrize("rate", [None, 0.0, -1.0, 0.5, 9.0])
def test_a_rate_that_no_pass_count_gives_is_no_step_count(rate: float | None) -> None:
    choice = {"token_ids": [1, 2, 3], "finish_reason": "stop", "avg_decoded_tokens_per_iter": rate}
    assert told(stream({"choices": [choice]}), []).spec is None


def test_figures_of_a_request_are_read_where_a_version_sends_them() -> None:
    """#19311, open: 3 steps of k = 3 accepted 2, 0 and 3; a histogram by accepted drafts."""
    figures = {
        "acceptance_rate": 5 / 9, "total_accepted_draft_tokens": 5, "total_draft_tokens": 9,
        "num_spec_steps": 3, "acceptance_histogram": [1, 0, 1, 1], "num_spec_tokens": 3,
    }  # fmt: skip
    choice = {
        "token_ids": list(range(9)), "finish_reason": "length",
        "avg_decoded_tokens_per_iter": 2.25, "speculative_decoding": figures,
    }  # fmt: skip
    assert told(stream({"choices": [choice]}), []).spec == SpecCounters(
        steps=3,
        drafts=3,
        draft_tokens=9,
        draft_depth=3,
        accepted_tokens=5,
        accepted_histogram=(1, 0, 1, 1),
        accepted_by_position=(2, 2, 1),
    )


FIELDS = {
    *("model", "prompt", "max_tokens", "temperature", "top_p", "seed", "ignore_eos", "stream"),
    *("stream_options", "detokenize", "messages"),
}
"""What 1.4's strict schemas know, of the fields that we could send."""


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_no_field_is_sent_that_its_schema_refuses(api: str) -> None:
    request = msgspec.structs.replace(REQUEST, messages=(Message(role="user", content="hi"),))
    sampling = Sampling(top_p=0.9, seed=1, ignore_eos=True)
    body = json.loads(ENGINE.wires[api].encode(request, "m", sampling))
    assert set(body) <= FIELDS
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert body.get("detokenize") == (False if api == "completions" else None)


def test_text_is_asked_for_where_a_later_turn_needs_it() -> None:
    prompt = msgspec.structs.replace(REQUEST.dialogue.prompt, later_turns=("and?",))
    dialogue = msgspec.structs.replace(REQUEST.dialogue, prompt=prompt)
    request = msgspec.structs.replace(REQUEST, dialogue=dialogue)
    body = json.loads(ENGINE.wires["completions"].encode(request, "m", Sampling()))
    assert "detokenize" not in body


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            b"""{"error": "[{'type': 'extra_forbidden', 'loc': ('body', 'return_token_ids')}]"}""",
            "extra_forbidden",
        ),
        (
            b'{"object": "error", "message": "\'prompt\' must not be empty.", "code": 400}',
            "'prompt' must not be empty.",
        ),
    ],
)
def test_a_refusal_is_read_in_both_of_its_shapes(body: bytes, said: str) -> None:
    assert said in refusal(body)


# ── its pages ────────────────────────────────────────────────────────────────────────────────────


def test_counters_of_the_prometheus_page() -> None:
    found = trtllm.counters(parse_page(PROMETHEUS))
    assert found == SpecCounters(
        drafts=3630,
        draft_tokens=10890,
        accepted_tokens=6546,
        accepted_by_position=(2864, 2137, 1545),
        drafted_by_position=(3630, 3630, 3630),
        generated_tokens=10240,
        prompt_tokens=32768,
        requests=64,
    )


def test_counters_without_the_prefix_of_newer_versions() -> None:
    bare = parse_page(PROMETHEUS.replace("\ntrtllm_", "\n"))
    assert trtllm.counters(bare) == trtllm.counters(parse_page(PROMETHEUS))


def test_a_position_that_never_accepted_is_a_measured_zero() -> None:
    page = 'trtllm_spec_decode_drafted_tokens_total{token_position="%d"} %d\n'
    found = trtllm.counters(parse_page(page % (0, 9) + page % (1, 7)))
    assert (found.accepted_by_position, found.accepted_tokens, found.drafts) == ((0, 0), 0, 9)


def test_iteration_totals_alone_tell_no_drafts() -> None:
    """Before a request has finished there are no positions, and no family counts steps."""
    page = "trtllm_spec_decode_num_draft_tokens_total 30\n"
    page += "trtllm_spec_decode_num_accepted_tokens_total 12\n"
    assert trtllm.counters(parse_page(page)) == SpecCounters(draft_tokens=30, accepted_tokens=12)


def test_load_and_facts_of_the_prometheus_page() -> None:
    samples = parse_page(PROMETHEUS)
    found = trtllm.load(samples)
    assert (found.running, found.waiting, found.kv_cache_use) == (12, 3, 0.0219)
    assert (found.prefix_hit_tokens, found.prefix_asked_tokens) == (0, 32768)
    assert (round(found.queue_time_s or 0, 3), found.queued) == (0.128, 64)
    facts = trtllm.describe({"/version": {"version": "1.4.0rc1"}}, samples)
    assert (facts.version, facts.state, facts.draft_depth) == ("1.4.0rc1", "on", 3)
    assert (facts.max_model_len, facts.max_running) == (8192, 512)
    assert facts.spec_reported == (
        "method Eagle3, draft tokens 3, draft model yuhuili/EAGLE3-LLaMA3.1-Instruct-8B"
    )


@pytest.mark.parametrize(
    ("samples", "state"),
    [
        ({'trtllm_speculative_config_info{spec_enabled="false",spec_method="None"}': 1.0}, "off"),
        ({"trtllm_generation_tokens_total": 3.0}, "unknown"),
        ({}, "unknown"),
        (trtllm.drain('[{"iter": 7}]', {}), "off"),
        (trtllm.drain(ROWS, {}), "on"),
        (trtllm.drain("[]", {}), "unknown"),
    ],
)
def test_state_is_told_by_labels_or_rows(samples: dict[str, float], state: str) -> None:
    facts = trtllm.describe({"/version": None}, samples)
    assert (facts.state, facts.draft_depth, facts.spec_reported) == (state, None, None)


def test_rows_are_summed_without_their_prefill() -> None:
    """Rows 155…158: accepted 21 + 24 + 23 + 18, drafts 12 + 12 + 12 + 11."""
    samples = trtllm.drain(ROWS, {})
    assert trtllm.counters(samples) == SpecCounters(
        drafts=47, draft_tokens=141, accepted_tokens=86, requests=1
    )
    assert LOST not in samples
    found = trtllm.load(samples)
    assert (found.running, found.waiting) == (12, 2)
    assert found.kv_cache_use == pytest.approx(304 / 13868)


def test_an_empty_page_keeps_the_sums_and_drops_the_gauges() -> None:
    before = trtllm.drain(ROWS, {})
    after = trtllm.drain("[]", before)
    assert trtllm.counters(after) == trtllm.counters(before)
    assert trtllm.load(after).running is None


@given(st.lists(st.integers(0, 5), max_size=4))
def test_sums_do_not_depend_on_how_the_rows_were_read(cuts: list[int]) -> None:
    rows = json.loads(ROWS)
    edges = [0, *sorted(cuts), len(rows)]
    sums: dict[str, float] = {}
    for start, end in itertools.pairwise(edges):
        sums = trtllm.drain(json.dumps(rows[start:end]), sums)
    assert trtllm.counters(sums) == trtllm.counters(trtllm.drain(ROWS, {}))
    assert LOST not in sums


def rows(*iters: int, rank: int = 0) -> list[dict[str, Any]]:
    spec = {"numDraftTokens": 3, "numAcceptedTokens": 2, "numRequestsWithDraftTokens": 1}
    return [{"iter": i, "attentionDpRank": rank, "specDecodingStats": spec} for i in iters]


@pytest.mark.parametrize(
    ("pages", "lost"),
    [
        ([rows(5, 6), rows(7)], 0),
        ([rows(5, 6), [], rows(7)], 0),
        ([rows(5, 6), rows(9)], 2),
        ([rows(5, 7, 9)], 2),
        ([rows(5, 6), rows(1, 2)], 1),  # a restart: how many, nobody knows
        ([rows(5, 6) + rows(5, 6, rank=1), rows(7, rank=1) + rows(7)], 0),
        ([rows(5) + rows(5, rank=1), rows(6) + rows(7, rank=1)], 1),
    ],
)
def test_a_gap_in_the_iterations_of_a_rank_is_a_loss(
    pages: list[list[dict[str, Any]]], lost: int
) -> None:
    sums: dict[str, float] = {}
    for page in pages:
        sums = trtllm.drain(json.dumps(page), sums)
    assert sums.get(LOST, 0) == lost


@pytest.mark.parametrize("page", ["[", '["a"]', '[{"iter": "x"}]', "{}"])
def test_a_page_that_is_no_list_of_rows_is_said(page: str) -> None:
    with pytest.raises(ValueError, match="expected a list of iterations"):
        trtllm.drain(page, {})


def snapshot(edge: Any, samples: dict[str, float]) -> Snapshot:
    return Snapshot(at_s=0.0, phase="c=1", edge=edge, samples=samples)


def test_growth_is_none_with_its_reason_where_rows_were_lost() -> None:
    start = trtllm.drain(json.dumps(rows(5)), {})
    whole = trtllm.drain(json.dumps(rows(6, 7)), start)
    torn = trtllm.drain(json.dumps(rows(9)), start)
    growth, why = counter_growth((snapshot("start", start), snapshot("end", whole)), ENGINE)
    assert growth is not None
    assert (growth.drafts, growth.accepted_tokens, why) == (2, 4, "")
    growth, why = counter_growth((snapshot("start", start), snapshot("end", torn)), ENGINE)
    assert growth is None
    assert why.startswith("3 rows or reads")


# ── what follows from them ───────────────────────────────────────────────────────────────────────


def done(chunks: list[int], steps: int | None, **changes: Any) -> RequestRecord:
    spec = None if steps is None else SpecCounters(steps=steps)
    return record(chunks, list(range(len(chunks) + 1)), spec=spec, **changes)


def test_acceptance_from_both_sources_by_hand() -> None:
    """AL (11 − 1) ÷ 4 from passes; AL where drafted 1 + 6546 ÷ 3630 = 2.80 from positions."""
    counters, why = counter_growth(
        (snapshot("start", {}), snapshot("end", parse_page(PROMETHEUS))), ENGINE
    )
    assert why == ""
    found = acceptance([done([1, 3, 2, 4, 1], 4)], ENGINE, state="on", depth=3, counters=counters)
    # The page is of 64 other requests: its coverage here is impossible, and that is said.
    assert [a.source for a in found] == [PER_REQUEST, CHUNKS, COUNTERS]
    assert found[0].acceptance_length == found[1].acceptance_length == 2.5
    assert found[0].steps_source == STEPS_FROM_SERVER
    assert (found[0].drafts, found[0].unverified, found[1].unverified) == (None, False, False)
    positions = found[2]
    assert positions.acceptance_length_drafted == pytest.approx(2.803305785123967, abs=1e-12)
    assert positions.joint_by_position == (2864 / 3630, 2137 / 3630, 1545 / 3630)
    assert positions.positions_exact
    assert "drafts a step" in positions.why_missing


def test_the_page_closes_with_its_own_requests() -> None:
    """64 requests of 160 tokens in 3,630 steps: T + O = R + S + A with O = 0, coverage 1."""
    counters = trtllm.counters(parse_page(PROMETHEUS))
    steps = [57] * 46 + [56] * 18
    assert sum(steps) == 3630
    made = [
        done([1, *[2] * (n - 1), 159 - 2 * (n - 1)], n, dialogue=f"d{i}")
        for i, n in enumerate(steps)
    ]
    found = acceptance(made, ENGINE, state="on", depth=None, counters=counters)
    assert [a.source for a in found] == [COUNTERS, PER_REQUEST, CHUNKS], "the one that knows drafts"
    best = found[0]
    assert best.acceptance_length == pytest.approx((10240 - 64) / 3630)
    assert (best.draft_coverage, best.overrun_tokens) == (1.0, 0)
    assert best.acceptance_length_drafted == pytest.approx(best.acceptance_length)
    assert best.acceptance_rate == pytest.approx(6546 / 10890)


def test_merged_chunks_are_disproved_by_the_passes_and_the_figure_stays() -> None:
    merged = done([1, 5, 5], 4)
    assert "the server counted 4 decode steps" in chunks_disproved([merged], ENGINE, None)
    found = acceptance([merged], ENGINE, state="on", depth=None)
    by = {a.source: a for a in found}
    assert by[PER_REQUEST].acceptance_length == 2.5
    assert by[CHUNKS].acceptance_length is None


def test_chunks_alone_are_unverified() -> None:
    (best, *_) = acceptance([done([1, 3, 2, 4, 1], None)], ENGINE, state="on", depth=3)
    assert (best.source, best.acceptance_length, best.unverified) == (CHUNKS, 2.5, True)


# ── asked over HTTP ──────────────────────────────────────────────────────────────────────────────


class Stand:
    """A server with one or both pages; the JSON one is emptied by every GET, as theirs is."""

    def __init__(self, *, prometheus: bool) -> None:
        self.pending: list[dict[str, Any]] = []
        self.drained = 0
        self.app = web.Application()
        self.app.router.add_route("GET", "/{path:.*}", self.answer)
        self._pages = {"/prometheus/metrics"} if prometheus else set()

    async def answer(self, request: web.Request) -> web.Response:
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": "m", "owned_by": "tensorrt_llm"}]})
        if request.path in self._pages:
            return web.Response(text=PROMETHEUS)
        if request.path != "/metrics":
            raise web.HTTPNotFound
        self.drained += 1
        found, self.pending = self.pending, []
        return web.json_response(found)


ENGINES = {"trtllm": ENGINE, "openai": openai.ENGINE}
QUICK = dataclasses.replace(ENGINE, settle_s=0.0)


async def test_the_page_that_drains_is_left_alone_where_prometheus_is() -> None:
    stand = Stand(prometheus=True)
    async with TestServer(stand.app) as server:
        target = await preflight.identify(str(server.make_url("")), ENGINES)
    assert (target.engine.name, target.info.state, target.info.draft_depth) == ("trtllm", "on", 3)
    assert (target.metrics_url or "").endswith("/prometheus/metrics")
    assert stand.drained == 0


async def test_a_border_does_not_wait_for_gauges_that_stay_where_they_were() -> None:
    """Their page says 12 running, 3 waiting, long after the last request ended."""
    records: list[Record] = []
    async with TestServer(Stand(prometheus=True).app) as server:
        url = str(server.make_url("/prometheus/metrics"))
        await Scraper(url, QUICK, records.append, zero=0.0).border("c=1", "end", patience_s=10)
    (shot,) = records
    assert isinstance(shot, Snapshot)
    assert shot.settled
    assert trtllm.load(shot.samples).running == 12


async def test_the_page_that_drains_is_read_where_prometheus_is_not() -> None:
    stand = Stand(prometheus=False)
    stand.pending = json.loads(ROWS)
    async with TestServer(stand.app) as server:
        target = await preflight.identify(str(server.make_url("")), ENGINES)
    assert (target.metrics_url or "").removesuffix("/metrics") == target.base_url
    assert (target.info.state, stand.drained, target.caveats) == ("on", 1, ())


async def test_snapshots_of_a_drained_page_are_cumulative() -> None:
    stand = Stand(prometheus=False)
    records: list[Record] = []
    async with TestServer(stand.app) as server:
        scraper = Scraper(str(server.make_url("/metrics")), QUICK, records.append, zero=0.0)
        stand.pending = rows(5, 6)
        await scraper.border("c=1", "start")
        stand.pending = rows(7)
        await scraper.samples()  # a tick, which drained a row
        stand.pending = rows(8, 9)
        await scraper.border("c=1", "end")
    shots = [r for r in records if isinstance(r, Snapshot)]
    growth, why = counter_growth(shots, ENGINE)
    assert growth is not None, why
    assert (growth.drafts, growth.draft_tokens, growth.accepted_tokens) == (3, 9, 6)
    assert all(shot.settled for shot in shots)


async def test_a_read_that_nobody_waits_for_any_more_still_counts() -> None:
    """Ticks are cancelled at a phase's end; what their last read drained must not be lost."""
    asked, go = asyncio.Event(), asyncio.Event()
    stand = Stand(prometheus=False)
    stand.pending = rows(5, 6)

    async def slow(request: web.Request) -> web.Response:
        response = await stand.answer(request)
        asked.set()
        await go.wait()
        return response

    app = web.Application()
    app.router.add_get("/metrics", slow)
    async with TestServer(app) as server:
        scraper = Scraper(str(server.make_url("/metrics")), QUICK, lambda _: None, zero=0.0)
        tick = asyncio.create_task(scraper.samples())
        await asked.wait()
        tick.cancel()
        with pytest.raises(asyncio.CancelledError):
            await tick
        go.set()
        samples = await scraper.samples()
    assert samples is not None
    assert trtllm.counters(samples).drafts == 2


async def test_a_read_that_failed_is_a_loss() -> None:
    answers = [web.json_response(rows(5)), web.Response(text="[torn"), web.json_response([])]

    async def metrics(request: web.Request) -> web.Response:
        return answers.pop(0)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    async with TestServer(app) as server:
        scraper = Scraper(str(server.make_url("/metrics")), QUICK, lambda _: None, zero=0.0)
        assert (await scraper.samples() or {}).get(LOST, 0) == 0
        assert await scraper.samples() is None
        assert (await scraper.samples() or {})[LOST] == 1


# ── beside the command ───────────────────────────────────────────────────────────────────────────


def test_the_printed_command_writes_the_file_and_names_it(tmp_path: Path) -> None:
    asked = spec("ngram", depth=3)
    prefix = ("printf", "%s\n", "it's", "", "{files}:{files}:ro")
    made = config(asked, executable=prefix, env={"A": "b c"})
    text = launch.shell(trtllm.command(made, 1), trtllm.files(made), made)
    ran = subprocess.run(
        ["sh", "-ec", text + '\ncat "$files"/trtllm.yaml; rm -r "$files"'],
        capture_output=True, text=True, check=True, timeout=20, env={"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    folder, _, rest = ran.stdout.partition("it's\n\n")[2].partition(":")
    assert rest.startswith(f"{folder}:ro\nM\n--host\n")
    assert f"--config\n{folder}/trtllm.yaml\n" in rest
    assert ran.stdout.endswith(written(asked))
    assert text.startswith("files=$(mktemp -d)\ncat > \"$files\"/trtllm.yaml <<'END'\n")
    assert "\nA='b c' printf " in text


def test_a_command_without_files_is_printed_as_it_is() -> None:
    made = config(env={"A": "1"})
    assert launch.shell(["x", "", "{files}"], {}, made) == "A=1 x '' '{files}'"


def test_files_lie_in_a_folder_as_long_as_the_server_runs() -> None:
    argv = trtllm.command(config(), 1)
    with launch._beside(argv, trtllm.files(config())) as words:
        path = Path(words[words.index("--config") + 1])
        assert path.read_text() == BASE
    assert not path.exists()
    with launch._beside(["a", "{files}"], {}) as words:
        assert words == ["a", "{files}"]
