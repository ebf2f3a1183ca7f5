"""Readers: row shapes, the line that is wrong, categories and limits; the built-in set itself."""

from __future__ import annotations

import collections
import contextlib
import json
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
    (prompt,) = prompts.read_jsonl(write(tmp_path / "p.jsonl", row))
    assert [(m.role, m.content) for m in prompt.messages] == opening
    assert prompt.later_turns == later
    assert (None if prompt.prompt_token_ids is None else list(prompt.prompt_token_ids)) == ids


def test_speed_bench_shaped_rows(tmp_path: Path) -> None:
    row = {
        "question_id": "x" * 32, "category": "coding", "sub_category": "python", "turns": ["a"],
        "source": "own", "src_id": "1", "difficulty": "hard", "multiturn": False,
    }  # fmt: skip
    (prompt,) = prompts.read_jsonl(write(tmp_path / "p.jsonl", row))
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
        prompts.read_jsonl(path)
    assert said in str(fault.value)
    assert "p.jsonl" in str(fault.value)


@given(st.binary(max_size=300))
def test_any_bytes_are_prompts_or_a_users_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "p.jsonl"
    path.write_bytes(data)
    with contextlib.suppress(UserError):
        prompts.read_jsonl(path)


def test_the_built_in_set() -> None:
    asked = prompts.read(Dataset())
    assert collections.Counter(p.category for p in asked) == dict.fromkeys(CATEGORIES, 8)
    assert len({p.messages[0].content for p in asked}) == 88
    assert sum(bool(p.later_turns) for p in asked) == 22
    first_two = prompts.read(Dataset(limit=2))
    assert not any(p.later_turns for p in first_two), "the demo's prompts are of one turn"
    assert not {p.messages[0].content for p in prompts.warmup()} & {
        p.messages[0].content for p in asked
    }


def test_categories_and_limits() -> None:
    asked = prompts.read(Dataset(categories=("math", "rag"), limit=3))
    assert collections.Counter(p.category for p in asked) == {"math": 3, "rag": 3}
    with pytest.raises(UserError, match="unknown category 'codng'; did you mean 'coding'"):
        prompts.read(Dataset(categories=("codng",)))
    with pytest.raises(UserError, match="leaves no prompts"):
        prompts.read(Dataset(limit=0))
    with pytest.raises(UserError, match="needs a path"):
        prompts.read(Dataset(kind="jsonl"))


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
