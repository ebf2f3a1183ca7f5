"""Do a sweep's intervals hold the truth, and do its crossovers lie between the right loads?

    .venv/bin/python -m benchmarks.decide --out /tmp/decide

Runs `draftload sweep` over servers/configs/matrices/simulator-70b.toml (84 cells), which takes
minutes, and says how long it took. Then every cell's 95 % interval is held against the truth: the
same prompts in the same order through the simulated engine in its own time, without run-level
noise, network, client or a machine that is late. `--out` of a finished sweep is only judged.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from time import perf_counter

from loadgen.breakeven import break_even, crossings
from loadgen.compare import compare
from loadgen.sides import joined, swept
from loadgen.store import read
from loadgen.summarize import summarize
from loadgen.types import (
    BreakEven,
    BreakEvenRow,
    ClosedLoop,
    Crossing,
    PhaseRecord,
    RequestRecord,
    ServerConfig,
    Speedup,
    Summary,
)
from loadgen.written import load_label
from scenarios.builtin import read as builtin
from servers import simulator
from servers.simulated import Batch, Settings
from tests.played import Played, as_sent, play

MATRIX = Path(__file__).parents[1] / "servers" / "configs" / "matrices" / "simulator-70b.toml"
APART_S = 0.001  # runner.RAMP_S: streams join one after the other
# From the end of an answer to the stream's next request at the server. That a step has begun by
# then matters (5 % of user speed at 128 streams); how long it takes, from 0.3 to 1 ms, does not.
TURN_S = 0.0003


# ── the truth ────────────────────────────────────────────────────────────────────────────────────


Truth = tuple[Played, tuple[str, ...]]


@cache
def truth(path: Path) -> Truth:
    """A cell's requests played in the simulator's own time, and their categories."""
    run = read(path)
    records = list(run.records)
    measured = {r.name for r in records if isinstance(r, PhaseRecord) and r.measured}
    requests = [r for r in records if isinstance(r, RequestRecord) and r.phase in measured]
    requests.sort(key=lambda r: r.sent_s)
    (load,), config = run.info.scenario.loads, run.info.server.config
    assert isinstance(load, ClosedLoop)
    assert config is not None
    texts = {p.prompt_id: p.messages[0].content for p in builtin("qualitative")}
    played = play(
        Batch(_noiseless(config)),
        [as_sent(texts[r.prompt_id]) for r in requests],
        load.concurrency,
        limit=run.info.scenario.sampling.max_output_tokens,
        apart_s=APART_S,
        turn_s=TURN_S,
    )
    return played, tuple(r.category for r in requests)


def _noiseless(config: ServerConfig) -> Settings:
    argv = simulator.command(config, 1)
    return simulator.parsed([*argv[argv.index("--port") :], "--noise", "0"])[2]


def user_speed(played: Played, categories: Sequence[str], only: str) -> float:
    """Decode tokens a second of decode time, of one category's requests or of "all"."""
    pairs = zip(played.answers, categories, strict=True)
    kept = [a for a, category in pairs if only in ("all", category)]
    return sum(a.sent - 1 for a in kept) / sum(a.last_at - a.first_at for a in kept)


# ── judging ──────────────────────────────────────────────────────────────────────────────────────

Files = Mapping[str, Sequence[tuple[Path, Path]]]
"""Load → of each repeat the run files without speculation and with it."""


def paired(base: Sequence[Summary], spec: Sequence[Summary], file_of: Mapping[str, Path]) -> Files:
    found: dict[str, list[tuple[Path, Path]]] = {}
    for b, s in product(base, spec):
        (one,), (other,) = b.phases, s.phases
        if (one.load, one.repeat) == (other.load, other.repeat):
            pair = (file_of[b.info.run_id], file_of[s.info.run_id])
            found.setdefault(load_label(one.load), []).append(pair)
    return found


def true_ratio(files: Sequence[tuple[Path, Path]], row: BreakEvenRow) -> float:
    """The geometric mean over the repeats, as an interval's is."""
    return geometric_mean(_ratio(truth(base), truth(spec), row) for base, spec in files)


def _ratio(base: Truth, spec: Truth, row: BreakEvenRow) -> float:
    if row.figure == "speedup_throughput":
        return spec[0].steady() / base[0].steady()
    return user_speed(*spec, row.name) / user_speed(*base, row.name)


def holds(cell: Speedup | None, true: float) -> bool:
    """Does the cell's interval hold the truth?"""
    limits = cell.interval if cell is not None else None
    return limits is not None and limits.low <= true <= limits.high


def same(found: Sequence[Crossing], true: Sequence[Crossing]) -> bool:
    """Between the same measured loads, in the same direction."""
    return [(c.low, c.high, c.falls) for c in found] == [(c.low, c.high, c.falls) for c in true]


def report(out: Path) -> int:
    """Prints a line a cell of all prompts, then the counts; how many cells were judged."""
    files = sorted(out.glob("*.jsonl"))
    runs = [summarize(read(file), simulator.ENGINE) for file in files]
    file_of = {run.info.run_id: file for run, file in zip(runs, files, strict=True)}
    held: dict[str, list[bool]] = {}
    crossed: list[bool] = []
    for base, spec in swept(runs):
        sides = paired(base, spec, file_of)
        found = break_even(compare(joined(base), joined(spec)))
        config = spec[0].info.server.config
        method = config.spec.method if config is not None and config.spec is not None else "?"
        for row in found.rows:
            true = [true_ratio(sides[load_label(load)], row) for load in found.loads]
            of = "categories: user speed"
            if row.name == "all":
                of = f"all prompts: {row.figure}"
                _print_row(method, row, true, found)
                told = [Speedup(ratio=ratio, pairs=1) for ratio in true]
                crossed.append(same(row.crossings, crossings(found.loads, told)))
            held.setdefault(of, []).extend(map(holds, row.cells, true))
    for of, cells in held.items():
        share = sum(cells) / len(cells)
        print(f"{of}: {sum(cells)} of {len(cells)} intervals hold the truth ({share:.1%})")
    print(f"crossovers between the right loads in {sum(crossed)} of {len(crossed)} rows")
    return sum(map(len, held.values()))


def _print_row(method: str, row: BreakEvenRow, true: Sequence[float], found: BreakEven) -> None:
    for load, cell, ratio in zip(found.loads, row.cells, true, strict=True):
        limits = cell.interval if cell is not None else None
        if cell is None or limits is None:
            print(f"{method:7} {row.figure:18} {load_label(load):>6} –      true {ratio:.3f}")
            continue
        print(
            f"{method:7} {row.figure:18} {load_label(load):>6} {cell.ratio:.3f} "
            f"[{limits.low:.3f}, {limits.high:.3f}]  true {ratio:.3f}"
            + ("" if holds(cell, ratio) else "  not held")
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run files")
    out: Path = parser.parse_args().out
    began = perf_counter()
    command = [sys.executable, "-m", "loadgen.cli", "sweep", str(MATRIX), "--out", str(out)]
    subprocess.run(command, check=True)
    print(f"the sweep took {perf_counter() - began:.0f} s")
    report(out)


if __name__ == "__main__":
    main()
