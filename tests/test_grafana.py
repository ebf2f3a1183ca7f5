"""The boards, the rules and the stack: their form, and every expression against a real Prometheus.

The Prometheus (Debian's package `prometheus`) scrapes a closed and an open loop run, a monitor with
two simulated servers, and pages that a real vLLM once gave. Where it is not installed those tests
say so and skip.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from reports.exposition import Served
from reports.grafana.boards import boards
from servers import simulator

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "reports" / "grafana"
DATA = ROOT / "tests" / "data"
PATIENCE_S = 60.0
BOARDS: dict[str, dict[str, Any]] = {
    name: json.loads((HERE / f"{name}.json").read_text("utf-8")) for name in ("run", "monitor")
}


def read_yaml(name: str) -> Any:
    return yaml.safe_load((HERE / name).read_text("utf-8"))


def panels(board: str) -> list[dict[str, Any]]:
    return [panel for panel in BOARDS[board]["panels"] if panel["type"] != "row"]


EVERY_PANEL = [
    pytest.param(board, panel, id=f"{board}-{panel['title']}")
    for board in BOARDS
    for panel in panels(board)
]
EVERY_QUERY = [
    pytest.param(board, target, id=f"{board}-{panel['title']}-{target['refId']}")
    for board in BOARDS
    for panel in panels(board)
    for target in panel["targets"]
]
EVERY_VARIABLE = [
    pytest.param(board, variable, id=f"{board}-{variable['name']}")
    for board in BOARDS
    for variable in BOARDS[board]["templating"]["list"]
    if variable["type"] == "query"
]
RULES = [rule for group in read_yaml("alerts.yml")["groups"] for rule in group["rules"]]


def operands(rule: dict[str, Any]) -> list[str]:
    """What a rule compares or joins at the margin; with a comparison that keeps every series."""
    joined = re.split(r"^(?:and|or|unless) ", rule["expr"], flags=re.MULTILINE)
    return [re.sub(r"(^\s*| )(<|>|==) ", r"\1\2 bool ", one, flags=re.MULTILINE) for one in joined]


EVERY_OPERAND = [
    pytest.param(expr, id=f"{rule.get('alert', rule.get('record'))}-{i}")
    for rule in RULES
    for i, expr in enumerate(operands(rule))
]


# ── form ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_board_is_what_boards_py_makes(name: str) -> None:
    made, kept = boards()[f"{name}.json"], (HERE / f"{name}.json").read_text("utf-8")
    assert kept == made, "run: python -P -m reports.grafana.boards"


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_board_imports_without_edits(name: str) -> None:
    board = BOARDS[name]
    assert board["id"] is None
    assert board["schemaVersion"] == 39
    (asked,) = board["__inputs"]
    assert (asked["type"], asked["pluginId"]) == ("datasource", "prometheus")
    source, *others = board["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    assert source["current"]["value"] == f"${{{asked['name']}}}"
    assert {v["name"] for v in others} >= {"run_id", "category", "engine"}
    assert all(v["multi"] and v["datasource"]["uid"] == "${datasource}" for v in others)
    kinds = {panel["type"] for panel in panels(name)}
    assert kinds == {need["id"] for need in board["__requires"] if need["type"] == "panel"}
    known = {v["name"] for v in board["templating"]["list"]} | {"__rate_interval", "__range"}
    text = json.dumps(board["panels"])
    assert set(re.findall(r"\$\{?(\w+)", text)) <= known


def test_boards_are_two() -> None:
    assert len({board["uid"] for board in BOARDS.values()}) == len(BOARDS)
    assert len({board["title"] for board in BOARDS.values()}) == len(BOARDS)


@pytest.mark.parametrize(("board", "panel"), EVERY_PANEL)
def test_panel_explains_itself(board: str, panel: dict[str, Any]) -> None:
    assert panel["type"] in {"timeseries", "stat", "bargauge", "table"}
    assert len(panel["description"]) > 20
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"]
    assert len(defaults["noValue"]) > 10
    assert all(t["datasource"]["uid"] == "${datasource}" for t in (panel, *panel["targets"]))
    assert len({t["refId"] for t in panel["targets"]}) == len(panel["targets"]) > 0


@pytest.mark.parametrize(("board", "panel"), EVERY_PANEL)
def test_panel_of_streamed_tokens_says_when_there_are_none(
    board: str, panel: dict[str, Any]
) -> None:
    if any("streamed_tokens" in target["expr"] for target in panel["targets"]):
        assert board == "run"
        assert "once an answer is over" in panel["fieldConfig"]["defaults"]["noValue"]


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_no_panel_covers_another(name: str) -> None:
    every = BOARDS[name]["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    covered: dict[tuple[int, int], str] = {}
    for panel in every:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert covered.setdefault((x, y), panel["title"]) == panel["title"]


# ── the stack ────────────────────────────────────────────────────────────────────────────────────

COMPOSE = read_yaml("compose.yaml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ("simulator", "monitor", "run")


def test_compose_has_the_stack_and_pins_it() -> None:
    assert set(SERVICES) == {"simulator", "monitor", "run", "prometheus", "grafana"}
    images = [SERVICES[name]["image"] for name in ("prometheus", "grafana")]
    images += re.findall(
        r"^FROM (\S+)", SERVICES["run"]["build"]["dockerfile_inline"], re.MULTILINE
    )
    assert len(images) == 3
    assert all(re.search(r":v?\d+\.\d+\.\d+", image) for image in images)
    assert all(needed in SERVICES for s in SERVICES.values() for needed in s.get("depends_on", ()))


def test_compose_mounts_what_is_here_and_opens_ports_to_this_machine_only() -> None:
    mounts = [m.split(":") for s in SERVICES.values() for m in s.get("volumes", ())]
    for source, inside, *_ in mounts:
        assert inside.startswith("/")
        assert source in COMPOSE["volumes"] or (HERE / source).exists()
        assert not source.startswith("/")
    ports = [port for s in SERVICES.values() for port in s.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_image_copies_what_the_wheel_is_built_of() -> None:
    text = SERVICES["run"]["build"]["dockerfile_inline"]
    sources = [
        name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()
    ]
    assert {"loadgen", "servers", "scenarios", "reports", "pyproject.toml"} <= set(sources)
    assert all((ROOT / name).exists() for name in sources)


@pytest.mark.parametrize("name", ["monitor", "run"])
def test_compose_gives_flags_that_draftload_has(name: str) -> None:
    program, command, *given = SERVICES[name]["command"]
    assert program == "draftload"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "loadgen.cli", command, "--help"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert {flag.partition("=")[0] for flag in given} <= set(re.findall(r"--[\w-]+", done.stdout))


def test_compose_starts_a_simulator_that_there_is() -> None:
    *python, module = SERVICES["simulator"]["command"][:4]
    assert (python, module) == (["python", "-P", "-m"], "servers.simulator")
    _, port, settings = simulator.parsed(SERVICES["simulator"]["command"][4:])
    assert (port, settings.method) == (8000, "eagle3")


def test_prometheus_scrapes_what_compose_starts() -> None:
    listens = {
        f"{name}:{port}"
        for name in OURS
        for flag in SERVICES[name]["command"]
        if (port := re.sub(r"^--(prometheus-)?port=", "", flag)).isdigit()
    }
    jobs = {job["job_name"]: job for job in read_yaml("prometheus.yml")["scrape_configs"]}
    scraped = {t for job in jobs.values() for s in job["static_configs"] for t in s["targets"]}
    assert scraped - {"host.docker.internal:9411"} == listens
    assert set(re.findall(r'job="([\w-]+)"', (HERE / "alerts.yml").read_text("utf-8"))) <= set(jobs)


def test_grafana_is_given_its_source_and_its_boards() -> None:
    (source,) = read_yaml("provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    scraped = read_yaml("prometheus.yml")
    intervals = [job.get("scrape_interval") for job in scraped["scrape_configs"]]
    assert source["jsonData"]["timeInterval"] in intervals
    (provider,) = read_yaml("provisioning/dashboards/draftload.yml")["providers"]
    folder = provider["options"]["path"]
    mounted = {m.split(":")[1] for m in SERVICES["grafana"]["volumes"]}
    assert {f"{folder}/{name}.json" for name in BOARDS} < mounted


# ── rules ────────────────────────────────────────────────────────────────────────────────────────


def promtool(*words: str | Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("no promtool: install the package prometheus")
    done = subprocess.run(
        ["promtool", *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_the_rules() -> None:
    promtool("check", "rules", HERE / "alerts.yml")


def test_promtool_takes_the_config() -> None:
    promtool("check", "config", HERE / "prometheus.yml")


def test_each_alert_fires_and_does_not_fire() -> None:
    cases = DATA / "grafana-alerts.yml"
    named = set(re.findall(r'alertname="(\w+)"', cases.read_text("utf-8")))
    assert named == {rule["alert"] for rule in RULES if "alert" in rule}
    promtool("test", "rules", cases)


@pytest.mark.parametrize("rule", [r for r in RULES if "alert" in r], ids=lambda r: r["alert"])
def test_alert_says_what_and_how_bad(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert set(rule["annotations"]) == {"summary", "description"}
    assert rule["for"]


# ── against a real Prometheus ────────────────────────────────────────────────────────────────────


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def until(ask: Callable[[], Any], what: str) -> Any:
    """The first answer that is not empty."""
    end = time.monotonic() + PATIENCE_S
    while not (answer := ask()):
        assert time.monotonic() < end, f"not in {PATIENCE_S:g} s: {what}"
        time.sleep(0.1)
    return answer


def get(url: str, **query: Any) -> Any:
    """JSON or text; None while nobody answers, or nobody is ready."""
    asked = f"{url}?{urllib.parse.urlencode(query)}" if query else url
    try:
        with urllib.request.urlopen(asked, timeout=10) as response:
            text = response.read().decode()
    except urllib.error.HTTPError as fault:
        with fault:
            if fault.code != 503:
                raise AssertionError(fault.read().decode()) from None
        return None
    except OSError:
        return None
    return json.loads(text) if text.startswith("{") else text


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def running(
    *argv: str | Path, cwd: Path, stdout: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[bytes]]:
    """A process. What it says on stderr lies in `cwd`."""
    with (cwd / f"{Path(argv[0]).name}-{time.monotonic_ns()}.log").open("wb") as log:
        process = subprocess.Popen(
            list(map(str, argv)), cwd=cwd, env=environment(), stdout=stdout, stderr=log
        )
    with process:
        try:
            yield process
        finally:
            process.terminate()


@dataclass(frozen=True)
class Watched:
    """A Prometheus that has seen runs, a monitor and a vLLM page. `reports`: the runs' own."""

    url: str
    began: float
    reports: tuple[dict[str, Any], ...]

    def at_once(self, expr: str) -> list[dict[str, Any]]:
        """Series with a number at this moment: NaN is none."""
        return self._numbers("query", query=expr)

    def over_time(self, expr: str) -> list[dict[str, Any]]:
        """Series with a number at some moment since the beginning."""
        span = {"start": self.began, "end": time.time(), "step": "500ms"}
        return self._numbers("query_range", query=expr, **span)

    def series(self, match: str) -> list[dict[str, str]]:
        told = get(f"{self.url}/api/v1/series", **{"match[]": match})
        found: list[dict[str, str]] = told["data"]
        return found

    def _numbers(self, path: str, **query: Any) -> list[dict[str, Any]]:
        told = get(f"{self.url}/api/v1/{path}", **query)
        assert told["status"] == "success"
        return [
            one
            for one in told["data"]["result"]
            if any(math.isfinite(float(v)) for _, v in one.get("values", [one.get("value")]))
        ]


FAST = {"interval: 1m": "interval: 500ms"}
"""Of the rules' own intervals: what they say stays."""


def configured(folder: Path, targets: dict[str, list[str]]) -> Path:
    """prometheus.yml with other targets, and every interval short."""
    rules = (HERE / "alerts.yml").read_text("utf-8")
    for slow, fast in FAST.items():
        assert slow in rules
        rules = rules.replace(slow, fast)
    (folder / "alerts.yml").write_text(rules, encoding="utf-8")
    config = read_yaml("prometheus.yml")
    config["global"] = dict.fromkeys(("scrape_interval", "evaluation_interval"), "500ms")
    config["global"]["scrape_timeout"] = "500ms"
    assert {job["job_name"] for job in config["scrape_configs"]} == set(targets)
    for job in config["scrape_configs"]:
        for name in ("scrape_interval", "scrape_timeout"):
            job.pop(name, None)
        job["static_configs"] = [{"targets": targets[job["job_name"]]}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


PLAYED = ("--spec=eagle3", "--draft-depth=8", "--time-scale=0.5")
RUN = ("--scenario=smoke", "--duration=3s", "--linger=10s", "--format=json", "--quiet")
MONITOR = ("--scrape-interval=500ms", "--probe=smoke", "--every=500ms", "--quiet")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus: install the package of that name")
    folder = tmp_path_factory.mktemp("watched")
    ports = [free_port() for _ in range(7)]
    places = [f"127.0.0.1:{port}" for port in ports]
    port_of = dict(zip(places, ports, strict=True))
    *played, closed, opened, watching, asked = places
    with ExitStack() as stack:

        def start(*argv: str | Path, **how: Any) -> subprocess.Popen[bytes]:
            return stack.enter_context(running(*argv, cwd=folder, **how))

        def draftload(*words: str, **how: Any) -> subprocess.Popen[bytes]:
            return start(sys.executable, "-P", "-m", "loadgen.cli", *words, **how)

        def simulate(where: str, dialect: str) -> None:
            own = (f"--port={port_of[where]}", f"--dialect={dialect}")
            start(sys.executable, "-P", "-m", "servers.simulator", *PLAYED, *own)

        vllm = stack.enter_context(Served("127.0.0.1", 0))
        vllm.show((DATA / "vllm-histograms-before.txt").read_bytes())
        for where, dialect in zip(played, ("vllm", "sglang", "llamacpp"), strict=True):
            simulate(where, dialect)
        until(lambda: all(get(f"http://{where}/truth") for where in played), "simulators")
        urls = [f"--url=http://{where}" for where in played]
        page = f"--prometheus-port={port_of[watching]}"
        draftload("monitor", *urls, *MONITOR, page)
        targets = {"draftload-run": [closed, opened], "draftload-monitor": [watching]}
        config = configured(folder, targets | {"server": [f"127.0.0.1:{vllm.port}"]})
        data = f"--storage.tsdb.path={folder / 'data'}"
        began = time.time()
        start("prometheus", f"--config.file={config}", data, f"--web.listen-address={asked}")
        until(lambda: get(f"http://{asked}/-/ready"), "Prometheus")
        up = "draftload_scrape_up"
        until(lambda: up in (get(f"http://{watching}/metrics") or ""), "the monitor")
        assert vllm.taken(PATIENCE_S)
        vllm.show((DATA / "vllm-histograms-after.txt").read_bytes())
        runs = [
            draftload("run", url, *RUN, *load, page, stdout=subprocess.PIPE)
            for url, load, page in (
                (urls[0], ("--concurrency=4",), f"--prometheus-port={port_of[closed]}"),
                (urls[2], ("--rate=8",), f"--prometheus-port={port_of[opened]}"),
            )
        ]
        said = [run.communicate(timeout=PATIENCE_S)[0] for run in runs]
        assert [run.returncode for run in runs] == [0, 0], f"see the logs in {folder}"
        yield Watched(f"http://{asked}", began, tuple(map(json.loads, said)))


def choices(watched: Watched, board: str) -> dict[str, str]:
    """What each variable stands for with "All" chosen, as Grafana has it: its `allValue`, else the
    values there are."""
    chosen: dict[str, str] = {}
    for variable in BOARDS[board]["templating"]["list"]:
        if variable["type"] == "query":
            values = offered(watched, variable, chosen)
            chosen[variable["name"]] = variable["allValue"] or f"({'|'.join(values)})"
    return chosen


def offered(watched: Watched, variable: dict[str, Any], chosen: dict[str, str]) -> list[str]:
    form = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
    assert form is not None
    match, label = form.groups()
    found = {one.get(label, "") for one in watched.series(substituted(match, chosen))}
    return sorted(re.escape(value) for value in found - {""})


def substituted(expr: str, chosen: dict[str, str]) -> str:
    """At a scrape every 500 ms."""
    values = chosen | {"__rate_interval": "2s", "__range": "5m"}
    return re.sub(r"\$(\w+)", lambda found: values[found[1]].replace("\\", "\\\\"), expr)


@pytest.mark.parametrize(("board", "target"), EVERY_QUERY)
def test_query_of_a_panel_returns_data(
    watched: Watched, board: str, target: dict[str, Any]
) -> None:
    expr = substituted(target["expr"], choices(watched, board))
    ask = watched.at_once if target["instant"] else watched.over_time
    named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))

    def told() -> bool:
        found = ask(expr)
        return bool(found) and named <= {label for one in found for label in one["metric"]}

    until(told, f"series with {sorted(named)}: {expr}")


@pytest.mark.parametrize("board", sorted(BOARDS))
def test_client_and_server_are_in_one_query(watched: Watched, board: str) -> None:
    overlaid = [p for p in panels(board) if "vllm:" in p["description"]]
    assert [panel["title"] for panel in overlaid] == ["TTFT", "TPOT", "Chunk gap", "E2EL"]
    for panel in overlaid:
        for target in panel["targets"]:
            found = watched.over_time(substituted(target["expr"], choices(watched, board)))
            assert {one["metric"]["job"] for one in found} == {f"draftload-{board}", "server"}


@pytest.mark.parametrize("expr", EVERY_OPERAND)
def test_expression_of_a_rule_returns_data(watched: Watched, expr: str) -> None:
    until(lambda: watched.over_time(expr), expr)


@pytest.mark.parametrize(("board", "variable"), EVERY_VARIABLE)
def test_variable_has_something_to_choose(
    watched: Watched, board: str, variable: dict[str, Any]
) -> None:
    assert offered(watched, variable, choices(watched, board))


def test_the_run_board_offers_runs_and_the_monitors_servers(watched: Watched) -> None:
    runs = {report["run"]["run_id"] for report in watched.reports}
    assert choices(watched, "run")["run_id"] == f"({'|'.join(sorted(runs))})"
    assert choices(watched, "monitor")["server"].count("|") == 2


@pytest.mark.parametrize(
    ("title", "figure"),
    [
        ("AL", "acceptance_length"),
        ("AL where drafted", "acceptance_length_drafted"),
        ("Draft coverage", "draft_coverage"),
    ],
)
def test_verdict_is_the_reports(watched: Watched, title: str, figure: str) -> None:
    """Where the board has a figure, the run's own report has the same, of the same source."""
    (panel,) = [p for p in panels("run") if (p["type"], p["title"]) == ("stat", title)]
    compared = 0
    for report in watched.reports:
        run_id = report["run"]["run_id"]
        chosen = choices(watched, "run") | {"run_id": run_id}
        shown = {
            one["metric"]["source"]: float(one["value"][1])
            for one in watched.at_once(substituted(panel["targets"][0]["expr"], chosen))
        }
        (phase,) = [phase for phase in report["phases"] if phase["measured"]]
        told = {one["source"]: one[figure] for one in phase["acceptance"]}
        for source, value in shown.items():
            assert value == pytest.approx(told[source])
            compared += 1
    assert compared
