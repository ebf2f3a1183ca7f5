"""The run file: what is written is read; torn, foreign and newer lines; nothing overwritten."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen import __version__
from loadgen.errors import ServerError, UserError
from loadgen.store import Store, read, run_path
from loadgen.types import (
    Broke,
    Cancelled,
    Caveat,
    ClientSample,
    ClosedLoop,
    PhaseRecord,
    PromptRecord,
    Record,
    Refused,
    RunEnd,
    Snapshot,
    SpecCounters,
    TimedOut,
)
from tests.records import G2, run_info

RECORDS: tuple[Record, ...] = (
    PromptRecord(prompt_id="q0", category="coding", text="a\n{“”}", sha256="0"),
    Snapshot(at_s=0.1, phase="c=1", edge="start", samples={'a{b="c"}': 1.5}, settled=False),
    *G2,
    *(
        msgspec.structs.replace(G2[0], outcome=outcome)
        for outcome in (
            Refused(status=429, message="slow down"),
            Broke(reason="reset", message="x"),
            TimedOut(after_s=1.0),
            Cancelled(),
        )
    ),
    msgspec.structs.replace(G2[0], spec=SpecCounters(drafts=0), step_tokens=None),
    ClientSample(
        at_s=1, phase="c=1", in_flight=1, target=1, sent=1, chunks=1, tokens=1,
        loop_lag_s=0.0, cpu_s=0.1, rss_bytes=1,
    ),
    PhaseRecord(
        name="c=1", load=ClosedLoop(concurrency=1), repeat=0, measured=True, started_s=0, ended_s=1
    ),
    Caveat(code="x", message="m", advice="a"),
    RunEnd(at_s=2.0, reason="completed"),
)  # fmt: skip


def write(path: Path, *records: Record) -> Path:
    store = Store(path, run_info())
    for record in records:
        store.append(record)
    store.close()
    return path


def test_every_record_comes_back(tmp_path: Path) -> None:
    run = read(write(tmp_path / "run.jsonl", *RECORDS))
    assert run.info == run_info()
    assert tuple(run.records) == RECORDS


def test_one_line_a_record(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", *RECORDS)
    assert path.read_bytes().count(b"\n") == 1 + len(RECORDS)


@given(cut=st.integers(1, 400))
def test_a_torn_last_line_is_skipped_with_a_caveat(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = write(tmp_path_factory.mktemp("torn") / "run.jsonl", *G2)
    data = path.read_bytes()
    whole = data[: -len(data.splitlines()[-1]) - 1]
    path.write_bytes(data[: max(len(data) - cut, len(whole) + 1)])
    records = list(read(path).records)
    if cut > 1:
        assert records[:3] == list(G2[:3])
        assert isinstance(records[-1], Caveat)
        assert records[-1].code == "torn-lines"
    else:
        assert records == list(G2), "only the newline is gone"


def test_lines_of_a_newer_version_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl")
    newer = msgspec.json.decode(msgspec.json.encode(RunEnd(at_s=1.0, reason="completed")))
    newer["a_field_of_tomorrow"] = {"x": [1]}
    with path.open("ab") as file:
        file.write(b'{"type":"aurora","x":1}\n' + msgspec.json.encode(newer) + b"\n")
    assert list(read(path).records) == [RunEnd(at_s=1.0, reason="completed")]


@given(noise=st.binary(max_size=200))
def test_foreign_bytes_never_raise(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = write(tmp_path_factory.mktemp("noise") / "run.jsonl", G2[0])
    with path.open("ab") as file:
        file.write(noise + b"\n")
    assert next(iter(read(path).records)) == G2[0]


@pytest.mark.parametrize("content", [b"", b"\n", b"{}\n", b'{"type":"end"}\n', b"\xff\xfe\n"])
def test_what_is_no_run_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a run file"):
        read(path)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(msgspec.json.encode(run_info(schema=99)) + b"\n")
    with pytest.raises(UserError, match="schema 99"):
        read(path)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    names = [run_path(tmp_path, "2026-11-24T12:00:00Z", "a b/../c", "none")]
    write(names[0])
    names.append(run_path(tmp_path, "2026-11-24T12:00:00Z", "a b/../c", "none"))
    assert [n.name for n in names] == [
        "20261124T120000Z-a-b-..-c-none.jsonl",
        "20261124T120000Z-a-b-..-c-none.2.jsonl",
    ]
    assert all(n.parent == tmp_path for n in names)
    with pytest.raises(UserError, match="cannot write"):
        Store(names[0], run_info())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        Store(tmp_path / "file" / "run.jsonl", run_info())
    with pytest.raises(UserError, match="File name too long"):
        Store(run_path(tmp_path / ("x" * 300), "2026-11-24T12:00:00Z", "a"), run_info())


def test_a_full_disk_ends_the_run_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "run.jsonl", run_info())

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ServerError, match="No space left"):
        store.append(G2[0])
    monkeypatch.setattr(os, "write", lambda fd, data: len(data) // 2)
    with pytest.raises(ServerError, match="cut short"):
        store.append(G2[0])
    monkeypatch.undo()
    store.close()


def test_a_disk_full_from_the_start_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", lambda fd, data: len(data) // 2)
    with pytest.raises(UserError, match="--out DIR"):
        Store(tmp_path / "run.jsonl", run_info())
    assert list(tmp_path.iterdir()) == []


def test_what_follows_a_line_that_was_cut_short_is_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk with room again: RunEnd must not stand on the torn line."""
    store = Store(tmp_path / "run.jsonl", run_info())
    whole = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: whole(fd, data[: len(data) // 2]))
    with pytest.raises(ServerError, match="cut short"):
        store.append(G2[0])
    monkeypatch.undo()
    store.append(RECORDS[-1])
    store.close()
    end, caveat = read(store.path).records
    assert end == RECORDS[-1]
    assert isinstance(caveat, Caveat)
    assert caveat.message.endswith("skipped: 2.")


def test_skipped_lines_are_named_ten_of_them_at_most(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", *G2)
    lines = path.read_bytes().splitlines()
    for damaged, said in ((1, "skipped: 2."), (12, "4, 5, 6, 7, 8, 9, 10, 11 and 2 more.")):
        path.write_bytes(b"\n".join([lines[0], *[b"{oops"] * damaged, *lines[1:]]) + b"\n")
        *records, caveat = read(path).records
        assert tuple(records) == G2
        assert isinstance(caveat, Caveat)
        assert caveat.message.endswith(said)


@pytest.mark.parametrize(
    ("changes", "readable"),
    [
        ({}, True),
        ({"end_s": G2[0].sent_s}, True),
        ({"end_s": G2[0].sent_s - 0.001}, False),
        ({"chunk_tokens": G2[0].chunk_gaps_us[:1]}, False),
        ({"osl_tokens": -1}, False),
        ({"sent_s": -1e300}, False),
    ],
)
def test_a_record_that_no_run_can_have_is_damage(
    tmp_path: Path, changes: dict[str, object], readable: bool
) -> None:
    record = msgspec.structs.replace(G2[0], **changes)
    found = list(read(write(tmp_path / "run.jsonl", record)).records)
    assert (found == [record]) is readable
    assert readable or (isinstance(found[0], Caveat) and found[0].code == "torn-lines")


def test_a_type_that_this_very_version_does_not_know_is_damage(tmp_path: Path) -> None:
    for version, damaged in ((__version__, True), ("99.0", False)):
        client = msgspec.structs.replace(run_info().client, draftload=version)
        store = Store(tmp_path / f"{version}.jsonl", run_info(client=client))
        store.close()
        with store.path.open("ab") as file:
            file.write(b'{"type":"requesu","x":1}\n')
        assert bool(list(read(store.path).records)) is damaged


def test_half_characters_of_a_header_do_not_end_a_run(tmp_path: Path) -> None:
    """aiohttp gives undecodable bytes of a Location as lone surrogates; JSON has none."""
    refused = msgspec.structs.replace(G2[0], outcome=Refused(status=302, message="to \udcff"))
    (record,) = read(write(tmp_path / "run.jsonl", refused)).records
    assert record == msgspec.structs.replace(refused, outcome=Refused(status=302, message="to ?"))


def test_a_text_too_long_for_a_line_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadgen.store.MAX_LINE_BYTES", 2000)
    long = msgspec.structs.replace(G2[0], text="x" * 2000)
    path = write(tmp_path / "run.jsonl", long, G2[1])
    assert list(read(path).records) == [msgspec.structs.replace(long, text=None), G2[1]]
    with path.open("ab") as file:
        file.write(b"x" * 9000 + b"\n" + msgspec.json.encode(RECORDS[-1]) + b"\n")
    *_, end, caveat = read(path).records
    assert end == RECORDS[-1]
    assert isinstance(caveat, Caveat)
    assert caveat.message.startswith("1 line of run.jsonl")


@pytest.mark.parametrize("fault", [errno.EROFS, errno.EACCES, errno.ENAMETOOLONG])
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    def refuses(*_: object) -> int:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(os, "open", refuses)
    with pytest.raises(UserError, match=f"{os.strerror(fault)}. Give a folder"):
        Store(tmp_path / "run.jsonl", run_info())
