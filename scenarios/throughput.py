"""Throughput buckets: prompts of an exact length in the target's tokens, in three tiers of entropy.

SPEED-Bench cuts and pads text in a tokenizer of its own, so its lengths are off in the target's and
a cut can take the instruction (reference §1.5). Here a prompt is spliced from token ids: template,
opening, documents, closing, template. Only the last document is cut, to the token. Documents come
from what every Python installation carries: sources of its standard library (low entropy: go on,
sort, reproduce), its documentation (mixed: questions), and the built-in set's own passages (high:
long creative writing). A document may recur in other prompts, never within one. The same Python,
seed and length give the same texts. Must not: tokenize, pad.
"""

from __future__ import annotations

import ast
import platform
import random
import re
import sys
import sysconfig
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from loadgen.errors import UserError, nearest
from loadgen.types import U32, Dataset, Prompt, Recipe
from scenarios.prompts import BUILTIN, read_file

TIERS = ("low_entropy", "mixed", "high_entropy")
PER_TIER = 512
CHARS_A_TOKEN = 8
"""Text offered a token of length. Prose has about 4.5 characters a token, code 3 to 4."""
DOCUMENTS = 6
"""A prompt holds about so many documents at four characters a token."""
SHORTEST_CUT = 32
"""Tokens that a cut document keeps at least: a title alone is nothing to go on from."""
END_TAG = 12
"""Tokens that it loses at least: an end tag alone is no cut."""
SHORTEST = 200
"""Characters of a document at least."""

_NO_SOURCES = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo",
    "encodings", "pydoc_data", "ensurepip",
}  # fmt: skip
_LENT = (
    "passages of the set qualitative do not fill a prompt of high_entropy, so most of its text is "
    "Python's documentation"
)
_PASSAGES = {"humanities", "rag", "roleplay", "summarization", "writing"}


@dataclass(frozen=True)
class Document:
    """A text with a title that no other document of its pool has."""

    title: str
    text: str

    def fenced(self) -> str:
        return f'<document title="{self.title}">\n{self.text}\n</document>\n'


@dataclass(frozen=True)
class Task:
    """What is asked. `closing` follows the cut document; {title} names one that is whole."""

    name: str
    opening: str
    closing: str


_CUT = "[...]\n</document>\n\n"
_CODE = "Below are excerpts from the sources of several Python modules; the last one breaks off. "
_DOCS = "Below is reference documentation of the Python language; the last excerpt breaks off. "
_PROSE = "Below are texts by several authors; the last one breaks off. "

TASKS = {
    "low_entropy": (
        Task(
            "complete",
            _CODE + "Read them as one body of work: you will be asked to go on where it stops.",
            "The last document breaks off. Continue it exactly where it stops, in its own style and"
            " down to the end of the module. Write code only, no explanations.",
        ),
        Task(
            "sort",
            _CODE + "You will be asked to put them in order.",
            "Sort all complete documents by title, from A to Z, and write every one of them out"
            " again in that order: its title in a line of its own, then its text exactly as above.",
        ),
        Task(
            "reproduce",
            _CODE + "You will be asked to write some of them again.",
            'Write the document "{title}" again, exactly as it stands above, and after it all other'
            " complete documents from first to last. Change and leave out nothing.",
        ),
    ),
    "mixed": (
        Task(
            "needle",
            _DOCS + "You will be asked about one passage of it.",
            'Look only at the document "{title}". What does it say, what follows from it for'
            " somebody who writes a program, and which mistake does it help to avoid? Answer in"
            " your own words, quote the sentence that matters most, and give an example.",
        ),
        Task(
            "exam",
            _DOCS + "You will be asked to set an exam on it.",
            "Set an exam on these documents: ten questions, from easy to hard, the first of them on"
            ' "{title}". Give a model answer to each and name the document that it rests on.',
        ),
        Task(
            "relate",
            _DOCS + "You will be asked how its parts belong together.",
            'Explain to a colleague how "{title}" belongs together with the other documents: what'
            " they share, where they differ, and in which order a newcomer should read them, and"
            " why. Support each claim with a short quotation.",
        ),
    ),
    "high_entropy": (
        Task(
            "story",
            _PROSE + "You will be asked to write something of your own that grows out of them.",
            'Write a long story that begins where "{title}" ends, and in which people or things'
            " from at least two other documents meet. Do not summarise and do not quote: invent.",
        ),
        Task(
            "dialogue",
            _PROSE + "You will be asked to bring their authors together.",
            'Write a scene for the stage: the author of "{title}" and the author of another of'
            " these documents are stuck in a lift, and each wants something from the other. Let it"
            " take two turns that nobody expects.",
        ),
        Task(
            "letters",
            _PROSE + "You will be asked for an exchange of letters.",
            'Write six letters between two people who both came upon "{title}" years later. Give'
            " each a voice of its own, and let what really happened come to light by and by.",
        ),
    ),
}


# ── texts ────────────────────────────────────────────────────────────────────────────────────────


@cache
def _sources() -> tuple[Document, ...]:
    """The standard library's modules. UserError: this Python came without its sources."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        known = inside.parts[0].removesuffix(".py") in sys.stdlib_module_names
        # _sysconfigdata names the folders of the machine that built this Python.
        if not known or _NO_SOURCES & set(inside.parts) or path.name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.isascii() and len(text) >= SHORTEST:
            found.append(Document(inside.as_posix(), text.strip()))
    if not found:
        raise UserError(
            f"this Python ({platform.python_version()}) came without the sources of its standard "
            "library, which the throughput scenario takes its texts from. Use a full installation."
        )
    return tuple(found)


@cache
def _documentation() -> tuple[Document, ...]:
    """Topics of the language reference, and long docstrings of the standard library."""
    from pydoc_data.topics import topics

    found = [Document(f"topic {name}", topics[name].strip()) for name in sorted(topics)]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for module in _sources():
        nodes = [n for n in ast.walk(ast.parse(module.text)) if isinstance(n, kinds)]
        for node in nodes:
            said = ast.get_docstring(node)
            if said and len(said) >= 2 * SHORTEST:
                place = "" if isinstance(node, ast.Module) else f" {node.name}, line {node.lineno}"
                found.append(Document(module.title + place, said))
    return tuple(d for d in found if len(d.text) >= SHORTEST)


def built_in_texts() -> tuple[str, ...]:
    """What the user says first in each prompt of the built-in set."""
    return tuple(p.messages[-1].content for p in read_file(BUILTIN))


def _passages() -> tuple[Document, ...]:
    """The longer paragraphs of the built-in set: without the questions that were asked on them."""
    found = []
    for prompt in read_file(BUILTIN):
        paragraphs = [
            part.strip()
            for text in (prompt.messages[-1].content, *prompt.later_turns)
            for part in text.split("\n\n")
            if len(part) >= SHORTEST
        ]
        if paragraphs and prompt.category in _PASSAGES:
            found.append(Document(prompt.prompt_id, "\n\n".join(paragraphs)))
    return tuple(found)


def fills(documents: Sequence[Document], isl_tokens: int) -> bool:
    """Are they enough for one prompt of this length, whichever tokenizer counts?"""
    return sum(len(d.text) for d in documents) >= CHARS_A_TOKEN * isl_tokens


def pool(tier: str, isl_tokens: int) -> tuple[Document, ...]:
    """The documents of a tier, long ones in parts. Where the built-in set's passages do not fill
    one prompt, Python's documentation stands in for the rest."""
    whole = _sources() if tier == "low_entropy" else _documentation()
    if tier == "high_entropy":
        whole = _passages()
    if not fills(whole, isl_tokens):
        whole += _documentation()
    size = max(4 * isl_tokens // DOCUMENTS, 2 * SHORTEST)
    # Some modules carry each other's docstrings: one text stands once.
    found = {part.text: part for document in whole for part in parts(document, size)}
    return tuple(found.values())


def parts(document: Document, size: int) -> Iterator[Document]:
    """A text in parts of about `size` characters, cut between paragraphs, else between lines."""
    if len(document.text) <= size:
        yield document
        return
    held, number = "", 0
    for piece in re.findall(r".*?(?:\n\s*\n|\n|\Z)", document.text, re.DOTALL):
        blank = held.endswith("\n") and not held.rsplit("\n", 2)[-2].strip()
        if len(held) + len(piece) > size * (1.0 if not blank else 0.7) and len(held) >= SHORTEST:
            number += 1
            yield Document(f"{document.title}, part {number}", held.strip("\n"))
            held = ""
        held += piece
    if len(held.strip()) >= SHORTEST:
        yield Document(f"{document.title}, part {number + 1}", held.strip("\n"))


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Draft:
    """A prompt before it is tokenized: places in Recipe.texts. `documents[0]` is named in the
    closing and stands whole, at `place` of the way."""

    prompt_id: str
    tier: str
    task: str
    opening: int
    closing: int
    documents: tuple[int, ...]
    place: float


def bucket(isl_tokens: int) -> str:
    """1000 → '1k', 1500 → '1500'."""
    return f"{isl_tokens // 1000}k" if isl_tokens % 1000 == 0 else str(isl_tokens)


def share(total: int, groups: Sequence[str]) -> dict[str, int]:
    """`total` over the groups in turn, as a stratified limit takes them."""
    return {g: total // len(groups) + (i < total % len(groups)) for i, g in enumerate(groups)}


def chosen(categories: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Those asked for, else all. UserError: one that there is not."""
    for category in categories:
        if category not in known:
            hint = nearest(category, known) or "."
            raise UserError(f"unknown category '{category}'{hint} There are: {', '.join(known)}.")
    return tuple(c for c in known if c in categories or not categories)


def length_of(dataset: Dataset) -> int:
    """isl_tokens. UserError: none, or a limit below 1."""
    if dataset.isl_tokens is None or dataset.isl_tokens < 1:
        raise UserError(f"dataset kind '{dataset.kind}' needs isl_tokens, or --isl such as 1k.")
    if dataset.limit is not None and dataset.limit < 1:
        raise UserError(f"a limit of {dataset.limit} leaves no prompts. Expected 1 or more.")
    return dataset.isl_tokens


def counts(dataset: Dataset) -> dict[str, int]:
    """Prompts of each tier that recipe() makes: `limit` over the tiers in turn, or 512 a tier."""
    tiers = chosen(dataset.categories, TIERS)
    return share(dataset.limit or PER_TIER * len(tiers), tiers)


def recipe(dataset: Dataset) -> Recipe:
    """The bucket of `isl_tokens`. UserError: nothing to make."""
    isl, wanted = length_of(dataset), counts(dataset)
    texts: dict[str, int] = {}
    drafts = [
        draft
        for tier, number in wanted.items()
        for draft in _drafts(tier, isl, number, dataset.seed, texts)
    ]
    lent = wanted.get("high_entropy") and not fills(_passages(), isl)

    def build(ids: Sequence[U32]) -> tuple[tuple[Prompt, ...], str]:
        prompts, note = _built(drafts, ids, isl)
        return prompts, note + f"; {_LENT}" * bool(lent)

    return Recipe(texts=tuple(texts), build=build)


def _drafts(tier: str, isl: int, count: int, seed: int, texts: dict[str, int]) -> Iterator[_Draft]:
    rng = random.Random(f"{seed}/{tier}/{isl}")
    hands = _hands(pool(tier, isl), CHARS_A_TOKEN * isl, rng)

    def at(text: str) -> int:
        return texts.setdefault(text, len(texts))

    for number in range(count):
        hand = next(hands)
        task = TASKS[tier][number % len(TASKS[tier])]
        yield _Draft(
            prompt_id=f"{bucket(isl)}-{tier}-{number:03}",
            tier=tier,
            task=task.name,
            opening=at(task.opening + "\n\n"),
            closing=at(_CUT + task.closing.format(title=hand[0].title)),
            documents=tuple(at(document.fenced()) for document in hand),
            place=rng.random(),
        )


def _hands(
    documents: Sequence[Document], chars: int, rng: random.Random
) -> Iterator[tuple[Document, ...]]:
    """Hands of at least `chars` characters dealt from a shuffled deck, which is shuffled anew when
    it is used up; a hand never holds a document twice."""
    deck: list[Document] = []
    while True:
        hand: dict[str, Document] = {}
        held, again = 0, []
        while held < chars and len(hand) < len(documents):
            if not deck:
                deck = rng.sample(documents, len(documents))
            document = deck.pop()
            if document.title in hand:
                again.append(document)
            else:
                hand[document.title] = document
                held += len(document.text)
        deck += again
        yield tuple(hand.values())


def common_ends(rows: Sequence[U32]) -> tuple[U32, U32]:
    """What all rows begin and end with: the chat template around their texts."""
    shortest = min(map(len, rows))
    head = next((i for i in range(shortest) if len({r[i] for r in rows}) > 1), shortest)
    left = shortest - head
    tail = next((i for i in range(left) if len({r[-1 - i] for r in rows}) > 1), left)
    first = rows[0]
    return first[:head], first[len(first) - tail :]


def _built(
    drafts: Sequence[_Draft], ids: Sequence[U32], isl: int
) -> tuple[tuple[Prompt, ...], str]:
    head, tail = common_ends(ids)
    bodies = [row[len(head) : len(row) - len(tail)] for row in ids]
    prompts: list[Prompt] = []
    used: dict[str, list[int]] = {}
    for draft in drafts:
        spliced, documents = _spliced(draft, bodies, isl - len(head) - len(tail))
        used.setdefault(draft.tier, []).extend(documents)
        prompts.append(
            Prompt(
                prompt_id=draft.prompt_id,
                category=draft.tier,
                subcategory=draft.task,
                tier=draft.tier,
                isl_bucket=bucket(isl),
                prompt_token_ids=head + spliced + tail,
                source=f"draftload, from Python {platform.python_version()}",
            )
        )
    again = (f"{tier} {1 - len(set(of)) / len(of):.0%}" for tier, of in used.items())
    note = (
        f"{len(prompts):,} prompts of exactly {isl:,} tokens, {len(head) + len(tail)} of them the "
        f"chat template's; uses of a document that another prompt has too: {', '.join(again)}"
    )
    return tuple(prompts), note


def _spliced(draft: _Draft, bodies: Sequence[U32], room: int) -> tuple[U32, list[int]]:
    """Exactly `room` ids, and the documents in them. UserError: too short for the task."""
    opening, closing = bodies[draft.opening], bodies[draft.closing]
    named, *others = draft.documents
    room -= len(opening) + len(closing) + len(bodies[named])
    if room < SHORTEST_CUT:
        raise UserError(
            f"prompt {draft.prompt_id} does not fit its length: instruction, template and one "
            f"whole document leave {room} tokens. Expected a longer --isl, such as 1k."
        )
    # Where every document left is about as long as what is to be filled, another order helps.
    for turn in range(len(others)):
        filled = _filled([*others[turn:], *others[:turn]], bodies, room)
        if filled is not None:
            whole, last, left = filled
            whole.insert(round(draft.place * len(whole)), named)
            middle = array("I", [token for d in whole for token in bodies[d]])
            return opening + middle + bodies[last][:left] + closing, [*whole, last]
    raise UserError(
        f"prompt {draft.prompt_id}: this tokenizer packs so many characters into a token that "
        f"{CHARS_A_TOKEN} a token do not fill {room:,} tokens. Expected a shorter --isl."
    )


def _filled(
    documents: Sequence[int], bodies: Sequence[U32], room: int
) -> tuple[list[int], int, int] | None:
    """Whole documents, the one to be cut and to how many ids; None where they do not fit so."""
    whole: list[int] = []
    for document in documents:
        size = len(bodies[document])
        if room <= size - END_TAG:
            return whole, document, room
        if room >= size + SHORTEST_CUT:
            whole.append(document)
            room -= size
    return None
