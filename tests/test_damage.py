"""A run file on a full disk, with flipped bits, and with a second run of its name beside it."""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loadgen import cli
from loadgen.store import begun, read
from tests.conftest import Truth
from tests.records import G2, run_info
from tests.test_cli import asked, environment, measured

__all__ = ["asked"]

Report = Callable[[Path], tuple[int, str, str]]

LONG = ["-c", "4", "--duration", "100s", "--warmup", "0", "--no-preflight", "--quiet"]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Report:
    """`draftload report FILE` in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(path: Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["draftload", "report", str(path)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(end.value.code or 0), out, err

    return run


def test_a_disk_that_fills_up_ends_the_run_and_keeps_what_was_written(
    truth: Truth, asked: Path, tmp_path: Path, report: Report
) -> None:
    """A limit on the file's size cuts a write as a full disk does: short, then not at all."""

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        [sys.executable, "-m", "loadgen.cli", *measured(truth(2, 1, 3), asked, *LONG)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120, check=False,
        preexec_fn=full,
    )  # fmt: skip
    assert done.returncode == 1
    assert "is cut short: is the disk full?" in done.stderr
    assert "Traceback" not in done.stderr
    (path,) = tmp_path.glob("runs/*.jsonl")
    assert path.stat().st_size == 20_000
    code, out, err = report(path)
    assert (code, err) == (0, "")
    assert skipped_lines(out) == {path.read_bytes().count(b"\n") + 1}


def test_flipped_bits_are_skipped_lines_or_other_values(
    truth: Truth, asked: Path, tmp_path: Path, report: Report
) -> None:
    """The lines that are no JSON any more are those that the report names."""
    words = measured(truth(2, 1, 3), asked, "-c", "2", "--requests", "12", "--quiet")
    subprocess.run(
        [sys.executable, "-m", "loadgen.cli", *words],
        cwd=tmp_path, env=environment(), check=True, timeout=120, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    (path,) = tmp_path.glob("runs/*.jsonl")
    data, drawn = path.read_bytes(), random.Random(7)
    named = 0
    for _ in range(200):
        at = drawn.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << drawn.randrange(8)]) + data[at + 1 :])
        line = data.count(b"\n", 0, at) + 1
        code, out, err = report(path)
        if code == 2:
            assert line == 1, err
            assert "not a run file" in err or "schema" in err
            continue
        assert (code, err) == (0, "")
        skipped = skipped_lines(out)
        assert not_json(path.read_bytes()) <= skipped <= {line, line + 1}
        named += bool(skipped)
    assert named > 50, "most bits matter"


def skipped_lines(report: str) -> set[int]:
    """The numbers in the caveat of the report."""
    _, _, said = " ".join(report.split()).partition("skipped: ")
    return {int(word) for word in said.partition(".")[0].split(", ")} if said else set()


def not_json(data: bytes) -> set[int]:
    found = set()
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
        try:
            json.loads(line, strict=False)  # a bare control character in a text does no harm
        except ValueError:
            found.add(number)
    return found


def test_two_runs_with_one_name_in_one_second_touch_nothing_of_each_other(tmp_path: Path) -> None:
    start = threading.Barrier(8)

    def begin(number: int) -> Path:
        start.wait()
        store = begun(tmp_path, run_info(run_id=str(number)))
        for one in G2:
            store.append(one)
        store.close()
        return store.path

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(begin, range(8)))
    made = {path: str(number) for number, path in enumerate(paths)}
    assert len(made) == len([*tmp_path.iterdir()]) == 8
    for path, run_id in made.items():
        run = read(path)
        assert run.info.run_id == run_id
        assert list(run.records) == list(G2)
