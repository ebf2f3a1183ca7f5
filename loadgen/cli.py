"""The `draftload` command: flags in, exit code out; the one place where the four packages meet.

stdout is the report, stderr progress and caveats. Exit codes: 0 fine, 1 the run failed, 2 the input
was wrong, 130 interrupted (what was measured is reported). Modules that cost time to import
(aiohttp, rich tables, numpy) are imported where they are used: `--help` must stay quick. Must not:
compute a figure, place one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec
import typer

from loadgen import __version__
from loadgen.errors import DraftloadError, ServerError, UserError, nearest
from loadgen.types import (
    ClosedLoop,
    Dataset,
    Engine,
    Sampling,
    Scenario,
    ServerConfig,
    SpecConfig,
    Study,
    Summary,
)

if TYPE_CHECKING:
    from servers.launch import Launched

T = TypeVar("T")
Format = Literal["table", "json"]

app = typer.Typer(
    name="draftload",
    help="Does speculative decoding pay, on your traffic, at your load, on your servers?",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

FIRST_STEPS = """\
draftload demo                                   a real engine here, without and with drafts
draftload run --url http://HOST:8000 -c 1,8,64   measure the server you have
draftload compare BASE.jsonl SPEC.jsonl          does it pay?      (draftload --help shows all)"""


# ── flags that several commands share, spelled once ──────────────────────────────────────────────

Url = Annotated[str | None, typer.Option("--url", help="The server, with or without /v1.")]
EngineName = Annotated[
    str | None, typer.Option("--engine", help="Its engine, if it should not be asked.")
]
Model = Annotated[str | None, typer.Option("--model", help="Model id, where it serves several.")]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="Tokenizer folder or id; default: the server's.")
]
TemplateArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--template-args", help="KEY=VALUE in JSON for the chat template, repeatable: x=false."
    ),
]
NoTemplate = Annotated[
    bool, typer.Option("--no-template", help="Send texts as they are, for base models.")
]
History = Annotated[
    str | None,
    typer.Option("--history", help="Later turns see full answers, or the answer after thinking."),
]
AnyTokenizer = Annotated[
    bool, typer.Option("--any-tokenizer", help="Even a tokenizer that is not the model's.")
]
Api = Annotated[
    str, typer.Option("--api", help="completions (token ids) or chat (the server templates).")
]
MetricsUrl = Annotated[str | None, typer.Option("--metrics-url", help="The metrics page.")]
Header = Annotated[list[str] | None, typer.Option("--header", help="'Name: value', repeatable.")]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option("--api-key-file", help="File with the API key; default: $OPENAI_API_KEY."),
]
CaFile = Annotated[
    Path | None, typer.Option("--ca-file", help="PEM authorities that vouch for the server.")
]
ClientCert = Annotated[
    Path | None, typer.Option("--client-cert", help="PEM certificate that says who we are.")
]
ClientKey = Annotated[
    Path | None, typer.Option("--client-key", help="Its key, if it is in another file.")
]
Gpus = Annotated[int | None, typer.Option("--gpus", help="GPUs behind the URL.")]
Concurrency = Annotated[
    str | None, typer.Option("-c", "--concurrency", help="Closed-loop loads, such as 1,8,64.")
]
MaxOutputTokens = Annotated[
    int | None, typer.Option("--max-output-tokens", help="Output limit a request.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder for run files.")]
FormatName = Annotated[str, typer.Option("--format", help="table or json.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
StartTimeout = Annotated[
    str, typer.Option("--start-timeout", help="How long a server may take to get ready.")
]


Embedder = Annotated[
    str,
    typer.Option(
        "--embedder", help="lexical, local (extra [embed]) or the URL of an embeddings server."
    ),
]

# ── commands ─────────────────────────────────────────────────────────────────────────────────────


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        print(f"draftload {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(FIRST_STEPS)


@app.command(short_help="A real engine here, without and with speculation, compared.")
def demo(
    simulated: Annotated[
        bool, typer.Option("--simulated", help="The simulator instead of a real engine.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute, fewer prompts.")] = False,
    concurrency: Concurrency = None,
    model_file: Annotated[
        Path | None, typer.Option("--model-file", help="A GGUF of your own.")
    ] = None,
    max_output_tokens: MaxOutputTokens = None,
    out: Out = Path("runs"),
    format_name: FormatName = "table",
    quiet: Quiet = False,
) -> None:
    """A real engine on this machine, without and with n-gram speculation, compared.

    The first run fetches a 135M model (93 MB) and says so.

    Examples: draftload demo · draftload demo --quick · draftload demo --simulated -c 1,32,512
    """
    from loadgen.measure import measure
    from scenarios import prompts as sets

    _format(format_name)
    scenario = sets.scenario("smoke")
    if quick:
        scenario = msgspec.structs.replace(
            scenario,
            dataset=Dataset(limit=11),
            loads=(ClosedLoop(concurrency=1), ClosedLoop(concurrency=4)),
            sampling=Sampling(max_output_tokens=32),
        )
    if simulated and not quick and max_output_tokens is None:
        max_output_tokens = 96  # below, a full batch spends its time on prefills
    scenario = _changed(scenario, concurrency=concurrency, max_output_tokens=max_output_tokens)
    slots = max(load.concurrency for load in scenario.loads)
    configs = _demo_servers(simulated, slots, model_file, _say(quiet))

    async def both() -> list[tuple[Path, str]]:
        ended: list[tuple[Path, str]] = []
        for config in configs:
            job = _job(scenario, out, quiet, _label(config, config.model))
            async with _launched(config, 120.0, _say(quiet)) as server:
                ended.append(await measure(server.url, job, config, server.died))
            if ended[-1][1] != "completed":
                break
        return ended

    ended = _run(both())
    paths = [path for path, _ in ended]

    def show() -> list[Summary]:
        if len(paths) < len(configs):
            return _report(paths, format_name)
        return _compared(paths[0], paths[1:], format_name, force=False)

    _finish(ended, show)


def _demo_servers(
    simulated: bool, slots: int, model_file: Path | None, say: Callable[[str], None]
) -> tuple[ServerConfig, ServerConfig]:
    if simulated:
        common: dict[str, Any] = {
            "engine": "simulated",
            "model": "simulated-70b",
            "max_running": max(slots, 1),
        }
        return ServerConfig(**common), ServerConfig(
            **common, spec=SpecConfig(method="eagle3", draft_depth=3)
        )
    from servers import llamacpp

    model = model_file or llamacpp.demo_model(llamacpp.cache_dir(), say)
    if not model.is_file():
        raise UserError(f"no model at {model}. Expected a GGUF file; give another --model-file.")
    common = {
        "engine": "llamacpp",
        "model": str(model),
        "name": model.stem,
        "max_running": max(slots, 1),
        "max_model_len": 2048,
    }
    return ServerConfig(**common), ServerConfig(
        **common, spec=SpecConfig(method="ngram", draft_depth=3, options={"size_n": 3})
    )


@app.command(short_help="Measure a server at every load: a run file and a report.")
def run(
    url: Url = None,
    server: Annotated[
        Path | None, typer.Option("--server", help="TOML of a server to start and stop.")
    ] = None,
    scenario_name: Annotated[
        str, typer.Option("--scenario", help="Name or TOML file; see `draftload scenarios`.")
    ] = "qualitative",
    dataset: Annotated[
        Path | None,
        typer.Option("--dataset", help="Prompts of your own: JSONL, JSON, parquet; - is stdin."),
    ] = None,
    category: Annotated[
        list[str] | None, typer.Option("--category", help="Only this category, repeatable.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Prompts in all, of every category in turn.")
    ] = None,
    skip_placeholders: Annotated[
        bool, typer.Option("--skip-placeholders", help="Leave out SPEED-Bench rows without text.")
    ] = False,
    skip_too_long: Annotated[
        bool, typer.Option("--skip-too-long", help="Leave out prompts that exceed the context.")
    ] = False,
    concurrency: Concurrency = None,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests", help="Dialogues a load; default: all, at least 4 × concurrency."
        ),
    ] = None,
    duration: Annotated[
        str | None, typer.Option("--duration", help="Send for so long instead, such as 60s.")
    ] = None,
    repeat: Annotated[
        int | None, typer.Option("--repeat", help="Measure every load so often.")
    ] = None,
    warmup: Annotated[int | None, typer.Option("--warmup", help="Warm-up requests a load.")] = None,
    max_output_tokens: MaxOutputTokens = None,
    temperature: Annotated[float | None, typer.Option("--temperature")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Sampling seed.")] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Fixed output lengths (off-distribution).")
    ] = False,
    engine: EngineName = None,
    model: Model = None,
    tokenizer: Tokenizer = None,
    any_tokenizer: AnyTokenizer = False,
    template_args: TemplateArgs = None,
    no_template: NoTemplate = False,
    history: History = None,
    api: Api = "completions",
    metrics_url: MetricsUrl = None,
    header: Header = None,
    api_key_file: ApiKeyFile = None,
    ca_file: CaFile = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    gpus: Gpus = None,
    timeout: Annotated[str, typer.Option("--timeout", help="Longest request.")] = "600s",
    grace: Annotated[
        str, typer.Option("--grace", help="How long requests in flight may end after a stop.")
    ] = "30s",
    start_timeout: StartTimeout = "20m",
    no_preflight: Annotated[
        bool, typer.Option("--no-preflight", help="Skip the probe request.")
    ] = False,
    save_prompts: Annotated[
        bool, typer.Option("--save-prompts", help="Whole prompts in the run file.")
    ] = False,
    no_text: Annotated[bool, typer.Option("--no-text", help="No texts in the run file.")] = False,
    out: Out = Path("runs"),
    format_name: FormatName = "table",
    quiet: Quiet = False,
) -> None:
    """Measure a server: acceptance, speed and latency at every load; a run file and a report.

    Examples:
      draftload run --url http://127.0.0.1:8000 -c 1,8,64
      draftload run --server server.toml --scenario smoke
      draftload run --url http://HOST:8000 --dataset mine.jsonl --duration 60s -c 32
    """
    from loadgen.measure import Attach, measure
    from loadgen.transport import tls_context
    from scenarios import prompts as sets

    if (url is None) == (server is None):
        raise UserError("give either --url of a running server or --server F.toml to start one.")
    if save_prompts and no_text:
        raise UserError("--save-prompts and --no-text contradict each other; give one.")
    _format(format_name)
    scenario = _changed(
        sets.scenario(scenario_name),
        concurrency=concurrency,
        requests=requests,
        duration=duration,
        repeat=repeat,
        warmup=warmup,
        max_output_tokens=max_output_tokens,
        temperature=temperature,
        seed=seed,
        ignore_eos=ignore_eos,
        dataset=dataset,
        categories=tuple(category or ()),
        limit=limit,
        skip_placeholders=skip_placeholders,
        skip_too_long=skip_too_long,
    )
    scenario = _templated(scenario, template_args, no_template, history)
    attach = Attach(
        engine=engine,
        model=model,
        tokenizer=tokenizer,
        any_tokenizer=any_tokenizer,
        token_cache=_token_cache(),
        api=_api(api),
        metrics_url=metrics_url,
        headers=_headers(header, api_key_file),
        tls=tls_context(ca_file, client_cert, client_key),
        gpus=gpus,
        probe=not no_preflight,
        timeout_s=_seconds("--timeout", timeout),
        grace_s=_seconds("--grace", grace),
    )
    text: Literal["none", "all", "cut"] = "none" if no_text else "all" if save_prompts else "cut"
    config = _server_config(server) if server is not None else None
    job = _job(scenario, out, quiet, _label(config, url or ""), attach=attach, text=text)
    wait_s = _seconds("--start-timeout", start_timeout)

    async def one() -> tuple[Path, str]:
        if config is None:
            return await measure(str(url), job)
        async with _launched(config, wait_s, job.say) as started:
            return await measure(started.url, job, config, started.died)

    ended = _run(one())
    _finish([ended], lambda: _report([ended[0]], format_name))


@app.command(short_help="Reports from run files; never talks to a server.")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run files.")],
    format_name: FormatName = "table",
) -> None:
    """Any report from run files; never talks to a server.

    Example: draftload report runs/*.jsonl --format json
    """
    _format(format_name)
    _report(runs, format_name)


@app.command(short_help="Does it pay? Runs with speculation against their baseline.")
def compare(
    base: Annotated[Path, typer.Argument(help="Run file without speculation.")],
    spec: Annotated[list[Path], typer.Argument(help="Run files with it.")],
    force: Annotated[bool, typer.Option("--force", help="Compare unlike runs too.")] = False,
    format_name: FormatName = "table",
) -> None:
    """Speedup, acceptance and output differences of runs against their baseline.

    Example: draftload compare runs/base.jsonl runs/eagle3.jsonl
    """
    _format(format_name)
    _compared(base, spec, format_name, force=force)


@app.command(short_help="Start a server from its TOML, or print its command.")
def serve(
    server: Annotated[Path, typer.Argument(help="TOML of a server; see servers/configs.")],
    show: Annotated[bool, typer.Option("--print", help="Print the shell command instead.")] = False,
    start_timeout: StartTimeout = "20m",
) -> None:
    """Start a server with its speculative config and wait; Ctrl-C stops it.

    Example: draftload serve server.toml --print
    """
    from loadgen.written import masked
    from servers import launch

    config = _server_config(server)
    engine = _engine_of(config)
    if engine.command is None:
        raise UserError(
            f"engine '{engine.name}' cannot be started by draftload; attach with --url."
        )
    if show:
        argv = engine.command(config, config.port or 8000)
        print(launch.shell(argv, engine.files(config), config))
        if list(masked(argv)) != argv:
            print("*** stands for a secret; put it in before you run this.", file=sys.stderr)
        return

    async def wait() -> None:
        wait_s = _seconds("--start-timeout", start_timeout)
        async with _launched(config, wait_s, _say(False), log=True) as started:
            print(started.url, flush=True)
            await _served(started)

    _run(wait())


@app.command(short_help="What is at a URL, and what it honours.")
def check(
    url: Annotated[str, typer.Option("--url", help="The server, with or without /v1.")],
    engine: EngineName = None,
    model: Model = None,
    tokenizer: Tokenizer = None,
    any_tokenizer: AnyTokenizer = False,
    api: Api = "completions",
    metrics_url: MetricsUrl = None,
    header: Header = None,
    api_key_file: ApiKeyFile = None,
    ca_file: CaFile = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
) -> None:
    """What is at a URL and what it honours, explained; measures nothing.

    Example: draftload check --url http://127.0.0.1:8000
    """
    from loadgen import preflight
    from loadgen.measure import Attach, identified
    from loadgen.transport import tls_context

    attach = Attach(
        engine=engine,
        model=model,
        api=_api(api),
        metrics_url=metrics_url,
        headers=_headers(header, api_key_file),
        tls=tls_context(ca_file, client_cert, client_key),
    )

    async def ask() -> preflight.Target:
        target = await identified(url, attach, _engines())
        if attach.api == "chat":
            return await preflight.probe(target, None)
        tokenize = await preflight.tokenizer(target, tokenizer, check=not any_tokenizer)
        return await preflight.probe(target, await tokenize(preflight.PROBE))

    _explain(_run(ask()))


def _explain(target: Any) -> None:
    """A preflight.Target, a line a fact, then its caveats."""
    info, honours = target.info, target.info.honours
    depth = f", k = {info.draft_depth}" if info.draft_depth else ""
    reported = f", {info.spec_reported}" if info.spec_reported else ""
    rows = {
        "server": f"{info.url}, {info.engine} {info.version or '(version not told)'}",
        "model": f"{info.model}, context {info.max_model_len or '–'} tokens",
        "running limit": str(info.max_running or "– (not told)"),
        "speculation": f"{info.state}{reported}{depth}",
        "token-id prompts": _yes(honours.token_id_prompts),
        "ids in chunks": _yes(honours.ids_in_chunks),
        "usage in chunks": _yes(honours.continuous_usage),
        "timings in chunks": _yes(honours.chunk_timings),
        "per-request acceptance": _yes(honours.per_request_acceptance),
        "metrics page": _yes(honours.metrics_page),
        "engine support": info.verified,
    }
    for name, value in rows.items():
        print(f"{name:<24}{_clean(value)}")
    for caveat in target.caveats:
        print(f"\n{caveat.code}: {_clean(caveat.message)}\n  {caveat.advice}")


@app.command(short_help="The engines draftload knows.")
def engines() -> None:
    """The engines that draftload knows, and what of each was seen on a live server."""
    for engine in _engines().values():
        how = "starts and attaches" if engine.command is not None else "attaches"
        print(f"{engine.name:<12}{how:<22}{engine.verified}")
        if engine.methods:
            print(f"{'':<12}methods: {', '.join(engine.methods)}")


@app.command(short_help="The scenarios that come with draftload.")
def scenarios() -> None:
    """The scenarios that come with draftload."""
    from scenarios import prompts as sets

    for name in sets.names():
        scenario = sets.scenario(name)
        count = len(sets.read(scenario.dataset).prompts)
        loads = ",".join(str(load.concurrency) for load in scenario.loads)
        print(f"{name:<14}{scenario.description}")
        print(
            f"{'':<14}{count} prompts, -c {loads}, "
            f"≤ {scenario.sampling.max_output_tokens} tokens, T {scenario.sampling.temperature:g}"
        )


# ── datasets ─────────────────────────────────────────────────────────────────────────────────────

datasets = typer.Typer(rich_markup_mode=None)
app.add_typer(datasets, name="datasets", short_help="The prompts that come with draftload.")


@datasets.callback(invoke_without_command=True)
def _datasets(context: typer.Context) -> None:
    """The sets of prompts that come with draftload; how diverse a set is, and a diverse choice.

    Examples: draftload datasets · draftload datasets diversity qualitative
    """
    if context.invoked_subcommand is None:
        from reports.datasets import listing
        from scenarios import builtin

        _print(listing([builtin.facts(name) for name in builtin.SETS], _study([], [])))


@datasets.command(name="diversity", short_help="How unlike a set's prompts are, by category.")
def diversity_of(
    source: Annotated[str, typer.Argument(metavar="FILE|NAME", help="JSONL or built-in set.")],
    embedder: Embedder = "lexical",
    pairs: Annotated[int, typer.Option("--pairs", min=0, help="Nearest pairs to show.")] = 10,
    near: Annotated[
        float | None, typer.Option("--near", help="Count pairs at or over this cosine.")
    ] = None,
    model: Model = None,
    api_key_file: ApiKeyFile = None,
) -> None:
    """Mean pairwise cosine by category, nearest pairs, lengths in words.

    Example: draftload datasets diversity qualitative --embedder local --pairs 20
    """
    from reports.datasets import diversity as shown
    from scenarios import builtin, diversity, prompts

    path = Path(source)
    is_path = source == "-" or path.suffix or "/" in source or path.exists()
    if source in builtin.SETS or not is_path:
        found = builtin.read(source)
    else:
        found = prompts.read(Dataset(kind="jsonl", path=source)).prompts
    texts = [diversity.text(prompt) for prompt in found]
    vectors, about, bound = _vectors(embedder, texts, model, api_key_file)
    bound = bound if near is None else near
    said = diversity.measured(
        found, vectors, source=source, embedder=about, pairs=pairs, bound=bound
    )
    _print(shown(said, _study([], [])))


@datasets.command(short_help="The most diverse prompts of a pool, by category.")
def select(
    pool: Annotated[Path, typer.Argument(help="JSONL of candidates.")],
    out: Annotated[Path, typer.Option("--out", help="JSONL to write.")],
    per_category: Annotated[int, typer.Option("--per-category", help="Prompts to keep.")] = 80,
    embedder: Embedder = "lexical",
    seed: Annotated[int, typer.Option("--seed", help="Picks each category's first.")] = 0,
    model: Model = None,
    api_key_file: ApiKeyFile = None,
) -> None:
    """Keep of each category the prompts least like one another: SPEED-Bench's selection, greedy
    and then by swaps. Rows are copied as they stand.

    Example: draftload datasets select pool.jsonl --per-category 80 --out chosen.jsonl
    """
    from scenarios import diversity, prompts

    found = prompts.read(Dataset(kind="jsonl", path=str(pool))).prompts
    lines = pool.read_bytes().split(b"\n") if pool.is_file() else ()
    rows = [line for line in lines if line.strip()]
    if len(rows) != len(found) or not rows[0].lstrip().startswith(b"{"):
        raise UserError(f"cannot copy rows of {pool}. Expected a JSONL file, one prompt a line.")
    if out.exists() and out.samefile(pool):
        raise UserError(f"--out {out} is the pool itself. Expected another file.")
    texts = [diversity.text(prompt) for prompt in found]
    vectors, about, _ = _vectors(embedder, texts, model, api_key_file)
    chosen = diversity.chosen(found, vectors, per_category, seed)
    try:
        out.write_bytes(b"".join(rows[i] + b"\n" for i in chosen))
    except OSError as fault:
        raise UserError(f"cannot write {out}: {fault.strerror}.") from None
    print(f"{out}: {len(chosen)} of {len(found)} prompts; embedder: {about}", file=sys.stderr)


def _vectors(
    embedder: str, texts: Sequence[str], model: str | None, key_file: Path | None
) -> tuple[Any, str, float | None]:
    """Vectors of the texts, what made them, and from which cosine on it sees near-duplicates."""
    from scenarios import embedders

    print(f"embedding {len(texts)} prompts …", file=sys.stderr)
    if embedder in embedders.LOCAL:
        embed, about, bound = embedders.LOCAL[embedder]
        return embed(texts), about, bound
    if not embedder.startswith(("http://", "https://")):
        hint = nearest(embedder, embedders.LOCAL) or "."
        raise UserError(f"unknown embedder '{embedder}'{hint} Expected lexical, local or a URL.")
    from loadgen.embed import embedded
    from loadgen.preflight import without_secrets

    work = embedded(embedder, texts, model=model, headers=_headers(None, key_file))
    about = f"{model or 'the model'} at {without_secrets(embedder)}"
    return _run(work), about, None


def _job(scenario: Scenario, out: Path, quiet: bool, label: str, **options: Any) -> Any:
    """A measure.Job over the scenario's prompts, shown live."""
    from loadgen.measure import Job
    from reports.live import Live, tokenizing
    from scenarios import prompts as sets

    asked = sets.read(scenario.dataset)
    for caveat in asked.caveats:
        _say(quiet)(f"{caveat.code}: {caveat.message}")
    return Job(
        scenario=scenario,
        prompts=asked.prompts,
        caveats=asked.caveats,
        warmup=sets.warmup(),
        engines=_engines(),
        out=out,
        say=_say(quiet),
        watch=lambda plan: Live(plan, label, quiet=quiet),
        tokenizing=lambda total: tokenizing(total, quiet=quiet),
        **options,
    )


# ── servers and the loop ─────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def _launched(
    config: ServerConfig, wait_s: float, say: Callable[[str], None], *, log: bool = False
) -> AsyncIterator[Launched]:
    """The config's server, started and stopped."""
    from servers import launch

    engine = _engine_of(config)
    say(f"starting {_label(config, config.name or Path(config.model).name)}")

    def show(line: str) -> None:
        print(line, file=sys.stderr)

    async with launch.launched(
        engine, config, start_timeout_s=wait_s, on_log=show if log else None
    ) as server:
        yield server


def _label(config: ServerConfig | None, model: str) -> str:
    """What is measured, in few words: for progress lines."""
    if config is None:
        return model
    if config.spec is None:
        return f"{config.engine}, no speculation"
    depth = config.spec.draft_depth or config.spec.draft_tokens
    return f"{config.engine}, {config.spec.method}" + (f" k = {depth}" if depth else "")


async def _served(server: Launched) -> None:
    """Until Ctrl-C. ServerError: the server ended by itself."""
    from loadgen.measure import interrupts

    stop = asyncio.Event()
    died = asyncio.create_task(server.died())
    with interrupts(stop.set):
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({died, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not stopped.done():
        raise ServerError(died.result())
    died.cancel()


def _run(work: Coroutine[Any, Any, T]) -> T:
    """cli's one entry to the loop: uvloop where it is installed."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ImportError):
        import uvloop

        factory = uvloop.new_event_loop
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(work)
    except KeyboardInterrupt:
        # Before the first phase, where a run does not yet end by itself: nothing was measured.
        print("draftload: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None


# ── reporting ────────────────────────────────────────────────────────────────────────────────────


def _summary(path: Path) -> Summary:
    from loadgen.store import read
    from loadgen.summarize import summarize

    found = read(path)
    known = _engines()
    return summarize(found, known.get(found.info.server.engine, known["openai"]))


def _report(paths: Sequence[Path], format_name: str) -> list[Summary]:
    from reports import as_json, table

    summaries = [_summary(path) for path in paths]
    render = {"table": table.render, "json": as_json.render}[format_name]
    _print(render(_study(summaries, paths)))
    return summaries


def _compared(base: Path, spec: Sequence[Path], format_name: str, *, force: bool) -> list[Summary]:
    from loadgen.compare import compare as paired
    from reports import as_json
    from reports import compare as as_compare

    render = {"table": as_compare.render, "json": as_json.render}[format_name]
    summaries = [_summary(base)]
    for path in spec:
        summaries.append(_summary(path))
        study = _study([summaries[0], summaries[-1]], [base, path])
        found = paired(summaries[0], summaries[-1], force=force)
        _print(render(replace(study, comparison=found)))
    return summaries


def _study(summaries: Sequence[Summary], paths: Sequence[Path]) -> Study:
    width = shutil.get_terminal_size((100, 24)).columns
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return Study(
        summaries=tuple(summaries),
        paths=tuple(str(path) for path in paths),
        width=max(width, 60),
        color=color,
    )


def _print(text: str) -> None:
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def _finish(ended: Sequence[tuple[Path, str]], show: Callable[[], Sequence[Summary]]) -> None:
    """Report what was measured; the exit code says how it ended."""
    reasons = [reason for _, reason in ended if reason != "completed"]
    try:
        summaries = show()
    except UserError as fault:
        if not reasons:
            raise
        print(f"draftload: {_clean(str(fault))}", file=sys.stderr)
    if reasons:
        raise typer.Exit(130 if "interrupted" in reasons else 1)
    if any(p.requests.completed == 0 for s in summaries for p in s.phases):
        raise typer.Exit(1)


# ── flags → values ───────────────────────────────────────────────────────────────────────────────


def _engines() -> dict[str, Engine]:
    """ENGINE of every file under servers/ that has one, by name."""
    import importlib
    import pkgutil

    import servers

    found: dict[str, Engine] = {}
    for module in pkgutil.iter_modules(servers.__path__):
        found_here = importlib.import_module(f"servers.{module.name}")
        if engine := getattr(found_here, "ENGINE", None):
            found[engine.name] = engine
    return found


def _engine_of(config: ServerConfig) -> Engine:
    known = _engines()
    if config.engine not in known:
        hint = nearest(config.engine, known) or "."
        raise UserError(f"unknown engine '{config.engine}'{hint} Known: {', '.join(known)}.")
    return known[config.engine]


def _server_config(path: Path | None) -> ServerConfig:
    from loadgen.written import read_toml

    if path is None:
        raise UserError("give --server F.toml.")
    return read_toml(path, ServerConfig)


def _changed(
    scenario: Scenario,
    *,
    concurrency: str | None = None,
    requests: int | None = None,
    duration: str | None = None,
    repeat: int | None = None,
    warmup: int | None = None,
    max_output_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    ignore_eos: bool = False,
    dataset: Path | None = None,
    categories: tuple[str, ...] = (),
    limit: int | None = None,
    skip_placeholders: bool = False,
    skip_too_long: bool = False,
) -> Scenario:
    """The scenario with what the flags say. UserError: a value that makes no sense."""
    for flag, number in (
        ("--requests", requests),
        ("--repeat", repeat),
        ("--max-output-tokens", max_output_tokens),
        ("--limit", limit),
    ):
        if number is not None and number < 1:
            raise UserError(f"{flag} {number} makes no sense. Expected 1 or more.")
    if warmup is not None and warmup < 0:
        raise UserError(f"--warmup {warmup} makes no sense. Expected 0 or more.")
    if temperature is not None and not 0 <= temperature <= 10:
        raise UserError(f"--temperature {temperature:g} makes no sense. Expected 0 to 10.")
    put = msgspec.structs.replace

    def kept(**flags: Any) -> dict[str, Any]:
        return {name: value for name, value in flags.items() if value is not None}

    data = scenario.dataset
    if dataset is not None:
        data = Dataset(kind="jsonl", path=str(dataset), seed=data.seed)
    return put(
        scenario,
        **kept(
            dataset=put(
                data,
                **kept(
                    categories=categories or None,
                    limit=limit,
                    skip_placeholders=skip_placeholders or None,
                    skip_too_long=skip_too_long or None,
                ),
            ),
            loads=_loads(concurrency),
            stop=put(
                scenario.stop,
                **kept(
                    requests=requests,
                    duration_s=None if duration is None else _seconds("--duration", duration),
                ),
            ),
            sampling=put(
                scenario.sampling,
                **kept(
                    temperature=temperature,
                    seed=seed,
                    max_output_tokens=max_output_tokens,
                    ignore_eos=ignore_eos or None,
                ),
            ),
            warmup_requests=warmup,
            repeats=repeat,
        ),
    )


def _templated(
    scenario: Scenario, args: Sequence[str] | None, no_template: bool, history: str | None
) -> Scenario:
    """The scenario with what the flags say of templating. UserError: a value that says nothing."""
    put, templating = msgspec.structs.replace, scenario.templating
    templating = put(templating, args=templating.args | _template_args(args or ()))
    if history is not None:
        if history not in ("full", "answer"):
            raise UserError(f"--history {history} makes no sense. Expected full or answer.")
        templating = put(templating, history=history)
    if no_template:
        templating = put(templating, apply=False)
    if templating.args and not templating.apply:
        raise UserError("--no-template and template arguments contradict each other; give one.")
    return put(scenario, templating=templating)


def _template_args(words: Sequence[str]) -> dict[str, Any]:
    """`enable_thinking=false`, `reasoning_effort=low` → values. UserError: not KEY=VALUE, no JSON.

    A bare word is a text, but for words that a template would take for true.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--template-args {word} is not of the form KEY=VALUE.")
        try:
            found[key] = msgspec.json.decode(value)
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
            bare = value.isidentifier()
            if not bare or value.lower() in ("true", "false", "none", "null", "yes", "no"):
                raise UserError(
                    f"--template-args {word}: the value is no JSON. Expected such as "
                    "enable_thinking=false or reasoning_effort=low."
                ) from None
            found[key] = value
    return found


def _token_cache() -> Path:
    from servers.llamacpp import cache_dir

    return cache_dir() / "tokens"


def _loads(text: str | None) -> tuple[ClosedLoop, ...] | None:
    if text is None:
        return None
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"-c {text} is no load. Expected whole numbers from 1, such as -c 1,8,64.")
    return tuple(ClosedLoop(concurrency=number) for number in dict.fromkeys(map(int, words)))


def _seconds(flag: str, text: str) -> float:
    """`90`, `90s`, `2m`, `1h`, `500ms` → seconds."""
    for unit, factor in (("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("", 1.0)):
        number = text.strip().removesuffix(unit) if unit else text.strip()
        if text.strip().endswith(unit):
            with contextlib.suppress(ValueError):
                if 0 < (value := float(number) * factor) < float("inf"):
                    return value
    raise UserError(f"{flag} {text} is no duration. Expected such as 500ms, 60s, 2m or 1h.")


def _api(name: str) -> Literal["completions", "chat"]:
    if name == "completions":
        return "completions"
    if name == "chat":
        return "chat"
    raise UserError(f"unknown API '{name}'{nearest(name, ('completions', 'chat')) or '.'}")


def _format(name: str) -> None:
    if name not in ("table", "json"):
        raise UserError(f"unknown format '{name}'. Expected table or json.")


def _headers(lines: Sequence[str] | None, key_file: Path | None) -> dict[str, str]:
    headers = {}
    for line in lines or ():
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            raise UserError("a --header is not of the form 'Name: value'.")
        headers[name.strip()] = value.strip()
    key = os.environ.get("OPENAI_API_KEY")
    if key_file is not None:
        try:
            key = key_file.read_text(encoding="utf-8").strip()
        except OSError as fault:
            raise UserError(f"cannot read the API key file {key_file}: {fault.strerror}.") from None
    if key and "authorization" not in {name.lower() for name in headers}:
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _say(quiet: bool) -> Callable[[str], None]:
    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr)

    return say


def _clean(text: str) -> str:
    """The text without terminal control, as lines."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def _yes(value: bool | None) -> str:
    return "–" if value is None else "yes" if value else "no"


def main() -> None:
    """The console script: errors become one paragraph on stderr and an exit code."""
    # SIGTERM is a Ctrl-C: servers are stopped, files closed, the terminal is put right.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app(standalone_mode=True)
    except DraftloadError as fault:
        print(f"draftload: {_clean(str(fault))}", file=sys.stderr)
        sys.exit(fault.exit_code)
    except KeyboardInterrupt:
        print("draftload: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
