"""servers/configs: every engine and method has one, and each prints the command that it should.

tests/data/commands.txt holds what `draftload serve F.toml --print` shows for every file; each line
was checked by hand against the engines' own flags. DRAFTLOAD_GOLDEN=1 stores them anew.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from loadgen.types import FILES, Engine, ServerConfig
from loadgen.written import read_toml
from servers import launch, llamacpp, sglang, simulator, trtllm, vllm

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "servers" / "configs").glob("*.toml"))
ENGINES: dict[str, Engine] = {
    module.ENGINE.name: module.ENGINE for module in (llamacpp, sglang, simulator, trtllm, vllm)
}
GOLDEN = Path(__file__).parent / "data" / "commands.txt"


def made(path: Path) -> tuple[ServerConfig, list[str], str]:
    """The config, its argv, and what `serve --print` shows."""
    config = read_toml(path, ServerConfig)
    engine = ENGINES[config.engine]
    assert engine.command is not None
    argv = engine.command(config, config.port or 8000)
    return config, argv, launch.shell(argv, engine.files(config), config)


def printed() -> str:
    shown = (f"# {path.name}\n{made(path)[2]}\n" for path in CONFIGS)
    return "\n".join(shown).replace(shlex.quote(sys.executable), "python")


def test_every_config_prints_the_command_that_was_checked_by_hand() -> None:
    if os.environ.get("DRAFTLOAD_GOLDEN"):
        GOLDEN.write_text(printed(), encoding="utf-8")
    assert printed() == GOLDEN.read_text(encoding="utf-8")


def test_serve_print_shows_just_that() -> None:
    path = ROOT / "servers" / "configs" / "trtllm-ngram.toml"
    argv = [sys.executable, "-m", "loadgen.cli", "serve", str(path), "--print"]
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == made(path)[2] + "\n"
    assert ran.stderr == ""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_is_printed_can_be_pasted(path: Path) -> None:
    """A shell can read it, and makes the same words of it."""
    _, argv, text = made(path)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=20)
    words = shlex.split(text.splitlines()[-1])
    assert words == [word.replace(FILES, "$files") for word in argv]


@pytest.mark.parametrize("engine", ["llamacpp", "sglang", "trtllm", "vllm"])
def test_every_method_has_a_config(engine: str) -> None:
    """ngram-simple is llama.cpp's own name of what is ngram for all."""
    specs = [made(path)[0].spec for path in CONFIGS if path.stem.startswith(f"{engine}-")]
    methods = {spec.method if spec else "none" for spec in specs}
    assert methods == {"none", *ENGINES[engine].methods} - {"ngram-simple"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_file_is_called_by_engine_and_method(path: Path) -> None:
    config, _, _ = made(path)
    engine = {"simulated": "simulator"}.get(config.engine, config.engine)
    method = config.spec.method if config.spec else "none"
    pruned_or_oracle = {"sglang-eagle-token_map", "llamacpp-synthetic"}
    assert path.stem == f"{engine}-{method}" or path.stem in pruned_or_oracle


SEEN = re.compile(r"llamacpp-(none|ngram.*|draft_model|synthetic)|simulator-.*")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_was_not_run_here_says_so(path: Path) -> None:
    comment = " ".join(re.findall(r"^# ?(.*)", path.read_text(), re.MULTILINE))
    said = "not run here" in comment or "not run on a GPU here" in comment
    assert said == (SEEN.fullmatch(path.stem) is None)


def test_full_and_pruned_draft_vocabulary_differ_in_nothing_else() -> None:
    full, pruned = (
        made(ROOT / "servers" / "configs" / f"sglang-eagle{kind}.toml")[1]
        for kind in ("", "-token_map")
    )
    assert pruned[: len(full)] == full
    assert pruned[len(full)] == "--speculative-token-map"
    assert len(pruned) == len(full) + 2


# What makes a benchmark honest, and must be seen in the command (or its YAML).
SAFE = {
    "vllm": (
        [
            *("--no-enable-prefix-caching", "--max-num-seqs", "--stream-interval 1"),
            "--enable-prompt-tokens-details",
        ],
        ["--per-request-spec-decode-metrics detailed"],
    ),
    "sglang": (
        [
            *("--disable-radix-cache", "--enable-metrics", "--max-running-requests"),
            *("--stream-interval 1", "--decode-log-interval 10", "--enable-cache-report"),
        ],
        [],
    ),
    "trtllm": (
        [
            *("enable_block_reuse: false", "enable_iter_perf_stats: true", "--max_batch_size"),
            *("return_perf_metrics: true", "stream_interval: 1"),
        ],
        [],
    ),
    "llamacpp": (["--no-cache-prompt", "--cache-ram 0", "--metrics", "--slots", "-np"], []),
}


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if p.stem.partition("-")[0] in SAFE], ids=lambda path: path.stem
)
def test_settings_that_keep_a_benchmark_honest_are_seen(path: Path) -> None:
    config, _, text = made(path)
    always, speculating = SAFE[config.engine]
    for setting in [*always, *(speculating if config.spec else [])]:
        assert setting in text
    if config.spec is None:
        assert "--per-request-spec-decode-metrics" not in text, "vLLM would not start"
    assert "acceptance_" not in text, "it would end speculation in mid-run"


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("trtllm-ngram", "is_public_pool: false"),
        ("trtllm-sa", "enable_global_pool: false"),
        ("vllm-suffix", '"suffix_decoding_max_cached_requests": 0'),
    ],
)
def test_a_pool_shared_by_requests_is_off_where_it_can_be(name: str, setting: str) -> None:
    assert setting in made(ROOT / "servers" / "configs" / f"{name}.toml")[2]
