"""`--fail-if` bounds: read, held against a comparison, and written as JUnit XML."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree as ET

import msgspec
import pytest

from loadgen.errors import UserError
from loadgen.gates import judge, read_bounds
from loadgen.types import Comparison, Distribution, OpenLoop, PhaseSummary
from loadgen.written import load_label
from reports import as_junit, units
from tests.studies import compared

change = msgspec.structs.replace


def comparison() -> Comparison:
    found = compared().comparison
    assert found is not None
    return found


def judged(*texts: str) -> list[tuple[str, str, bool]]:
    return [(j.load, units.judged(j), j.crossed) for j in judge(comparison(), read_bounds(texts))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("speedup_user<1.1@c=8", [("c=8", "0.834", True)]),
        ("speedup_user<1.1", [("c=1", "1.08", True), ("c=8", "0.834", True)]),
        ("speedup_user>1@c=8", [("c=8", "0.834", False)]),
        ("speedup_throughput<-10%@c=8", [("c=8", "-16.4 %", True)]),
        ("acceptance_length<1.5@c=8", [("c=8", "1.46", True)]),
        ("draft_coverage<0.1@c=8", [("c=8", "0.216", False)]),
        ("ttft_p95>400ms", [("c=1", "64.3 ms", False), ("c=8", "487 ms", True)]),
        ("ttft_p95>3%@c=8", [("c=8", "4.0 %", True)]),
        ("user_tokens_per_s_p50<-10%@c=8", [("c=8", "-16.4 %", True)]),
        ("step_time_s>1@c=1", [("c=1", "14.5 ms", False)]),
        ("outputs_differ>0.01", [("c=1", "0", False), ("c=8", "0.045", True)]),
    ],
)
def test_bounds_by_hand(text: str, expected: list[tuple[str, str, bool]]) -> None:
    assert judged(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("speedup_usr<1.1", "unknown metric 'speedup_usr'; did you mean 'speedup_user'"),
        ("ttft>500ms", "ttft_s is a distribution; expected such as ttft_p95"),
        ("speedup_user_p95<1", "speedup_user is one figure; expected only speedup_user"),
        ("speedup_user=1", "is no bound"),
    ],
)
def test_what_is_no_bound_is_refused_before_a_file_is_read(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_bounds([text])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("speedup_user<1@c=9", "nothing was measured at c=9. Measured: c=1, c=8"),
        ("acceptance_length<-2%", "the baseline has no acceptance_length"),
        ("output_length>1.1", "cannot be judged at c=1: the comparison has no output_length"),
    ],
)
def test_a_bound_that_cannot_be_judged_does_not_pass(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        judged(text)


def test_a_bound_names_an_open_loop_by_its_rate() -> None:
    (row, _) = comparison().loads
    found = change(comparison(), loads=(change(row, load=OpenLoop(request_rate_rps=4)),))
    (one,) = judge(found, read_bounds(["speedup_user<1.1@rate=4"]))
    assert (one.load, one.crossed) == (load_label(OpenLoop(request_rate_rps=4)), True)


def test_a_change_of_acceptance_length_is_against_a_base_that_drafts_too() -> None:
    def as_base(spec: PhaseSummary) -> PhaseSummary:
        best = change(spec.acceptance[0], acceptance_length=1.6)
        return change(spec, acceptance=(best,), distributions={"ttft_s": Distribution(n=0)})

    found = comparison()
    loads = tuple(change(row, base=as_base(row.spec)) for row in found.loads)
    (one, two) = judge(change(found, loads=loads), read_bounds(["acceptance_length<-8.6%"]))
    assert (one.value, two.value) == pytest.approx((1.4642 / 1.6 - 1, 1.4613 / 1.6 - 1))
    assert (one.crossed, two.crossed) == (False, True)


def test_junit_has_a_case_a_bound_and_load_and_escapes_what_it_says() -> None:
    found = judge(comparison(), read_bounds(["speedup_user<1.05", "ttft_p95>9s@c=8"]))
    hostile = change(found[0], spec='a"<b>&\x1b\x00')
    text = as_junit.render(replace(compared(), judged=(hostile, *found[1:])))
    root = ET.fromstring(text)
    assert root.attrib == {"tests": "3", "failures": "1"}
    cases = root.findall("testsuite/testcase")
    assert [c.attrib["name"] for c in cases] == [
        "speedup_user<1.05 at c=1",
        "speedup_user<1.05 at c=8",
        "ttft_p95>9s@c=8",
    ]
    assert cases[0].attrib["classname"] == 'a"<b>&\\x1b\\x00'
    (failure,) = root.iter("failure")
    assert failure.attrib["message"] == "crossed: speedup_user is 0.834 at c=8"
