"""A local tokenizer renders the template once, adds nothing to it, and keeps ids on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from array import array
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from loadgen import tokens
from loadgen.errors import UserError
from loadgen.tokens import LocalTokenizer, next_turn, plain_text, prompts_digest, without_thinking
from loadgen.types import Message, Prompt, Templating
from tests.records import prompts

WORDS = ("<s>", "user", "assistant", ":", "hello", "there", "and", "you", "[UNK]", "think", "no")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
    "{% if thinking is defined and not thinking %} no think{% endif %}"
)
RAW = Templating(apply=False)


def said(*texts: str) -> tuple[Message, ...]:
    """A conversation whose user speaks first."""
    roles = ("user", "assistant")
    return tuple(Message(role=roles[i % 2], content=text) for i, text in enumerate(texts))


def folder(path: Path, words: tuple[str, ...] = WORDS, **settings: str) -> str:
    """A tokenizer of whole words that puts a BOS before every text, as a model's folder holds it:
    asked to add special tokens, it would double the template's."""
    path.mkdir(exist_ok=True)
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>"])
    bos = ("<s>", words.index("<s>"))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    made.save(str(path / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", **settings}
    (path / "tokenizer_config.json").write_text(json.dumps(told))
    return str(path)


@pytest.fixture
def name(tmp_path: Path) -> str:
    return folder(tmp_path / "model", chat_template=TEMPLATE)


def words(ids: object) -> list[str]:
    assert isinstance(ids, array)
    return [WORDS[i] for i in ids]


# ── template ─────────────────────────────────────────────────────────────────────────────────────


def test_the_template_is_rendered_once_with_one_bos(name: str) -> None:
    render = LocalTokenizer(name)
    first = said("hello there")
    opening = ["<s>", "user", ":", "hello", "there", "assistant", ":"]
    assert render.loaded.encode("hello")[0] == WORDS.index("<s>"), "it would add one"
    assert words(render(first)) == opening
    later = next_turn(first, "and you", "hello")
    assert words(render(later)) == [*opening, "and", "you", "user", ":", "hello", "assistant", ":"]


def test_arguments_reach_the_template(name: str) -> None:
    def asked(**args: object) -> list[str]:
        return words(LocalTokenizer(name, Templating(args=args))(said("hello")))

    assert asked(thinking=False) == [*asked(thinking=True), "no", "think"]
    assert asked(thinking=True) == asked()
    with pytest.raises(UserError, match="never reads 'thinkin'; did you mean 'thinking'"):
        asked(thinkin=False)


def test_no_template_is_the_text_and_nothing_else(name: str) -> None:
    raw = LocalTokenizer(name, RAW)
    assert words(raw(said("hello there"))) == ["hello", "there"]
    assert words(raw.plain("hello there")) == ["hello", "there"]
    assert plain_text(said("a", " b", "c", "d")) == "a b\n\ncd"
    assert words(LocalTokenizer(folder(Path(name)), RAW)(said("you"))) == ["you"], "needs none"


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({}, "has no chat template"),
        ({"chat_template": "{{ raise_exception('roles must alternate') }}"}, "must alternate"),
    ],
)
def test_a_template_that_is_missing_or_fails_is_refused(
    tmp_path: Path, settings: dict[str, str], fault: str
) -> None:
    with pytest.raises(UserError, match=fault):
        LocalTokenizer(folder(tmp_path / "m", WORDS, **settings))(said("hello"))


def test_no_tokenizer_is_the_users_error(tmp_path: Path) -> None:
    for cache_at in (None, tmp_path / "cache"):
        with pytest.raises(UserError, match="no tokenizer at"):
            LocalTokenizer(str(tmp_path), cache=cache_at).many([said("hello")])


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("plain", "plain"),
        ("<think>\nhm\n</think>\n\nyes", "yes"),
        ("hm\n</think>\n\nyes", "yes"),
        ("<think>cut before its e", ""),
        ("a < b", "a < b"),
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>"
            "yes<|return|>",
            "yes",
        ),
    ],
)
def test_thinking_leaves_the_history_when_asked(answer: str, kept: str) -> None:
    assert without_thinking(answer) == kept
    assert next_turn(said("a"), answer, "b", whole=False) == said("a", kept, "b")
    assert next_turn(said("a"), answer, "b") == said("a", answer, "b"), "else the template's matter"


def test_a_tokenizer_that_cuts_and_pads_does_neither(name: str) -> None:
    file = Path(name) / "tokenizer.json"
    made = Tokenizer.from_file(str(file))
    made.enable_truncation(2)
    made.enable_padding(length=9)
    made.save(str(file))
    local = LocalTokenizer(name)
    assert words(local.plain("hello there and you")) == ["hello", "there", "and", "you"]
    assert [len(ids) for ids in local.many([said("hello"), said("hello you")])] == [6, 7]


# ── golden G11 ───────────────────────────────────────────────────────────────────────────────────


@cache
def byte_pairs() -> Tokenizer:
    """Byte-level pairs learned from this file: a tokenizer such as models have, of 500 tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    return made


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> LocalTokenizer:
    path = tmp_path_factory.mktemp("learned")
    byte_pairs().save(str(path / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(told))
    return LocalTokenizer(str(path), RAW)


@given(
    text=st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=80),
    target=st.integers(1, 200),
)
@example(text="", target=1)
@example(text="def area(r):   return r", target=7)
def test_golden_g11_a_padded_prompt_has_at_most_its_target(
    learned: LocalTokenizer, text: str, target: int
) -> None:
    """SPEED-Bench's padding and cut: decoded and encoded again no longer than the target, and one
    shorter at most. Sent as ids, as we do, a prompt has its target to the token."""
    padded = learned.plain(text + "Answer now please.\n" * target)[:target]
    again = learned.plain(learned.decode(padded))
    assert len(padded) == target
    assert target - 1 <= len(again) <= target
    whole = learned.plain(text)
    assert learned.decode(whole) == text


def test_a_cut_inside_a_character_shows_why_ids_are_sent(learned: LocalTokenizer) -> None:
    """Half a character comes back as three bytes of U+FFFD: the text is longer than its ids."""
    ids = learned.plain("玻璃")
    assert len(learned.plain(learned.decode(ids[:1]))) > 1


# ── many, and the cache ──────────────────────────────────────────────────────────────────────────

ASKED = [said(*texts) for texts in (["hello"], ["there and"], ["you", "and", "hello"], ["no"])]


def kept(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.u32"))


@pytest.mark.parametrize("characters", [1, 30, 1 << 20])
def test_many_are_encoded_as_each_alone(
    name: str, characters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", characters)
    render, told = LocalTokenizer(name), list[int]()
    assert render.many(ASKED, told.append) == [render(messages) for messages in ASKED]
    assert told[0] == 0
    assert told[-1] == len(ASKED)
    assert told == sorted(set(told))


def test_a_second_start_needs_no_tokenizer(name: str, tmp_path: Path) -> None:
    first = LocalTokenizer(name, cache=tmp_path / "cache").many(ASKED)
    second = f"""
import sys
from pathlib import Path
from loadgen.tokens import LocalTokenizer
from loadgen.types import Message
asked = [tuple(Message(role=r, content=c) for r, c in m) for m in
         {[[(m.role, m.content) for m in messages] for messages in ASKED]!r}]
ids = LocalTokenizer({name!r}, cache=Path({str(tmp_path / "cache")!r})).many(asked)
print([list(row) for row in ids], "transformers" in sys.modules, "tokenizers" in sys.modules)
"""
    ran = subprocess.run(
        [sys.executable, "-c", second],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ran.stdout.strip() == f"{[list(row) for row in first]} False False"


def test_what_is_missing_is_made_and_the_rest_read(name: str, tmp_path: Path) -> None:
    whole = LocalTokenizer(name).many(ASKED)
    cached = tmp_path / "cache"
    assert LocalTokenizer(name, cache=cached).many(ASKED[:2]) == whole[:2]
    told: list[int] = []
    assert LocalTokenizer(name, cache=cached).many(ASKED[::-1], told.append) == whole[::-1]
    assert told == [2, 4]
    assert len(kept(cached)) == 4


@pytest.mark.parametrize("damage", ["empty", "cut", "odd", "flipped", "no checksum"])
def test_a_damaged_entry_is_ignored_and_written_anew(
    name: str, tmp_path: Path, damage: str
) -> None:
    cached = tmp_path / "cache"
    whole = LocalTokenizer(name, cache=cached).many(ASKED)
    before = {path: path.read_bytes() for path in kept(cached)}
    for path, data in before.items():
        changed = {
            "empty": b"",
            "cut": data[:-4],
            "odd": data[:-1],
            "flipped": data[:-1] + bytes([data[-1] ^ 1]),
            "no checksum": data[8:],
        }[damage]
        path.write_bytes(changed)
    assert LocalTokenizer(name, cache=cached).many(ASKED) == whole
    assert {path: path.read_bytes() for path in kept(cached)} == before


@pytest.mark.parametrize("change", ["text", "arguments", "no template", "template", "vocabulary"])
def test_all_that_decides_about_ids_is_in_the_key(name: str, tmp_path: Path, change: str) -> None:
    cached, asked, templating = tmp_path / "cache", ASKED[:1], Templating()
    LocalTokenizer(name, cache=cached).many(asked)
    match change:
        case "text":
            asked = ASKED[1:2]
        case "arguments":
            templating = Templating(args={"thinking": False})
        case "no template":
            templating = RAW
        case "template":
            folder(Path(name), chat_template=TEMPLATE + " no")
        case "vocabulary":
            folder(Path(name), (*WORDS[1:], "<s>"), chat_template=TEMPLATE)
    fresh = LocalTokenizer(name, templating).many(asked)
    assert LocalTokenizer(name, templating, cached).many(asked) == fresh
    assert len(kept(cached)) == 2


def test_a_cache_that_cannot_be_written_is_no_fault(name: str, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    found = LocalTokenizer(name, cache=tmp_path / "cache").many(ASKED)
    assert found == LocalTokenizer(name).many(ASKED)


# ── what was asked ───────────────────────────────────────────────────────────────────────────────


def test_the_digest_says_whether_the_same_was_asked() -> None:
    asked = prompts(2)
    texts = [Prompt(prompt_id="p", category="c", messages=said("a"), later_turns=("b",))]
    others: list[tuple[Any, str, Templating]] = [
        (asked, "completions", Templating()),
        (asked, "chat", Templating()),
        (asked, "completions", RAW),
        (asked, "completions", Templating(history="answer")),
        (asked, "completions", Templating(args={"thinking": False})),
        (asked, "completions", Templating(args={"thinking": True})),
        (asked[:1], "completions", Templating()),
        (texts, "completions", Templating()),
        ([msgspec.structs.replace(texts[0], later_turns=("c",))], "completions", Templating()),
    ]
    digests = [prompts_digest(*other) for other in others]
    assert len(set(digests)) == len(digests)
    assert digests == [prompts_digest(*other) for other in others]
    one, two = ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert prompts_digest(asked, "completions", Templating(args=one)) == prompts_digest(
        asked, "completions", Templating(args=two)
    )
