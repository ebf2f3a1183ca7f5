"""reports/capacity.py and reports/advise.py: what the sentence says, and what fits the page."""

from __future__ import annotations

import json
import math
import re

import msgspec
import pytest
from rich.cells import cell_len

from loadgen import capacity as sizing
from loadgen import stepcost
from loadgen.errors import Bug
from loadgen.types import Study, Summary
from reports import advise, as_json, capacity
from tests import test_capacity as made
from tests import test_stepcost as steps

change = msgspec.structs.replace
SLO = ("ttft_p95<=500ms", "user_tokens_per_s_p50>=30", "ttft_s<=0.2")


def sized(width: int = 100, *runs: Summary, **options: object) -> Study:
    """Borders at 84 users of four GPUs with k = 3, and 61 of as many without."""
    two = (made.ladder(84, 3, tensor_parallel=4), made.ladder(61, tensor_parallel=4))
    found = sizing.capacity(runs or two, SLO, **options)  # type: ignore[arg-type]
    return Study(summaries=runs or two, capacity=found, width=width)


def advised(width: int = 100, method: str = "eagle3") -> Study:
    runs = [
        steps.run(k, [steps.phase(c, k, steps.dense(c, k)) for c in steps.LOADS], method=method)
        for k in (0, 5)
    ]
    return Study(summaries=tuple(runs), advice=stepcost.advise(runs), width=width)


def sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def test_the_sentence_names_both_loads() -> None:
    assert sentence(capacity.render(sized(rps=50.0))) == (
        "At p95 TTFT ≤ 500 ms and p50 user speed ≥ 30.0 tok/s: 16 users a GPU with eagle3 k = 3 "
        "(c=64 holds, c=128 does not); 8 users a GPU without speculation (c=32 holds, c=64 does "
        "not). 50 requests/s take 2 servers, 8 GPUs of the first, 20.0 % of each kept free."
    )


def test_what_was_not_measured_is_not_claimed() -> None:
    high, low = made.ladder(1000, 3), made.ladder(0.5)
    said = sentence(capacity.render(sized(100, high, low)))
    assert "at least 256 users a GPU with eagle3 k = 3 (c=256 holds, the highest measured)" in said
    assert "no measured load without speculation (the lowest, c=1, is outside)" in said


def test_failed_requests_are_named_where_a_figure_would_be() -> None:
    each = [*[made.request(0.1)] * 30, *[made.FAILED] * 10]
    text = capacity.render(sized(100, made.run([made.phase(8, each)])))
    assert re.search(r"c=8 +failed", text)


def test_a_simulated_border_says_so() -> None:
    summary = made.ladder(84)
    server = change(summary.info.server, simulated=True)
    text = capacity.render(sized(100, change(summary, info=change(summary.info, server=server))))
    assert text.startswith("SIMULATED: ")


def test_the_k_by_load_is_the_sentence() -> None:
    said = sentence(advise.render(advised()))
    assert said.startswith("m on vllm with eagle3, predicted: k = 4 at 1–24; k = 3 at 25–")
    assert "requests in flight. At c=256, k = 5 makes a step " in said


def test_no_prediction_says_why_and_shows_what_was_measured() -> None:
    text = advise.render(advised(method="ngram"))
    assert "m on vllm with ngram: no prediction, as it looks drafts up in text" in sentence(text)
    assert "Step time against requests in flight and k, measured, ngram" in text
    assert "schedule" not in text


def test_the_schedule_stands_as_the_engines_read_it() -> None:
    (advice,) = advised().advice
    text = " ".join(advise.render(advised(160)).split())
    assert str(advice.vllm) in text
    assert str(advice.trtllm) in text
    assert f"To confirm: {advice.confirm}." in text


@pytest.mark.parametrize("width", [80, 100, 160])
def test_pages_are_no_wider_than_asked(width: int) -> None:
    mix = {"rag": 1.0}
    full = sized(width, rps=50.0, mix=mix, gpu_price_per_h=2.5)
    pages = [
        capacity.render(full),
        capacity.render(sized(width)),
        advise.render(advised(width)),
        advise.render(advised(width, "suffix")),
    ]
    for page in pages:
        assert max(map(cell_len, page.splitlines())) <= width
        assert page.endswith("\n")
    assert pages[0] == capacity.render(full)


def test_json_has_every_figure_and_no_infinity() -> None:
    each = [*[made.request(0.1)] * 30, *[made.FAILED] * 10]
    runs = (made.run([made.phase(8, each)]), made.ladder(84, 3, env={"HF_TOKEN": "hunter2"}))
    text = as_json.render(sized(100, *runs, rps=50.0))
    found = json.loads(text)["capacity"]
    assert "hunter2" not in text
    assert found["bounds"][0]["text"] == "ttft_p95<=500ms"
    best, last = found["configs"]
    assert (best["border"], best["holds"], best["fails"]) == ("between", "c=64", "c=128")
    assert best["loads"][3]["figures"] == pytest.approx([0.5 * 64 / 84, 100])
    assert last["loads"][0]["figures"] == [None, pytest.approx(100)]
    (advice,) = json.loads(as_json.render(advised()))["advice"]
    assert advice["loads"][0]["lengths"][3]["acceptance_length"] == pytest.approx(steps.gross(3))
    assert advice["server"]["engine"] == "vllm"
    assert math.isfinite(advice["residual"])


def test_nothing_to_render_is_a_bug() -> None:
    study = Study(summaries=(made.ladder(84),))
    for render in (capacity.render, advise.render):
        with pytest.raises(Bug):
            render(study)
