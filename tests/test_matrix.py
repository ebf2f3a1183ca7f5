"""A matrix as a user writes it: what it becomes, and what is refused with file and line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.errors import UserError
from loadgen.matrix import cells, config_differences, read
from loadgen.types import Cell, ClosedLoop, Matrix, Sampling, Stop
from loadgen.written import line_of
from scenarios import prompts as sets
from servers import llamacpp, sglang, simulator, trtllm
from servers import openai as generic

ENGINES = {m.ENGINE.name: m.ENGINE for m in (simulator, llamacpp, sglang, trtllm, generic)}
MATRICES = Path(simulator.__file__).parent / "configs" / "matrices"

NONE = """
[[servers]]
config = { engine = "simulated", model = "simulated-8b" }
"""
EAGLE3 = """
[[servers]]
[servers.config]
engine = "simulated"
model = "simulated-8b"
spec = { method = "eagle3", draft_depth = 3 }
"""
URL = """
[[servers]]
name = "live"
url = "http://127.0.0.1:8000"
"""
SMOKE = """
[[scenarios]]
scenario = "smoke"
"""

Wrote = Callable[[str], Path]


@pytest.fixture
def wrote(tmp_path: Path) -> Wrote:
    def write(text: str) -> Path:
        path = tmp_path / "matrix.toml"
        path.write_text(text)
        return path

    return write


def parsed(path: Path, **options: Any) -> Matrix:
    return read(path, sets.scenario, ENGINES, **options)


def laid_out(matrix: Matrix) -> tuple[Cell, ...]:
    return cells(matrix, {s.name: sets.read(s.dataset).prompts for s in matrix.scenarios})


def test_overrides_are_laid_over_the_scenario(wrote: Wrote) -> None:
    found = parsed(
        wrote(
            NONE + EAGLE3 + SMOKE + "name = 'mine'\nconcurrency = [1, 4, 1]\nrequests = 9\n"
            "duration_s = 5.0\nmax_output_tokens = 7\ntemperature = 0.5\nseed = 3\n"
            "warmup_requests = 0\ncategories = ['coding']\nlimit = 4\nignore_eos = true\n"
        )
    )
    (scenario,) = found.scenarios
    assert scenario.name == "mine"
    assert scenario.loads == (ClosedLoop(concurrency=1), ClosedLoop(concurrency=4))
    assert scenario.stop == Stop(requests=9, duration_s=5.0)
    assert scenario.sampling == Sampling(
        max_output_tokens=7, temperature=0.5, seed=3, ignore_eos=True
    )
    assert scenario.warmup_requests == 0
    assert (scenario.dataset.categories, scenario.dataset.limit) == (("coding",), 4)
    assert (found.name, found.repeats, found.baseline) == ("matrix", 3, "none")
    assert [server.name for server in found.servers] == ["none", "eagle3"]


def test_paths_are_seen_from_the_matrix(tmp_path: Path, wrote: Wrote) -> None:
    (tmp_path / "server.toml").write_text('engine = "simulated"\nmodel = "simulated-8b"\n')
    (tmp_path / "mine.toml").write_text('name = "mine"\n')
    (tmp_path / "mine.jsonl").write_text('{"id": "a", "category": "coding", "prompt": "hello"}\n')
    text = "[[servers]]\nfile = 'server.toml'\n[[scenarios]]\nscenario = './mine.toml'\n"
    found = parsed(wrote(text + "dataset = 'mine.jsonl'\n"))
    assert found.servers[0].config is not None
    assert [cell.name for cell in laid_out(found)] == [f"none mine c=1 r={r}" for r in (1, 2, 3)]


# ── the baseline ─────────────────────────────────────────────────────────────────────────────────


def test_a_matrix_without_a_baseline_gets_one(wrote: Wrote) -> None:
    found = parsed(wrote(EAGLE3 + SMOKE))
    base, spec = found.servers
    assert (base.name, found.baseline) == ("none", "none")
    assert base.config is not None
    assert spec.config is not None
    assert base.config == msgspec.structs.replace(spec.config, spec=None)


@pytest.mark.parametrize(
    ("asked", "baseline", "servers"),
    [("false", None, ["eagle3"]), ("'eagle3'", "eagle3", ["eagle3"])],
)
def test_a_baseline_is_refused_or_named(
    wrote: Wrote, asked: str, baseline: str | None, servers: list[str]
) -> None:
    found = parsed(wrote(f"baseline = {asked}\n" + EAGLE3 + SMOKE))
    assert found.baseline == baseline
    assert [server.name for server in found.servers] == servers


def test_what_else_differs_from_the_baseline_is_told_without_secrets(wrote: Wrote) -> None:
    more = "max_running = 8\nextra_args = ['--api-key', 'sk-1']\nenv = { HF_TOKEN = 'hf-1' }\n"
    base, spec = parsed(wrote(NONE + EAGLE3 + more + SMOKE)).servers
    told = config_differences(base, spec)
    assert told == (
        "max running: – → 8", "extra args: – → --api-key ***", "env: – → HF_TOKEN=***",
    )  # fmt: skip
    assert config_differences(base, base) == ()


def test_a_drafter_that_remembers_gets_a_fresh_server(wrote: Wrote) -> None:
    text = (
        '[[servers]]\nname = "%s"\nconfig = { engine = "llamacpp", model = "m.gguf", spec = %s }\n'
    )
    forgets = text % ("forgets", '{ method = "ngram", draft_depth = 3, options = { size_n = 3 } }')
    learns = text % ("learns", '{ method = "ngram-cache" }')
    found = parsed(wrote(forgets + learns + SMOKE))
    assert {s.name: s.fresh for s in found.servers} == {
        "none": False, "forgets": False, "learns": True,
    }  # fmt: skip


# ── cells ────────────────────────────────────────────────────────────────────────────────────────


@given(
    loads=st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True),
    repeats=st.integers(1, 4),
)
def test_repeats_go_round_all_servers_and_loads_turn_round(
    tmp_path_factory: pytest.TempPathFactory, loads: list[int], repeats: int
) -> None:
    path = tmp_path_factory.mktemp("m") / "m.toml"
    path.write_text(NONE + EAGLE3 + SMOKE + f"concurrency = {loads}\n")
    found = laid_out(parsed(path, repeats=repeats))
    expected = [
        f"{server} smoke c={load} r={repeat + 1}"
        for repeat in range(repeats)
        for server in ("none", "eagle3")
        for load in (loads[::-1] if repeat % 2 else loads)
    ]
    assert [cell.name for cell in found] == expected
    assert all(len(cell.scenario.loads) == 1 for cell in found)
    assert set(Counter(cell.sha256 for cell in found).values()) == {repeats}


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (("draft_depth = 3", "draft_depth = 4"), False),
        (('scenario = "smoke"', 'scenario = "smoke"\nmax_output_tokens = 9'), False),
        (('scenario = "smoke"', 'scenario = "smoke"\nlimit = 3'), False),
        (("[[servers]]", "# a remark\n[[servers]]"), True),
        (('model = "simulated-8b"', 'model = "simulated-8b"\nname = "eagle3"'), True),
        (("[[servers]]", 'repeats = 5\n[[servers]]'), True),
    ],
)  # fmt: skip
def test_a_cell_is_another_where_what_it_measures_is(
    wrote: Wrote, change: tuple[str, str], same: bool
) -> None:
    text = "baseline = false\n" + EAGLE3 + SMOKE
    before, after = (laid_out(parsed(wrote(t)))[0] for t in (text, text.replace(*change)))
    assert (before.sha256 == after.sha256) is same


def test_prompts_of_another_text_make_another_cell(wrote: Wrote) -> None:
    matrix = parsed(wrote(NONE + SMOKE))
    asked = sets.read(matrix.scenarios[0].dataset).prompts
    before, after = (cells(matrix, {"smoke": some})[0] for some in (asked, asked[::-1]))
    assert before.sha256 != after.sha256


def test_too_few_prompts_for_a_drafter_that_remembers_are_refused_ahead(wrote: Wrote) -> None:
    text = '[[servers]]\nconfig = { engine = "llamacpp", model = "m", spec = { method = %s } }\n'
    text %= '"ngram-cache"'
    matrix = parsed(wrote(text + SMOKE + "concurrency = [8]\n"))
    with pytest.raises(UserError, match="ngram-cache, c=8: 32 dialogues at c=8 need"):
        laid_out(matrix)


# ── bad input ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", 1, "the sweep is empty: no servers. Expected at least one [[servers]]"),
        (NONE, 1, "the sweep is empty: no scenarios"),
        ("servers = []\n" + SMOKE, 1, "no servers"),
        (NONE + SMOKE + "concurrency = []\n", 7, "the sweep is empty: no load"),
        (NONE + SMOKE + "loads = []\n", 7, "the sweep is empty: no load"),
        (NONE + SMOKE + "concurrency = [0]\n", 7, "Expected `int` >= 1"),
        (NONE + SMOKE + "concurency = [1]\n", 7, "unknown key 'concurency'"),
        (NONE + SMOKE + "concurency = [1]\n", 7, "did you mean 'concurrency'?"),
        ("repeat = 2\n" + NONE + SMOKE, 1, "unknown key 'repeat'; did you mean 'repeats'?"),
        ("repeats = 0\n" + NONE + SMOKE, 1, "Expected `int` >= 1"),
        (NONE + EAGLE3 + "modle = 1\n" + SMOKE, 10, "unknown key 'modle' in [servers[1].config]"),
        (NONE + EAGLE3.replace("draft_depth", "depth") + SMOKE, 9, "unknown key 'depth'"),
        (NONE + EAGLE3.replace("eagle3", "eagle4") + SMOKE, 6, "did you mean 'eagle3'"),
        (NONE.replace("simulated-8b", "simulated-9b") + SMOKE, 3, "no model 'simulated-9b'"),
        (NONE.replace('"simulated"', '"simulate"') + SMOKE, 3, "unknown engine 'simulate'"),
        (NONE.replace('"simulated"', '"openai"') + SMOKE, 3, "cannot be started"),
        (NONE + "url = 'http://x'\n" + SMOKE, 3, "a server has url and config. Expected one"),
        ("[[servers]]\nname = 'a'\n" + SMOKE, 1, "none of url, file and config"),
        (URL.replace('name = "live"\n', "") + SMOKE, 3, "has no name. Expected name ="),
        (NONE + "gpus = 2\n" + SMOKE, 4, "'gpus' is for a server with a url"),
        ("[[servers]]\nfile = 'none.toml'\n" + SMOKE, 2, "there is no file none.toml"),
        (NONE + SMOKE.replace("smoke", "smok"), 6, "did you mean 'smoke'"),
        (NONE + SMOKE.replace("smoke", "none.toml"), 6, "none.toml: No such file"),
        (NONE + SMOKE + "dataset = 'none.jsonl'\n", 7, "there is no file none.jsonl"),
        (NONE + SMOKE + "concurrency = [1]\nloads = []\n", 8, "both given"),
        (NONE + NONE + SMOKE, 5, "2 servers are called 'none'"),
        (NONE + SMOKE + SMOKE, 8, "2 scenarios are called 'smoke'"),
        ("baseline = 'non'\n" + NONE + SMOKE, 1, "'non' is no server of this matrix; did you mean"),
        (URL + SMOKE, 2, "which server is the baseline"),
        ("\nbaseline = true\n" + URL + SMOKE, 2, "no server known to be without"),
        (NONE + "name = 'a'\n" + NONE + SMOKE, 2, "2 servers without [spec]"),
        (NONE + "name = ''\n" + SMOKE, 4, "Expected `str` matching regex"),
    ],
)  # fmt: skip
def test_bad_input_names_file_line_and_what_was_expected(
    wrote: Wrote, text: str, line: int, said: str
) -> None:
    path = wrote(text)
    with pytest.raises(UserError) as fault:
        parsed(path)
    assert str(fault.value).startswith(f"{path}, line {line}: ")
    assert said in str(fault.value)


def test_a_fault_in_a_file_that_is_pointed_to_names_that_file(tmp_path: Path, wrote: Wrote) -> None:
    (tmp_path / "server.toml").write_text('engine = "simulated"\n\nmodle = "simulated-8b"\n')
    with pytest.raises(UserError, match=r"server\.toml, line 3: unknown key 'modle'"):
        parsed(wrote("[[servers]]\nfile = 'server.toml'\n" + SMOKE))


@pytest.mark.parametrize("text", ["[[servers]", "a = 1\na = 2\n", "\x00"])
def test_what_is_no_toml_is_refused(wrote: Wrote, text: str) -> None:
    with pytest.raises(UserError, match="is not valid TOML"):
        parsed(wrote(text))


def test_no_such_matrix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.toml"):
        parsed(tmp_path / "none.toml")


@given(st.text(), st.text(), st.text())
def test_a_line_is_always_one_of_the_text(text: str, place: str, key: str) -> None:
    assert 1 <= line_of(text, place, key) <= max(len(text.splitlines()), 1)


@pytest.mark.parametrize("path", sorted(MATRICES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_matrices_that_come_along_are_valid(path: Path) -> None:
    found = parsed(path)
    assert found.baseline == "none"
    assert len(laid_out(found)) == found.repeats * len(found.servers) * sum(
        len(s.loads) for s in found.scenarios
    )
