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
    batch: Batch,
    prompts: Sequence[U32],
    streams: int,
    *,
    limit: int,
    apart_s: float = 0.0,
    turn_s: float = 0.0,
) -> Played:
    """All prompts in turn, `streams` at a time, which join one after the other, `apart_s` apart.

    `turn_s` pass from an answer's end to the stream's next request, one stream after the other:
    of 10 that end with a step the last asks again after 10 × turn_s.
    """
    queue, answers, emitted = deque(prompts), list[Answer](), list[tuple[float, int]]()
    asking = deque(n * apart_s for n in range(streams))  # when streams ask next, in order
    live: set[Answer] = set()
    now = full_from = full_to = 0.0
    while live or (queue and asking):
        if not live:
            now = max(now, asking[0])
        while queue and asking and asking[0] <= now:
            full_to = asking.popleft()
            answers.append(_ask(batch, queue.popleft(), limit, full_to, emitted))
            live.add(answers[-1])
            if len(answers) == streams:
                full_from = full_to
        now += batch.plan()
        batch.finish(now)
        ended = [answer for answer in live if answer.ended]
        live.difference_update(ended)
        busy = max(now, asking[-1]) if asking else now
        asking.extend(busy + turn_s * (n + 1) for n in range(len(ended)))
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
