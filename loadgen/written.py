"""What users write, read strictly: TOML files and JSONL rows → nouns, and [spec] against an engine.
And what of it is secret, and what a load is called.

An unknown key, a wrong type or broken syntax is a UserError that names file, place, what was
expected and the nearest name. Must not: know where files lie, default what a noun does not default.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import msgspec

from loadgen.errors import UserError, nearest
from loadgen.types import ClosedLoop, Load, SpecConfig

T = TypeVar("T")

MAX_FILE_BYTES = 1 << 20


def read_toml(path: Path, kind: type[T]) -> T:
    """The file as one `kind`. UserError: unreadable, not TOML, or not of that shape."""
    return parse_toml(read_text(path), path, kind)


def read_text(path: Path) -> str:
    """A small TOML file's text. UserError: unreadable, too large, or no text."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)  # not by its size: a device has none
        if len(text) > MAX_FILE_BYTES:
            raise UserError(f"{path}: over {MAX_FILE_BYTES >> 20} MiB; expected a small TOML file.")
        return text.decode()
    except OSError as fault:
        raise UserError(f"cannot read {path}: {fault.strerror}. Expected a TOML file.") from None
    except ValueError as fault:
        raise UserError(f"{path} is not valid TOML: {fault}.") from None


def parse_toml(text: str, path: Path, kind: type[T]) -> T:
    """TOML as one `kind`. UserError, naming file and line: not TOML, or not of that shape."""
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as fault:
        raise UserError(f"{path} is not valid TOML: {fault}.") from None
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as fault:
        line = line_of(text, *_place(str(fault)))
        raise UserError(f"{path}, line {line}: {explain(str(fault), kind)}") from None


def _place(fault: str) -> tuple[str, str]:
    """Table and key in msgspec's message: ("servers[1].config", "modl")."""
    at = re.search(r"at `\$\.?([^`]*)`", fault)
    key = re.search(r"unknown field `([^`]*)`", fault)
    return at[1] if at else "", key[1] if key else ""


def line_of(text: str, place: str, key: str = "") -> int:
    """The line, from 1, of `key` in the table at `place` ("servers[1].config") of a TOML text.

    As near as heads of tables and `key =` tell, since tomllib keeps no lines; 1 where nothing does.
    """
    wanted = place.split(".") if place else []
    current: list[str] = []
    seen: dict[str, int] = {}
    best, found = (0, -1), 1
    for number, line in enumerate(text.splitlines(), 1):
        head = re.match(r"\s*\[(\[?)\s*([^\[\]=]+?)\s*\]", line)
        if head is not None:
            parts = [part.strip(" \"'") for part in head[2].split(".")]
            if head[1]:
                seen[head[2]] = seen.get(head[2], -1) + 1
            current = []
            for end, part in enumerate(parts, 1):
                index = seen.get(".".join(parts[:end]))
                current.append(part if index is None else f"{part}[{index}]")
        if current != wanted[: len(current)]:
            continue
        rest = [part.partition("[")[0] for part in [*wanted[len(current) :], key] if part]
        deepest = -1
        if head is None:
            words = enumerate(rest)
            deepest = max((i for i, word in words if _sets(line, word)), default=-1)
        score = (len(current), deepest)
        if score > best:
            best, found = score, number
    return found


def _sets(line: str, key: str) -> bool:
    return re.search(rf"(^|[\s{{,.\"']){re.escape(key)}[\"']?\s*=", line) is not None


def decode_row(line: bytes, decoder: msgspec.json.Decoder[T], place: str) -> T:
    """One JSONL row, or a whole JSON file. UserError, naming `place` and column: not that JSON."""
    try:
        return decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        said = re.sub(r"\(byte (\d+)\)", lambda at: f"(column {int(at[1]) + 1})", str(fault))
        raise UserError(f"{place}: not valid JSON: {said}. Expected one object a line.") from None


def convert_row(row: Mapping[str, Any], kind: type[T], place: str) -> T:
    """A row as one `kind`. UserError, naming `place`: not of that shape."""
    try:
        return msgspec.convert(row, kind)
    except msgspec.ValidationError as fault:
        raise UserError(f"{place}: {explain(str(fault), kind)}") from None


def explain(fault: str, kind: type) -> str:
    """msgspec's message in our words, with the nearest known key."""
    found = re.search(r"unknown field `([^`]*)`(?: - at `\$\.?(.*)`)?", fault)
    if found is None:
        return fault.replace("`$.", "`").replace(" - at `$`", "") + "."
    key, place = found[1], found[2]
    known = sorted(keys(kind))
    where = f" in [{place}]" if place else ""
    return f"unknown key '{key}'{where}{nearest(key, known) or '; known: ' + ', '.join(known)}"


def keys(kind: Any) -> set[str]:
    """Field names of a struct and of the structs that its fields hold."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        names: set[str] = set()
        for field in msgspec.structs.fields(kind):
            names |= {field.encode_name} | keys(field.type)
        return names
    return {name for part in get_args(kind) for name in keys(part)}


def chain_depth(spec: SpecConfig, engine: str) -> int | None:
    """k of a chain, where nodes drafted = longest path. UserError: they differ, or below 1."""
    depth = spec.draft_tokens if spec.draft_depth is None else spec.draft_depth
    if spec.draft_tokens not in (None, depth):
        both = f"draft_tokens = {spec.draft_tokens} and draft_depth = {depth}"
        raise UserError(f"{engine} drafts a chain, so {both} contradict each other. Give one.")
    if depth is not None and depth < 1:
        raise UserError(f"draft_depth = {depth}: expected 1 or more; leave [spec] out for none.")
    return depth


def known_method(spec: SpecConfig, methods: tuple[str, ...], engine: str) -> str:
    """The method's name. UserError: the engine has no such method."""
    if spec.method not in methods:
        hint, known = nearest(spec.method, methods) or ".", ", ".join(methods)
        raise UserError(f"{engine} has no speculative method '{spec.method}'{hint} Known: {known}.")
    return spec.method


def known_options(spec: SpecConfig, known: frozenset[str], engine: str) -> dict[str, Any]:
    """The method's options. UserError: one that it does not have, with the nearest name."""
    for key in spec.options:
        if key not in known:
            hint = nearest(key, sorted(known)) or f". Known: {', '.join(sorted(known))}."
            raise UserError(f"{engine}, method '{spec.method}': unknown option '{key}'{hint}")
    return dict(spec.options)


Drafter = Literal["required", "optional", "none"]
"""Whether a method takes a draft model."""


def drafter_fits(spec: SpecConfig, drafter: Drafter, engine: str) -> None:
    """UserError: a draft model is missing, or there where the method has none."""
    where = f"{engine}, method '{spec.method}'"
    if spec.draft_model is None and drafter == "required":
        raise UserError(f"{where}: expected draft_model, the drafter's id or path.")
    if spec.draft_model is not None and drafter == "none":
        raise UserError(f"{where} has no draft model; leave draft_model out.")


def refuse_ours(spec: SpecConfig, ours: Mapping[str, str], engine: str) -> None:
    """UserError: an option that is the engine's name for a key of [spec] itself."""
    for key in spec.options:
        if key in ours:
            raise UserError(
                f"{engine}, method '{spec.method}', '{key}': this is '{ours[key]}' of the [spec] "
                "table itself."
            )


def flags(values: Mapping[str, object]) -> list[str]:
    """Flags and their values as arguments; None leaves a flag out."""
    return [w for f, value in values.items() if value is not None for w in (f, str(value))]


# ── loads ────────────────────────────────────────────────────────────────────────────────────────


def load_label(load: Load) -> str:
    """What a load is called, nearly as its flag has it: 'c=32', 'rate=4/s'."""
    if isinstance(load, ClosedLoop):
        return f"c={load.concurrency}"
    return f"rate={load.request_rate_rps:g}/s"


def load_order(load: Load) -> tuple[bool, float]:
    """Sorts loads: closed loops by concurrency, then open loops by rate."""
    if isinstance(load, ClosedLoop):
        return False, load.concurrency
    return True, load.request_rate_rps


def most_in_flight(load: Load) -> int | None:
    """Dialogues under way at once; None: the load has no bound."""
    return load.concurrency if isinstance(load, ClosedLoop) else load.max_in_flight


# ── secrets in what users write ──────────────────────────────────────────────────────────────────

_SECRET_FLAG = re.compile(r"^-.*(key|secret|password|token)$", re.IGNORECASE)
_ASSIGNED = re.compile(r"(?:--env=|-e)?([A-Za-z_]\w*)=")
_SECRET_NAME = re.compile(r"(key|secret|password|passwd|token|credentials?)$", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """An environment variable whose value must not be shown, by its name: HF_TOKEN, …_API_KEY."""
    return _SECRET_NAME.search(name) is not None


def _marked(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each argument as it may be shown, and the secret in it or "".

    `--api-key K`, `--token=T`; and of a prefix such as docker's `-e` or env's: `HF_TOKEN=T`.
    """
    value_of_secret = False
    for word in words:
        flag, equals, value = word.partition("=")
        secret = _SECRET_FLAG.search(flag) is not None
        assigned = _ASSIGNED.match(word)
        if value_of_secret:
            yield "***", word
        elif assigned is not None and is_secret(assigned[1]):
            yield f"{assigned[0]}***", word[assigned.end() :]
        elif secret and equals:
            yield f"{flag}=***", value
        else:
            yield word, ""
        value_of_secret = secret and not equals and not value_of_secret


def masked(words: Sequence[str]) -> tuple[str, ...]:
    """Arguments with the values of flags such as `--api-key` and `--hf-token` taken out."""
    return tuple(shown for shown, _ in _marked(words))


def secret_values(argv: Sequence[str], env: Mapping[str, str]) -> tuple[str, ...]:
    """What of a command and its environment may be in no log and no error."""
    found = [value for name, value in env.items() if is_secret(name)]
    found += [secret for _, secret in _marked(argv)]
    return tuple(value for value in found if len(value) > 3)


def hide(text: str, secrets: Sequence[str]) -> str:
    """The text with every secret masked: servers echo keys and arguments, exceptions echo URLs."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def looks_text_up(method: str) -> bool:
    """A drafter that copies from text: it drafts only where it finds a match."""
    name = "".join(c for c in method.lower() if c.isalnum())
    return name.startswith(("ngram", "suffix", "promptlookup", "lookup")) or name == "sa"
