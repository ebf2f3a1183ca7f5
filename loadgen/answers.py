"""What a model made of random input: trivial answers, loops, echoes, latched topics.

Random ids do not get average answers. Some are short replies that nothing was understood, which
drafters predict well; some pick one word of the noise and write on about it, which they predict
badly; some repeat the noise or themselves, which flatters n-gram drafters, or end at once. Labels
are by rule; "trivial" reads English alone. Thresholds are the reference's (§6.1–6.2), checked on
synthetic texts; empty answers and loops are what SmolLM2-135M gave on llama.cpp b11549. Must not:
judge real answers, change a figure.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loadgen.acceptance import chunks_disproved, decode_steps
from loadgen.stats import wilson
from loadgen.types import AnswerFigures, AnswerShare, Caveat, Engine, RequestRecord

LABELS = ("empty", "trivial", "loop", "echo", "latched")
"""In the order in which they are tried; an answer has one of them or none."""

FAMILIES = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\b(looks?|seems?|appears?)\b.{0,60}?\b(random|garbled|gibberish|jumbled|scrambled"
        r"|nonsens\w*|corrupt\w*|incoheren\w*|mixed|encod\w*|unrelated)",
        r"\b(could|can|would) you (please )?(clarify|rephrase|specify|explain|provide|tell me"
        r"|let me know|share)",
        r"\bnot (sure|clear)\b|\bunclear\b|\bunable to understand\b|\b(don't|do not) understand\b"
        r"|\b(doesn't|does not) (form|contain)\b",
        r"\bhow (can|may) i (help|assist)\b|\bhappy to (help|assist)\b"
        r"|\bwhat would you like me to do\b",
        r"\bclear (question|request)\b|\bmore (context|details|guidance)\b",
    )
)
"""Noise verdict, clarification, uncertainty, offer of help, missing request."""

LEXICAL_CHARS = 600
SHORT_TOKENS = 256
FLUENT = (0.25, 0.65)
ANCHORS_AMONG = 5
ECHO_SHARE = 0.30
LOOP_CHARS, LOOP_RUN, LOOP_FRESH = 200, 12, 0.25
SHINGLE_WORDS = 40
ALIKE = 0.3
FLAG_SHARE = 0.10
FLAG_ANSWERS = 32
BIMODAL = 0.555
"""Above this bimodality coefficient, that of a uniform distribution, there may be two humps."""

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_STOP = frozenset(
    _WORD.findall("""
a about after all also an and any are as at be because been before being between both but by
can could did do does each even for from further get had has have having he her here him his
how i if in into is it its just like make many may me might more most much must my no not
now of off on once one only or other our out over own same she should so some such than that
the their them then there these they this those through to too two under until up upon us
very was we were what when where which while who will with within without would you your
""")
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer as it is judged. `prompt` is the random prompt's text; "" where not known."""

    text: str
    prompt: str
    tokens: int
    finish_reason: str | None
    acceptance_length: float | None = None


def families(text: str) -> int:
    """How many of the five lexical families the beginning of an answer has: 0…5."""
    start = text[:LEXICAL_CHARS].casefold().replace("’", "'").replace("‘", "'")
    return sum(pattern.search(start) is not None for pattern in FAMILIES)


def label(answer: Answer, depth: int | None = None) -> str | None:
    """One of LABELS, or None. `depth` is k: a trivial answer is one that drafts predict well."""
    found = families(answer.text)
    short = answer.finish_reason == "stop" and answer.tokens <= SHORT_TOKENS
    length = answer.acceptance_length
    easy = length is not None and depth is not None and length >= 1 + 0.75 * depth
    if not answer.text.strip():
        return "empty"
    if found >= 2 or (found and short and easy):
        return "trivial"
    if looped(answer.text):
        return "loop"
    if not answer.prompt:
        return None
    if echoed(answer.text, answer.prompt) >= ECHO_SHARE:
        return "echo"
    long = answer.tokens >= SHORT_TOKENS or answer.finish_reason == "length"
    if long and fluent(answer.text) and anchors(answer.text, answer.prompt):
        return "latched"
    return None


def looped(text: str) -> bool:
    """Over and over the same: of its runs of 12 characters at most a quarter are new."""
    runs = [text[n : n + LOOP_RUN] for n in range(len(text) - LOOP_RUN + 1)]
    return len(text) >= LOOP_CHARS and len(set(runs)) <= LOOP_FRESH * len(runs)


def echoed(text: str, prompt: str) -> float:
    """The share 0…1 of an answer's runs of three words that stand in the prompt as they are."""
    said, given = _shingles(_words(text)), set(_shingles(_words(prompt)))
    return sum(run in given for run in said) / len(said) if said else 0.0


def fluent(text: str) -> bool:
    """Text, not noise: mostly letters, and as many function words as English has, if it is that."""
    if not text or text.count("\ufffd") > 0.02 * len(text):
        return False
    if sum(c.isalpha() or c.isspace() for c in text) < 0.7 * len(text):
        return False
    words = _words(text)
    low, high = FLUENT
    return not text.isascii() or (
        bool(words) and low <= sum(w in _STOP for w in words) / len(words) <= high
    )


def anchors(text: str, prompt: str) -> tuple[str, ...]:
    """Words that an answer keeps coming back to and that the prompt has once or twice."""
    said = Counter(w for w in _words(text) if len(w) >= 4 and w not in _STOP)
    given = _words(prompt)
    there, most = Counter(given), max(2.0, 0.005 * len(given))
    least = max(4.0, 0.01 * said.total())
    return tuple(
        word
        for word, count in said.most_common(ANCHORS_AMONG)
        if count >= least and 1 <= there[word] <= most
    )


def clustered(texts: Sequence[str]) -> int:
    """How many answers begin like some other: of any language, replies by a template."""
    sets = [set(_shingles(_words(text)[:SHINGLE_WORDS])) for text in texts]
    holders: dict[tuple[str, ...], list[int]] = {}
    for number, runs in enumerate(sets):
        for run in runs:
            holders.setdefault(run, []).append(number)
    alike = set()
    for number, runs in enumerate(sets):
        shared = Counter(other for run in runs for other in holders[run] if other != number)
        if any(n / (len(runs) + len(sets[o]) - n) >= ALIKE for o, n in shared.items()):
            alike.add(number)
    return len(alike)


def bimodality(values: Sequence[float]) -> float | None:
    """(skewness² + 1) ÷ kurtosis: 1 for two points, 0.555 uniform, 0.333 normal; None if flat."""
    n = len(values)
    mean = sum(values) / n if n else 0.0
    second, third, fourth = (sum((v - mean) ** p for v in values) / max(n, 1) for p in (2, 3, 4))
    if n < 4 or second <= 1e-12:
        return None
    return (third**2 / second**3 + 1) / (fourth / second**2)


def answer_figures(
    records: Sequence[RequestRecord], texts: Mapping[str, str], engine: Engine, depth: int | None
) -> AnswerFigures | None:
    """Shares of each label over completed records; None where no answer's text was kept.

    `texts`: prompt_id → what its ids say. Where steps are not known, no label has an AL.
    """
    told = [record for record in records if record.text is not None]
    disproved = bool(chunks_disproved(records, engine, depth))
    decoded = [_decoded(record, decode_steps(record, engine, disproved)) for record in told]
    answers = [
        Answer(
            text=record.text or "",
            prompt=texts.get(record.prompt_id, ""),
            tokens=record.osl_tokens,
            finish_reason=record.finish_reason,
            acceptance_length=None if pair is None else pair[0] / pair[1],
        )
        for record, pair in zip(told, decoded, strict=True)
    ]
    if not answers:
        return None
    known = all(a.prompt for a in answers)
    names = LABELS if known else LABELS[:3]
    labels = [label(answer, depth) for answer in answers]
    lengths = [a.acceptance_length for a in answers if a.acceptance_length is not None]
    alike = clustered([a.text for a in answers])
    return AnswerFigures(
        answers=len(answers),
        prompts_known=known,
        shares=tuple(_share(name, labels, decoded) for name in (*names, None)),
        clustered=AnswerShare(label="alike", count=alike, interval=wilson(alike, len(answers))),
        bimodality=bimodality(lengths),
    )


def _share(
    name: str | None, labels: Sequence[str | None], decoded: Sequence[tuple[int, int] | None]
) -> AnswerShare:
    own = [pair for found, pair in zip(labels, decoded, strict=True) if found == name]
    known = [pair for pair in own if pair is not None]
    steps = sum(n for _, n in known)
    return AnswerShare(
        label=name or "none of these",
        count=len(own),
        interval=wilson(len(own), len(labels)),
        acceptance_length=sum(t for t, _ in known) / steps
        if steps and len(known) == len(own)
        else None,
    )


def _decoded(record: RequestRecord, steps: int | None) -> tuple[int, int] | None:
    """Tokens after the prefill's one, and decode steps; None where steps are not known or none."""
    return (record.osl_tokens - 1, steps) if steps else None


def answer_caveats(found: AnswerFigures | None, phase: str) -> Iterator[Caveat]:
    """A run on random input is a control; and where its answers are no one's traffic."""
    if found is None or found.answers < FLAG_ANSWERS:
        return
    said = [
        f"{share.count} of {found.answers} are {share.label}"
        for share in found.shares
        if share.label in LABELS and share.count >= FLAG_SHARE * found.answers
    ]
    if said:
        yield Caveat(
            code="random-unrepresentative",
            message=f"Answers to the random prompts are not what users get: {', '.join(said)}.",
            advice="Do not take speed or acceptance from random input: measure --scenario "
            "throughput at the same --isl, and set both side by side with draftload compare.",
            phase=phase,
        )


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold().replace("’", "'"))


def _shingles(words: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(words[n : n + 3]) for n in range(len(words) - 2)]
