"""What users write, read strictly: TOML files and JSONL rows → nouns.

An unknown key, a wrong type or broken syntax is a UserError that names file, place, what was
expected and the nearest name. Must not: know where files lie, default what a noun does not default.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec

from loadgen.errors import UserError, nearest

T = TypeVar("T")

MAX_FILE_BYTES = 16 << 20


def read_toml(path: Path, kind: type[T]) -> T:
    """The file as one `kind`. UserError: unreadable, not TOML, or not of that shape."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{path}: over {MAX_FILE_BYTES >> 20} MiB; expected a small TOML file.")
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise UserError(f"cannot read {path}: {fault.strerror}. Expected a TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise UserError(f"{path} is not valid TOML: {fault}.") from None
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as fault:
        raise UserError(f"{path}: {explain(str(fault), kind)}") from None


def decode_row(line: bytes, decoder: msgspec.json.Decoder[T], kind: type[T], place: str) -> T:
    """One JSONL row. UserError, naming `place`: not JSON, or not of that shape."""
    try:
        return decoder.decode(line)
    except msgspec.ValidationError as fault:
        raise UserError(f"{place}: {explain(str(fault), kind)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise UserError(f"{place}: not valid JSON: {fault}. Expected one object a line.") from None


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
