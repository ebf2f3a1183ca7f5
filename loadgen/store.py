"""The run file: one record a line, appended while running, read back as an iterator.

Safe against kill −9: each record is one unbuffered `write(2)`, no fsync inside a phase. Reading is
lenient: a torn, damaged or foreign line is skipped and a caveat names it; a line type of a newer
version is passed over. A number that no run can have (loadgen/types.py) is damage.
The file never holds an API key or a header value: no noun carries one. Must not: interpret.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from loadgen import __version__
from loadgen.errors import ServerError, UserError
from loadgen.types import SCHEMA, Caveat, Record, RequestRecord, Run, RunEnd, RunInfo

MAX_LINE_BYTES = 128 << 20
"""A longer line is neither written nor read: memory stays bounded. A record of 128k output tokens
has 3 MB, a metrics page 16 MiB at most; only an endless stream's text comes near."""

NAMED_LINES = 10
TAIL_BYTES = 8192
"""More than RunEnd's line has."""


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
_UNREADABLE = (ValueError, TypeError, OverflowError, RecursionError)  # msgspec's are ValueErrors


class Store:
    """An open run file, RunInfo first. It fails rather than touch a file that exists.

    UserError: the folder cannot be made or written, or is full: then no file is left. ServerError:
    a later write failed.
    """

    def __init__(self, path: Path, info: RunInfo) -> None:
        self.path = path
        self._torn = False
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
        line = _encoded(record) + b"\n"
        if len(line) > MAX_LINE_BYTES and isinstance(record, RequestRecord):
            line = _encoded(msgspec.structs.replace(record, text=None, output_token_ids=None))
            line += b"\n"
        if self._torn:
            line = b"\n" + line  # what follows a line that was cut short is a line of its own
        try:
            written = os.write(self._fd, line)
        except OSError as fault:
            raise ServerError(
                f"writing the run file {self.path} failed: {fault.strerror}. "
                "Every record written before is kept; `draftload report` reads them."
            ) from None
        self._torn = written != len(line)
        if self._torn:
            raise ServerError(f"the run file {self.path} is cut short: is the disk full?")

    def close(self) -> None:
        """Flush to the disk and close."""
        os.fsync(self._fd)
        os.close(self._fd)


def begun(out: Path, info: RunInfo) -> Store:
    """A new run file in `out`; of several runs that begin at once each gets a name of its own."""
    while True:
        path = run_path(out, info.started_at, info.scenario.name, info.cell)
        try:
            return Store(path, info)
        except UserError:
            if not os.path.lexists(path):  # else another run took the name meanwhile
                raise


def _encoded(record: Record) -> bytes:
    try:
        return _encoder.encode(record)
    except UnicodeEncodeError:
        # Half characters, as Python keeps undecodable bytes of headers and arguments: not JSON.
        plain = msgspec.to_builtins(record, enc_hook=_from_array)
        return json.dumps(plain, ensure_ascii=False).encode("utf-8", "replace")


def _unwritable(path: Path, why: str | None) -> str:
    advice = "Give a folder that can be written with --out DIR."
    return f"cannot write the run file {path}: {why}. {advice}"


def run_path(out: Path, started_at: str, scenario: str, cell: str | None = None) -> Path:
    """`<out>/<started>-<scenario>[-<cell>].jsonl`; a name is 80 letters, digits, `.`, `_`, `-`.

    A name that is taken gets `.2`, `.3` … before its ending: nothing is overwritten.
    """
    words = [re.sub(r"[^A-Za-z0-9._-]+", "-", word)[:80] for word in (scenario, cell) if word]
    stem = "-".join([re.sub(r"[^0-9TZ]", "", started_at), *words])
    path = out / f"{stem}.jsonl"
    count = 2
    while os.path.lexists(path):  # Path.exists raises for a name that is too long
        path = out / f"{stem}.{count}.jsonl"
        count += 1
    return path


def read(path: Path) -> Run:
    """A run file. UserError: no such file, not a run file, or one of a newer schema."""
    try:
        file = path.open("rb")
    except OSError as fault:
        raise UserError(f"cannot read {path}: {fault.strerror}. Expected a run file.") from None
    lines = _lines(file)
    try:
        info = _decoded(next(lines, b""))
    except _UNREADABLE:
        info = None
    except OSError as fault:
        file.close()
        raise UserError(f"cannot read {path}: {fault.strerror}. Expected a run file.") from None
    if not isinstance(info, RunInfo):
        file.close()
        raise UserError(
            f"{path} is not a run file: its first line is not a run record. "
            "Expected a .jsonl that `draftload run` or `draftload demo` wrote."
        )
    if info.schema > SCHEMA:
        file.close()
        raise UserError(
            f"{path} has run-file schema {info.schema}; this draftload reads up to {SCHEMA}. "
            "Read it with the draftload that wrote it, or a newer one."
        )
    return Run(info=info, records=_records(path, file, lines, info))


def glance(path: Path) -> tuple[RunInfo, RunEnd | None] | None:
    """First and last line, nothing between; None: no run file, or one of a newer schema."""
    try:
        with path.open("rb") as file:
            info = _decoded(next(_lines(file), b""))
            file.seek(-min(file.seek(0, os.SEEK_END), TAIL_BYTES), os.SEEK_END)
            last = file.read().rstrip(b"\n").rpartition(b"\n")[2]
    except (OSError, *_UNREADABLE):
        return None
    if not isinstance(info, RunInfo) or info.schema > SCHEMA:
        return None
    try:
        end = _decoded(last)
    except _UNREADABLE:
        end = None
    return info, end if isinstance(end, RunEnd) else None


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines; one that is too long comes as b"", its bytes read over."""
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        yield b""
        while line and not line.endswith(b"\n"):
            line = file.readline(1 << 20)


def _decoded(line: bytes) -> Record:
    """One record. _UNREADABLE: not JSON, no record of ours, or one that contradicts itself."""
    line.decode()  # msgspec passes over a key that it does not know, even one that is no text
    record: Record = _decoder.decode(line)
    if isinstance(record, RequestRecord) and (
        record.end_s < record.sent_s
        or len(record.chunk_tokens or record.chunk_gaps_us) != len(record.chunk_gaps_us)
    ):
        raise ValueError("chunks and times do not fit together")
    return record


def _records(path: Path, file: BinaryIO, lines: Iterator[bytes], info: RunInfo) -> Iterator[Record]:
    torn = 0
    named: list[str] = []
    with file:
        for number, line in enumerate(lines, 2):
            try:
                record = _decoded(line)
            except _UNREADABLE:
                if not _newer(line, info):
                    torn += 1
                    named += [str(number)] if torn <= NAMED_LINES else []
                continue
            yield record
    if torn:
        more = f" and {torn - len(named)} more" if torn > len(named) else ""
        yield Caveat(
            code="torn-lines",
            message=f"{torn} line{'s' * (torn > 1)} of {path.name} could not be read and "
            f"{'were' if torn > 1 else 'was'} skipped: {', '.join(named)}{more}.",
            advice="A run that was killed leaves one torn last line; more than that means that the "
            "file was changed. Figures stand on the lines that could be read.",
        )


def _newer(line: bytes, info: RunInfo) -> bool:
    """A well-formed record of a type that this version does not know, from another version."""
    if info.client.draftload == __version__:
        return False  # damage: this version wrote the file
    try:
        kind = _type_of.decode(line).get("type")
    except _UNREADABLE:
        return False
    return isinstance(kind, str) and kind not in _KNOWN
