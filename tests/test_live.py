"""What is shown on stderr, where there is no terminal."""

from __future__ import annotations

import time

import pytest

from reports import live


def test_tokenizing_says_now_and_then_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((0.0, 1.0, 11.0, 11.0, 12.0, 30.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with live.tokenizing(1536) as done:
        for count in (1, 500, 900):
            done(count)
    assert capsys.readouterr().err.splitlines() == [
        "tokenizing 1,536 prompts: 500",
        "tokenizing 1,536 prompts: done in 30.0 s",
    ]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with live.tokenizing(3, quiet=True) as done:
        done(3)
    assert capsys.readouterr() == ("", "")
