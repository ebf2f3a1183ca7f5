"""One run, from a URL to a closed run file: preflight, plan, phases, RunEnd.

What `run`, `demo` and a sweep's cell share. The engines, the prompts and what shows progress are
passed in. Whatever happens in between, the run file is closed with the reason for its end. Must
not: import servers, scenarios or reports, print a report.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import platform
import signal
import ssl
import uuid
from array import array
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Literal

import aiohttp
import msgspec

from loadgen import __version__, preflight
from loadgen.errors import DraftloadError, UserError
from loadgen.plan import by_category, make_plan, remembering
from loadgen.protocol import without_folder
from loadgen.runner import Runner, Tokenize, fan_out
from loadgen.store import Store, begun
from loadgen.tokens import prompts_digest
from loadgen.types import (
    U32,
    Caveat,
    Cell,
    ClientInfo,
    Engine,
    Message,
    Observer,
    Plan,
    Prompt,
    PromptRecord,
    Recipe,
    RunEnd,
    RunInfo,
    Scenario,
    ServerConfig,
)
from loadgen.written import masked, most_in_flight

TEXT_CUT = 2000
"""Characters of a prompt's text in a run file, unless all or none are asked for."""
LONGEST_PAD = 64
"""Characters, or ids, of a piece that pads: SPEED-Bench's "Answer now please.\\n" has 19."""
PAD_TIMES = 4
"""How often it must stand: a rule of dashes or a shout is no padding."""
PAD_SHORTEST = 64
"""Characters of padding in all, a quarter of it in ids."""
TEMPLATE_END = 16
"""Ids of a chat template's end, which may follow the padding of a prompt given as ids."""


@dataclass(frozen=True, kw_only=True)
class Attach:
    """How to reach a server, and how to tokenize for it. `headers` are secret: they never enter a
    record. `any_tokenizer`: even one that is not the model's. `token_cache`: a folder for its ids.
    """

    engine: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    any_tokenizer: bool = False
    token_cache: Path | None = None
    api: Literal["completions", "chat"] = "completions"
    metrics_url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    tls: ssl.SSLContext | bool = True
    gpus: int | None = None
    probe: bool = True
    timeout_s: float = 600.0
    grace_s: float = 30.0


Watch = Callable[[Plan, RunInfo], AbstractContextManager[Observer]]
"""Makes an observer of a run, which is left when the run is over."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to measure, and where to write it. `watch` shows progress, `also` are other observers;
    `tokenizing`, given how many prompts there are, is told how many have their ids.

    `recipe` makes the prompts in place of `prompts`, once the target's tokenizer is known.
    `caveats` are what is to be said of the prompts. `cell`: of a sweep, whose scenario this is.
    """

    scenario: Scenario
    prompts: tuple[Prompt, ...]
    warmup: tuple[Prompt, ...]
    engines: Mapping[str, Engine]
    out: Path
    say: Callable[[str], None]
    watch: Watch
    tokenizing: Callable[[int], AbstractContextManager[Callable[[int], None]]] = lambda total: (
        contextlib.nullcontext(lambda count: None)
    )
    also: tuple[Watch, ...] = ()
    caveats: tuple[Caveat, ...] = ()
    attach: Attach = Attach()
    recipe: Recipe | None = None
    text: Literal["cut", "all", "none"] = "cut"
    cell: Cell | None = None


async def measure(
    url: str,
    job: Job,
    config: ServerConfig | None = None,
    died: Callable[[], Awaitable[str]] | None = None,
) -> tuple[Path, str]:
    """The run file and RunEnd's reason. `config` is what was launched at `url`, if we did that.

    died() waits until that server's process ends, and says how; then the run ends too. UserError
    before any measured request; a failed request is only a record.
    """
    scenario = job.scenario
    for load in scenario.loads:
        preflight.check_descriptors(most_in_flight(load))
    target = await identified(url, job.attach, job.engines, config)
    prompts, warmup, tokenize, probe_ids = await _pretokenized(target, job)
    preflight.check_vocabulary(prompts, target.info)
    prompts, skipped = preflight.fitting(
        prompts,
        target.info,
        scenario.sampling.max_output_tokens,
        skip=scenario.dataset.skip_too_long,
    )
    for caveat in skipped:
        job.say(f"{caveat.code}: {caveat.message}")
    if job.attach.probe:
        target = await preflight.probe(target, probe_ids, scenario.templating.args)
    spec = config.spec if config is not None else None
    remembers = spec is not None and remembering(target.engine, spec)
    repeat = job.cell.repeat if job.cell is not None else 0
    plan = make_plan(scenario, prompts, warmup, remembers=remembers, first_repeat=repeat)
    alone = preflight.categories_apart(target)
    plan = by_category(plan) if alone else plan
    told = (*skipped, *preflight.unchecked(tokenize), *alone, *_reminder(remembers, plan))
    info = run_info(scenario, target, plan, (*job.caveats, *told), job.cell)
    store = begun(job.out, info)
    with contextlib.ExitStack() as watching:
        views = [watching.enter_context(watch(plan, info)) for watch in (job.watch, *job.also)]
        observe = fan_out(store.append, tuple(views))
        reason = await _recorded(target, job, plan, tokenize, observe, store, died)
    return store.path, reason


async def identified(
    url: str, attach: Attach, engines: Mapping[str, Engine], config: ServerConfig | None = None
) -> preflight.Target:
    """preflight.identify with the flags of `attach`."""
    return await preflight.identify(
        url,
        engines,
        engine=config.engine if config is not None else attach.engine,
        model=attach.model,
        api=attach.api,
        metrics_url=attach.metrics_url,
        headers=attach.headers,
        tls=attach.tls,
        config=config,
        gpus=attach.gpus,
    )


async def _pretokenized(
    target: preflight.Target, job: Job
) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...], Tokenize | None, U32 | None]:
    """Prompts and warm-up with ids, what makes later turns' ids, and ids for the probe."""
    if job.recipe is not None:
        return await _made(target, job, job.recipe)
    if target.info.api == "chat":
        if not all(p.messages for p in job.prompts):
            raise UserError("--api chat needs texts, and some prompts are token ids only.")
        if not job.scenario.templating.apply:
            raise UserError("--api chat has the server apply its template. Drop --no-template.")
        return job.prompts, job.warmup, None, None
    if job.prompts and all(p.prompt_token_ids is not None for p in job.prompts):
        return job.prompts, (), None, preflight.probe_ids(job.prompts)
    tokenize = await _tokenizer(target, job)
    with job.tokenizing(len(job.prompts)) as done:
        prompts = await preflight.tokenized(job.prompts, tokenize, done)
    probed, *warmup = await preflight.tokenized((preflight.PROBED, *job.warmup), tokenize)
    return prompts, tuple(warmup), tokenize, probed.prompt_token_ids


async def _tokenizer(target: preflight.Target, job: Job) -> Tokenize:
    return await preflight.tokenizer(
        target,
        job.attach.tokenizer,
        job.scenario.templating,
        cache=job.attach.token_cache,
        check=job.attach.probe and not job.attach.any_tokenizer,
    )


async def _made(
    target: preflight.Target, job: Job, recipe: Recipe
) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...], Tokenize | None, U32 | None]:
    """_pretokenized for prompts of an exact length; they warm up on their own ids reversed."""
    if target.info.api == "chat":
        raise UserError(
            f"scenario {job.scenario.name} sends token ids, so that every prompt has its exact "
            "length, and --api chat takes only text. Use --api completions, or another scenario."
        )
    tokenize = await _tokenizer(target, job)
    asked = [
        Prompt(prompt_id=str(n), category="", messages=(Message(role="user", content=text),))
        for n, text in enumerate(recipe.texts)
    ]
    with job.tokenizing(len(asked)) as done:
        *rows, probed = await preflight.tokenized((*asked, preflight.PROBED), tokenize, done)
    prompts, note = recipe.build([p.prompt_token_ids or array("I") for p in rows])
    job.say(note)
    if job.scenario.dataset.kind == "random" and job.text != "none":
        prompts = await preflight.with_texts(target, job.attach.tokenizer, prompts)
    return prompts, (), None, probed.prompt_token_ids


async def _recorded(
    target: preflight.Target,
    job: Job,
    plan: Plan,
    tokenize: Tokenize | None,
    observe: Observer,
    store: Store,
    died: Callable[[], Awaitable[str]] | None,
) -> str:
    """All phases; RunEnd is written and the file closed whatever happens."""
    zero = perf_counter()
    reason = "failed"
    try:
        for record in prompt_records(plan.prompts, job.text):
            observe(record)
        async with target.transport(
            timeout_s=job.attach.timeout_s, keep_text=job.text != "none", zero=zero
        ) as transport:
            runner = Runner(
                transport,
                target.scraper(observe, zero),
                observe,
                model=target.info.model,
                sampling=plan.scenario.sampling,
                tokenize=tokenize,
                templating=plan.scenario.templating,
                grace_s=job.attach.grace_s,
            )
            with interrupts(runner.interrupt), _watched(runner, observe, died):
                reason = await runner.run(plan)
    except BaseException as fault:
        reason = target.hidden(f"failed: {type(fault).__name__}: {fault}")[:300]
        raise
    finally:
        with contextlib.suppress(DraftloadError):
            store.append(RunEnd(at_s=perf_counter() - zero, reason=reason))
        store.close()
    return reason


@contextlib.contextmanager
def _watched(
    runner: Runner, observe: Observer, died: Callable[[], Awaitable[str]] | None
) -> Iterator[None]:
    """Ends the run when the server that we started ends, and records what it said last."""

    async def wait(ended: Callable[[], Awaitable[str]]) -> None:
        said = await ended()
        observe(
            Caveat(
                code="server-died",
                message=said,
                advice="Figures are of the requests that completed before. Read the server's last "
                "lines, mend its config, and run again.",
            )
        )
        runner.fail("the server died during the run")

    task = None if died is None else asyncio.create_task(wait(died))
    try:
        yield
    finally:
        if task is not None:
            task.cancel()


@contextlib.contextmanager
def interrupts(handler: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `handler` instead of ending the process."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _reminder(remembers: bool, plan: Plan) -> tuple[Caveat, ...]:
    measured = sum(phase.measured for phase in plan.phases)
    if not remembers or measured < 2:
        return ()
    return (
        Caveat(
            code="drafter-remembers",
            message=f"This drafter learns from earlier requests, and {measured} phases sent the "
            "same prompts to one server: later phases are flattered.",
            advice="Measure each load on a fresh server, or with prompts not sent before.",
        ),
    )


def run_info(
    scenario: Scenario,
    target: preflight.Target,
    plan: Plan,
    caveats: tuple[Caveat, ...] = (),
    cell: Cell | None = None,
) -> RunInfo:
    """The first line of the run file: no path, no header, no address but the server's."""
    # A llama-server without an alias names its model by the file's path.
    server = msgspec.structs.replace(target.info, model=without_folder(target.info.model))
    if server.config is not None:
        server = msgspec.structs.replace(server, config=_without_paths(server.config))
    spec = server.config.spec if server.config is not None else None
    if scenario.dataset.path is not None:
        data = msgspec.structs.replace(scenario.dataset, path=Path(scenario.dataset.path).name)
        scenario = msgspec.structs.replace(scenario, dataset=data)
    method = spec.method if spec is not None else None if server.config is None else "none"
    return RunInfo(
        run_id=uuid.uuid4().hex[:12],
        cell=cell.name if cell is not None else method,
        cell_sha256=cell.sha256 if cell is not None else None,
        started_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        scenario=scenario,
        server=server,
        client=ClientInfo(
            draftload=__version__,
            python=platform.python_version(),
            aiohttp=aiohttp.__version__,
            loop=type(asyncio.get_running_loop()).__module__.partition(".")[0],
            cores=os.cpu_count() or 1,
            machine=f"{platform.system()} {platform.machine()}",
        ),
        prompts_sha256=prompts_digest(plan.prompts, server.api, scenario.templating),
        caveats=(*target.caveats, *caveats),
    )


def _without_paths(config: ServerConfig) -> ServerConfig:
    """What was launched is a fact of the run; where its files lie, and its environment, are not."""
    spec = config.spec
    if spec is not None and spec.draft_model is not None:
        spec = msgspec.structs.replace(spec, draft_model=without_folder(spec.draft_model))
    return msgspec.structs.replace(
        config,
        model=without_folder(config.model),
        spec=spec,
        executable=tuple(Path(word).name for word in masked(config.executable)),
        extra_args=masked(config.extra_args),
        env={},
        files_dir=None,
    )


def prompt_records(
    prompts: Sequence[Prompt], text: Literal["cut", "all", "none"]
) -> Iterator[PromptRecord]:
    """Each prompt once; its text cut, whole or left out. Random ids' text is never cut: answers
    to it can only be judged beside all of it."""
    for prompt in prompts:
        said = "\n\n".join([m.content for m in prompt.messages] + list(prompt.later_turns))
        ids = prompt.prompt_token_ids
        kept = {"cut": prompt.text or said[:TEXT_CUT], "all": prompt.text or said, "none": ""}[text]
        yield PromptRecord(
            prompt_id=prompt.prompt_id,
            category=prompt.category,
            subcategory=prompt.subcategory,
            tier=prompt.tier,
            isl_bucket=prompt.isl_bucket,
            isl_tokens=None if ids is None else len(ids),
            turns=1 + len(prompt.later_turns),
            padded=padded(prompt),
            sha256=hashlib.sha256(said.encode() if ids is None else ids.tobytes()).hexdigest(),
            text=kept or None,
        )


def padded(prompt: Prompt) -> float:
    """The share of the first turn that is one short piece over and over, at an end of it."""
    if prompt.messages:
        said = prompt.messages[-1].content.rstrip()
        return _repeated(said, PAD_SHORTEST) / max(len(said), 1)
    ids = prompt.prompt_token_ids or array("I")
    ends = [ids[: len(ids) - skip] for skip in range(min(TEMPLATE_END, len(ids)))]
    found = max(_repeated(some, PAD_SHORTEST // 4) for some in (ids[::-1], *ends))
    return found / max(len(ids), 1)


def _repeated(said: str | U32, shortest: int) -> int:
    """How many items at the end are copies of one piece, itself included; 0: too few of them."""
    for period in range(1, min(LONGEST_PAD, len(said) // PAD_TIMES) + 1):
        at = len(said) - 1
        while at >= period and said[at] == said[at - period]:
            at -= 1
        length = len(said) - 1 - at + period
        if length >= max(PAD_TIMES * period, shortest):
            return length
    return 0
