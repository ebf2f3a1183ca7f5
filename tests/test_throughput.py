"""Prompts of an exact length: template, instruction and documents, by a tokenizer made here."""

from __future__ import annotations

import itertools
import json
import random
import re
from array import array
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from loadgen.errors import UserError
from loadgen.types import U32, Dataset, Prompt, Recipe
from scenarios import random_control, throughput
from scenarios.throughput import CHARS_A_TOKEN, TASKS, TIERS, Document, common_ends, parts

HEAD, TAIL = "<|system|>You help.<|end|>\n<|user|>\n", "<|end|>\n<|assistant|>\n"
WORDS = " ".join(d.text for d in throughput._passages() if d.text.isascii()).split()
TITLE = re.compile(r'<document title="([^"]+)">')


@cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE trained on this file's own neighbours: no download."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([d.text for d in throughput._passages()], trainer)
    return made


def ids_of(text: str) -> U32:
    """As tokens.LocalTokenizer gives them: the templated conversation's ids."""
    return array("I", tokenizer().encode(HEAD + text + TAIL, add_special_tokens=False).ids)


def text_of(prompt: Prompt) -> str:
    ids = prompt.prompt_token_ids
    assert ids is not None
    return str(tokenizer().decode(list(ids), skip_special_tokens=False))


def built(recipe: Recipe) -> tuple[tuple[Prompt, ...], str]:
    return recipe.build([ids_of(text) for text in recipe.texts])


@cache
def bucket(isl: int = 1000, seed: int = 0, limit: int = 27) -> tuple[Prompt, ...]:
    data = Dataset(kind="throughput", isl_tokens=isl, seed=seed, limit=limit)
    return built(throughput.recipe(data))[0]


def length(prompt: Prompt) -> int:
    return len(prompt.prompt_token_ids or ())


@pytest.mark.parametrize(("isl", "limit"), [(1000, 27), (2000, 9), (8000, 3), (32000, 3)])
def test_golden_g11_every_prompt_has_its_length_to_the_token(isl: int, limit: int) -> None:
    """Stricter than G11: ids are what is sent, so nothing is lost in a round trip."""
    prompts = bucket(isl, 0, limit)
    assert Counter(p.category for p in prompts) == dict.fromkeys(TIERS, limit // 3)
    assert {length(p) for p in prompts} == {isl}
    assert {p.isl_bucket for p in prompts} == {f"{isl // 1000}k"}
    assert all(p.tier == p.category for p in prompts)


def test_a_whole_bucket_is_512_a_tier() -> None:
    data = Dataset(kind="throughput", isl_tokens=1000)
    recipe = throughput.recipe(data)
    assert throughput.counts(data) == dict.fromkeys(TIERS, 512)
    prompts, note = recipe.build([array("I", [1, *text[::4].encode(), 2]) for text in recipe.texts])
    assert len({p.prompt_id for p in prompts}) == 3 * 512
    assert "1,536 prompts of exactly 1,000 tokens" in note


@pytest.mark.parametrize("tier", TIERS)
def test_template_and_instruction_are_whole(tier: str) -> None:
    for prompt in (p for p in bucket() if p.tier == tier):
        (task,) = [t for t in TASKS[tier] if t.name == prompt.subcategory]
        text = text_of(prompt)
        assert text.startswith(HEAD + task.opening + '\n\n<document title="')
        before, _, after = task.closing.partition("{title}")
        assert before in text
        assert text.endswith(after + TAIL)


def test_the_document_that_is_asked_about_is_whole_and_the_last_one_cut() -> None:
    for prompt in bucket():
        text = text_of(prompt)
        body, _, asked = text.rpartition("[...]\n</document>")
        named = re.search(r'"([^"]+)"', asked)
        titles = TITLE.findall(body)
        assert body.count("</document>") == len(titles) - 1
        if named is not None:
            assert named[1] in titles[:-1]


@pytest.mark.parametrize("isl", [1000, 8000])
def test_no_document_stands_twice_in_a_prompt(isl: int) -> None:
    for prompt in bucket(isl, 0, 27 if isl == 1000 else 3):
        whole = text_of(prompt).split("</document>")
        texts = [part.partition('">\n')[2] for part in whole[:-1]]
        assert len(set(texts)) == len(texts) > 1


def test_the_seed_decides_the_prompts_and_nothing_else_does() -> None:
    data = Dataset(kind="throughput", isl_tokens=1000, limit=27)
    assert built(throughput.recipe(data))[0] == bucket()
    other = bucket(1000, 1)
    assert not {text_of(p) for p in other} & {text_of(p) for p in bucket()}


def test_a_limit_is_taken_from_the_tiers_in_turn() -> None:
    data = Dataset(kind="throughput", isl_tokens=1000, limit=4, categories=("mixed", "low_entropy"))
    prompts, _ = built(throughput.recipe(data))
    assert Counter(p.tier for p in prompts) == {"low_entropy": 2, "mixed": 2}


def test_where_it_is_said_how_much_recurs() -> None:
    data = Dataset(kind="throughput", isl_tokens=16000, limit=24, categories=("high_entropy",))
    prompts, note = built(throughput.recipe(data))
    used = [title for p in prompts for title in TITLE.findall(text_of(p))]
    share = 1 - len(set(used)) / len(used)
    assert share > 0
    assert f"another prompt has too: high_entropy {share:.0%}" in note


@pytest.mark.parametrize("rows", [88, 880])
@pytest.mark.parametrize("isl", [1000, 32000])
def test_high_entropy_is_of_the_built_in_passages_where_they_fill_a_prompt(
    rows: int, isl: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer()  # trained before the set is another
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(_passage(n) for n in range(rows)))
    monkeypatch.setattr(throughput, "BUILTIN", path)
    data = Dataset(kind="throughput", isl_tokens=isl, limit=4, categories=("high_entropy",))
    prompts, note = built(throughput.recipe(data))
    titles = [TITLE.findall(text_of(p)) for p in prompts]
    assert {length(p) for p in prompts} == {isl}
    assert all(len(set(of)) == len(of) for of in titles)
    own = [title.startswith("own-") for of in titles for title in of]
    assert all(own) == (isl == 1000 or rows == 880)
    assert ("Python's documentation" in note) == (not all(own))


def _passage(number: int) -> str:
    """A row as the built-in set has them: a question, and paragraphs of its own."""
    words = random.Random(number).choices(WORDS, k=240)
    texts = ["What follows from this?", *(" ".join(words[i::3]) for i in range(3))]
    row = {"id": f"own-{number}", "category": "rag", "turns": ["\n\n".join(texts)]}
    return json.dumps(row)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"isl_tokens": 60}, "does not fit its length"),
        ({"isl_tokens": None}, "needs isl_tokens"),
        ({"limit": 0}, "leaves no prompts"),
        ({"categories": ("mixt",)}, "did you mean 'mixed'"),
    ],
)
def test_what_cannot_be_made(changes: dict[str, Any], said: str) -> None:
    fields: dict[str, Any] = {"kind": "throughput", "isl_tokens": 1000, "limit": 3} | changes
    with pytest.raises(UserError, match=said):
        built(throughput.recipe(Dataset(**fields)))


def test_a_tokenizer_that_packs_too_much_into_a_token_is_refused() -> None:
    data = Dataset(kind="throughput", isl_tokens=1000, limit=3)
    recipe = throughput.recipe(data)
    rows = [ids_of(text)[:: CHARS_A_TOKEN + 1] for text in recipe.texts]
    with pytest.raises(UserError, match="packs so many characters"):
        recipe.build(rows)


@given(st.text("ab \n", max_size=3000), st.integers(50, 900))
def test_parts_lose_nothing_but_a_short_end(text: str, size: int) -> None:
    found = list(parts(Document("t", text), size))
    assert len({part.title for part in found}) == len(found)
    whole, kept = "".join(text.split()), "".join("".join(p.text for p in found).split())
    assert whole.startswith(kept)
    assert len(whole) - len(kept) < throughput.SHORTEST


@given(
    st.lists(st.integers(0, 3), max_size=4),
    st.lists(st.integers(0, 3), max_size=4),
    st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=5),
)
def test_common_ends_are_the_longest_that_every_row_has(
    head: list[int], tail: list[int], middles: list[list[int]]
) -> None:
    rows = [array("I", [*head, *middle, *tail]) for middle in middles]
    first, last = common_ends(rows)
    assert len(first) + len(last) >= min(len(head) + len(tail), min(map(len, rows)))
    for row in rows:
        assert row[: len(first)] == first
        assert row[len(row) - len(last) :] == last
        assert len(row) >= len(first) + len(last)


# ── the random control ───────────────────────────────────────────────────────────────────────────


def control(seed: int = 0, **changes: Any) -> tuple[Prompt, ...]:
    fields: dict[str, Any] = {"kind": "random", "isl_tokens": 300, "seed": seed, "limit": 40}
    fields |= changes
    return built(random_control.recipe(Dataset(**fields)))[0]


def test_random_prompts_have_their_length_and_ids_of_the_vocabulary() -> None:
    prompts = control()
    assert Counter(p.category for p in prompts) == dict.fromkeys(random_control.RECIPES, 10)
    head, tail = ids_of("a"), ids_of("b")
    special = {tokenizer().token_to_id(t) for t in ("<|system|>", "<|user|>", "<|end|>")}
    for prompt in prompts:
        assert length(prompt) == 300
        ids = list(prompt.prompt_token_ids or ())
        assert max(ids) < tokenizer().get_vocab_size()
        chat = prompt.category.endswith("_chat")
        assert text_of(prompt).startswith(HEAD) == chat
        assert bool(special & set(ids)) == chat
    assert len(head) == len(tail)


def test_consecutive_ids_follow_each_other_and_independent_ones_do_not() -> None:
    ids = range(50, 250)
    row = random_control.consecutive(ids, 300, random.Random(1))
    assert {(b - a) % 200 for a, b in itertools.pairwise(row)} == {1}
    drawn = random_control.independent(ids, 300, random.Random(1))
    assert len(set(drawn)) < 200
    assert set(drawn) <= set(ids)


def test_the_control_is_the_seeds_alone_and_no_two_prompts_are_alike() -> None:
    assert control() == control()
    texts = [text_of(p) for p in (*control(), *control(1))]
    assert len(set(texts)) == len(texts)


def test_a_length_below_the_template_is_refused() -> None:
    with pytest.raises(UserError, match="leaves no room"):
        control(isl_tokens=5)
