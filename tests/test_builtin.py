"""The built-in sets and the `datasets` commands, as a user runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from loadgen.errors import UserError
from loadgen.types import Message, Prompt
from scenarios import builtin, random_control, throughput
from tests.test_cli import draftload

TREES = (
    "oak",
    "ash",
    "elm",
    "yew",
    "fir",
    "larch",
    "birch",
    "rowan",
    "maple",
    "hazel",
    "lime",
    "box",
)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """One category of twelve texts on trees, each in two wordings that hardly differ."""
    rows = [
        {"id": f"{tree}-{n}", "category": "trees",
         "turns": [f"{tree * 3} {tree}wood {tree}leaf {tree}root {'now' * n}", "and then?"]}
        for n in (0, 1) for tree in TREES
    ]  # fmt: skip
    path = tmp_path / "pool.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


@pytest.mark.parametrize("name", builtin.SETS)
def test_every_set_tells_what_it_holds(name: str) -> None:
    facts = builtin.facts(name)
    assert facts.prompts == sum(facts.categories.values()) == len(builtin.read(name))
    assert facts.turns >= facts.prompts >= facts.multi_turn
    assert facts.scripts[0] == "Latin"
    assert facts.licence


def test_unknown_set_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'qualitative'"):
        builtin.read("qualitatif")


@pytest.mark.parametrize(
    ("text", "scripts"),
    [("hello", ("Latin",)), ("今日は晴れ", ("Han", "Kana")), ("say 水", ("Han", "Latin")),
     ("a long English text that quotes 水 once", ("Latin",)), ("Привет", ("Cyrillic",)),
     ("안녕하세요", ("Hangul",)), ("12 + 3", ())],
)  # fmt: skip
def test_scripts(text: str, scripts: tuple[str, ...]) -> None:
    message = Message(role="user", content=text)
    assert builtin.scripts([Prompt(prompt_id="a", category="x", messages=(message,))]) == scripts


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("command", ["datasets", "scenarios"])
def test_every_set_is_listed_within_the_width(tmp_path: Path, command: str, width: int) -> None:
    done = draftload(command, cwd=tmp_path, COLUMNS=str(width))
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= width
    for name in ("qualitative", "throughput", "random_control"):
        assert re.search(rf"^{name}\b", done.stdout, re.MULTILINE)
    for name in builtin.MADE:
        assert f"{builtin.facts(name).prompts:,} prompts" in done.stdout


def test_sets_without_a_file_tell_how_they_are_made() -> None:
    facts = builtin.facts("throughput")
    assert facts.categories == dict.fromkeys(("low_entropy", "mixed", "high_entropy"), 512)
    tasks = [task.name for of in throughput.TASKS.values() for task in of]
    assert all(word in facts.made for word in (*facts.categories, *tasks))
    assert list(builtin.facts("random_control").categories) == list(random_control.RECIPES)


def test_samples_of_texts_are_of_every_category_in_turn(tmp_path: Path) -> None:
    done = draftload("datasets", "show", "qualitative", "--limit", "11", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"^── \S+ · (\w+)", done.stdout, re.MULTILINE)
    assert sorted(shown) == sorted(builtin.facts("qualitative").categories)


def test_help_has_examples(tmp_path: Path) -> None:
    for words in ([], ["diversity"], ["select"], ["show"]):
        assert "Example" in draftload("datasets", *words, "--help", cwd=tmp_path).stdout


def test_select_copies_rows_and_leaves_the_twins(pool: Path, tmp_path: Path) -> None:
    words = ["datasets", "select", str(pool), "--per-category", "12", "--out"]
    done = draftload(*words, "chosen.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "12 of 24 prompts; embedder: lexical" in done.stderr
    lines = (tmp_path / "chosen.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"].partition("-")[0] for line in lines} == set(TREES)
    assert set(lines) <= set(pool.read_text().splitlines())
    again = draftload(*words, "again.jsonl", cwd=tmp_path)
    assert again.returncode == 0
    assert (tmp_path / "again.jsonl").read_text().splitlines() == lines
    shown = draftload("datasets", "diversity", "chosen.jsonl", "--pairs", "3", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "12 prompts" in shown.stdout
    assert "lexical" in shown.stdout
    assert sum(line.startswith("0.") for line in shown.stdout.splitlines()) == 3
    assert "at or over a cosine of 0.30: 0" in shown.stdout
    whole = draftload("datasets", "diversity", str(pool), "--pairs", "1", cwd=tmp_path)
    assert "at or over a cosine of 0.30: 12" in whole.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["diversity", "qualitatif"], "did you mean 'qualitative'"),
        (["diversity", "qualitative", "--embedder", "lexcal"], "did you mean 'lexical'"),
        (["diversity", "none.jsonl"], "cannot read none.jsonl"),
        (["select", "pool.jsonl", "--out", "pool.jsonl"], "is the pool itself"),
        (["select", "array.jsonl", "--out", "x"], "cannot copy rows of array.jsonl"),
        (["select", "pool.jsonl", "--out", "x", "--per-category", "99"], "has 24 prompts, and 99"),
    ],
)
def test_a_wrong_word_is_exit_2(pool: Path, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "array.jsonl").write_text('[{"prompt": "a"}]')
    done = draftload("datasets", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
