"""Readers, one function a format: a file → Prompts. And where scenarios and data lie.

A JSONL row carries `prompt` (one text), `turns` (user texts), `messages` (chat messages) or
`prompt_token_ids`, with `category` and `id`; the field names of SPEED-Bench, Spec-Bench and
MT-Bench rows are understood. Must not: tokenize, fetch, choose an order.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from loadgen.errors import UserError, nearest
from loadgen.types import AtLeastOne, Dataset, Message, Prompt, Scenario
from loadgen.written import decode_row, read_toml

HERE = Path(__file__).parent
BUILTIN = HERE / "data" / "qualitative.jsonl"
WARMUP = HERE / "data" / "warmup.jsonl"
MAX_LINE_BYTES = 64 << 20
UNCATEGORISED = "uncategorised"


class Row(msgspec.Struct, forbid_unknown_fields=True):
    """One JSONL row as users write it. The fields after `max_output_tokens` are read over."""

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


_rows = msgspec.json.Decoder(Row)


def read_jsonl(path: Path) -> tuple[Prompt, ...]:
    """All prompts of a JSONL file, `-` for standard input. UserError names the line."""
    if str(path) == "-":
        return _prompts(sys.stdin.buffer, "standard input")
    try:
        with path.open("rb") as lines:
            return _prompts(lines, str(path))
    except (OSError, ValueError) as fault:  # ValueError: a NUL in the path
        why = getattr(fault, "strerror", None) or fault
        raise UserError(
            f"cannot read {path}: {why}. Expected a JSONL file, one prompt a line."
        ) from None


def _prompts(lines: Any, name: str) -> tuple[Prompt, ...]:
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    number = 0
    while line := lines.readline(MAX_LINE_BYTES + 1):
        number += 1
        place = f"{name}, line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise UserError(
                f"{place}: over {MAX_LINE_BYTES >> 20} MiB. Expected one prompt a line."
            )
        if not line.strip():
            continue
        prompt = _prompt(decode_row(line, _rows, Row, place), number, place)
        if prompt.prompt_id in seen:
            raise UserError(
                f"{place}: id '{prompt.prompt_id}' stands already in line {seen[prompt.prompt_id]}."
                " Expected every id once."
            )
        seen[prompt.prompt_id] = number
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{name} is empty. Expected JSONL, one prompt a line.")
    return tuple(prompts)


def _prompt(row: Row, number: int, place: str) -> Prompt:
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
        prompt_id=str(ids) if ids is not None else f"line-{number}",
        category=row.category,
        subcategory=row.subcategory or row.sub_category,
        tier=row.tier,
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


def read(dataset: Dataset) -> tuple[Prompt, ...]:
    """The prompts of a dataset, of its categories, at most `limit` a category.

    UserError: no such file, a category that it does not have, a limit below 1.
    """
    if dataset.kind == "jsonl" and dataset.path is None:
        raise UserError("dataset kind 'jsonl' needs a path. Give one in the scenario or --dataset.")
    prompts = read_jsonl(BUILTIN if dataset.path is None else Path(dataset.path))
    if dataset.categories:
        known = sorted({p.category for p in prompts})
        for category in dataset.categories:
            if category not in known:
                hint = nearest(category, known) or "."
                raise UserError(
                    f"unknown category '{category}'{hint} The dataset has: {', '.join(known)}."
                )
        prompts = tuple(p for p in prompts if p.category in dataset.categories)
    if dataset.limit is None:
        return prompts
    if dataset.limit < 1:
        raise UserError(f"a limit of {dataset.limit} leaves no prompts. Expected 1 or more.")
    return tuple(_limited(prompts, dataset.limit))


def _limited(prompts: Sequence[Prompt], limit: int) -> Iterable[Prompt]:
    taken: dict[str, int] = {}
    for prompt in prompts:
        taken[prompt.category] = taken.get(prompt.category, 0) + 1
        if taken[prompt.category] <= limit:
            yield prompt


def warmup() -> tuple[Prompt, ...]:
    """Prompts that are never measured."""
    return read_jsonl(WARMUP)


def names() -> dict[str, Path]:
    """The scenarios that come with draftload, by name."""
    return {path.stem: path for path in sorted(HERE.glob("*.toml"))}


def scenario(name: str) -> Scenario:
    """A scenario by name or by path of its TOML. UserError: none such, or not valid."""
    known = names()
    if name in known:
        return read_toml(known[name], Scenario)
    if name.endswith(".toml") or "/" in name:
        return read_toml(Path(name), Scenario)
    raise UserError(
        f"unknown scenario '{name}'{nearest(name, known) or '.'} There are: {', '.join(known)}; or "
        "give the path of a TOML file."
    )
