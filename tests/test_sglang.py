"""SGLang: command lines, streams and pages rebuilt from 0.5.23's source, never seen live.

Expected figures were worked out by hand from the source's definitions: the request of the streams
has 9 prompt ids and 11 output ids, one from the prefill and four verify steps of 3, 2, 4 and 1.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.acceptance import COUNTERS, PER_REQUEST, STEPS_FROM_SERVER, acceptance
from loadgen.errors import UserError
from loadgen.protocol import Tally
from loadgen.scrape import parse_page, samples_agree
from loadgen.summarize import counter_growth
from loadgen.types import (
    Broke,
    Completed,
    RequestRecord,
    Sampling,
    ServerConfig,
    Snapshot,
    SpecConfig,
    SpecCounters,
)
from loadgen.written import read_toml
from servers import sglang
from tests.records import DATA, REQUEST, record

CONFIGS = Path(__file__).parent.parent / "servers" / "configs"
PAGE = parse_page((DATA / "sglang-metrics.txt").read_text())
INFO = json.loads((DATA / "sglang-server-info.json").read_text())
IDS = [791, 6864, 315, 9822, 374, 12366, 11, 264, 3363, 304, 10890]
FIGURES = SpecCounters(
    steps=4,
    draft_tokens_nominal=12,
    draft_depth=3,
    accepted_tokens=6,
    accepted_histogram=(1, 1, 1, 1),
    accepted_by_position=(3, 2, 1),
)
STREAMS = [
    ("completions", "sglang-ids.sse"),
    ("generate", "sglang-cumulative.sse"),
    ("generate", "sglang-incremental.sse"),
]

# ── streams ──────────────────────────────────────────────────────────────────────────────────────


def told(wire: str, pieces: list[bytes]) -> RequestRecord:
    """The record of a stream whose n-th read arrived at 1 + n seconds."""
    tally = Tally(sglang.WIRES[wire].decode)
    for index, piece in enumerate(pieces):
        tally.feed(1.0 + index, piece)
    tally.close(99.0)
    return tally.record(REQUEST, tally.outcome(), zero=0.0, sent=0.0, ended=99.0)


def events(name: str) -> list[bytes]:
    return [event + b"\n\n" for event in (DATA / name).read_bytes().split(b"\n\n")]


def generated(*metas: dict[str, Any], ids: list[list[int]] | None = None) -> RequestRecord:
    made = [
        {"text": "x", "output_ids": ids[i] if ids else [7], "meta_info": meta}
        for i, meta in enumerate(metas)
    ]
    return told("generate", [b"data: " + msgspec.json.encode(e) + b"\n\n" for e in made])


@pytest.mark.parametrize(("wire", "name"), STREAMS)
def test_a_stream_tells_ids_chunks_and_acceptance(wire: str, name: str) -> None:
    found = told(wire, events(name))
    assert found.outcome == Completed()
    assert found.token_count_source == "ids"
    assert found.output_token_ids is not None
    assert found.output_token_ids.tolist() == IDS
    assert found.chunk_tokens is not None
    assert found.chunk_tokens.tolist() == [1, 3, 2, 4, 1]
    assert (found.isl_tokens, found.osl_tokens, found.usage_tokens) == (9, 11, 11)
    assert (found.finish_reason, found.spec) == ("length", FIGURES)
    assert found.text == "The capital of France is Paris, a city in northern"


@pytest.mark.parametrize(("wire", "name"), STREAMS)
@given(cuts=st.lists(st.integers(0, 3000), max_size=30))
def test_any_split_of_a_stream_tells_the_same(wire: str, name: str, cuts: list[int]) -> None:
    data = (DATA / name).read_bytes()
    edges = [0, *sorted(c for c in cuts if c < len(data)), len(data)]
    found = told(wire, [data[a:b] for a, b in itertools.pairwise(edges)])
    assert found.output_token_ids is not None
    assert found.output_token_ids.tolist() == IDS
    assert found.text == "The capital of France is Paris, a city in northern"
    assert (found.spec, found.chunk_tokens) == (FIGURES, told(wire, events(name)).chunk_tokens)


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_cumulative_and_incremental_chunks_are_told_apart(sizes: list[int]) -> None:
    """Chunks without a new token too; ids that all look alike."""
    ends = list(itertools.accumulate(sizes))
    metas = [{"completion_tokens": end} for end in ends]
    whole = generated(*metas, ids=[[7] * end for end in ends])
    grown = generated(*metas, ids=[[7] * size for size in sizes])
    assert whole.chunk_tokens == grown.chunk_tokens
    assert whole.osl_tokens == grown.osl_tokens == ends[-1]


def test_an_error_in_the_stream_breaks_the_request() -> None:
    found = told("generate", events("sglang-error.sse"))
    assert isinstance(found.outcome, Broke)
    assert "maximum context length of 131072" in found.outcome.message
    plain = told("generate", [b'data: {"error":"bad input_ids"}\n\n'])
    assert plain.outcome == Broke(reason="server_error", message="bad input_ids")


def test_an_aborted_request_is_not_complete() -> None:
    reason = {"type": "abort", "message": "out of KV cache"}
    found = generated({"completion_tokens": 1, "finish_reason": reason})
    assert isinstance(found.outcome, Broke)
    assert "out of KV cache" in found.outcome.message


@pytest.mark.parametrize("payload", [b"{", b"[]", b'{"output_ids":"no"}', b'{"output_ids":[1.5]}'])
def test_a_malformed_event_is_a_value_error(payload: bytes) -> None:
    with pytest.raises(ValueError, match="malformed event"):
        sglang.decode_generate(payload)


def test_a_malformed_extension_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="malformed event"):
        sglang.decode_extended(b'{"choices":[],"sglext":{"spec_tokens_details":3}}')
    assert sglang.decode_extended(b'{"choices":[],"sglext":{"other":3}}').spec is None


OLD = {"spec_verify_ct": 4, "spec_accept_token_num": 6, "spec_draft_token_num": 16}
BETWEEN = {"spec_verify_ct": 4, "spec_accepted_drafts": 6, "spec_proposed_drafts": 12}
NEW = {"spec_verify_ct": 4, "spec_num_correct_drafts": 6, "spec_num_proposed_drafts": 12}


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        (OLD, SpecCounters(steps=4, accepted_tokens=6)),
        (BETWEEN, SpecCounters(steps=4, accepted_tokens=6)),
        (NEW, SpecCounters(steps=4, accepted_tokens=6, draft_tokens_nominal=12, draft_depth=3)),
        (
            OLD | {"spec_accept_histogram": [0, 2, 2]},
            SpecCounters(
                steps=4,
                accepted_tokens=6,
                accepted_histogram=(0, 2, 2),
                accepted_by_position=(4, 2),
            ),
        ),
        # The list ends at the largest count seen: filled up to k + 1.
        (
            NEW | {"spec_correct_drafts_histogram": [0, 2, 2]},
            SpecCounters(
                steps=4,
                accepted_tokens=6,
                draft_tokens_nominal=12,
                draft_depth=3,
                accepted_histogram=(0, 2, 2, 0),
                accepted_by_position=(4, 2, 0),
            ),
        ),
        # A histogram that does not close with steps and accepted is not shown.
        (
            NEW | {"spec_correct_drafts_histogram": [0, 3, 2]},
            SpecCounters(steps=4, accepted_tokens=6, draft_tokens_nominal=12, draft_depth=3),
        ),
        ({"spec_verify_ct": 4}, SpecCounters(steps=4)),
        ({"spec_verify_ct": 0}, None),
        ({}, None),
    ],
)
def test_figures_under_new_and_old_names(
    meta: dict[str, Any], expected: SpecCounters | None
) -> None:
    assert generated({"completion_tokens": 1} | meta).spec == expected


def test_what_is_asked_on_each_wire() -> None:
    sampling = Sampling(temperature=0.7, top_p=0.9, seed=5, ignore_eos=True)
    bodies = {
        name: json.loads(wire.encode(REQUEST, "m", sampling)) for name, wire in sglang.WIRES.items()
    }
    for name in ("completions", "chat"):
        assert bodies[name]["return_token_ids"] is True
        assert bodies[name]["return_spec_tokens_details"] is True
    assert bodies["completions"]["prompt"] == [1, 2, 3]
    assert bodies["generate"] == {
        "input_ids": [1, 2, 3],
        "sampling_params": {
            "max_new_tokens": 40,
            "temperature": 0.7,
            "top_p": 0.9,
            "ignore_eos": True,
            "sampling_seed": 5,
        },
        "stream": True,
    }


# ── acceptance, by hand ──────────────────────────────────────────────────────────────────────────


def test_per_request_figures_give_al_two_and_a_half() -> None:
    """(11 − 1) ÷ 4 = 2.5, where SGLang's own spec_accept_length says 11 ÷ 4 = 2.75."""
    done = told(*("completions", events("sglang-ids.sse")))
    found = acceptance([done], sglang.ENGINE, state="on", depth=3)[0]
    assert (found.source, found.steps_source) == (PER_REQUEST, STEPS_FROM_SERVER)
    assert (found.acceptance_length, found.steps, found.overrun_tokens) == (2.5, 4, 0)
    assert found.joint_by_position == (0.75, 0.5, 0.25)
    assert not found.positions_exact, "a step without a hit counts as rejected"
    # Steps are not drafts: what needs drafts is not told.
    assert (found.drafts, found.draft_coverage, found.acceptance_rate) == (None, None, None)
    assert found.acceptance_length_drafted is None


def test_the_step_cut_at_max_tokens_is_overrun_not_acceptance() -> None:
    """T 10, R 1, S 4, A 6: one of the 11 tokens was never delivered, AL (10 − 1) ÷ 4."""
    done = record([1, 3, 2, 4], [0, 1, 2, 3, 4], spec=FIGURES)
    found = acceptance([done], sglang.ENGINE, state="on", depth=3)[0]
    assert (found.acceptance_length, found.overrun_tokens) == (2.25, 1)


def test_merged_chunks_do_not_change_what_the_server_counted() -> None:
    merged = record([1, 5, 5], [0, 1, 2, 3], spec=FIGURES)
    by_source = {a.source: a for a in acceptance([merged], sglang.ENGINE, state="on", depth=9)}
    assert by_source[PER_REQUEST].acceptance_length == 2.5
    assert "the server counted 4 decode steps" in by_source["chunks"].why_missing


def test_an_answer_of_one_token_has_no_steps_and_no_figures() -> None:
    done = [record([1, 3, 2, 4, 1], list(range(6)), spec=FIGURES), record([1], [0, 1])]
    found = acceptance(done, sglang.ENGINE, state="on", depth=3)[0]
    assert (found.source, found.acceptance_length, found.steps) == (PER_REQUEST, 2.5, 4)


def snapshot(edge: Any, samples: dict[str, float]) -> Snapshot:
    return Snapshot(at_s=0.0, phase="c=1", edge=edge, samples=samples)


def test_counters_give_al_2_81() -> None:
    """(10180 − 64) ÷ 3600 = 2.81, over a window that began with families never touched."""
    assert sglang.counters(PAGE) == SpecCounters(
        steps=3600, generated_tokens=10180, prompt_tokens=32768, requests=64
    )
    growth, why = counter_growth([snapshot("start", {}), snapshot("end", PAGE)], sglang.ENGINE)
    assert (growth, why) == (sglang.counters(PAGE), "")
    done = record([1, 1], [0, 1, 2])
    sources = acceptance([done], sglang.ENGINE, state="on", depth=3, counters=growth)
    found = next(a for a in sources if a.source == COUNTERS)
    assert found.acceptance_length == pytest.approx(2.81, abs=1e-12)
    assert (found.steps, found.steps_source) == (3600, STEPS_FROM_SERVER)
    assert (found.accepted_tokens, found.overrun_tokens) == (None, None), "not exact, so not told"


def test_counters_of_a_server_without_speculation_have_no_steps() -> None:
    samples = {row: n for row, n in PAGE.items() if not row.startswith(sglang.VERIFIED)}
    growth = sglang.counters(samples)
    assert growth.steps is None
    done = record([1, 1], [0, 1, 2])
    sources = acceptance([done], sglang.ENGINE, state="unknown", depth=3, counters=growth)
    found = next(a for a in sources if a.source == COUNTERS)
    assert (found.acceptance_length, found.why_missing) == (
        None,
        "the page has no speculation counters",
    )


# ── pages ────────────────────────────────────────────────────────────────────────────────────────


def test_load_counts_every_data_parallel_rank_once() -> None:
    load = sglang.load(PAGE)
    assert (load.running, load.waiting, load.kv_cache_use) == (12, 3, 0.02)
    assert (load.prefix_hit_tokens, load.prefix_asked_tokens) == (None, 32768)
    assert (load.preemptions, load.queued, round(load.queue_time_s or 0, 4)) == (0, 64, 0.6163)
    samples = {}
    for dp, tp, running, use in ((0, 0, 5, 0.2), (0, 1, 5, 0.2), (1, 2, 7, 0.6), (1, 3, 7, 0.6)):
        ranks = f'dp_rank="{dp}",model_name="a,\\"b",tp_rank="{tp}"'
        samples[f'sglang:num_running_reqs{{{ranks},priority=""}}'] = float(running)
        samples[f'sglang:num_running_reqs{{{ranks},priority="3"}}'] = 1.0
        samples[f"sglang:token_usage{{{ranks}}}"] = use
    load = sglang.load(samples)
    assert (load.running, load.waiting, load.kv_cache_use) == (12, None, 0.4)


def test_a_border_goes_by_work_where_gauges_go_stale() -> None:
    """num_running_reqs stays at 12 for 30 s on an idle server; decoded tokens move every step."""
    assert sglang.load(PAGE).running == 12
    assert samples_agree(PAGE, dict(PAGE), sglang.ENGINE)
    decoding = next(row for row in PAGE if row.startswith(sglang.WORK) and 'mode="decode"' in row)
    assert not samples_agree(PAGE, PAGE | {decoding: PAGE[decoding] + 1}, sglang.ENGINE)
    assert not samples_agree(None, PAGE, sglang.ENGINE)


def test_describe_reads_what_the_server_resolved() -> None:
    for path in sglang.ENGINE.describe_paths:
        facts = sglang.describe({path: INFO}, {})
        assert (facts.version, facts.state, facts.draft_depth) == ("0.5.23", "on", 3)
        assert facts.max_running == 48
        assert facts.spec_reported is not None
        assert facts.spec_reported.startswith("EAGLE3 (steps 3, topk 1, draft tokens 4")


@pytest.mark.parametrize(
    ("changes", "state", "depth", "limit"),
    [
        ({"speculative_algorithm": None}, "off", None, 48),
        # The longest path of a tree, not its nodes; an n-gram tree is bounded by its nodes alone.
        (
            {
                "speculative_num_steps": 5,
                "speculative_eagle_topk": 4,
                "speculative_num_draft_tokens": 8,
            },
            "on",
            5,
            48,
        ),
        (
            {
                "speculative_algorithm": "NGRAM",
                "speculative_num_steps": 1,
                "speculative_eagle_topk": 10,
                "speculative_num_draft_tokens": 12,
            },
            "on",
            11,
            48,
        ),
        (
            {
                "speculative_algorithm": "DFLASH",
                "speculative_num_steps": 1,
                "speculative_num_draft_tokens": 16,
            },
            "on",
            15,
            48,
        ),
        ({"speculative_adaptive": True}, "on", None, 48),
        # What memory left of the limit, a data-parallel rank.
        ({"internal_states": [{"effective_max_running_requests_per_dp": 20}] * 2}, "on", 3, 40),
        ({"max_running_requests": None, "internal_states": None}, "on", 3, None),
    ],
)
def test_describe_by_configuration(
    changes: dict[str, Any], state: str, depth: int | None, limit: int | None
) -> None:
    facts = sglang.describe({"/server_info": INFO | changes}, {})
    assert (facts.state, facts.draft_depth, facts.max_running) == (state, depth, limit)


ZEROS = {f"{sglang.WINDOW}{{}}": 0.0, f"{sglang.GENERATED}{{}}": 50.0, f"{sglang.REQUESTS}{{}}": 5}


@pytest.mark.parametrize(
    ("samples", "state", "depth"),
    [
        (PAGE, "on", 3),
        (ZEROS, "off", None),
        ({f"{sglang.WINDOW}{{}}": 0.0}, "unknown", None),  # nothing decoded yet
        (ZEROS | {f"{sglang.GENERATED}{{}}": 5.0}, "unknown", None),  # only prefills
        (
            {f"{sglang.GENERATED}{{}}": 50.0, f"{sglang.REQUESTS}{{}}": 5.0},
            "unknown",
            None,
        ),  # 0.5.9
        ({}, "unknown", None),
    ],
)
@pytest.mark.parametrize("page", [None, [], {"version": 3}])
def test_without_server_info_the_metrics_tell(
    page: Any, samples: dict[str, float], state: str, depth: int | None
) -> None:
    facts = sglang.describe({"/server_info": page}, samples)
    assert (facts.version, facts.state, facts.draft_depth) == (None, state, depth)


# ── how it is started ────────────────────────────────────────────────────────────────────────────


def config(spec: SpecConfig | None = None, **fields: Any) -> ServerConfig:
    common: dict[str, Any] = {"engine": "sglang", "model": "M", "max_running": 64, "spec": spec}
    return ServerConfig(**(common | fields))


def flags(text: str) -> list[str]:
    return text.split()


BASE = flags(
    "sglang serve M --host 127.0.0.1 --port 8101 --tp-size 1 --max-running-requests 64"
    " --disable-radix-cache --enable-metrics --enable-cache-report --stream-interval 1"
    " --decode-log-interval 10"
)


def test_the_baseline_has_no_word_of_speculation() -> None:
    assert sglang.command(config(), 8101) == BASE
    told = sglang.command(
        config(name="short", max_model_len=2048, tensor_parallel=2, extra_args=("--dtype", "half")),
        8101,
    )
    assert told[8:10] == ["2", "--max-running-requests"]
    assert told[-6:] == flags("--served-model-name short --context-length 2048 --dtype half")


@pytest.mark.parametrize("spec", [None, SpecConfig(method="ngram", draft_depth=3)])
def test_a_running_limit_is_never_left_to_the_silent_48(spec: SpecConfig | None) -> None:
    with pytest.raises(UserError, match="silently run 48 requests"):
        sglang.command(config(spec, max_running=None), 1)


DRAFT = "--speculative-draft-model-path D"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            SpecConfig(method="ngram", draft_depth=3, options={"ngram_max_bfs_breadth": 1}),
            "--speculative-algorithm NGRAM --speculative-num-draft-tokens 4"
            " --speculative-ngram-max-bfs-breadth 1",
        ),
        (
            SpecConfig(method="draft_model", draft_model="D", draft_tokens=3),
            f"--speculative-algorithm STANDALONE {DRAFT} --speculative-num-steps 3"
            " --speculative-eagle-topk 1 --speculative-num-draft-tokens 4",
        ),
        (
            SpecConfig(
                method="eagle",
                draft_model="D",
                draft_depth=5,
                draft_tokens=7,
                options={"eagle_topk": 4, "token_map": "map.pt"},
            ),
            f"--speculative-algorithm EAGLE {DRAFT} --speculative-num-steps 5"
            " --speculative-eagle-topk 4 --speculative-num-draft-tokens 8"
            " --speculative-token-map map.pt",
        ),
        (
            SpecConfig(method="eagle3", draft_model="D", draft_depth=3, draft_tokens=3),
            f"--speculative-algorithm EAGLE3 {DRAFT} --speculative-num-steps 3"
            " --speculative-eagle-topk 1 --speculative-num-draft-tokens 4",
        ),
        (
            SpecConfig(method="mtp", draft_depth=1, options={"enable_multi_layer_eagle": True}),
            "--speculative-algorithm NEXTN --speculative-num-steps 1 --speculative-eagle-topk 1"
            " --speculative-num-draft-tokens 2 --enable-multi-layer-eagle",
        ),
        (
            SpecConfig(method="mtp", draft_model="D", draft_depth=2, options={"adaptive": False}),
            f"--speculative-algorithm NEXTN {DRAFT} --speculative-num-steps 2"
            " --speculative-eagle-topk 1 --speculative-num-draft-tokens 3",
        ),
        (
            SpecConfig(method="dflash", draft_model="D", draft_depth=15),
            f"--speculative-algorithm DFLASH {DRAFT} --speculative-num-draft-tokens 16",
        ),
        (SpecConfig(method="dflash", draft_model="D"), f"--speculative-algorithm DFLASH {DRAFT}"),
    ],
)
def test_the_flags_of_every_method(spec: SpecConfig, expected: str) -> None:
    assert sglang.command(config(spec), 8101) == [*BASE, *flags(expected)]
    assert spec.method in sglang.ENGINE.methods


def eagle(**fields: Any) -> SpecConfig:
    common: dict[str, Any] = {"method": "eagle", "draft_model": "D", "draft_depth": 3}
    return SpecConfig(**(common | fields))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (SpecConfig(method="eagel3"), "did you mean 'eagle"),
        (SpecConfig(method="suffix"), "no speculative method 'suffix'"),
        (SpecConfig(method="medusa"), "Known: ngram, draft_model, eagle, eagle3, mtp, dflash"),
        (SpecConfig(method="eagle3", draft_depth=3), "expected draft_model"),
        (SpecConfig(method="dflash"), "expected draft_model"),
        (SpecConfig(method="ngram", draft_depth=3, draft_model="D"), "has no draft model"),
        (SpecConfig(method="ngram"), "expected draft_depth"),
        (SpecConfig(method="mtp"), "expected draft_depth"),
        (eagle(draft_depth=0), "expected 1 or more"),
        (eagle(draft_tokens=7), "For a tree give eagle_topk"),
        (SpecConfig(method="ngram", draft_depth=3, draft_tokens=9), "contradict each other"),
        (eagle(options={"eagle_topk": 4}), "drafts a tree. Expected draft_depth"),
        (eagle(draft_tokens=2, options={"eagle_topk": 2}), "Expected 3 to 10 nodes"),
        (eagle(draft_tokens=11, options={"eagle_topk": 2}), "Expected 3 to 10 nodes"),
        (eagle(draft_tokens=3, draft_depth=0, options={"eagle_topk": 2}), "a depth of 1 or more"),
        (eagle(options={"eagle_topk": 0}), "a whole number from 1"),
        (eagle(options={"eagle_topk": True}), "a whole number from 1"),
        (eagle(options={"token_mp": "x"}), "did you mean 'token_map'"),
        (eagle(options={"speculative_token_map": "x"}), "did you mean 'token_map'"),
        (eagle(options={"ngram_capacity": 4}), "unknown option 'ngram_capacity'"),
        (eagle(method="eagle3", options={"token_map": "x"}), "brings its own draft vocabulary"),
        (eagle(options={"num_draft_tokens": 4}), "this is 'draft_tokens, without the bonus"),
        (eagle(options={"speculative_num_steps": 4}), "this is 'draft_depth'"),
        (eagle(method="dflash", options={"dflash_block_size": 4}), "this is 'draft_tokens"),
        (eagle(options={"adaptive": "yes"}), "expected true or false"),
        (eagle(options={"token_map": ["x"]}), "expected a number or a text"),
        (eagle(options={"token_map": True}), "expected a number or a text"),
    ],
)
def test_what_sglang_does_not_take_is_refused(spec: SpecConfig, said: str) -> None:
    with pytest.raises(UserError) as fault:
        sglang.command(config(spec), 1)
    assert said in str(fault.value)


@pytest.mark.parametrize(
    ("executable", "start"),
    [
        ((".venv/bin/sglang",), ".venv/bin/sglang serve M"),
        (("docker", "run", "--network", "host", "I", "sglang"),
         "docker run --network host I sglang serve M"),
        (("python", "-m", "sglang.launch_server"), "python -m sglang.launch_server --model-path M"),
    ],
)  # fmt: skip
def test_an_executable_may_be_a_prefix(executable: tuple[str, ...], start: str) -> None:
    argv = sglang.command(config(executable=executable), 1)
    assert argv[: len(flags(start))] == flags(start)


def test_only_the_ngram_trie_learns_across_requests() -> None:
    assert [m for m in sglang.ENGINE.methods if sglang.ENGINE.remembers(m)] == ["ngram"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("sglang-*.toml")), ids=lambda p: p.stem)
def test_the_configs_that_come_along_are_valid(path: Path) -> None:
    found = read_toml(path, ServerConfig)
    argv = sglang.command(found, 1)
    method = found.spec.method if found.spec is not None else "none"
    assert ("--speculative-algorithm" in argv) == (method != "none")


def test_it_says_that_nothing_was_seen_live() -> None:
    assert sglang.ENGINE.verified.startswith("not verified on a live server")
