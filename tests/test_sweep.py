"""Sweeps over simulated servers: order, what is kept, what is marked, what is shown."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp.test_utils import TestServer

from loadgen.matrix import cells as cells_of
from loadgen.matrix import read
from loadgen.measure import Job
from loadgen.plan import make_plan
from loadgen.store import Store, glance, run_path
from loadgen.summarize import summarize
from loadgen.sweep import expected_s, index, result, sessions, speedups, sweep
from loadgen.types import (
    Cell,
    ClientSample,
    ClosedLoop,
    Matrix,
    OverRepeats,
    Record,
    RequestRecord,
    Run,
    RunEnd,
    Study,
    Summary,
    SweepResult,
    SweepRow,
)
from reports import sweep as shown
from reports.live import SweepLive
from scenarios import prompts as sets
from servers import openai as generic
from servers import simulator
from servers.simulated import preset
from tests.conftest import processes
from tests.records import ENGINE, SERVER, phase_data, record, run_info
from tests.test_cli import draftload, environment

ENGINES = {e.name: e for e in (simulator.ENGINE, generic.ENGINE)}


def matrix_text(
    *, scale: float = 0.0, repeats: int = 2, more: str = "", loads: str = "1, 2"
) -> str:
    """None and EAGLE-3, two prompts."""
    server = (
        '[[servers]]\n[servers.config]\nengine = "simulated"\nmodel = "simulated-8b"\n'
        f'extra_args = ["--time-scale", "{scale:g}"]\n'
    )
    return (
        f"repeats = {repeats}\n{server}{server}"
        'spec = { method = "eagle3", draft_depth = 3 }\n'
        f'{more}[[scenarios]]\nscenario = "smoke"\nlimit = 2\nconcurrency = [{loads}]\n'
        "max_output_tokens = 12\nwarmup_requests = 1\n"
    )


@pytest.fixture
def matrix_file(tmp_path: Path) -> Path:
    path = tmp_path / "matrix.toml"
    path.write_text(matrix_text())
    return path


def laid_out(path: Path) -> tuple[Matrix, tuple[Cell, ...]]:
    matrix = read(path, sets.scenario, ENGINES)
    prompts = {s.name: sets.read(s.dataset).prompts for s in matrix.scenarios}
    return matrix, cells_of(matrix, prompts)


def finished(runs: Path) -> dict[str, list[Path]]:
    """Run files that ended well, by cell."""
    found: dict[str, list[Path]] = {}
    for path in sorted(runs.glob("*.jsonl")):
        info, end = glance(path) or (None, None)
        if info is not None and info.cell and end is not None and end.reason == "completed":
            found.setdefault(info.cell, []).append(path)
    return found


# ── the command ──────────────────────────────────────────────────────────────────────────────────


def test_a_sweep_from_matrix_to_table(matrix_file: Path, tmp_path: Path) -> None:
    plan = draftload("sweep", str(matrix_file), "--dry-run", cwd=tmp_path)
    assert plan.returncode == 0, plan.stderr
    assert "8 cells" in plan.stdout
    assert "unknown: 8 cells, of which none was measured before" in plan.stdout
    assert "eagle3 differ from none in speculation and: nothing else" in plan.stdout
    assert not (tmp_path / "runs").exists()

    done = draftload("sweep", str(matrix_file), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    order = re.findall(r"\[(\d)/8\] (\w+) smoke (c=\d) r=(\d): .* tok/s", done.stderr)
    assert [" ".join(cell[1:]) for cell in order] == [
        "none c=1 1", "none c=2 1", "eagle3 c=1 1", "eagle3 c=2 1",
        "none c=2 2", "none c=1 2", "eagle3 c=2 2", "eagle3 c=1 2",
    ]  # fmt: skip
    assert done.stderr.count("starting simulated") == 4, "neighbouring cells share a server"
    assert "SIMULATED: Sweep matrix: 8 of 8 cells measured" in done.stdout
    assert len(re.findall(r"eagle3 +c=\d +2 of 2 ", done.stdout)) == 2
    assert "What else differs between none and eagle3: nothing." in done.stdout

    kept = finished(tmp_path / "runs")
    assert len(kept) == 8
    (path,) = kept["eagle3 smoke c=2 r=2"]
    assert path.name.endswith("-smoke-eagle3-smoke-c-2-r-2.jsonl")
    lines = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
    (measured,) = [r for r in lines if r["type"] == "phase" and r["measured"]]
    assert (measured["repeat"], measured["load"]["concurrency"]) == (1, 2)

    again = draftload("sweep", str(matrix_file), cwd=tmp_path)
    assert again.returncode == 0
    assert again.stdout == done.stdout, "the same run files, the same table"
    assert "starting" not in again.stderr
    assert finished(tmp_path / "runs") == kept


def test_killed_half_way_it_repeats_no_finished_cell(matrix_file: Path, tmp_path: Path) -> None:
    matrix_file.write_text(matrix_text(scale=0.3))
    runs = tmp_path / "runs"
    process = subprocess.Popen(
        [sys.executable, "-m", "loadgen.cli", "sweep", str(matrix_file)],
        cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while len(list(runs.glob("*.jsonl"))) < 4:
        assert process.poll() is None
    process.kill()
    process.wait(timeout=30)
    before = finished(runs)
    assert len(before) == 3
    contents = {path: path.read_bytes() for (path,) in before.values()}

    done = draftload("sweep", str(matrix_file), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 of them measured before" in done.stderr
    assert re.search(r"about \d+ s for \d cells by earlier ones", done.stderr)
    after = finished(runs)
    assert len(after) == 8
    assert all(len(paths) == 1 for paths in after.values())
    assert all(path.read_bytes() == content for path, content in contents.items())


def test_a_server_that_will_not_start_marks_its_cells_and_the_sweep_goes_on(
    matrix_file: Path, tmp_path: Path
) -> None:
    broken = (
        '[[servers]]\nname = "broken"\nconfig = { engine = "simulated", model = "simulated-8b", '
        'spec = { method = "mtp", draft_depth = 1 }, extra_args = ["--no-such-flag"] }\n'
    )
    matrix_file.write_text(matrix_text(more=broken, loads="1"))
    done = draftload("sweep", str(matrix_file), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("starting simulated, mtp") == 1, "what cannot start is not tried twice"
    assert re.search(r"broken smoke c=1 r=2: failed: simulated ended with code 2", done.stderr)
    assert "4 of 6 cells measured" in done.stdout
    assert "✗ broken c=1: failed: simulated ended with code 2 before it was ready" in done.stdout
    assert len(finished(tmp_path / "runs")) == 4
    assert "Traceback" not in done.stderr


def test_ctrl_c_closes_the_cell_and_stops_the_server(matrix_file: Path, tmp_path: Path) -> None:
    mark = "7.77"
    matrix_file.write_text(matrix_text(scale=float(mark), loads="2"))
    process = subprocess.Popen(
        [sys.executable, "-m", "loadgen.cli", "sweep", str(matrix_file)],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    runs = tmp_path / "runs"
    while not any(b'"type":"request"' in path.read_bytes() for path in runs.glob("*.jsonl")):
        assert process.poll() is None
    assert processes(f"--time-scale {mark}")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "0 of 4 cells measured" in out
    (path,) = runs.glob("*.jsonl")
    found = glance(path)
    assert found is not None
    assert found[1] is not None
    assert found[1].reason == "interrupted"
    assert not processes(f"--time-scale {mark}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "matrix.toml, line 1: the sweep is empty: no servers"),
        (matrix_text().replace("limit", "limt"), "matrix.toml, line 15: unknown key 'limt'"),
        (matrix_text(more="[[servers]]\nfile = 'a.toml'\n"), "line 14: there is no file a.toml"),
    ],
)
def test_bad_input_is_one_paragraph_and_exit_code_2(
    matrix_file: Path, tmp_path: Path, text: str, said: str
) -> None:
    matrix_file.write_text(text)
    done = draftload("sweep", str(matrix_file), cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


# ── the loop over servers ────────────────────────────────────────────────────────────────────────


class Simulated:
    """A server in this process that dies when it is told to: a sweep.Ready."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def died(self) -> str:
        return await asyncio.shield(self.dead)


def jobs(out: Path, see: Callable[[Cell, Record], None]) -> Callable[[Cell], Job]:
    """What a cell is measured with; `see` gets every record."""

    def job(cell: Cell) -> Job:
        return Job(
            scenario=cell.scenario,
            prompts=sets.read(cell.scenario.dataset).prompts,
            warmup=sets.warmup(),
            engines=ENGINES,
            out=out,
            say=lambda line: None,
            watch=lambda plan, info: contextlib.nullcontext(partial(see, cell)),
            cell=cell,
        )

    return job


async def test_a_server_at_a_url_is_measured_and_left_alone(
    matrix_file: Path, tmp_path: Path
) -> None:
    def start(config: Any) -> contextlib.AbstractAsyncContextManager[Simulated]:
        raise AssertionError("nothing is to be started")

    ended: list[tuple[str, str]] = []
    async with TestServer(simulator.app(preset("eagle3", time_scale=0.0))) as server:
        url = str(server.make_url("")).rstrip("/")
        text = f"baseline = false\n[[servers]]\nname = 'mine'\nurl = '{url}'\n"
        text += "[[scenarios]]\nscenario = 'smoke'\nlimit = 2\nconcurrency = [1]\n"
        _, cells = laid_out_with(matrix_file, text)
        job = jobs(tmp_path, lambda cell, record: None)
        assert await sweep(cells, job, start, lambda c, path, why: ended.append((c.name, why)))
    assert ended == [(f"mine smoke c=1 r={repeat}", "completed") for repeat in (1, 2, 3)]
    job = jobs(tmp_path, lambda cell, record: None)
    assert await sweep(cells[:1], job, start, lambda c, path, why: ended.append((c.name, why)))
    assert ended[-1][1].startswith("failed: no server answers")


async def test_a_server_that_dies_costs_one_cell_and_is_started_again(
    matrix_file: Path, tmp_path: Path
) -> None:
    _, cells = laid_out(matrix_file)
    started: list[Simulated] = []
    ended: list[tuple[str, str]] = []

    @contextlib.asynccontextmanager
    async def start(config: Any) -> AsyncIterator[Simulated]:
        settings = preset("none", time_scale=0.0)
        async with TestServer(simulator.app(settings)) as server:
            started.append(Simulated(str(server.make_url("")).rstrip("/")))
            yield started[-1]

    def kill(cell: Cell, record: Record) -> None:
        fatal = cell.name == "none smoke c=1 r=1" and isinstance(record, RequestRecord)
        if fatal and not started[-1].dead.done():
            started[-1].dead.set_result("simulated ended by signal 9.")

    job = jobs(tmp_path, kill)
    whole = await sweep(cells, job, start, lambda cell, path, why: ended.append((cell.name, why)))
    assert whole
    assert [name for name, _ in ended] == [cell.name for cell in cells]
    first, *others = [why for _, why in ended]
    assert first == "failed: the server died during the run"
    assert set(others) == {"completed"}
    assert len(started) == 1 + 4


@pytest.mark.parametrize(("fresh", "sizes"), [(False, [2, 2, 2, 2]), (True, [2, 1, 1, 2, 1, 1])])
def test_cells_share_a_server_unless_it_must_be_fresh(
    matrix_file: Path, fresh: bool, sizes: list[int]
) -> None:
    _, cells = laid_out(matrix_file)
    cells = tuple(
        replace(c, server=replace(c.server, fresh=fresh and c.server.name == "eagle3"))
        for c in cells
    )
    found = list(sessions(cells))
    assert [len(session) for session in found] == sizes
    assert sum(found, ()) == cells
    alone = [cell for cell in cells if cell.server.name == "none"]
    assert [len(session) for session in sessions(alone)] == [2, 2], "a repeat is a start"


# ── the index ────────────────────────────────────────────────────────────────────────────────────


def test_only_whole_run_files_of_the_same_config_are_done(
    matrix_file: Path, tmp_path: Path
) -> None:
    _, cells = laid_out(matrix_file)
    _, changed = laid_out_with(matrix_file, matrix_text().replace("= 12", "= 13"))
    assert [cell.name for cell in changed] == [cell.name for cell in cells]
    whole, unfinished, interrupted, other = cells[:4]
    ends = (("completed", whole), (None, unfinished), ("interrupted", interrupted))
    for reason, cell in (*ends, ("completed", changed[cells.index(other)])):
        write(tmp_path / "runs", cell, reason)
    (tmp_path / "runs" / "foreign.jsonl").write_bytes(b"\x00 no run file\n")
    (tmp_path / "runs" / "empty.jsonl").touch()
    (tmp_path / "runs" / "folder.jsonl").mkdir()
    known = index(tmp_path / "runs", cells)
    assert set(known.done) == {whole.name}
    repeats = [cell for cell in cells if cell.sha256 == whole.sha256]
    assert [expected_s(cell, known.seconds) for cell in repeats] == [7.0, 7.0]
    assert expected_s(other, known.seconds) is None
    assert index(tmp_path / "none", cells).done == {}


def test_of_several_run_files_the_newest_counts(matrix_file: Path, tmp_path: Path) -> None:
    _, (cell, *_) = laid_out(matrix_file)
    paths = [write(tmp_path, cell, "completed", f"2026-11-{day}T00:00:00Z") for day in (25, 24)]
    assert index(tmp_path, [cell]).done == {cell.name: paths[0]}


def laid_out_with(path: Path, text: str) -> tuple[Matrix, tuple[Cell, ...]]:
    path.write_text(text)
    return laid_out(path)


def write(
    folder: Path, cell: Cell, reason: str | None, started_at: str = "2026-11-24T00:00:00Z"
) -> Path:
    """A cell's run file, 7 s long."""
    info = run_info(cell=cell.name, cell_sha256=cell.sha256, started_at=started_at)
    store = Store(run_path(folder, started_at, "smoke", cell.name), info)
    if reason is not None:
        store.append(RunEnd(at_s=7.0, reason=reason))
    store.close()
    return store.path


# ── what is shown ────────────────────────────────────────────────────────────────────────────────


def row(server: str, load: int, measured: int, speed: float | None = None, **more: Any) -> SweepRow:
    over = OverRepeats() if speed is None else OverRepeats(
        n=measured, median=speed, low=speed - 1, high=speed + 1
    )  # fmt: skip
    return SweepRow(
        server=server, scenario="smoke", load=ClosedLoop(concurrency=load), cells=3,
        measured=measured, output_tokens_per_s=over, **more,
    )  # fmt: skip


def test_the_live_table_fills_in(matrix_file: Path) -> None:
    _, cells = laid_out(matrix_file)
    rows = (row("none", 1, 3, 100.0), row("none", 2, 1, 190.0), row("eagle3", 1, 0),
            row("eagle3", 2, 0, failed=("failed: x",)))  # fmt: skip
    found = SweepResult(name="m", rows=rows, baseline="none", differences={})
    text = [line.plain.split() for line in shown.grid(found, None, 100)]
    assert text[1:] == [["server", "c=1", "c=2"], text[2], ["none", "100", "190"],
                        ["eagle3", "·", "✗"]]  # fmt: skip
    running = [line.plain.split() for line in shown.grid(found, cells[1], 100)]
    assert cells[1].name == "none smoke c=2 r=1"
    assert running[-2:] == [["none", "100", "190…"], ["eagle3", "·", "✗"]]


def test_on_a_terminal_the_table_is_drawn_with_the_cell_under_way(
    matrix_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, cells = laid_out(matrix_file)
    found = SweepResult(name="m", rows=(row("none", 1, 1, 123.0),), baseline=None, differences={})
    scenario = cells[0].scenario
    plan = make_plan(scenario, sets.read(scenario.dataset).prompts)
    sample = ClientSample(
        at_s=1.0, phase="c=1", in_flight=3, target=4, sent=9, chunks=9, tokens=9, loop_lag_s=0.0,
        cpu_s=0.0, rss_bytes=1,
    )  # fmt: skip
    with SweepLive() as live:
        live.show(shown.grid(found, None, live.width), "not on a terminal")
        with live.watch(plan, cells[0].name) as observe:
            observe(sample)
    text = terminal.getvalue()
    assert "123" in text
    assert "none smoke c=1 r=1  c=1: 0 dialogues, 3/4 in flight" in text
    assert "not on a terminal" not in text


def test_the_table_says_what_failed_and_what_else_differs() -> None:
    speeds = OverRepeats(n=3, median=1.5, low=1.25, high=1.75)
    rows = (
        row("none", 1, 3, 100.0),
        row("eagle3", 1, 3, 150.0, speedup_user=speeds, notes=("no steady output: too short.",)),
        row("mtp", 1, 0, failed=("failed: it would not start",)),
    )
    found = SweepResult(
        name="m", rows=rows, baseline="none", differences={"eagle3": ("GPUs: 1 → 2",), "mtp": ()}
    )
    text = shown.render(Study(summaries=(), sweep=found, width=120))
    assert "6 of 9 cells measured; medians over the repeats" in text
    assert "1.50× [1.25, 1.75]" in text
    assert "What else differs between none and eagle3: GPUs: 1 → 2." in text
    assert "✗ mtp c=1: failed: it would not start" in text
    assert "eagle3 c=1: no steady output: too short." in text
    assert text == shown.render(Study(summaries=(), sweep=found, width=120))


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        ([], "nothing is left to measure"),
        ([None, None], "unknown: 2 cells, of which none was measured before"),
        ([30.0, 31.0], "about 61 s for 2 cells by earlier ones like them"),
        ([600.0, None], "about 10 min for 1 cell by earlier ones like them"),
        ([600.0, None], "unknown for 1 cell, never measured"),
        ([5000.0], "about 1 h 23 min"),
    ],
)
def test_the_expected_duration_is_what_earlier_cells_tell(
    expected: list[float | None], said: str
) -> None:
    assert said in shown.duration(expected)


def test_the_ratio_of_a_repeat_is_compares_and_carries_its_caveats() -> None:
    base, quicker = (summary_of(step_s=step_s) for step_s in (0.02, 0.01))
    user, _, said = speedups(base, quicker)
    assert user == pytest.approx(2.0)
    assert any(note.startswith("machine-drifted: Measure again") for note in said)
    other = msgspec.structs.replace(base.info, prompts_sha256="1" * 64)
    user, output, said = speedups(base, msgspec.structs.replace(base, info=other))
    assert (user, output) == (None, None)
    assert "cannot be compared: prompts" in said[0]


def summary_of(*, step_s: float) -> Summary:
    """A run of five dialogues, a token a step."""
    records = [
        record([1] * 11, [i + step_s * n for n in range(12)], dialogue=f"d{i}") for i in range(5)
    ]
    server = msgspec.structs.replace(SERVER, state="off")
    phase = phase_data(records).phase
    run = Run(info=run_info(server=server), records=[*records, phase])
    return summarize(run, ENGINE)


def test_a_matrix_of_which_nothing_is_measured_has_rows_without_figures(matrix_file: Path) -> None:
    matrix, cells = laid_out(matrix_file)
    found = result(matrix.name, cells, {}, {cells[0].name: "failed: x"}, matrix.baseline)
    assert [(r.server, r.cells, r.measured, r.failed) for r in found.rows] == [
        ("none", 2, 0, ("failed: x",)), ("none", 2, 0, ()), ("eagle3", 2, 0, ()),
        ("eagle3", 2, 0, ()),
    ]  # fmt: skip
    assert {r.speedup_user for r in found.rows} == {OverRepeats()}
