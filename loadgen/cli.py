"""The `draftload` command: flags in, exit code out; the one place where the four packages meet.

stdout is the report, stderr progress and caveats. Exit codes: 0 fine, 1 the run failed, 2 the input
was wrong, 3 a bound of --fail-if was crossed, 130 interrupted (what was measured is reported).
Modules that cost time to import (aiohttp, rich tables, numpy) are imported where they are used:
`--help` must stay quick. Must not: compute a figure, place one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import textwrap
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec
import typer

from loadgen import __version__
from loadgen.errors import DraftloadError, ServerError, UserError, nearest
from loadgen.types import (
    Bound,
    Cell,
    ClosedLoop,
    Dataset,
    Engine,
    Matrix,
    OpenLoop,
    Prompt,
    Recipe,
    Sampling,
    Scenario,
    ServerConfig,
    SpecConfig,
    Study,
    Summary,
)
from loadgen.written import load_label, most_in_flight

if TYPE_CHECKING:
    from loadgen.breakeven import By
    from loadgen.measure import Attach, Job, Watch
    from loadgen.monitor import Canary
    from loadgen.sides import Sides
    from loadgen.sweep import Index
    from reports.live import SweepLive
    from scenarios.prompts import PromptSet
    from servers.launch import Launched

T = TypeVar("T")

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
Isl = Annotated[
    str | None, typer.Option("--isl", help="Prompt length of synthetic sets: 1k, 8k, 32k.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder for run files.")]
PrometheusPort = Annotated[
    int | None, typer.Option("--prometheus-port", help="Serve /metrics here; 0 is any free port.")
]
PrometheusHost = Annotated[
    str, typer.Option("--prometheus-host", help="Address that /metrics is served on.")
]
Linger = Annotated[
    str | None,
    typer.Option("--linger", help="Serve on after the end, until a scrape saw it, or so long."),
]
FormatName = Annotated[str, typer.Option("--format", help="table or json.")]
Paste = Annotated[
    bool, typer.Option("--paste", help="label: value lines for an issue, as vllm bench serve has.")
]
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
    slots = max(most_in_flight(load) or 1 for load in scenario.loads)
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
    isl: Isl = None,
    skip_too_long: Annotated[
        bool, typer.Option("--skip-too-long", help="Leave out prompts that exceed the context.")
    ] = False,
    concurrency: Concurrency = None,
    rate: Annotated[
        str | None,
        typer.Option("--rate", help="Open-loop loads instead: dialogues begun a second, 2,4,8."),
    ] = None,
    arrivals: Annotated[
        str | None,
        typer.Option("--arrivals", help="Of --rate: constant, poisson (default), gamma."),
    ] = None,
    burstiness: Annotated[
        float | None,
        typer.Option("--burstiness", help="Of gamma arrivals, as vLLM's: below 1 in bursts."),
    ] = None,
    max_in_flight: Annotated[
        int | None,
        typer.Option("--max-in-flight", help="Of --rate: more dialogues wait here, late."),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests", help="Dialogues a load; default: all, at least 4 × concurrency."
        ),
    ] = None,
    duration: Annotated[
        str | None,
        typer.Option(
            "--duration",
            help="Send for so long instead, such as 60s; with --rate: rate × duration.",
        ),
    ] = None,
    ramp: Annotated[
        str | None, typer.Option("--ramp", help="Time for the load to come up first, such as 30s.")
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
    prometheus_port: PrometheusPort = None,
    prometheus_host: PrometheusHost = "127.0.0.1",
    linger: Linger = None,
    out: Out = Path("runs"),
    format_name: FormatName = "table",
    paste: Paste = False,
    quiet: Quiet = False,
) -> None:
    """Measure a server: acceptance, speed and latency at every load; a run file and a report.

    Examples:
      draftload run --url http://127.0.0.1:8000 -c 1,8,64
      draftload run --server server.toml --scenario smoke
      draftload run --url http://HOST:8000 --dataset mine.jsonl --duration 60s -c 32
      draftload run --url http://HOST:8000 --rate 2,4,8 --duration 60s --ramp 10s
    """
    from loadgen.arrivals import process_of
    from loadgen.measure import Attach, measure
    from loadgen.preflight import without_secrets
    from loadgen.transport import tls_context
    from scenarios import prompts as sets

    if (url is None) == (server is None):
        raise UserError("give either --url of a running server or --server F.toml to start one.")
    if save_prompts and no_text:
        raise UserError("--save-prompts and --no-text contradict each other; give one.")
    format_name = _pasted(format_name, paste)
    scenario = _changed(
        sets.scenario(scenario_name),
        concurrency=concurrency,
        open_loads=_open_loads(rate, arrivals, burstiness, max_in_flight, concurrency),
        requests=requests,
        duration=duration,
        ramp=ramp,
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
        isl=isl,
        skip_too_long=skip_too_long,
    )
    scenario = _templated(scenario, template_args, no_template, history)
    for load in scenario.loads:
        if isinstance(load, OpenLoop):
            process_of(load)  # known before a server is started
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
    label = _label(config, without_secrets(url or ""))
    job = _job(scenario, out, quiet, label, attach=attach, text=text)
    wait_s = _seconds("--start-timeout", start_timeout)

    async def one(also: tuple[Watch, ...]) -> tuple[Path, str]:
        asked = replace(job, also=also)
        if config is None:
            return await measure(str(url), asked)
        async with _launched(config, wait_s, job.say) as started:
            return await measure(started.url, asked, config, started.died)

    with _exported(prometheus_port, prometheus_host, linger) as also:
        ended = _run(one(also))
        _finish([ended], lambda: _report([ended[0]], format_name))


@app.command(name="sweep", short_help="Servers × scenarios × loads × repeats, resumable.")
def sweep_matrix(
    matrix: Annotated[Path, typer.Argument(metavar="MATRIX.toml", help="What to sweep over.")],
    out: Out = Path("runs"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only the plan and how long it may take.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Start without asking.")] = False,
    repeat: Annotated[
        int | None, typer.Option("--repeat", min=1, help="Instead of the matrix's repeats.")
    ] = None,
    start_timeout: StartTimeout = "20m",
    format_name: FormatName = "table",
    prometheus_port: PrometheusPort = None,
    prometheus_host: PrometheusHost = "127.0.0.1",
    linger: Linger = None,
    quiet: Quiet = False,
) -> None:
    """Servers × scenarios × loads × repeats: each server started, warmed, measured, stopped.

    A cell is one run file. Started again it measures only what is missing in the folder.

    Examples:
      draftload sweep matrix.toml --dry-run
      draftload sweep matrix.toml --out runs/sweep --repeat 5
    """
    from loadgen import matrix as matrices
    from loadgen import sweep
    from reports import sweep as shown
    from scenarios import prompts as sets

    _format(format_name)
    asked = matrices.read(matrix, sets.scenario, _engines(), repeats=repeat)
    prompts = {s.name: _prompts(s.dataset) for s in asked.scenarios}
    cells = matrices.cells(asked, {name: found.prompts for name, found in prompts.items()})
    known = sweep.index(out, cells)
    left = [cell for cell in cells if cell.name not in known.done]
    text = shown.plan(
        asked,
        cells,
        len(left),
        [sweep.expected_s(cell, known.seconds) for cell in left],
        _config_differences(asked),
        _study([], []).width,
    )
    plan = "\n".join(line.plain for line in text)
    if dry_run:
        _print(plan)
        return
    _say(quiet)(plan)
    if left:
        _can_start(left, out)
        if not yes and sys.stdin.isatty():
            typer.confirm("Start?", default=True, abort=True, err=True)
    wait_s = _seconds("--start-timeout", start_timeout)
    with _exported(prometheus_port, prometheus_host, linger) as also:
        _swept(asked, cells, known, prompts, out, quiet, wait_s, format_name, also)


def _config_differences(asked: Matrix) -> dict[str, tuple[str, ...]]:
    from loadgen.matrix import config_differences

    base = next((server for server in asked.servers if server.name == asked.baseline), None)
    if base is None:
        return {}
    return {s.name: config_differences(base, s) for s in asked.servers if s is not base}


def _can_start(left: Sequence[Cell], out: Path) -> None:
    """UserError: no cell could be measured, or none written."""
    from loadgen.preflight import check_descriptors

    check_descriptors(max(most_in_flight(cell.load) or 1 for cell in left))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise UserError(f"cannot make the folder {out}: {fault.strerror}. See --out.") from None
    if not os.access(out, os.W_OK):
        raise UserError(f"cannot write to {out}. Give a folder that can be written with --out DIR.")


def _swept(
    asked: Matrix,
    cells: Sequence[Cell],
    known: Index,
    prompts: dict[str, Any],
    out: Path,
    quiet: bool,
    wait_s: float,
    format_name: str,
    also: tuple[Watch, ...],
) -> None:
    """Measures what is left and prints the table, however it ends; the exit code says how."""
    from rich.text import Text

    from loadgen import sweep
    from reports import as_json
    from reports import sweep as shown
    from reports.live import SweepLive

    summaries: dict[str, Summary] = {}
    files: dict[str, Path] = {}
    failed: dict[str, str] = {}

    def take(cell: Cell, path: Path | None, reason: str) -> None:
        found, why = _cell_summary(path, reason)
        if found is not None and path is not None:
            summaries[cell.name], files[cell.name] = found, path
        if why:
            failed[cell.name] = why

    for cell in cells:
        if cell.name in known.done:
            take(cell, known.done[cell.name], "completed")
    left = [cell for cell in cells if cell.name not in known.done]
    whole = True
    try:
        with SweepLive(quiet=quiet) as live:

            def grid(running: Cell | None) -> Any:
                found = sweep.result(asked.name, cells, summaries, failed, None)
                return shown.grid(found, running, live.width)

            def ended(cell: Cell, path: Path | None, reason: str) -> None:
                take(cell, path, reason)
                done = len(cells) - len(left) + 1 + left.index(cell)
                (row,) = sweep.result(asked.name, [cell], summaries, failed, None).rows
                reason = failed.get(cell.name, reason)
                live.show(grid(None), shown.line(cell, row, reason, done, len(cells)))

            def job(cell: Cell) -> Job:
                table = grid(cell)
                live.show(table)

                @contextlib.contextmanager
                def tokenizing(total: int) -> Iterator[Callable[[int], None]]:
                    what = f"{_clean(cell.name)}: tokenizing {total:,} prompts: "
                    yield lambda count: live.show([*table, Text(f"{what}{count:,}", "dim")])
                    live.show(table)

                made = _cell_job(cell, prompts[cell.scenario.name], out, live)
                return replace(made, tokenizing=tokenizing, also=also)

            say = _say(quiet)
            whole = _run(sweep.sweep(left, job, lambda c: _launched(c, wait_s, say), ended))
    finally:
        found = sweep.result(asked.name, cells, summaries, failed, asked.baseline)
        study = replace(_study([], []), sweep=found)
        if format_name == "json":
            _print(as_json.render(study))
        else:
            _print(shown.render(study))
            _maps([(files[name], run) for name, run in summaries.items()])
    if not whole or failed:
        raise typer.Exit(1 if whole else 130)


def _maps(runs: Sequence[tuple[Path, Summary]]) -> None:
    """The break-even map of each config against its baseline, where there is one."""
    from loadgen import sides
    from reports import breakeven

    try:
        pairs = sides.swept([run for _, run in runs])
        path_of = {run.info.run_id: path for path, run in runs}
        for study in _compared_sides(pairs, path_of, (), force=False, by="category"):
            print()
            _print(breakeven.render(study))
    except UserError as fault:
        print(f"draftload: no break-even map: {_clean(str(fault))}", file=sys.stderr)


def _cell_summary(path: Path | None, reason: str) -> tuple[Summary | None, str]:
    """The figures of a cell that ended, and why it counts as failed or ""."""
    if reason != "completed" or path is None:
        return None, reason
    try:
        found = _summary(path)
    except UserError as fault:
        return None, f"failed: {fault}"
    done = any(phase.requests.completed for phase in found.phases)
    return found, "" if done else "failed: no request completed"


def _cell_job(cell: Cell, asked: Any, out: Path, live: SweepLive) -> Job:
    from loadgen.measure import Attach, Job
    from scenarios import prompts as sets

    server, recipe = cell.server, _recipe(cell.scenario.dataset)
    known = _engines()
    attach = Attach(
        engine=server.engine,
        model=server.model,
        tokenizer=server.tokenizer,
        api=server.api,
        metrics_url=server.metrics_url,
        headers=_headers(None, None),
        gpus=server.gpus,
        token_cache=_token_cache(),
    )
    return Job(
        scenario=cell.scenario,
        prompts=asked.prompts if recipe is None else (),
        recipe=recipe,
        caveats=asked.caveats,
        warmup=sets.warmup(),
        engines=known,
        out=out,
        say=lambda line: None,
        watch=lambda plan, info: live.watch(plan, cell.name, info, known),
        attach=attach,
        cell=cell,
    )


@app.command(short_help="Reports from run files; never talks to a server.")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run files, or a folder of them.")],
    format_name: FormatName = "table",
    paste: Paste = False,
) -> None:
    """Any report from run files; never talks to a server.

    Examples: draftload report runs/*.jsonl --format json · draftload report RUN --paste
    """
    _report(runs, _pasted(format_name, paste))


@app.command(short_help="Does it pay? Runs with speculation against their baseline.")
def compare(
    base: Annotated[
        Path, typer.Argument(help="Run file without speculation, or the folder of a sweep.")
    ],
    spec: Annotated[
        list[Path] | None, typer.Argument(help="Run files with it; more of the base may follow.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Compare unlike runs too.")] = False,
    as_map: Annotated[
        bool, typer.Option("--map", help="The break-even map: speedup by category and load.")
    ] = False,
    by: Annotated[
        str, typer.Option("--by", help="Rows of the map: category, tier or isl_bucket.")
    ] = "category",
    fail_if: Annotated[
        list[str] | None,
        typer.Option("--fail-if", help="Such as 'speedup_user<1.1@c=32': exit code 3."),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", help="The bounds of --fail-if as JUnit XML.")
    ] = None,
    format_name: Annotated[
        str, typer.Option("--format", help="table, json or markdown.")
    ] = "table",
) -> None:
    """Speedup, acceptance and output differences of runs against their baseline.

    Run files of one server config are repeats of one side, the first file's config is the base. Of
    a folder, such as a sweep's, the base is the config without speculation.

    Of random_control beside real text: by how much random input misstates it.

    Example: draftload compare runs/base.jsonl runs/eagle3.jsonl --fail-if 'speedup_user<1.1@c=32'
    """
    from loadgen.gates import read_bounds

    _format(format_name, "markdown")
    rows = _by(by) if as_map else None
    bounds = read_bounds(fail_if or ())
    if junit is not None and not bounds:
        raise UserError("--junit has nothing to write without --fail-if. Give a bound.")
    if junit is not None and not junit.parent.is_dir():
        raise UserError(f"cannot write {junit}: there is no folder {junit.parent}.")
    if spec and len({_is_control(path) for path in (base, *spec)}) > 1:
        for path in spec:
            _misstated((base, path), format_name, force=force)
        return
    studies = _studies(base, spec or (), bounds, force=force, by=rows)
    _print(_comparisons(studies, format_name))
    judged = tuple(judged for study in studies for judged in study.judged)
    if junit is not None:
        from reports import as_junit

        junit.write_text(as_junit.render(replace(studies[0], judged=judged)), encoding="utf-8")
    crossed = [j for j in judged if j.crossed]
    for one in crossed:
        from reports import units

        said = f"{one.bound.text} at {one.load} of {one.spec}: {units.judged(one)}"
        print(f"draftload: crossed: {_clean(said)}", file=sys.stderr)
    if crossed:
        raise typer.Exit(3)


@app.command(short_help="Draft length by load, as a schedule that the engine reads.")
def advise(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run files without speculation and with, or a sweep's folder."),
    ],
    format_name: FormatName = "table",
) -> None:
    """What a step costs and which draft length to use at each load, from runs at two k or more.

    A run without speculation is k = 0. The schedule is printed as vLLM and TensorRT-LLM read it.

    Example: draftload advise runs/none.jsonl runs/eagle3-k5.jsonl
    """
    from loadgen import stepcost
    from reports import advise as as_advice
    from reports import as_json

    _format(format_name)
    study = _study(*_all_runs(runs))
    study = replace(study, advice=stepcost.advise(study.summaries))
    _print({"table": as_advice.render, "json": as_json.render}[format_name](study))


@app.command(short_help="The highest load inside an SLO; servers, GPUs and cost for a rate.")
def capacity(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run files of one server config or several, or their folder."),
    ],
    slo: Annotated[
        list[str], typer.Option("--slo", help="Bound such as ttft_p95<=500ms, repeatable.")
    ],
    rps: Annotated[float | None, typer.Option("--rps", help="Requests a second to serve.")] = None,
    mix: Annotated[
        str | None, typer.Option("--mix", help="Your traffic, such as rag=0.6,coding=0.4.")
    ] = None,
    gpu_price: Annotated[
        float | None, typer.Option("--gpu-price", help="Of a GPU an hour, in your currency.")
    ] = None,
    headroom: Annotated[
        float, typer.Option("--headroom", help="Share of each server that stays free.")
    ] = 0.2,
    format_name: FormatName = "table",
) -> None:
    """The highest measured load inside an SLO for every server config, ranked, and what it takes.

    A bound with a statistic (ttft_p95, tpot_p99, user_tokens_per_s_p50) bounds a load; one without
    (ttft_s<=0.5) is a limit of each request, which goodput counts.

    Example: draftload capacity runs --slo 'ttft_p95<=500ms' --slo 'tpot_p99<=40ms' --rps 50
    """
    from loadgen import capacity as sizing
    from reports import as_json
    from reports import capacity as as_capacity

    _format(format_name)
    study = _study(*_all_runs(runs))
    found = sizing.capacity(
        study.summaries,
        slo,
        rps=rps,
        mix=sizing.mix_of(mix) if mix is not None else None,
        gpu_price_per_h=gpu_price,
        headroom=headroom,
    )
    study = replace(study, capacity=found)
    _print({"table": as_capacity.render, "json": as_json.render}[format_name](study))


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
    from servers import fitting, launch

    config = _server_config(server)
    engine = _engine_of(config)
    if engine.command is None:
        raise UserError(
            f"engine '{engine.name}' cannot be started by draftload; attach with --url."
        )
    if show:
        fitting.reach(engine, config)
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


@app.command(name="monitor", short_help="Watch deployed servers' acceptance, for Prometheus.")
def monitor_servers(
    url: Annotated[list[str], typer.Option("--url", help="A server to watch, repeatable.")],
    metrics_url: Annotated[
        list[str] | None,
        typer.Option("--metrics-url", help="Its metrics page: one for each --url, in order."),
    ] = None,
    scrape_interval: Annotated[
        str, typer.Option("--scrape-interval", help="From one scrape to the next.")
    ] = "15s",
    probe: Annotated[
        str | None,
        typer.Option("--probe", help="Scenario to send one prompt of, category after category."),
    ] = None,
    every: Annotated[
        str | None, typer.Option("--every", help="From one --probe request to the next; 60s.")
    ] = None,
    max_output_tokens: Annotated[
        int | None, typer.Option("--max-output-tokens", help="Output limit of a probe; 64.")
    ] = None,
    engine: EngineName = None,
    model: Model = None,
    tokenizer: Tokenizer = None,
    any_tokenizer: AnyTokenizer = False,
    api: Api = "completions",
    header: Header = None,
    api_key_file: ApiKeyFile = None,
    ca_file: CaFile = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    prometheus_port: PrometheusPort = None,
    prometheus_host: PrometheusHost = "127.0.0.1",
    quiet: Quiet = False,
) -> None:
    """Scrape deployed servers until Ctrl-C or SIGTERM and serve their speculation figures in one
    vocabulary over all engines; optionally send a light probe by category.

    Examples:
      draftload monitor --url http://gpu-1:8000 --url http://gpu-2:30000 --prometheus-port 9410
      draftload monitor --url http://HOST:8000 --probe qualitative --every 60s
    """
    from loadgen.measure import interrupts
    from loadgen.monitor import monitor
    from loadgen.transport import tls_context

    if prometheus_port is None and quiet:
        raise UserError(
            "--quiet without --prometheus-port would tell nobody anything. Expected a port, or no "
            "--quiet."
        )
    servers = _watched(
        url,
        metrics_url,
        engine=engine,
        model=model,
        tokenizer=tokenizer,
        any_tokenizer=any_tokenizer,
        token_cache=_token_cache(),
        api=_api(api),
        headers=_headers(header, api_key_file),
        tls=tls_context(ca_file, client_cert, client_key),
    )
    canary = _canary(probe, every, max_output_tokens)
    every_s = _seconds("--scrape-interval", scrape_interval)
    engines = _engines()

    async def watch(watchers: Sequence[Callable[[Any], None]], say: Callable[[str], None]) -> None:
        stop = asyncio.Event()
        with interrupts(stop.set):
            await monitor(servers, engines, watchers, stop, say, every_s=every_s, canary=canary)

    with _monitor_page(prometheus_port, prometheus_host) as (served, where):
        from reports.monitor_live import MonitorLive

        with MonitorLive(quiet=quiet) as live:
            if where:
                live.say(f"metrics at {where}")
            _run(watch([*served, live], live.say))


def _watched(
    urls: Sequence[str], metrics_urls: Sequence[str] | None, **common: Any
) -> dict[str, Attach]:
    """How to reach each server. UserError: a URL twice, or metrics pages that are not one a URL."""
    from loadgen.measure import Attach

    pages: Sequence[str | None] = metrics_urls or [None] * len(urls)
    if len(pages) != len(urls):
        raise UserError(
            f"{len(urls)} --url and {len(pages)} --metrics-url were given. Expected one "
            "--metrics-url for each --url, in the same order, or none."
        )
    found = {url: Attach(metrics_url=at, **common) for url, at in zip(urls, pages, strict=True)}
    if len(found) < len(urls):
        raise UserError("a --url was given twice. Expected every server once.")
    return found


def _canary(probe: str | None, every: str | None, max_output_tokens: int | None) -> Canary | None:
    """What --probe says. UserError: its flags without it, or prompts that cannot be sent."""
    from loadgen.monitor import PROBE_OUTPUT_TOKENS, Canary
    from scenarios import prompts as sets

    if probe is None:
        for flag, value in (("--every", every), ("--max-output-tokens", max_output_tokens)):
            if value is not None:
                raise UserError(
                    f"{flag} is of a probe. Expected --probe with it, such as --probe qualitative."
                )
        return None
    scenario = _changed(
        sets.scenario(probe), max_output_tokens=max_output_tokens or PROBE_OUTPUT_TOKENS
    )
    if _maker(scenario.dataset) is not None:
        raise UserError(
            f"--probe {probe}: its prompts are made for one target's tokenizer. Expected a "
            "scenario of texts, such as qualitative or smoke."
        )
    return Canary(
        scenario=scenario,
        prompts=sets.read(scenario.dataset).prompts,
        every_s=_seconds("--every", every or "60s"),
    )


@contextlib.contextmanager
def _monitor_page(port: int | None, host: str) -> Iterator[tuple[list[Callable[[Any], None]], str]]:
    """The watchers that export, and where. UserError: the port cannot be had."""
    import uuid

    from reports.exposition import Served
    from reports.monitor_page import MonitorPage

    if port is None:
        yield [], ""
        return
    with Served(host, port) as served:
        yield [MonitorPage(uuid.uuid4().hex[:12], served.show)], served.url


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

    width, left = min(_study([], []).width, 110), " " * 16
    for name in sets.names():
        scenario = sets.scenario(name)
        data, asked = scenario.dataset, scenario.sampling
        maker = _maker(data)
        made = sum(maker.counts(data).values()) if maker is not None else 0
        count = made or len(sets.read(data).prompts)
        loads = ", ".join(map(load_label, scenario.loads))
        print(
            textwrap.fill(
                scenario.description, width, initial_indent=f"{name:<16}", subsequent_indent=left
            )
        )
        print(
            f"{left}{count:,} prompts{f', --isl {data.isl_tokens},' if made else ''} at {loads}, "
            f"≤ {asked.max_output_tokens} tokens, T {asked.temperature:g}"
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

        names = (*builtin.SETS, *builtin.MADE)
        _print(listing([builtin.facts(name) for name in names], _study([], [])))


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


@datasets.command(short_help="Samples of a set, for a person to judge.")
def show(
    name: Annotated[str, typer.Argument(help="A set that draftload datasets lists.")],
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Folder or id, for throughput and random_control."),
    ] = None,
    isl: Isl = None,
    category: Annotated[
        list[str] | None, typer.Option("--category", help="Only this category, repeatable.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", help="Samples in all.")] = 9,
    chars: Annotated[int, typer.Option("--chars", help="Of the head and of the tail.")] = 700,
) -> None:
    """Samples of a set, of every category in turn: what each prompt begins and ends with.

    Examples: draftload datasets show qualitative --category rag ·
    draftload datasets show throughput --isl 8k --tokenizer FOLDER
    """
    from scenarios import builtin, diversity
    from scenarios import prompts as sets

    if name in builtin.MADE:
        asked = tuple(category or ())
        scenario = _changed(sets.scenario(name), isl=isl, limit=limit, categories=asked)
        for title, text in _made_samples(name, scenario.dataset, tokenizer):
            _sample(title, text, chars)
        return
    if isl is not None or tokenizer is not None:
        raise UserError(
            f"the texts of {name} need no tokenizer and have lengths of their own. Expected "
            f"--isl and --tokenizer with one of: {', '.join(builtin.MADE)}."
        )
    for prompt in sets.selected(builtin.read(name), tuple(category or ()), limit):
        about = (prompt.prompt_id, prompt.category, prompt.subcategory or "")
        _sample(" · ".join(filter(None, about)), diversity.text(prompt), chars)


def _made_samples(name: str, data: Dataset, tokenizer: str | None) -> Iterator[tuple[str, str]]:
    """(title, text) of prompts that are made for a tokenizer, decoded."""
    from loadgen.tokens import LocalTokenizer
    from loadgen.types import Message

    recipe = _recipe(data)
    if tokenizer is None or recipe is None:
        raise UserError(
            f"{name} is made for a tokenizer. Expected --tokenizer with a folder that holds "
            "tokenizer.json and tokenizer_config.json, or a model's id."
        )
    own = LocalTokenizer(tokenizer)
    rows = own.many([(Message(role="user", content=text),) for text in recipe.texts])
    prompts, note = recipe.build(rows)
    print(note, file=sys.stderr)
    for prompt in prompts:
        ids = prompt.prompt_token_ids or array("I")
        task = f" {prompt.subcategory}" if prompt.subcategory else ""
        yield f"{prompt.prompt_id}{task} · {len(ids):,} tokens", own.decode(ids)


def _sample(title: str, text: str, chars: int) -> None:
    if len(text) > 2 * chars:
        text = f"{text[:chars]}\n        ⋮\n{text[-chars:]}"
    print(f"── {_clean(title)}\n{_clean(text.expandtabs(4))}\n")


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

    known, recipe = _engines(), _recipe(scenario.dataset)
    asked = sets.PromptSet(prompts=()) if recipe is not None else sets.read(scenario.dataset)
    for caveat in asked.caveats:
        _say(quiet)(f"{caveat.code}: {caveat.message}")
    return Job(
        scenario=scenario,
        prompts=asked.prompts,
        recipe=recipe,
        caveats=asked.caveats,
        warmup=sets.warmup(),
        engines=known,
        out=out,
        say=_say(quiet),
        watch=lambda plan, info: Live(plan, label, info, known, quiet=quiet),
        tokenizing=lambda total: tokenizing(total, quiet=quiet),
        **options,
    )


def _prompts(dataset: Dataset) -> PromptSet:
    """The prompts; where they are made for a target's tokenizer, only which there will be."""
    from scenarios import prompts as sets

    maker = _maker(dataset)
    if maker is None:
        return sets.read(dataset)
    return sets.PromptSet(
        prompts=tuple(
            Prompt(prompt_id=f"{category}-{n}", category=category)
            for category, count in maker.counts(dataset).items()
            for n in range(count)
        )
    )


def _maker(dataset: Dataset) -> Any:
    """The module that makes the prompts, where no file holds them; else None."""
    from scenarios import random_control, throughput

    return {"throughput": throughput, "random": random_control}.get(dataset.kind)


def _recipe(dataset: Dataset) -> Recipe | None:
    maker = _maker(dataset)
    return None if maker is None else maker.recipe(dataset)


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
        print(_clean(line), file=sys.stderr)

    async with launch.launched(
        engine, config, start_timeout_s=wait_s, on_log=show if log else None, say=say
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


@contextlib.contextmanager
def _exported(port: int | None, host: str, linger: str | None) -> Iterator[tuple[Watch, ...]]:
    """What exports each run, its page served until the end, and on while it lingers.

    UserError: the port cannot be had, or --linger without one. What was interrupted or failed
    before its report does not linger; Ctrl-C ends the wait, and changes no exit code.
    """
    if port is None:
        if linger is not None:
            raise UserError(
                f"--linger {linger}: there is no metrics page to serve on. Expected "
                "--prometheus-port with it, such as --prometheus-port 9410."
            )
        yield ()
        return
    from reports.exposition import Served
    from reports.prometheus import Exporter

    linger_s = None if linger is None else _seconds("--linger", linger)
    with Served(host, port) as served:
        print(f"draftload: metrics at {served.url}", file=sys.stderr)

        def wait() -> None:
            with contextlib.suppress(KeyboardInterrupt):
                if linger_s is not None and not served.taken(0):
                    told = f"for {linger}, or until it was scraped; Ctrl-C ends it"
                    print(f"draftload: the metrics page stays {told}", file=sys.stderr)
                    served.taken(linger_s)

        try:
            yield (Exporter(_engines(), served.show).watch,)
        except typer.Exit as ended:
            if ended.exit_code != 130:
                wait()
            raise
        wait()


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
    from reports import as_json, as_paste, table

    summaries, files = _all_runs(paths)
    render = {"table": table.render, "json": as_json.render, "paste": as_paste.render}[format_name]
    _print(render(_study(summaries, files)))
    return summaries


def _compared(base: Path, spec: Sequence[Path], format_name: str, *, force: bool) -> list[Summary]:
    studies = _studies(base, spec, (), force=force, by=None)
    _print(_comparisons(studies, format_name))
    return [studies[0].summaries[0], *(study.summaries[1] for study in studies)]


def _studies(
    base: Path, spec: Sequence[Path], bounds: Sequence[Bound], *, force: bool, by: By | None
) -> list[Study]:
    """A study for each server config that is compared with the base."""
    from loadgen import sides

    first, others = _runs_at(base), [run for path in spec for run in _runs_at(path)]
    if not others and not base.is_dir():
        raise UserError(
            f"{base} is one run file: there is nothing to compare it with. Give the runs with "
            "speculation after it, or the folder of a sweep alone."
        )
    path_of = {run.info.run_id: path for path, run in (*first, *others)}
    runs, more = [run for _, run in first], [run for _, run in others]
    pairs = sides.sides(runs, more) if more else sides.swept(runs)
    return _compared_sides(pairs, path_of, bounds, force=force, by=by)


def _compared_sides(
    pairs: Sequence[Sides],
    path_of: Mapping[str, Path],
    bounds: Sequence[Bound],
    *,
    force: bool,
    by: By | None,
) -> list[Study]:
    from loadgen import sides
    from loadgen.breakeven import break_even
    from loadgen.compare import compare as paired
    from loadgen.gates import judge

    studies = []
    for pair in pairs:
        both = [sides.joined(side, force=force) for side in pair]
        found = paired(*both, force=force)
        paths = [path_of[name] for name in (*found.base_runs, *found.spec_runs)]
        studies.append(
            replace(
                _study(both, paths),
                comparison=found,
                break_even=break_even(found, by) if by is not None else None,
                judged=judge(found, bounds),
            )
        )
    return studies


def _all_runs(paths: Sequence[Path]) -> tuple[list[Summary], list[Path]]:
    """The runs of files and folders, with what only several tell, and each one's file."""
    from loadgen.checks import across

    found = [pair for path in paths for pair in _runs_at(path)]
    return [*across([run for _, run in found])], [file for file, _ in found]


def _runs_at(path: Path) -> list[tuple[Path, Summary]]:
    """A run file, or those of a folder that completed; the others are named on stderr."""
    if not path.is_dir():
        return [(path, _summary(path))]
    found = []
    for file in sorted(path.glob("*.jsonl")):
        try:
            run = _summary(file)
            why = "" if run.end == "completed" else f"{file}: {run.end or 'no end was recorded'}"
        except UserError as fault:
            why = str(fault)
        if why:
            print(f"draftload: left out: {_clean(why)}", file=sys.stderr)
        else:
            found.append((file, run))
    if not found:
        raise UserError(f"no completed run file in {path}. Expected *.jsonl, as a sweep writes.")
    return found


def _comparisons(studies: Sequence[Study], format_name: str) -> str:
    """A page a study, one under the other; as JSON one document."""
    from reports import as_json, as_markdown, breakeven
    from reports import compare as as_compare

    if format_name == "json":
        return as_json.together(studies)
    table = as_compare if studies[0].break_even is None else breakeven
    render = {"table": table.render, "markdown": as_markdown.render}[format_name]
    return "\n".join(render(study) for study in studies)


def _is_control(path: Path) -> bool:
    from loadgen.misstatement import is_control
    from loadgen.store import read

    return path.is_file() and is_control(read(path).info)


def _misstated(paths: Sequence[Path], format_name: str, *, force: bool) -> None:
    """A random control and real text, in either order."""
    from loadgen.misstatement import is_control, misstatement
    from reports import as_json
    from reports import misstatement as as_text

    _format(format_name)
    runs = [_summary(path) for path in paths]
    (control, a), (real, b) = sorted(
        zip(runs, paths, strict=True), key=lambda pair: not is_control(pair[0].info)
    )
    study = _study([control, real], [a, b])
    render = {"table": as_text.render, "json": as_json.render}[format_name]
    _print(render(replace(study, misstatement=misstatement(control, real, force=force))))


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
    open_loads: tuple[OpenLoop, ...] | None = None,
    requests: int | None = None,
    duration: str | None = None,
    ramp: str | None = None,
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
    isl: str | None = None,
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
    if isl is not None and data.kind not in ("throughput", "random"):
        raise UserError(
            f"--isl {isl}: the prompts of scenario {scenario.name} have lengths of their own. "
            "Expected --scenario throughput or random_control with it."
        )
    return put(
        scenario,
        **kept(
            dataset=put(
                data,
                **kept(
                    categories=categories or None,
                    limit=limit,
                    skip_placeholders=skip_placeholders or None,
                    isl_tokens=_length(isl),
                    skip_too_long=skip_too_long or None,
                ),
            ),
            loads=open_loads or _loads(concurrency),
            stop=put(
                scenario.stop,
                **kept(
                    requests=requests,
                    duration_s=None if duration is None else _seconds("--duration", duration),
                    ramp_s=None if ramp is None else _seconds("--ramp", ramp),
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


def _length(text: str | None) -> int | None:
    """`1k`, `1000` → tokens: 1k is 1,000."""
    if text is None:
        return None
    number = text.lower().removesuffix("k")
    if not number.isdecimal() or not 0 < int(number) <= 10**7:
        raise UserError(f"--isl {text} is no length. Expected tokens, such as 1k, 8k, 32k or 1500.")
    return int(number) * (1000 if number != text.lower() else 1)


def _open_loads(
    rate: str | None,
    arrivals: str | None,
    burstiness: float | None,
    max_in_flight: int | None,
    concurrency: str | None,
) -> tuple[OpenLoop, ...] | None:
    """Of --rate and its flags; a burstiness alone means gamma arrivals."""
    shape = {"arrivals": arrivals, "burstiness": burstiness, "max_in_flight": max_in_flight}
    given = {name: value for name, value in shape.items() if value is not None}
    if rate is None:
        for name in given:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} is of an open loop. Expected --rate with it, such as --rate 4."
            )
        return None
    if concurrency is not None:
        raise UserError(
            f"-c {concurrency} and --rate {rate} exclude each other: a closed loop waits for "
            "answers, an open loop does not. Give one; measure the other in a run of its own."
        )
    if burstiness is not None and arrivals is None:
        given["arrivals"] = "gamma"
    try:
        rates = [float(word) for word in rate.split(",") if word.strip()]
        row = [{"kind": "open", "request_rate_rps": r, **given} for r in dict.fromkeys(rates)]
        loads = msgspec.convert(row, tuple[OpenLoop, ...])
    except msgspec.ValidationError as fault:
        said, _, place = str(fault).partition(" - at ")
        name = place.strip("`").rpartition(".")[2]
        flag = "--" + name.replace("_", "-") if name in given else "--rate"
        raise UserError(f"{flag} {given.get(name, rate)} makes no sense. {said}.") from None
    except ValueError:
        loads = ()
    if not loads:
        raise UserError(f"--rate {rate} is no rate. Expected dialogues a second, such as 2,4,8.")
    return loads


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


def _by(name: str) -> By:
    known: tuple[By, ...] = ("category", "tier", "isl_bucket")
    for rows in known:
        if name == rows:
            return rows
    hint = nearest(name, known) or "."
    raise UserError(f"unknown rows --by {name}{hint} Expected {', '.join(known)}.")


def _format(name: str, *more: str) -> None:
    *most, last = ("table", "json", *more)
    if name not in (*most, last):
        raise UserError(f"unknown format '{name}'. Expected {', '.join(most)} or {last}.")


def _pasted(format_name: str, paste: bool) -> str:
    """What --format and --paste ask for."""
    _format(format_name)
    if paste and format_name != "table":
        raise UserError(f"--paste and --format {format_name} exclude each other; give one.")
    return "paste" if paste else format_name


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
            print(_clean(line), file=sys.stderr)

    return say


def _clean(text: str) -> str:
    """The text without terminal control, as lines."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def _yes(value: bool | None) -> str:
    return "–" if value is None else "yes" if value else "no"


def _as_ctrl_c(_: int, frame: FrameType | None) -> None:
    """SIGTERM is a Ctrl-C: servers are stopped, files closed, the terminal is put right. Within the
    loop that is asyncio's handler, which cancels: what is raised there hits any callback."""
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    if not callable(on_ctrl_c):  # ignored, as in a shell's background
        raise KeyboardInterrupt
    on_ctrl_c(signal.SIGINT, frame)


def main() -> None:
    """The console script: errors become one paragraph on stderr and an exit code."""
    signal.signal(signal.SIGTERM, _as_ctrl_c)
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
