"""The JSON report: the shape of DESIGN §5, its schema in docs/report.schema.json.

Full precision, SI units, missing is null; keys beyond DESIGN §5 only add. Of a server's
config, what may hold a secret or a local path (environment, executable, arguments) stays out. Must
not: compute or round a figure.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from loadgen.types import (
    Acceptance,
    Advice,
    BreakEven,
    Capacity,
    CapacityLoad,
    CategoryComparison,
    CategorySummary,
    Comparison,
    Distribution,
    LoadComparison,
    Misstatement,
    PhaseSummary,
    RunInfo,
    ServerInfo,
    Speedup,
    Study,
    Summary,
)

SCHEMA = 1
"""The report's schema; it rises when a key changes its meaning or goes."""

DISTRIBUTIONS = (
    "isl_tokens",
    "osl_tokens",
    "ttft_s",
    "tpot_s",
    "chunk_gap_s",
    "tokens_per_chunk",
    "e2el_s",
    "user_tokens_per_s",
)
"""Always there, null where not measured; a phase's further ones follow at its end."""

_PRIVATE = ("env", "executable", "extra_args", "files_dir")
_ACTED_ON = (
    *range(0x7F, 0xA0),
    0x61C,
    0x200E,
    0x200F,
    *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
)
_ESCAPED = {code: f"\\u{code:04x}" for code in _ACTED_ON}
"""JSON allows control characters and those that turn the direction of text unescaped; a terminal
acts on them."""

Json = dict[str, Any]


def render(study: Study) -> str:
    """The report of one run, or {"runs": […]} of several, with the comparison if there is one."""
    return _text(_report(study))


def together(studies: Sequence[Study]) -> str:
    """Several comparisons with one baseline as one document: {"comparisons": […]}."""
    if len(studies) == 1:
        return render(studies[0])
    return _text({"schema": SCHEMA, "comparisons": [_report(study) for study in studies]})


def _report(study: Study) -> Json:
    runs = [_run(summary) for summary in study.summaries]
    report: Json = {"schema": SCHEMA, **(runs[0] if len(runs) == 1 else {"runs": runs})}
    if study.comparison is not None:
        report["comparison"] = _comparison(study.comparison)
    if study.break_even is not None:
        report["break_even"] = _break_even(study.break_even)
    if study.judged:
        report["bounds"] = [_all(judged) for judged in study.judged]
    if study.advice:
        report["advice"] = [_advice(advice) for advice in study.advice]
    if study.capacity is not None:
        report["capacity"] = _capacity(study.capacity)
    if study.sweep is not None:
        report["sweep"] = _all(study.sweep)
    if study.misstatement is not None:
        report["misstatement"] = _misstatement(study.misstatement)
    return report


def _text(report: Json) -> str:
    text = msgspec.json.format(msgspec.json.encode(report), indent=2).decode()
    return text.translate(_ESCAPED) + "\n"


def _run(summary: Summary) -> Json:
    return {
        "run": {**_info(summary.info), "end": summary.end},
        "phases": [_phase(phase) for phase in summary.phases],
        "caveats": [_all(caveat) for caveat in summary.caveats],
    }


def _info(info: RunInfo) -> Json:
    server = _all(info.server)
    if info.server.config is not None:
        server["config"] = {k: v for k, v in server["config"].items() if k not in _PRIVATE}
    return {
        "run_id": info.run_id,
        "started_at": info.started_at,
        "scenario": _all(info.scenario),
        "server": server,
        "client": _all(info.client),
        "prompts_sha256": info.prompts_sha256,
    }


def _server(server: ServerInfo) -> Json:
    """Which one it is: the whole stands with its run."""
    spec = server.config.spec if server.config is not None else None
    told = ("engine", "version", "model", "state", "draft_depth", "simulated")
    return {name: getattr(server, name) for name in told} | {"spec": _all(spec)}


def _advice(advice: Advice) -> Json:
    return {**_all(advice), "server": _server(advice.server)}


def _capacity(capacity: Capacity) -> Json:
    """An infinite figure, which JSON has not, is null: failed requests are that percentile."""
    configs = []
    for config in capacity.configs:
        loads = [_capacity_load(load) for load in config.loads]
        border = {name: getattr(config, name) for name in ("holds", "fails")}
        configs.append(
            {
                **_all(config),
                "server": _server(config.server),
                "loads": loads,
                **{name: load and load.load for name, load in border.items()},
            }
        )
    return {**_all(capacity), "configs": configs}


def _capacity_load(load: CapacityLoad) -> Json:
    finite = [v if v is not None and math.isfinite(v) else None for v in load.figures]
    return {**_all(load), "figures": finite}


def _all(value: Any) -> Any:
    """A noun with all its fields: msgspec leaves defaults out, a stable report does not."""
    if isinstance(value, msgspec.Struct):
        tag = value.__struct_config__.tag
        kind = {"kind": tag} if value.__struct_config__.tag_field == "kind" else {}
        return kind | {name: _all(getattr(value, name)) for name in value.__struct_fields__}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _all(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [_all(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _all(item) for key, item in value.items()}
    return value


def _phase(phase: PhaseSummary) -> Json:
    fixed = {
        "name": phase.name,
        "measured": phase.measured,
        "load": _all(phase.load),
        "repeat": phase.repeat,
        "span_s": phase.span_s,
        "requests": _all(phase.requests),
        **{name: _distribution(phase.distributions.get(name)) for name in DISTRIBUTIONS},
        "step_time_s": phase.step_time_s,
        "step_time_source": phase.step_time_source,
        "output_tokens_per_s": _all(phase.throughput),
        "goodput_rps": phase.goodput_rps,
        "achieved_concurrency": {"p50": phase.achieved_concurrency_p50},
        "server": _all(phase.server),
        "repeated_prompts": phase.repeated_prompts,
        "chunk_is_step": phase.chunk_is_step,
        "acceptance": [_acceptance(acceptance) for acceptance in phase.acceptance],
        "categories_apart": phase.categories_apart,
        "categories": [_category(category) for category in phase.categories],
        "tiers": [_category(tier) for tier in phase.tiers],
        "isl_buckets": [_category(bucket) for bucket in phase.isl_buckets],
    }
    further = {name: _all(d) for name, d in phase.distributions.items() if name not in fixed}
    said = {} if phase.answers is None else {"answers": _all(phase.answers)}
    return fixed | said | further


def _distribution(distribution: Distribution | None) -> Json | None:
    return None if distribution is None else _all(distribution)


def _acceptance(acceptance: Acceptance) -> Json:
    interval = acceptance.interval
    return {
        "source": acceptance.source,
        "state": acceptance.state,
        "steps_source": acceptance.steps_source,
        "acceptance_length": acceptance.acceptance_length,
        "acceptance_length_low": interval.low if interval is not None else None,
        "acceptance_length_high": interval.high if interval is not None else None,
        "acceptance_interval": interval.kind if interval is not None else None,
        "acceptance_length_drafted": acceptance.acceptance_length_drafted,
        "draft_coverage": acceptance.draft_coverage,
        "acceptance_rate": acceptance.acceptance_rate,
        "joint_by_position": acceptance.joint_by_position,
        "conditional_by_position": acceptance.conditional_by_position,
        "positions_exact": acceptance.positions_exact,
        "acceptance_length_by_dialogue": acceptance.acceptance_length_by_dialogue,
        "steps": acceptance.steps,
        "drafts": acceptance.drafts,
        "accepted_tokens": acceptance.accepted_tokens,
        "draft_tokens": acceptance.draft_tokens,
        "overrun_tokens": acceptance.overrun_tokens,
        "unverified": acceptance.unverified,
        "why_missing": acceptance.why_missing or None,
    }


def _category(category: CategorySummary) -> Json:
    found = category.acceptance
    return {
        "category": category.category,
        "requests": category.requests,
        "acceptance": _acceptance(found) if found is not None else None,
        "user_tokens_per_s": _distribution(category.user_tokens_per_s),
        "ttft_s": _distribution(category.ttft_s),
        "step_time_s": category.step_time_s,
    }


def _comparison(comparison: Comparison) -> Json:
    return {
        "base": comparison.base.run_id,
        "spec": comparison.spec.run_id,
        "base_runs": comparison.base_runs,
        "spec_runs": comparison.spec_runs,
        "differences": comparison.differences,
        "loads": [_load(load) for load in comparison.loads],
        "caveats": [_all(caveat) for caveat in comparison.caveats],
    }


def _misstatement(found: Misstatement) -> Json:
    return {
        "random": found.random.run_id,
        "real": found.real.run_id,
        "differences": found.differences,
        "loads": [
            {
                "load": _all(load.load),
                "repeat": load.repeat,
                "random_phase": load.random.name,
                "real_phase": load.real.name,
                "throughput": _speedup(load.throughput),
                "throughput_basis": load.basis or None,
                "acceptance": _speedup(load.acceptance),
                "time_per_token": _speedup(load.time_per_token),
                "time_outside_decoding": _speedup(load.time_outside_decoding),
                "routing": load.routing,
                "factors": {factor.name: factor.ratio for factor in load.factors},
                "not_split": load.not_split or None,
            }
            for load in found.loads
        ],
    }


def _load(load: LoadComparison) -> Json:
    """`base_figures` and `spec_figures` are over all repeats, as LoadComparison says."""
    return {
        "load": _all(load.load),
        "verdict": load.verdict,
        "why_no_verdict": load.why_no_verdict or None,
        "speedup_user": _speedup(load.speedup_user),
        "speedup_throughput": _speedup(load.speedup_throughput),
        "throughput_basis": load.throughput_basis or None,
        "speedup_by_dialogue": load.speedup_by_dialogue,
        "speedup_expected": load.speedup_expected,
        "queue_s": {"base": load.queue_s[0], "spec": load.queue_s[1]},
        "output_length": _speedup(load.output_length),
        "outputs": _all(load.outputs),
        "base_outputs": _all(load.noise),
        "repeats": [_all(repeat) for repeat in load.repeats],
        "base_figures": _phase(load.base),
        "spec_figures": _phase(load.spec),
        "categories": [_group(c) for c in load.categories],
        "tiers": [_group(c) for c in load.tiers],
        "isl_buckets": [_group(c) for c in load.isl_buckets],
    }


def _group(c: CategoryComparison) -> Json:
    return {
        "category": c.category,
        "speedup_user": _speedup(c.speedup_user),
        "acceptance": _acceptance(c.acceptance) if c.acceptance is not None else None,
        "steps": c.steps,
        "base": _category(c.base) if c.base is not None else None,
        "spec": _category(c.spec) if c.spec is not None else None,
    }


def _break_even(found: BreakEven) -> Json:
    return {
        "by": found.by,
        "repeats": found.repeats,
        "why_no_verdict": found.why_no_verdict or None,
        "loads": [_all(load) for load in found.loads],
        "rows": [
            {
                "name": row.name,
                "figure": row.figure,
                "cells": [_speedup(cell) for cell in row.cells],
                "crossings": [_all(crossing) for crossing in row.crossings],
            }
            for row in found.rows
        ],
    }


def _speedup(speedup: Speedup | None) -> Json | None:
    if speedup is None:
        return None
    interval = speedup.interval
    return {
        "ratio": speedup.ratio,
        "low": interval.low if interval is not None else None,
        "high": interval.high if interval is not None else None,
        "interval": interval.kind if interval is not None else None,
        "pairs": speedup.pairs,
        "repeats": speedup.repeats,
        "mark": speedup.mark,
    }
