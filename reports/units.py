"""Numbers to text: the only rounding in the project.

Seconds, tokens a second and shares come in as they are everywhere else; text with three significant
digits (plain numbers: two decimals) goes out. A number is rounded by itself and never by its
neighbours, so the same value reads the same in every report. None, NaN and infinities are "–".
Must not: compute a figure, know a report.
"""

from __future__ import annotations

import math

from loadgen.bounds import in_seconds
from loadgen.types import Interval, Judged

MISSING = "–"


def figure(value: float | None) -> str:
    """Three significant digits, thousands separated: 9.87 → '9.87', 1234.5 → '1,234'."""
    if value is None or not math.isfinite(value):
        return MISSING
    exponent = int(f"{value:.2e}".split("e")[1])
    return _unsigned(f"{value:,.{min(max(2 - exponent, 0), 3)}f}") if value else "0"


def amount(value: float | None) -> str:
    """A whole number as one, any other with three significant digits: 84.0 → '84', 2.5 → '2.50'."""
    return figure(value) if value is None or value % 1 else whole(value)


def number(value: float | None) -> str:
    """Two decimals, for lengths and other plain numbers: 2.4512 → '2.45'."""
    if value is None or not math.isfinite(value):
        return MISSING
    return _unsigned(f"{value:,.2f}")


def bare(value: float | None, times: float = 1.0) -> str:
    """Two decimals and no separators, as other tools read numbers: 1234.5 → '1234.50'."""
    if value is None or not math.isfinite(value * times):
        return MISSING
    return _unsigned(f"{value * times:.2f}")


def count(value: int | None) -> str:
    """A whole number with thousands separated: 1234 → '1,234'."""
    return MISSING if value is None else f"{value:,}"


def whole(value: float | None) -> str:
    """A number whose fraction says nothing: 8.0 → '8'."""
    if value is None or not math.isfinite(value):
        return MISSING
    return _unsigned(f"{value:,.0f}")


def about(value: float) -> str:
    """What lies between two measured values: 46.99 → '47', 1.234 → '1.23'."""
    return whole(value) if value >= 10 else figure(value)


def duration(seconds: float | None) -> str:
    """Seconds with the unit that fits: 0.0123 → '12.3 ms', 1.25 → '1.25 s', 85e-6 → '85.0 µs'."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    rounded = abs(float(f"{seconds:.2e}"))
    if rounded == 0 or 1e-3 <= rounded < 1:
        return f"{figure(seconds * 1e3)} ms"
    return f"{figure(seconds)} s" if rounded >= 1 else f"{figure(seconds * 1e6)} µs"


def roughly(seconds: float) -> str:
    """A time to wait, as people say it: 45 → '45 s', 560 → '9 min', 5000 → '1 h 23 min'."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{max(round(seconds), 1)} s"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours else f"{minutes} min"


def milliseconds(seconds: float | None) -> str:
    """Seconds as a bare number of milliseconds, for a column headed ms: 1.25 → '1,250'."""
    return figure(None if seconds is None else seconds * 1e3)


def rate(tokens_per_s: float | None) -> str:
    """Tokens a second: 1234.5 → '1,234 tok/s'."""
    text = figure(tokens_per_s)
    return text if text == MISSING else f"{text} tok/s"


def hundredths(share: float | None) -> str:
    """A share 0…1 as a bare number of percent, for a column headed %: 0.6214 → '62.1'."""
    if share is None or not math.isfinite(share * 100):
        return MISSING
    return _unsigned(f"{share * 100:.1f}")


def percent(share: float | None) -> str:
    """A share 0…1: 0.6214 → '62.1 %'."""
    text = hundredths(share)
    return text if text == MISSING else f"{text} %"


def ratio(value: float | None) -> str:
    """With ÷ without: 1.1283 → '1.13×'."""
    text = number(value)
    return text if text == MISSING else f"{text}×"


def interval(value: Interval | None) -> str:
    """Both ends with two decimals: '[1.02, 1.25]'."""
    if value is None or not (math.isfinite(value.low) and math.isfinite(value.high)):
        return MISSING
    return f"[{number(value.low)}, {number(value.high)}]"


def judged(value: Judged) -> str:
    """What a bound was held against, in its unit: '312 ms', '-2.1 %', '1.08'."""
    if value.bound.relative:
        return percent(value.value)
    return duration(value.value) if in_seconds(value.bound.metric) else figure(value.value)


def _unsigned(text: str) -> str:
    """No sign on a zero: -0.00 reads as a loss that is not there."""
    return text.removeprefix("-") if text.strip("-0.,") == "" else text
