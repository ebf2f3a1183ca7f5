"""The Grafana boards, written out as the JSON that users import.

    python -P -m reports.grafana.boards      writes run.json and monitor.json beside this file

Classic dashboard JSON, schema version 39: Grafana 10.4 and later read it. Every panel says what it
shows, in which unit, and why it can be empty. Must not: add up the sources of an acceptance figure,
name a data source, need a recording rule (but the one panel that says so).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 39
GRAFANA = "10.4.0"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24
"""Of Grafana's grid."""

Queries = tuple[tuple[str, str], ...]
"""Legend and PromQL."""


@dataclass(frozen=True)
class Panel:
    """`empty` stands there without data. `most`: where its scale ends. `mean`: a stat of the mean
    over the shown time, else of its end. `hidden`: a table's columns that tell nothing."""

    kind: str
    title: str
    unit: str
    about: str
    empty: str
    queries: Queries
    width: int = 8
    height: int = 8
    decimals: int | None = None
    most: float | None = None
    mean: bool = False
    hidden: tuple[str, ...] = ()


def lines(title: str, unit: str, about: str, empty: str, *queries: Any, **more: Any) -> Panel:
    return Panel("timeseries", title, unit, about, empty, queries, **more)


def stat(title: str, unit: str, about: str, empty: str, *queries: Any, **more: Any) -> Panel:
    return Panel("stat", title, unit, about, empty, queries, width=4, height=5, **more)


def bars(title: str, unit: str, about: str, empty: str, *queries: Any, **more: Any) -> Panel:
    return Panel("bargauge", title, unit, about, empty, queries, width=12, height=9, **more)


# ── PromQL ───────────────────────────────────────────────────────────────────────────────────────

LIVE = "rate({}[$__rate_interval])"
SHOWN = "rate({}[$__range])"
PHASE = "last_over_time({}[$__range])"
"""A run's counters begin at zero with the measured phase: their last value is the phase's own."""


@dataclass(frozen=True)
class Series:
    """Which series, how they are told apart, and a legend that does."""

    where: str
    by: str
    name: str

    def of(self, label: str) -> Series:
        """Apart by one more label."""
        told = f"{{{{{label}}}}}"
        name = f"{self.name} ({told})" if label == "source" else f"{told} {self.name}"
        return Series(self.where, f"{self.by}, {label}", name)

    def only(self, where: str) -> Series:
        return Series(f"{self.where},{where}", self.by, self.name)


CATEGORY = 'category=~"$category"'
RUN = Series(
    'run_id=~"$run_id",engine=~"$engine"',
    "run_id, spec, concurrency",
    "{{spec}} c={{concurrency}} {{run_id}}",
)
SCRAPED = Series(
    'server=~"$server",engine=~"$engine",run_id=~"$run_id",scenario=""',
    "server, engine, spec",
    "{{server}} {{spec}}",
)
PROBED = Series(
    'server=~"$server",engine=~"$engine",run_id=~"$run_id",scenario!=""', "server", "{{server}}"
).only(CATEGORY)
DEEPEST = 8
"""Conditional acceptance takes a query a position: PromQL cannot count a label up."""


def grown(name: str, series: Series, over: str = LIVE) -> str:
    """What a counter grew."""
    return f"sum by ({series.by}) ({over.format(f'draftload_{name}_total{{{series.where}}}')})"


def ratio(above: str, below: str, series: Series, over: str = LIVE) -> str:
    return f"{grown(above, series, over)}\n/ {grown(below, series, over)}"


def length(series: Series, over: str = LIVE) -> tuple[str, str]:
    """AL."""
    return series.name, ratio("decode_tokens", "decode_steps", series, over)


def drafted_length(series: Series, over: str = LIVE) -> tuple[str, str]:
    """AL where drafted."""
    return series.name, f"1 + {ratio('accepted_tokens', 'drafts', series, over)}"


def failed(series: Series, over: str = LIVE) -> tuple[str, str]:
    """A share: zero where no request failed, when there is no series of failures."""
    bad = grown("requests", series.only('outcome=~"refused|broke|timed_out"'), over)
    all_ = grown("requests", series.only('outcome!="cancelled"'), over)
    return series.name, f"({bad} or 0 * {all_})\n/ {all_}"


def joint(series: Series, over: str) -> tuple[str, str]:
    each = series.of("position")
    at = grown("accepted_tokens_at_position", each, over)
    return each.name, f"{at}\n/ ignoring (position) group_left {grown('drafts', series, over)}"


def conditional(series: Series, position: int, over: str) -> tuple[str, str]:
    at = [
        grown("accepted_tokens_at_position", series.only(f'position="{j}"'), over)
        for j in (position - 1, position)
    ]
    before = at[0] if position > 1 else grown("drafts", series, over)
    return f"{position} {series.name}", f"{at[1]}\n/ {before}"


def quantile(share: float, series: Series, name: str) -> tuple[str, str]:
    found = LIVE.format(f"draftload_{name}_seconds_bucket{{{series.where}}}")
    told = f"p{share * 100:.0f} {series.name}"
    return told, f"histogram_quantile({share}, sum by (le, {series.by}) ({found}))"


def overlaid(share: float, ours: str, theirs: str, who: Sequence[str]) -> tuple[str, str]:
    """Client and server in one query: both have vLLM's buckets. `who`: labels of draftload's that
    are variables of the board; the server's own series have none of them."""
    names = f"draftload_{ours}_seconds_bucket|vllm:{theirs}_seconds_bucket"
    where = ",".join([f'__name__=~"{names}"', *(f'{label}=~"${label}|"' for label in who)])
    by = ("job", *who, "concurrency", "model_name")
    told = " ".join([f"p{share * 100:.0f}", *(f"{{{{{label}}}}}" for label in by)])
    rate = LIVE.format(f"{{{where}}}")
    return told, f"histogram_quantile({share}, sum by (le, {', '.join(by)}) ({rate}))"


# ── panels that both boards have ─────────────────────────────────────────────────────────────────

NO_STEPS = "No decode steps known: this engine tells drafts only. See AL where drafted"
NO_DRAFTS = "No drafts counted: speculation is off, or this engine does not tell drafts"
NO_COVERAGE = "Drafts and decode steps are not known from one source (vLLM tells drafts only)"
NO_POSITIONS = "This engine does not tell acceptance by position"
NO_LOAD = "The server's page does not tell this, or was not scraped"
NO_RUN = "No run was scraped in this window"
NO_STREAM = "No run was scraped, or its server tells tokens only once an answer is over"
NO_SERVER = "The monitor was not scraped in this window"
NO_PROBE = "No probe: start the monitor with --probe"

AL = "Tokens delivered a decode step, pooled over steps, by source; steps without a draft count. "
AL_DRAFTED = "1 + accepted tokens ÷ drafts, by source: over the steps that had a draft. "
COVERAGE = "Drafts ÷ decode steps of one source: how many steps had a draft. "
OF_PHASE = "Of the whole measured phase."


def latency(*who: str) -> Iterator[Panel]:
    for title, ours, theirs, about in (
        ("TTFT", "ttft", "time_to_first_token", "Time to first token"),
        ("TPOT", "tpot", "request_time_per_output_token", "Time per output token of a request"),
        ("Chunk gap", "chunk_gap", "inter_token_latency", "Time between a stream's chunks"),
        ("E2EL", "request_duration", "e2e_request_latency", "Time of a whole request"),
    ):
        yield lines(
            title,
            "s",
            f"{about} as the client stamped it (job draftload-…) and, where Prometheus scrapes a "
            f"vLLM server itself, as the server did (vllm:{theirs}_seconds, vLLM 0.32). Estimated "
            "from buckets: the report has the exact percentiles.",
            "No request completed in this window",
            *(overlaid(share, ours, theirs, who) for share in (0.5, 0.95)),
            width=6,
        )


def speculation(series: Series, width: int) -> tuple[Panel, ...]:
    each = series.of("source")
    rate = (each.name, ratio("accepted_tokens", "draft_tokens", each))
    return (
        lines(
            "Acceptance length (AL)",
            "none",
            AL + "Comparable across engines.",
            NO_STEPS,
            length(each),
            width=width,
            decimals=2,
        ),
        lines(
            "AL where drafted",
            "none",
            AL_DRAFTED + "Never below AL: a method that drafts seldom looks better here.",
            NO_DRAFTS,
            drafted_length(each),
            width=width,
            decimals=2,
        ),
        lines(
            "Acceptance rate",
            "percentunit",
            "Accepted ÷ drafted tokens, by source. Falls as k rises: compare AL instead.",
            NO_DRAFTS,
            rate,
            width=width,
            most=1,
        ),
    )


def coverage(title: str, series: Series, empty: str, width: int) -> Panel:
    each = series.of("source")
    share = (each.name, ratio("drafts", "decode_steps", each))
    return lines(title, "percentunit", COVERAGE, empty, share, width=width, most=1)


def positions(series: Series, over: str, when: str) -> tuple[Panel, ...]:
    each = series.of("source")
    return (
        bars(
            "Acceptance by position, joint",
            "percentunit",
            "Accepted at position j ÷ drafts: the share of drafts whose first j tokens all held. "
            f"Not drafted counts as rejected. {when}",
            NO_POSITIONS,
            joint(each, over),
            most=1,
        ),
        bars(
            "Acceptance by position, conditional",
            "percentunit",
            "Accepted at position j ÷ accepted at j − 1: the share that holds where all before it "
            f"held. Not drafted counts as rejected. Positions 1 to {DEEPEST}. {when}",
            NO_POSITIONS,
            *(conditional(each, j, over) for j in range(1, DEEPEST + 1)),
            most=1,
        ),
    )


def at_server(series: Series, width: int = 8) -> tuple[Panel, ...]:
    gauges = "draftload_server_{}{{" + series.where + "}}"
    return (
        lines(
            "Requests at the server",
            "none",
            "Running and waiting, as the server's own page has it. Waiting for long: the load is "
            "more than the server takes.",
            NO_LOAD,
            (f"running {series.name}", gauges.format("requests_running")),
            (f"waiting {series.name}", gauges.format("requests_waiting")),
            width=width,
        ),
        lines(
            "KV cache",
            "percentunit",
            "Used share of the KV cache, as the server's own page has it.",
            NO_LOAD,
            (series.name, gauges.format("kv_cache_usage_ratio")),
            width=width,
            most=1,
        ),
    )


def facts(series: Series, *hidden: str) -> Panel:
    return Panel(
        "table",
        "What was measured",
        "none",
        "Engine, model, versions, and speculation as the server reports it. simulated = true: the "
        "figures are played, not measured.",
        "Nothing was scraped in this window: is Prometheus' target up?",
        (("", PHASE.format(f"draftload_run_info{{{series.where}}}")),),
        width=WIDTH,
        hidden=("Time", "Value", "__name__", "instance", "job", *hidden),
    )


# ── the run board ────────────────────────────────────────────────────────────────────────────────


def run_verdict() -> tuple[Panel, ...]:
    series = RUN.only(CATEGORY)
    each = series.of("source")
    share = (each.name, ratio("drafts", "decode_steps", each, PHASE))
    ended = PHASE.format(f"draftload_run_ended{{{RUN.where}}}")
    return (
        stat("AL", "none", AL + OF_PHASE, NO_STEPS, length(each, PHASE), decimals=2),
        stat(
            "AL where drafted",
            "none",
            AL_DRAFTED + OF_PHASE,
            NO_DRAFTS,
            drafted_length(each, PHASE),
            decimals=2,
        ),
        stat("Draft coverage", "percentunit", COVERAGE + OF_PHASE, NO_COVERAGE, share),
        stat(
            "Output tokens/s",
            "suffix: tok/s",
            "Tokens of all streams a second, mean over the shown time in which the run was on. The "
            "report's figures, whole and steady, are of the phase.",
            NO_STREAM,
            (RUN.name, grown("streamed_tokens", RUN)),
            decimals=0,
            mean=True,
        ),
        stat(
            "Requests failed",
            "percentunit",
            "Refused, broken off or timed out, of all but the cancelled. " + OF_PHASE,
            "No request has ended yet",
            failed(series, PHASE),
        ),
        stat("Ended", "bool_yes_no", "When it was last scraped.", NO_RUN, (RUN.name, ended)),
    )


def run_load() -> tuple[Panel, ...]:
    series = RUN.only(CATEGORY)
    outcome = series.of("outcome")
    flight = "draftload_requests_in_flight{}{{" + RUN.where + "}}"
    return (
        lines(
            "In flight against target",
            "none",
            "Requests in flight at the client, and how many a closed loop holds there: an open "
            "loop has no target.",
            NO_RUN,
            (f"in flight {RUN.name}", flight.format("")),
            (f"target {RUN.name}", flight.format("_target")),
        ),
        lines(
            "Tokens",
            "suffix: tok/s",
            "Output tokens a second as they are streamed; prompt tokens of completed requests.",
            NO_STREAM,
            (f"output {RUN.name}", grown("streamed_tokens", RUN)),
            (f"prompt {RUN.name}", grown("prompt_tokens", series)),
        ),
        lines(
            "Requests by outcome",
            "reqps",
            "Requests that ended, a second.",
            "No request ended in this window",
            (outcome.name, grown("requests", outcome)),
        ),
        *at_server(RUN),
        lines(
            "Send delay",
            "s",
            "Open loop: how much later than intended a request left. Where it is long the client "
            "is too slow, and its latencies are too good.",
            "Closed loop: a request has no intended time. Run with --rate",
            *(quantile(share, RUN, "send_delay") for share in (0.5, 0.99)),
        ),
    )


def run_speculation() -> tuple[Panel, ...]:
    series = RUN.only(CATEGORY)
    length_, *others = speculation(series, 6)
    return length_, coverage("Draft coverage", series, NO_COVERAGE, 6), *others


def run_categories() -> tuple[Panel, ...]:
    each = RUN.only(CATEGORY).of("source").of("category")
    return (
        bars("AL by category", "none", AL + OF_PHASE, NO_STEPS, length(each, PHASE), decimals=2),
        bars(
            "AL where drafted by category",
            "none",
            AL_DRAFTED + OF_PHASE,
            NO_DRAFTS,
            drafted_length(each, PHASE),
            decimals=2,
        ),
    )


def run_trust() -> tuple[Panel, ...]:
    def gauge(name: str) -> tuple[str, str]:
        return RUN.name, f"draftload_{name}{{{RUN.where}}}"

    return (
        lines(
            "Client CPU",
            "suffix: cores",
            "Cores that the client used. Near 1 the client is the limit and measures itself: above "
            "0.8 trust no latency of this run.",
            NO_RUN,
            gauge("client_cpu_ratio"),
            width=6,
            decimals=2,
        ),
        lines(
            "Loop lag",
            "s",
            "How late the client's event loop woke, the longest since the last tick. Chunk times "
            "are no better than this: above 10 ms do not trust them.",
            NO_RUN,
            gauge("client_loop_lag_seconds"),
            width=6,
        ),
        lines(
            "Server's page is read",
            "bool_yes_no",
            "Whether draftload's last look at the server's metrics page worked. No: figures from "
            "server counters stand still.",
            "This server has no metrics page",
            gauge("scrape_up"),
            width=6,
        ),
        lines(
            "Series",
            "none",
            "Series on draftload's own page; below 5,000 whatever the prompts.",
            NO_RUN,
            gauge("series"),
            width=6,
        ),
        facts(RUN),
    )


def run_board() -> dict[str, Any]:
    info = 'draftload_run_info{server=""'
    return dashboard(
        "draftload-run",
        "draftload: run",
        "Runs of draftload while they go on, one or several: verdict, load, latency, speculation "
        "by category and position, and whether the client itself was the limit.",
        (
            variable("engine", info + "}"),
            variable("run_id", info + ',engine=~"$engine"}'),
            variable("category", 'draftload_requests_total{run_id=~"$run_id"}', every=".*"),
        ),
        (
            ("Verdict", run_verdict()),
            ("Load and server", run_load()),
            ("Latency", tuple(latency("run_id"))),
            ("Speculation", run_speculation()),
            (
                "Speculation by category and position",
                (*run_categories(), *positions(RUN, PHASE, OF_PHASE)),
            ),
            ("Trust", run_trust()),
        ),
    )


# ── the monitor board ────────────────────────────────────────────────────────────────────────────


def monitor_verdict() -> tuple[Panel, ...]:
    each, window = SCRAPED.of("source"), "Over the last window."
    up = f"min by (server) (draftload_scrape_up{{{SCRAPED.where}}})"
    rate = (each.name, ratio("accepted_tokens", "draft_tokens", each))
    tokens = (SCRAPED.name, grown("output_tokens", SCRAPED))
    return (
        stat(
            "Server's page is read",
            "bool_yes_no",
            "Whether the monitor's last look at a server's metrics page worked.",
            NO_SERVER,
            ("{{server}}", up),
        ),
        stat("AL", "none", AL + window, NO_STEPS, length(each), decimals=2),
        stat(
            "AL where drafted",
            "none",
            AL_DRAFTED + window,
            NO_DRAFTS,
            drafted_length(each),
            decimals=2,
        ),
        stat(
            "Acceptance rate",
            "percentunit",
            "Accepted ÷ drafted tokens, by source. " + window,
            NO_DRAFTS,
            rate,
        ),
        stat(
            "Output tokens/s",
            "suffix: tok/s",
            "By the server's own counter. " + window,
            NO_LOAD,
            tokens,
            decimals=0,
        ),
        stat(
            "Probes failed",
            "percentunit",
            "Refused, broken off or timed out, of the monitor's own requests. " + window,
            NO_PROBE,
            failed(PROBED),
        ),
    )


def monitor_drift() -> tuple[Panel, ...]:
    ruled = '{server=~"$server",engine=~"$engine"}'
    each = SCRAPED.of("source")
    weeks = [
        (f"{name} {each.name}", f"{rule}{ruled}\n/ avg_over_time({rule}{ruled}[1w])")
        for name, rule in (
            ("AL", "draftload:acceptance_length:rate5m"),
            ("AL where drafted", "draftload:acceptance_length_drafted:rate5m"),
        )
    ]
    return (
        lines(
            "Against its own week",
            "percentunit",
            "AL and AL where drafted over 5 minutes ÷ their mean over the week. The alert fires "
            "below 90 %.",
            "Load alerts.yml into Prometheus: this panel reads its recording rules",
            *weeks,
            width=12,
        ),
        lines(
            "AL, the engine's own gauge",
            "none",
            "What SGLang shows itself, over its last steps. Before 0.5.23 its counters do not give "
            "AL, and it is all there is.",
            "Only SGLang shows such a gauge",
            (SCRAPED.name, f"draftload_server_acceptance_length{{{SCRAPED.where}}}"),
            width=12,
            decimals=2,
        ),
    )


def monitor_load() -> tuple[Panel, ...]:
    return (
        *at_server(SCRAPED, width=6),
        lines(
            "Tokens",
            "suffix: tok/s",
            "Output and prompt tokens a second, by the server's own counters.",
            NO_LOAD,
            (f"output {SCRAPED.name}", grown("output_tokens", SCRAPED)),
            (f"prompt {SCRAPED.name}", grown("prompt_tokens", SCRAPED)),
            width=6,
        ),
        lines(
            "Requests completed",
            "reqps",
            "Requests completed a second, by the server's own counter.",
            NO_LOAD,
            (SCRAPED.name, grown("requests", SCRAPED)),
            width=6,
        ),
    )


def monitor_probe() -> tuple[Panel, ...]:
    outcome = PROBED.of("outcome")
    return (
        lines(
            "Probe: AL by category",
            "none",
            AL + "Of the monitor's own requests: the same prompts every time, so that a change is "
            "the server's.",
            f"{NO_PROBE}, at an engine whose decode steps are known",
            length(PROBED.of("source").of("category")),
            decimals=2,
        ),
        coverage("Probe: draft coverage", PROBED, f"{NO_PROBE}. Else: {NO_COVERAGE}", 8),
        lines(
            "Probe: requests by outcome",
            "reqps",
            "The monitor's own requests that ended, a second.",
            NO_PROBE,
            (outcome.name, grown("requests", outcome)),
        ),
        *latency("server", "run_id"),
    )


def monitor_trust() -> tuple[Panel, ...]:
    result = Series(SCRAPED.where, "server", "{{server}}").of("result")
    taken = f"draftload_scrape_duration_seconds{{{SCRAPED.where}}}"
    last = f"time() - draftload_last_scrape_timestamp_seconds{{{SCRAPED.where}}}"
    restarts = f"draftload_server_restarts_total{{{SCRAPED.where}}}"
    return (
        lines(
            "Scrapes by result",
            "reqps",
            "The monitor's looks at the servers' pages, a second.",
            NO_SERVER,
            (result.name, grown("scrapes", result)),
        ),
        lines(
            "Scrape duration",
            "s",
            "How long the last look at a server's page took.",
            NO_SERVER,
            ("{{server}}", taken),
        ),
        lines(
            "Age of the figures",
            "s",
            "Time since the last look at a server's page that worked.",
            "No look at a server's page has worked yet",
            ("{{server}}", last),
        ),
        lines(
            "Server restarts",
            "none",
            "How often a server's counters began anew since the monitor started.",
            NO_SERVER,
            ("{{server}}", restarts),
        ),
        lines(
            "Monitor's memory",
            "bytes",
            "Resident memory of the monitor. It should be flat.",
            NO_SERVER,
            ("{{instance}}", "draftload_monitor_resident_bytes"),
        ),
        lines(
            "Monitor's series",
            "none",
            "Series on the monitor's own page. It grows with the servers: 24 with a probe of "
            "11 categories, or 240 without one, are about 5,000; for more, start a second monitor.",
            NO_SERVER,
            ("{{instance}}", 'draftload_series{scenario=""}'),
        ),
        facts(SCRAPED, "scenario", "concurrency"),
    )


def monitor_board() -> dict[str, Any]:
    up = "draftload_scrape_up{"
    asked = 'draftload_requests_total{server=~"$server",scenario!=""}'
    return dashboard(
        "draftload-monitor",
        "draftload: monitor",
        "Deployed servers as `draftload monitor` sees them: acceptance in one vocabulary for all "
        "engines and against its own week, load, probes, and the monitor itself.",
        (
            variable("engine", up + 'server!=""}'),
            variable("server", up + 'server!="",engine=~"$engine"}'),
            variable("run_id", up + 'server=~"$server"}'),
            variable("category", asked, every=".*"),
        ),
        (
            ("Verdict", monitor_verdict()),
            ("Drift", monitor_drift()),
            ("Speculation", speculation(SCRAPED, 8)),
            ("Speculation by position", positions(SCRAPED, SHOWN, "Of the shown time.")),
            ("Load and server", monitor_load()),
            ("Probe", monitor_probe()),
            ("Trust", monitor_trust()),
        ),
    )


# ── as Grafana's JSON ────────────────────────────────────────────────────────────────────────────


def variable(name: str, series: str, every: str | None = None) -> dict[str, Any]:
    """A choice of several of a label's values. `every`: what "All" stands for where a series may
    lack the label; else it is the values that there are."""
    query = f"label_values({series}, {name})"
    return {
        "name": name,
        "label": name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor"},
        "definition": query,
        "multi": True,
        "includeAll": True,
        "allValue": every,
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "refresh": 2,  # with the shown time
        "sort": 1,
        "hide": 0,
        "options": [],
        "regex": "",
    }


def drawn(panel: Panel) -> dict[str, Any]:
    """The options of its kind."""
    end = {"calcs": ["mean" if panel.mean else "lastNotNull"], "fields": "", "values": False}
    kinds: dict[str, dict[str, Any]] = {
        "stat": {"reduceOptions": end, "colorMode": "none", "graphMode": "none"},
        "bargauge": {"reduceOptions": end, "displayMode": "basic", "orientation": "horizontal"},
        "table": {"showHeader": True, "cellHeight": "sm"},
        "timeseries": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }
    return kinds[panel.kind]


def targets(panel: Panel) -> list[dict[str, Any]]:
    over_time = panel.kind == "timeseries" or panel.mean
    return [
        {
            "refId": "ABCDEFGHIJ"[i],
            "datasource": SOURCE,
            "editorMode": "code",
            "expr": expr,
            "legendFormat": name,
            "instant": not over_time,
            "range": over_time,
            "format": "table" if panel.kind == "table" else "time_series",
        }
        for i, (name, expr) in enumerate(panel.queries)
    ]


def as_json(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    scale = {"min": 0, "max": panel.most, "decimals": panel.decimals}
    dropped = {"excludeByName": dict.fromkeys(panel.hidden, True)}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about.strip(),
        "datasource": SOURCE,
        "gridPos": {"h": panel.height, "w": panel.width, "x": x, "y": y},
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "noValue": panel.empty,
                "color": {"mode": "palette-classic"},
                **{key: value for key, value in scale.items() if value is not None},
            },
            "overrides": [],
        },
        "options": drawn(panel),
        "targets": targets(panel),
        "transformations": [{"id": "organize", "options": dropped}] if panel.hidden else [],
    }


def placed(rows: Sequence[tuple[str, tuple[Panel, ...]]]) -> Iterator[dict[str, Any]]:
    """Left to right, the next line below the highest of the last."""
    number = y = 0
    for title, panels in rows:
        number += 1
        place = {"h": 1, "w": WIDTH, "x": 0, "y": y}
        row = {"id": number, "type": "row", "title": title, "gridPos": place}
        yield row | {"collapsed": False, "panels": []}
        y += 1
        x = tall = 0
        for panel in panels:
            if x + panel.width > WIDTH:
                x, y, tall = 0, y + tall, 0
            number += 1
            yield as_json(panel, number, x, y)
            x, tall = x + panel.width, max(tall, panel.height)
        y += tall


INPUT = {
    "name": "DS_PROMETHEUS",
    "label": "Prometheus",
    "description": "The Prometheus that scrapes draftload",
    "type": "datasource",
    "pluginId": "prometheus",
    "pluginName": "Prometheus",
}
CHOICE = {
    "name": "datasource",
    "label": "Prometheus",
    "type": "datasource",
    "query": "prometheus",
    "current": {"selected": True, "text": "${DS_PROMETHEUS}", "value": "${DS_PROMETHEUS}"},
    "multi": False,
    "includeAll": False,
    "refresh": 1,
    "hide": 0,
    "options": [],
    "regex": "",
}
"""An import asks for INPUT and puts it here. Provisioned from a file nothing is put here, the
choice names no data source, and Grafana takes the first that there is."""


def dashboard(
    uid: str,
    title: str,
    about: str,
    variables: Sequence[dict[str, Any]],
    rows: Sequence[tuple[str, tuple[Panel, ...]]],
) -> dict[str, Any]:
    """A board without an id: an import makes one, and replaces the board of the same uid."""
    panels = list(placed(rows))
    kinds = sorted({panel["type"] for panel in panels} - {"row"})
    needed = [{"type": "grafana", "id": "grafana", "name": "Grafana", "version": GRAFANA}]
    needed += [{"type": "datasource", "id": "prometheus", "name": "Prometheus", "version": "1.0.0"}]
    needed += [{"type": "panel", "id": kind, "name": kind, "version": ""} for kind in kinds]
    return {
        "__inputs": [INPUT],
        "__requires": needed,
        "id": None,
        "uid": uid,
        "title": title,
        "description": about,
        "tags": ["draftload"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-15m", "to": "now"},
        "refresh": "5s",
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": [CHOICE, *variables]},
        "panels": panels,
    }


def boards() -> dict[str, str]:
    """File name → JSON."""
    made = {"run.json": run_board(), "monitor.json": monitor_board()}
    return {
        name: json.dumps(board, indent=2, ensure_ascii=False) + "\n" for name, board in made.items()
    }


if __name__ == "__main__":
    for name, text in boards().items():
        Path(__file__).with_name(name).write_text(text, encoding="utf-8")
