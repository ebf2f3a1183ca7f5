"""The command as a user runs it: exit codes, one-paragraph errors, what lands where."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from loadgen.cli import (
    _changed,
    _headers,
    _length,
    _loads,
    _open_loads,
    _seconds,
    _template_args,
    _templated,
    app,
)
from loadgen.errors import UserError
from loadgen.types import ClosedLoop, OpenLoop, Scenario, Templating
from tests.conftest import Truth
from tests.test_throughput import tokenizer

ROOT = Path(__file__).parents[1]


def draftload(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "loadgen.cli", *words],
        cwd=cwd,
        env=environment() | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("OPENAI_API_KEY", "COLUMNS")}
    return kept | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """Prompts as token ids: no tokenizer is needed."""
    rows = [
        {"id": f"p{i}", "category": ("coding", "math")[i % 2],
         "prompt_token_ids": list(range(10 + i, 40 + i))}
        for i in range(10)
    ]  # fmt: skip
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def measured(url: str, asked: Path, *more: str) -> list[str]:
    return [
        "run", "--url", url, "--dataset", str(asked), "--max-output-tokens", "30", *more,
    ]  # fmt: skip


def test_alone_it_shows_three_lines_that_get_one_going(tmp_path: Path) -> None:
    done = draftload(cwd=tmp_path)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 3
    assert "draftload demo" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "run",
        "sweep",
        "report",
        "compare",
        "advise",
        "capacity",
        "serve",
        "monitor",
        "check",
    ],
)
def test_every_help_has_an_example(tmp_path: Path, command: str) -> None:
    done = draftload(command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "Example" in done.stdout


@pytest.mark.parametrize("command", ["engines", "scenarios"])
def test_lists(tmp_path: Path, command: str) -> None:
    done = draftload(command, cwd=tmp_path)
    assert done.returncode == 0
    assert {"engines": "vllm", "scenarios": "smoke"}[command] in done.stdout


def test_a_run_from_url_to_report(truth: Truth, asked: Path, tmp_path: Path) -> None:
    url = truth(5, 2, 3)
    done = draftload(*measured(url, asked, "-c", "1,4", "--format", "json"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [p["load"]["concurrency"] for p in report["phases"]] == [1, 4]
    assert [p["requests"]["completed"] for p in report["phases"]] == [10, 16]
    assert report["run"]["server"]["engine"] == "vllm"
    chunks = [a for a in report["phases"][0]["acceptance"] if a["source"] == "chunks"]
    assert chunks[0]["acceptance_length"] == 3.0
    (run_file,) = (tmp_path / "runs").glob("*.jsonl")
    again = [draftload("report", str(run_file), cwd=tmp_path).stdout for _ in range(2)]
    assert again[0] == again[1]
    assert again[0]
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(run_file.read_bytes()[:-20])
    done = draftload("report", str(torn), cwd=tmp_path)
    assert done.returncode == 0
    assert "could not be read" in done.stdout
    same = draftload("compare", str(run_file), str(run_file), cwd=tmp_path)
    assert same.returncode == 0
    assert "1.00×" in same.stdout


HOSTILE = "x\x1b]8;;http://evil\x07link\x1b]8;;\x07\x1b[2J\r\u202e\u2066\x9b31m"


def test_no_text_from_outside_reaches_the_terminal_as_control(truth: Truth, tmp_path: Path) -> None:
    """Names and categories of a dataset; what servers say has tests of its own."""
    rows = [
        {"id": f"{HOSTILE}{n}", "category": HOSTILE, "prompt_token_ids": list(range(10 + n, 40))}
        for n in range(8)
    ]
    hostile = tmp_path / "hostile.jsonl"
    hostile.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = draftload(*measured(truth(5, 2, 3), hostile), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run_file,) = (tmp_path / "runs").glob("*.jsonl")
    words = ["report", str(run_file)]
    more = [draftload(*words, *m, cwd=tmp_path) for m in ((), ("--format", "json"), ("--paste",))]
    file = str(run_file)
    more += [draftload("compare", file, file, *m, cwd=tmp_path) for m in ((), ("--map",))]
    more.append(draftload("compare", file, file, "--format", "markdown", cwd=tmp_path))
    for one in (done, *more):
        assert one.returncode == 0, one.stderr
        said = one.stdout + one.stderr
        assert {c for c in said if not c.isprintable()} <= {"\n"}
    assert "\nSuccessful requests:                     " in more[2].stdout
    assert "x\\x1b]8;;http://evil" in done.stdout


def test_runs_are_compared_mapped_and_held_against_bounds(
    truth: Truth, asked: Path, tmp_path: Path
) -> None:
    url = truth(5, 2, 3)
    done = draftload(*measured(url, asked, "-c", "1,4", "--repeat", "3"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run_file,) = (tmp_path / "runs").glob("*.jsonl")
    twice = [str(run_file), str(run_file)]
    page = draftload("compare", *twice, cwd=tmp_path)
    assert page.returncode == 0, page.stderr
    assert "3 repeats; shows no difference at c=1 and c=4" in " ".join(page.stdout.split())
    mapped = draftload("compare", *twice, "--map", "--format", "json", cwd=tmp_path)
    rows = json.loads(mapped.stdout)["break_even"]["rows"]
    assert {c["mark"] for row in rows for c in row["cells"]} == {"no difference"}
    held = draftload("compare", *twice, "--fail-if", "speedup_user<1", cwd=tmp_path)
    assert (held.returncode, held.stderr) == (0, "")
    bounds = ("--fail-if", "speedup_user<1.1@c=4", "--junit", "out.xml", "--format", "markdown")
    failed = draftload("compare", *twice, *bounds, cwd=tmp_path)
    assert failed.returncode == 3
    assert "| crossed |" in failed.stdout
    assert "draftload: crossed: speedup_user<1.1@c=4 at c=4 of " in failed.stderr
    assert failed.stderr.endswith(": 1.00\n")
    assert 'failures="1"' in (tmp_path / "out.xml").read_text()
    alone = draftload("compare", str(run_file), cwd=tmp_path)
    assert alone.returncode == 2
    assert "nothing to compare it with" in alone.stderr
    folder = draftload("compare", "runs", cwd=tmp_path)
    assert folder.returncode == 2
    assert "no baseline and a config to compare it with" in folder.stderr


def test_nothing_secret_is_left_behind(truth: Truth, asked: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sk-filesecret\n")
    url = truth(5, 1, 3)
    words = measured(url, asked, "--api-key-file", str(key), "--header", "X-Team: headersecret")
    done = draftload(*words, cwd=tmp_path, OPENAI_API_KEY="sk-envsecret")
    assert done.returncode == 0, done.stderr
    with_password = url.replace("http://", "http://me:urlsecret@")
    more = draftload(*measured(with_password, asked), cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    both = draftload(*words, "--url", with_password, cwd=tmp_path)
    assert both.returncode == 2
    assert "Expected one of them" in both.stderr
    left = both.stdout + both.stderr + more.stdout + more.stderr
    left += done.stdout + done.stderr
    left += "".join(p.read_text() for p in (tmp_path / "runs").glob("*"))
    assert "secret" not in left
    assert str(tmp_path) not in "".join(p.read_text() for p in (tmp_path / "runs").glob("*"))


def test_a_printed_command_shows_no_secret_and_can_be_pasted(tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_text(
        'engine = "vllm"\nmodel = "m"\nextra_args = ["--api-key", "sk-argument"]\n'
        'env = { HF_TOKEN = "hf-secret", HF_HOME = "/a b" }\n'
    )
    done = draftload("serve", str(path), "--print", cwd=tmp_path)
    assert done.returncode == 0
    assert "secret" not in done.stdout
    assert "sk-argument" not in done.stdout
    assert done.stdout.startswith("HF_TOKEN=\"$HF_TOKEN\" HF_HOME='/a b' vllm serve m ")
    assert "--api-key '***'" in done.stdout
    assert "put it in" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run"], "give either --url of a running server or --server"),
        (["run", "--url", "x", "--server", "y.toml"], "give either --url"),
        (["run", "--url", "http://127.0.0.1:1"], "no server answers at http://127.0.0.1:1"),
        (["run", "--url", "ftp://x"], "no server's URL"),
        (["run", "--url", "x", "-c", "0"], "-c 0 is no load"),
        (["run", "--url", "x", "-c", "1,two"], "is no load"),
        (["run", "--url", "x", "--scenario", "smok"], "did you mean 'smoke'"),
        (["run", "--url", "x", "--category", "codng"], "did you mean 'coding'"),
        (["run", "--url", "x", "--dataset", "none.jsonl"], "cannot read none.jsonl"),
        (["run", "--url", "x", "--duration", "soon"], "is no duration"),
        (["run", "--url", "x", "--isl", "1k"], "have lengths of their own"),
        (["run", "--url", "x", "--scenario", "throughput", "--isl", "1kk"], "is no length"),
        (["run", "--url", "x", "--scenario", "throughput", "--category", "mixd"], "'mixed'"),
        (["datasets", "show", "warmup", "--tokenizer", "t"], "have lengths of their own"),
        (["datasets", "show", "throughput"], "made for a tokenizer"),
        (["datasets", "show", "qualitative", "--category", "rga"], "did you mean 'rag'"),
        (["datasets", "diversity", "random_control"], "no texts until a tokenizer makes it"),
        (["run", "--url", "x", "--requests", "0"], "--requests 0 makes no sense"),
        (["run", "--url", "x", "--api", "chatt"], "did you mean 'chat'"),
        (["run", "--url", "x", "--format", "yaml"], "unknown format 'yaml'"),
        (["run", "--url", "x", "--save-prompts", "--no-text"], "contradict each other"),
        (["run", "--url", "x", "--template-args", "a"], "not of the form KEY=VALUE"),
        (["run", "--url", "x", "--template-args", "a=False"], "the value is no JSON"),
        (["run", "--url", "x", "--template-args", "a=1", "--no-template"], "contradict each other"),
        (["run", "--url", "x", "--history", "none"], "Expected full or answer"),
        (["run", "--url", "x", "--header", "nocolon"], "not of the form"),
        (["run", "--url", "x", "--api-key-file", "none"], "cannot read the API key file"),
        (["run", "--server", "none.toml"], "cannot read none.toml"),
        (["run", "--url", "x", "--ca-file", "none"], "cannot use the TLS files none"),
        (["run", "--url", "x", "--client-key", "none"], "without --client-cert"),
        (["report", "none.jsonl"], "cannot read none.jsonl"),
        (["report", "none.jsonl", "--paste", "--format", "json"], "exclude each other"),
        (["run", "--url", "x", "--paste", "--format", "json"], "exclude each other"),
        (["compare", "none.jsonl", "none.jsonl"], "cannot read none.jsonl"),
        (["compare", "a", "b", "--fail-if", "speedup_usr<1"], "did you mean 'speedup_user'"),
        (["compare", "a", "b", "--junit", "x.xml"], "nothing to write without --fail-if"),
        (["compare", "a", "b", "--map", "--by", "teir"], "did you mean 'tier'"),
        (["compare", "a", "b", "--format", "html"], "Expected table, json or markdown"),
        (["serve", "none.toml"], "cannot read none.toml"),
        (["check", "--url", "http://127.0.0.1:1"], "no server answers"),
        (["demo", "--model-file", "none.gguf"], "no model at none.gguf"),
    ],
)
def test_bad_input_is_one_paragraph_and_exit_code_2(
    tmp_path: Path, words: list[str], said: str
) -> None:
    done = draftload(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists(), "nothing was measured"


def test_a_folder_that_cannot_be_written(truth: Truth, asked: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = draftload(*measured(truth(5, 1, 3), asked, "--out", "file/runs"), cwd=tmp_path)
    assert done.returncode == 2
    assert "--out DIR" in done.stderr


def test_a_run_whose_requests_all_fail_is_exit_code_1(
    truth: Truth, asked: Path, tmp_path: Path
) -> None:
    words = measured(
        truth(1000, 1, 1), asked, "--timeout", "20ms", "--no-preflight", "--warmup", "0"
    )
    done = draftload(*words, cwd=tmp_path)
    assert done.returncode == 1
    assert "timed out after 0.02 s" in done.stdout


def test_ctrl_c_reports_what_was_measured(truth: Truth, asked: Path, tmp_path: Path) -> None:
    url = truth(5, 5, 1)
    words = measured(url, asked, "-c", "2", "--duration", "100s", "--warmup", "0")
    process = subprocess.Popen(
        [sys.executable, "-m", "loadgen.cli", *words],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    runs = tmp_path / "runs"
    while not any(b'"type":"request"' in p.read_bytes() for p in runs.glob("*.jsonl")):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in out
    (run_file,) = runs.glob("*.jsonl")
    last = msgspec.json.decode(run_file.read_bytes().splitlines()[-1])
    assert last["type"] == "end"
    assert last["reason"] == "interrupted"


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, contextlib, io\nsys.argv = ['draftload', '--help']\n"
        "from loadgen.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main()\n"
        "print([m for m in ('transformers', 'numpy', 'openai', 'aiohttp') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True,
        text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


# ── flags → values ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("500ms", 0.5), ("60s", 60), ("2m", 120), ("1h", 3600)]
)
def test_durations(text: str, seconds: float) -> None:
    assert _seconds("--x", text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1s", "0", "inf", "nan", "1d", "1 0"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UserError):
        _seconds("--x", text)


@pytest.mark.parametrize(
    ("text", "tokens"), [("1k", 1000), ("32K", 32000), ("1500", 1500), (None, None)]
)
def test_lengths_in_tokens(text: str | None, tokens: int | None) -> None:
    assert _length(text) == tokens


def test_samples_of_a_set_are_shown_decoded(tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="transformers needs it to render a chat template")
    made = tokenizer()
    made.save(str(tmp_path / "tokenizer.json"))
    template = "{{ '<|user|>' + messages[0]['content'] + '<|end|><|assistant|>' }}"
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    for name, sample in (("throughput", "1k-low_entropy-000"), ("random_control", "consecutive")):
        done = draftload(
            "datasets", "show", name, "--tokenizer", str(tmp_path), "--limit", "4",
            cwd=tmp_path, PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path]),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert sample in done.stdout
        assert done.stdout.count("1,000 tokens") == 4
        assert "4 prompts of " in done.stderr
        assert "<|user|>" in done.stdout
        assert done.stdout.count("⋮") == 4


def test_loads_lose_their_doubles() -> None:
    assert _loads("8,1, 8") == (ClosedLoop(concurrency=8), ClosedLoop(concurrency=1))
    assert _loads(None) is None


def test_rates_are_open_loops() -> None:
    two = _open_loads("8, 0.5,8", None, None, None, None)
    assert two == (OpenLoop(request_rate_rps=8), OpenLoop(request_rate_rps=0.5))
    shaped = _open_loads("1", None, 0.5, 64, None)
    assert shaped == (
        OpenLoop(request_rate_rps=1, arrivals="gamma", burstiness=0.5, max_in_flight=64),
    )
    assert _open_loads(None, None, None, None, "8") is None
    scenario = Scenario(name="s", loads=(ClosedLoop(concurrency=3),))
    changed = _changed(scenario, open_loads=two, ramp="30s")
    assert (changed.loads, changed.stop.ramp_s) == (two, 30.0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rate", "4", "-c", "8"], "-c 8 and --rate 4 exclude each other"),
        (["--rate", "0"], "--rate 0 makes no sense"),
        (["--rate", "nan"], "--rate nan makes no sense"),
        (["--rate", "fast"], "--rate fast is no rate"),
        (["--rate", ","], "--rate , is no rate"),
        (["--rate", "4", "--arrivals", "poison"], "did you mean 'poisson'?"),
        (["--rate", "4", "--burstiness", "0"], "--burstiness 0.0 makes no sense"),
        (["--rate", "4", "--arrivals", "constant", "--burstiness", "2"], "only gamma arrivals"),
        (["--rate", "4", "--max-in-flight", "0"], "--max-in-flight 0 makes no sense"),
        (["--arrivals", "gamma"], "--arrivals is of an open loop"),
        (["--ramp", "soon"], "--ramp soon is no duration"),
    ],
)
def test_loads_that_make_no_sense_are_refused_before_anything(
    flags: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        app(["run", "--url", "http://127.0.0.1:1", *flags], standalone_mode=False)


def test_an_open_loop_from_flags_to_report(truth: Truth, asked: Path, tmp_path: Path) -> None:
    words = measured(truth(5, 1, 3), asked, "--rate", "50,100", "--arrivals", "constant",
                     "--max-in-flight", "8", "--format", "json", "--warmup", "1")  # fmt: skip
    done = draftload(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    phases = json.loads(done.stdout)["phases"]
    assert [p["load"]["request_rate_rps"] for p in phases] == [50.0, 100.0]
    assert [p["name"] for p in phases] == ["rate=50", "rate=100"]
    assert [p["send_delay_s"]["n"] for p in phases] == [10, 10]


def test_flags_change_only_what_they_say(tmp_path: Path) -> None:
    scenario = Scenario(name="s", loads=(ClosedLoop(concurrency=3),))
    assert _changed(scenario) == scenario
    changed = _changed(
        scenario, concurrency="1,2", temperature=0.5, ignore_eos=True, duration="5s", warmup=0,
        dataset=tmp_path / "x.jsonl", categories=("a",), limit=2,
    )  # fmt: skip
    assert changed.loads == (ClosedLoop(concurrency=1), ClosedLoop(concurrency=2))
    assert (changed.sampling.temperature, changed.sampling.ignore_eos) == (0.5, True)
    assert changed.sampling.max_output_tokens == scenario.sampling.max_output_tokens
    assert (changed.stop.duration_s, changed.warmup_requests) == (5.0, 0)
    assert (changed.dataset.kind, changed.dataset.categories, changed.dataset.limit) == (
        "jsonl", ("a",), 2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("x=false", False),
        ("x=3", 3),
        ('x={"a":[1]}', {"a": [1]}),
        ("x=low", "low"),
        ('x="two words"', "two words"),
        ('x="a=b"', "a=b"),
        ("x=null", None),
    ],
)
def test_template_arguments(word: str, value: object) -> None:
    assert _template_args(["y=1", word]) == {"y": 1, "x": value}


@pytest.mark.parametrize(
    "word",
    ["x", "=1", "x=", "x=True", "x=NONE", "x=yes", "x=two words", "x={", "a-b=1", "x=\ud800"],
)
def test_what_is_no_template_argument(word: str) -> None:
    with pytest.raises(UserError, match="--template-args"):
        _template_args([word])


def test_templating_flags_go_over_the_scenarios() -> None:
    given = Templating(args={"a": 1, "b": 1}, history="answer")
    scenario = Scenario(name="s", templating=given)
    assert _templated(scenario, None, False, None) == scenario
    changed = _templated(scenario, ["b=2"], False, "full").templating
    assert changed == Templating(args={"a": 1, "b": 2}, history="full")


def test_a_given_authorization_wins_over_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert _headers(None, None) == {"Authorization": "Bearer k"}
    assert _headers(["authorization: Basic x"], None) == {"authorization": "Basic x"}
