"""kill −9 of a run at a random moment: all that was written is readable, and `report` works.

Twenty times here; two hundred with `-m slow`. Four runs at a time, each killed at a moment of its
own: starting up, writing its prompts, in the phase, or at the end.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from pathlib import Path

import pytest

from loadgen.errors import UserError
from loadgen.store import read
from loadgen.types import Caveat, RequestRecord
from tests.conftest import Truth
from tests.test_cli import asked, draftload, environment, measured

__all__ = ["asked"]

AT_ONCE = 4
RUN_S = 2.0


async def killed(url: str, asked: Path, folder: Path, after_s: float) -> Path | None:
    """A run killed `after_s` seconds after its file appeared; the file, None if there is none."""
    words = measured(url, asked, "-c", "8", "--duration", f"{RUN_S:g}s", "--warmup", "4")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadgen.cli", *words, "--out", str(folder)),
        env=environment(),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    while process.returncode is None and not list(folder.glob("*.jsonl")):  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    try:
        async with asyncio.timeout(after_s):
            await process.wait()
    except TimeoutError:
        process.send_signal(signal.SIGKILL)
        await process.wait()
    return next(folder.glob("*.jsonl"), None)


def check(path: Path) -> str:
    """What became of one file: how far it had come. All whole lines are read, in order."""
    data = path.read_bytes()
    whole = data.count(b"\n")
    torn = not data.endswith(b"\n")
    if not whole:
        with pytest.raises(UserError, match="is not a run file"):
            read(path)
        return "not even the first record"
    records = list(read(path).records)
    caveats = [r for r in records if isinstance(r, Caveat) and r.code == "torn-lines"]
    assert len(records) - len(caveats) == whole - 1
    assert len(caveats) == torn
    done = draftload("report", str(path), cwd=path.parent)
    assert "Traceback" not in done.stderr
    if not any(isinstance(r, RequestRecord) and r.phase == "c=8" for r in records):
        assert done.returncode == 2
        assert "holds no measured request" in done.stderr
        return "before the first measured request"
    assert done.returncode == 0, done.stderr
    assert "its end was not recorded" in done.stdout or b'"type":"end"' in data
    return "ended" if b'"type":"end"' in data else "in the phase"


async def kill_many(times: int, url: str, asked: Path, folder: Path) -> dict[str, int]:
    moments = random.Random(times)
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> Path | None:
        async with gate:
            after_s = moments.choice((0.05, RUN_S * 1.2)) * moments.random()
            return await killed(url, asked, folder / str(number), after_s)

    files = await asyncio.gather(*(one(number) for number in range(times)))
    found: dict[str, int] = {}
    for path in files:
        assert path is not None
        came = await asyncio.to_thread(check, path)
        found[came] = found.get(came, 0) + 1
    return found


@pytest.mark.parametrize(
    "times", [20, pytest.param(200, marks=pytest.mark.slow)], ids=["20", "200"]
)
async def test_what_was_written_before_kill_9_is_read(
    times: int, truth: Truth, asked: Path, tmp_path: Path
) -> None:
    found = await kill_many(times, truth(5, 2, 3), asked, tmp_path)
    print(found)
    assert sum(found.values()) == times
    assert found.get("in the phase"), "some were killed while they measured"
