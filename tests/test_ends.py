"""However draftload ends, no process of its servers is left, and what was measured is there."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import msgspec
import pytest

from tests.conftest import processes
from tests.test_cli import asked, environment, measured

__all__ = ["asked"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """The TOML of a server, and words that only its processes have in their command line."""
    mark = random.SystemRandom().randrange(10_000_000, 99_999_999)
    path = tmp_path / "server.toml"
    path.write_text(f'engine = "simulated"\nmodel = "simulated-8b"\nmax_model_len = {mark}\n')
    yield path, str(mark)
    for pid in processes(str(mark)):
        os.kill(pid, signal.SIGKILL)


def until(happened: object, process: subprocess.Popen[str]) -> None:
    """Waits for it while the process lives, 60 s at most."""
    deadline = perf_counter() + 60
    while not happened():  # type: ignore[operator]  # a function without arguments
        assert process.poll() is None, process.communicate()[1]
        assert perf_counter() < deadline


def none_left(mark: str) -> bool:
    deadline = perf_counter() + 30
    while left := processes(mark):
        if perf_counter() > deadline:
            return not left
    return True


def started(words: list[str], cwd: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "loadgen.cli", *words],
        cwd=cwd,
        env=environment() | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def requests(folder: Path) -> int:
    return sum(p.read_bytes().count(b'"type":"request"') for p in folder.glob("*.jsonl"))


def last_record(folder: Path) -> dict[str, object]:
    (path,) = folder.glob("*.jsonl")
    record: dict[str, object] = msgspec.json.decode(path.read_bytes().splitlines()[-1])
    return record


RUN = ["-c", "2", "--duration", "100s", "--warmup", "0", "--grace", "1s"]


def a_run(server: Path, asked: Path, *more: str) -> list[str]:
    words = measured("-", asked, *more)
    words[1:3] = ["--server", str(server)]
    return words


def test_a_run_that_ends_by_itself(server: tuple[Path, str], asked: Path, tmp_path: Path) -> None:
    process = started(a_run(server[0], asked, "-c", "2", "--warmup", "0"), tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "simulated" in out
    assert none_left(server[1])


def test_a_run_that_cannot_be_written(
    server: tuple[Path, str], asked: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    process = started(a_run(server[0], asked, *RUN, "--out", "file/runs"), tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert none_left(server[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended(
    number: signal.Signals, server: tuple[Path, str], asked: Path, tmp_path: Path
) -> None:
    process = started(a_run(server[0], asked, *RUN), tmp_path)
    until(lambda: requests(tmp_path / "runs"), process)
    assert len(processes(server[1])) == 2
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert none_left(server[1])
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130, err
        assert "interrupted" in out
        assert last_record(tmp_path / "runs")["reason"] == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ended_while_the_server_starts(
    number: signal.Signals, server: tuple[Path, str], asked: Path, tmp_path: Path
) -> None:
    """A server that is never ready; nothing was measured."""
    path, mark = server
    sleeps = f'executable = ["{sys.executable}", "-c", "import time; time.sleep(600)"]\n'
    path.write_text(sleeps + path.read_text())
    process = started(a_run(path, asked, *RUN), tmp_path)
    until(lambda: len(processes(mark)) == 2, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert none_left(mark)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), err
    assert "Traceback" not in err
    assert not list((tmp_path / "runs").glob("*"))


def test_a_server_that_dies_in_the_run(
    server: tuple[Path, str], asked: Path, tmp_path: Path
) -> None:
    """The run ends at once, with what was measured, how the server ended, and exit code 1."""
    process = started(a_run(server[0], asked, *RUN), tmp_path)
    until(lambda: requests(tmp_path / "runs") > 4, process)
    os.kill(max(processes(server[1])), signal.SIGKILL)  # the supervisor came first
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "server-died" in out
    data = next((tmp_path / "runs").glob("*.jsonl")).read_bytes()
    assert b'"kind":"cancelled"' not in data, "it is the server's failure, not ours"
    assert data.count(b'"kind":"broke"') >= 2
    assert "ended by signal 9 while it was used" in " ".join(out.split())
    assert none_left(server[1])
    assert last_record(tmp_path / "runs")["reason"] == "failed: the server died during the run"


def test_the_second_ctrl_c_reports_now(
    server: tuple[Path, str], asked: Path, tmp_path: Path
) -> None:
    """Streams that would go on for a minute are cancelled by us, and counted so."""
    words = a_run(server[0], asked, *RUN[:-1], "100s", "--ignore-eos")
    process = started([*words, "--max-output-tokens", "8000"], tmp_path)
    runs = tmp_path / "runs"

    def samples() -> int:
        return sum(p.read_bytes().count(b'"type":"client"') for p in runs.glob("*.jsonl"))

    until(samples, process)
    process.send_signal(signal.SIGINT)
    seen = samples()
    until(lambda: samples() > seen + 1, process)  # the first was taken: two at once are one signal
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    data = next((tmp_path / "runs").glob("*.jsonl")).read_bytes()
    assert data.count(b'"outcome":{"kind":"cancelled"}') == 2
    assert last_record(tmp_path / "runs")["reason"] == "interrupted"
    assert "2 cancelled" in out
    assert none_left(server[1])


def test_serve_says_how_its_server_ended(server: tuple[Path, str], tmp_path: Path) -> None:
    process = started(["serve", str(server[0])], tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("http://127.0.0.1:")
    os.kill(max(processes(server[1])), signal.SIGTERM)  # the supervisor came first
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "simulated ended with code 0 while it was used.\nIts last lines:\n  ====" in err
    assert none_left(server[1])
