"""For tests: the C server that streams on an exact schedule, and which processes there are."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.records import DATA

Truth = Callable[..., str]


@pytest.fixture(scope="session")
def truth_binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled C server."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: the exact-schedule server cannot be built")
    binary = tmp_path_factory.mktemp("truth") / "truthserver"
    subprocess.run(
        [compiler, "-O2", "-o", str(binary), str(DATA / "truthserver.c")], check=True, timeout=60
    )
    return binary


@pytest.fixture
def truth(truth_binary: Path) -> Iterator[Truth]:
    """Start it: truth(ttft_ms, itl_ms, tokens_per_chunk, default_tokens) → its URL."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*arguments: float) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        process = subprocess.Popen(
            [str(truth_binary), str(port), *map(str, arguments)], stderr=subprocess.PIPE
        )
        running.append(process)
        assert process.stderr is not None
        assert process.stderr.readline().startswith(b"listening")
        return f"http://127.0.0.1:{port}"

    yield start
    for process in running:
        process.kill()
        process.wait(timeout=10)
        if process.stderr is not None:
            process.stderr.close()


def processes(word: str) -> list[int]:
    """Processes with `word` in their arguments, in the order of their ids."""
    listed = subprocess.run(
        ["ps", "-ewwo", "pid=,args="], capture_output=True, text=True, check=True
    )
    rows = (line.split(None, 1) for line in listed.stdout.splitlines())
    return sorted(int(row[0]) for row in rows if len(row) == 2 and word in row[1])
