"""MATRIX.toml → the cells of a sweep: servers × scenarios × loads × repeats, in running order.

Repeats go round all servers, one after the other, so that a drift of the machine falls on every
server alike and a Student-t over the repeats is honest; loads run backwards on odd repeats. Paths
in a matrix are seen from its own folder. The baseline is part of every matrix unless it is refused.
Must not: know where scenarios and engines come from (both are passed in), start anything.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from loadgen.errors import UserError, nearest
from loadgen.plan import make_plan, phase_name, remembering
from loadgen.tokens import prompts_digest
from loadgen.types import (
    AtLeastOne,
    Cell,
    ClosedLoop,
    Dataset,
    Engine,
    Load,
    Matrix,
    Prompt,
    Scenario,
    ServerConfig,
    SweepServer,
    Written,
)
from loadgen.written import is_secret, line_of, masked, parse_toml, read_text, read_toml

REPEATS = 3
"""The fewest over which an interval of the repeats says something."""
ANY_PORT = 8000
"""Stands for the port while a config is only looked at."""

Name = Annotated[str, Meta(pattern=r"^[^\s][^\n\r\t]{0,59}\Z")]


class ServerEntry(Written, frozen=True, kw_only=True):
    """One [[servers]]: `url`, or `file` of a server config, or the config itself as a table.

    What stands below `config` is for a `url`, but for `tokenizer` and `api`.
    """

    name: Name | None = None
    url: str | None = None
    file: str | None = None
    config: ServerConfig | None = None
    engine: str | None = None
    model: str | None = None
    metrics_url: str | None = None
    gpus: AtLeastOne | None = None
    tokenizer: str | None = None
    api: Literal["completions", "chat"] = "completions"


class ScenarioEntry(Written, frozen=True, kw_only=True):
    """One [[scenarios]]: a scenario's name or file, and what is other than there."""

    scenario: str = "qualitative"
    name: Name | None = None
    concurrency: tuple[Annotated[int, Meta(ge=1, le=1 << 16)], ...] | None = None
    loads: tuple[Load, ...] | None = None
    requests: AtLeastOne | None = None
    duration_s: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    warmup_requests: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    max_output_tokens: AtLeastOne | None = None
    temperature: Annotated[float, Meta(ge=0, le=10)] | None = None
    seed: int | None = None
    ignore_eos: bool | None = None
    dataset: str | None = None
    categories: tuple[str, ...] | None = None
    limit: AtLeastOne | None = None


class MatrixFile(Written, frozen=True, kw_only=True):
    """MATRIX.toml. `baseline`: true finds it, a name says which server it is, false refuses it."""

    name: Name | None = None
    repeats: Annotated[int, Meta(ge=1, le=1000)] = REPEATS
    baseline: bool | str = True
    servers: tuple[ServerEntry, ...] = ()
    scenarios: tuple[ScenarioEntry, ...] = ()


@dataclass(frozen=True)
class _Source:
    """Where a matrix was read, for messages and for what it points to."""

    path: Path
    text: str

    def fault(self, why: str, place: str = "", key: str = "") -> UserError:
        return UserError(f"{self.path}, line {line_of(self.text, place, key)}: {why}")

    def beside(self, name: str) -> Path:
        return self.path.parent / name


def read(
    path: Path,
    named: Callable[[str], Scenario],
    engines: Mapping[str, Engine],
    *,
    repeats: int | None = None,
) -> Matrix:
    """The matrix. `named` gives a scenario by name or path; `repeats` is instead of the file's.

    UserError, naming file and line: an unknown key or name, a missing file, nothing to sweep over.
    """
    source = _Source(path, read_text(path))
    asked = parse_toml(source.text, path, MatrixFile)
    for what, entries in (("servers", asked.servers), ("scenarios", asked.scenarios)):
        if not entries:
            raise source.fault(
                f"the sweep is empty: no {what}. Expected at least one [[{what}]].", "", what
            )
    servers = tuple(
        _server(source, entry, f"servers[{n}]", engines) for n, entry in enumerate(asked.servers)
    )
    scenarios = tuple(
        _scenario(source, entry, f"scenarios[{n}]", named)
        for n, entry in enumerate(asked.scenarios)
    )
    _told_apart(source, "servers", [server.name for server in servers])
    _told_apart(source, "scenarios", [scenario.name for scenario in scenarios])
    servers, baseline = _with_baseline(source, asked.baseline, servers)
    return Matrix(
        name=asked.name or path.stem,
        servers=servers,
        scenarios=scenarios,
        repeats=repeats or asked.repeats,
        baseline=baseline,
    )


# ── servers ──────────────────────────────────────────────────────────────────────────────────────


def _server(
    source: _Source, entry: ServerEntry, place: str, engines: Mapping[str, Engine]
) -> SweepServer:
    given = [key for key in ("url", "file", "config") if getattr(entry, key) is not None]
    if len(given) != 1:
        raise source.fault(
            f"a server has {' and '.join(given) or 'none of url, file and config'}. Expected one: "
            "url of a running server, file of a server config, or a [servers.config] table.",
            place,
            given[-1] if given else "",
        )
    if entry.url is not None:
        return _attached(source, entry, place)
    for key in ("engine", "model", "metrics_url", "gpus"):
        if getattr(entry, key) is not None:
            raise source.fault(
                f"'{key}' is for a server with a url. Expected it in the config.", place, key
            )
    config = entry.config
    if entry.file is not None:
        if not source.beside(entry.file).is_file():
            raise source.fault(
                f"there is no file {entry.file}, seen from {source.path.parent}. Expected a server "
                "config such as those in servers/configs.",
                place,
                "file",
            )
        config = read_toml(source.beside(entry.file), ServerConfig)
    at = f"{place}.{given[0]}"
    engine = _startable(source, config, at, engines) if config is not None else None
    spec = config.spec if config is not None else None
    method = spec.method if spec is not None else "none"
    return SweepServer(
        name=entry.name or (config.name if config is not None else None) or method,
        config=config,
        fresh=engine is not None and spec is not None and remembering(engine, spec),
        tokenizer=entry.tokenizer,
        api=entry.api,
    )


def _attached(source: _Source, entry: ServerEntry, place: str) -> SweepServer:
    if entry.name is None:
        raise source.fault(
            f"the server at {entry.url} has no name. Expected name = …, as a URL does not tell "
            "which speculative config it is.",
            place,
            "url",
        )
    return SweepServer(
        name=entry.name,
        url=entry.url,
        engine=entry.engine,
        model=entry.model,
        metrics_url=entry.metrics_url,
        gpus=entry.gpus,
        tokenizer=entry.tokenizer,
        api=entry.api,
    )


def _startable(
    source: _Source, config: ServerConfig, place: str, engines: Mapping[str, Engine]
) -> Engine:
    """The config's engine, which can make a command of it."""
    engine = engines.get(config.engine)
    if engine is None:
        hint = nearest(config.engine, engines) or "."
        known = ", ".join(engines)
        raise source.fault(f"unknown engine '{config.engine}'{hint} Known: {known}.", place)
    if engine.command is None:
        raise source.fault(
            f"engine '{engine.name}' cannot be started by draftload; give the url of a running "
            "server instead.",
            place,
        )
    try:
        engine.command(config, config.port or ANY_PORT)
        engine.files(config)
    except UserError as fault:
        raise source.fault(str(fault), place) from None
    return engine


def _with_baseline(
    source: _Source, asked: bool | str, servers: tuple[SweepServer, ...]
) -> tuple[tuple[SweepServer, ...], str | None]:
    """The servers, a baseline among them, and its name; None where it is refused."""
    names = [server.name for server in servers]
    if asked is False:
        return servers, None
    if isinstance(asked, str):
        if asked not in names:
            hint = nearest(asked, names) or "."
            raise source.fault(
                f"baseline '{asked}' is no server of this matrix{hint} There are: "
                f"{', '.join(names)}.",
                "",
                "baseline",
            )
        return servers, asked
    launched = [server for server in servers if server.config is not None]
    plain = [s.name for s in launched if s.config is not None and s.config.spec is None]
    if len(plain) == 1:
        return servers, plain[0]
    kinds = {(s.config.engine, s.config.model) for s in launched if s.config is not None}
    if plain or len(kinds) != 1:
        found = f"{len(plain)} servers without [spec]" if plain else "no server known to be without"
        raise source.fault(
            f"which server is the baseline, that runs without speculation? There is {found}. "
            "Expected baseline = the name of one, or baseline = false to do without.",
            *(("", "baseline") if re.search(r"(?m)^baseline\b", source.text) else ("servers[0]",)),
        )
    first = launched[0]
    config = msgspec.structs.replace(first.config, spec=None, name=None)  # type: ignore[type-var]
    name = "none" if "none" not in names else "baseline"
    return (replace(first, name=name, config=config, fresh=False), *servers), name


# ── scenarios ────────────────────────────────────────────────────────────────────────────────────


def _scenario(
    source: _Source, entry: ScenarioEntry, place: str, named: Callable[[str], Scenario]
) -> Scenario:
    is_path = entry.scenario.endswith(".toml") or "/" in entry.scenario
    try:
        found = named(str(source.beside(entry.scenario)) if is_path else entry.scenario)
    except UserError as fault:
        raise source.fault(str(fault), place, "scenario") from None
    if entry.concurrency is not None and entry.loads is not None:
        raise source.fault("concurrency and loads are both given; expected one.", place, "loads")
    loads = entry.loads
    if entry.concurrency is not None:
        loads = tuple(ClosedLoop(concurrency=number) for number in entry.concurrency)
    if loads == ():
        key = "loads" if entry.concurrency is None else "concurrency"
        raise source.fault("the sweep is empty: no load. Expected such as [1, 8, 64].", place, key)
    if entry.dataset is not None and not source.beside(entry.dataset).is_file():
        raise source.fault(
            f"there is no file {entry.dataset}, seen from {source.path.parent}. Expected prompts: "
            "JSONL, JSON or parquet.",
            place,
            "dataset",
        )
    put = msgspec.structs.replace
    data = found.dataset
    if entry.dataset is not None:
        data = Dataset(kind="jsonl", path=str(source.beside(entry.dataset)), seed=data.seed)
    return put(
        found,
        name=entry.name or found.name,
        repeats=1,
        loads=tuple(dict.fromkeys(loads or found.loads)),
        dataset=put(data, **_given(entry, "categories", "limit")),
        stop=put(found.stop, **_given(entry, "requests", "duration_s")),
        sampling=put(
            found.sampling,
            **_given(entry, "max_output_tokens", "temperature", "seed", "ignore_eos"),
        ),
        **_given(entry, "warmup_requests"),
    )


def _given(entry: ScenarioEntry, *keys: str) -> dict[str, Any]:
    return {key: value for key in keys if (value := getattr(entry, key)) is not None}


def _told_apart(source: _Source, what: str, names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            last = len(names) - 1 - names[::-1].index(name)
            raise source.fault(
                f"{count} {what} are called '{name}'. Expected each to have a name of its own: "
                "give name = ….",
                f"{what}[{last}]",
                "name",
            )


# ── cells ────────────────────────────────────────────────────────────────────────────────────────


def cells(matrix: Matrix, prompts: Mapping[str, Sequence[Prompt]]) -> tuple[Cell, ...]:
    """All cells in running order. `prompts` by scenario name.

    UserError: a cell cannot be planned, as where a drafter that remembers needs more prompts.
    """
    found: dict[tuple[str, str, Load], Cell] = {}
    for server, scenario in itertools.product(matrix.servers, matrix.scenarios):
        asked = prompts[scenario.name]
        for load in scenario.loads:
            alone = msgspec.structs.replace(scenario, loads=(load,))
            try:
                make_plan(alone, asked, remembers=server.fresh)
            except UserError as fault:
                raise UserError(f"{server.name}, {phase_name(load)}: {fault}") from None
            found[server.name, scenario.name, load] = Cell(
                name="", server=server, scenario=alone, repeat=0, sha256=_sha(server, alone, asked)
            )
    ordered = []
    for repeat in range(matrix.repeats):
        for server, scenario in itertools.product(matrix.servers, matrix.scenarios):
            for load in scenario.loads[:: -1 if repeat % 2 else 1]:
                name = f"{server.name} {scenario.name} {phase_name(load)} r={repeat + 1}"
                cell = found[server.name, scenario.name, load]
                ordered.append(replace(cell, name=name, repeat=repeat))
    return tuple(ordered)


def _sha(server: SweepServer, scenario: Scenario, prompts: Sequence[Prompt]) -> str:
    """Of all that decides what is measured; no secret and no path goes into it."""
    config = server.config
    if config is not None:
        env = {name: "" if is_secret(name) else value for name, value in config.env.items()}
        hidden = masked(config.extra_args)
        config = msgspec.structs.replace(config, name=None, env=env, extra_args=hidden)
    url = re.sub(r"//[^/@]*@", "//", server.url) if server.url is not None else None
    data = msgspec.structs.replace(scenario.dataset, path=None)
    scenario = msgspec.structs.replace(scenario, description="", slo=(), dataset=data)
    facts = (replace(server, name="", url=url, config=config), scenario)
    digest = hashlib.sha256(msgspec.json.encode(facts, order="sorted"))
    digest.update(prompts_digest(prompts, server.api).encode())
    return digest.hexdigest()


def config_differences(base: SweepServer, server: SweepServer) -> tuple[str, ...]:
    """What else differs between two servers to launch, as far as their configs tell; () else."""
    if base.config is None or server.config is None:
        return ()
    before, after = (_shown(s.config) for s in (base, server) if s.config is not None)
    facts = [(key.replace("_", " "), before[key], after[key]) for key in before]
    return tuple(f"{key}: {a or '–'} → {b or '–'}" for key, a, b in facts if a != b)


def _shown(config: ServerConfig) -> dict[str, Any]:
    env = (f"{key}={'***' if is_secret(key) else value}" for key, value in config.env.items())
    fields = ("engine", "model", "tensor_parallel", "gpus", "max_running", "max_model_len")
    return {
        **{field: getattr(config, field) for field in fields},
        "executable": " ".join(config.executable),
        "extra_args": " ".join(masked(config.extra_args)),
        "env": " ".join(sorted(env)),
    }
