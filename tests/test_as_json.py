"""reports/as_json.py: the shape of DESIGN §5, held against docs/report.schema.json.

The checker below knows the part of JSON Schema that our schema uses and refuses any other keyword.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadgen.breakeven import break_even
from loadgen.gates import judge, read_bounds
from loadgen.types import (
    ClosedLoop,
    Distribution,
    OpenLoop,
    OverRepeats,
    Study,
    Summary,
    SweepResult,
    SweepRow,
)
from reports.as_json import DISTRIBUTIONS, render, together
from tests import test_capacity as sizes
from tests.studies import blank_study, compared, per_request, phase, single, summary, with_summary
from tests.test_capacity_report import advised, sized

change = msgspec.structs.replace

SCHEMA = json.loads(
    (Path(__file__).parent.parent / "docs" / "report.schema.json").read_text(encoding="utf-8")
)

TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}
SAID_ONLY = {"$schema", "$defs", "title", "description"}


def faults(value: Any, schema: dict[str, Any], where: str = "$") -> list[str]:
    """Where `value` is not as `schema` says."""
    found = []
    for key, rule in schema.items():
        match key:
            case "$ref":
                found += faults(value, SCHEMA["$defs"][rule.removeprefix("#/$defs/")], where)
            case "type":
                kinds = [rule] if isinstance(rule, str) else rule
                right = any(isinstance(value, TYPES[kind]) for kind in kinds)
                if not right or (isinstance(value, bool) and "boolean" not in kinds):
                    found.append(f"{where}: {value!r} is no {rule}")
            case "const" | "enum":
                if value not in (rule if key == "enum" else [rule]):
                    found.append(f"{where}: {value!r} is not {rule}")
            case "required" if isinstance(value, dict):
                found += [f"{where}: no {name}" for name in rule if name not in value]
            case "properties" if isinstance(value, dict):
                for name in rule.keys() & value.keys():
                    found += faults(value[name], rule[name], f"{where}.{name}")
            case "items" if isinstance(value, list):
                for number, item in enumerate(value):
                    found += faults(item, rule, f"{where}[{number}]")
            case "anyOf":
                tries = [faults(value, choice, where) for choice in rule]
                found += [] if [] in tries else tries[0]
            case "required" | "properties" | "items":
                pass
            case _ if key not in SAID_ONLY:
                found.append(f"{where}: the checker does not know {key}")
    return found


def mapped() -> Study:
    """A comparison with its map and a bound held against it."""
    study = compared()
    assert study.comparison is not None
    bounds = read_bounds(["speedup_user<1@c=8", "user_tokens_per_s_p50<-2%"])
    return replace(
        study, break_even=break_even(study.comparison), judged=judge(study.comparison, bounds)
    )


def report(study: Study) -> Any:
    return json.loads(render(study))


def failing() -> Summary:
    """At c=8 three of 40 requests failed: p95 is infinite."""
    return sizes.run([sizes.phase(8, [*[sizes.request(0.1)] * 37, *[sizes.FAILED] * 3])])


def swept() -> Study:
    """A baseline, and a config of which nothing could be measured."""
    output = OverRepeats(n=3, median=2.0, low=1.0, high=3.0)
    closed, rate = ClosedLoop(concurrency=8), OpenLoop(request_rate_rps=1)
    row = SweepRow(server="none", scenario="smoke", load=closed, cells=3, measured=3,
                   output_tokens_per_s=output)  # fmt: skip
    lost = replace(row, server="mtp", measured=0, failed=("died",), load=rate)
    told = {"mtp": ("GPUs: 1 → 2",)}
    result = SweepResult(name="m", rows=(row, lost), baseline="none", differences=told)
    return Study(summaries=(), sweep=result)


STUDIES = {
    "one run": single(),
    "no speculation": single(method=None),
    "comparison": compared(),
    "nothing measured": blank_study(),
    "map and bounds": mapped(),
    "advice": advised(),
    "capacity": sized(rps=50.0, gpu_price_per_h=2.5, mix={"rag": 1.0}),
    "an slo that no load holds": sized(100, failing()),
    "sweep": swept(),
}
every_study = pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)


@every_study
def test_a_report_is_as_its_schema_says(study: Study) -> None:
    assert faults(report(study), SCHEMA) == []


FREE = {"scenario", "server", "client", "mix", "spec", "differences", "answers", "routing"}
"""Objects of another noun, or by a user's names."""


def unsaid(value: Any, schema: dict[str, Any], where: str = "$") -> list[str]:
    """Keys that the schema does not speak of."""
    choices = [schema, *schema.get("anyOf", ())]
    choices += [SCHEMA["$defs"][c["$ref"].removeprefix("#/$defs/")] for c in choices if "$ref" in c]
    choices += [c for choice in choices for c in choice.get("anyOf", ()) if c not in choices]
    known = {name: rule for c in choices for name, rule in c.get("properties", {}).items()}
    if isinstance(value, list):
        rules = [c["items"] for c in choices if "items" in c]
        return [said for item in value for rule in rules[:1] for said in unsaid(item, rule, where)]
    if not isinstance(value, dict) or not known:
        return []
    found = [f"{where}.{name}" for name in value if name not in known]
    for name in value.keys() & known.keys() - FREE:
        found += unsaid(value[name], known[name], f"{where}.{name}")
    return found


@pytest.mark.parametrize("name", ["advice", "capacity", "an slo that no load holds", "sweep"])
def test_the_schema_speaks_of_every_key_of_a_decision(name: str) -> None:
    found = report(STUDIES[name])
    decision = {key: found[key] for key in ("advice", "capacity", "sweep") if key in found}
    assert unsaid(decision, SCHEMA) == []
    (key,) = decision
    odd = [{"odd": 1}] if key == "advice" else {"odd": 1}
    assert unsaid({key: odd}, SCHEMA) == [f"$.{key}.odd"], "the checker finds them"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), 2),
        (("phases", 0, "span_s"), "1.0"),
        (("phases", 0, "load", "kind"), "burst"),
        (("phases", 0, "acceptance", 0, "steps"), 1.5),
        (("phases", 0, "ttft_s"), {"n": 3}),
        (("phases", 0, "requests", "sent"), True),
        (("caveats", 0, "advice"), None),
    ],
)
def test_the_checker_finds_faults(path: tuple[Any, ...], value: Any) -> None:
    broken = report(single())
    *parents, last = path
    place = broken
    for key in parents:
        place = place[key]
    place[last] = value
    assert faults(broken, SCHEMA)


def test_every_key_of_the_contract_is_required() -> None:
    names = set(SCHEMA["$defs"]["phase"]["required"])
    assert names >= {
        *("name", "measured", "load", "repeat", "span_s", "requests", *DISTRIBUTIONS),
        *("step_time_s", "output_tokens_per_s", "goodput_rps", "achieved_concurrency"),
        *("acceptance", "categories"),
    }
    assert set(SCHEMA["$defs"]["acceptance"]["required"]) == set(
        report(single())["phases"][0]["acceptance"][0]
    )


def test_figures_keep_their_precision_and_their_order() -> None:
    found = report(single())["phases"][1]
    best, second = found["acceptance"]
    assert best["acceptance_length"] == 1.4613
    assert (best["acceptance_length_low"], best["acceptance_length_high"]) == (1.3608, 1.5702)
    assert best["acceptance_interval"] == "95 % bootstrap over dialogues"
    assert second["source"] == "server counters"
    assert found["ttft_s"]["p50"] == 0.312 * 1.04
    assert found["load"] == {"kind": "closed", "concurrency": 8}
    assert found["achieved_concurrency"] == {"p50": 8.0}


def test_an_open_loop_is_as_the_schema_says() -> None:
    load = OpenLoop(request_rate_rps=4, arrivals="gamma", burstiness=0.5)
    late = phase(8).distributions | {"ttft_intended_s": Distribution(n=1, mean=0.5)}
    opened = change(phase(8), load=load, distributions=late)
    found = report(with_summary(single(), change(summary(), phases=(opened,))))
    assert faults(found, SCHEMA) == []
    (only,) = found["phases"]
    assert (only["load"]["kind"], only["load"]["request_rate_rps"]) == ("open", 4.0)
    assert only["ttft_intended_s"]["mean"] == 0.5
    assert only["server"]["in_flight_p50"] == 8.0


def test_one_run_stands_at_the_top_and_several_under_runs() -> None:
    assert list(report(single())) == ["schema", "run", "phases", "caveats"]
    several = report(compared())
    assert list(several) == ["schema", "runs", "comparison"]
    assert several["runs"][1] == {k: v for k, v in report(single()).items() if k != "schema"}
    load = several["comparison"]["loads"][1]
    assert load["speedup_user"]["ratio"] == 0.8342
    assert (load["outputs"]["differ"], load["outputs"]["compared"]) == (1, 22)
    assert load["base_outputs"] is None
    assert load["categories"][0]["acceptance"]["acceptance_length"] == 1.87


def test_several_comparisons_are_one_document() -> None:
    alone, mapped_too = compared(), mapped()
    assert together([alone]) == render(alone)
    found = json.loads(together([alone, mapped_too]))
    assert faults(found, SCHEMA) == []
    assert list(found) == ["schema", "comparisons"]
    assert found["comparisons"] == [report(alone), report(mapped_too)]


def test_absent_and_unknown_figures_are_null() -> None:
    bare = report(replace(blank_study(), comparison=None))["runs"][0]["phases"][0]
    assert [bare[name] for name in (*DISTRIBUTIONS, "goodput_rps", "step_time_s")] == [None] * 10
    odd = change(phase(8), acceptance=(change(per_request(), acceptance_rate=math.nan),))
    study = with_summary(single(), change(summary(), phases=(odd,)))
    assert report(study)["phases"][0]["acceptance"][0]["acceptance_rate"] is None


def test_a_further_distribution_is_added_and_never_takes_a_name() -> None:
    further = {"connect_s": Distribution(n=1, mean=0.5), "name": Distribution(n=1)}
    phases = (change(phase(8), distributions=further),)
    found = report(with_summary(single(), change(summary(), phases=phases)))["phases"][0]
    assert found["connect_s"]["mean"] == 0.5
    assert found["name"] == "c=8"


def test_the_server_config_keeps_its_secrets() -> None:
    text = render(single())
    assert "hunter2" not in text
    assert json.loads(text)["run"]["server"]["config"]["spec"]["method"] == "ngram"


def test_no_control_character_is_written() -> None:
    run = summary()
    name = "m\x1b[31m\x9b2J\x7f\u202e\u2066"
    named = change(run, info=change(run.info, server=change(run.info.server, model=name)))
    text = render(with_summary(single(), named))
    assert not [c for c in text if (ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0]
    assert not {*text} & {"\u202e", "\u2066"}
    assert json.loads(text)["run"]["server"]["model"] == name


def test_the_same_study_gives_the_same_bytes() -> None:
    assert render(compared()) == render(compared())
