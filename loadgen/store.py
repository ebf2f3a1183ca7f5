"""The run file: one record a line, appended while running, read back as an iterator.

Safe against kill −9: each record is one unbuffered `write(2)`, no fsync inside a phase. Reading is
lenient: a torn or foreign line, or a line type of a newer version, is skipped and becomes a caveat.
The file never holds an API key or a header value: no noun carries one. Must not: interpret.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from loadgen.errors import ServerError, UserError
from loadgen.types import SCHEMA, Caveat, Record, Run, RunInfo

MAX_LINE_BYTES = 256 << 20


def _from_array(value: object) -> Any:
    if isinstance(value, array):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} does not belong in a run file")


def _to_array(kind: type, value: Any) -> Any:
    if kind is array:
        return array("I", value)
    raise TypeError(f"{kind} does not belong in a run file")


_encoder = msgspec.json.Encoder(enc_hook=_from_array)
_decoder = msgspec.json.Decoder(Record, dec_hook=_to_array)
_type_of = msgspec.json.Decoder(dict[str, Any])
_KNOWN = frozenset({"run", "prompt", "phase", "request", "snapshot", "client", "caveat", "end"})


class Store:
    """An open run file, RunInfo first. It fails rather than touch a file that exists.

    UserError: the folder cannot be made or written, or is full: then no file is left. ServerError:
    a later write failed.
    """

    def __init__(self, path: Path, info: RunInfo) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._fd = os.open(path, flags, 0o644)
        except OSError as fault:
            raise UserError(_unwritable(path, fault.strerror)) from None
        try:
            self.append(info)
        except ServerError:
            os.close(self._fd)
            path.unlink(missing_ok=True)
            raise UserError(_unwritable(path, "the disk is full, or fails")) from None

    def append(self, record: Record) -> None:
        """One record, one line, one write."""
        line = _encoder.encode(record) + b"\n"
        try:
            written = os.write(self._fd, line)
        except OSError as fault:
            raise ServerError(
                f"writing the run file {self.path} failed: {fault.strerror}. "
                "Every record written before is kept; `draftload report` reads them."
            ) from None
        if written != len(line):
            raise ServerError(f"the run file {self.path} is cut short: is the disk full?")

    def close(self) -> None:
        """Flush to the disk and close."""
        os.fsync(self._fd)
        os.close(self._fd)


def _unwritable(path: Path, why: str | None) -> str:
    advice = "Give a folder that can be written with --out DIR."
    return f"cannot write the run file {path}: {why}. {advice}"


def run_path(out: Path, started_at: str, scenario: str, cell: str | None = None) -> Path:
    """`<out>/<started>-<scenario>[-<cell>].jsonl`; names are cut to letters, digits, `.`, `_`, `-`.

    A name that is taken gets `.2`, `.3` … before its ending: nothing is overwritten.
    """
    words = [re.sub(r"[^A-Za-z0-9._-]+", "-", word) for word in (scenario, cell) if word]
    stem = "-".join([re.sub(r"[^0-9TZ]", "", started_at), *words])
    path = out / f"{stem}.jsonl"
    count = 2
    while path.exists():
        path = out / f"{stem}.{count}.jsonl"
        count += 1
    return path


def read(path: Path) -> Run:
    """A run file. UserError: no such file, not a run file, or one of a newer schema."""
    try:
        lines = path.open("rb")
    except OSError as fault:
        raise UserError(f"cannot read {path}: {fault.strerror}. Expected a run file.") from None
    first = lines.readline(MAX_LINE_BYTES)
    try:
        info = _decoder.decode(first)
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, TypeError, ValueError):
        info = None
    if not isinstance(info, RunInfo):
        lines.close()
        raise UserError(
            f"{path} is not a run file: its first line is not a run record. "
            "Expected a .jsonl that `draftload run` or `draftload demo` wrote."
        )
    if info.schema > SCHEMA:
        lines.close()
        raise UserError(
            f"{path} has run-file schema {info.schema}; this draftload reads up to {SCHEMA}. "
            "Read it with the draftload that wrote it, or a newer one."
        )
    return Run(info=info, records=_records(path, lines))


def _records(path: Path, lines: Any) -> Iterator[Record]:
    torn = 0
    with lines:
        while line := lines.readline(MAX_LINE_BYTES):
            try:
                yield _decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, TypeError, ValueError):
                torn += not _newer(line)
    if torn:
        yield Caveat(
            code="torn-lines",
            message=f"{torn} line{'s' * (torn > 1)} of {path.name} could not be read and "
            f"{'were' if torn > 1 else 'was'} skipped.",
            advice="A run that was killed leaves one torn last line; more than that means that the "
            "file was changed. Figures stand on the lines that could be read.",
        )


def _newer(line: bytes) -> bool:
    """A well-formed record of a type that this version does not know."""
    try:
        kind = _type_of.decode(line).get("type")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return isinstance(kind, str) and kind not in _KNOWN
