"""What is drawn on stderr, and what is printed where there is no terminal."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator

import pytest

from loadgen.types import ClosedLoop, PhaseRecord, Record
from reports import live
from tests.records import ENGINE, run_info
from tests.test_progress import ANSWERS, plan, sample

END = PhaseRecord(
    name="c=1", load=ClosedLoop(concurrency=1), repeat=0, measured=True, started_s=0.0, ended_s=24.0
)


def records(tokens: int = 0) -> Iterator[Record]:
    """Two answers and 24 seconds, `tokens` a sample."""
    yield from ANSWERS
    yield from (sample(0.5 * n, tokens=tokens * n) for n in range(1, 48))
    yield END


def view(*, quiet: bool = False) -> live.Live:
    return live.Live(plan(), "test", run_info(), {"test": ENGINE}, quiet=quiet)


def test_without_a_terminal_there_is_a_line_every_ten_seconds_and_one_a_load(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with view() as see:
        for record in records(10):
            see(record)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ETA")[0] for line in lines] == [
        "test  c=1: 2 of 8 requests",
        "test  c=1: 2 of 8 requests",
        "test  c=1: 2 requests in 24.0 s, 20.0 tok/s, AL 2.33",
    ]


def test_quiet_says_one_line_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with view(quiet=True) as see:
        for record in records():
            see(record)
        assert capsys.readouterr().err == ""
    assert capsys.readouterr() == ("", "test: 1 load ended, 2 requests\n")


def terminal(monkeypatch: pytest.MonkeyPatch, term: str = "xterm") -> io.StringIO:
    """stderr as a terminal of 80 × 24."""
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    settings = {"FORCE_COLOR": "1", "TERM": term, "COLUMNS": "80", "LINES": "24"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return screen


def test_a_terminal_is_drawn_four_times_a_second_at_most_and_written_by_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal(monkeypatch)
    drawn: list[int] = []
    monkeypatch.setattr(live._Screen, "draw", lambda self, lines: drawn.append(len(lines)))
    before = threading.active_count()
    with view() as see:
        for n in range(1, 101):
            see(sample(n / 20))
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    assert len(drawn) == 5 * 4


def test_a_terminal_that_takes_nothing_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-S: what comes meanwhile is not drawn, and goes on being counted."""
    screen, stalled = terminal(monkeypatch), threading.Event()
    write = screen.write

    def wait(text: str) -> int:
        assert stalled.wait(20)
        return write(text)

    monkeypatch.setattr(screen, "write", wait)
    with view() as see:
        for n in range(1, 101):
            see(sample(n / 20))
        stalled.set()
    assert screen.getvalue().count("in flight") <= live.MOST_KEPT + 2, "frames were not kept"


def test_what_is_drawn_is_wiped_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    with view() as see:
        see(sample(0.5))
        see(ANSWERS[0])
        see(sample(1.0, tokens=16))
    text = screen.getvalue()
    assert "1 of 8 requests" in text
    assert text.rindex("\x1b[2K") > text.rindex("requests"), "the last thing is to erase lines"
    assert "\x1b[?25h" in text, "the cursor is shown again"


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch, "dumb")
    with view() as see:
        see(sample(10.5))
    assert screen.getvalue().startswith("test  c=1: 0 of 8 requests")
    assert "\x1b" not in screen.getvalue()


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


def test_quiet_tokenizing_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with live.tokenizing(3, quiet=True) as done:
        done(3)
    assert capsys.readouterr() == ("", "")
