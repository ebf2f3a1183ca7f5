"""Readers: row shapes, the line that is wrong, categories and limits; the built-in set itself."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.errors import UserError
from loadgen.types import Dataset
from scenarios import prompts

CATEGORIES = (
    "coding", "humanities", "math", "multilingual", "qa", "rag", "reasoning", "roleplay", "stem",
    "summarization", "writing",
)  # fmt: skip


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "opening", "later", "ids"),
    [
        ({"prompt": "a"}, [("user", "a")], (), None),
        ({"prompt": ["a", "b"]}, [("user", "a")], ("b",), None),
        ({"turns": ["a", "b", "c"]}, [("user", "a")], ("b", "c"), None),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
         [("user", "a")], ("b",), None),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]},
         [("system", "s"), ("user", "a")], (), None),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                       {"role": "user", "content": "c"}]},
         [("user", "a"), ("assistant", "b"), ("user", "c")], (), None),
        ({"prompt_token_ids": [3, 1, 2]}, [], (), [3, 1, 2]),
    ],
)  # fmt: skip
def test_row_shapes(
    tmp_path: Path, row: dict[str, object], opening: list[tuple[str, str]],
    later: tuple[str, ...], ids: list[int] | None,
) -> None:  # fmt: skip
    (prompt,) = prompts.read_file(write(tmp_path / "p.jsonl", row))
    assert [(m.role, m.content) for m in prompt.messages] == opening
    assert prompt.later_turns == later
    assert (None if prompt.prompt_token_ids is None else list(prompt.prompt_token_ids)) == ids


def test_speed_bench_shaped_rows(tmp_path: Path) -> None:
    row = {
        "question_id": "x" * 32, "category": "coding", "sub_category": "python", "turns": ["a"],
        "source": "own", "src_id": "1", "difficulty": "hard", "multiturn": False,
    }  # fmt: skip
    (prompt,) = prompts.read_file(write(tmp_path / "p.jsonl", row))
    assert (prompt.prompt_id, prompt.category, prompt.subcategory) == ("x" * 32, "coding", "python")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("{", "line 1: not valid JSON"),
        ('{"promt": "a"}', "unknown key 'promt'; did you mean 'prompt'"),
        ('{"prompt": 3}', "line 1: Expected"),
        ("{}", "no prompt given"),
        ('{"prompt": "a", "turns": ["b"]}', "prompt and turns given"),
        ('{"prompt": "  "}', "a turn is empty"),
        ('{"turns": []}', "a turn is empty"),
        ('{"prompt_token_ids": []}', "prompt_token_ids is empty"),
        ('{"prompt_token_ids": [-1]}', "negative or too large"),
        ('{"messages": [{"role": "system", "content": "s"}]}', "no message has role 'user'"),
        ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}', "line 2: id '1' stands already"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as fault:
        prompts.read_file(path)
    assert said in str(fault.value)
    assert "p.jsonl" in str(fault.value)


@given(st.binary(max_size=300))
def test_any_bytes_are_prompts_or_a_users_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "p.jsonl"
    path.write_bytes(data)
    with contextlib.suppress(UserError):
        prompts.read_file(path)


def test_the_built_in_set() -> None:
    asked = prompts.read(Dataset()).prompts
    assert collections.Counter(p.category for p in asked) == dict.fromkeys(CATEGORIES, 8)
    assert len({p.messages[0].content for p in asked}) == 88
    assert sum(bool(p.later_turns) for p in asked) == 22
    first_two = prompts.read(Dataset(limit=22)).prompts
    assert not any(p.later_turns for p in first_two), "the demo's prompts are of one turn"
    assert not {p.messages[0].content for p in prompts.warmup()} & {
        p.messages[0].content for p in asked
    }


def test_categories_and_limits() -> None:
    asked = prompts.read(Dataset(categories=("math", "rag"), limit=3)).prompts
    assert [p.category for p in asked] == ["math", "rag", "math"]
    with pytest.raises(UserError, match="unknown category 'codng'; did you mean 'coding'"):
        prompts.read(Dataset(categories=("codng",)))
    with pytest.raises(UserError, match="leaves no prompts"):
        prompts.read(Dataset(limit=0))
    with pytest.raises(UserError, match="needs a path"):
        prompts.read(Dataset(kind="jsonl"))


# ── the field's formats ──────────────────────────────────────────────────────────────────────────

TOPICS = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
GROUPS = ("translation", "summarization", "qa", "math_reasoning", "rag")
PLACEHOLDER = prompts.PLACEHOLDER + " FROM THE SOURCE USING SPECDEC_BENCH"


def speed_bench(name: str, category: str, *turns: str, source: str = "own") -> dict[str, object]:
    return {
        "question_id": name * 32, "category": category, "sub_category": "s", "turns": list(turns),
        "source": source, "src_id": "1", "difficulty": "hard", "multiturn": len(turns) > 1,
    }  # fmt: skip


SPEED = [
    speed_bench("a", "coding", "write", "and test"),
    speed_bench("b", "rag", "read"),
    speed_bench("c", "rag", "find", "why", "how"),
]


def in_messages(row: dict[str, object]) -> dict[str, object]:
    """SPEED-Bench's other shape: user messages in place of turns."""
    turns = row["turns"]
    assert isinstance(turns, list)
    kept = {k: v for k, v in row.items() if k != "turns"}
    return kept | {"messages": [{"role": "user", "content": t} for t in turns]}


def parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_speed_bench_in_every_shape_is_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "qualitative"
    folder.mkdir()
    one = prompts.read_file(write(tmp_path / "turns.jsonl", *SPEED))
    assert [p.prompt_id for p in one] == ["a" * 32, "b" * 32, "c" * 32]
    assert [(p.category, p.subcategory, len(p.later_turns)) for p in one] == [
        ("coding", "s", 1), ("rag", "s", 0), ("rag", "s", 2),
    ]  # fmt: skip
    assert prompts.read_file(write(tmp_path / "m.jsonl", *map(in_messages, SPEED))) == one
    assert prompts.read_file(parquet(folder / "test.parquet", SPEED)) == one
    assert prompts.read_file(folder) == one


def test_throughput_rows_carry_tier_and_bucket(tmp_path: Path) -> None:
    rows = [speed_bench("a", "low_entropy", "x"), speed_bench("b", "high_entropy", "y")]
    asked = prompts.read_file(write(tmp_path / "throughput_8k.jsonl", *rows))
    assert [(p.tier, p.isl_bucket) for p in asked] == [
        ("low_entropy", "8k"),
        ("high_entropy", "8k"),
    ]


def test_placeholders_are_refused_with_their_sources_or_skipped(tmp_path: Path) -> None:
    rows = [
        *SPEED,
        speed_bench("d", "math", PLACEHOLDER, source="cais/hle"),
        speed_bench("e", "math", PLACEHOLDER + "\n\n{question}", source="cais/hle"),
        speed_bench("f", "qa", "fine", PLACEHOLDER, source="x/y"),
    ]
    path = str(write(tmp_path / "q.jsonl", *rows))
    with pytest.raises(UserError) as fault:
        prompts.read(Dataset(kind="jsonl", path=path))
    assert "3 of 6 rows are placeholders, without their text: cais/hle (2), x/y (1)" in str(
        fault.value
    )
    assert "prepare script" in str(fault.value)
    assert "--skip-placeholders" in str(fault.value)
    kept = prompts.read(Dataset(kind="jsonl", path=path, skip_placeholders=True))
    assert [p.prompt_id[0] for p in kept.prompts] == ["a", "b", "c"]
    (caveat,) = kept.caveats
    assert caveat.code == "placeholders-skipped"
    only = str(write(tmp_path / "only.jsonl", rows[3]))
    with pytest.raises(UserError, match="1 of 1 rows"):
        prompts.read(Dataset(kind="jsonl", path=only, skip_placeholders=True))


def test_golden_g13_a_limit_takes_every_category_in_turn(tmp_path: Path) -> None:
    rows = [{"id": i, "category": c, "prompt": "x"} for i, c in enumerate("AAABBC")]
    path = str(write(tmp_path / "p.jsonl", *rows))
    asked = prompts.read(Dataset(kind="jsonl", path=path, limit=5)).prompts
    assert [int(p.prompt_id) for p in asked] == [0, 3, 5, 1, 4]
    assert len(prompts.read(Dataset(kind="jsonl", path=path, limit=50)).prompts) == 6


def test_spec_bench_has_six_groups(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"question_id": 81 + i, "category": c, "turns": ["a", "b"], "reference": ["r"]}
        for i, c in enumerate(TOPICS)
    ]
    rows += [{"question_id": 161 + i, "category": c, "turns": ["a"]} for i, c in enumerate(GROUPS)]
    asked = prompts.read_file(write(tmp_path / "question.jsonl", *rows))
    assert {p.category for p in asked} == {"mt_bench", *GROUPS}
    assert [p.subcategory for p in asked if p.category == "mt_bench"] == list(TOPICS)
    alone = prompts.read_file(write(tmp_path / "mt.jsonl", *rows[:8]))
    assert {p.category for p in alone} == set(TOPICS), "MT-Bench alone keeps its topics"


@pytest.mark.parametrize(
    ("row", "category", "opening", "later"),
    [
        ({"prompt_id": 7, "prompt": ["a", "b"], "category": "stem", "reference": []},
         "stem", [("user", "a")], ("b",)),
        ({"id": "x_0", "conversations": [
            {"from": "system", "value": "s"}, {"from": "human", "value": "a"},
            {"from": "gpt", "value": "no"}, {"from": "human", "value": "b"}]},
         "uncategorised", [("system", "s"), ("user", "a")], ("b",)),
        ({"task_id": "HumanEval/0", "prompt": "def f():", "canonical_solution": "x",
          "test": "t", "entry_point": "f"}, "coding", [("user", "def f():")], ()),
        ({"question": "2 and 2?", "answer": "#### 4"}, "math", [("user", "2 and 2?")], ()),
    ],
    ids=["MT-Bench with prompt", "ShareGPT", "HumanEval", "GSM8K"],
)  # fmt: skip
def test_what_others_wrote(
    tmp_path: Path, row: dict[str, object], category: str, opening: list[tuple[str, str]],
    later: tuple[str, ...],
) -> None:  # fmt: skip
    array = tmp_path / "rows.json"
    array.write_text(json.dumps([row]))
    for path in (write(tmp_path / "p.jsonl", row), array):
        (prompt,) = prompts.read_file(path)
        assert prompt.category == category
        assert [(m.role, m.content) for m in prompt.messages] == opening
        assert prompt.later_turns == later


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", '{"prompt": "a", x}', "line 1: not valid JSON: JSON is malformed: object keys "
         "must be strings (column 17)"),
        ("p.json", '[{"prompt": "a"}, 3]', "not valid JSON: Expected `object`, got `int`"),
        ("p.json", "[]", "is empty"),
        ("p.jsonl", '{"conversations": [{"from": "gpt", "value": "a"}]}', "a human turn is empty"),
        ("p.jsonl", '{"conversations": "a"}', "Expected `array`"),
        ("p.jsonl", '{"task_id": "x", "prompt": " "}', "the prompt is empty"),
        ("p.jsonl", '{"question": 3, "answer": "4"}', "Expected `str`, got `int`"),
        ("p.parquet", "PAR1 no", "is no parquet file"),
    ],
)  # fmt: skip
def test_where_a_foreign_file_is_wrong(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError) as fault:
        prompts.read_file(path)
    assert said in str(fault.value)
    assert name in str(fault.value)


def test_a_folder_without_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.parquet file"):
        prompts.read_file(tmp_path)


def test_scenarios_by_name_and_by_file(tmp_path: Path) -> None:
    for name in prompts.names():
        assert prompts.scenario(name).name == name
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n[sampling]\nmax_output_tokens = 7\n')
    assert prompts.scenario(str(path)).sampling.max_output_tokens == 7
    with pytest.raises(UserError, match="did you mean 'smoke'"):
        prompts.scenario("smok")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = ", "not valid TOML"),
        ('name = "x"\ntemprature = 1', "unknown key 'temprature'; did you mean 'temperature'"),
        ('name = "x"\n[sampling]\ntop = 1', "unknown key 'top' in [sampling]"),
        ('name = "x"\nrepeats = "two"', "Expected `int`"),
        ("repeats = 1", "missing required field `name`"),
    ],
)
def test_a_broken_scenario_is_the_users_error(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError) as fault:
        prompts.scenario(str(path))
    assert said in str(fault.value)
    assert "mine.toml" in str(fault.value)


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    """`--dataset <(zcat x.gz)`: what stands first is looked at and not taken."""
    for number, text in enumerate(('{"prompt": "a"}\n', '[{"prompt": "a"}]')):
        path = tmp_path / str(number)
        os.mkfifo(path)
        writer = threading.Thread(target=path.write_text, args=(text,))
        writer.start()
        assert [p.messages[0].content for p in prompts.read_file(path)] == ["a"]
        writer.join()
