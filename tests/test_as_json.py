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
from loadgen.types import Distribution, OpenLoop, Study
from reports.as_json import DISTRIBUTIONS, render
from tests.studies import blank_study, compared, per_request, phase, single, summary, with_summary

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


@pytest.mark.parametrize(
    "study",
    [single(), single(method=None), compared(), blank_study(), mapped()],
    ids=["one run", "no speculation", "comparison", "nothing measured", "map and bounds"],
)
def test_a_report_is_as_its_schema_says(study: Study) -> None:
    assert faults(report(study), SCHEMA) == []


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
