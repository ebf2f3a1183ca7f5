"""Readers, one function a format: a file → Prompts. And where scenarios and data lie.

A file is JSONL, a JSON array, parquet or a folder of it; a row's own fields tell its format:
SPEED-Bench (either shape), Spec-Bench, MT-Bench (either shape), ShareGPT, HumanEval, GSM8K, or our
own (`prompt`, `turns`, `messages` or `prompt_token_ids`, with `category` and `id`). Must not:
tokenize, fetch, choose an order.
"""

from __future__ import annotations

import os
import re
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from loadgen.errors import UserError, nearest
from loadgen.slo import read as read_slo
from loadgen.types import AtLeastOne, Caveat, Dataset, Message, Prompt, Scenario
from loadgen.written import convert_row, decode_row, read_toml

HERE = Path(__file__).parent
BUILTIN = HERE / "data" / "qualitative.jsonl"
WARMUP = HERE / "data" / "warmup.jsonl"
MAX_LINE_BYTES = 64 << 20
MAX_ARRAY_BYTES = 768 << 20
UNCATEGORISED = "uncategorised"

PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED"
"""How a SPEED-Bench row begins whose text its authors may not redistribute (revision 1.1)."""

TIERS = ("low_entropy", "mixed", "high_entropy")

# Spec-Bench @ fd2c1cd: its report has six groups; MT-Bench's eight topics are one of them.
_MT_BENCH = (
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
)
_SPEC_BENCH = frozenset({"translation", "summarization", "qa", "math_reasoning", "rag"})

_Row = dict[str, Any]
_objects = msgspec.json.Decoder(_Row)


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """What a dataset holds, and what to say about it."""

    prompts: tuple[Prompt, ...]
    caveats: tuple[Caveat, ...] = ()


# ── one function a format ────────────────────────────────────────────────────────────────────────


class Row(msgspec.Struct, forbid_unknown_fields=True):
    """One row as users write it, and as SPEED-Bench, Spec-Bench and MT-Bench have it.

    The fields after `source` are read over.
    """

    id: str | int | None = None
    question_id: str | int | None = None
    prompt_id: str | int | None = None
    category: str = UNCATEGORISED
    subcategory: str | None = None
    sub_category: str | None = None
    prompt: str | tuple[str, ...] | None = None
    turns: tuple[str, ...] | None = None
    messages: tuple[Message, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    max_output_tokens: AtLeastOne | None = None
    tier: str | None = None
    isl_bucket: str | None = None
    source: str | None = None
    src_id: Any = None
    difficulty: Any = None
    multiturn: Any = None
    reference: Any = None


def _own(raw: _Row, place: str) -> Prompt:
    row = convert_row(raw, Row, place)
    given = [
        field
        for field in ("prompt", "turns", "messages", "prompt_token_ids")
        if getattr(row, field) is not None
    ]
    if len(given) != 1:
        raise UserError(
            f"{place}: {' and '.join(given) if given else 'no prompt'} given. Expected exactly one "
            "of prompt, turns, messages, prompt_token_ids."
        )
    ids = next((i for i in (row.id, row.question_id, row.prompt_id) if i is not None), None)
    opening, later = _texts(row, place)
    if row.prompt_token_ids is not None:
        if not row.prompt_token_ids:
            raise UserError(f"{place}: prompt_token_ids is empty. Expected at least one id.")
        if not all(0 <= token < 1 << 31 for token in row.prompt_token_ids):
            raise UserError(f"{place}: a token id is negative or too large.")
    return Prompt(
        prompt_id="" if ids is None else str(ids),
        category=row.category,
        subcategory=row.subcategory or row.sub_category,
        tier=row.tier or (row.category if row.category in TIERS else None),
        isl_bucket=row.isl_bucket,
        messages=opening,
        later_turns=later,
        prompt_token_ids=None if row.prompt_token_ids is None else array("I", row.prompt_token_ids),
        max_output_tokens=row.max_output_tokens,
        source=row.source,
    )


def _texts(row: Row, place: str) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The opening messages and what the user says later."""
    texts = (row.prompt,) if isinstance(row.prompt, str) else (row.prompt or row.turns)
    if texts is not None:
        if not texts or not all(text.strip() for text in texts):
            raise UserError(f"{place}: a turn is empty. Expected a text in every turn.")
        return (Message(role="user", content=texts[0]),), tuple(texts[1:])
    if row.messages is None:
        return (), ()
    if not any(m.role == "user" for m in row.messages):
        raise UserError(f"{place}: no message has role 'user'. Expected at least one.")
    first = next(i for i, m in enumerate(row.messages) if m.role == "user")
    rest = row.messages[first + 1 :]
    if all(m.role == "user" for m in rest):
        # User messages only: each is a turn, answered by the model itself (SPEED-Bench).
        return row.messages[: first + 1], tuple(m.content for m in rest)
    if row.messages[-1].role != "user":
        raise UserError(f"{place}: the last message is the assistant's. Expected a user's.")
    return row.messages, ()


class _Said(msgspec.Struct):
    value: str
    from_: str = msgspec.field(name="from")


class _Conversation(msgspec.Struct):
    conversations: tuple[_Said, ...]
    id: str | int | None = None
    category: str = UNCATEGORISED


def _sharegpt(raw: _Row, place: str) -> Prompt:
    """What the human said, turn by turn; the recorded answers are left to the model."""
    row = convert_row(raw, _Conversation, place)
    system = [s.value for s in row.conversations if s.from_ == "system"]
    said = [s.value for s in row.conversations if s.from_ in ("human", "user")]
    if not said or not all(text.strip() for text in said):
        raise UserError(f"{place}: a human turn is empty or missing. Expected a text in each.")
    opening = [Message(role="system", content=text) for text in system[:1]]
    return Prompt(
        prompt_id="" if row.id is None else str(row.id),
        category=row.category,
        messages=(*opening, Message(role="user", content=said[0])),
        later_turns=tuple(said[1:]),
    )


class _HumanEval(msgspec.Struct):
    task_id: str
    prompt: str


def _humaneval(raw: _Row, place: str) -> Prompt:
    """A function's head and docstring, to be completed."""
    row = convert_row(raw, _HumanEval, place)
    return _one_turn(row.task_id, "coding", "humaneval", row.prompt, place)


class _Gsm8k(msgspec.Struct):
    question: str


def _gsm8k(raw: _Row, place: str) -> Prompt:
    """A word problem; its recorded answer is not used."""
    return _one_turn("", "math", "gsm8k", convert_row(raw, _Gsm8k, place).question, place)


def _one_turn(prompt_id: str, category: str, subcategory: str, text: str, place: str) -> Prompt:
    if not text.strip():
        raise UserError(f"{place}: the prompt is empty. Expected a text.")
    return Prompt(
        prompt_id=prompt_id,
        category=category,
        subcategory=subcategory,
        messages=(Message(role="user", content=text),),
    )


# Fields that only this format has → its reader; the first that fits, else our own.
_FORMATS: tuple[tuple[frozenset[str], Callable[[_Row, str], Prompt]], ...] = (
    (frozenset({"conversations"}), _sharegpt),
    (frozenset({"task_id", "prompt"}), _humaneval),
    (frozenset({"question", "answer"}), _gsm8k),
)


# ── files → rows ─────────────────────────────────────────────────────────────────────────────────


def read_file(path: Path) -> tuple[Prompt, ...]:
    """All prompts of a file or folder, `-` for standard input. UserError names file and line."""
    rows = _lines(sys.stdin.buffer, "standard input") if str(path) == "-" else _rows_of(path)
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    named = re.search(r"(?:^|[^0-9])(\d+k)(?:[^0-9a-z]|$)", path.name)
    bucket = named[1] if named is not None else None
    for number, (place, row) in enumerate(rows, 1):
        reader = next((r for fields, r in _FORMATS if fields <= row.keys()), _own)
        prompt = reader(row, place)
        name = prompt.prompt_id or f"line-{number}"
        if name in seen:
            raise UserError(
                f"{place}: id '{name}' stands already in {seen[name]}. Expected every id once."
            )
        seen[name] = place.rpartition(", ")[2]
        if prompt.tier is not None and prompt.isl_bucket is None:
            prompt = msgspec.structs.replace(prompt, isl_bucket=bucket)
        prompts.append(msgspec.structs.replace(prompt, prompt_id=name))
    if not prompts:
        raise UserError(f"{path} is empty. Expected JSONL, one prompt a line.")
    return _grouped(prompts)


def _grouped(prompts: list[Prompt]) -> tuple[Prompt, ...]:
    """Spec-Bench's topics of MT-Bench as its group `mt_bench`; anything else as it is."""
    if not {p.category for p in prompts} >= _SPEC_BENCH:
        return tuple(prompts)
    return tuple(
        msgspec.structs.replace(p, category="mt_bench", subcategory=p.category)
        if p.category in _MT_BENCH
        else p
        for p in prompts
    )


def _rows_of(path: Path) -> Iterator[tuple[str, _Row]]:
    """(place, row) of a file or folder."""
    try:
        if path.is_dir() or path.suffix == ".parquet":
            yield from _parquet(path)
            return
        with path.open("rb") as lines:
            if lines.peek(1)[:1] == b"[":  # a pipe cannot be read twice
                yield from _array(lines, str(path))
            else:
                yield from _lines(lines, str(path))
    except (OSError, ValueError) as fault:  # ValueError: a NUL in the path
        why = getattr(fault, "strerror", None) or fault
        raise UserError(
            f"cannot read {path}: {why}. Expected a JSONL file, one prompt a line."
        ) from None


def _lines(lines: Any, name: str) -> Iterator[tuple[str, _Row]]:
    number = 0
    while line := lines.readline(MAX_LINE_BYTES + 1):
        number += 1
        place = f"{name}, line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise UserError(
                f"{place}: over {MAX_LINE_BYTES >> 20} MiB. Expected one prompt a line."
            )
        if line.strip():
            yield place, decode_row(line, _objects, place)


def _array(file: BinaryIO, name: str) -> Iterator[tuple[str, _Row]]:
    """A JSON array of rows, as ShareGPT's files are."""
    size = os.fstat(file.fileno()).st_size  # of a pipe 0
    data = file.read(MAX_ARRAY_BYTES + 1) if size <= MAX_ARRAY_BYTES else b""
    if max(size, len(data)) > MAX_ARRAY_BYTES:
        raise UserError(f"{name}: a JSON array of over 768 MiB. Expected JSONL, one prompt a line.")
    rows = decode_row(data, msgspec.json.Decoder(list[_Row]), name)
    yield from ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))


def _parquet(path: Path) -> Iterator[tuple[str, _Row]]:
    """SPEED-Bench as its prepare script writes it: a file, or a folder searched for files."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: reading parquet needs pyarrow. Install draftload[parquet], or give the same "
            "rows as JSONL."
        ) from None
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no .parquet file. Expected a prepared SPEED-Bench folder.")
    for file in files:
        try:
            rows = pyarrow.parquet.read_table(file).to_pylist()
        except (pyarrow.ArrowException, OSError) as fault:
            raise UserError(f"{file} is no parquet file: {str(fault)[:200]}.") from None
        for number, row in enumerate(rows, 1):
            yield f"{file}, row {number}", {k: v for k, v in row.items() if v is not None}


# ── datasets ─────────────────────────────────────────────────────────────────────────────────────


def read(dataset: Dataset) -> PromptSet:
    """A dataset's prompts: of its categories, at most `limit` in all, taken from each in turn.

    UserError: no such file, a category that it does not have, a limit below 1, placeholder rows.
    """
    if dataset.kind == "jsonl" and dataset.path is None:
        raise UserError("dataset kind 'jsonl' needs a path. Give one in the scenario or --dataset.")
    prompts = read_file(BUILTIN if dataset.path is None else Path(dataset.path))
    prompts = selected(prompts, dataset.categories)
    prompts, caveats = _without_placeholders(prompts, skip=dataset.skip_placeholders)
    return PromptSet(prompts=selected(prompts, limit=dataset.limit), caveats=caveats)


def selected(
    prompts: tuple[Prompt, ...], categories: Sequence[str] = (), limit: int | None = None
) -> tuple[Prompt, ...]:
    """Those of the categories, at most `limit` in all. UserError: none such, a limit below 1."""
    if categories:
        known = sorted({p.category for p in prompts})
        for category in categories:
            if category not in known:
                hint = nearest(category, known) or "."
                raise UserError(
                    f"unknown category '{category}'{hint} The dataset has: {', '.join(known)}."
                )
        prompts = tuple(p for p in prompts if p.category in categories)
    if limit is None:
        return prompts
    if limit < 1:
        raise UserError(f"a limit of {limit} leaves no prompts. Expected 1 or more.")
    return stratified(prompts, limit)


def _without_placeholders(
    prompts: tuple[Prompt, ...], *, skip: bool
) -> tuple[tuple[Prompt, ...], tuple[Caveat, ...]]:
    """UserError: rows whose text must be fetched, unless they are to be skipped."""
    empty = [p for p in prompts if any(PLACEHOLDER in text[:200] for text in _user_texts(p))]
    if not empty:
        return prompts, ()
    sources = Counter(p.source or "no source" for p in empty).most_common()
    where = ", ".join(f"{source} ({count})" for source, count in sources[:6])
    said = f"{len(empty)} of {len(prompts)} rows are placeholders, without their text: {where}"
    if not skip or len(empty) == len(prompts):
        raise UserError(
            f"{said}{' and more' * (len(sources) > 6)}. SPEED-Bench may not hand these texts on: "
            "run its prepare script (specdec_bench's prepare_data.py), which fetches them from "
            "their sources, and give what it wrote; --skip-placeholders measures the others alone."
        )
    left = {p.prompt_id for p in empty}
    caveat = Caveat(
        code="placeholders-skipped",
        message=f"{said}; they were skipped.",
        advice="These figures are not SPEED-Bench's: prepare the whole set to compare with it.",
    )
    return tuple(p for p in prompts if p.prompt_id not in left), (caveat,)


def _user_texts(prompt: Prompt) -> tuple[str, ...]:
    return (*(m.content for m in prompt.messages if m.role == "user"), *prompt.later_turns)


def stratified(prompts: Sequence[Prompt], count: int) -> tuple[Prompt, ...]:
    """`count` prompts, one of each category in turn, categories as first seen (golden G13)."""
    by_category: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    most = max(len(rows) for rows in by_category.values())
    in_turn = (rows[i] for i in range(most) for rows in by_category.values() if i < len(rows))
    return tuple(prompt for prompt, _ in zip(in_turn, range(count), strict=False))


def warmup() -> tuple[Prompt, ...]:
    """Prompts that are never measured."""
    return read_file(WARMUP)


def names() -> dict[str, Path]:
    """The scenarios that come with draftload, by name."""
    return {path.stem: path for path in sorted(HERE.glob("*.toml"))}


def scenario(name: str) -> Scenario:
    """A scenario by name or by path of its TOML. UserError: none such, or not valid."""
    known = names()
    if name in known or name.endswith(".toml") or "/" in name:
        path = known.get(name, Path(name))
        found = read_toml(path, Scenario)
        read_slo(found.slo, f"{path}, slo:")
        return found
    raise UserError(
        f"unknown scenario '{name}'{nearest(name, known) or '.'} There are: {', '.join(known)}; or "
        "give the path of a TOML file."
    )
