"""The error tree. Whose fault it is, is the type.

    DraftloadError
    ├── UserError     flags, scenario, dataset, an unreachable URL: fix the input   exit code 2
    ├── ServerError   the server would not start, or went away: fix the server      exit code 1
    └── Bug           draftload broke one of its own promises: report it            exit code 1

A failed *request* is not an error but an `Outcome` in its record: it never stops a run. Messages
say what happened with the value, what was expected, and what to do. Must not: import ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DraftloadError(Exception):
    """Anything draftload raises on purpose; `exit_code` is the process's."""

    exit_code = 1


class UserError(DraftloadError):
    """The input was wrong: nothing was measured."""

    exit_code = 2


class ServerError(DraftloadError):
    """The server refused, broke, timed out or would not start."""


class Bug(DraftloadError):
    """An invariant of ours does not hold; the figures cannot be trusted."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'coding'?"` for the nearest of `known`, else `""`: the tail of a message."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
