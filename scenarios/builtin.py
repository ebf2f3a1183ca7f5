"""The sets of prompts that come with draftload, and what each of them holds.

Must not: read a set that was not asked for, tokenize.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loadgen.errors import UserError, nearest
from loadgen.types import Dataset, Prompt, SetFacts
from scenarios import prompts, random_control, throughput

OWN = "Apache-2.0, written for this project"
SCRIPT_SHARE = 0.25
"""A script counts for a prompt in which it makes so much of the letters: not for a quoted word."""

# Japanese is written in three scripts, Korean names its letters by two words.
_SCRIPTS = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}


@dataclass(frozen=True)
class BuiltIn:
    """A set: how it is read, whose it is, what for."""

    read: Callable[[], tuple[Prompt, ...]]
    licence: str
    description: str


SETS: Mapping[str, BuiltIn] = {
    "qualitative": BuiltIn(
        lambda: prompts.read_file(prompts.BUILTIN),
        OWN,
        "SPEED-Bench's 11 semantic categories: how good is the draft, on which kind of text?",
    ),
    "warmup": BuiltIn(prompts.warmup, OWN, "Sent before every measured phase and never measured."),
}

MADE: Mapping[str, tuple[str, Callable[[Dataset], dict[str, int]], str]] = {
    "throughput": (
        "texts of this Python (PSF licence) and of the set qualitative (Apache-2.0)",
        throughput.counts,
        "for the target's tokenizer, at --isl 1k, 2k, 8k, 16k, 32k or any other: low_entropy from "
        "sources of the standard library (complete, sort, reproduce), mixed from Python's "
        "documentation (needle, exam, relate), high_entropy from passages of the set qualitative "
        "(story, dialogue, letters)",
    ),
    "random_control": (
        "none: random token ids",
        random_control.counts,
        "for the target's vocabulary, at any --isl: consecutive ids from a random offset, or "
        "independent ids; bare, or as _chat inside the chat template",
    ),
}
"""Sets that only a tokenizer makes: licence, prompts a category, how."""


def read(name: str) -> tuple[Prompt, ...]:
    """A built-in set that a file holds. UserError: no such set."""
    if name in MADE:
        raise UserError(
            f"set {name} has no texts until a tokenizer makes it. Look at it with draftload "
            f"datasets show {name} --tokenizer FOLDER, or expected one of: {', '.join(SETS)}."
        )
    if name not in SETS:
        known = ", ".join((*SETS, *MADE))
        hint = nearest(name, (*SETS, *MADE)) or "."
        raise UserError(f"no built-in set '{name}'{hint} There are: {known}.")
    return SETS[name].read()


def facts(name: str) -> SetFacts:
    """What a built-in set holds, also one that is made for a tokenizer."""
    if name in MADE:
        licence, counts, made = MADE[name]
        scenario = prompts.scenario(name)
        categories = counts(scenario.dataset)
        return SetFacts(
            name=name,
            description=scenario.description,
            licence=licence,
            prompts=sum(categories.values()),
            turns=sum(categories.values()),
            multi_turn=0,
            categories=categories,
            subcategories=0,
            scripts=(),
            made=made,
        )
    found = read(name)
    return SetFacts(
        name=name,
        description=SETS[name].description,
        licence=SETS[name].licence,
        prompts=len(found),
        turns=sum(1 + len(prompt.later_turns) for prompt in found),
        multi_turn=sum(1 for prompt in found if prompt.later_turns),
        categories=dict(sorted(Counter(prompt.category for prompt in found).items())),
        subcategories=len({(p.category, p.subcategory) for p in found if p.subcategory}),
        scripts=scripts(found),
    )


def scripts(of: Sequence[Prompt]) -> tuple[str, ...]:
    """Writing systems by the number of prompts in which they make a quarter of the letters."""
    found: Counter[str] = Counter()
    for prompt in of:
        texts = (*(message.content for message in prompt.messages), *prompt.later_turns)
        letters = Counter(map(_script, filter(str.isalpha, "".join(texts))))
        found.update(s for s, n in letters.items() if n >= SCRIPT_SHARE * letters.total())
    return tuple(sorted(found, key=lambda script: (-found[script], script)))


def _script(letter: str) -> str:
    word = unicodedata.name(letter, "OTHER").split()[0].split("-")[0]
    return _SCRIPTS.get(word, word.capitalize())
