"""`--fail-if` bounds as JUnit XML: one test case a bound and load, as CI servers show them.

Must not: judge a bound.
"""

from __future__ import annotations

from xml.sax.saxutils import quoteattr

from loadgen.types import Study
from reports import page, units


def render(study: Study) -> str:
    """The XML of all of `study.judged`."""
    failures = sum(judged.crossed for judged in study.judged)
    counts = f'tests="{len(study.judged)}" failures="{failures}"'
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', f"<testsuites {counts}>"]
    lines.append(f'  <testsuite name="draftload compare" {counts} errors="0" skipped="0">')
    for judged in study.judged:
        at = "" if judged.bound.load else f" at {judged.load}"
        name = _quoted(f"{judged.bound.text}{at}")
        head = f"    <testcase classname={_quoted(judged.spec)} name={name}"
        if not judged.crossed:
            lines.append(f"{head}/>")
            continue
        figure = "_".join(filter(None, (judged.bound.metric, judged.bound.statistic)))
        said = _quoted(f"crossed: {figure} is {units.judged(judged)} at {judged.load}")
        lines.append(f'{head}><failure type="bound" message={said}/></testcase>')
    return "\n".join((*lines, "  </testsuite>", "</testsuites>", ""))


def _quoted(text: str) -> str:
    return quoteattr(page.clean(text))
