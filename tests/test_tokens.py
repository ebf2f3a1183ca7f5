"""A local tokenizer renders the chat template and adds nothing to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from loadgen.errors import UserError
from loadgen.tokens import local_tokenizer, next_turn
from loadgen.types import Message

WORDS = ("<s>", "user", "assistant", ":", "hello", "there", "and", "you", "[UNK]")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def folder(path: Path, **settings: str) -> str:
    """A tokenizer of whole words, as a model's folder holds it."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>"])
    made.save(str(path / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", **settings}
    (path / "tokenizer_config.json").write_text(json.dumps(told))
    return str(path)


def words(ids: object) -> list[str]:
    assert isinstance(ids, list)
    return [WORDS[i] for i in ids]


def test_the_template_is_rendered_once_with_one_bos(tmp_path: Path) -> None:
    render = local_tokenizer(folder(tmp_path, chat_template=TEMPLATE))
    first = (Message(role="user", content="hello there"),)
    opening = ["<s>", "user", ":", "hello", "there", "assistant", ":"]
    assert words(render(first).tolist()) == opening
    later = next_turn(first, "and you", "hello")
    assert words(render(later).tolist()) == [*opening, "and", "you", "user", ":", "hello",
                                             "assistant", ":"]  # fmt: skip


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no chat template"):
        local_tokenizer(folder(tmp_path))


def test_no_tokenizer_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer at"):
        local_tokenizer(str(tmp_path))
