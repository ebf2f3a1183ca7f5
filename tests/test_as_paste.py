"""reports/as_paste.py: vLLM's labels, what is ours beside them, and nothing that harms a terminal.

After a wanted change: DRAFTLOAD_GOLDEN=1 python -m pytest tests/test_as_paste.py, then read the
difference.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from loadgen.types import OpenLoop, RequestCounts, Study
from reports.as_paste import render
from tests.studies import golden, phase, server, single, summary, with_summary
from tests.test_table import HOSTILE, harmless, hostile

change = msgspec.structs.replace

# In the order in which vLLM's benchmarks/serve.py prints them (009e6d4).
VLLM = (
    "Successful requests:", "Failed requests:", "Maximum request concurrency:",
    "Benchmark duration (s):", "Total input tokens:", "Total generated tokens:",
    "Request throughput (req/s):", "Output token throughput (tok/s):",
    "Mean TTFT (ms):", "Median TTFT (ms):", "P99 TTFT (ms):",
    "Mean TPOT (ms):", "Median TPOT (ms):", "P99 TPOT (ms):",
    "Mean E2EL (ms):", "Median E2EL (ms):", "P99 E2EL (ms):",
    "Acceptance rate (%):", "Acceptance length:", "Drafts:", "Draft tokens:", "Accepted tokens:",
    "Per-position acceptance (%):", "Position 0:", "Position 1:", "Position 2:",
)  # fmt: skip


def of(**changes: Any) -> Study:
    """One load of 8 with `changes`."""
    return with_summary(single(), change(summary(), phases=(change(phase(8), **changes),)))


def lines(study: Study) -> dict[str, str]:
    """Label → value of the last block."""
    rows = [line.partition(":") for line in render(study).split("\n") if ": " in line]
    return {label.strip() + ":": value.strip() for label, _, value in rows}


def test_golden() -> None:
    """DRAFTLOAD_GOLDEN=1 stores what is rendered now."""
    text = render(single())
    assert text == golden("paste", text)


def test_labels_and_their_order_are_those_of_vllm() -> None:
    said = [line.strip() for line in render(of()).split("\n")]
    found = [label for line in said for label in VLLM if line.startswith(label)]
    assert found == [*VLLM]


def test_values_stand_where_vllm_has_them() -> None:
    page = render(of())
    assert "\nSuccessful requests:                     34\n" in page
    assert "\nOutput token throughput (tok/s):         91.50\n" in page
    assert "\n  Position 0:                            84.31\n" in page
    assert "============ Serving Benchmark Result ============" in page


def test_acceptance_length_is_vllms_and_ours_has_a_label_of_its_own() -> None:
    found = lines(of())
    assert found["Acceptance length:"] == "3.13"
    assert found["Acceptance length, all decode steps:"] == "1.46 [1.36, 1.57]"
    assert found["Acceptance from:"] == (
        "per-request figures, steps from groups of equal predicted_ms"
    )


def test_without_speculation_there_is_no_such_part() -> None:
    assert "Speculative Decoding" not in render(single(method=None))


def test_chunks_have_vllms_place_and_not_its_name() -> None:
    assert "chunk gap" not in render(of())
    page = render(of(chunk_is_step=True))
    assert "Median chunk gap (ms):" in page
    assert "ITL" not in page


def test_an_open_loop_has_its_rate() -> None:
    load = OpenLoop(request_rate_rps=4, max_in_flight=64)
    found = lines(of(load=load))
    assert found["Request rate configured (RPS):"] == "4.00"
    assert found["Maximum request concurrency:"] == "64"
    several = tuple(change(d, turns=2) for d in phase(8).dialogues)
    found = lines(of(load=load, dialogues=several))
    assert found["Dialogues begun, configured (1/s):"] == "4.00"
    assert "Request rate configured (RPS):" not in found


def test_failures_are_counted_and_cancelled_requests_apart() -> None:
    counts = RequestCounts(sent=60, completed=54, refused=1, broke=1, timed_out=2, cancelled=2)
    found = lines(of(requests=counts))
    assert found["Failed requests:"] == "4"
    assert found["Cancelled requests:"] == "2"
    assert "Cancelled requests:" not in lines(of())


def test_what_is_not_known_is_a_dash_with_its_reason() -> None:
    bare = change(phase(8).acceptance[0], acceptance_length=None, interval=None, why_missing="no")
    found = lines(of(acceptance=(bare,), distributions={}))
    assert found["Acceptance length, all decode steps:"] == "– (no)"
    assert found["Total input tokens:"] == "–"
    assert "TTFT" not in render(of(distributions={}))
    assert lines(of())["P99 TTFT (ms):"] == "– (34 values are too few)"


@pytest.mark.parametrize("simulated", [True, False])
def test_a_simulated_server_says_so_in_every_block(simulated: bool) -> None:
    run = summary()
    info = change(run.info, server=change(server(), simulated=simulated))
    page = render(with_summary(single(), change(run, info=info)))
    assert page.count("SIMULATED Serving Benchmark Result") == (2 if simulated else 0)


def test_control_characters_never_reach_the_page() -> None:
    page = render(hostile(single()))
    assert harmless(page)
    assert "\\x1b]0;owned\\x07" in page
    assert HOSTILE not in page


def test_every_run_has_its_head() -> None:
    study = single()
    two = replace(study, summaries=(summary(None), summary()))
    assert render(two).count("\nEngine: ") == 2
