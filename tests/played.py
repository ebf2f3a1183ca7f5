"""The simulated engine under a closed loop, in its own time: what a client ought to measure."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from loadgen.types import U32
from servers.simulated import BOS, EOS, Answer, Batch, encode


@dataclass(frozen=True, kw_only=True)
class Played:
    """Answers in the order in which they were asked for, and each emission: when and how many
    tokens. Full: from the moment when in-flight reached its target to the last dispatch."""

    answers: list[Answer] = field(default_factory=list)
    emitted: list[tuple[float, int]] = field(default_factory=list)
    full_from_s: float = 0.0
    full_to_s: float = 0.0

    def steady(self) -> float:
        """Output tokens a second inside the full window."""
        inside = sum(n for at, n in self.emitted if self.full_from_s <= at <= self.full_to_s)
        return inside / (self.full_to_s - self.full_from_s)


def as_sent(text: str) -> U32:
    """The ids of one user message, in the simulator's own template."""
    ids = [BOS, *encode(f"user\n{text}"), EOS, *encode("assistant\n")]
    return array("I", ids)


def play(
    batch: Batch, prompts: Sequence[U32], streams: int, *, limit: int, apart_s: float = 0.0
) -> Played:
    """All prompts in turn, `streams` at a time, which join one after the other, `apart_s` apart."""
    queue, answers, emitted = deque(prompts), list[Answer](), list[tuple[float, int]]()
    live: set[Answer] = set()
    now = full_from = full_to = 0.0
    joined = 0
    while queue or live:
        while joined < streams and joined * apart_s <= now:
            joined += 1
        while queue and len(live) < joined:
            answers.append(_ask(batch, queue.popleft(), limit, now, emitted))
            live.add(answers[-1])
            full_to = now
        if joined == streams and not full_from:
            full_from = now
        if not live:
            now = joined * apart_s
            continue
        now += batch.plan()
        batch.finish(now)
        live = {answer for answer in live if not answer.ended}
    return Played(answers=answers, emitted=emitted, full_from_s=full_from, full_to_s=full_to)


def _ask(
    batch: Batch, prompt: U32, limit: int, now: float, emitted: list[tuple[float, int]]
) -> Answer:
    answer = Answer(batch, prompt, limit=limit, ignore_eos=False)
    before = 0

    def emit(end: int) -> None:
        nonlocal before
        emitted.append((answer.last_at, end - before))
        before = end

    answer.emit, answer.asked_at = emit, now
    batch.waiting[answer] = None
    return answer
