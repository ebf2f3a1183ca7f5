"""A list of label: value for an issue, as users of `vllm bench serve` paste it.

Labels are vLLM's (vllm/benchmarks/serve.py at 009e6d4) where they mean the
same. Its "Acceptance length" is 1 + accepted ÷ drafts, over the steps that had a draft: ours over
all decode steps has a label of its own, as has the chunk gap, which vLLM calls inter-token latency
and which is none under speculation. Must not: compute a figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from loadgen.metrics import requests_per_s, total
from loadgen.types import Acceptance, ClosedLoop, Distribution, PhaseSummary, Study, Summary
from loadgen.written import load_label
from reports import page, units
from reports.units import MISSING

WIDTH, LABEL = 50, 40
NOTE = """\
Labels are those of vllm bench serve where they mean the same, others are draftload's own.
"Acceptance length" is vLLM's: only over the steps that had a draft."""

Rows = Iterable[tuple[str, str]]


def render(study: Study) -> str:
    """A block a run and measured load, its head before it."""
    blocks = []
    for summary in study.summaries:
        blocks.append("\n".join(_lines(_head(summary))))
        blocks += ["\n".join(_block(summary, p)) for p in summary.phases if p.measured]
    return "\n\n".join([*blocks, NOTE]) + "\n"


def _lines(rows: Rows) -> list[str]:
    return [f"{page.clean(label):<{LABEL}} {page.clean(value)}".rstrip() for label, value in rows]


def _rule(title: str, fill: str) -> str:
    return f"{f' {title} ' if fill == '=' else title:{fill}^{WIDTH}}"


def _head(summary: Summary) -> Rows:
    facts = page.facts(summary.info)
    return [(f"{key.capitalize()}:", value) for key, value in facts.items() if value]


def _block(summary: Summary, phase: PhaseSummary) -> list[str]:
    simulated = "SIMULATED " if summary.info.server.simulated else ""
    lines = [_rule(f"{simulated}Serving Benchmark Result", "="), *_lines(_traffic(phase))]
    for title, name in LATENCIES.items():
        found = page.dist(phase, name)
        if found.n and not (name == "chunk_gap_s" and phase.chunk_is_step is False):
            lines += [_rule(title, "-"), *_lines(_latency(LATENCY_NAMES[name], found))]
    best = page.best(phase)
    if best.state != "off":
        lines += [_rule("Speculative Decoding", "-"), *_lines(_speculation(best))]
    codes = dict.fromkeys(c.code for c in summary.caveats if c.phase in (None, phase.name))
    said = [("Caveats:", ", ".join(codes))] if codes else []
    return [*lines, *_lines(said), "=" * WIDTH]


def _traffic(phase: PhaseSummary) -> Rows:
    requests, load = phase.requests, phase.load
    closed = isinstance(load, ClosedLoop)
    most = load.concurrency if isinstance(load, ClosedLoop) else load.max_in_flight
    rate = None if isinstance(load, ClosedLoop) else load.request_rate_rps
    # vLLM's requests have one turn; a rate of dialogues of several is no rate of requests.
    turns = max((d.turns for d in phase.dialogues), default=1)
    of = "Request rate configured (RPS):" if turns == 1 else "Dialogues begun, configured (1/s):"
    isl, osl = (total(page.dist(phase, name)) for name in ("isl_tokens", "osl_tokens"))
    rows = {
        "Load:": load_label(load) + (f", repeat {phase.repeat + 1}" if phase.repeat else ""),
        "Successful requests:": str(requests.completed),
        "Failed requests:": str(requests.refused + requests.broke + requests.timed_out),
        "Cancelled requests:": str(requests.cancelled) if requests.cancelled else "",
        "Maximum request concurrency:": str(most) if most is not None else "",
        of: "" if closed else units.bare(rate),
        "Benchmark duration (s):": units.bare(phase.span_s),
        "Total input tokens:": MISSING if isl is None else str(isl),
        "Total generated tokens:": MISSING if osl is None else str(osl),
        "Request throughput (req/s):": units.bare(requests_per_s(phase)),
        "Output token throughput (tok/s):": units.bare(phase.throughput.whole),
        "Output throughput, steady (tok/s):": _or_why(
            phase.throughput.steady, phase.throughput.why_not_steady
        ),
        "Median user speed (tok/s):": units.bare(page.dist(phase, "user_tokens_per_s").p50),
    }
    return [(label, value) for label, value in rows.items() if value]


def _or_why(value: float | None, why: str) -> str:
    return units.bare(value) + (f" ({why})" if value is None and why else "")


LATENCIES: Mapping[str, str] = {
    "Time to First Token": "ttft_s",
    "Time per Output Token (excl. 1st token)": "tpot_s",
    "Time between chunks": "chunk_gap_s",
    "End-to-end Latency": "e2el_s",
}
LATENCY_NAMES: Mapping[str, str] = {
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "chunk_gap_s": "chunk gap",
    "e2el_s": "E2EL",
}


def _latency(name: str, found: Distribution) -> Rows:
    few = f" ({found.n} values are too few)" if found.p99 is None else ""
    return [
        (f"Mean {name} (ms):", units.bare(found.mean, 1e3)),
        (f"Median {name} (ms):", units.bare(found.p50, 1e3)),
        (f"P99 {name} (ms):", units.bare(found.p99, 1e3) + few),
    ]


def _speculation(found: Acceptance) -> Rows:
    """vLLM's lines, then ours."""

    def count(value: int | None) -> str:
        return MISSING if value is None else str(value)

    yield "Acceptance rate (%):", units.bare(found.acceptance_rate, 100)
    yield "Acceptance length:", units.bare(found.acceptance_length_drafted)
    yield "Drafts:", count(found.drafts)
    yield "Draft tokens:", count(found.draft_tokens)
    yield "Accepted tokens:", count(found.accepted_tokens)
    if found.joint_by_position:
        yield "Per-position acceptance (%):", ""
        for position, share in enumerate(found.joint_by_position):
            yield f"  Position {position}:", units.bare(share, 100)
    over, around = units.bare(found.acceptance_length), units.interval(found.interval)
    why = f" ({found.why_missing})" if over == MISSING and found.why_missing else ""
    limits = f" {around}" if around != MISSING else ""
    yield "Acceptance length, all decode steps:", over + limits + why
    yield "Draft coverage (%):", units.bare(found.draft_coverage, 100)
    yield "Decode steps:", count(found.steps)
    steps = f", steps from {found.steps_source}" if found.steps_source else ""
    doubt = ", unverified" if found.unverified else ""
    yield "Acceptance from:", found.source + steps + doubt
